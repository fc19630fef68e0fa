"""Segmentation of the liver and its tumours: LiTS, 108 volumes to train on, 23 held out.

    python main.py --config configs/finetune_lits.py --workdir runs/lits \\
        --config.init_from=VoCo_10k.safetensors

expects data/LiTS with dataset_lits.json (a Decathlon list with the names of Decathlon task 3) and
the folders that it names. `:published` are the settings of the published extension (LSM); the
published figure, 96.5, can only be the liver's, its code trains all three classes. What differs:

- crops: two of one volume in an update there, here each of another volume; the same number of them;
- validation: on the resampled grid alone there, windows overlap by 0.75 with constant weights.
"""

import ml_collections

from configs import finetune_btcv


def get_config(variant: str = "corrected") -> ml_collections.ConfigDict:
    """finetune_btcv with the schedule, crops and classes of LiTS."""
    config = finetune_btcv.get_config(variant)
    config.total_steps = 54_000  # 500 epochs
    config.batch_size = 2
    source = config.data.sources.ct
    source.roots = ("data/LiTS",)
    source.lists = ("data/LiTS/dataset_lits.json",)
    source.chain.classes = finetune_btcv.one_value_each(("liver", "tumour"))
    config.crops.foreground = 0.5
    config.augment.shift_probability = 0.1
    config.augment.scale_probability = 0.0
    config.optimizer.warmup_steps = 540  # 5 epochs
    return config
