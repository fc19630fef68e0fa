"""The loop: resume, guards and errors, in this process and at the smallest size."""

import contextlib
import dataclasses
import errno
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
import strided_cnn
import strided_main
import toy_task
from conftest import HAS_TORCH
from safetensors.numpy import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from configs import tiny
from voco_jax.config import encoders
from voco_jax.config.load import parse
from voco_jax.data.cache import Cache
from voco_jax.data.pipeline import held_out_sample
from voco_jax.data.sources import read_volumes
from voco_jax.data.volumes import dequantise
from voco_jax.errors import InputError, InUseError
from voco_jax.models.attention import attend
from voco_jax.models.encoders import ENCODERS
from voco_jax.training import distributed, loop
from voco_jax.training.checkpoint import Checkpoints, read_network, saved_steps, set_damaged_aside
from voco_jax.training.compile import compiler_options, has_option, missing_options
from voco_jax.training.jax_settings import check_jax_settings
from voco_jax.training.mesh import make_mesh
from voco_jax.training.metrics import (
    Log,
    MetricsWriter,
    Progress,
    StepTimes,
    duration,
    last_step,
)
from voco_jax.training.reporting import heartbeat
from voco_jax.training.workdir import claim_workdir, lock_workdir
from voco_jax.voco import task
from voco_jax.voco.task import METHOD


def run(config, workdir):
    loop.run(parse(config, str(workdir)), workdir, METHOD)


def stop_after(step):
    """As if SIGTERM had come then: a step begins with the batch of the next one already here."""
    return lambda number, ready: "SIGTERM" if number == step + 2 else ""


def _losses(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


@pytest.fixture(scope="module", autouse=True)
def _strided_cnn():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ENCODERS, "strided_cnn", strided_cnn.ENCODER)
        patch.setitem(encoders.ENCODERS, "strided_cnn", strided_cnn.Settings)
        yield


