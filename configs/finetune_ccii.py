"""Classification of chest CTs as normal, common pneumonia or COVID-19: CC-CCII, fold 0.

    python main.py --config configs/finetune_ccii.py --workdir runs/ccii \\
        --config.init_from=VoCo_B_SSL_head.pt

expects data/CC-CCII with a folder of PNG or JPEG slices for each scan, CLASS/PATIENT/SCAN as the
archives unpack, and the published CC_CCII_fold0_train.csv and CC_CCII_fold0_valid.csv (2,514 and
1,664 scans, no patient in both); --config.data.sources.ct.lists names another fold.

With `finetune_ccii.py:published` the published settings (VoCo, CVPR 2024), as far as they can be.
Neither is the published protocol in all; what differs, and why:

- slices: published is the middle 384x384 of 512x512, in training moved by up to 18 pixels, resized
  to 256x256. `:published` resamples to 1.5 pixels first, which is the same scale, and moves the
  crop by up to 12 of these; ours takes whole slices, so that nothing beside the middle is lost.
- depth: published is every scan at its own, concatenated with itself. Volumes of one size are
  compiled once: `:published` takes the middle 128 slices (air is added to fewer), ours scales the
  scan to 64 slices, so that both ends are in.
- head: published is the mean of the decoder's last map and one linear layer; here the classifier
  takes the encoder's pooled features, for which no decoder is computed, or started at random.
- evaluation: the published script leaves out the resizing of the training, and its main.py does
  not start (an argument is missing). Here validation, predict and training prepare images alike.
- schedule: as published, 100 epochs of which 5 are warm-up: 62,850 updates of 4 scans.
- selection: the best epoch on the validation scans is what is published; here, too, the checkpoint
  is chosen and reported on the same scans. For a figure without that use data.folds.
"""

import ml_collections

from configs import finetune_btcv


def get_config(variant: str = "corrected") -> ml_collections.ConfigDict:
    """finetune_btcv with a class for every volume instead of every voxel."""
    published = finetune_btcv.is_published(variant)
    config = finetune_btcv.get_config()
    del config.loss, config.validation.overlap, config.validation.weights
    config.task = "classification"
    config.total_steps = 62_850
    config.batch_size = 4
    config.log_every_steps = 50
    config.export_to = "{workdir}/classification.safetensors"
    size = (256, 256, 128) if published else (256, 256, 64)
    source = config.data.sources.ct
    source.roots = ("data/CC-CCII", "data/CC-CCII")
    source.lists = (
        "data/CC-CCII/CC_CCII_fold0_train.csv",
        "data/CC-CCII/CC_CCII_fold0_valid.csv",
    )
    source.chain.spacing = (1.5, 1.5, 1.0) if published else ()  # a pixel counts as 1 mm
    source.chain.window = (0.0, 255.0)
    source.chain.window_unit = "value"  # of the pictures, not in HU
    source.chain.crop_foreground = False
    source.chain.fit = "random_crop" if published else "resize"
    source.chain.volume_size = size
    del source.chain.channels
    source.chain.classes = (("Normal", (0,)), ("CP", (1,)), ("NCP", (2,)))
    config.data.patient = "(.+)/[^/]+$"  # CC-CCII/CLASS/PATIENT/SCAN
    config.crops = {"size": size, "shift": (12, 12, 0) if published else (0, 0, 0)}
    config.augment.flip_probability = (0.0, 0.0, 0.5)
    config.augment.rotate_probability = 0.0
    config.augment.scale_probability = 1.0
    config.augment.scale = 0.05
    config.augment.shift_probability = 1.0
    config.augment.shift = 0.07
    config.head = {"hidden": 0}
    config.model.crops_per_pass = 1
    config.optimizer.learning_rate = 3e-4
    config.optimizer.weight_decay = 0.01
    config.optimizer.amsgrad = True
    config.optimizer.warmup_steps = 3_142
    config.validation.every_steps = 3_142
    config.validation.volumes = 2_000
    config.checkpoint.every_steps = 1_000
    config.init.allow_missing = ("classifier.*",)
    config.init.allow_unexpected = ("proj_head.*", "decoder*", "out.*", "classifier.*")
    return config
