import csv
import dataclasses
import os
import subprocess
import sys

import numpy as np
import pytest
from chains import CHAIN_10K
from PIL import Image

from voco_jax.data.array import write_volume
from voco_jax.data.cache import Cache, CacheWriter, checksum, chunk_file
from voco_jax.data.manifest import Entry
from voco_jax.report import contact_sheet
from voco_jax.report.contact_sheet import main, robust_scores, survey

CHAIN = dataclasses.replace(CHAIN_10K, volume_size=(40, 20, 10))


def fill(path, changes, count=50, chain=CHAIN, volume=None):
    """Ordinary volumes, some of them with other numbers."""
    generator = np.random.default_rng(0)
    if volume is None:
        volume = np.zeros(chain.volume_size, np.uint8)
    with CacheWriter(path, chain) as writer:
        for slot in writer.reserve(count):
            write_volume(writer.path, slot, volume)
            entry = Entry(
                id=f"ct/{slot:03d}.nii",
                slot=slot,
                section="training",
                path=f"/ct/{slot}",
                stamp="",
                axes="LPS",
                shape=(100, 100, 50),
                spacing=(0.8, 0.8, float(generator.choice([1.0, 1.25, 1.5]))),
                window=chain.window,
                box=((10, 20, 0), (90, 80, 50)),
                foreground=0.48,
                stored=volume.shape,
                mean=float(generator.uniform(0.25, 0.35)),
                checksum=checksum(volume),
            )
            writer.add(dataclasses.replace(entry, **changes.get(slot, {})))
    return Cache.open(path, chain)


ODD = {
    7: {"spacing": (0.8, 0.8, 10.0)},
    21: {"foreground": 1.2e-4},
    33: {"mean": 0.9},
    40: {"spacing": (0.2, 0.2, 1.0), "mean": 0.0},
}


def test_what_is_odd_comes_first_with_its_reasons(tmp_path):
    looks = survey(fill(tmp_path / "c", ODD))
    assert {look.entry.slot for look in looks[:4]} == set(ODD)
    assert [look.score for look in looks[:4]] == sorted(
        [look.score for look in looks[:4]], reverse=True
    )
    assert not any(look.reasons for look in looks[4:])
    assert [look.entry.id for look in looks[4:]] == sorted(look.entry.id for look in looks[4:])
    reasons = {look.entry.slot: look.reasons for look in looks}
    assert reasons[7] == ("high z spacing: 10 mm (median 1.25 mm)",)
    assert reasons[21] == ("low foreground: 0.012% of the file (median 48%)",)
    assert reasons[33][0].startswith("high mean: 0.900 (median 0.")
    assert [reason.partition(":")[0] for reason in reasons[40]] == ["low x-y spacing", "low mean"]
    # What is stored is the box, stretched: 80 x 0.8, 60 x 0.8, 50 x 1.0 ... 1.5 mm.
    x, y, z = looks[10].extent
    assert (x, y) == pytest.approx((64, 48))
    assert z == pytest.approx(50 * looks[10].entry.spacing[2])


def test_robust_scores_are_those_of_iglewicz_and_hoaglin():
    numbers = np.array([2.1, 2.6, 2.4, 2.5, 2.3, 2.1, 2.3, 2.6, 8.2, 8.3])
    middle = np.median(numbers)
    expected = 0.6745 * (numbers - middle) / np.median(np.abs(numbers - middle))
    np.testing.assert_allclose(robust_scores(numbers, 1e-9), expected)
    np.testing.assert_allclose(robust_scores(np.array([1.0, 1.0, 1.0, 2.0]), 0.5), [0, 0, 0, 2])


