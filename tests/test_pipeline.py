"""The pipeline: what a batch holds depends on (seed, step) and the data alone."""

import dataclasses
import errno
import functools
import multiprocessing.synchronize
import os
import signal
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import tiny
from voco_jax.config.load import parse
from voco_jax.data import pipeline
from voco_jax.data.cache import Cache
from voco_jax.data.collect import collect
from voco_jax.data.crops import draw_corner, overlap_labels
from voco_jax.data.phantom import make_phantoms
from voco_jax.data.pipeline import (
    Part,
    batches,
    fingerprint,
    held_out_sample,
    split,
    stream_batches,
)
from voco_jax.data.prepare import prepare
from voco_jax.errors import InputError, TransientError


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    chain = parse(tiny.get_config()).data.sources["ct"].chain
    listed = make_phantoms(folder / "ct", 5, seed=0, shape=(40, 40, 24))
    prepare(collect([str(listed)], [str(folder / "ct")]), folder / "cache", chain, workers=0)
    return Cache.open(folder / "cache", chain)


CROPS = parse(tiny.get_config()).crops


def _take(cache, count, *, entries=None, batch_size=2, **options):
    part = Part("ct", cache, entries or cache.entries, 1.0)
    stream = batches([part], CROPS, seed=3, batch_size=batch_size, **options)
    return list(islice(stream, count))


def _equal(a, b):
    return all(np.array_equal(a[name], b[name]) for name in ("subs", "bases", "labels"))


def _assert_equal(found, expected):
    assert len(found) == len(expected) > 0
    assert all(map(_equal, found, expected))


def test_a_batch(cache):
    (batch,) = _take(cache, 1)
    assert batch["subs"].shape == (2, 1, 32, 32, 64)
    assert batch["bases"].shape == (2, 2, 32, 32, 64)
    assert batch["subs"].dtype == batch["bases"].dtype == np.uint8
    assert batch["labels"].dtype == np.float32
    np.testing.assert_allclose(batch["labels"].sum(axis=2), 1, atol=1e-6)


def test_bases_rebuild_the_volume_and_subs_are_where_the_labels_say(cache):
    for entry in cache.entries[:2]:
        found = held_out_sample(cache, entry, CROPS, sub_volumes=3, seed=0)
        volume = cache.read(entry)
        np.testing.assert_array_equal(np.concatenate(found["bases"]), volume)
        labels = overlap_labels(found["origins"], CROPS.grid, CROPS.crop_size)
        np.testing.assert_allclose(found["labels"], labels, atol=1e-7)
        for sub, (x, y, z) in zip(found["subs"], found["origins"], strict=True):
            np.testing.assert_array_equal(sub, volume[x : x + 32, y : y + 32, z : z + 64])


def test_worker_count_changes_nothing(cache):
    expected = _take(cache, 6)
    for workers in (1, 2):
        found = _take(cache, 6, workers=workers)
        _assert_equal(found, expected)


def _end(number, *_, **options):
    os.kill(os.getpid(), number)


def test_a_worker_that_finds_no_room_is_told(cache):
    """SIGBUS is what a full /dev/shm makes of a write."""
    part, end = Part("ct", cache, cache.entries, 1.0), functools.partial(_end, signal.SIGBUS)
    with pytest.raises(InputError, match=r"^/dev/shm: .* -7.*--shm-size.*data\.workers"):
        next(stream_batches([part], end, list, seed=0, batch_size=2, workers=1))


