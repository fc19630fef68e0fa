"""Broken and hostile files in this process; `benchmarks/fuzz.py` does it at length, with Dask."""

import os

import numpy as np
import pytest
import SimpleITK
from hypothesis import given, settings
from hypothesis import strategies as st
from scans import body

from benchmarks import fuzz
from voco_jax.data.formats.readers import VolumeError, load
from voco_jax.data.volumes import prepare_volume

HEADERS = {
    "a.mhd": [
        ("ObjectType", "Image"),
        ("NDims", "3"),
        ("BinaryData", "True"),
        ("BinaryDataByteOrderMSB", "False"),
        ("CompressedData", "False"),
        ("TransformMatrix", "1 0 0 0 1 0 0 0 1"),
        ("Offset", "0 0 0"),
        ("ElementSpacing", "2 2.5 3"),
        ("DimSize", "20 18 12"),
        ("ElementType", "MET_SHORT"),
        ("ElementDataFile", "a.raw"),
    ],
    "a.nhdr": [
        ("type", "short"),
        ("dimension", "3"),
        ("space", "left-posterior-superior"),
        ("sizes", "20 18 12"),
        ("space directions", "(2,0,0) (0,2.5,0) (0,0,3)"),
        ("endian", "little"),
        ("encoding", "raw"),
        ("space origin", "(0,0,0)"),
        ("data file", "a.raw"),
    ],
}


@pytest.fixture(scope="module")
def image():
    result = SimpleITK.GetImageFromArray(body().astype(np.int16).T.copy())
    result.SetSpacing((2, 2.5, 3))
    return result


def test_every_mutation_of_every_format_ends_well(tmp_path, image, monkeypatch):
    """A whole volume or one reason; a file as it was is a volume; nothing outside is read."""
    monkeypatch.setattr(fuzz, "BOMB_BLOCKS", 1)
    outside = tmp_path / "outside"
    fuzz.canaries(outside, image, tmp_path / "scratch")
    originals = {
        (0, format): fuzz.sample(image, format, tmp_path / "scratch") for format in fuzz.FORMATS
    }
    seen = set()
    for index in range(150):
        kind, one = fuzz.mutated(index, 1, originals, 1, outside)
        seen.add((kind, one.format))
        path = one.write(tmp_path / "root" / "data" / str(index))
        try:
            prepared = prepare_volume(path, fuzz.CHAIN)
        except VolumeError as error:
            refused = error.reason
            assert not refused.startswith("unexpected"), (kind, one.format, refused)
            assert kind != "nothing", (one.format, refused)
        else:
            assert np.isfinite(prepared.voxels).all()
            assert 0 <= prepared.voxels.min() <= prepared.voxels.max() <= 1
            assert "outside" not in kind
    assert len({kind for kind, _ in seen}) == len(fuzz.MUTATIONS)
    assert {format for _, format in seen} == set(fuzz.FORMATS)
    assert all(os.stat(file).st_atime == 10**9 for file in outside.iterdir())


@settings(max_examples=200, deadline=None)
@given(
    name=st.sampled_from(sorted(HEADERS)),
    changes=st.dictionaries(
        st.integers(0, 10),
        st.one_of(
            st.lists(st.one_of(st.integers(), st.floats()), max_size=10).map(
                lambda values: " ".join(map(str, values))
            ),
            st.sampled_from(["True", "MET_LONG", "double", "gzip", "a.raw", "LOCAL", "../a.raw"]),
            st.text(max_size=20),
            st.none(),
        ),
        min_size=1,
        max_size=3,
    ),
)
def test_any_text_header_is_read_or_refused(tmp_path_factory, name, changes):
    folder = tmp_path_factory.getbasetemp() / "headers"
    if not folder.exists():
        folder.mkdir()
        (folder / "a.raw").write_bytes(body().astype("<i2").T.tobytes())
    lines = [] if name.endswith("mhd") else ["NRRD0004"]
    for number, (field, value) in enumerate(HEADERS[name]):
        value = changes.get(number, value)
        if value is not None:
            lines.append(f"{field} = {value}" if name.endswith("mhd") else f"{field}: {value}")
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8", errors="replace")
    try:
        source = load(folder / name)
    except VolumeError as error:
        refused = error.reason
        assert ": " in refused
    else:
        assert source.voxels.size * source.voxels.itemsize <= body().size * 2
