import dataclasses
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import nibabel
import numpy as np
import pytest
from chains import CHAIN_10K
from conftest import shared_file

from voco_jax.data import filling as filling_module
from voco_jax.data import jobs as jobs_module
from voco_jax.data.cache import Cache, CacheWriter, checksum, chunk_file
from voco_jax.data.collect import scan
from voco_jax.data.datalists import Volume, read_list
from voco_jax.data.jobs import prepare_one
from voco_jax.data.prepare import PrepareError, main, prepare
from voco_jax.data.volumes import prepare_files, prepare_volume, quantise
from voco_jax.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
CHAIN = dataclasses.replace(CHAIN_10K, volume_size=(24, 24, 16))
FLAGS = ["--size", "24", "24", "16"]
REPOSITORY = Path(__file__).resolve().parents[1]


def save(path, seed=0, shape=(20, 18, 12)):
    hu = np.full(shape, -1000, np.int16)
    noise = np.random.default_rng(seed).normal(60, 40, shape)
    hu[2:-3, 3:-2, 1:-2] = np.maximum(noise, 0)[2:-3, 3:-2, 1:-2]
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(hu, np.diag([2, 2, 3, 1])), path)
    return path


@pytest.fixture
def data(tmp_path):
    """A folder of five volumes."""
    for index in range(5):
        save(tmp_path / "data" / f"{index}.nii.gz", index)
    return tmp_path / "data"


def run(volumes, cache, **options):
    return prepare(volumes, cache, CHAIN, options.pop("workers", 0), progress=False, **options)


def counts(summary):
    return summary.done, summary.skipped, summary.failed


def check_whole(path, chain=CHAIN):
    """Every volume that the manifest names has its own voxels."""
    cache = Cache.open(path, chain)
    for entry in cache.entries:
        assert checksum(cache.read(entry)) == entry.checksum, entry.id
        expected = quantise(prepare_volume(entry.path, chain).voxels, chain.dtype)
        np.testing.assert_array_equal(cache.read(entry), expected)
    return cache


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_prepare_and_again(data, tmp_path):
    first = run(scan(data), tmp_path / "cache")
    assert counts(first) == (5, 0, 0)
    assert (first.training, first.validation, first.unlisted) == (5, 0, 0)
    cache = check_whole(tmp_path / "cache")
    assert [entry.id for entry in cache.entries] == [f"data/{i}.nii.gz" for i in range(5)]
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache/volumes").iterdir()}
    manifest = (tmp_path / "cache/manifest.jsonl").read_text()
    assert counts(run(scan(data), tmp_path / "cache")) == (0, 5, 0)
    assert (tmp_path / "cache/manifest.jsonl").read_text() == manifest
    assert {file: file.stat().st_mtime_ns for file in files} == files


def test_only_new_changed_and_failed_volumes_are_done(data, tmp_path):
    cache = tmp_path / "cache"
    (data / "bad.nii").write_text("no")
    assert counts(run(scan(data), cache)) == (5, 0, 1)
    assert counts(run(scan(data), cache)) == (0, 5, 1)
    save(data / "bad.nii", 9)
    save(data / "0.nii.gz", 10, (22, 22, 22))  # another size
    os.utime(data / "1.nii.gz", ns=(1, 1))  # another time
    save(data / "new.nii", 11)
    before = {entry.id: entry for entry in Cache.open(cache, CHAIN).entries}
    assert counts(run(scan(data), cache)) == (4, 3, 0)
    after = {entry.id: entry for entry in check_whole(cache).entries}
    same = {id for id in before if before[id] == after[id]}
    assert same == {f"data/{i}.nii.gz" for i in (2, 3, 4)}
    assert len({entry.slot for entry in after.values()}) == 7
    assert not lines(cache / "failures.jsonl")