def small():
    """A config file's settings with a network that compiles in a second."""
    return ml_collections.ConfigDict(strided_main.get_config())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of four steps, and what it printed."""
    workdir = tmp_path_factory.mktemp("run") / "finished"
    run(small(), workdir)
    return workdir


def test_a_run_leaves_everything(finished):
    assert sorted(_losses(finished)) == [1, 2, 3, 4]
    assert (finished / "pictures" / "positions_0000004.png").stat().st_size > 1000
    assert (finished / "voco_encoder.safetensors").exists()
    card = json.loads((finished / "voco_encoder.safetensors.json").read_text())
    assert (card["recipe"], card["step"], card["network"]) == ("voco_10k", 4, "teacher")
    board = EventAccumulator(str(finished / "tensorboard")).Reload()  # as TensorBoard itself reads
    read = {event.step: event.value for event in board.Scalars("loss")}
    assert read == pytest.approx(_losses(finished))
    assert [image.step for image in board.Images("positions")] == [4]
    validation = json.loads((finished / "metrics.jsonl").read_text().splitlines()[-1])
    assert validation["validation/chance"] >= 0.5
    log = (finished / "logs" / "process_0.log").read_text("utf-8")
    lacking = missing_options(make_mesh())  # some with jax 0.12, none with 0.10
    assert log.count("this XLA has no") == bool(lacking)
    assert all(name in log for name in lacking)


def test_embeddings_are_the_teacher_s_of_the_held_out_volume(finished):
    experiment = parse(small(), str(finished))
    source, crops = experiment.data.sources["ct"], experiment.crops
    cache = Cache.open(source.cache, source.chain)
    _, (held_out,) = read_volumes({"ct": cache}, experiment.data, finished)
    sample = held_out_sample(
        cache,
        held_out.entries[0],
        crops,
        sub_volumes=experiment.validation.sub_volumes,
        seed=experiment.seed,
    )
    network = task.build_network(experiment, make_mesh(1), attend)
    teacher, _ = read_network(finished, "teacher")
    images = dequantise(np.concatenate([sample["subs"], sample["bases"]]))[..., None]
    pooled = network.apply(
        {"params": teacher}, images, method=lambda n, x: n.encode(x, False).pooled
    )
    rows = np.asarray(network.apply({"params": teacher}, pooled, method="project"))[-2:]
    with np.load(finished / "embeddings.npz") as found:
        np.testing.assert_allclose(
            found["embeddings"], rows / np.linalg.norm(rows, axis=1, keepdims=True), atol=1e-4
        )
        assert found["embeddings"].dtype == np.float32
        assert found["cells"].tolist() == [[0, 0, 0], [1, 0, 0]]
        assert found["volumes"].tolist() == [held_out.entries[0].id] * 2
        assert int(found["step"]) == 4


def test_a_finished_run_trains_nothing_more(finished, capsys):
    before = _losses(finished)
    run(small(), finished)
    assert "nothing left to train" in capsys.readouterr().out
    assert _losses(finished) == before


def test_stopped_and_killed_it_goes_on_bit_for_bit(finished, tmp_path, capsys):
    class KilledError(Exception):
        pass

    workdir = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "stop_before", stop_after(1))
        with pytest.raises(loop.PreemptedError, match=r"saved step 1: the same command res"):
            run(small(), workdir)

    def die(self, step, values):
        original(self, step, values)
        if step == 3:  # the checkpoint is of step 2
            raise KilledError

    original = MetricsWriter.write
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MetricsWriter, "write", die)
        with pytest.raises(KilledError):
            run(small(), workdir)
    assert "resuming at step 1 of 4" in capsys.readouterr().out
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "los')  # and a line cut off
    run(small(), workdir)
    assert "resuming at step 2 of 4" in capsys.readouterr().out
    assert _losses(workdir) == _losses(finished)
    for network in ("student", "teacher"):
        expected, _ = read_network(finished, network)
        found, _ = read_network(workdir, network)
        jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_another_experiment_in_the_workdir(finished):
    config = small()
    config.optimizer.learning_rate = 0.5
    with pytest.raises(
        InputError, match=r"holds another experiment; optimizer.learning_rate: 0.001 -> 0.5"
    ):
        run(config, finished)


def test_runtime_settings_may_change(finished, tmp_path):
    """And the resumed run goes by the new ones."""
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    config = small()
    config.checkpoint.every_steps, config.checkpoint.keep = 1, 2
    config.export_to = "{workdir}/again.safetensors"
    run(config, tmp_path / "run")
    assert _losses(tmp_path / "run") == _losses(finished)
    assert saved_steps(tmp_path / "run") == [3, 4]
    assert (tmp_path / "run" / "again.safetensors").exists()


def test_a_finished_run_can_be_prolonged(finished, tmp_path, capsys):
    """Its optimizer goes on; the rate is that of the new total's schedule."""
    workdir, config = tmp_path / "run", small()
    shutil.copytree(finished, workdir)
    config.total_steps = 6
    run(config, workdir)
    optimizer = config.optimizer

    def rate(step):  # of the update after so many
        progress = (step - optimizer.warmup_steps) / (6 - optimizer.warmup_steps)
        return optimizer.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))

    told = f"total_steps: 4 -> 6: .* at {rate(4):.2e}"
    assert re.search(told, capsys.readouterr().out)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    rates = {line["step"]: line["learning_rate"] for line in lines if "learning_rate" in line}
    assert sorted(rates) == [1, 2, 3, 4, 5, 6]
    assert rates[5] == pytest.approx(rate(4), rel=1e-5)
    assert rates[6] == pytest.approx(rate(5), rel=1e-5)
    assert {k: v for k, v in _losses(workdir).items() if k <= 4} == _losses(finished)
    assert json.loads((workdir / "voco_encoder.safetensors.json").read_text())["step"] == 6
    abstract = METHOD.make_program(parse(config), make_mesh(1)).state
    with contextlib.closing(Checkpoints(workdir, state=abstract)) as saved:
        optimizer_state = jax.tree.leaves(saved.restore(6, abstract).optimizer)
    assert {int(leaf) for leaf in optimizer_state if leaf.ndim == 0} == {6}  # updates it has seen
    config.total_steps = 5
    with pytest.raises(InputError, match=r"found 5, expected at least 6, .* longer, not shorter"):
        run(config, workdir)


