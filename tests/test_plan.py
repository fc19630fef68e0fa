import argparse
import itertools
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from configs import tiny
from voco_jax.config.load import parse
from voco_jax.errors import InputError
from voco_jax.plan import command, devices, estimate, gpu_targets, hlo
from voco_jax.plan.chips import Chip, chip
from voco_jax.plan.collectives import Collective, find_collectives, first_group
from voco_jax.plan.flops import count_flops
from voco_jax.plan.roofline import bandwidth, roofline
from voco_jax.plan.table import table
from voco_jax.plan.traffic import count_traffic
from voco_jax.training.mesh import make_mesh
from voco_jax.training.optimizer import AdamState
from voco_jax.voco.step import State
from voco_jax.voco.task import make_program

ROOT = Path(__file__).resolve().parents[1]
CONFIG = str(ROOT / "configs" / "voco_10k.py")
CHIP = Chip(
    "test", flops=1e12, memory=2**30, memory_bandwidth=1e9, link_bandwidth=1e8, wraparound=4
)

# A loop of 6 rounds (from 2 to 8) with one collective inside, an asynchronous pair, a
# reduce-scatter as TPUs write it, and groups in each notation.
PROGRAM = """\
HloModule jit_step, is_scheduled=true, num_partitions=16

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%scatter (input: f32[64,8]) -> f32[16,8] {
  %input = f32[64,8]{1,0} parameter(0)
  %all-reduce.9 = f32[64,8]{1,0} all-reduce(%input), channel_id=7, \
replica_groups=[4,4]<=[16], to_apply=%add
  %zero = s32[] constant(0)
  ROOT %part = f32[16,8]{1,0} dynamic-slice(%all-reduce.9, %zero, %zero), dynamic_slice_sizes={16,8}
}

%body (state: (s32[], f32[64,8])) -> (s32[], f32[64,8]) {
  %state = (s32[], f32[64,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = f32[64,8]{1,0} get-tuple-element(%state), index=1
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %summed = f32[64,8]{1,0} all-reduce(%x), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %out = (s32[], f32[64,8]{1,0}) tuple(%next, %summed)
}

%condition (state.1: (s32[], f32[64,8])) -> pred[] {
  %state.1 = (s32[], f32[64,8]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  %end = s32[] constant(8)
  ROOT %less = pred[] compare(%i.1, %end), direction=LT
}

ENTRY %main (p: f32[64,8], q: bf16[32]) -> f32[16,8] {
  %p = f32[64,8]{1,0} parameter(0)
  %q = bf16[32]{0} parameter(1)
  %from = s32[] constant(2)
  %begin = s32[] copy(%from)
  %start = (s32[], f32[64,8]{1,0}) tuple(%begin, %p)
  %loop = (s32[], f32[64,8]{1,0}) while(%start), condition=%condition, body=%body
  %y = f32[64,8]{1,0} get-tuple-element(%loop), index=1
  %gather-start = (bf16[32]{0}, bf16[128]{0}) all-gather-start(%q), \
replica_groups=mesh['data'=4,'fsdp'=4] {'data'}, dimensions={0}
  %gather-done = bf16[128]{0} all-gather-done(%gather-start)
  %send-start = (bf16[32]{0}, bf16[32]{0}) collective-permute-start(%q), \
source_target_pairs={{0,1},{1,2}}
  %send-done = bf16[32]{0} collective-permute-done(%send-start)
  %first = f32[16,8]{1,0} fusion(%y), kind=kCustom, calls=%scatter
  ROOT %parts = f32[16,8]{1,0} fusion(%y), kind=kCustom, calls=%scatter
}
"""


