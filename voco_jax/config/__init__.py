"""Experiments as frozen, validated dataclasses: no JAX, and no field has a default here.

A config file's `get_config()` returns an `ml_collections.ConfigDict`; `load` reads it, applies
`--config.section.field=value` and makes the experiment that its `task` names, as
`pretraining.Pretraining`. `configs/voco_10k.py` spells out every setting, the others start from it.
The comments of the dataclasses are the reference of the settings.
"""
