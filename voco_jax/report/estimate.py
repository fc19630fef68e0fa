"""Memory, work, shortest time and input of one training step on some devices, by its program."""

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

from voco_jax.config import Config
from voco_jax.errors import InputError
from voco_jax.report import hlo
from voco_jax.report.chips import Chip, chip
from voco_jax.report.flops import count_flops
from voco_jax.report.roofline import Roofline, roofline
from voco_jax.training.mesh import make_mesh
from voco_jax.training.program import make_program


@dataclasses.dataclass(frozen=True)
class Memory:
    """Of each device, bytes."""

    device: int | None  # all there is; None: not known
    room: int | None  # what of it JAX takes
    state: int  # student, teacher, optimizer: this device's part
    batch: int  # crops and labels
    temporary: int | None  # activations, gradients, gathered parameters; None: not compiled
    peak: int | None
    fits: bool | None


@dataclasses.dataclass(frozen=True)
class Kind:
    """All collectives of one kind in a step."""

    count: int
    size: int  # bytes of the arrays that the groups work on
    sent: float  # bytes that each device sends


@dataclasses.dataclass(frozen=True)
class Work:
    """Of each device in a step."""

    flops: float  # matrix products and convolutions, with recomputation
    flops_needed: float  # without
    traffic: int  # bytes to and from memory
    collectives: dict[str, Kind]
    unknown_loops: int  # their bodies are counted once


@dataclasses.dataclass(frozen=True)
class Times:
    """What the chip's peaks allow at best: seconds of a step, and what follows from them."""

    compute: float
    memory: float
    links: float
    step: float  # the longest of the three
    wall: str
    efficiency: float  # of weak scaling from one device, if nothing hides the collectives
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
    feature_size: int
    crops_per_pass: int
    remat: bool
    teacher: str  # its scope
    parameters: int  # numbers of one network
    total_steps: int
    compile_seconds: float
    memory: Memory
    work: Work | None  # None: not compiled, as it does not fit
    times: Times | None  # None: not compiled, or the device is not known


def estimate(config: Config, devices: Sequence[jax.Device]) -> Estimate:
    """Compiles the training step for some devices, which need not be here, and reads the program.

    Raises:
        InputError: settings that do not fit each other or the devices; no such part of a GPU's
            memory.
    """
    mesh = make_mesh(config.mesh.fsdp, devices)
    program = make_program(config, mesh)
    traced = program.step.trace(program.state, program.batch)
    placed = list(np.ravel(mesh.devices))
    known = chip(str(placed[0].device_kind))
    room = _room(known) if known else None
    start = time.monotonic()
    compiled, used = _compile(traced)
    seconds = time.monotonic() - start

    temporary, work, times = None, None, None
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
        text = hlo.parse(compiled.as_text())
        collectives = text.collectives()
        work = Work(
            flops=count_flops(traced.jaxpr.jaxpr) / len(placed),
            flops_needed=flops_needed(config, mesh) / len(placed),
            traffic=text.traffic(),
            collectives=_by_kind(collectives),
            unknown_loops=text.unknown_loops,
        )
        if known is not None:
            places = [tuple(device.coords) for device in placed] if not known.is_gpu else None
            times = _times(
                config,
                roofline(work.flops, work.traffic, collectives, places, known),
                _local_bytes(program.batch) * len(placed) / config.batch_size,
            )
    return Estimate(
        device=known.name if known else str(placed[0].device_kind),
        devices=len(placed),
        hosts=len({device.process_index for device in placed}),
        batch_size=config.batch_size,
        fsdp=config.mesh.fsdp,
        feature_size=config.model.feature_size,
        crops_per_pass=config.model.crops_per_pass,
        remat=config.model.remat,
        teacher=config.teacher.scope,
        parameters=sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(program.state.student)),
        total_steps=config.total_steps,
        compile_seconds=seconds,
        memory=Memory(
            device=known.memory if known else None,
            room=room,
            state=_local_bytes(program.state),
            batch=_local_bytes(program.batch),
            temporary=temporary,
            peak=used,
            fits=_fits(compiled is not None, used, room),
        ),
        work=work,
        times=times,
    )


def flops_needed(config: Config, mesh: Mesh) -> int:
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
    number = r"([\d.]+)([KMGT])"
    told = rf"Used {number} of|total memory required for [\w ]*\({number}\)"
    found = re.search(told, error)
    if not found:
        return 0
    count, unit = (part for part in found.groups() if part)
    return int(float(count) * {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}[unit])


def _room(known: Chip) -> int:
    """Bytes that JAX takes of a device's memory: of a GPU's three quarters, unless told."""
    if not known.is_gpu:
        return known.memory
    names = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
    for name in names:
        if found := os.environ.get(name):
            try:
                return int(known.memory * float(found))
            except (ValueError, OverflowError) as error:
                raise InputError(f"{name}: found {found!r}, expected a number as 0.9") from error
    return int(known.memory * 0.75)


