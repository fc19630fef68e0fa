"""A run's volumes: several sources, what is held out, and what a resumed run insists on."""

import dataclasses

import pytest

from configs import tiny
from voco_jax.config.load import override, parse
from voco_jax.config.pretraining import Pretraining
from voco_jax.data.collect import collect
from voco_jax.data.phantom import make_phantoms
from voco_jax.data.prepare import prepare
from voco_jax.data.sources import (
    describe_volumes,
    fill_caches,
    open_caches,
    read_volumes,
    write_volumes,
)
from voco_jax.data.tend import Exclusion, tend_cache
from voco_jax.errors import InputError


def _two(folder) -> dict:
    """The tiny config with two sources of the same files, one of them with a wider window."""
    config = tiny.get_config()
    config.data.phantoms = 0
    config.data.held_out = 0.4
    values = config.to_dict()
    one = values["data"]["sources"].pop("ct") | {"roots": (str(folder / "ct"),), "weight": 8.0}
    wide = one["chain"] | {"window": (-1000.0, 500.0)}
    values["data"]["sources"] = {
        "narrow": one | {"cache": str(folder / "narrow")},
        "wide": one | {"cache": str(folder / "wide"), "chain": wide, "weight": 2.0},
    }
    return values


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Pretraining:
    folder = tmp_path_factory.mktemp("sources")
    make_phantoms(folder / "ct", 5, seed=0, shape=(40, 40, 24))
    found = parse(_two(folder))
    for source in found.data.sources.values():
        prepare(collect(source.lists, source.roots), source.cache, source.chain, 0, progress=False)
    return found


def test_each_source_has_its_chain_and_weight(config, tmp_path):
    caches = open_caches(config.data)
    write_volumes(caches, config.data, config.seed, tmp_path)
    training, held_out = read_volumes(caches, config.data, tmp_path)
    assert [(part.source, len(part.entries), part.weight) for part in training] == [
        ("narrow", 3, 8.0),
        ("wide", 3, 2.0),
    ]
    # One file is held out of both or of neither.
    assert [e.id for e in held_out[0].entries] == [e.id for e in held_out[1].entries]
    assert training[0].cache.chain.window != training[1].cache.chain.window
    assert describe_volumes(training, held_out) == [
        "data: 6 volumes to train on, 4 held out",
        "  narrow: 3 volumes, 80.0% of the draws",
        "  wide: 3 volumes, 20.0% of the draws",
    ]


def test_a_held_out_volume_is_not_trained_on_in_another_source(config, tmp_path):
    caches = open_caches(config.data)
    write_volumes(caches, config.data, config.seed, tmp_path)
    held_out = read_volumes(caches, config.data, tmp_path)[1][0].entries
    # One file by another root has another id.
    renamed = tuple(dataclasses.replace(e, id=f"other/{e.id}") for e in held_out)
    only = dataclasses.replace(caches["wide"], entries=renamed)  # one of these is trained on
    with pytest.raises(InputError, match=r"1 volumes are held out of narrow and trained on in"):
        write_volumes({**caches, "wide": only}, config.data, config.seed, tmp_path)


def test_a_changed_volume_of_any_source_is_named(config, tmp_path):
    caches = open_caches(config.data)
    write_volumes(caches, config.data, config.seed, tmp_path)
    entry, *others = caches["wide"].entries
    changed = (dataclasses.replace(entry, checksum="0"), *others)
    caches["wide"] = dataclasses.replace(caches["wide"], entries=changed)
    with pytest.raises(InputError, match=r"wide: 1 volumes that this run began with"):
        read_volumes(caches, config.data, tmp_path)


def test_a_run_that_prepares_leaves_out_what_was_pruned(tmp_path):
    make_phantoms(tmp_path / "ct", 2, seed=0, shape=(40, 40, 24))
    values = _two(tmp_path)
    values["data"] |= {"prepare": True, "sources": {"ct": values["data"]["sources"]["narrow"]}}
    data = parse(values).data
    fill_caches(data, 0, tmp_path)
    (cache,) = open_caches(data).values()
    out, left = (entry.id for entry in cache.entries)
    (tmp_path / "out.txt").write_text(f"{out}\n", "utf-8")
    tend_cache(cache.path, Exclusion(tmp_path / "out.txt"), 1, dry_run=False)
    said = fill_caches(data, 0, tmp_path)
    assert f"1 of them by {cache.path}/excluded.txt" in said
    (cache,) = open_caches(data).values()
    assert [entry.id for entry in cache.entries] == [left]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.clear(), r"data.sources: found none"),
        (lambda s: s["wide"].update(weight=0.0), r"data.sources.wide.weight: found 0.0"),
        (lambda s: s["wide"].update(cache=s["narrow"]["cache"]), r"two have one cache"),
        (lambda s: s["wide"]["chain"].update(dtype="float16"), r"float16, uint8, expected one"),
        (lambda s: s["wide"]["chain"].update(spacing=(1.0,)), r"chain.spacing: found \(1.0,\)"),
        (
            lambda s: s["wide"]["chain"].update(window_unit="percentile"),
            r"chain.window: found \(-1000.0, 500.0\) with window_unit percentile",
        ),
        (
            lambda s: s["wide"]["chain"].update(volume_size=(64, 64, 64)),
            r"expected exactly data.sources.wide.chain.volume_size \(64, 64, 64\)",
        ),
        (lambda s: s["wide"].update(wieght=1.0), r"sources.wide.wieght: no such field, did you"),
    ],
)
def test_one_clear_error_names_the_source(tmp_path, change, message):
    values = _two(tmp_path)
    change(values["data"]["sources"])
    with pytest.raises(InputError, match=message):
        parse(values)


def test_settings_of_a_source_are_set_by_name(tmp_path):
    values = _two(tmp_path)
    changed = override(values, {"data.sources.wide.chain.window": "(-900, 400)"})
    assert parse(changed).data.sources["wide"].chain.window == (-900.0, 400.0)
    assert parse(values).data.sources["wide"].chain.window == (-1000.0, 500.0)
    with pytest.raises(InputError, match=r"data.sources.wide.chain.windo: no such field, did you"):
        override(values, {"data.sources.wide.chain.windo": "1"})
    with pytest.raises(InputError, match=r"data.sources.chest.weight: no such field"):
        override(values, {"data.sources.chest.weight": "1"})
