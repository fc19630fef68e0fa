"""What pyproject.toml cannot say: configs/ becomes a part of the package, found with the others."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["voco_jax*"]), "voco_jax.configs"],
    package_dir={"voco_jax.configs": "configs"},
)
