"""VoCo-B on the 10k set, with the published settings.

Prepare once (0.14 TB for 9,863 volumes before compression), then train:

    python -m voco_jax.data.prepare --config configs/voco_10k.py
    python main.py --config configs/voco_10k.py --workdir runs/voco_10k

The seven data sets are folders under data/, the lists under data/lists/ (see docs/data.md).
Without the lists, --config.data.sources.ct.lists="()" takes every volume found in the folders.
Every other config file starts from this one.
"""

import ml_collections

LISTS = {
    "btcv.json": "BTCV",
    "dataset_TCIAcovid19_0.json": "TCIAcovid19",
    "dataset_LUNA16_0.json": "Luna16-jx",
    "stoic21.json": "stoic21",
    "Totalsegmentator_dataset.json": "Totalsegmentator_dataset",
    "flare23.json": "Flare23",
    "HNSCC.json": "HNSCC_convert_v1",
}


def get_config() -> ml_collections.ConfigDict:
    """Every setting there is; their meanings are in voco_jax/config/."""
    config = ml_collections.ConfigDict()
    config.task = "voco"
    config.recipe = "voco_10k"
    config.seed = 0
    config.total_steps = 250_000
    config.batch_size = 2
    config.log_every_steps = 50
    config.init_from = ""
    config.export_to = "{workdir}/voco_encoder.safetensors"
    config.data = {
        "sources": {
            "ct": {
                "cache": "data/cache_10k",
                "roots": tuple(f"data/{folder}" for folder in LISTS.values()),
                "lists": tuple(f"data/lists/{name}" for name in LISTS),
                "weight": 1.0,
                "chain": {
                    "axes": "RAS",
                    "spacing": (),
                    "window": (-175.0, 250.0),
                    "window_unit": "HU",
                    "crop_foreground": True,
                    "foreground_threshold": 0.3,
                    "fit": "resize",
                    "volume_size": (384, 384, 96),
                    "dtype": "uint8",
                },
            },
        },
        "phantoms": 0,
        "prepare": False,
        "held_out": 0.0,  # the lists' own validation volumes are enough
        "workers": 4,
        "prefetch": 2,
    }
    config.crops = {
        "grid": (4, 4, 1),
        "crop_size": (96, 96, 96),
        "encoder_size": (64, 64, 64),
        "sub_volumes": 2,
    }
    config.augment = {
        "flip_probability": 0.2,
        "rotate_probability": 0.2,
        "shift_probability": 0.1,
        "shift": 0.1,
    }
    config.model = {
        "encoder": "swin_unetr",
        "feature_size": 48,
        "depths": (2, 2, 2, 2),
        "num_heads": (3, 6, 12, 24),
        "window_size": (7, 7, 7),
        "patch_merging": "merging",  # of MONAI since 1.5; "legacy" is that of the published weights
        "use_v2": True,
        "conv_encoders": True,
        "drop_path_rate": 0.0,
        "remat": True,
        "crops_per_pass": 9,
        "dtype": "bfloat16",
        "convolution": "auto",
        "attention": "auto",
    }
    config.projector_size = 2048
    config.teacher = {"scope": "network", "momentum": 0.9}
    config.loss = {"pos": 1.0, "neg": 1.0, "reg": 1.0, "inter": 1.0}
    config.dropout = {"rate": 0.0, "kind": "embedding"}
    config.optimizer = {
        "learning_rate": 1e-4,
        "weight_decay": 0.01,
        "beta1": 0.9,
        "beta2": 0.999,
        "eps": 1e-8,
        "warmup_steps": 5_000,
    }
    config.validation = {
        "every_steps": 5_000,
        "volumes": 64,
        "sub_volumes": 8,
        "probe_labels": "",
    }
    config.checkpoint = {
        "every_steps": 1_000,
        "keep": 3,
        "keep_every_steps": 50_000,
        "keep_best": 1,
    }
    config.mesh = {"fsdp": 1}
    config.profile = {"start": 0, "steps": 5}
    config.init = {
        "allow_missing": ("proj_head.*",),
        "allow_unexpected": ("decoder*", "out.*", "proj_head.*"),
    }
    return config
