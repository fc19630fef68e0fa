"""Evaluation and statistics of masks in files: pairs, grids, notes, tables, pictures, errors."""

import csv
import json
import os
import re
import subprocess
import sys

import nibabel
import numpy as np
import pytest
import SimpleITK
from PIL import Image
from scans import save

from voco_jax.errors import InputError
from voco_jax.evaluation import evaluate as command
from voco_jax.evaluation.cases import compare
from voco_jax.evaluation.evaluate import evaluate, main
from voco_jax.evaluation.journal import Journal
from voco_jax.evaluation.masks import find, load_mask, parse_classes
from voco_jax.evaluation.statistics import main as statistics_main
from voco_jax.evaluation.statistics import statistics
from voco_jax.report.segmentations import Segmentation, draw_cases, to_grey

SHAPE, SPACING = (16, 13, 9), (2, 2.5, 3)


def organs(shift=0, second=True):
    labels = np.zeros(SHAPE, np.uint8)
    labels[3 + shift : 9 + shift, 2:8, 1:6] = 1
    if second:
        labels[10:14, 6:12, 4:8] = 2
    return labels


@pytest.fixture
def folders(tmp_path):
    """Three pairs; "b" is off by a voxel in x, "c" has no second organ in either."""
    for folder in ("reference", "prediction"):
        (tmp_path / folder / "site").mkdir(parents=True)
    for name, reference, prediction in (
        ("a", organs(), organs()),
        ("site/b", organs(), organs(1)),
        ("c", organs(second=False), organs(second=False)),
    ):
        save(tmp_path / "reference" / f"{name}.nii.gz", reference)
        save(tmp_path / "prediction" / f"{name}.nii.gz", prediction)
    return tmp_path


