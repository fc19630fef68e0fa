"""The cache and its sources in object stores, against servers on this machine."""

import contextlib
import dataclasses
import json
import os
import pickle
import time

import nibabel
import numpy as np
import object_stores
import pytest
from chains import CHAIN_10K

from voco_jax.data import manifest
from voco_jax.data.array import write_volume
from voco_jax.data.cache import KEEP_SECONDS, Cache, CacheWriter, checksum, chunk_file
from voco_jax.data.collect import collect, scan
from voco_jax.data.datalists import read_list
from voco_jax.data.formats.remote import local_copy, remote_signature
from voco_jax.data.prepare import main, prepare
from voco_jax.data.storage import Folder
from voco_jax.data.volumes import prepare_volume, quantise
from voco_jax.errors import InputError

CHAIN = dataclasses.replace(CHAIN_10K, volume_size=(24, 24, 16))


@pytest.fixture(scope="module", params=["s3", "gcs"])
def bucket(request):
    """An object store; each test takes a prefix of its own."""
    with getattr(object_stores, request.param)() as url:
        yield url


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Three small CT files."""
    folder = tmp_path_factory.mktemp("files")
    for index in range(3):
        hu = np.full((20, 18, 12), -1000, np.int16)
        noise = np.random.default_rng(index).normal(60, 40, hu.shape)
        hu[2:-3, 3:-2, 1:-2] = np.maximum(noise, 0)[2:-3, 3:-2, 1:-2]
        nibabel.save(nibabel.Nifti1Image(hu, np.diag([2, 2, 3, 1])), folder / f"{index}.nii.gz")
    return folder


def run(volumes, cache, **options):
    return prepare(volumes, cache, CHAIN, 0, progress=False, **options)


def counts(summary):
    return summary.done, summary.skipped, summary.failed


def upload(folder, url):
    target = Folder.at(url)
    for path in folder.rglob("*"):
        if path.is_file():
            target.write(path.relative_to(folder).as_posix(), path.read_bytes())


def test_from_and_to_an_object_store(bucket, files, tmp_path, capsys):
    source, path = f"{bucket}/data/ct", f"{bucket}/caches/one"
    upload(files, source)
    local = json.dumps(
        {"training": ["0.nii.gz", "1.nii.gz", "gone.nii"], "validation": ["2.nii.gz"]}
    )
    Folder.at(bucket).write("lists/a.json", local.encode())
    volumes = collect([f"{bucket}/lists/a.json"], [source])
    assert volumes[0].path == f"{source}/0.nii.gz"
    assert [v.id for v in scan(f"{source}/")] == [f"ct/{i}.nii.gz" for i in range(3)]

    first = run(volumes, path)
    assert counts(first) == (3, 0, 1)
    assert (first.training, first.validation) == (2, 1)
    assert first.failures[0].reason.startswith("missing file: ")
    assert f"{path}/failures.jsonl" in str(first)
    assert b"missing file" in Folder.at(path).read("failures.jsonl")
    cache = pickle.loads(pickle.dumps(Cache.open(f"{path}/", CHAIN)))
    for entry in cache.entries:
        expected = prepare_volume(files / os.path.basename(entry.path), CHAIN)
        np.testing.assert_array_equal(cache.read(entry), quantise(expected.voxels, "uint8"))
        assert entry.path.startswith(source)

    assert counts(run(volumes, path)) == (0, 3, 1)
    Folder.at(source).write("1.nii.gz", (files / "0.nii.gz").read_bytes())  # another content
    assert counts(run(volumes, path)) == (1, 2, 1)
    changed = Cache.open(path, CHAIN)
    np.testing.assert_array_equal(
        changed.read(changed.entries[0]), changed.read(changed.entries[1])
    )

    # Damage is found, taken out, and repaired by a run.
    Folder.at(path).write("volumes/" + chunk_file("", changed.entries[2].slot)[-9:], b"x" * 99)
    capsys.readouterr()
    assert main(["--verify", "--cache", path]) == 1
    assert "2 volumes intact, 1 not" in capsys.readouterr().out
    assert counts(run(volumes, path)) == (1, 2, 1)
    assert main(["--verify", "--cache", path]) == 0
    assert "3 volumes intact, 0 not" in capsys.readouterr().out
    assert Folder.at(path).read("prepare.lock") is None

    # What is pruned stays out.
    (tmp_path / "out.txt").write_text("ct/1.nii.gz\n", "utf-8")
    assert main(["--cache", path, "--exclude", str(tmp_path / "out.txt"), "--prune"]) == 0
    assert Folder.at(path).read("excluded.txt").endswith(b"again\nct/1.nii.gz\n")
    later = run(volumes, path)
    assert counts(later) == (0, 2, 1)
    assert later.excluded_before == 1


def test_a_local_cache_may_be_copied_there_and_back(bucket, files, tmp_path):
    volumes = scan(files)
    run(volumes[:2], tmp_path / "here")
    upload(tmp_path / "here", f"{bucket}/caches/copy")
    assert counts(run(volumes, f"{bucket}/caches/copy")) == (1, 2, 0)
    store = Folder.at(f"{bucket}/caches/copy")
    for key in store.all_names():
        target = tmp_path / "back" / key
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(store.read(key))
    cache = Cache.open(tmp_path / "back", CHAIN)
    assert len(cache.entries) == 3
    for entry in cache.entries:
        assert checksum(cache.read(entry)) == entry.checksum
    assert counts(run(volumes, tmp_path / "back")) == (0, 3, 0)
    # What changes here after the copy counts, not the store's older lines.
    entry = cache.entries[0]
    os.utime(entry.path)
    assert counts(run(volumes, tmp_path / "back")) == (1, 2, 0)
    again = Cache.open(tmp_path / "back", CHAIN)
    assert again.entries[0].slot != entry.slot
    assert checksum(again.read(again.entries[0])) == entry.checksum


def test_what_is_not_written_by_the_end_is_done_again(bucket, files, monkeypatch):
    monkeypatch.setattr(manifest, "FLUSH_SECONDS", 0.05)
    path = f"{bucket}/caches/killed"
    run(scan(files), path)
    whole = {entry.id: entry for entry in Cache.open(path, CHAIN).entries}
    one, two, three = whole.values()
    stack = contextlib.ExitStack()
    writer = CacheWriter(path, CHAIN)
    stack.enter_context(writer)
    for slot in writer.reserve(2):
        write_volume(path, slot, np.ones(CHAIN.volume_size, np.uint8))
    writer.add(dataclasses.replace(one, slot=3))  # in the series after 0.05 s, without another call
    deadline = time.monotonic() + 20
    while Cache.open(path, CHAIN).entries[0].slot != 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert Cache.open(path, CHAIN).entries[0].slot == 3
    writer._manifest._ended.set()  # from here on as if killed
    writer._manifest._thread.join()
    writer.add(dataclasses.replace(two, slot=4))
    assert Cache.open(path, CHAIN).entries[1].slot == two.slot

    with pytest.raises(InputError, match=r"another prepare is filling this cache .*host"):
        CacheWriter(path, CHAIN)
    monkeypatch.setattr(manifest, "STALE_SECONDS", 0.0)
    with CacheWriter(path, CHAIN) as after:  # takes the lock of the dead over
        assert {id: entry.slot for id, entry in after.entries.items()} == {
            one.id: 3,
            two.id: two.slot,
            three.id: three.slot,
        }
        unused = {f"c.{slot}.0.0.0" for slot in (one.slot, 4)}
        assert json.loads(after.folder.read("unused.json")).keys() == unused
        named = {f"c.{slot}.0.0.0" for slot in (3, two.slot, three.slot)}
        assert set(after.folder.names("volumes")) == {"zarr.json"} | named | unused
        assert after.reserve(1) == range(5, 6)
    month = time.time() + KEEP_SECONDS + 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "time", lambda: month)
        with CacheWriter(path, CHAIN) as later:
            assert set(later.folder.names("volumes")) == {"zarr.json"} | named
            assert json.loads(later.folder.read("unused.json")) == {}
    # The first one, still alive after all, notices and writes nothing more.
    writer._manifest._ended.clear()
    writer._manifest._now_and_then()
    with pytest.raises(OSError, match="taken this cache over"):
        writer.add(dataclasses.replace(two, slot=4))
    stack.close()
    assert Cache.open(path, CHAIN).entries[1].slot == two.slot


def test_volumes_of_several_objects_are_fetched_whole(bucket):
    store = Folder.at(f"{bucket}/several")
    for name in (
        "a.hdr",
        "a.img",
        "ab.img",
        "series/1.dcm",
        "series/2.dcm",
        "series/deep/3",
        "b.nii",
    ):
        store.write(name, name.encode())

    def fetched(name):
        with local_copy(f"{store.path}/{name}") as path:
            folder = path if path.is_dir() else path.parent
            assert path.exists()
            return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*")), folder

    for name, expected in {
        "a.hdr": ["a.hdr", "a.img"],
        "series": ["1.dcm", "2.dcm"],
        "b.nii": ["b.nii"],
    }.items():
        before = remote_signature(f"{store.path}/{name}")
        found, folder = fetched(name)
        assert found == expected
        assert not folder.exists()
        last = f"{name}/{expected[-1]}" if name == "series" else expected[-1]
        store.write(last, b"another")
        assert remote_signature(f"{store.path}/{name}") != before
    ids = {volume.id for volume in scan(store.path)}
    assert "several/series" in ids
    assert "several/b.nii" in ids


def test_errors_name_the_url(bucket):
    with pytest.raises(InputError, match=rf"{bucket}/none: no prepared cache here .no cache.json"):
        Cache.open(f"{bucket}/none", CHAIN)
    with pytest.raises(InputError, match=rf"{bucket}/none: found no CT volume among 0 objects"):
        scan(f"{bucket}/none")
    with pytest.raises(
        InputError, match=rf"{bucket}/x.json: cannot read this list: there is no such"
    ):
        read_list(f"{bucket}/x.json", bucket)
    Folder.at(bucket).write("l.json", b'{"training": ["../x.nii"]}')
    with pytest.raises(InputError, match="leads out of the root folder"):
        read_list(f"{bucket}/l.json", f"{bucket}/data")
    Folder.at(bucket).write("thesis/text.tex", b"")
    with pytest.raises(InputError, match=r"found other files \(text\.tex\)"):
        CacheWriter(f"{bucket}/thesis", CHAIN)