def test_collectives_are_counted_with_their_loops_and_pairs_once():
    found = hlo.parse(PROGRAM)
    assert (found.devices, found.unknown_loops) == (16, 0)
    assert find_collectives(found) == [
        Collective("all-reduce", 6, 64 * 8 * 4, (0, 1, 2, 3)),
        Collective("all-gather", 1, 4 * 32 * 2, (0, 4, 8, 12)),
        Collective("collective-permute", 1, 32 * 2, (0, 1)),
        Collective("reduce-scatter", 1, 64 * 8 * 4, (0, 1, 2, 3)),
    ]
    assert [one.sent for one in find_collectives(found)] == [
        6 * 2048 * 2 * 3 / 4,  # an all-reduce is a reduce-scatter and an all-gather
        256 * 3 / 4,
        64,
        2048 * 3 / 4,
    ]


def test_trip_counts_that_xla_noted_win():
    noted = 'body=%body, backend_config={"known_trip_count":{"n":"5"}}'
    found = hlo.parse(PROGRAM.replace("body=%body", noted))
    assert find_collectives(found)[0].count == 5


def test_loops_of_unknown_length_are_reported():
    found = hlo.parse(PROGRAM.replace("direction=LT", "direction=NE"))
    assert found.unknown_loops == 1
    assert find_collectives(found)[0].count == 1


@pytest.mark.parametrize(
    ("groups", "first"),
    [
        ("replica_groups={{3,5},{4,6}}", (3, 5)),
        ("replica_groups=[2,4]<=[8]", (0, 1, 2, 3)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", (0, 4)),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", (0, 1, 2, 3)),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}", (0, 1, 2, 3)),
        # Four pairs of neighbours, as XLA writes them for 8 GPUs.
        ("replica_groups=mesh['a'=1,'b'=2,'c'=4], device_ids=([4,2]T(1,0)) {'b'}", (0, 1)),
        ("replica_groups=mesh['a'=1,'b'=2,'c'=4], device_ids=([4,2]T(1,0)) {'c'}", (0, 2, 4, 6)),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=(0,3,2,1) {'b'}", (0, 3)),
        ("replica_groups={}", tuple(range(8))),
    ],
)
def test_groups_in_all_notations(groups, first):
    assert first_group(f"channel_id=1, {groups}, to_apply=%add", 8) == first


def test_traffic_of_slices_updates_and_on_chip_arrays():
    text = """\
HloModule m, num_partitions=1

%update (whole: f32[8,128], rows: f32[4,128], i: s32[]) -> f32[8,128] {
  %whole = f32[8,128]{1,0} parameter(0)
  %rows = f32[4,128]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %zero = s32[] constant(0)
  %row = f32[1,128]{1,0} dynamic-slice(%rows, %i, %zero), dynamic_slice_sizes={1,128}
  ROOT %new = f32[8,128]{1,0} dynamic-update-slice(%whole, %row, %i, %zero)
}

ENTRY %main (p: f32[8,128], q: f32[4,128], i.1: s32[]) -> f32[8,128] {
  %p = f32[8,128]{1,0} parameter(0)
  %q = f32[4,128]{1,0} parameter(1)
  %i.1 = s32[] parameter(2)
  %fast = f32[4,128]{1,0:T(8,128)S(1)} negate(%q)
  %thin = f32[8,3]{1,0:T(8,128)} custom-call(%fast), custom_call_target="x"
  %fetch-start = (f32[8,3]{1,0:T(8,128)S(1)}, f32[8,3]{1,0:T(8,128)}, u32[]) copy-start(%thin)
  %fetch = f32[8,3]{1,0:T(8,128)S(1)} copy-done(%fetch-start)
  %top-start = ((f32[8,128]{1,0}), f32[1,128]{1,0:S(1)}, s32[]) slice-start(%p), slice={[0:1]}
  %top = f32[1,128]{1,0:S(1)} slice-done(%top-start)
  ROOT %out = f32[8,128]{1,0} fusion(%p, %q, %i.1), kind=kLoop, calls=%update
}
"""
    row, index = 128 * 4, 4
    negate, thin = 4 * row, 8 * 128 * 4  # the result stays on the chip; 3 columns take 128
    fetched, top = thin, row
    update = row + row + index  # one row is read, one is written in place
    assert count_traffic(hlo.parse(text)) == negate + thin + fetched + top + update