def test_other_data_in_the_cache(finished):
    info_of = Checkpoints.restore_info
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Checkpoints, "restore_info", lambda s, k: {**info_of(s, k), "data_fingerprint": "old"}
        )
        with pytest.raises(InputError, match=r"expected those of the checkpoints, old"):
            run(small(), finished)


def test_a_cache_of_other_settings(finished, tmp_path):
    config = small()
    config.data.phantoms = 0
    config.data.prepare = False
    config.data.sources.ct.cache = str(finished / "cache")
    config.data.sources.ct.chain.window = (-1000.0, 500.0)
    with pytest.raises(InputError, match=r"window"):
        run(config, tmp_path / "other")


def test_no_cache(tmp_path):
    config = small()
    config.data.phantoms = 0
    config.data.prepare = False
    with pytest.raises(InputError, match=r"voco_jax.data.prepare"):
        run(config, tmp_path)


def test_prepare_without_lists(tmp_path):
    config = small()
    config.data.phantoms = 0
    with pytest.raises(InputError, match=r"data.sources.ct.roots: found none"):
        run(config, tmp_path)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("crops.encoder_size", (32, 32, 48), r"crops.encoder_size: .*\(32, 32, 48\).*multiples"),
        ("crops.encoder_size", (32, 32, 32), r"crops.encoder_size: .*nearest sizes"),
        ("model.num_heads", (5, 6, 12, 24), r"model.num_heads: found 5 .*divisor"),
        ("model.feature_size", 13, r"model.feature_size: found 13.*multiple of 12"),
        ("export_to", "{workdir}/voco.onnx", r"voco.onnx: found suffix '.onnx'"),
    ],
)
def test_settings_that_the_encoder_cannot_take(tmp_path, field, value, message):
    config = tiny.get_config()
    config.update_from_flattened_dict({field: value})
    with pytest.raises(InputError, match=message):
        run(config, tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_workdir_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot be used as --workdir"):
        run(small(), tmp_path / "file")
    (tmp_path / "old" / "checkpoints" / "2").mkdir(parents=True)
    with pytest.raises(InputError, match=r"config.json: cannot be read .*not known whose"):
        run(small(), tmp_path / "old")


@pytest.mark.parametrize("reached", [None, 2])
def test_a_second_run_meets_the_first_in_words_and_harms_nothing(finished, tmp_path, reached):
    workdir = tmp_path / "run"
    if reached:
        shutil.copytree(finished, workdir)
        (workdir / "checkpoints" / "9.orbax-checkpoint-tmp").mkdir()  # the first one is saving
    with contextlib.ExitStack() as first:
        lock_workdir(workdir, first)
        before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
        with pytest.raises(
            InUseError, match=rf"another run is at work in it \(process {os.getpid()} "
        ):
            run(small(), workdir)
        assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == before
    with contextlib.ExitStack() as third:
        lock_workdir(workdir, third)


def test_a_folder_that_was_not_filled_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        InputError, match=r"export_to: found '\{workdir\}/voco.*', expected the folder's"
    ):
        loop.run(parse(small()), tmp_path / "run", METHOD)
    assert list(tmp_path.iterdir()) == []


def test_a_start_that_failed_may_be_mended(tmp_path):
    config = small()
    config.init_from = str(tmp_path / "none.pt")
    with pytest.raises(InputError, match=r"none.pt"):
        run(config, tmp_path / "run")
    parsed = parse(small())
    assert claim_workdir(tmp_path / "run", parsed) == tmp_path / "run"


