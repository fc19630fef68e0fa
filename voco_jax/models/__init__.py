"""The networks as Flax Linen modules; no mesh, no configuration files, no data.

`network.Network` is an encoder and a projector; `encoders.ENCODERS` names the encoders and what the
rest of the package must know of each. `swin_unetr` has its parts in `swin` and `conv_blocks`; its
parameter names spell MONAI's.
"""