def test_program_text_of_this_jax_is_read():
    def step(w, x):
        return jax.lax.scan(lambda total, row: (total + jnp.tanh(row @ w), None), x[0], x)[0]

    w, x = jnp.ones((8, 8)), jnp.ones((5, 4, 8))
    traced = jax.jit(step).trace(w, x)
    assert count_flops(traced.jaxpr.jaxpr) == 5 * 2 * 4 * 8 * 8
    found = hlo.parse(traced.lower().compile().as_text())
    loops = [count for _, one, count in found.executed if one.opcode in ("tanh", "dot", "fusion")]
    assert 5 in loops
    assert found.unknown_loops == 0
    assert find_collectives(found) == []
    assert count_traffic(found) >= 4 * (w.size + x.size)


def test_flops_of_convolutions_and_recomputation():
    def loss(kernel, x):
        y = jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jnp.sum(jnp.sin(y))

    x, kernel = jnp.ones((1, 6, 6, 4)), jnp.ones((3, 3, 4, 8))
    forward = 2 * (6 * 6 * 8) * (3 * 3 * 4)

    def flops(function):
        return count_flops(jax.make_jaxpr(function)(kernel, x).jaxpr)

    assert flops(loss) == forward
    assert flops(jax.grad(loss)) >= 2 * forward  # of the kernel only; sums over padding count
    assert flops(jax.grad(jax.checkpoint(loss))) == flops(jax.grad(loss)) + forward


