import csv
import dataclasses
import html
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import scans
from chains import CHAIN_10K
from PIL import Image
from scipy import ndimage

from voco_jax.data.array import write_volume
from voco_jax.data.cache import Cache, CacheWriter, checksum, chunk_file
from voco_jax.data.collect import scan
from voco_jax.data.manifest import Entry
from voco_jax.data.prepare import main as prepare_main
from voco_jax.data.prepare import prepare
from voco_jax.report import contact_sheet
from voco_jax.report.contact_sheet import main
from voco_jax.report.oddness import _textures, robust_scores, survey

CHAIN = dataclasses.replace(CHAIN_10K, volume_size=(40, 20, 10))


def smooth(seed, shape=CHAIN.volume_size):
    """An image: smooth in all directions."""
    voxels = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), 3)
    return np.rint(255 * (voxels - voxels.min()) / np.ptp(voxels)).astype(np.uint8)


def fill(path, changes, count=50, chain=CHAIN, volume=None, rubbish=None):
    """Ordinary volumes, some of them with other numbers or, of `rubbish`, other voxels."""
    generator = np.random.default_rng(0)
    with CacheWriter(path, chain) as writer:
        for slot in writer.reserve(count):
            voxels = smooth(slot, chain.volume_size) if volume is None else volume
            volume, kept = (rubbish or {}).get(slot, voxels), volume
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
            volume = kept
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