@pytest.mark.parametrize(
    ("text", "kind", "words"),
    [
        ("Worker process was terminated unexpectedly with exit code -9.", TransientError, "memory"),
        ("Worker process was terminated unexpectedly with exit code -11.", TransientError, "11"),
        ("Worker process was terminated unexpectedly with exit code 1.", RuntimeError, "code 1"),
        ("anything else", RuntimeError, "anything else"),
    ],
)
def test_how_a_worker_ended(text, kind, words):
    def stream():
        yield "a batch"
        raise RuntimeError(text)

    told = pipeline._in_words(stream())
    assert next(told) == "a batch"
    with pytest.raises(kind, match=words):
        next(told)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_no_room_for_semaphores_is_told(cache, monkeypatch, number):
    def fails(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(multiprocessing.synchronize.SemLock, "__init__", fails)
    told, words = (
        (InputError, "^/dev/shm: no room .*No space left")
        if number == errno.ENOSPC
        else (PermissionError, "denied")
    )
    with pytest.raises(told, match=words):
        _take(cache, 1, workers=1)


def test_any_start_step_continues_the_same_stream(cache):
    expected = _take(cache, 8)
    for start in (1, 2, 5):
        _assert_equal(_take(cache, 8 - start, start_step=start), expected[start:])


@pytest.mark.parametrize("workers", [0, 2])
def test_each_process_reads_its_rows_of_the_same_batches(cache, workers):
    whole = _take(cache, 4, batch_size=4, start_step=2)
    for rows in ((0, 1), (2, 3), (1, 2)):
        part = _take(cache, 4, batch_size=4, start_step=2, rows=rows, workers=workers)
        expected = [{name: batch[name][list(rows)] for name in batch} for batch in whole]
        _assert_equal(part, expected)


def test_batch_size_does_not_change_the_order(cache):
    """One host's batch of 4 is two hosts' (or two steps') batches of 2."""
    small, large = _take(cache, 4), _take(cache, 2, batch_size=4)
    for name in ("subs", "bases", "labels"):
        np.testing.assert_array_equal(
            np.concatenate([batch[name] for batch in small]),
            np.concatenate([batch[name] for batch in large]),
        )


def test_every_epoch_has_every_volume_once_in_its_own_order(cache):
    first = [cache.read(entry)[:32].tobytes() for entry in cache.entries]
    drawn = [first.index(b["bases"][0, 0].tobytes()) for b in _take(cache, 15, batch_size=1)]
    epochs = [tuple(drawn[i : i + 5]) for i in (0, 5, 10)]
    assert all(sorted(epoch) == [0, 1, 2, 3, 4] for epoch in epochs)
    assert len(set(epochs)) > 1


def test_the_seed_changes_crops(cache):
    part = Part("ct", cache, cache.entries, 1.0)
    one, two = (next(batches([part], CROPS, seed=seed, batch_size=2)) for seed in (1, 2))
    assert not _equal(one, two)


def test_split(cache):
    training, held_out = split(cache.entries, 0.4, seed=0)
    assert (len(training), len(held_out)) == (3, 2)
    assert {e.id for e in training} | {e.id for e in held_out} == {e.id for e in cache.entries}
    assert split(cache.entries[::-1], 0.4, seed=0)[1] == held_out[::-1]
    assert split(cache.entries, 0.0, seed=0) == (cache.entries, ())
    assert len(split(cache.entries, 0.01, seed=0)[1]) == 1
    assert any(split(cache.entries, 0.4, seed=s)[1] != held_out for s in range(1, 5))
    with pytest.raises(InputError, match=r"data.held_out: found 1.0 of 5 .* leaves none"):
        split(cache.entries, 1.0, seed=0)


def test_series_of_a_study_are_held_out_together(cache):
    """Two reconstructions of a scan are nearly the same volume."""
    (chosen,) = split(cache.entries, 0.01, seed=0)[1]
    series = [dataclasses.replace(chosen, id=id, study="1a2b") for id in (chosen.id, "B70f")]
    others = [entry for entry in cache.entries if entry.id != chosen.id]
    training, held_out = split([*others, *series], 0.01, seed=0)
    assert set(held_out) == set(series)
    assert training == tuple(others)


def test_validation_section_is_never_trained_on(cache):
    entries = (dataclasses.replace(cache.entries[0], section="validation"), *cache.entries[1:])
    training, held_out = split(entries, 0.0, seed=0)
    assert held_out == entries[:1]
    assert training == entries[1:]


def test_fingerprint_ignores_order_and_place(cache):
    def of(entries, source="ct", path=cache.path):
        return fingerprint([Part(source, dataclasses.replace(cache, path=path), entries, 1.0)])

    entries = cache.entries
    assert of(entries) == of(entries[::-1]) == of(entries, path=Path("elsewhere"))
    changed = dataclasses.replace(entries[0], checksum="0")
    others = [of(entries[1:]), of((changed, *entries[1:])), of(entries, "mri")]
    assert len({of(entries), *others}) == 4


def _mix(cache, weights):
    """Parts of the cache's volumes, 2 and 3 of them, and which part each drawn base crop is of."""
    parts = [
        Part("a", cache, cache.entries[:2], weights[0]),
        Part("b", cache, cache.entries[2:], weights[1]),
    ]
    first = [cache.read(entry)[:32].tobytes() for entry in cache.entries]
    return parts, lambda batch: [first.index(bases[0].tobytes()) for bases in batch["bases"]]


@pytest.mark.parametrize("weights", [(1.0, 1.0), (3.0, 1.0), (1.0, 8.0)])
def test_sources_are_drawn_by_weight(cache, weights):
    parts, named = _mix(cache, weights)
    drawn = [named(b)[0] for b in islice(batches(parts, CROPS, seed=3, batch_size=1), 36)]
    share = weights[0] / sum(weights)
    for count in range(1, 37):  # at every moment, not only in the long run
        assert abs(sum(index < 2 for index in drawn[:count]) - share * count) <= 1
    ours = [index for index in drawn if index < 2]
    for epoch in zip(ours[::2], ours[1::2], strict=False):
        assert sorted(epoch) == [0, 1]  # each source goes through all of its volumes


def test_a_mix_resumes_and_splits_over_processes(cache):
    parts, _ = _mix(cache, (2.0, 1.0))
    options = {"seed": 3, "batch_size": 2}
    whole = list(islice(batches(parts, CROPS, **options), 6))
    later = list(islice(batches(parts, CROPS, start_step=4, workers=1, **options), 2))
    _assert_equal(later, whole[4:])
    for row in (0, 1):
        part = list(islice(batches(parts, CROPS, rows=(row,), **options), 6))
        expected = [{name: batch[name][[row]] for name in batch} for batch in whole]
        _assert_equal(part, expected)


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(
    size=st.tuples(*[st.integers(1, 6)] * 3),
    more=st.tuples(*[st.integers(0, 3)] * 3),
    seed=st.integers(0, 9),
)
def test_a_random_part_lies_in_the_volume(size, more, seed):
    stored = tuple(a + b for a, b in zip(size, more, strict=True))
    generator = np.random.default_rng(seed)
    drawn = np.array([draw_corner(generator, stored, size) for _ in range(60)])
    assert (drawn >= 0).all()
    assert (drawn + size <= stored).all()
    if max(more) <= 1:  # every place is drawn
        assert len(np.unique(drawn, axis=0)) == np.prod(np.add(more, 1))


def test_random_parts_of_volumes_of_their_own_size(cache, tmp_path):
    """The abdomen preset's way: resampled, cached whole, and another part at every reading."""
    chain = dataclasses.replace(
        cache.chain, spacing=(4.0, 4.0, 5.0), crop_foreground=False, fit="random_crop"
    )
    phantoms = Path(cache.path).parent / "ct"
    prepare(collect([], [str(phantoms)]), tmp_path / "whole", chain, 0, progress=False)
    whole = Cache.open(tmp_path / "whole", chain)
    entry = whole.entries[0]
    assert all(a > b for a, b in zip(entry.stored[:2], chain.volume_size[:2], strict=True))
    volume = whole.read_whole(entry)
    assert volume.shape == entry.stored
    corners = set()
    for seed in range(4):
        found = held_out_sample(whole, entry, CROPS, sub_volumes=2, seed=seed)
        x, y, z = found["corner"]
        corners.add(found["corner"])
        part = volume[x : x + 64, y : y + 32, z : z + 64]
        np.testing.assert_array_equal(np.concatenate(found["bases"]), part)
        np.testing.assert_array_equal(
            held_out_sample(whole, entry, CROPS, sub_volumes=2, seed=seed)["subs"], found["subs"]
        )
        for sub, (a, b, c) in zip(found["subs"], found["origins"], strict=True):
            np.testing.assert_array_equal(sub, part[a : a + 32, b : b + 32, c : c + 64])
    assert len(corners) > 1
    stream = batches([Part("ct", whole, whole.entries, 1.0)], CROPS, seed=0, batch_size=2)
    assert next(stream)["bases"].shape == (2, 2, 32, 32, 64)