def test_flops_of_what_each_device_does_by_itself():
    def product(x, y):
        return x @ y

    mesh = AbstractMesh((2, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    rows = PartitionSpec(("data", "fsdp"))
    split = jax.shard_map(product, mesh=mesh, in_specs=(rows, PartitionSpec()), out_specs=rows)
    x, y = jax.ShapeDtypeStruct((8, 3), jnp.float32), jax.ShapeDtypeStruct((3, 5), jnp.float32)
    whole, parts = (count_flops(jax.jit(f).trace(x, y).jaxpr.jaxpr) for f in (product, split))
    assert whole == parts == 2 * 8 * 3 * 5


def test_roofline_by_hand():
    # 2 TFLOP at 1 TFLOP/s, 1 GB at 1 GB/s, 100 MB over a ring of 4 with two links of 100 MB/s.
    one = Collective("all-gather", 1, 10**8, (0, 1, 2, 3))
    coords = [(x, y) for x in range(4) for y in range(4)]
    found = roofline(2e12, 1e9, [one], coords, CHIP)
    assert (found.compute, found.memory, found.communication) == (2.0, 1.0, pytest.approx(0.375))
    assert (found.step, found.bottleneck) == (2.0, "compute")
    assert found.weak_scaling_efficiency == pytest.approx(2 / 2.375)
    assert roofline(1e9, 2e9, [one], coords, CHIP).bottleneck == "memory"
    assert roofline(1e9, 1e6, [one], coords, CHIP).bottleneck == "communication"


def test_table_says_what_was_estimated():
    one = Collective("all-gather", 3, 10**8, (0, 1))
    times = roofline(2e12, 4e9, [one], None, CHIP)  # 2 s, 4 s, and 3 x 100 MB / 2 at 100 MB/s
    found = estimate.Estimate(
        device="test",
        devices=2,
        hosts=2,
        batch_size=8,
        fsdp=2,
        encoder="swin_unetr",
        crops_per_pass=0,
        remat=False,
        teacher="network",
        parameters=10**7,
        total_steps=43200,
        compile_seconds=3.0,
        memory=estimate.Memory(2**31, 2**30, 2**28, 0, 2**29, 2**31, False),
        work=estimate.Work(2e12, 1.5e12, 4 * 10**9, estimate._by_kind([one, one]), 0),
        roofline=times,
        throughput=estimate._throughput(parse(tiny.get_config()), times.step, 0.0),
    )
    text = table(found)
    for row in (
        "fsdp                state sharded over 2",
        "microbatches        all crops at a time, remat False",
        "  peak              2.00 GiB of 1.00 GiB (XLA_CLIENT_MEM_FRACTION of 2.00 GiB)",
        "of 2.00 GiB): does not fit; try a larger mesh.fsdp",
        "  FLOPs             2.00 T, 1.50 T without recomputation",
        "  all-gather        6 x, 600.0 MB, sends 300.0 MB",
        "step, at least      4000.00 ms; bottleneck: memory",
        "  communication     1500.00 ms",
        "weak scaling        72.7% efficiency",
    ):
        assert row in text


@pytest.mark.parametrize(
    ("kind", "group", "links"),
    [
        ("all-reduce", range(16), 4),  # two closed rings
        ("all-reduce", range(4), 2),  # one
        ("all-reduce", range(2), 1),  # half of one
        ("all-reduce", (0, 4), 1),
        ("collective-permute", (0, 1), 1),
    ],
)
def test_links_of_a_torus(kind, group, links):
    coords = [(x, y) for x in range(4) for y in range(4)]
    one = Collective(kind, 1, 1, tuple(group))
    assert bandwidth(one, coords, CHIP) == links * CHIP.link_bandwidth
    open_mesh = Chip("test", 1, 1, 1, CHIP.link_bandwidth, wraparound=16)
    assert bandwidth(one, coords, open_mesh) == math.ceil(links / 2) * CHIP.link_bandwidth
    assert bandwidth(one, None, CHIP) == CHIP.link_bandwidth


@pytest.mark.parametrize(
    ("wraparound", "lengths", "links"),
    [
        (4, (4, 4, 4), 6),
        (4, (2, 4, 4), 3),  # v4, v5p: less than a cube is no torus
        (4, (4, 4, 1), 2),
        (16, (8, 16, 1), 3),  # v5e, v6e: the pod's full axis is a ring by itself
        (16, (8, 8, 1), 2),
    ],
)
def test_rings_of_a_slice(wraparound, lengths, links):
    coords = list(itertools.product(*map(range, lengths)))
    one = Collective("all-reduce", 1, 1, tuple(range(len(coords))))
    found = bandwidth(one, coords, Chip("test", 1, 1, 1, 1.0, wraparound))
    assert found == links


@pytest.mark.parametrize(
    ("message", "needed"),
    [
        (
            "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total "
            "memory required for HLO temporaries (15.50G) exceeds available HBM (15.75G). HLO",
            31 * 2**29,
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 17.5G of 15.75G hbm.",
            35 * 2**29,
        ),
        ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 7 bytes", 0),
        (
            "RESOURCE_EXHAUSTED: Allocation (size=268435456) would exceed memory (size=134217728) "
            ":: #allocation3 [shape = 'u8[268435456]{0}', space=vmem, size = 0x10000000, scoped",
            None,
        ),
        ("INVALID_ARGUMENT: Mosaic failed to compile", None),
    ],
)
def test_what_does_not_fit_is_told_from_other_errors(message, needed):
    """As libtpu 0.0.52 and earlier ones say it; a kernel's own memory is another thing."""
    assert estimate.bytes_needed(message) == needed


def test_of_a_gpu_jax_takes_a_part(monkeypatch):
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(name, raising=False)
    h200, v5e = chip("NVIDIA H200"), chip("TPU v5 lite")
    assert estimate._usable(h200) == h200.memory * 3 // 4
    assert estimate._usable(v5e) == v5e.memory
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.5")
    assert estimate._usable(h200) == h200.memory // 2
    assert estimate._usable(v5e) == v5e.memory
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "half")
    with pytest.raises(InputError, match=r"XLA_CLIENT_MEM_FRACTION: found 'half', expected"):
        estimate._usable(h200)


@pytest.mark.parametrize(
    ("compiled", "used", "usable", "fits"),
    [
        (True, 7, 7, True),
        (True, 8, 7, False),
        (True, 8, None, None),
        (False, 8, 7, False),
        (False, None, 7, False),
    ],
)
def test_a_step_fits_in_what_jax_takes(compiled, used, usable, fits):
    assert estimate._fits(compiled, used, usable) is fits


def test_chips_are_told_apart():
    names = ["TPU v4", "TPU v5 lite", "TPU v5", "TPU v6 lite", "NVIDIA H200", "cpu"]
    found = [chip(name) for name in names]
    assert [one.name if one else None for one in found] == [
        "TPU v4",
        "TPU v5e",
        "TPU v5p",
        "TPU v6e",
        "H200 SXM",
        None,
    ]


@pytest.mark.parametrize("start", [1, 2, 5, 64])
@pytest.mark.parametrize("most", [0, 1, 3, 7, 32, 63, 64, 100])
def test_largest_batch_is_found_in_few_tries(most, start):
    tried = []

    def fits(volumes):
        tried.append(volumes)
        return volumes <= most

    assert command.largest(fits, start, 64) == min(most, 64)
    assert len(tried) == len(set(tried))
    assert len(tried) <= 14
    assert max(tried) <= 64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology", "cpu"], "--topology: found 'cpu', expected cpu:N, as in cpu:4"),
        (["--topology", "b300:8"], "--topology: found 'b300:8', expected a TPU slice as v5e:16x16"),
        (["--topology", "h100"], "--topology: found 'h100', expected the 1 to 8 GPUs of a host"),
        (["--topology", "h200:16"], "--topology: found 'h200:16', expected the 1 to 8 GPUs of a"),
        (["--config.model.remat"], "flags: found '--config.model.remat', expected those of --help"),
        (["--sett"], "flags: found '--sett', expected those of --help"),
        (["--config.model.fsdp=2"], "model.fsdp: no such field"),
        (["--config.model.remat=7"], "model.remat"),
        (["--config", "no.py"], "no.py: no such config file"),
        (["--json", "none/plan.json"], "--json: none/plan.json: no such folder"),
        (["--json", str(ROOT)], f"--json: {ROOT}: found a folder, expected a file"),
        (["--topology", "v5e:0x4"], "--topology: found 'v5e:0x4', expected a TPU slice as v5e"),
        (["--topology", "v5e:32x32"], "found 'v5e:32x32', 1024 chips, expected at most the 256"),
    ],
)
def test_bad_input_is_one_line_and_status_2(capsys, arguments, message):
    flags = ["--config", CONFIG, "--topology", "cpu:1", *arguments]
    assert command.main(flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def test_missing_libtpu_is_named_with_its_fix(monkeypatch):
    monkeypatch.setattr(devices.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"not installed: pip install libtpu"):
        devices.find_devices("v5e:2x2")


@pytest.mark.parametrize("packages", [(), ("jax_plugins",)])
def test_missing_cuda_plugin_is_named_with_its_fix(monkeypatch, packages):
    def find_spec(name):
        if name.partition(".")[0] not in packages:
            raise ModuleNotFoundError(name)

    monkeypatch.setattr(devices.importlib.util, "find_spec", find_spec)
    with pytest.raises(InputError, match=r"not installed: pip install jax-cuda12-plugin=="):
        devices.find_devices("h200:8")


@pytest.mark.parametrize("name", gpu_targets.NAMES)
def test_distant_gpus_are_chips_with_known_peaks(name):
    text = gpu_targets.target_config(name)
    (kind,) = re.findall(r'device_description_str: "(.*)"', text)
    (memory,) = re.findall(r"device_memory_size: (\d+)", text)
    (bandwidth,) = re.findall(r"memory_bandwidth: (\d+)", text)
    known = chip(kind)
    assert known.name.lower().replace(" ", "").startswith(name)
    assert int(memory) == pytest.approx(known.memory, rel=0.08)  # sheets give rounded GB
    assert int(bandwidth) == pytest.approx(known.memory_bandwidth, rel=1e-3)


def test_stderr_is_kept_aside_unless_it_explains_an_error(capfd):
    @devices._stderr_aside()
    def load(result):
        os.write(2, b"no such device\n")
        return 1 / result

    assert load(2) == 0.5
    assert capfd.readouterr().err == ""
    with pytest.raises(ZeroDivisionError):
        load(0)
    os.write(2, b"after\n")
    assert capfd.readouterr().err == "no such device\nafter\n"


def test_batch_size_by_flags_and_config():
    settings = tiny.get_config()
    settings.batch_size = 2
    config = parse(settings)

    def size(devices, **flags):
        options = argparse.Namespace(**{"batch_size": None, "batch_per_device": None} | flags)
        return command._batch_size(options, config, devices)

    assert size(1) == size(2) == config.batch_size
    assert size(16) == 16
    assert size(16, batch_size=32) == 32
    assert size(16, batch_per_device=3) == 48
    with pytest.raises(InputError, match=r"found 3 volumes for 2 devices"):
        size(2, batch_size=3)


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit) as ended:
        command.main(["--help"])
    assert ended.value.code == 0
    assert "--topology v5e:16x16" in capsys.readouterr().out