def test_export_beside_a_running_save(finished):
    half_written = finished / "checkpoints" / "9.orbax-checkpoint-tmp"
    half_written.mkdir()
    read_network(finished, "teacher")
    assert half_written.exists()
    half_written.rmdir()


def test_a_damaged_checkpoint_is_named(finished, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    for file in (copy / "checkpoints" / "4" / "info").rglob("*"):
        if file.is_file():
            file.write_bytes(b"{")
    with pytest.raises(
        InputError,
        match=r"checkpoints/4: .*damaged \(info/.* has changed .*others: step 2",
    ):
        read_network(copy, "teacher")


def _flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (lambda step: _flip(next((step / "student" / "d").iterdir())), "student/d/.* has changed"),
        (lambda step: os.truncate(next((step / "teacher" / "d").iterdir()), 10), "teacher/d/"),
        (lambda step: (step / "optimizer" / "_METADATA").unlink(), "_METADATA is missing"),
        (lambda step: (step / "digests.json").unlink(), "digests.json is missing"),
        (lambda step: (step / "_CHECKPOINT_METADATA").unlink(), "_CHECKPOINT_METADATA cannot"),
    ],
)
def test_damage_is_found_and_the_step_before_is_the_latest(finished, tmp_path, harm, reason):
    shutil.copytree(finished / "checkpoints", tmp_path / "checkpoints")
    assert set_damaged_aside(tmp_path) == ""
    harm(tmp_path / "checkpoints" / "4")
    message = set_damaged_aside(tmp_path)
    assert re.search(f"DAMAGED CHECKPOINT: step 4 .*{reason}.*falling back to step 2", message)
    assert sorted(f.name for f in (tmp_path / "checkpoints").iterdir()) == ["2"]
    assert (tmp_path / "damaged_checkpoints" / "4").is_dir()
    harm(tmp_path / "checkpoints" / "2")
    with pytest.raises(InputError, match=r"every checkpoint is damaged \(step 2: "):
        set_damaged_aside(tmp_path)
    assert (tmp_path / "checkpoints" / "2").is_dir()


@pytest.mark.parametrize(("step", "name"), [(4, "8"), (2, "4"), (4, "0")])
def test_a_copied_or_renamed_step_is_not_resumed_under_its_new_number(
    finished, tmp_path, step, name
):
    """Every file in it is as it was saved; the name alone is wrong."""
    folder = tmp_path / "checkpoints"
    shutil.copytree(finished / "checkpoints" / "2", folder / "2")
    shutil.copytree(finished / "checkpoints" / str(step), folder / name)
    if name == "0":
        shutil.rmtree(folder / "2")
        with pytest.raises(InputError, match=r"every checkpoint is damaged .*it holds step 4"):
            set_damaged_aside(tmp_path)
        return
    with pytest.raises(InputError, match=f"checkpoints/{name}: .*it holds step {step}: copied"):
        read_network(tmp_path)
    message = set_damaged_aside(tmp_path)
    assert f"step {name} (it holds step {step}: copied or renamed)" in message
    assert "falling back to step 2" in message
    assert saved_steps(tmp_path) == [2]


@pytest.mark.parametrize("name", ["²", "٤", "08", "+8", "8 (copy)", "8\n"])
def test_other_folders_are_no_steps(tmp_path, name):
    for one in ("4", "10", name):
        (tmp_path / "checkpoints" / one).mkdir(parents=True)
    assert saved_steps(tmp_path) == [4, 10]


STRANGE = [
    '{"step": Infinity}',
    '{"step": -Infinity}',
    '{"step": NaN}',
    '{"step": 1e999}',
    '{"step": 7.5}',
    '{"step": true}',
    '{"step": ' + "9" * 5000 + "}",
    "[" * 100_000,
    "[5]",
    "5",
]


