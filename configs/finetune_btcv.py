"""Segmentation of 13 abdominal organs: BTCV, 24 volumes to train on, 6 held out.

    python main.py --config configs/finetune_btcv.py --workdir runs/btcv \\
        --config.init_from=VoCo_10k.safetensors

expects data/BTCV with dataset_0.json (a Decathlon list, "training" 24, "validation" 6) and the
folders that it names. Every other finetune_*.py starts from this one.

With `finetune_btcv.py:published` the published settings (VoCo, CVPR 2024). What differs, and why:

- schedule: the published code counts updates where epochs were meant, so that the rate reaches 0 in
  epoch 125 of 3,000 and then rises again, with a period of 5,800 updates; `:published` ends at its
  first 0 (3,000 updates, 100 of them warm-up), ours decays over the whole run.
- crops: 16 of one volume in an update there, here each of another volume.
- validation: windows overlap by 0.75 with constant weights there, on the resampled grid alone.
"""

import ml_collections

from configs import voco_10k

ORGANS = (
    *("spleen", "right_kidney", "left_kidney", "gallbladder", "esophagus", "liver", "stomach"),
    *("aorta", "inferior_vena_cava", "portal_and_splenic_veins", "pancreas"),
    *("right_adrenal_gland", "left_adrenal_gland"),
)


def get_config(variant: str = "corrected") -> ml_collections.ConfigDict:
    """Every setting there is; their meanings are in voco_jax/config/."""
    published = is_published(variant)
    base = voco_10k.get_config()
    config = ml_collections.ConfigDict()
    config.task = "segmentation"
    config.seed = 0
    config.total_steps = 3_000 if published else 30_000
    config.batch_size = 16
    config.log_every_steps = 50
    config.init_from = ""
    config.export_to = "{workdir}/segmentation.safetensors"
    config.data = {
        "sources": {
            "ct": {
                "cache": "{workdir}/cache",
                "roots": ("data/BTCV",),
                "lists": ("data/BTCV/dataset_0.json",),
                "weight": 1.0,
                "chain": {
                    "axes": "RAS",
                    "spacing": (1.5, 1.5, 1.5),
                    "window": (-175.0, 250.0),
                    "window_unit": "HU",
                    "crop_foreground": True,
                    "foreground_threshold": 0.0,
                    "fit": "random_crop",
                    "volume_size": (96, 96, 96),
                    "dtype": "uint8",
                    "classes": one_value_each(ORGANS),
                    "channels": (),
                },
            },
        },
        "phantoms": 0,
        "prepare": True,
        "held_out": 0.0,  # the list's own validation volumes are enough
        "workers": 4,
        "prefetch": 2,
        "folds": 0,
        "fold": 0,
        "patient": "",
        "labelled_fraction": 1.0,
    }
    config.crops = {"size": (96, 96, 96), "foreground": 0.75, "balance": "voxels"}
    config.augment = {
        "flip_probability": (0.2, 0.2, 0.2),
        "rotate_probability": 0.2,
        "scale_probability": 0.1,
        "scale": 0.1,
        "shift_probability": 0.5,
        "shift": 0.1,
        "noise_probability": 0.0,
        "noise": 0.1,
        "gamma_probability": 0.0,
        "gamma": 0.4,
    }
    model = base.model.to_dict()
    config.model = model | {"crops_per_pass": 2}
    config.loss = {
        "dice": 1.0,
        "cross_entropy": 1.0,
        "include_background": False,
        "smooth_nr": 0.0,
        "smooth_dr": 1e-6,
        "batch": False,
    }
    config.optimizer = {
        "learning_rate": 3e-4,
        "weight_decay": 1e-5,
        "beta1": 0.9,
        "beta2": 0.999,
        "eps": 1e-8,
        "warmup_steps": 100 if published else 500,
        "amsgrad": False,
        "layer_decay": 1.0,
        "freeze_encoder": False,
    }
    config.validation = {
        "every_steps": 1_000,
        "volumes": 64,
        "overlap": 0.75 if published else 0.5,
        "weights": "constant" if published else "gaussian",
    }
    config.checkpoint = {"every_steps": 1_000, "keep": 2, "keep_every_steps": 0, "keep_best": 1}
    config.mesh = {"fsdp": 1}
    config.profile = {"start": 0, "steps": 5}
    config.init = {
        # An encoder's file has no decoder; one with other classes has another last layer.
        "allow_missing": ("decoder*", "out.*"),
        "allow_unexpected": ("proj_head.*", "out.*"),
        "twin": "none",
    }
    return config


def is_published(variant: str) -> bool:
    """Whether what follows the config file's name asks for the published settings."""
    if variant not in ("corrected", "published"):
        raise ValueError(f"found {variant!r}, expected 'corrected' or 'published'")
    return variant == "published"


def one_value_each(names: tuple[str, ...]) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """`chain.classes` where the background is 0 and the classes are 1, 2, ... in the files."""
    return tuple((name, (value,)) for value, name in enumerate(("background", *names)))