def run(folder, *more, picture=False):
    """Exit status, summary, rows of cases.csv."""
    arguments = ["--reference", str(folder / "reference"), "--prediction"]
    arguments += [str(folder / "prediction"), "--workers", "1", *more]
    with pytest.MonkeyPatch.context() as patch:
        if not picture:  # it takes most of the time
            patch.setattr(command, "draw_worst", lambda *_: None)
        status = main(arguments)
    output = folder / "prediction" / "evaluation"
    with open(output / "cases.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return status, json.loads((output / "summary.json").read_text("utf-8")), rows


# ---- the command


def test_tables_and_picture(folders, capsys):
    status, summary, rows = run(
        folders, "--classes", "liver=1", "spleen=2", "both=1,2", picture=True
    )
    assert status == 0
    assert [(row["case"], row["class"]) for row in rows] == [
        (case, name) for case in ("a", "c", "site/b") for name in ("liver", "spleen", "both")
    ]
    by_case = {(row["case"], row["class"]): row for row in rows}
    shifted = by_case["site/b", "liver"]
    assert float(shifted["dice"]) == pytest.approx(5 / 6, abs=1e-6)
    assert float(shifted["hd95_mm"]) == 2  # a voxel in x
    assert 0 < float(shifted["nsd_1mm"]) < 1
    # 6 x 6 x 5 voxels of 15 mm3
    assert float(shifted["reference_ml"]) == pytest.approx(2.7)
    assert float(shifted["volume_error_ml"]) == float(shifted["volume_error_percent"]) == 0
    neither = by_case["c", "spleen"]
    assert (neither["dice"], neither["hd95_mm"], neither["note"]) == ("", "", "in neither")
    assert float(by_case["a", "spleen"]["dice"]) == 1

    liver, spleen = summary["classes"]["liver"], summary["classes"]["spleen"]
    assert liver["dice"]["mean"] == pytest.approx((1 + 1 + 5 / 6) / 3)
    low, high = liver["dice"]["interval"]
    assert 5 / 6 <= low < liver["dice"]["mean"] < high <= 1
    assert (liver["dice"]["median"], liver["dice"]["cases"]) == (1, 3)
    assert (spleen["cases"], spleen["dice"]["cases"], spleen["empty_references"]) == (2, 2, 1)
    assert spleen["in_neither"] == ["c"]
    # Per case the classes' mean, of those that are there; "both" of b is less than 1, too.
    both = float(by_case["site/b", "both"]["dice"])
    assert summary["mean"]["dice"]["mean"] == pytest.approx((1 + 1 + (5 / 6 + 1 + both) / 3) / 3)
    assert summary["settings"]["tolerance_mm"] == [1.0]
    assert "tolerance 1 mm" in summary["how"]["nsd"]
    assert set(summary["versions"]) == {"voco_jax", "python", "numpy", "scipy"}

    told = capsys.readouterr().out
    assert "NSD 1 mm" in told
    assert "spleen: in neither reference nor prediction: in no mean, in 1 case (c)" in told
    assert "3 cases evaluated" in told
    picture = np.asarray(Image.open(folders / "prediction" / "evaluation" / "worst.png"))
    assert picture.shape[1:] == (1100, 3)
    assert not list((folders / "prediction" / "evaluation").glob("*.part"))


def test_files_of_any_orientation_and_format_pair_voxel_for_voxel(tmp_path):
    for folder in ("reference", "prediction"):
        (tmp_path / folder).mkdir()
    for name, axes, dtype in (("a", "LPS", np.uint8), ("b", "PIL", np.float32)):
        save(tmp_path / "reference" / f"{name}.nii.gz", organs())
        save(tmp_path / "prediction" / f"{name}.nii", organs(), axes=axes, dtype=dtype)
    save(tmp_path / "reference" / "c.nii", organs(), axes="ASR", slope=(0.5, 0))
    labels = SimpleITK.GetImageFromArray(organs().transpose(2, 1, 0)[:, ::-1, ::-1])
    labels.SetSpacing(SPACING)  # ITK's x is to the left, y to the back
    labels.SetOrigin((-(SHAPE[0] - 1) * 2.0, -(SHAPE[1] - 1) * 2.5, 0.0))
    SimpleITK.WriteImage(labels, tmp_path / "prediction" / "c.nrrd")
    status, summary, rows = run(tmp_path)
    assert status == 0
    assert summary["mean"]["dice"]["mean"] == 1
    assert {row["hd95_mm"] for row in rows} == {"0"}
    assert [row["class"] for row in rows] == ["1", "2"] * 3


def test_a_grid_of_other_order_is_no_excuse(folders):
    """Scores do not depend on how a file stores its axes, also where spacing differs."""
    before = run(folders)[2]
    for name in ("a", "site/b", "c"):
        path = folders / "prediction" / f"{name}.nii.gz"
        labels = np.asarray(nibabel.load(path).dataobj)
        save(path, labels, axes="SAL")
    assert run(folders)[2] == before


def test_what_is_missing_is_told(folders, capsys):
    (folders / "prediction" / "a.nii.gz").rename(folders / "prediction" / "d.nii.gz")
    status, summary, rows = run(folders)
    assert status == 1
    assert summary["cases"]["no_prediction"] == ["a"]
    assert summary["cases"]["no_reference"] == ["d"]
    assert (summary["cases"]["evaluated"], summary["cases"]["left_out"]) == (2, 2)
    assert [(row["case"], row["note"]) for row in rows[-2:]] == [
        ("a", "left out: no prediction file"),
        ("d", "left out: no reference file"),
    ]
    told = capsys.readouterr().out
    assert "left out, without a prediction: 1 case (a)" in told
    assert "2 cases evaluated, 2 left out" in told
    assert run(folders, "--allow-missing")[0] == 0


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (
            lambda path: save(path, organs()[:, :, :-1]),
            "another grid: the reference has 16x13x9 voxels of 2x2.5x3 mm from (0.00, 0.00, 0.00), "
            "the prediction 16x13x8 voxels of 2x2.5x3 mm from (0.00, 0.00, 0.00); resample",
        ),
        (
            lambda path: save(path, organs(), spacing=(2, 2.5, 3.01)),
            "the prediction 16x13x9 voxels of 2x2.5x3.01 mm",
        ),
        (
            lambda path: nibabel.save(nibabel.Nifti1Image(organs(), moved()), path),
            "the prediction 16x13x9 voxels of 2x2.5x3 mm from (0.30, 0.00, 0.00)",
        ),
        (
            lambda path: save(path, organs() * 0.4, dtype=np.float32),
            "a.nii.gz: found the value 0.4, expected whole numbers from 0 to 65535; is it a mask",
        ),
        (
            lambda path: save(path, organs() * np.nan, dtype=np.float32),
            "found the value nan, expected whole numbers",
        ),
        (lambda path: save(path, organs().astype(int) - 1000), "found the value -1000, expected"),
        (
            lambda path: save(path, organs().astype(int) * 40000, dtype=np.int32),
            "found the value 80000, expected",
        ),
        (lambda path: path.write_bytes(b"broken"), "a.nii.gz: "),
    ],
)
def test_a_bad_case_fails_and_the_others_go_on(folders, capsys, spoil, words):
    spoil(folders / "prediction" / "a.nii.gz")
    status, summary, rows = run(folders)
    assert status == 1
    assert words in summary["cases"]["failed"]["a"]
    assert summary["cases"]["evaluated"] == 2
    assert rows[-1]["note"].startswith("left out: ")
    assert "failed: a: " in capsys.readouterr().out
    assert run(folders, "--allow-missing")[0] == 1  # that is another thing


