"""Trains what a config file says: see voco_jax/train.py. After `pip install .` it is voco-train."""

from voco_jax.train import command

if __name__ == "__main__":
    command()