@pytest.mark.parametrize("line", STRANGE, ids=lambda line: line[:20])
def test_lines_of_others_in_the_metrics(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1, "loss": 2.0}}\n{line}\n{{"step": 2, "loss": 1.0}}\n')
    assert last_step(tmp_path) == 2
    MetricsWriter(tmp_path, 1).close()
    assert path.read_text() == '{"step": 1, "loss": 2.0}\n'


@pytest.mark.parametrize("content", [*STRANGE, "", "\udcff"], ids=lambda content: content[:20])
def test_a_strange_config_beside_checkpoints_is_an_error_in_words(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content.encode(errors="surrogateescape"))
    claim_workdir(tmp_path, parse(small()))  # nothing was saved yet
    (tmp_path / "config.json").write_bytes(content.encode(errors="surrogateescape"))
    (tmp_path / "checkpoints" / "2").mkdir(parents=True)
    with pytest.raises(InputError, match=r"config\.json: cannot be read|voco_jax 0\.1"):
        claim_workdir(tmp_path, parse(small()))


def test_an_older_checkpoint_whose_accuracy_is_unreadable(finished, tmp_path):
    """Orbax reads every step's, and would end each run with a line that names no file."""
    shutil.copytree(finished / "checkpoints", tmp_path / "checkpoints")
    path = tmp_path / "checkpoints" / "2" / "metrics" / "metrics"
    path.parent.mkdir(exist_ok=True)
    path.write_text('{"sco')
    message = set_damaged_aside(tmp_path)
    assert re.search(r"DAMAGED CHECKPOINT: step 2 \(metrics .*; moved to .*/2, step 4", message)
    assert Checkpoints(tmp_path, parse(small()).checkpoint).steps() == [4]


def test_lost_checkpoints_are_no_new_start(finished, tmp_path):
    config, run = parse(small()), tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "checkpoints").rename(run / "damaged_checkpoints")
    with pytest.raises(InputError, match=r"holds no checkpoint, only .*damaged_checkpoints does"):
        set_damaged_aside(run)
    claim_workdir(run, config)  # saved every 2: a kill may have come before step 2 was whole
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "loss": 1.0}\n{"step": 6, "lo')
    with pytest.raises(InputError, match=r"no checkpoint, though .* to step 5 and saved every 2 "):
        claim_workdir(run, config)


@pytest.mark.parametrize("folder", ["gs://bucket/run", "s3://bucket/run"])
def test_a_bucket_is_no_workdir(tmp_path, monkeypatch, folder):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f"--workdir: found '{folder}', expected .*file system"):
        run(small(), folder)
    config = small()
    config.export_to = f"{folder}/weights.pt"
    with pytest.raises(InputError, match=f"export_to: found '{folder}/weights.pt'"):
        run(config, "run")
    assert list(tmp_path.iterdir()) == []


FULL = """
import resource, sys
from pathlib import Path
import numpy as np
from voco_jax.errors import InputError, InUseError
from voco_jax.training.metrics import Log, MetricsWriter
from voco_jax.training.metrics import save_picture
folder = Path(sys.argv[1])
writer, say = MetricsWriter(folder, 0), Log(folder, 0)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
image = np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8)
for act in (
    lambda: writer.write(1, {"loss": 1.0}),
    lambda: writer.picture(1, "positions", image),
    lambda: say.keep("words"),
    lambda: save_picture(image, folder / "picture.png"),
):
    try:
        for _ in range(10_000):
            act()
    except InputError as error:
        print(error)
writer.close()
print("closed")
"""


