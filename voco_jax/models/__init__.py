"""The networks as Flax Linen modules; no mesh, no configuration files, no data.

`network` has an encoder and what follows it: a projector, a decoder or a classifier;
`encoders.ENCODERS` names the encoders and what the rest of the package must know of each.
`swin_unetr` has its parts in `swin` and `conv_blocks`, its decoder in `swin_unetr_decoder`; its
parameter names spell MONAI's.
"""
