"""The device mesh: the only place that names its axes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from voco_jax.errors import InputError
from voco_jax.types import Batch

_DATA, _FSDP = "data", "fsdp"
# Smaller arrays are replicated: gathering them would cost more than they take.
_SHARDED_FROM = 2**18  # elements


def make_mesh(fsdp: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Devices as (data, fsdp): the batch is split over both axes, large parameters over fsdp.

    Args:
        fsdp: devices that share one copy of the state.
        devices: None: all of all processes.

    Raises:
        InputError: the devices do not divide by it.
    """
    devices = jax.devices() if devices is None else devices
    if len(devices) % fsdp:
        raise InputError(
            f"mesh.fsdp: found {fsdp} for {len(devices)} devices, expected a divisor of that"
        )
    # Auto: under the default, Explicit, window partitioning raises.
    return jax.make_mesh(
        (len(devices) // fsdp, fsdp),
        (_DATA, _FSDP),
        axis_types=(AxisType.Auto,) * 2,
        devices=devices,
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """Of metrics and of what is small."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of batches: volumes over all devices."""
    return NamedSharding(mesh, PartitionSpec((_DATA, _FSDP)))


def state_sharding(mesh: Mesh, abstract: Any) -> Any:
    """Of parameters, their moving average and the optimizer's moments.

    Args:
        mesh: of `make_mesh`.
        abstract: tree of anything with a shape.

    Returns:
        The same tree of shardings: large arrays are split over fsdp along their longest axis that
        divides evenly, all others are replicated.
    """
    count = mesh.shape[_FSDP]

    def one(leaf: Any) -> NamedSharding:
        axes = [axis for axis, size in enumerate(leaf.shape) if size % count == 0]
        if count == 1 or not axes or np.prod(leaf.shape) < _SHARDED_FROM:
            return replicated(mesh)
        longest = max(axes, key=lambda axis: leaf.shape[axis])
        return NamedSharding(
            mesh, PartitionSpec(*(_FSDP if a == longest else None for a in range(len(leaf.shape))))
        )

    return jax.tree.map(one, abstract)


def on_each_device(
    function: Callable[..., jax.Array], mesh: Mesh, replicated: int
) -> Callable[..., jax.Array]:
    """Runs a function on each device's own rows, for what XLA cannot split by itself.

    Args:
        function: (rows, and then `replicated` arguments that every device has) -> rows.
        mesh: of `make_mesh`; the rows are split over all of it.
        replicated: number of arguments after the rows.
    """
    if mesh.devices.size == 1:
        return function
    rows = PartitionSpec((_DATA, _FSDP))
    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=(rows, *[PartitionSpec()] * replicated),
        out_specs=rows,
        check_vma=False,  # kernels do not tell over which axes their results vary
    )


def local_rows(batch_size: int, mesh: Mesh) -> tuple[int, ...]:
    """The rows of a batch that this process's devices hold, ascending."""
    indices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
    rows: set[int] = set()
    for index in indices.values():
        assert index is not None
        rows.update(range(*index[0].indices(batch_size)))
    return tuple(sorted(rows))


def to_devices(batch: Batch, sharding: NamedSharding, batch_size: int) -> dict[str, jax.Array]:
    """This process's `local_rows` of a batch -> the global batch, on all devices.

    Args:
        batch: host arrays.
        sharding: of `batch_sharding`.
        batch_size: rows over all processes.
    """
    return {
        name: jax.make_array_from_process_local_data(sharding, rows, (batch_size, *rows.shape[1:]))
        for name, rows in batch.items()
    }


def prefetch_to_device(
    batches: Iterator[Batch], abstract: Mapping[str, jax.ShapeDtypeStruct]
) -> Iterator[dict[str, jax.Array]]:
    """Endless `batches` on the devices, the next one on its way while a step runs on one.

    Args:
        batches: this process's rows.
        abstract: the global batch, with its shardings.
    """

    one = next(iter(abstract.values()))

    def place(batch: Batch) -> dict[str, jax.Array]:
        return to_devices(batch, one.sharding, one.shape[0])

    ahead = place(next(batches))
    while True:
        ready, ahead = ahead, place(next(batches))
        yield ready


def fetch(tree: Any, mesh: Mesh) -> Any:
    """A tree of sharded arrays as NumPy, on every process."""
    gathered = jax.jit(lambda leaves: leaves, out_shardings=replicated(mesh))(tree)
    return jax.device_get(gathered)


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
    hosts = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    split = f", state split over {mesh.shape[_FSDP]}" if mesh.shape[_FSDP] > 1 else ""
    return f"{mesh.devices.size} x {', '.join(sorted(kinds))}{hosts}{split}"
