"""Random streams by name: what one draws depends on no other."""

import zlib
from functools import partial

import jax
import numpy as np
from chains import CHAIN_10K

from voco_jax.config.pretraining import Crops
from voco_jax.data.cache import Cache
from voco_jax.data.manifest import Entry
from voco_jax.data.pipeline import draw
from voco_jax.training.streams import stream
from voco_jax.voco import augment

PROBABILITIES = {"flip_probability": 0.5, "rotate_probability": 0.5, "shift_probability": 0.5}


def test_a_stream_is_its_names_checksum_folded_in():
    key = jax.random.key(3)
    for name in ("augment", "drop_path", "dropout", "student", "teacher"):
        folded = jax.random.fold_in(key, np.uint32(zlib.crc32(name.encode())))
        np.testing.assert_array_equal(
            jax.random.key_data(stream(key, name)), jax.random.key_data(folded)
        )


def test_streams_of_crops_do_not_move_each_other(monkeypatch):
    """Without one of the streams (its key another's) the others draw what they drew."""
    drawn = augment.draw(jax.random.key(0), 64, shift=0.1, **PROBABILITIES)
    names = []

    def without(left_out, key, name):
        names.append(name)
        return stream(key, "another" if name == left_out else name)

    for left_out, changed in {"flip": "flips", "turns": "turns", "shifts": "shifts"}.items():
        monkeypatch.setattr(augment, "stream", partial(without, left_out))
        found = augment.draw(jax.random.key(0), 64, shift=0.1, **PROBABILITIES)
        for field in ("flips", "turns", "shifts"):
            same = bool((getattr(found, field) == getattr(drawn, field)).all())
            assert same == (field != changed)
    assert set(names) == {"flip", "rotate", "turns", "shift", "shifts"}


def test_sub_volumes_do_not_depend_on_the_part_of_the_volume():
    """A volume that keeps its size needs numbers for the part; its sub-volumes stay the same."""
    crops = Crops((4, 4, 1), (96, 96, 96), (64, 64, 64), 2)
    cache = Cache("/none", CHAIN_10K, ())
    found = []
    for stored in ((384, 384, 96), (500, 400, 200)):
        entry = Entry.__new__(Entry)
        object.__setattr__(entry, "stored", stored)
        found.append(draw(cache, entry, crops, 2, np.random.default_rng(5)))
    np.testing.assert_array_equal(found[0].origins, found[1].origins)
    assert found[0].corner == (0, 0, 0) != found[1].corner