def _fits(compiled: bool, used: int | None, room: int | None) -> bool | None:
    if not compiled:
        return False
    return None if room is None or used is None else used <= room


def _local_bytes(tree: Any) -> int:
    """Of one device's part of a tree of abstract, sharded arrays."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _by_kind(collectives: Sequence[hlo.Collective]) -> dict[str, Kind]:
    return {
        kind: Kind(
            count=sum(one.times for one in collectives if one.kind == kind),
            size=sum(one.times * one.size for one in collectives if one.kind == kind),
            sent=sum(one.sent for one in collectives if one.kind == kind),
        )
        for kind in sorted({one.kind for one in collectives})
    }


def _times(config: Config, line: Roofline, volume: float) -> Times:
    """What a roofline means for a run; `volume`: bytes of one volume's crops and labels."""
    rate, crops = config.batch_size / line.step, config.crops
    cached = (
        math.prod(crops.grid) * math.prod(crops.crop_size) * np.dtype(config.data.dtype).itemsize
    )
    return Times(
        compute=line.compute,
        memory=line.memory,
        links=line.links,
        step=line.step,
        wall=line.wall,
        efficiency=line.efficiency,
        volumes_per_second=rate,
        crop_bytes_per_second=rate * volume,
        volume_bytes_per_second=rate * cached,
        days=config.total_steps * line.step / 86400,
    )


def table(found: Estimate) -> str:
    """An estimate for people."""
    memory, work, times = found.memory, found.work, found.times
    rows = [
        ("devices", f"{found.devices} x {found.device}, {found.hosts} hosts"),
        ("batch", f"{found.batch_size} volumes, {found.batch_size // found.devices} a device"),
        ("model", f"feature size {found.feature_size}, {found.parameters / 1e6:.1f} M parameters"),
        ("teacher", found.teacher),
        ("state", f"split over {found.fsdp}"),
        ("passes", f"{found.crops_per_pass or 'all'} crops at a time, remat {found.remat}"),
        ("compiled in", f"{found.compile_seconds:.0f} s"),
        ("each device", ""),
        ("  state", f"{_gib(memory.state)}: student, teacher, optimizer"),
        ("  batch", f"{_gib(memory.batch)}"),
        ("  temporary", f"{_gib(memory.temporary)}: activations, gradients, gathered parameters"),
        ("  peak", f"{_gib(memory.peak)} of {_device(memory)}: {_verdict(memory.fits)}"),
    ]
    if work is not None:
        rows += [
            ("  FLOPs", f"{work.flops / 1e12:.2f} T, {work.flops_needed / 1e12:.2f} T needed"),
            ("  memory traffic", f"{work.traffic / 1e9:.1f} GB"),
        ]
        rows += [
            (f"  {kind}", f"{of.count} x, {of.size / 1e6:.1f} MB, sends {of.sent / 1e6:.1f} MB")
            for kind, of in work.collectives.items()
        ]
        if work.unknown_loops:
            rows.append(("  loops", f"{work.unknown_loops} of unknown length, counted once"))
    if times is None:
        return _lines([*rows, ("time", "unknown")])
    return _lines(
        [
            *rows,
            ("a step, at least", f"{times.step * 1e3:.2f} ms; the wall is {times.wall}"),
            ("  compute", f"{times.compute * 1e3:.2f} ms"),
            ("  memory", f"{times.memory * 1e3:.2f} ms"),
            ("  links", f"{times.links * 1e3:.2f} ms"),
            ("scaling", f"{times.efficiency:.1%} of one device's speed on each device"),
            ("training", f"{times.days:.2f} days at least for {found.total_steps} steps"),
            ("input, at most", ""),
            ("  all hosts", _input(times, 1)),
            ("  each host", _input(times, found.hosts)),
        ]
    )


def _input(times: Times, hosts: int) -> str:
    return (
        f"{times.volumes_per_second / hosts:.1f} volumes/s: reads "
        f"{times.volume_bytes_per_second / hosts / 1e6:.0f} MB/s before compression, sends "
        f"{times.crop_bytes_per_second / hosts / 1e6:.0f} MB/s of crops"
    )


def _gib(size: float | None) -> str:
    return "unknown" if size is None else f"{size / 2**30:.2f} GiB"


def _device(memory: Memory) -> str:
    if memory.room == memory.device:
        return _gib(memory.device)
    return f"{_gib(memory.room)} (XLA_CLIENT_MEM_FRACTION of {_gib(memory.device)})"


def _verdict(fits: bool | None) -> str:
    if fits is None:
        return "unknown device"
    advice = "does not fit; try a larger mesh.fsdp, a smaller model.crops_per_pass or fewer volumes"
    return "fits" if fits else advice


def _lines(rows: Sequence[tuple[str, str]]) -> str:
    return "\n".join(f"{name:<20}{value}".rstrip() for name, value in rows)
