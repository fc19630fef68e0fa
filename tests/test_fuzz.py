"""Broken and hostile files; docs/reliability.md records robustness/fuzz.py at length, with Dask."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scans import body

from voco_jax.data.formats.readers import VolumeError, load

ROOT = Path(__file__).resolve().parents[1]
FLAGS = ["--files", "150", "--seed", "1", "--workers", "0", "--bomb", "16"]
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


@pytest.mark.scripts
def test_every_mutation_of_every_format_ends_well():
    """A whole volume or one reason; a file as it was is a volume; nothing outside is opened."""
    done = subprocess.run(
        [sys.executable, "-m", "robustness.fuzz", *FLAGS], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = re.findall(r"^\| ([a-z ]+) \| (\d+) \| (\d+) \|", done.stdout, re.M)
    became = {kind: (int(volumes), int(failures)) for kind, volumes, failures in rows}
    assert sum(map(sum, became.values())) == 150
    assert min(map(sum, became.values())) >= 150 // len(became) >= 5
    assert became["nothing"][1] == became["link outside"][0] == became["path outside"][0] == 0
    assert ", 3 sources, 13 formats\n" in done.stdout
    assert done.stdout.endswith("\n0 problems\n")


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
