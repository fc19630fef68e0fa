"""The device mesh: the only place that names its axes."""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from voco_jax.errors import InputError

_DATA = "data"


def make_mesh() -> Mesh:
    """All devices along one axis; the batch is split over it, everything else is replicated."""
    devices = jax.devices()
    # Auto: under the default, Explicit, window partitioning raises.
    return jax.make_mesh((len(devices),), (_DATA,), axis_types=(AxisType.Auto,), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """Of parameters, optimizer state and metrics."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of batches: volumes over the devices."""
    return NamedSharding(mesh, PartitionSpec(_DATA))


def check_batch_size(batch_size: int, mesh: Mesh) -> None:
    """Checks that a batch splits evenly.

    Raises:
        InputError: it does not.
    """
    count = mesh.devices.size
    if batch_size % count:
        raise InputError(
            f"batch_size: found {batch_size} volumes for {count} devices, expected a multiple of "
            f"{count}; the next is {-(-batch_size // count) * count}"
        )


def describe(mesh: Mesh) -> str:
    """The devices, in words."""
    kinds = {str(device.device_kind) for device in np.ravel(mesh.devices)}
    return f"{mesh.devices.size} x {', '.join(sorted(kinds))}"
