"""main.py with the strided CNN in its tables, and a config file: compiled in seconds.

python tests/strided_main.py --config tests/strided_main.py --workdir DIR
"""

import dataclasses

from configs import tiny
from voco_jax.config import encoders


def get_config():
    values = tiny.get_config().to_dict()
    common = {field.name for field in dataclasses.fields(encoders.Model)}
    values["model"] = {name: x for name, x in values["model"].items() if name in common}
    # A layer of 512 x 512 is just large enough to be split over devices.
    values["model"] |= {"encoder": "strided_cnn", "features": 4}
    values["projector_size"] = 512
    return values


if __name__ == "__main__":
    import strided_cnn

    from voco_jax import train
    from voco_jax.models.encoders import ENCODERS

    ENCODERS["strided_cnn"] = strided_cnn.ENCODER
    encoders.ENCODERS["strided_cnn"] = strided_cnn.Settings
    train.main()
