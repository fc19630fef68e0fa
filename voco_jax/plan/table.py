"""An estimate as text."""

from voco_jax.plan.estimate import Estimate, Memory, Throughput

_VERDICTS = {
    None: "unknown device",
    True: "fits",
    False: "does not fit; try a larger mesh.fsdp, a smaller model.crops_per_pass or fewer volumes",
}


def table(found: Estimate) -> str:
    """An estimate for people."""
    memory, work, times, rates = found.memory, found.work, found.roofline, found.throughput
    rows = [
        ("devices", f"{found.devices} x {found.device}, {found.hosts} hosts"),
        ("batch", f"{found.batch_size} volumes, {found.batch_size // found.devices} a device"),
        ("model", f"{found.encoder}, {found.parameters / 1e6:.1f} M parameters"),
        ("teacher", found.teacher),
        ("fsdp", f"state sharded over {found.fsdp}"),
        ("microbatches", f"{found.crops_per_pass or 'all'} crops at a time, remat {found.remat}"),
        ("compiled in", f"{found.compile_seconds:.0f} s"),
        ("each device", ""),
        ("  state", f"{_gib(memory.state)}: student, teacher, optimizer"),
        ("  batch", f"{_gib(memory.batch)}"),
        ("  temporary", f"{_gib(memory.temporary)}: activations, gradients, gathered parameters"),
        ("  peak", f"{_gib(memory.peak)} of {_capacity(memory)}: {_VERDICTS[memory.fits]}"),
    ]
    if work is not None:
        once = f"{work.model_flops / 1e12:.2f} T without recomputation"
        rows += [
            ("  FLOPs", f"{work.flops / 1e12:.2f} T, {once}"),
            ("  memory traffic", f"{work.traffic / 1e9:.1f} GB"),
        ]
        for kind, of in work.collectives.items():
            sizes = f"{of.size / 1e6:.1f} MB, sends {of.sent / 1e6:.1f} MB"
            rows.append((f"  {kind}", f"{of.count} x, {sizes}"))
        if work.unknown_loops:
            rows.append(("  loops", f"{work.unknown_loops} of unknown length, counted once"))
    if times is None or rates is None:
        rows.append(("time", "unknown"))
    else:
        rows += [
            ("step, at least", f"{times.step * 1e3:.2f} ms; bottleneck: {times.bottleneck}"),
            ("  compute", f"{times.compute * 1e3:.2f} ms"),
            ("  memory", f"{times.memory * 1e3:.2f} ms"),
            ("  communication", f"{times.communication * 1e3:.2f} ms"),
            ("weak scaling", f"{times.weak_scaling_efficiency:.1%} efficiency"),
            ("training", f"{rates.days:.2f} days at least for {found.total_steps} steps"),
            ("input, at most", ""),
            ("  all hosts", _input(rates, 1)),
            ("  each host", _input(rates, found.hosts)),
        ]
    return "\n".join(f"{name:<20}{value}".rstrip() for name, value in rows)


def _input(rates: Throughput, hosts: int) -> str:
    return (
        f"{rates.volumes_per_second / hosts:.1f} volumes/s: reads "
        f"{rates.volume_bytes_per_second / hosts / 1e6:.0f} MB/s before compression, sends "
        f"{rates.crop_bytes_per_second / hosts / 1e6:.0f} MB/s of crops"
    )


def _gib(size: float | None) -> str:
    return "unknown" if size is None else f"{size / 2**30:.2f} GiB"


def _capacity(memory: Memory) -> str:
    if memory.usable == memory.capacity:
        return _gib(memory.capacity)
    return f"{_gib(memory.usable)} (XLA_CLIENT_MEM_FRACTION of {_gib(memory.capacity)})"