def test_plan_of_a_small_step_on_four_devices(tmp_path):
    call = [sys.executable, "-m", "voco_jax.plan", "--config", "configs/tiny.py"]
    call += ["--topology", "cpu:4", "--json", str(tmp_path / "plan.json")]
    call += ["--config.mesh.fsdp=2", "--config.model.num_heads=(3, 6, 12, 24)"]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first, *_ = done.stderr.splitlines()
    assert first.startswith("compiling the step of 4 volumes for cpu:4 (minutes for a large model")
    assert "4 x cpu, 1 hosts" in done.stdout
    assert "time                unknown" in done.stdout
    found = json.loads((tmp_path / "plan.json").read_text())
    assert (found["devices"], found["batch_size"], found["fsdp"]) == (4, 4, 2)
    assert found["overrides"] == {"mesh.fsdp": "2", "model.num_heads": "(3, 6, 12, 24)"}
    memory, work = found["memory"], found["work"]
    assert memory["peak"] > memory["state"] > found["parameters"] * 4  # five copies, some halved
    assert memory["fits"] is memory["capacity"] is memory["usable"] is found["roofline"] is None
    assert work["flops"] >= work["model_flops"] > 1e9
    assert work["unknown_loops"] == 0
    # Every gradient is summed over the devices, and the sharded parameters are gathered.
    assert work["collectives"]["all-reduce"]["size"] > 4 * found["parameters"] / 2
    assert work["collectives"]["all-gather"]["size"] > 0