def test_pages_and_index(tmp_path, capsys):
    fill(tmp_path / "c", ODD)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/page_0009.png").touch()  # of an earlier, larger cache
    (tmp_path / "out/page_notes.txt").touch()
    flags = ["--cache", str(tmp_path / "c"), "--output", str(tmp_path / "out")]
    assert main(flags) == 0
    out = capsys.readouterr().out
    assert "50 volumes, 4 odd" in out
    assert "ct/007.nii: high z spacing: 10 mm" in out
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["index.csv", "page_0001.png", "page_0002.png", "page_notes.txt"]
    with open(tmp_path / "out/index.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 50
    assert (rows[0]["page"], rows[0]["row"], rows[0]["column"]) == ("1", "1", "1")
    assert (rows[49]["page"], rows[49]["row"], rows[49]["column"]) == ("2", "2", "5")
    assert all(row["reasons"] for row in rows[:4])
    page = np.asarray(Image.open(tmp_path / "out/page_0001.png"))
    width, height = contact_sheet._TILE
    red = (page == contact_sheet._RED).all(axis=-1)
    for number in range(40):  # exactly the odd ones have a red frame
        row, column = divmod(number, 5)
        top, left = contact_sheet._HEAD + row * height, contact_sheet._GAP + column * width
        assert red[top, left : left + width - 2].all() == (number < 4), number
    assert main([*flags, "--pages", "1"]) == 0
    assert not (tmp_path / "out/page_0002.png").exists()


@pytest.mark.parametrize("fit", ["resize", "random_crop"])
def test_slices_show_the_right_way_up_and_in_proportion(tmp_path, fit):
    """A bright corner at the patient's right, front, top."""
    chain = dataclasses.replace(CHAIN, fit=fit)
    volume = np.full((40, 20, 10), 60, np.uint8)
    volume[20:, 10:, 5:] = 255
    box = {"box": ((0, 0, 0), (40, 20, 10)), "shape": (40, 20, 10), "spacing": (1.0, 2.0, 8.0)}
    cache = fill(tmp_path / "c", {0: box}, 1, chain, volume)
    (look,) = survey(cache)
    axial, coronal, sagittal = contact_sheet._slices(cache, look)
    assert look.extent == (40, 40, 80)
    assert (axial.width, axial.height) == (59, 59)  # 118 pixels for 80 mm
    assert (coronal.width, coronal.height) == (59, 118)
    assert (sagittal.width, sagittal.height) == (59, 118)

    def corners(image):
        grey = np.asarray(image)[..., 0]
        return [bool(grey[i, j] > 200) for i in (3, -4) for j in (3, -4)]

    # A picture's left is the patient's right; its top is the front, or the head.
    assert corners(axial) == [True, False, False, False]
    assert corners(coronal) == [True, False, False, False]
    assert corners(sagittal) == [True, False, False, False]  # its left: the front


def test_a_damaged_volume_is_on_the_sheet(tmp_path):
    cache = fill(tmp_path / "c", {}, 3)
    with open(chunk_file(cache.path, 1), "r+b") as file:
        file.truncate(10)
    looks, files = contact_sheet.draw(cache, tmp_path / "out", progress=False)
    assert len(looks) == 3
    page = np.asarray(Image.open(files[0]))
    assert (page == contact_sheet._RED).all(axis=-1).sum() > 500


def test_names_are_cut_in_the_middle():
    text = "folder/" + "x" * 300 + "/case_0001.nii.gz"
    short = contact_sheet._fitting(text, 200)
    assert contact_sheet._font(12).getlength(short) <= 200
    assert short.startswith("folder/")
    assert short.endswith("1.nii.gz")
    assert contact_sheet._fitting("short", 200) == "short"


@pytest.mark.parametrize(
    "backend", ["module://matplotlib_inline.backend_inline", "no_such_backend", "TkAgg"]
)
def test_a_notebook_s_backend_and_no_home_do_not_matter(tmp_path, backend):
    """matplotlib refuses to be imported with the first two where they are not installed."""
    code = (
        "import io, os; from voco_jax.report.confusion import FigureCanvasAgg, Figure\n"
        "FigureCanvasAgg(Figure()).print_png(io.BytesIO()); print(os.environ['MPLBACKEND'])"
    )
    environment = os.environ | {"MPLBACKEND": backend, "MPLCONFIGDIR": "/proc/none", "HOME": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, f"{backend}\n"), done.stderr


def test_bad_commands(tmp_path, capsys):
    assert main(["--cache", str(tmp_path / "none"), "--output", "x"]) == 2
    assert "no such folder" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "--cache cache/voco" in capsys.readouterr().out
