"""main.py with the strided CNN in its tables, and a config file: compiled in seconds.

python tests/strided_main.py --config tests/strided_main.py --workdir DIR
"""

from configs import tiny


def get_config():
    values = tiny.get_config().to_dict()
    model = values["model"]
    common = ("remat", "crops_per_pass", "dtype", "convolution", "attention")
    values["model"] = {name: model[name] for name in common}
    # A layer of 512 x 512 is just large enough to be split over devices.
    values["model"] |= {"encoder": "strided_cnn", "features": 4, "projector_size": 512}
    return values


if __name__ == "__main__":
    import strided_cnn

    import main
    from voco_jax.config import encoders as settings
    from voco_jax.models.encoders import ENCODERS

    ENCODERS["strided_cnn"] = strided_cnn.ENCODER
    settings.ENCODERS["strided_cnn"] = strided_cnn.Settings
    main.main()
