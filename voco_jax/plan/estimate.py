"""Memory, work, roofline and throughput of one training step on some devices, by its program."""

import dataclasses
import math
import os
import re
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from voco_jax.config.pretraining import Pretraining
from voco_jax.errors import InputError
from voco_jax.plan import hlo
from voco_jax.plan.chips import Chip, chip
from voco_jax.plan.collectives import Collective, find_collectives
from voco_jax.plan.flops import count_flops
from voco_jax.plan.roofline import Roofline, roofline
from voco_jax.plan.traffic import count_traffic
from voco_jax.training.mesh import make_mesh
from voco_jax.voco.task import make_program


@dataclasses.dataclass(frozen=True)
class Memory:
    """Of each device, bytes."""

    capacity: int | None  # None: not known
    usable: int | None  # what of it JAX takes
    state: int  # student, teacher, optimizer: this device's part
    batch: int  # crops and labels
    temporary: int | None  # activations, gradients, gathered parameters; None: not compiled
    peak: int | None
    fits: bool | None


@dataclasses.dataclass(frozen=True)
class CollectiveTotal:
    """All collectives of one kind in a step."""

    count: int
    size: int  # bytes of the arrays that the groups work on
    sent: float  # bytes that each device sends


@dataclasses.dataclass(frozen=True)
class Work:
    """Of each device in a step."""

    flops: float  # matrix products and convolutions, with recomputation
    model_flops: float  # without
    traffic: int  # bytes to and from memory
    collectives: dict[str, CollectiveTotal]
    unknown_loops: int  # their bodies are counted once