def test_one_failing_volume_of_each_kind(data, tmp_path):
    good = (data / "0.nii.gz").read_bytes()
    (data / "a_truncated.nii.gz").write_bytes(good[:-20])
    (data / "b_text.nii").write_text("hello" * 200)
    affine = np.diag([2, 2, 3, 1])
    shapes = {"c_4d": (9, 9, 9, 3), "d_2d": (9, 9), "e_constant": (9, 9, 9)}
    for name, shape in shapes.items():
        nibabel.save(nibabel.Nifti1Image(np.ones(shape, np.int16), affine), data / f"{name}.nii")
    values = np.random.default_rng(0).normal(0, 500, (9, 9, 9)).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(np.minimum(values, -100), affine), data / "f_dark.nii")
    nibabel.save(nibabel.Nifti1Image(values, np.diag([2, 2, 300, 1])), data / "g_spacing.nii")
    values[1, 2, 3] = np.nan
    nibabel.save(nibabel.Nifti1Image(values, affine), data / "h_nan.nii")
    missing = Volume("data/i_missing.nii", data / "i_missing.nii", "training")
    summary = run([*scan(data), missing], tmp_path / "cache")
    assert counts(summary) == (5, 0, 9)
    expected = [
        ("a_truncated.nii.gz", "truncated gzip"),
        ("b_text.nii", "not a NIfTI"),
        ("c_4d.nii", "not 3-D"),
        ("d_2d.nii", "not 3-D"),
        ("e_constant.nii", "constant"),
        ("f_dark.nii", "no foreground"),
        ("g_spacing.nii", "absurd spacing"),
        ("h_nan.nii", "NaN or infinite voxels"),
        ("i_missing.nii", "missing file"),
    ]
    found = lines(tmp_path / "cache/failures.jsonl")
    assert [(line["id"], line["path"]) for line in found] == [
        (f"data/{name}", str(data / name)) for name, _ in expected
    ]
    for line, (_, reason) in zip(found, expected, strict=True):
        assert line["reason"].startswith(f"{reason}:")
    text = str(summary)
    assert "5 prepared now, 0 already there, 9 failed" in text
    assert "failed, not 3-D: 2" in text
    with pytest.raises(PrepareError, match="9 volumes failed"):
        run([*scan(data), missing], tmp_path / "cache", strict=True)
    check_whole(tmp_path / "cache")


def test_nothing_prepared_is_an_error(tmp_path):
    missing = Volume("a", tmp_path / "a", "training")
    with pytest.raises(PrepareError, match="no volume could be prepared"):
        run([missing], tmp_path / "cache")
    with pytest.raises(InputError, match="found no volumes"):
        run([], tmp_path / "cache")


def test_volumes_of_no_list_and_volumes_without_file_stay(data, tmp_path):
    volumes = scan(data)
    run(volumes, tmp_path / "cache")
    for file in data.iterdir():
        file.unlink()
    summary = run(volumes[:3], tmp_path / "cache")
    assert (*counts(summary), summary.training, summary.unlisted) == (0, 3, 0, 5, 2)
    assert "2 volumes of the cache are in none of the lists given" in str(summary)


def test_a_volume_that_moves_to_validation_is_not_done_again(data, tmp_path):
    volumes = scan(data)
    run(volumes, tmp_path / "cache")
    moved = Volume(volumes[2].id, volumes[2].path, "validation")
    summary = run([*volumes[:2], moved, *volumes[3:]], tmp_path / "cache")
    assert (*counts(summary), summary.training, summary.validation) == (0, 5, 0, 4, 1)
    sections = [entry.section for entry in check_whole(tmp_path / "cache").entries]
    assert sections == ["training", "training", "validation", "training", "training"]


