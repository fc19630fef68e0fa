"""Segmentation of brain tumours in MR: BraTS 2021, 1,251 patients in five folds.

    python main.py --config configs/finetune_brats.py --workdir runs/brats \\
        --config.init_from=VoCo_10k.safetensors

expects data/BraTS21 with brats21_folds.json (a Decathlon list; "image" is the four paths of FLAIR,
T1 with contrast, T1 and T2, in this order; "fold" 0 to 4) and the folders that it names. Fold 0 is
held out; --config.data.fold=1 takes another. The stem of weights for one channel is spread over all
four; published code leaves it at random.

voco_jax.evaluation.predict takes NAME_flair.nii.gz, NAME_t1ce.nii.gz, NAME_t1.nii.gz and
NAME_t2.nii.gz. BraTS compares the tumour core, the whole tumour and the enhancing tumour:

    python -m voco_jax.evaluation.evaluate --reference labels --prediction masks \\
        --classes TC=1,3,4 WT=1,2,3,4 ET=3,4

(the label files have 4 where our masks have 3). `:published` are the settings of the published
extension (LSM). What differs, and why:

- intensities: z-scores of each channel's voxels that are not 0 there; `:published` has these from
  -5 to 15, as 0 to 1 in float16, which the first layers can scale. Ours are percentiles of each
  channel, which one bright vessel does not move, in a quarter of the cache.
- augmentation: flips alone there; ours adds scales and shifts, as for the other tasks.
- validation: on the resampled grid, which here is the files' own but for the box of the brain;
  windows overlap by 0.75 with constant weights there. Its Dice of a case without a class is 0
  there; here such a case does not count, unless the class is predicted.
"""

import ml_collections

from configs import finetune_btcv


def get_config(variant: str = "corrected") -> ml_collections.ConfigDict:
    """finetune_btcv with four channels, the voxels as stored, and crops of 128x128x128."""
    published = finetune_btcv.is_published(variant)
    config = finetune_btcv.get_config(variant)
    config.total_steps = 100_000  # 100 epochs
    config.batch_size = 1
    size = (128, 128, 128)
    source = config.data.sources.ct.to_dict()
    source["roots"] = ("data/BraTS21",)
    source["lists"] = ("data/BraTS21/brats21_folds.json",)
    source["chain"] |= {
        "spacing": (),  # 1 mm
        "window": (-5.0, 15.0) if published else (0.1, 99.9),
        "window_unit": "deviation" if published else "percentile",
        "dtype": "float16" if published else "uint8",
        "volume_size": size,
        "channels": ("flair", "t1ce", "t1", "t2"),
        "classes": (
            ("background", (0,)),
            ("necrosis", (1,)),
            ("edema", (2,)),
            ("enhancing", (4,)),
        ),
    }
    config.data.sources = {"mr": source}
    config.data.folds = 5
    config.crops.size = size
    config.crops.foreground = 0.5
    probability = 0.1 if published else 0.2
    config.augment.flip_probability = (probability,) * 3
    config.augment.rotate_probability = 0.0
    config.augment.scale_probability = 0.0 if published else 0.1
    config.augment.shift_probability = 0.0 if published else 0.1
    config.optimizer.warmup_steps = 5_000  # 5 epochs
    config.validation.every_steps = 5_000
    config.validation.volumes = 251
    return config