def moved():
    affine = np.diag([*SPACING, 1.0])
    affine[0, 3] = 0.3  # more than a tenth of the smallest step
    return affine


def test_rounded_headers_are_the_same_grid(folders):
    save(folders / "prediction" / "a.nii.gz", organs(), spacing=(2.001, 2.5, 3.001))
    assert run(folders)[0] == 0


def test_one_of_the_two_is_empty(folders, capsys):
    save(folders / "prediction" / "a.nii.gz", organs(second=False))
    save(folders / "prediction" / "c.nii.gz", organs())
    status, summary, rows = run(folders)
    assert status == 0
    by_case = {(row["case"], row["class"]): row for row in rows}
    for case, note in (("a", "no prediction"), ("c", "no reference")):
        row = by_case[case, "2"]
        assert (row["dice"], row["nsd_1mm"], row["hd95_mm"]) == ("0", "0", "inf")
        assert row["note"] == note
    assert by_case["c", "2"]["volume_error_percent"] == ""
    entry = summary["classes"]["2"]
    assert (entry["no_prediction"], entry["no_reference"]) == (["a"], ["c"])
    assert (entry["dice"]["cases"], entry["hd95_mm"]["cases"]) == (3, 1)
    assert entry["hd95_mm"]["interval"] is None
    told = capsys.readouterr().out
    assert "2: predicted nowhere: Dice and NSD 0, in 1 case (a)" in told
    assert "2: predicted, but not in the reference: Dice and NSD 0, in 1 case (c)" in told
    assert "(n): the mean of HD95 is over so many cases" in told


def test_values_of_no_class_are_background_and_told(folders, capsys):
    _, summary, rows = run(folders, "--classes", "liver=1")
    assert summary["cases"]["taken_for_background"] == {
        what: {"a": [2], "site/b": [2]} for what in ("reference", "prediction")
    }
    assert {row["class"] for row in rows} == {"liver"}
    told = capsys.readouterr().out
    assert "values of no class, taken for background: 2 in the references of 2 cases (a, s" in told


def test_a_value_that_only_a_prediction_has_is_no_class(folders):
    save(folders / "prediction" / "a.nii.gz", organs() * np.uint8(3))
    _, summary, _ = run(folders)
    assert list(summary["classes"]) == ["1", "2"]
    assert summary["cases"]["taken_for_background"]["prediction"] == {"a": [3, 6]}


def test_several_tolerances_and_a_file_of_classes(folders):
    names = {"background": 0, "organs": [1, 2]}
    (folders / "classes.json").write_text(json.dumps(names))
    more = ("--classes", str(folders / "classes.json"), "--tolerance", "0.5", "2")
    _, summary, rows = run(folders, *more)
    assert list(summary["classes"]) == ["organs"]
    worst = next(row for row in rows if row["case"] == "site/b")
    assert float(worst["nsd_0.5mm"]) < float(worst["nsd_2mm"]) <= 1


def test_single_files_pair_whatever_their_names(tmp_path, capsys):
    reference, prediction = tmp_path / "truth.nii.gz", tmp_path / "out.nii"
    save(reference, organs())
    save(prediction, organs(1))
    pair = ["--reference", str(reference), "--prediction", str(prediction)]
    assert main(pair) == 0
    assert (tmp_path / "evaluation" / "worst.png").exists()
    assert "truth,1," in (tmp_path / "evaluation" / "cases.csv").read_text()
    assert main([*pair, "--output", str(tmp_path / "x" / "y")]) == 0
    assert (tmp_path / "x" / "y" / "summary.json").exists()
    capsys.readouterr()
    assert main([*pair, "--output", str(reference)]) == 2
    assert "cannot write here" in capsys.readouterr().err


def test_processes_give_the_same(folders):
    pair, options = (folders / "reference", folders / "prediction"), {"progress": False}
    options["classes"] = {"liver": (1,), "spleen": (2,)}
    alone = evaluate(*pair, workers=1, **options)
    many = evaluate(*pair, workers=2, **options)
    assert repr(many) == repr(alone)  # NaN is not equal to itself


