"""The networks of VoCo as Flax Linen modules; no mesh, no configuration files, no data.

`swin_unetr` holds what the rest of the package builds (`SwinUNETREncoder`, `VoCoNetwork`) from the
parts in `swin`, `conv_blocks` and `projector`. Parameter names spell MONAI's: see `swin_unetr`.
"""