@pytest.fixture(scope="module")
def _names_for_export():
    """jax.export writes no pytree whose type it has no name for."""
    for kind in (AdamState, optax.EmptyState, optax.ScaleByScheduleState):
        jax.export.register_namedtuple_serialization(kind, serialized_name=kind.__name__)
    jax.export.register_pytree_node_serialization(
        State,
        serialized_name="State",
        serialize_auxdata=lambda auxdata: b"",
        deserialize_auxdata=lambda data: (),
    )


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.usefixtures("_names_for_export")
def test_step_exports_for_accelerators_that_are_not_here(platform):
    settings = tiny.get_config()
    settings.model.convolution = "lax"
    program = make_program(parse(settings), make_mesh(devices=jax.devices()[:1]))
    exported = jax.export.export(program.step, platforms=[platform])(program.state, program.batch)
    again = jax.export.deserialize(exported.serialize())
    assert again.platforms == (platform,)
    assert again.in_tree == exported.in_tree

    def kinds(leaves):
        return [(leaf.shape, np.dtype(leaf.dtype)) for leaf in leaves]

    given = jax.tree.leaves((program.state, program.batch))
    assert kinds(again.in_avals) == kinds(given)
    new = jax.eval_shape(program.step, program.state, program.batch)
    assert kinds(again.out_avals) == kinds(jax.tree.leaves(new))
