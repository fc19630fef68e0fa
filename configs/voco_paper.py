"""VoCo as first published (CVPR 2024): one network, no teacher, no convolution blocks.

    python main.py --config configs/voco_paper.py --workdir runs/voco_paper

One SwinViT without the v2 blocks; its last stage, averaged over space, is the feature; base crops
are stop-gradient in the prediction. What is not said of this recipe is as in voco_10k.py: data,
crops, optimizer.
"""

import ml_collections

from configs import voco_10k


def get_config() -> ml_collections.ConfigDict:
    """voco_10k with the first public code's network and loss."""
    config = voco_10k.get_config()
    config.recipe = "paper"
    config.model.use_v2 = False
    config.model.conv_encoders = False
    config.teacher.scope = "none"
    config.init.allow_unexpected = ("encoder*", *config.init.allow_unexpected)
    return config