def test_images_are_drawn(folders, capsys):
    (folders / "images" / "site").mkdir(parents=True)
    ramp = np.broadcast_to(np.arange(SHAPE[0])[:, None, None] * 10.0, SHAPE)
    save(folders / "images" / "a.nii", ramp, axes="LPS")
    save(folders / "images" / "site" / "b.nii", ramp[:-1])
    assert run(folders, "--images", str(folders / "images"), picture=True)[0] == 0
    told = capsys.readouterr().err
    assert "worst.png: site/b is drawn without its image: another grid: the reference" in told
    for path in ("a.nii", "site/b.nii"):
        (folders / "images" / path).rename(folders / "images" / f"x{path.replace('/', '')}")
    pair = ["--reference", str(folders / "reference"), "--prediction", str(folders / "prediction")]
    assert main([*pair, "--images", str(folders / "images")]) == 2
    assert "images has 2 masks, as 'xa', the masks are named as 'a'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--reference", "nowhere", "--prediction", "."], "nowhere: no such file or folder"),
        (["--reference", "{r}"], "required: --prediction"),
        (["--reference", "{r}", "--prediction", "{e}"], "found no CT volume among"),
        (["--reference", "{r}", "--prediction", "{o}"], "no pair: "),
        (["--reference", "{r}", "--prediction", "{p}", "--tolerance", "-1"], "0 or more"),
        (["--reference", "{r}", "--prediction", "{p}", "--workers", "0"], "expected 1 or more"),
        (["--reference", "{r}", "--prediction", "{p}", "--classes", "liver"], "found 'liver', ex"),
        (["--reference", "{r}", "--prediction", "{p}", "--classes", "a=0"], "(0 is background)"),
        (["--reference", "{r}", "--prediction", "{d}"], "two volumes are named 'a', a.nii"),
    ],
)
def test_bad_input(folders, capsys, arguments, words):
    (folders / "empty").mkdir()
    (folders / "other").mkdir()
    (folders / "double").mkdir()
    save(folders / "other" / "x.nii", organs())
    save(folders / "double" / "a.nii", organs())
    save(folders / "double" / "a.nii.gz", organs())
    places = {name[0]: str(folders / name) for name in ("empty", "other", "double")}
    places |= {"r": str(folders / "reference"), "p": str(folders / "prediction")}
    assert main([argument.format(**places) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert words in error
    assert not (folders / "prediction" / "evaluation").exists()


def test_images_are_no_references(tmp_path, capsys, generator):
    for folder in ("reference", "prediction"):
        (tmp_path / folder).mkdir()
        save(tmp_path / folder / "a.nii", generator.integers(0, 2000, SHAPE))
    pair = ["--reference", str(tmp_path / "reference")]
    assert main([*pair, "--prediction", str(tmp_path / "prediction"), "--workers", "1"]) == 2
    error = capsys.readouterr().err
    assert "different values, expected at most 255: are these images, not masks?" in error


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["=1"], "expected NAME=LABEL"),
        (["a=1,"], "expected NAME=LABEL"),
        (["a=-1"], "expected NAME=LABEL"),
        (["a=70000"], "whole numbers from 1 to 65535"),
        (["a=1", "a=2"], "'a' is named twice"),
        (["background=0"], "(0 is background)"),
        (["missing.json"], "expected NAME=1 ... or a JSON file: No such file"),
    ],
)
def test_bad_classes(arguments, words):
    with pytest.raises(InputError, match=re.escape(words)):
        parse_classes(arguments)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[1]", "found a JSON list"),
        ("{", "not JSON"),
        ('{"background": 0}', "found none"),
        ('{"a": "1"}', "found '1', expected whole numbers"),
        ('{"a": [1, 0]}', r"found \[1, 0\], expected whole numbers"),
        ('{"a": true}', "found True"),
        ('{"a": []}', r"found \[\], expected"),
    ],
)
def test_bad_files_of_classes(tmp_path, text, words):
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(InputError, match=words):
        parse_classes([str(tmp_path / "c.json")])