@dataclasses.dataclass(frozen=True)
class Throughput:
    """What follows for a run whose steps take no longer than the roofline says."""

    volumes_per_second: float  # of all devices
    crop_bytes_per_second: float  # to all devices
    volume_bytes_per_second: float  # of cached volumes before compression, to all hosts
    days: float  # for the config's total_steps


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What `estimate` finds out."""

    device: str
    devices: int
    hosts: int
    batch_size: int  # volumes, over all devices
    fsdp: int
    encoder: str
    crops_per_pass: int
    remat: bool
    teacher: str  # its scope
    parameters: int  # numbers of one network
    total_steps: int
    compile_seconds: float
    memory: Memory
    work: Work | None  # None: not compiled, as it does not fit
    roofline: Roofline | None  # None: not compiled, or the device is not known
    throughput: Throughput | None  # likewise


def estimate(config: Pretraining, devices: Sequence[jax.Device]) -> Estimate:
    """Compiles the training step for some devices, which need not be here, and reads the program.

    Raises:
        InputError: settings that do not fit each other or the devices; no such part of a GPU's
            memory.
    """
    mesh = make_mesh(config.mesh.fsdp, devices)
    program = make_program(config, mesh)
    traced = program.step.trace(program.state, program.batch)
    placed = list(np.ravel(mesh.devices))
    device_kind = str(placed[0].device_kind)
    known = chip(device_kind)
    usable = _usable(known) if known else None
    start = time.monotonic()
    compiled, used = _compile(traced)
    seconds = time.monotonic() - start

    temporary, work, times, throughput = None, None, None, None
    if compiled is not None:
        sizes = compiled.memory_analysis()
        temporary = sizes.temp_size_in_bytes
        used = (
            sizes.argument_size_in_bytes
            + sizes.output_size_in_bytes
            - sizes.alias_size_in_bytes
            + temporary
            + sizes.generated_code_size_in_bytes
        )
        module = hlo.parse(compiled.as_text())
        collectives = find_collectives(module)
        work = Work(
            flops=count_flops(traced.jaxpr.jaxpr) / len(placed),
            model_flops=model_flops(config, mesh) / len(placed),
            traffic=count_traffic(module),
            collectives=_by_kind(collectives),
            unknown_loops=module.unknown_loops,
        )
        if known is not None:
            coords = [tuple(device.coords) for device in placed] if not known.is_gpu else None
            times = roofline(work.flops, work.traffic, collectives, coords, known)
            crop_bytes = _local_bytes(program.batch) * len(placed) / config.batch_size
            throughput = _throughput(config, times.step, crop_bytes)
    return Estimate(
        device=known.name if known else device_kind,
        devices=len(placed),
        hosts=len({device.process_index for device in placed}),
        batch_size=config.batch_size,
        fsdp=config.mesh.fsdp,
        encoder=config.model.encoder,
        crops_per_pass=config.model.crops_per_pass,
        remat=config.model.remat,
        teacher=config.teacher.scope,
        parameters=sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(program.state.student)),
        total_steps=config.total_steps,
        compile_seconds=seconds,
        memory=Memory(
            capacity=known.memory if known else None,
            usable=usable,
            state=_local_bytes(program.state),
            batch=_local_bytes(program.batch),
            temporary=temporary,
            peak=used,
            fits=_fits(compiled is not None, used, usable),
        ),
        work=work,
        roofline=times,
        throughput=throughput,
    )


def model_flops(config: Pretraining, mesh: Mesh) -> int:
    """FLOPs of one step that computes nothing twice, on all devices together.

    The same for every form of the same step, so that their utilisations compare.
    """
    bare = dataclasses.replace(
        config.model, remat=False, crops_per_pass=0, convolution="lax", attention="xla"
    )
    once = make_program(dataclasses.replace(config, model=bare), mesh)
    return count_flops(once.step.trace(once.state, once.batch).jaxpr.jaxpr)


def _compile(traced: Any) -> tuple[Any, int | None]:
    """The compiled step; or None and the bytes it would need (if told), where it does not fit."""
    jax.config.update("jax_enable_compilation_cache", False)  # a cached program has no text
    try:
        return traced.lower().compile(), None
    except jax.errors.JaxRuntimeError as error:
        needed = bytes_needed(str(error))
        if needed is None:
            raise
        return None, needed or None


def bytes_needed(error: str) -> int | None:
    """Bytes that a program needs which is too large for its device; 0: it is, but none are told.

    Args:
        error: XLA's; it may also be about a kernel's memory on the chip: None, as for all others.
    """
    if not re.search("CompileTimeHbmOom|memory space hbm|Out of memory", error):
        return None
    found = re.search(
        r"(?:Used |total memory required for [\w ]*\()([\d.]+)([KMGT])(?: of|\))", error
    )
    if not found:
        return 0
    count, unit = found.groups()
    return int(float(count) * {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}[unit])


def _usable(known: Chip) -> int:
    """Bytes that JAX takes of a device's memory: of a GPU's three quarters, unless told."""
    if not known.is_gpu:
        return known.memory
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        if found := os.environ.get(name):
            try:
                return int(known.memory * float(found))
            except (ValueError, OverflowError) as error:
                raise InputError(f"{name}: found {found!r}, expected a number as 0.9") from error
    return int(known.memory * 0.75)


def _fits(compiled: bool, used: int | None, usable: int | None) -> bool | None:
    if not compiled:
        return False
    return None if usable is None or used is None else used <= usable


def _local_bytes(tree: Any) -> int:
    """Of one device's part of a tree of abstract, sharded arrays."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _by_kind(collectives: Sequence[Collective]) -> dict[str, CollectiveTotal]:
    return {
        kind: CollectiveTotal(
            count=sum(one.count for one in collectives if one.kind == kind),
            size=sum(one.count * one.size for one in collectives if one.kind == kind),
            sent=sum(one.sent for one in collectives if one.kind == kind),
        )
        for kind in sorted({one.kind for one in collectives})
    }


def _throughput(config: Pretraining, step: float, crop_bytes: float) -> Throughput:
    """Of steps of so many seconds; `crop_bytes`: of one volume's crops and labels."""
    rate, crops = config.batch_size / step, config.crops
    voxels = math.prod(crops.grid) * math.prod(crops.crop_size)
    return Throughput(
        volumes_per_second=rate,
        crop_bytes_per_second=rate * crop_bytes,
        volume_bytes_per_second=rate * voxels * np.dtype(config.data.dtype).itemsize,
        days=config.total_steps * step / 86400,
    )