def test_a_full_disk_ends_the_run_in_words(data, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(jobs_module, "write_volume", full)
    with pytest.raises(InputError, match=r"cannot write this cache: No space left.*same command"):
        run(scan(data), tmp_path / "cache")


# ---- the command


def test_command(data, tmp_path, capsys):
    (tmp_path / "list.json").write_text(
        json.dumps(
            {"training": [{"image": f"{i}.nii.gz"} for i in range(4)], "validation": ["4.nii.gz"]}
        )
    )
    other = save(tmp_path / "more" / "x.nii")
    (tmp_path / "other.json").write_text(json.dumps({"training": ["x.nii", "gone.nii"]}))
    arguments = ["--cache", str(tmp_path / "cache"), "--workers", "0", *FLAGS]
    for name, root in (("list", data), ("other", other.parent)):
        arguments += ["--datalist", str(tmp_path / f"{name}.json"), "--root", str(root)]
    assert main(arguments) == 0
    assert "5 training and 1 validation volumes" in capsys.readouterr().out
    assert main([*arguments, "--strict"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") or "\nerror: " in error
    assert "1 volumes failed (strict)" in error
    check_whole(tmp_path / "cache")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --datalist"),
        (["--scan", "DATA"], "--cache: missing"),
        (["--datalist", "l.json", "--cache", "c"], "--datalist and --root: give both"),
        (["--scan", "DATA", "--cache", "c", "--workers", "-1"], "--workers: found -1"),
        (["--scan", "DATA", "--cache", "c", "--window", "5", "5"], "expected .low, high. with"),
        (["--scan", "DATA", "--cache", "c", "--size", "0", "5", "5"], "volume_size.0"),
        (["--scan", "DATA", "--cache", "c", "--threshold", "2"], "foreground_threshold"),
        (["--scan", "nowhere", "--cache", "c"], "nowhere: not a folder"),
        (["--config", "none.py"], "none.py: no such config file"),
        (
            ["--config", str(ROOT / "configs/voco_160k.py"), "--scan", "DATA"],
            "expected one: choose it with --source",
        ),
        (["--config", str(ROOT / "configs/demo.py"), "--config.seed=x"], "seed: found 'x'"),
    ],
)
def test_bad_commands(data, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main([str(data) if a == "DATA" else a for a in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert re.search(message, error)
    assert "Traceback" not in error


def test_help_shows_an_example(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert (
        "--datalist lists/btcv.json --root data/BTCV --cache cache/voco" in capsys.readouterr().out
    )


def start(arguments, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "voco_jax.data.prepare", *map(str, arguments)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def wait_for_lines(manifest, count, process):
    while process.poll() is None and (
        not manifest.exists() or manifest.read_bytes().count(b"\n") < count
    ):
        time.sleep(0.001)


def many(folder, count=40):
    """Links to a few volumes that take some 20 ms each."""
    for index in range(3):
        save(folder / f"source_{index}.nii.gz", index, (96, 96, 60))
    for index in range(count):
        os.link(folder / f"source_{index % 3}.nii.gz", folder / f"{index:03d}.nii.gz")
    return folder


@pytest.mark.parametrize("workers", [0, 2])
def test_killed_at_any_moment_it_leaves_whole_volumes(tmp_path, workers):
    folder, cache = many(tmp_path / "data"), tmp_path / "cache"
    arguments = ["--scan", folder, "--cache", cache, "--workers", workers, *FLAGS]
    chance = random.Random(workers)
    there = 0
    for _ in range(3 if workers == 0 else 1):
        process = start(arguments)
        wait_for_lines(cache / "manifest.jsonl", there + chance.randint(1, 4), process)
        time.sleep(chance.uniform(0, 0.05))
        process.kill()
        process.communicate()
        there = len(check_whole(cache).entries)
    assert 0 < there < 43
    done = subprocess.run(
        [sys.executable, "-m", "voco_jax.data.prepare", *map(str, arguments)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"{43 - there} prepared now, {there} already there, 0 failed" in done.stdout
    assert len(done.stdout.splitlines()) == 2
    # Of long runs how far they are, of Dask nothing.
    assert all(line.startswith("prepare: ") for line in done.stderr.split("\n") if line)
    named = {f"c.{entry.slot}.0.0.0" for entry in check_whole(cache).entries}
    assert len(named) == 43
    unused = cache / "unused.json"  # what was written just before a kill; deleted in a month
    known = json.loads(unused.read_text()).keys() if unused.exists() else set()
    assert {file.name for file in (cache / "volumes").glob("c.*")} == named | known


def test_interrupted_in_words(tmp_path):
    folder, cache = many(tmp_path / "data", 300), tmp_path / "cache"
    for number, name in ((signal.SIGTERM, "TERM"), (signal.SIGINT, "INT")):
        process = start(["--scan", folder, "--cache", cache, "--workers", 0, *FLAGS])
        wait_for_lines(cache / "manifest.jsonl", 3 if name == "TERM" else 9, process)
        process.send_signal(number)
        _, error = process.communicate(timeout=30)
        assert process.returncode == 130, error
        assert "interrupted: every volume finished so far is kept" in error
        assert "Traceback" not in error
    with CacheWriter(cache, CHAIN):
        pass  # not locked


def test_interrupt_where_python_ignores_exceptions(tmp_path, monkeypatch, capsys):
    class Resource:
        pass

    def interrupted(paths, chain, take_doubtful):
        resource = Resource()
        callback = weakref.ref(resource, lambda _: signal.raise_signal(signal.SIGTERM))
        del resource
        assert callback() is None
        return prepare_files(paths, chain, take_doubtful)

    reported: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", reported.append)
    monkeypatch.setattr(jobs_module, "prepare_files", interrupted)
    folder = many(tmp_path / "data", 2)
    arguments = ["--scan", folder, "--cache", tmp_path / "cache", "--workers", 0, *FLAGS]
    assert main(list(map(str, arguments))) == 130
    assert "interrupted: every volume finished so far is kept" in capsys.readouterr().err
    assert reported == []
    assert len(Cache.open(tmp_path / "cache", CHAIN).entries) == 1


def test_a_volume_that_kills_its_workers_is_a_failure(data, tmp_path, monkeypatch):
    """What tests/test_workers.py says of such a job, in the run's own words."""

    def outcomes(jobs, *_):
        yield from ((job, None if "3.nii" in job.volume.id else prepare_one(job)) for job in jobs)

    monkeypatch.setattr(filling_module, "_outcomes", outcomes)
    assert counts(run(scan(data), tmp_path / "cache")) == (4, 0, 1)
    (failure,) = lines(tmp_path / "cache/failures.jsonl")
    assert failure["id"] == "data/3.nii.gz"
    assert failure["reason"].startswith("worker killed three times: ")
    check_whole(tmp_path / "cache")


# ---- verify


@pytest.mark.parametrize("fit", ["resize", "random_crop"])
def test_verify_finds_damage_and_a_rerun_repairs_it(data, tmp_path, monkeypatch, capsys, fit):
    chain = dataclasses.replace(CHAIN, fit=fit)
    path, verify = tmp_path / "cache", ["--verify", "--cache", str(tmp_path / "cache")]
    prepare(scan(data), path, chain, 0, progress=False)
    assert main(verify) == 0
    assert "5 volumes intact, 0 not" in capsys.readouterr().out
    zero, one, two, three, _ = Cache.open(path, chain).entries
    files = [Path(chunk_file(str(path), entry.slot)) for entry in (zero, one, two, three)]
    files[0].write_bytes(flipped(files[0].read_bytes()))
    files[1].unlink()
    # Whole files, but not these volumes: no code of the file format can tell.
    shutil.copy(files[2], tmp_path / "kept")
    shutil.copy(files[3], files[2])
    files[3].write_bytes((tmp_path / "kept").read_bytes())

    assert main(verify) == 1
    out = capsys.readouterr().out
    assert "1 volumes intact, 4 not" in out
    words = {"resize": "DATA_LOSS: .*checksum", "random_crop": ".*(Digest|Blosc)"}[fit]
    assert re.search(rf"data/0.nii.gz: {files[0]} cannot be read: {words}", out), out
    assert f"data/1.nii.gz: {files[1]} is missing" in out
    assert f"data/2.nii.gz: {files[2]} has the checksum {three.checksum}, expected" in out
    assert "prepare again, with the same lists or folders" in out
    assert main(verify) == 0  # of what is left
    assert "1 volumes intact, 0 not" in capsys.readouterr().out

    again = prepare(scan(data), path, chain, 0, progress=False)
    assert counts(again) == (4, 1, 0)
    assert main(verify) == 0
    assert "5 volumes intact, 0 not" in capsys.readouterr().out
    assert len({entry.slot for entry in Cache.open(path, chain).entries}) == 5


def flipped(content):
    """One bit near the end, among the voxels."""
    content = bytearray(content)
    content[-50] ^= 1
    return content


def test_verify_in_words(data, tmp_path, capsys):
    assert main(["--verify"]) == 2
    assert "name the cache with --cache" in capsys.readouterr().err
    assert main(["--verify", "--cache", str(tmp_path), "--scan", str(data)]) == 2
    assert "expected only --cache, or --config" in capsys.readouterr().err
    flags = ["--dry-run", "--exclude", "x.txt", "--prune", "--write-list", "l.json"]
    flags += ["--series", "x", "--one-series", "largest"]
    assert main(["--verify", "--cache", str(tmp_path), *flags]) == 2
    named = "--exclude, --dry-run, --write-list, --series, --one-series, --prune"
    assert f"--verify: found {named} beside it" in capsys.readouterr().err
    assert main(["--verify", "--cache", str(tmp_path), "--prune"]) == 2
    assert "--verify: found --prune beside it" in capsys.readouterr().err
    assert main(["--verify", "--cache", str(tmp_path)]) == 2
    assert "no prepared cache here" in capsys.readouterr().err


def test_a_volume_larger_than_its_place_is_a_failure(data, tmp_path, monkeypatch):
    chain = dataclasses.replace(CHAIN, fit="random_crop")
    monkeypatch.setattr(jobs_module, "largest", lambda chain: (64, 64, 8))
    with pytest.raises(PrepareError) as caught:
        prepare(scan(data), tmp_path / "cache", chain, 0, progress=False)
    assert "failed, too large: 5" in str(caught.value)
    reason = lines(tmp_path / "cache/failures.jsonl")[0]["reason"]
    assert reason.startswith("too large: 24x24x16 voxels to store, expected at most 64x64x8")


def test_config_file(data, tmp_path, capsys):
    (tmp_path / "list.json").write_text(json.dumps({"training": ["0.nii.gz", "1.nii.gz"]}))
    (tmp_path / "config.py").write_text(
        "from configs import voco_10k\n"
        "def get_config():\n"
        "    config = voco_10k.get_config()\n"
        f"    config.data.sources.ct.lists = ({str(tmp_path / 'list.json')!r},)\n"
        f"    config.data.sources.ct.roots = ({str(data)!r},)\n"
        "    return config\n"
    )
    cache = tmp_path / "cache"
    arguments = ["--config", str(tmp_path / "config.py"), "--cache", str(cache), "--workers", "0"]
    assert main(arguments) == 0, capsys.readouterr().err
    assert Cache.open(cache, CHAIN_10K).entries[0].id == "data/0.nii.gz"


def test_flags_beside_a_config_file(data, tmp_path, capsys):
    """As configs/voco_10k.py advises; a flag for what the file says; a scan with its chain."""
    config = ["--config", str(ROOT / "configs" / "voco_10k.py"), "--workers", "0"]
    small = ["--size", "24", "24", "16"]
    source = "--config.data.sources.ct."
    for number, flags in enumerate(
        [
            [f"{source}lists=()", f"{source}roots={data}"],
            ["--scan", str(data), f"{source}chain.window=(-1000, 500)"],
        ]
    ):
        cache = tmp_path / f"cache_{number}"
        assert main([*config, *flags, *small, "--cache", str(cache)]) == 0, capsys.readouterr().err
        window = (-175.0, 250.0) if number == 0 else (-1000.0, 500.0)
        chain = dataclasses.replace(CHAIN, window=window)
        assert len(Cache.open(cache, chain).entries) == len(list(data.glob("*.nii.gz")))


@pytest.mark.filterwarnings("ignore")
def test_real_ct_through_the_cache_agrees_with_monai(tmp_path):
    from test_volumes import monai_chain

    shared = shared_file("ct")
    volumes = read_list(shared / "pretrain.json", shared)
    summary = prepare(volumes[::3], tmp_path / "cache", CHAIN, 0, progress=False)
    assert counts(summary) == (5, 0, 0)
    cache = Cache.open(tmp_path / "cache", CHAIN)
    for entry in cache.entries:
        expected, box = monai_chain(entry.path, CHAIN)
        assert entry.box == box
        stored = cache.read(entry).astype(np.float32) / 255
        assert np.abs(stored - expected).max() <= 1 / 510 + 1e-6
        assert os.path.getsize(chunk_file(cache.path, entry.slot)) < expected.nbytes
