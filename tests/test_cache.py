import dataclasses
import errno
import itertools
import json
import math
import os
import pickle
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import tensorstore
import zarr
from chains import CHAIN_10K
from hypothesis import given, settings
from hypothesis import strategies as st

from voco_jax.data import array
from voco_jax.data.array import CHUNK, LARGEST, write_volume
from voco_jax.data.cache import KEEP_SECONDS, Cache, CacheWriter, checksum, chunk_file
from voco_jax.data.crops import draw_corner
from voco_jax.data.manifest import Entry
from voco_jax.data.verify import verify
from voco_jax.errors import InputError, TransientError

CHAIN = dataclasses.replace(CHAIN_10K, volume_size=(8, 6, 4))


def voxels(id, dtype="uint8"):
    volume = np.random.default_rng(list(id.encode())).random(CHAIN.volume_size)
    return (volume * (255 if dtype == "uint8" else 1)).astype(dtype)


def add(writer, slot, id, section="training"):
    volume = voxels(id, writer.chain.dtype)
    write_volume(writer.path, slot, volume)
    return add_entry(writer, slot, id, volume, section)


def add_entry(writer, slot, id, volume, section="training"):
    entry = Entry(
        id=id,
        slot=slot,
        section=section,
        path=f"/ct/{id}",
        stamp="10 bytes, 20 ns",
        axes="LPS",
        shape=(5, 6, 7),
        spacing=(1.5, 1.5, 3.0),
        window=writer.chain.window,
        box=((0, 1, 2), (4, 5, 6)),
        foreground=0.5,
        stored=volume.shape,
        mean=0.25,
        checksum=checksum(volume),
    )
    writer.add(entry)
    return entry


def fill(path, ids="dbca", chain=CHAIN):
    with CacheWriter(path, chain) as writer:
        for slot, id in zip(writer.reserve(len(ids)), ids, strict=True):
            add(writer, slot, id)


@pytest.mark.parametrize("dtype", ["uint8", "float16"])
def test_round_trip_and_other_zarr_tools(tmp_path, dtype):
    chain = dataclasses.replace(CHAIN, dtype=dtype)
    path = tmp_path / "with space #1"
    fill(path, chain=chain)
    cache = Cache.open(path, chain)
    assert [entry.id for entry in cache.entries] == ["a", "b", "c", "d"]
    assert [entry.slot for entry in cache.entries] == [3, 1, 2, 0]
    array = zarr.open_array(path / "volumes", mode="r")
    assert array.metadata.dimension_names == ("volume", "x", "y", "z")
    assert array.shape == (4, *chain.volume_size)
    assert array.chunks == (1, *chain.volume_size)
    for entry in cache.entries:
        volume = cache.read(entry)
        assert volume.dtype == dtype
        np.testing.assert_array_equal(volume, voxels(entry.id, dtype))
        np.testing.assert_array_equal(array[entry.slot], volume)
        assert checksum(volume) == entry.checksum
    # One file a volume.
    assert sorted(os.listdir(path / "volumes")) == [
        *(f"c.{i}.0.0.0" for i in range(4)),
        "zarr.json",
    ]


def test_manifest_lines_are_complete(tmp_path):
    fill(tmp_path / "c", "a")
    line = json.loads((tmp_path / "c/manifest.jsonl").read_text())
    assert line.keys() == {field.name for field in dataclasses.fields(Entry)}
    assert line["box"] == [[0, 1, 2], [4, 5, 6]]


def test_cache_is_picklable_and_readable_by_threads(tmp_path):
    fill(tmp_path / "c")
    cache = Cache.open(tmp_path / "c", CHAIN)
    cache.read(cache.entries[0])
    other = pickle.loads(pickle.dumps(cache))
    assert other == cache
    bad = []

    def read():
        for entry in other.entries * 5:
            if checksum(other.read(entry)) != entry.checksum:
                bad.append(entry)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not bad


def test_relative_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fill("c")
    cache = Cache.open("c", CHAIN)
    monkeypatch.chdir("/")
    assert checksum(cache.read(cache.entries[0])) == cache.entries[0].checksum


def test_not_a_cache(tmp_path):
    with pytest.raises(InputError, match=r"no such folder.*fill it with: python -m"):
        Cache.open(tmp_path / "none", CHAIN)
    with pytest.raises(InputError, match=r"no prepared cache here.*fill it with: python -m"):
        Cache.open(tmp_path, CHAIN)
    with CacheWriter(tmp_path / "c", CHAIN):
        pass
    with pytest.raises(InputError, match="this cache is empty; fill it with: python -m"):
        Cache.open(tmp_path / "c", CHAIN)
    (tmp_path / "c/cache.json").write_text("{")
    with pytest.raises(InputError, match=r"cache\.json: damaged"):
        Cache.open(tmp_path / "c", CHAIN)
    (tmp_path / "c/cache.json").write_text('{"format": 99, "chain": {}}')
    with pytest.raises(InputError, match="found cache format 99, expected 2"):
        Cache.open(tmp_path / "c", CHAIN)