@pytest.mark.parametrize(
    "line", ["[1]", "5", '{"name": "b"}', '{"name": [], "files": [], "done": 1}', "[" * 100_000]
)
def test_lines_of_others_in_a_journal_are_left_aside(tmp_path, line):
    path, files = tmp_path / "journal.jsonl", [["a.nii", 1, 2]]
    Journal(path, {"by": "us"}).add("a", files, "done a")
    path.write_text(f"{path.read_text()}{line}\n")
    journal = Journal(path, {"by": "us"})
    assert (journal.find("a", files), journal.find("b", files)) == ("done a", None)


def test_killed_processes_are_told():
    with pytest.raises(InputError, match="--workers: a process was killed, as a rule for want of"):
        command._map(os._exit, [1, 1], 2, "x", progress=False)


@pytest.mark.parametrize("module", ["evaluate", "statistics"])
def test_help_ends_with_examples_and_needs_no_jax(module):
    code = (
        f"import sys; from voco_jax.evaluation.{module} import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: print({'jax', 'torch', 'matplotlib'} & set(sys.modules))"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = told.stdout.strip().splitlines()
    assert "examples:" in lines
    assert lines[-2].startswith(f"  python -m voco_jax.evaluation.{module} --")
    assert lines[-1] == "set()"


# ---- label maps


def test_labels_of_scaled_and_float_files(tmp_path):
    save(tmp_path / "a.nii", organs(), dtype=np.float64)
    save(tmp_path / "b.nii", organs() * 7.0, slope=(0.5, 3))
    assert load_mask(tmp_path / "a.nii").values == (1, 2)
    mask = load_mask(tmp_path / "b.nii")
    np.testing.assert_array_equal(mask.labels, organs() * 7)
    assert (mask.values, mask.spacing) == ((7, 14), (2, 2.5, 3))
    assert find(tmp_path / "a.nii") == {"a": tmp_path / "a.nii"}


def test_compare_takes_any_order_and_many_labels(generator):
    labels = generator.integers(0, 400, (9, 8, 7)).astype(np.uint16)
    classes = {str(value): (value,) for value in range(1, 400)}
    one = compare(labels, labels, (1, 2, 3), classes, (1.0,))
    other = compare(np.asfortranarray(labels), labels, (1, 2, 3), classes, (1.0,))
    assert repr(one) == repr(other)
    assert {score.dice for score in one if score.note != "in neither"} == {1.0}


# ---- pictures


def test_picture_shows_where_most_is_wrong_in_true_proportions():
    wrong = organs()
    wrong[3:9, 2:8, 5] = 0
    row = Segmentation("a case", None, organs(), wrong, (1.0, 1.0, 3.0))
    picture = draw_cases([row], "title").astype(int)
    ground = (picture == (24, 24, 27)).all(axis=2)
    assert ground.mean() > 0.2  # no image
    cyan = (abs(picture - (61, 219, 217)).sum(axis=2) < 40).sum()
    orange = (abs(picture - (255, 159, 28)).sum(axis=2) < 40).sum()
    assert cyan > 500
    assert orange > 200


@pytest.mark.parametrize("flip", [False, True])
def test_left_is_on_the_right_and_the_front_is_up(flip):
    """A mask at the patient's left back, below: on the right and at the bottom of each slice."""
    labels = np.zeros((20, 24, 16), np.uint8)
    labels[10, 12, 8] = 1  # both keep the crop to the whole volume
    place = np.s_[2:5, 3:6, 2:4]
    wrong = labels.copy()
    wrong[place] = 2
    if flip:
        labels, wrong = labels[::-1, ::-1, ::-1], wrong[::-1, ::-1, ::-1]
    picture = draw_cases([Segmentation("", None, labels, wrong, (1, 1, 1))]).astype(int)
    orange = abs(picture - (255, 159, 28)).sum(axis=2) < 60
    orange[:60] = False  # the legend
    ground = (picture == (24, 24, 27)).all(axis=2)
    ground[:60] = False
    columns = np.flatnonzero(ground.sum(axis=0) > 50)
    first = columns[: np.flatnonzero(np.diff(columns) > 5)[0] + 1]  # the axial slice
    rows = np.flatnonzero(ground[:, first].sum(axis=1) > 20)
    y, x = np.nonzero(orange[:, first[0] : first[-1] + 1])
    across, down = x.mean() / len(first), (y.mean() - rows[0]) / len(rows)
    assert (across > 0.6) == (not flip)
    assert (down > 0.6) == (not flip)


def test_equal_and_empty_masks_are_drawn():
    empty = np.zeros(SHAPE, np.uint8)
    image = np.linspace(0, 1, empty.size, dtype=np.float32).reshape(SHAPE)
    rows = [
        Segmentation("equal", image, organs(), organs(), SPACING),
        Segmentation("empty", image, empty, empty, SPACING),
    ]
    assert draw_cases(iter(rows)).shape[0] > draw_cases(rows[:1]).shape[0]
    with pytest.raises(ValueError, match="no rows"):
        draw_cases([])
    with pytest.raises(ValueError, match="expected one 3-D shape"):
        draw_cases([Segmentation("x", image[1:], empty, empty, SPACING)])


def test_window_of_a_picture():
    values = np.full(SHAPE, -1000, np.float32)
    values[4:8, 3:7, 2:5] = np.linspace(0, 100, 48).reshape(4, 4, 3)
    grey = to_grey(values, values > -1)
    assert (grey[0] == 0).all()
    assert (grey.min(), grey.max()) == (0, 1)
    values[0, 0, 0], values[5, 5, 3] = np.inf, np.nan
    assert np.isfinite(to_grey(values, values > -1)).all()
    assert np.isfinite(to_grey(values, np.zeros(SHAPE, bool))).all()


# ---- statistics


def test_statistics_are_numpy_s(generator):
    labels = generator.integers(0, 4, SHAPE).astype(np.uint8)
    image = generator.normal(50, 20, SHAPE).astype(np.float32)
    names = {"one": 1, "two and three": (2, 3), "none": 9}
    found = statistics(labels, SPACING, names, image)
    for name, wanted in (("one", [1]), ("two and three", [2, 3])):
        inside = image[np.isin(labels, wanted)].astype(np.float64)
        assert found[name]["voxels"] == inside.size
        assert found[name]["volume_ml"] == pytest.approx(inside.size * 15 / 1000)
        assert found[name]["mean"] == pytest.approx(inside.mean())
        assert found[name]["standard_deviation"] == pytest.approx(inside.std())
    assert found["none"] == {
        "voxels": 0,
        "volume_ml": 0.0,
        "mean": None,
        "standard_deviation": None,
    }
    assert statistics(labels, SPACING, {"one": 1}) == {
        "one": {key: found["one"][key] for key in ("voxels", "volume_ml")}
    }
    whole = statistics(labels, SPACING, names, np.rint(image).astype(np.int16))
    assert whole["one"]["mean"] == pytest.approx(found["one"]["mean"], abs=0.5)
    image[labels == 1] = np.nan
    broken = statistics(labels, SPACING, names, image)
    assert broken["one"]["mean"] is None
    assert broken["two and three"] == found["two and three"]
    json.dumps(broken, allow_nan=False)
    with pytest.raises(ValueError, match="found an image of"):
        statistics(labels, SPACING, names, image[1:])
    with pytest.raises(ValueError, match="expected integers"):
        statistics(labels * 0.5, SPACING, names)


def test_statistics_command(folders, capsys):
    (folders / "images" / "site").mkdir(parents=True)
    for name in ("a", "site/b"):
        save(folders / "images" / f"{name}.nii", np.full(SHAPE, 40.0), axes="LPI")
    masks = ["--masks", str(folders / "reference")]
    assert statistics_main(masks) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[:2] == ["case,class,voxels,volume_ml", "a,1,180,2.7"]
    output = folders / "s.json"
    more = ["--images", str(folders / "images"), "--classes", "liver=1", "--output", str(output)]
    assert statistics_main([*masks, *more]) == 1
    assert "failed: c: " in capsys.readouterr().err
    assert json.loads(output.read_text())["cases"]["site/b"] == {
        "liver": {"voxels": 180, "volume_ml": 2.7, "mean": 40.0, "standard_deviation": 0.0}
    }
    one = ["--masks", str(folders / "reference" / "c.nii.gz"), "--images"]
    one += [str(folders / "images" / "a.nii"), "--output", str(folders / "s.csv")]
    assert statistics_main(one) == 0
    assert (folders / "s.csv").read_text().splitlines()[1] == "c,1,180,2.7,40,0"
    save(folders / "images" / "a.nii", np.full(SHAPE, 40.0)[1:])
    assert statistics_main(one) == 1
    assert "another grid: the mask has" in capsys.readouterr().err
    assert statistics_main([*masks, "--output", "s.txt"]) == 2
    assert "found 's.txt', expected a name in .json or .csv" in capsys.readouterr().err
    assert statistics_main([*masks, "--output", str(folders / "no" / "s.csv")]) == 2
    assert "cannot write here" in capsys.readouterr().err