def test_what_cannot_be_written_is_told(tmp_path):
    """A limit on the size of files is all of a full disk that needs no rights. Nothing waits."""
    done = subprocess.run(
        [sys.executable, "-c", FULL, tmp_path], capture_output=True, text=True, timeout=120
    )
    told = done.stdout.splitlines()
    names = ("tensorboard", "tensorboard", "logs/process_0.log", "picture.png")
    assert done.returncode == 0, done.stderr
    for name, line in zip(names, told, strict=False):
        assert re.fullmatch(rf"{tmp_path}/{name}: cannot be written \(.*\); free space .*", line)
    assert told[len(names) :] == ["closed"]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 2),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), 2),
        (PermissionError(errno.EACCES, "Permission denied"), 2),
        (OSError(errno.EIO, "Input/output error"), 1),
        (OSError(errno.ESTALE, "Stale file handle"), 1),
        (ValueError("UNKNOWN: Failed to write: [OS error 5: Input/output error]"), 1),
        (ValueError("RESOURCE_EXHAUSTED: [OS error 28: No space left on device]"), 2),
    ],
)
def test_launchers_try_again_what_may_pass_alone(tmp_path, monkeypatch, error, status):
    def fails(*_, **__):
        raise error

    checkpoints = Checkpoints(tmp_path / "a", parse(small()).checkpoint)
    monkeypatch.setattr(checkpoints._manager, "wait_until_finished", fails)
    with pytest.raises(InputError, match=r"cannot save a checkpoint .*free space") as raised:
        checkpoints.wait()
    assert raised.value.status == status
    if isinstance(error, OSError):
        say = Log(tmp_path / "b", 0)
        monkeypatch.setattr(Path, "open", fails)
        with pytest.raises(InputError, match="cannot be written") as raised:
            say.keep("words")
        assert raised.value.status == status


def test_logs_that_were_cleared_away_go_on(tmp_path):
    say = Log(tmp_path / "run", 0)
    say.keep("before")
    shutil.rmtree(tmp_path / "run" / "logs")
    say.keep("after \udcff")
    assert "after \\udcff" in (tmp_path / "run/logs/process_0.log").read_text("utf-8")
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(InputError, match="No such file"):
        say.keep("nobody brings a whole workdir back")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("jax_enable_x64", True),
        ("jax_numpy_dtype_promotion", "strict"),
        ("jax_default_prng_impl", "rbg"),
        ("jax_threefry_partitionable", False),
        ("jax_random_seed_offset", 1),
    ],
)
def test_jax_s_settings_that_change_numbers_are_refused(tmp_path, monkeypatch, name, value):
    before = getattr(jax.config, name)
    jax.config.update(name, value)
    try:
        with pytest.raises(InputError, match=f"{name.upper()}: found {value}, expected .*; unset"):
            run(small(), tmp_path / "run")
    finally:
        jax.config.update(name, getattr(before, "value", before))
    assert not (tmp_path / "run").exists()
    assert check_jax_settings() == ""


@pytest.mark.parametrize("name", ["JAX_DEFAULT_MATMUL_PRECISION", "NVIDIA_TF32_OVERRIDE"])
def test_settings_that_change_rounding_are_told(monkeypatch, name):
    monkeypatch.setenv(name, "1")
    assert f"{name}=1" in check_jax_settings()


def test_each_process_keeps_why_it_ended(tmp_path):
    config = small()
    config.data.phantoms = 0
    with pytest.raises(InputError) as raised:
        run(config, tmp_path)
    assert f"process 0: ended: {raised.value}" in (tmp_path / "logs/process_0.log").read_text()


def test_which_checkpoints_are_kept(tmp_path):
    state = toy_task.State(jnp.int32(0), {"w": jnp.zeros(3)})
    keep = dataclasses.replace(parse(small()).checkpoint, keep=2, keep_every_steps=4, keep_best=1)
    checkpoints = Checkpoints(tmp_path, keep, jax.eval_shape(lambda: state))
    for step in range(1, 11):
        score = {3: 0.9, 6: 0.5}.get(step)
        checkpoints.save(state.replace(step=jnp.asarray(step)), {"step": step}, score)
    checkpoints.wait()
    assert checkpoints.steps() == [3, 4, 8, 9, 10]
    assert checkpoints.best_score() == 0.9
    checkpoints.close()