def test_other_files_are_not_overwritten(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(InputError, match=r"found other files \(thesis\.tex\), expected"):
        CacheWriter(tmp_path, CHAIN)
    with pytest.raises(InputError, match="cannot write this cache"):
        CacheWriter(tmp_path / "thesis.tex", CHAIN)


def test_other_settings_are_named(tmp_path):
    fill(tmp_path / "c")
    other = dataclasses.replace(CHAIN, window=(-1000.0, 500.0), dtype="float16")
    for start in (Cache.open, CacheWriter):
        with pytest.raises(InputError) as caught:
            start(tmp_path / "c", other)
        message = str(caught.value)
        assert "chain.window: [-175.0, 250.0] -> [-1000.0, 500.0]" in message
        assert "chain.dtype: 'uint8' -> 'float16'" in message
        assert "volume_size" not in message
        assert "use the cache's settings or name another cache folder" in message


def test_one_writer_at_a_time(tmp_path):
    busy = pytest.raises(InputError, match="another prepare is filling this cache")
    with CacheWriter(tmp_path / "c", CHAIN), busy:
        CacheWriter(tmp_path / "c", CHAIN)
    fill(tmp_path / "c")  # free again


def test_damage_is_noticed(tmp_path):
    fill(tmp_path / "c")
    cache = Cache.open(tmp_path / "c", CHAIN)
    first, second = cache.entries[:2]
    file = Path(chunk_file(cache.path, first.slot))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    os.remove(chunk_file(cache.path, second.slot))
    for entry, status in ((first, 2), (second, 1)):  # what is gone may come back: a mount
        with pytest.raises(
            InputError, match=rf"cannot read {entry.id} .*--verify --cache .*prepare again"
        ) as raised:
            cache.read(entry)
        assert raised.value.status == status


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_a_disk_that_fails_now_is_worth_another_try(tmp_path, monkeypatch, number):
    fill(tmp_path)
    cache = Cache.open(tmp_path, CHAIN)

    def fails(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(array, "read_file", fails)
    with pytest.raises(TransientError, match=os.strerror(number)):
        cache.read(cache.entries[0])


def test_memory_is_used_again_where_it_fits(tmp_path):
    fill(tmp_path)
    cache = Cache.open(tmp_path, CHAIN)
    first, second = cache.entries[:2]
    kept = cache.read(first).copy()
    again = cache.read(second, out=kept)
    assert np.shares_memory(again, kept)
    np.testing.assert_array_equal(again, voxels(second.id, CHAIN.dtype))
    turned = np.zeros(CHAIN.volume_size[::-1], kept.dtype).T
    fixed = np.zeros_like(kept)
    fixed.flags.writeable = False
    for other in (turned, fixed, np.zeros((2, 2, 2), kept.dtype), np.zeros_like(kept, np.float16)):
        found = cache.read(second, out=other)
        np.testing.assert_array_equal(found, voxels(second.id, CHAIN.dtype))
        assert not np.shares_memory(found, other)


def test_a_file_is_read_whole_whatever_was_read_before(tmp_path):
    """Of several pieces, and into memory that is too small, large enough, or new."""
    path = tmp_path / "file"
    for size in (10, 128 * 2**10, 300_001, 0, 131_073):
        path.write_bytes(np.random.default_rng(size).bytes(size))
        assert array.read_file(path).tobytes() == path.read_bytes()


def test_a_disk_that_fails_now_is_no_damage(tmp_path, monkeypatch):
    """Nothing is taken out of a cache for it."""
    fill(tmp_path)
    before = (tmp_path / "manifest.jsonl").read_bytes()

    def fails(path):
        raise OSError(5, "I/O error")

    monkeypatch.setattr(array, "read_file", fails)
    with pytest.raises(InputError, match=r"cannot be read now .*I/O error.*nothing is taken out"):
        verify(tmp_path)
    assert (tmp_path / "manifest.jsonl").read_bytes() == before


def test_a_lost_chunk_is_forgotten_and_its_slot_not_used_again(tmp_path):
    fill(tmp_path / "c", "ab")
    shutil.rmtree(tmp_path / "c/volumes")
    with CacheWriter(tmp_path / "c", CHAIN) as writer:
        assert not writer.entries
        assert writer.reserve(1) == range(2, 3)
        add(writer, 2, "c")
    assert [entry.id for entry in Cache.open(tmp_path / "c", CHAIN).entries] == ["c"]


def test_a_changed_volume_moves_to_a_new_slot(tmp_path):
    fill(tmp_path / "c", "ab")
    with CacheWriter(tmp_path / "c", CHAIN) as writer:
        (slot,) = writer.reserve(1)
        new = add(writer, slot, "a", "validation")
    cache = Cache.open(tmp_path / "c", CHAIN)
    assert cache.entries[0] == new


@pytest.mark.parametrize("how", ["changed", "forgotten", "verified"])
def test_what_a_run_reads_is_kept_while_prepare_runs(tmp_path, how, monkeypatch):
    """And is deleted by the first prepare after a month."""
    path = tmp_path / "c"
    fill(path, "ab")
    training = Cache.open(path, CHAIN)  # began before
    old = training.entries[0]
    with CacheWriter(path, CHAIN) as writer:
        if how == "changed":
            (slot,) = writer.reserve(1)
            add(writer, slot, "a", "validation")
        else:
            writer.forget([old])
    for _ in range(2):
        verify(path, progress=False) if how == "verified" else CacheWriter(path, CHAIN).__exit__()
        np.testing.assert_array_equal(training.read(old), voxels("a", CHAIN.dtype))
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + KEEP_SECONDS - 100)
    CacheWriter(path, CHAIN).__exit__()
    assert os.path.exists(chunk_file(str(path), old.slot))
    monkeypatch.setattr(time, "time", lambda: now + KEEP_SECONDS + 100)
    CacheWriter(path, CHAIN).__exit__()
    with pytest.raises(TransientError, match=r"c\.0\.0\.0\.0: cannot read a"):
        training.read(old)
    fresh = Cache.open(path, CHAIN)
    assert [entry.id for entry in fresh.entries] == (["a", "b"] if how == "changed" else ["b"])
    for entry in fresh.entries:
        fresh.read(entry)


@pytest.mark.parametrize("content", ["", "[1]", '{"c.0.0.0.0": "x"}', '{"c.0.0.0.0": 9e99}'])
def test_a_strange_list_of_unused_files_deletes_nothing(tmp_path, content):
    fill(tmp_path, "a")
    with CacheWriter(tmp_path, CHAIN) as writer:
        writer.forget(list(writer.entries.values()))
    (tmp_path / "unused.json").write_text(content)
    CacheWriter(tmp_path, CHAIN).__exit__()
    assert os.path.exists(chunk_file(str(tmp_path), 0))


def test_chunks_without_a_line_are_not_there(tmp_path):
    fill(tmp_path / "c", "ab")
    with CacheWriter(tmp_path / "c", CHAIN) as writer:
        (slot,) = writer.reserve(1)
        write_volume(writer.path, slot, voxels("x"))  # then killed
    assert len(Cache.open(tmp_path / "c", CHAIN).entries) == 2
    with CacheWriter(tmp_path / "c", CHAIN) as writer:
        assert writer.reserve(1) == range(slot + 1, slot + 2)


def test_unfinished_files_of_a_kill_are_cleared_away(tmp_path):
    (tmp_path / "c").mkdir()
    (tmp_path / "c/cache.json.__lock").touch()
    fill(tmp_path / "c", "ab")
    (tmp_path / "c/volumes/c.7.0.0.0.__lock").touch()
    with CacheWriter(tmp_path / "c", CHAIN) as writer:
        assert sorted(writer.entries) == ["a", "b"]
    names = sorted(os.listdir(tmp_path / "c/volumes"))
    assert names == ["c.0.0.0.0", "c.1.0.0.0", "zarr.json"]


@pytest.mark.parametrize("name", [".DS_Store", "²00001.jsonl", "notes.jsonl", "000001.jsonl.part"])
def test_what_lies_beside_a_series_is_no_manifest(tmp_path, name):
    fill(tmp_path, "ab")
    (tmp_path / "manifest").mkdir()
    (tmp_path / "manifest" / name).write_text("of somebody else\n")
    assert len(Cache.open(tmp_path, CHAIN).entries) == 2
    fill(tmp_path, "c")
    assert len(Cache.open(tmp_path, CHAIN).entries) == 3
    assert (tmp_path / "manifest" / name).exists()


def test_a_damaged_line_is_an_error(tmp_path):
    fill(tmp_path / "c", "ab")
    manifest = tmp_path / "c/manifest.jsonl"
    lines = manifest.read_text().splitlines()
    manifest.write_text(f"{lines[0][:50]}\n{lines[1]}\n")
    for start in (Cache.open, CacheWriter):
        with pytest.raises(InputError, match=r"manifest\.jsonl: line 1 is damaged"):
            start(tmp_path / "c", CHAIN)


@settings(max_examples=40, deadline=None)
@given(fraction=st.floats(0, 1))
def test_a_manifest_cut_anywhere_is_repaired(tmp_path_factory, fraction):
    path = tmp_path_factory.mktemp("cut") / "c"
    fill(path, "abc")
    manifest = path / "manifest.jsonl"
    content = manifest.read_bytes()
    cut = round(fraction * len(content))
    manifest.write_bytes(content[:cut])
    whole = content[:cut].count(b"\n")
    expected = [*"abc"[:whole], "z"]
    with CacheWriter(path, CHAIN) as writer:
        assert list(writer.entries) == expected[:-1]
        add(writer, writer.reserve(1)[0], "z")
    cache = Cache.open(path, CHAIN)
    assert [entry.id for entry in cache.entries] == expected
    for entry in cache.entries:
        assert checksum(cache.read(entry)) == entry.checksum


def test_a_disk_error_is_an_os_error(tmp_path):
    fill(tmp_path / "c")
    shutil.rmtree(tmp_path / "c/volumes")
    (tmp_path / "c/volumes").touch()
    with pytest.raises((OSError, InputError)):
        write_volume(str(tmp_path / "c"), 0, voxels("x"))


# ---- volumes of their own size, for random crops

LARGE = dataclasses.replace(CHAIN, fit="random_crop", volume_size=(40, 32, 24))


def fill_large(path, dtype="uint8"):
    """Two volumes of about 3 x 2 x 2 chunks."""
    chain = dataclasses.replace(LARGE, dtype=dtype)
    volumes = {}
    with CacheWriter(path, chain) as writer:
        for slot, shape in zip(writer.reserve(2), [(150, 70, 130), (40, 90, 65)], strict=True):
            volume = np.random.default_rng(slot).random(shape)
            volumes["ab"[slot]] = (volume * (255 if dtype == "uint8" else 1)).astype(dtype)
            write_volume(writer.path, slot, volumes["ab"[slot]])
            entry = add_entry(writer, slot, "ab"[slot], volumes["ab"[slot]])
            assert entry.stored == shape
    return Cache.open(path, chain), volumes


@pytest.mark.parametrize("dtype", ["uint8", "float16"])
def test_a_part_is_a_slice_of_the_whole(tmp_path, dtype):
    cache, volumes = fill_large(tmp_path / "c", dtype)
    names = sorted(os.listdir(tmp_path / "c/volumes"))
    assert names == ["c.0.0.0.0", "c.1.0.0.0", "zarr.json"]  # one file a volume
    generator = np.random.default_rng(0)
    for entry in cache.entries:
        whole = volumes[entry.id]
        np.testing.assert_array_equal(cache.read_whole(entry), whole)
        assert checksum(cache.read_whole(entry)) == entry.checksum
        for _ in range(5):
            corner = draw_corner(generator, entry.stored, LARGE.volume_size)
            part = cache.read(entry, corner)
            assert part.shape == LARGE.volume_size
            index = tuple(slice(c, c + s) for c, s in zip(corner, LARGE.volume_size, strict=True))
            np.testing.assert_array_equal(part, whole[index])
        other = zarr.open_array(tmp_path / "c/volumes", mode="r")
        place = (entry.slot, *map(slice, whole.shape))
        np.testing.assert_array_equal(other[place], whole)


def test_a_part_reads_only_the_chunks_that_it_needs(tmp_path):
    cache, volumes = fill_large(tmp_path / "c")
    entry = cache.entries[0]
    size = os.path.getsize(chunk_file(cache.path, entry.slot))

    def bytes_read():
        found = tensorstore.experimental_collect_matching_metrics(
            "/tensorstore/kvstore/file/bytes_read"
        )
        return sum(value["value"] for metric in found for value in metric["values"])

    cache.read(entry, (20, 10, 30))
    before = bytes_read()
    cache.read(entry, (20, 10, 30))  # in the first of 3 x 2 x 3 chunks, random: incompressible
    index = 16 * math.prod(size // CHUNK for size in LARGEST) + 4
    assert index + 64**3 <= bytes_read() - before < index + 64**3 + 2000
    assert size > index + volumes["a"].size

    # What is damaged elsewhere does not hurt, and is found as soon as it is asked for.
    file = Path(chunk_file(cache.path, entry.slot))
    content = bytearray(file.read_bytes())
    spoilt = index + 64**3 + 5000
    content[spoilt] ^= 1
    file.write_bytes(content)
    broken = 0
    for corner in itertools.product((0, 64, 110), (0, 38), (0, 64, 106)):
        part = tuple(slice(c, c + s) for c, s in zip(corner, LARGE.volume_size, strict=True))
        try:
            np.testing.assert_array_equal(cache.read(entry, corner), volumes["a"][part])
        except InputError:
            broken += 1
    assert 0 < broken < 9
    with pytest.raises(InputError, match=r"cannot read a .*Digest mismatch"):
        cache.read_whole(entry)
