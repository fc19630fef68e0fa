"""Segmentation of the spleen: Decathlon task 9, 32 volumes to train on, 9 held out.

    python main.py --config configs/finetune_spleen.py --workdir runs/spleen \\
        --config.init_from=VoCo_10k.safetensors

expects data/Task09_Spleen with spleen.json (a Decathlon list) and the folders that it names.
`:published` are the settings of the published extension (LSM). What differs:

- crops: four of one volume in an update there, here each of another volume; the same number;
- validation: on the resampled grid alone there, windows overlap by 0.75 with constant weights.
"""

import ml_collections

from configs import finetune_btcv


def get_config(variant: str = "corrected") -> ml_collections.ConfigDict:
    """finetune_btcv with the schedule, crops and class of the spleen's task."""
    config = finetune_btcv.get_config(variant)
    config.total_steps = 16_000  # 500 epochs
    config.batch_size = 4
    source = config.data.sources.ct
    source.roots = ("data/Task09_Spleen",)
    source.lists = ("data/Task09_Spleen/spleen.json",)
    source.chain.classes = finetune_btcv.one_value_each(("spleen",))
    config.augment.shift_probability = 0.1
    config.augment.scale_probability = 0.0
    config.optimizer.warmup_steps = 160  # 5 epochs
    return config
