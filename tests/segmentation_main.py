"""main.py with the strided CNN and its decoder, segmenting phantoms: compiled in seconds.

python tests/segmentation_main.py --config tests/segmentation_main.py --workdir DIR
"""

import dataclasses

from configs import finetune_demo
from voco_jax.config import encoders


def get_config():
    values = finetune_demo.get_config().to_dict()
    common = {field.name for field in dataclasses.fields(encoders.Model)}
    values["model"] = {name: x for name, x in values["model"].items() if name in common}
    values["model"] |= {"encoder": "strided_cnn", "features": 8}
    values |= {"total_steps": 12, "log_every_steps": 1}
    values["data"] |= {"phantoms": 6, "held_out": 0.3}
    chain = values["data"]["sources"]["ct"]["chain"]
    chain |= {"spacing": (12.0, 12.0, 12.0), "volume_size": (32, 32, 16)}
    values["crops"]["size"] = (32, 32, 16)
    values["optimizer"] |= {"warmup_steps": 2, "learning_rate": 1e-2}
    values["validation"]["every_steps"] = 4
    values["checkpoint"]["every_steps"] = 3
    return values


if __name__ == "__main__":
    import strided_cnn

    from voco_jax import train
    from voco_jax.models.encoders import ENCODERS

    ENCODERS["strided_cnn"] = strided_cnn.ENCODER
    encoders.ENCODERS["strided_cnn"] = strided_cnn.Settings
    train.main()