def test_a_window_of_steps_is_traced_even_when_resumed_inside_it(tmp_path, monkeypatch):
    calls, config = [], small()
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "stop_before", stop_after(2))
        with pytest.raises(loop.PreemptedError):
            run(config, tmp_path)
    assert not calls
    config.profile.start, config.profile.steps = 2, 5
    run(config, tmp_path)  # steps 3 and 4
    assert calls == ["start", "stop"]


def test_a_users_xla_flags_win(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    ours = compiler_options(make_mesh())
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=3")
    rest = {name: x for name, x in ours.items() if name != "xla_backend_optimization_level"}
    assert compiler_options(make_mesh()) == rest


def test_options_that_xla_lacks_are_left_out():
    assert has_option("xla_backend_optimization_level", 1)
    assert not has_option("xla_no_such_option", 1)


def test_options_that_xla_lacks_are_named(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    there = compiler_options(make_mesh())
    lacking = "xla_backend_optimization_level"
    monkeypatch.setattr(
        "voco_jax.training.compile.has_option",
        lambda name, value: name in there and name != lacking,
    )
    assert lacking in missing_options(make_mesh())
    assert lacking not in compiler_options(make_mesh())


@pytest.mark.skipif(not HAS_TORCH, reason="need PyTorch")
def test_a_run_starts_without_torch_and_matplotlib():
    code = (
        "import sys, voco_jax.train, voco_jax.training.loop; voco_jax.train.methods(); "
        "print(sorted({'torch', 'matplotlib'} & sys.modules.keys())); import torch"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "[]\n"


def test_step_times_have_their_own_clock():
    now = iter([0.0, 1.0, 3.0, 4.0])
    times = StepTimes(clock=lambda: next(now))
    for _ in range(3):
        times.step()
    times.wait(1.0)
    assert times.report() == (1.0, 2.0, 0.25)
    hosts = np.array([[1.0, 2.0, 0.25], [1.5, 1.6, 0.5]])
    assert heartbeat(hosts) == (
        "heartbeat: 2 processes, median step 1.250 s; slowest: process 0 with 2.000 s; "
        "waiting for input: process 1 50% of the time"
    )


@pytest.mark.parametrize("content", ["[]", '{"ct": [1]}', '{"ct": {"training": [1]}}', "[" * 10**5])
def test_a_strange_list_of_volumes_is_an_error_in_words(finished, tmp_path, content):
    (tmp_path / "volumes.json").write_text(content)
    data = parse(small(), str(finished)).data
    caches = {"ct": Cache.open(data.sources["ct"].cache, data.sources["ct"].chain)}
    with pytest.raises(InputError, match=r"volumes\.json: cannot be read"):
        read_volumes(caches, data, tmp_path)


def test_a_cache_may_grow_but_not_change(finished):
    config = parse(small(), str(finished))
    source = config.data.sources["ct"]
    cache = Cache.open(source.cache, source.chain)
    chosen = read_volumes({"ct": cache}, config.data, finished)
    assert [len(part.entries) for (part,) in chosen] == [3, 1]
    more = dataclasses.replace(cache.entries[0], id="zzz", checksum="other")
    grown = dataclasses.replace(cache, entries=(*cache.entries, more))
    found = read_volumes({"ct": grown}, config.data, finished)
    assert [part.entries for (part,) in found] == [part.entries for (part,) in chosen]
    changed = dataclasses.replace(cache.entries[0], checksum="other")
    other = dataclasses.replace(cache, entries=(changed, *cache.entries[1:]))
    with pytest.raises(InputError, match=r"1 volumes that this run began with .*have changed"):
        read_volumes({"ct": other}, config.data, finished)


def test_weights_start_both_networks(finished, tmp_path, capsys):
    config = small()
    config.init_from = str(finished / "voco_encoder.safetensors")
    config.checkpoint.every_steps = 1
    config.checkpoint.keep = 4
    run(config, tmp_path / "second")
    checkpoints = tmp_path / "second" / "checkpoints"
    for step in (2, 3, 4):  # leaves step 1, whose update has a learning rate of 0: warm-up
        shutil.rmtree(checkpoints / str(step))
    out = capsys.readouterr().out
    assert "matched" in out
    expected, _ = read_network(finished, "teacher")
    for network in ("student", "teacher"):
        found, _ = read_network(tmp_path / "second", network)
        for name in ("conv_0", "conv_1", "conv_2"):
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8),
                found[name],
                expected[name],
            )


def test_weights_of_the_wrong_size(finished, tmp_path):
    config = small()
    config.init_from = str(finished / "voco_encoder.safetensors")
    config.model.features = 8
    with pytest.raises(InputError, match=r"does not fit the model: .* of another shape"):
        run(config, tmp_path)


def test_nan_stops_the_run_and_names_the_checkpoint(tmp_path, monkeypatch):
    def poisoned(*args, **options):
        for step, batch in enumerate(original(*args, **options), start=1):
            yield {**batch, "labels": batch["labels"] * (np.nan if step == 3 else 1)}

    original = task.batches
    monkeypatch.setattr(task, "batches", poisoned)
    config = small()
    config.log_every_steps = 100  # found before the checkpoint of step 4, not at a log line
    with pytest.raises(
        loop.DivergedError,
        match=r"step 3: .* is not finite.*Last good checkpoint: .*checkpoints/2",
    ):
        run(config, tmp_path)


def test_the_blind_loss_is_computed_once(tmp_path, monkeypatch):
    losses = iter([0.3])
    monkeypatch.setattr(task, "blind_loss", lambda *_: next(losses))
    experiment = parse(small(), str(tmp_path))
    program = METHOD.make_program(experiment, make_mesh(1))
    made = METHOD.make_task(experiment, program, workdir=tmp_path, resumes=False, log=print)
    assert [made.blind_loss(), made.blind_loss()] == [0.3, 0.3]


def test_progress_has_its_own_clock():
    times = iter([0.0, 10.0, 25.0])
    progress = Progress(100, 200, clock=lambda: next(times))
    assert progress.lap(110) == (1.0, "0:01:30")
    rate, left = progress.lap(120, paused=5.0)
    assert (rate, left) == (1.0, "0:01:20")
    assert duration(3 * 3600 + 62) == "3:01:02"


def test_read_network_errors(finished, tmp_path):
    with pytest.raises(InputError, match=r"found no folder 'checkpoints'"):
        read_network(tmp_path, "teacher")
    with pytest.raises(InputError, match=r"found no step 3, expected one of 2, 4"):
        read_network(finished, "teacher", 3)


@pytest.mark.parametrize(
    ("recipe", "scope", "changes"),
    [
        ("paper", "none", {}),
        ("voco_v2", "projector", {"dropout.rate": 0.2, "batch_size": 2}),
    ],
)
def test_other_recipes_train_resume_and_export(tmp_path, recipe, scope, changes):
    config = small()
    with config.unlocked():
        config.update_from_flattened_dict(changes)
    config.recipe, config.teacher.scope = recipe, scope
    config.total_steps, config.checkpoint.every_steps = 2, 1
    config.validation.every_steps = 0
    run(config, tmp_path)
    before, (student, info) = _losses(tmp_path), read_network(tmp_path)
    assert info["network"] == "student"
    with pytest.raises(
        InputError, match=r"found 'teacher', expected one of student: no other part"
    ):
        read_network(tmp_path, "teacher")
    card = json.loads((tmp_path / "voco_encoder.safetensors.json").read_text())
    assert (card["recipe"], card["network"]) == (recipe, "student")
    exported = load_file(tmp_path / "voco_encoder.safetensors")
    kernel = student["conv_0"]["kernel"]
    np.testing.assert_array_equal(exported["conv.0.weight"], kernel.transpose(4, 3, 0, 1, 2))

    shutil.rmtree(tmp_path / "checkpoints" / "2")
    run(config, tmp_path)
    assert _losses(tmp_path) == before
    again, _ = read_network(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, again, student)
