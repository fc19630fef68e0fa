"""Segmentation of seven parts of the heart in CT: MM-WHS, 16 volumes to train on, 4 held out.

    python main.py --config configs/finetune_mmwhs.py --workdir runs/mmwhs \\
        --config.init_from=VoCo_10k.safetensors

expects data/MM-WHS with dataset.json (a Decathlon list) and the folders that it names. The names of
the values are those of the data set; the published list names them otherwise than its own code
uses them. `:published` are the settings of VoCo (CVPR 2024). What differs, and why:

- `use_v2`: off there, so that the v2 blocks of a pre-trained file are silently dropped; on here;
- rate: 1e-3 there, high for a network that starts from weights; 3e-4 here, as in the later code;
- crops: four of one volume in an update there, here each of another volume; the same number;
- validation: on the resampled grid alone there, windows overlap by 0.75 with constant weights.
"""

import ml_collections

from configs import finetune_btcv

VALUES = {
    "myocardium": 205,
    "left_atrium": 420,
    "left_ventricle": 500,
    "right_atrium": 550,
    "right_ventricle": 600,
    "ascending_aorta": 820,
    "pulmonary_artery": 850,
}


def get_config(variant: str = "corrected") -> ml_collections.ConfigDict:
    """finetune_btcv with the window, schedule, crops and classes of the heart."""
    published = finetune_btcv.is_published(variant)
    config = finetune_btcv.get_config(variant)
    config.total_steps = 16_000  # 1,000 epochs
    config.batch_size = 4
    size = (64, 64, 64)
    source = config.data.sources.ct
    source.roots = ("data/MM-WHS",)
    source.lists = ("data/MM-WHS/dataset.json",)
    source.chain.window = (0.0, 1700.0)
    source.chain.window_unit = "value"  # such a window is of CTs stored without their intercept
    source.chain.volume_size = size
    source.chain.classes = (
        ("background", (0,)),
        *((name, (value,)) for name, value in VALUES.items()),
    )
    config.crops.size = size
    config.crops.foreground = 0.9
    config.augment.shift_probability = 0.0
    config.augment.scale_probability = 0.0
    config.model.use_v2 = not published
    config.optimizer.learning_rate = 1e-3 if published else 3e-4
    config.optimizer.weight_decay = 0.01
    config.optimizer.amsgrad = True
    config.optimizer.warmup_steps = 800  # 50 epochs
    return config