NOISE = np.random.default_rng(9).integers(0, 256, CHAIN.volume_size).astype(np.uint8)
MASK = np.where(smooth(3) > 128, 106, 105).astype(np.uint8)
PAINTED = 50 * (smooth(4) // 50)  # organs, as large as in images
RUBBISH = {
    "constant: all": {"voxels": np.full(CHAIN.volume_size, 105, np.uint8)},
    "no contrast: 1 of": {"voxels": MASK},
    "few grey values: ": {"voxels": PAINTED},
    "noise: ": {"voxels": NOISE},
    "another modality: the file says MR": {
        "doubt": "another modality: the file says MR, expected CT for a window in HU"
    },
    "too small for a body: 8x8x5 mm": {"spacing": (0.08, 0.08, 0.1)},
    "too large for a body: 1500x1500x50 mm": {"spacing": (15.0, 15.0, 1.0)},
    "same voxels as ct/": {"voxels": smooth(0)},
}


@pytest.mark.parametrize("every", [3, 2])
def test_rubbish_is_found_when_a_third_or_half_of_all_is(tmp_path, every):
    """And nothing else is; all of it has numbers that would shift medians."""
    changes, voxels, expected = {}, {}, {}
    kinds = list(RUBBISH.items())
    for number, slot in enumerate(range(1, 48, every)):
        reason, what = kinds[number % len(kinds)]
        changes[slot] = {"mean": 0.9, "foreground": 0.01, "spacing": (0.3, 0.3, 9.0)} | what
        if (own := changes[slot].pop("voxels", None)) is not None:
            voxels[slot] = own
        expected[slot] = reason
    looks = survey(fill(tmp_path / "c", changes, 48, rubbish=voxels))
    assert {look.entry.slot for look in looks if look.reasons} == set(expected)
    assert [look.entry.slot for look in looks[: len(expected)]] == sorted(expected)
    for look in looks[: len(expected)]:
        assert np.isinf(look.score)
        assert any(why.startswith(expected[look.entry.slot]) for why in look.reasons), look
    # Pictures have no millimetres.
    pictures = dataclasses.replace(CHAIN, window_unit="value")
    looks = survey(fill(tmp_path / "v", {0: {"spacing": (15.0, 15.0, 1.0)}}, 3, pictures))
    assert not any("too large" in why for look in looks for why in look.reasons)


def test_statistics_are_of_the_volumes_that_pass(tmp_path):
    """24 of 49 are rubbish of a high mean; one more is an image with that mean."""
    changes = {slot: {"mean": 0.9} for slot in range(25)}
    looks = survey(fill(tmp_path / "c", changes, 49, rubbish=dict.fromkeys(range(24), NOISE)))
    reasons = {look.entry.slot: look.reasons for look in looks}
    assert [why[:16] for why in reasons[24]] == ["high mean: 0.900"]
    assert all("mean" not in why for slot in range(24) for why in reasons[slot])


def test_textures_of_prepared_volumes_are_kept_and_are_those_of_the_cache(tmp_path):
    """Also of noise that resizing has smoothed: 3 voxels of the cache are one of the file."""
    data = tmp_path / "data"
    data.mkdir()
    noise = np.random.default_rng(0).normal(0, 300, (16, 18, 12)).astype(np.int16)
    scans.save(data / "noise.nii", noise, spacing=(8, 8, 8))
    tissue = np.where(scans.body((40, 36, 24)) > -1000, smooth(1, (40, 36, 24)) - 100.0, -1000)
    scans.save(data / "body.nii", tissue, spacing=(8, 8, 8))
    chain = dataclasses.replace(CHAIN_10K, volume_size=(48, 48, 24))
    prepare(scan(data), tmp_path / "c", chain, workers=0, progress=False)
    cache = Cache.open(tmp_path / "c", chain)
    kept = [entry.texture for entry in cache.entries]
    assert [kept[0].likeness > 0.6, abs(kept[1].likeness) < 0.1] == [True, True]
    assert min(one.grey_values for one in kept) > 20
    older = [dataclasses.replace(entry, texture=None) for entry in cache.entries]
    found = _textures(dataclasses.replace(cache, entries=tuple(older)), False)
    for one, other in zip(kept, found, strict=True):
        np.testing.assert_allclose(dataclasses.astuple(one), dataclasses.astuple(other), atol=0.01)
    assert [look.entry.id for look in survey(cache) if look.reasons] == ["data/noise.nii"]


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or ""
CLICKS = """<script>
const texts = [], errors = [];
addEventListener("error", (event) => errors.push(event.message));
addEventListener("securitypolicyviolation", (event) => errors.push(event.violatedDirective));
const made = URL.createObjectURL;
URL.createObjectURL = (blob) => { blob.text().then((text) => texts.push(text)); return "#"; };
const choose_ = (id, value, what) => { $(id).value = value; $(id).dispatchEvent(new Event(what)); };
const names = () => [...document.querySelectorAll(".name > span")];
const shown = () => names().map((one) => one.firstChild.data);
const steps = { first: shown().length };
choose_("filter", "odd", "change"); steps.odd = shown();
choose_("filter", "kind noise", "change"); steps.noise = shown(); $("tick").click();
choose_("filter", "all", "change"); choose_("search", "047", "input"); steps.search = shown();
document.querySelector("label.tile").click(); $("save").click();
choose_("search", "", "input"); $("on").click(); steps.second = shown().length;
choose_("filter", "ticked", "change"); steps.ticked = shown();
steps.kept = JSON.parse(localStorage.getItem(KEY)); steps.count = $("count").textContent;
const picture = document.querySelector(".picture").style.backgroundImage;
setTimeout(() => {
  document.title = JSON.stringify({ ...steps, texts, errors, picture });
}, 100);
</script>"""


@pytest.mark.skipif(not CHROMIUM, reason="chromium is not installed")
def test_volumes_are_ticked_in_a_browser_and_left_out(tmp_path, capsys):
    cache = fill(tmp_path / "c", {}, rubbish={5: NOISE, 6: NOISE[::-1].copy()})
    out = tmp_path / "out"
    contact_sheet.draw(cache, out, progress=False)
    page = (out / "index.html").read_text("utf-8")
    assert "http" not in page.replace("http-equiv", "")  # it loads nothing from elsewhere
    line = "let ticked = "
    assert page.count(line) == 1
    larger = """localStorage.setItem(KEY, '["ct/900.nii"]');"""  # a sheet with more pages was there
    page = page.replace(line, f"{larger} {line}")
    (out / "test.html").write_text(page.replace("</body>", f"{CLICKS}</body>"), "utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    flags += ["--virtual-time-budget=4000", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run(
        [CHROMIUM, *flags, (out / "test.html").as_uri()], capture_output=True, text=True, timeout=90
    )
    title = html.unescape(re.search("<title>(.*?)</title>", done.stdout)[1])
    found = json.loads(title)
    assert found["errors"] == []
    assert found["first"] == 40
    assert found["second"] == 10
    noise, wanted = ["ct/005.nii", "ct/006.nii"], ["ct/005.nii", "ct/006.nii", "ct/047.nii"]
    assert (found["odd"], found["noise"], found["search"]) == (noise, noise, ["ct/047.nii"])
    assert found["ticked"] == wanted
    assert found["kept"] == ["ct/900.nii", *wanted]
    assert found["count"] == "3 of 50 ticked"
    assert found["texts"] == ["\n".join(wanted) + "\n"]
    assert "page_0001.png" in found["picture"]
    (tmp_path / "exclude.txt").write_text(found["texts"][0], "utf-8")
    flags = ["--cache", str(tmp_path / "c"), "--exclude", str(tmp_path / "exclude.txt"), "--prune"]
    assert prepare_main(flags) == 0
    left = {entry.id for entry in Cache.open(tmp_path / "c", CHAIN).entries}
    assert left == {entry.id for entry in cache.entries} - set(wanted)


def test_names_are_text_on_the_page(tmp_path):
    name = "ct/</script><b>&\"'.nii"
    fill(tmp_path / "c", {0: {"id": name}}, 1)
    cache = Cache.open(tmp_path / "c", CHAIN)
    contact_sheet.draw(cache, tmp_path / "out", progress=False)
    page = (tmp_path / "out/index.html").read_text("utf-8")
    assert page.count("</script>") == 1
    rows = json.loads(re.search(r"const ROWS = (.*);", page)[1])
    assert rows[0][0] == name


def test_tiles_are_where_the_page_has_them(tmp_path):
    """What CSS shows of a page's picture is exactly one frame."""
    files = contact_sheet.draw(fill(tmp_path / "c", ODD), tmp_path / "out", progress=False)[1]
    page = (tmp_path / "out/index.html").read_text("utf-8")
    rows = json.loads(re.search(r"const ROWS = (.*);", page)[1])
    pictures = {path.name: Image.open(path) for path in files}
    width, height = contact_sheet._TILE
    for number, (_, _, reasons, name, x, y, size) in enumerate(rows):
        picture = pictures[name]
        assert size == pytest.approx(100 * picture.width / width, abs=0.001)
        left, top = x / 100 * (picture.width - width), y / 100 * (picture.height - height)
        corner = picture.getpixel((round(left), round(top)))
        assert corner == (contact_sheet._RED if number < 4 else contact_sheet._FRAME)
        assert bool(reasons) == (number < 4)


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
    pages = ["page_0001.png", "page_0002.png"]
    assert names == ["index.csv", "index.html", *pages, "page_notes.txt"]
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
    axial, coronal, sagittal = contact_sheet.slices(cache, look)
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
