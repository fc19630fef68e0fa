"""The mesh: what is split over which devices."""

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from voco_jax.errors import InputError
from voco_jax.training import mesh as meshes


def test_large_arrays_are_split_along_their_longest_axis():
    mesh = AbstractMesh((2, 4), ("data", "fsdp"))
    tree = {
        "wide": jax.ShapeDtypeStruct((512, 2048), np.float32),
        "odd": jax.ShapeDtypeStruct((3, 3, 3, 514, 516), np.float32),
        "small": jax.ShapeDtypeStruct((256, 256), np.float32),
        "prime": jax.ShapeDtypeStruct((1031, 1033), np.float32),
        "scalar": jax.ShapeDtypeStruct((), np.int32),
    }
    specs = {name: s.spec for name, s in meshes.state_sharding(mesh, tree).items()}
    assert specs == {
        "wide": PartitionSpec(None, "fsdp"),
        "odd": PartitionSpec(None, None, None, None, "fsdp"),
        "small": PartitionSpec(),
        "prime": PartitionSpec(),
        "scalar": PartitionSpec(),
    }


def test_one_copy_each_without_fsdp():
    mesh = AbstractMesh((8, 1), ("data", "fsdp"))
    tree = {"wide": jax.ShapeDtypeStruct((512, 2048), np.float32)}
    assert meshes.state_sharding(mesh, tree)["wide"].spec == PartitionSpec()


def test_all_rows_are_this_process_and_come_back():
    mesh = meshes.make_mesh()
    assert meshes.local_rows(6, mesh) == (0, 1, 2, 3, 4, 5)
    batch = {"labels": np.arange(12, dtype=np.float32).reshape(6, 2)}
    placed = meshes.to_devices(batch, meshes.batch_sharding(mesh), 6)
    np.testing.assert_array_equal(meshes.fetch(placed, mesh)["labels"], batch["labels"])


def test_errors():
    with pytest.raises(InputError, match=r"mesh.fsdp: found 2 for 1 devices"):
        meshes.make_mesh(2)
