"""Fine-tuning for classification: slices, lists, metrics, a run through the loop, prediction."""

import csv
import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import nibabel
import numpy as np
import pytest
import strided_cnn
from PIL import Image
from safetensors.numpy import load_file, save_file

from configs import finetune_ccii
from voco_jax.config import encoders
from voco_jax.config.common import Chain, ClassifiedChain
from voco_jax.config.finetuning import MiddleCrops
from voco_jax.config.load import parse
from voco_jax.data.cache import Cache
from voco_jax.data.collect import collect, scan
from voco_jax.data.csv_lists import read_csv
from voco_jax.data.datalists import Volume, read_list
from voco_jax.data.formats.readers import file_signature, load
from voco_jax.data.phantom import make_phantoms, phantom
from voco_jax.data.pipeline import Part, fingerprint
from voco_jax.data.prepare import prepare
from voco_jax.data.resample import center_crop
from voco_jax.data.verify import verify
from voco_jax.data.whole_volumes import class_of, collate_volumes, draw_volume, middle_of
from voco_jax.errors import InputError
from voco_jax.evaluation.class_metrics import (
    accuracy,
    interval,
    mean_known,
    one_against_rest,
    resample,
    roc_auc,
)
from voco_jax.evaluation.ensemble import read_experiments
from voco_jax.evaluation.predict import load_segmenter, main
from voco_jax.finetune import augment, losses
from voco_jax.finetune.class_validation import ClassValidator
from voco_jax.finetune.classification import METHOD, describe_classes, make_program
from voco_jax.interop.card import read_card
from voco_jax.models.encoders import ENCODERS
from voco_jax.training import distributed, loop
from voco_jax.training.mesh import make_mesh

NAMES = ("Normal", "CP", "NCP")
HEADER = "zip_file,target,label,patient_id,scan_id,n_slice,scan_count,all_scan_ids\n"
SIZE = (16, 16, 8)


@pytest.fixture(autouse=True)
def _second_encoder(monkeypatch):
    monkeypatch.setitem(ENCODERS, "strided_cnn", strided_cnn.ENCODER)
    monkeypatch.setitem(encoders.ENCODERS, "strided_cnn", strided_cnn.Settings)


# ---- loss and metrics


def test_loss_is_pytorchs(generator):
    """CrossEntropyLoss and its gradient, float64."""
    import torch

    logits, labels = 3 * generator.normal(size=(7, 5)), generator.integers(0, 5, 7)
    theirs = torch.from_numpy(logits.copy()).requires_grad_()
    loss = torch.nn.CrossEntropyLoss()(theirs, torch.from_numpy(labels))
    loss.backward()
    with jax.enable_x64(True):
        value, gradient = jax.value_and_grad(losses.cross_entropy)(
            jnp.asarray(logits), jnp.asarray(labels)
        )
    assert abs(float(value) - loss.item()) < 1e-12
    np.testing.assert_allclose(gradient, theirs.grad.numpy(), rtol=1e-9, atol=1e-14)


def _by_pairs(positive, scores):
    """Every pair counted."""
    pairs = itertools.product(scores[positive], scores[~positive])
    counted = [1.0 if p > n else 0.5 if p == n else 0.0 for p, n in pairs]
    return np.mean(counted) if counted else np.nan


@pytest.mark.parametrize("values", [2, 5, 10**9])  # few: nearly all are ties
def test_auc_counts_pairs(generator, values):
    for count in (2, 9, 40):
        positive = generator.random(count) < 0.4
        scores = generator.integers(0, values, count) / values
        assert roc_auc(positive, scores) == pytest.approx(_by_pairs(positive, scores), nan_ok=True)


def test_weights_are_repeated_cases(generator):
    positive, scores = generator.random(30) < 0.5, generator.integers(0, 9, 30) / 9
    predicted = scores > 0.5
    weights = generator.integers(0, 4, (6, 30))
    areas, right = roc_auc(positive, scores, weights), accuracy(positive, predicted, weights)
    for row, area, share in zip(weights, areas, right, strict=True):
        again = np.repeat(np.arange(30), row)
        assert area == pytest.approx(_by_pairs(positive[again], scores[again]))
        assert share == pytest.approx((positive[again] == predicted[again]).mean())


def test_a_class_without_cases_is_in_no_mean(generator):
    reference = np.array([0, 0, 1, 1, 1])
    probabilities = generator.random((5, 3))
    areas = one_against_rest(reference, probabilities)
    assert np.isnan(areas).tolist() == [False, False, True]
    assert mean_known(areas) == pytest.approx(areas[:2].mean())
    assert np.isnan(roc_auc(np.ones(3, bool), np.arange(3.0)))


def test_patients_are_drawn_whole():
    weights = resample(["a", "b", "a", "c"], seed=1, resamples=500)
    np.testing.assert_array_equal(weights[:, 0], weights[:, 2])
    assert (weights[:, [0, 1, 3]].sum(axis=1) == 3).all()
    np.testing.assert_array_equal(weights, resample(["a", "b", "a", "c"], seed=1, resamples=500))
    low, high = interval(accuracy(np.zeros(4), np.array([0, 1, 0, 0]), weights))
    assert low < 0.75 < high == 1
    assert np.isnan(interval(np.array([np.nan, 1.0]))).all()


def test_labels_of_volumes_are_not_turned():
    images = jnp.asarray(np.random.default_rng(0).random((4, 6, 6, 4, 1)), jnp.float32)
    labels = jnp.arange(4)
    off = dict.fromkeys(("scale", "shift", "noise", "gamma"), 0.0)
    off |= {f"{name}_probability": 0.0 for name in off}
    draws = augment.draw(
        jax.random.key(0), 4, flip_probability=(1.0, 0.0, 0.0), rotate_probability=0.0, **off
    )
    moved, same = augment.apply(images, labels, draws)
    np.testing.assert_array_equal(same, labels)
    np.testing.assert_array_equal(moved, images[:, ::-1])


# ---- slices


def _save(folder, planes, name="{}.png"):
    folder.mkdir(parents=True, exist_ok=True)
    for index, plane in enumerate(planes):
        Image.fromarray(plane).save(folder / name.format(index))


def test_slices_are_stacked_by_their_numbers(tmp_path, generator):
    """0, 1, ... 11: not 0, 1, 10, 11, 2."""
    planes = generator.integers(0, 256, (12, 7, 9), dtype=np.uint8)
    _save(tmp_path / "scan", planes, "im_{}.png")
    found = load(tmp_path / "scan")
    assert found.voxels.dtype == np.uint8
    assert (found.axes, found.spacing) == ("LPS", (1.0, 1.0, 1.0))
    for index in range(12):
        theirs = np.asarray(Image.open(tmp_path / "scan" / f"im_{index}.png"))
        np.testing.assert_array_equal(found.voxels[:, :, index], theirs.T)
    (volume,) = scan(tmp_path)
    assert volume.path == tmp_path / "scan"
    before = file_signature(volume.path)
    (tmp_path / "scan" / "im_3.png").write_bytes(b"x")
    assert file_signature(volume.path) != before


def test_slices_of_16_bits_and_grey_colours(tmp_path, generator):
    deep = generator.integers(0, 65536, (3, 5, 6), dtype=np.uint16)
    _save(tmp_path / "deep", deep)
    np.testing.assert_array_equal(load(tmp_path / "deep").voxels, deep.T)
    grey = generator.integers(0, 256, (3, 16, 16), dtype=np.uint8)
    _save(tmp_path / "grey", np.repeat(grey[..., None], 3, axis=-1), "{}.jpg")
    theirs = [np.asarray(Image.open(tmp_path / "grey" / f"{i}.jpg"))[..., 0].T for i in range(3)]
    np.testing.assert_array_equal(load(tmp_path / "grey").voxels, np.stack(theirs, axis=-1))


def _spoil(folder, kind):
    grey = np.zeros((8, 8), np.uint8)
    if kind == "size":
        Image.fromarray(grey[:5]).save(folder / "3.png")
    elif kind == "mode":
        Image.fromarray(grey.astype(np.uint16)).save(folder / "3.png")
    elif kind == "number":
        Image.fromarray(grey).save(folder / "first.png")
    elif kind == "twice":
        Image.fromarray(grey).save(folder / "02.png")
    elif kind == "cut":
        (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:40])
    elif kind == "no picture":
        (folder / "1.png").write_bytes(b"GIF89a")
    elif kind == "colour":
        for index in range(3):
            values = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)
            Image.fromarray(values).save(folder / f"{index}.png")
    elif kind == "alpha":
        for index in range(3):
            Image.fromarray(np.zeros((8, 8, 4), np.uint8)).save(folder / f"{index}.png")
    elif kind == "link":
        (folder / "1.png").unlink()
        (folder / "1.png").symlink_to("/etc/hostname")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("size", "another slice: 3.png is 8x5 L, 0.png 8x8 L, expected one size"),
        ("mode", "another slice: 3.png is 8x8 I;16, 0.png 8x8 L"),
        ("number", "no number: first.png has none"),
        ("twice", "same number: 02.png and 2.png"),
        ("cut", "damaged slice: 1.png: "),
        ("no picture", "damaged slice: 1.png: "),
        ("colour", "not grey: 0.png has colours"),
        ("alpha", "not grey: 0.png is of Pillow's mode RGBA"),
        ("link", "outside its folder: '1.png'"),
    ],
)
def test_slices_that_are_no_volume(tmp_path, kind, message):
    _save(tmp_path / "scan", np.random.default_rng(0).integers(0, 256, (3, 8, 8), dtype=np.uint8))
    _spoil(tmp_path / "scan", kind)
    with pytest.raises(InputError, match=message.replace("(", r"\(")):
        load(tmp_path / "scan")


def test_pictures_beside_other_files_are_no_volume(tmp_path):
    """As masks with their previews; a list may name such a folder all the same."""
    _save(tmp_path, np.zeros((3, 8, 8), np.uint8))
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 4, 4)), np.eye(4)), tmp_path / "a.nii.gz")
    assert [volume.path.name for volume in scan(tmp_path)] == ["a.nii.gz"]
    assert load(tmp_path).voxels.shape == (8, 8, 3)


# ---- lists

CLASSES = (("Normal", (0,)), ("CP", (1,)), ("NCP", (2, 3)))


@pytest.mark.parametrize(
    ("text", "paths"),
    [
        (HEADER + 'CP-1.zip,1,CP,12,3,94,2,"[3, 4]"\nN.zip,0,Normal,7,9,5,1,[9]\n', "ccii"),
        ("path,label\na/1,CP\nb/2,0\n", "two"),
        ("Label,Image,other\nCP,a/1,7\n0,b/2,8\n", "two"),
        ("a/1,CP\n\nb/2,0\n", "two"),
        ("CP,a/1\n0,b/2\n", "two"),
    ],
)
def test_csv_lists(tmp_path, text, paths):
    for name, section in (("fold0_train.csv", "training"), ("fold0_valid.csv", "validation")):
        (tmp_path / name).write_text(text)
        found = read_list(tmp_path / name, tmp_path / "data", classes=CLASSES)
        wanted = {"ccii": ("CP/12/3", "Normal/7/9"), "two": ("a/1", "b/2")}[paths]
        labels = ("CP", "Normal") if paths == "ccii" else ("CP", "0")
        assert found == [
            Volume(f"data/{path}", tmp_path / "data" / path, section, class_label=label)
            for path, label in zip(wanted, labels, strict=True)
        ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "l.csv: found no rows, expected a header with a path"),
        ("path,other\na,1\n", "l.csv: found the columns path, other, expected"),
        ("a,b,c\n", "l.csv: found the columns a, b, c, expected"),
        ("path,label\na\n", r"l.csv: row 2: found \['a'\], expected 2 cells"),
        ("path,label\n../a,CP\n", "leads out of the root folder"),
        ("path,label\na,7\n", 'label: found "7", expected one of Normal, 0, CP, 1, NCP, 2, 3'),
        ('path,label\n"a,1\n', "l.csv: not CSV"),
        ("\0\n", "l.csv: "),
    ],
)
def test_csv_lists_that_are_none(tmp_path, text, message):
    (tmp_path / "l.csv").write_text(text)
    with pytest.raises(InputError, match=message):
        read_list(tmp_path / "l.csv", tmp_path / "data", classes=CLASSES)


def test_decathlon_lists_name_classes(tmp_path):
    path = tmp_path / "l.json"

    def labels(*found):
        entries = [{"image": f"{i}.nii", "label": label} for i, label in enumerate(found)]
        path.write_text(json.dumps({"training": entries}))
        return [volume.class_label for volume in read_list(path, tmp_path, classes=CLASSES)]

    assert labels(0, "1", "NCP", 3) == ["0", "1", "NCP", "3"]
    for wrong in (4, -1, 1.0, True, None, "", [0], "covid"):
        with pytest.raises(InputError, match=r"l.json: training\[1\]: label: found .*expected one"):
            labels(0, wrong)
    path.write_text('{"training": ["a.nii"]}')
    with pytest.raises(InputError, match="label: found null, expected one of Normal, 0"):
        read_list(path, tmp_path, classes=CLASSES)
    with pytest.raises(InputError, match="expected a Decathlon list for each root"):
        collect((), (str(tmp_path),), classes=CLASSES)


def test_a_file_of_two_classes_is_told(tmp_path):
    (tmp_path / "l.csv").write_text("path,label\na,CP\na,NCP\n")
    with pytest.raises(InputError, match="listed twice, with the labels 'CP' and 'NCP'"):
        collect((tmp_path / "l.csv",), (tmp_path,), classes=CLASSES)


def test_csv_without_classes_lists_images(tmp_path):
    assert read_csv("a,1\n", "l.csv", ())["training"] == [{"image": "a", "label": "1"}]
    (tmp_path / "l.csv").write_text("a,anything\n")
    assert read_list(tmp_path / "l.csv", tmp_path)[0].class_label is None


# ---- the cache

CHAIN = ClassifiedChain(
    axes="RAS",
    spacing=(),
    window=(0.0, 255.0),
    window_unit="value",
    crop_foreground=False,
    foreground_threshold=0.0,
    fit="resize",
    volume_size=SIZE,
    dtype="uint8",
    classes=tuple((name, (number,)) for number, name in enumerate(NAMES)),
)


def _ccii(root, patients=6):
    """A folder as CC-CCII's and its two lists: the brighter the sicker, two scans a patient."""
    generator = np.random.default_rng(5)
    rows = {"train": [], "valid": []}
    for patient in range(patients):
        for number, name in enumerate(NAMES):
            for scan_id in (2 * patient, 2 * patient + 1):
                depth = 9 + scan_id
                planes = generator.integers(0, 120, (depth, 20, 20)) + 40 * number
                _save(root / name / str(patient) / str(scan_id), planes.astype(np.uint8))
                part = "valid" if patient >= patients - 2 else "train"
                rows[part].append(f"z.zip,{number},{name},{patient},{scan_id},{depth},2,[0]\n")
    for part, lines in rows.items():
        (root / f"CC_CCII_fold0_{part}.csv").write_text(HEADER + "".join(lines))
    return [root / f"CC_CCII_fold0_{part}.csv" for part in rows]


@pytest.fixture(scope="module")
def ccii(tmp_path_factory):
    root = tmp_path_factory.mktemp("classification") / "CC-CCII"
    lists = _ccii(root)
    volumes = collect(lists, [root], classes=CHAIN.classes)
    prepare(volumes, root.parent / "cache", CHAIN, 0, progress=False)  # without Dask: sooner
    return root, lists


def test_a_changed_label_needs_no_new_voxels(ccii, tmp_path):
    root, lists = ccii
    cache = tmp_path / "cache"
    first = prepare(collect(lists, [root], classes=CHAIN.classes), cache, CHAIN, 0, progress=False)
    assert (first.done, first.training, first.validation) == (36, 24, 12)
    before = Cache.open(cache, CHAIN)
    files = {path: path.stat().st_mtime_ns for path in (cache / "volumes").iterdir()}
    entry = before.entries[0]
    assert entry.id == "CC-CCII/CP/0/0"
    volume = load(root / "CP/0/0")
    assert (entry.shape, entry.class_label) == (volume.voxels.shape, "CP")

    path = tmp_path / "l.csv"
    path.write_text("path,label\n" + "".join(f"{e.id[8:]},NCP\n" for e in before.entries[:2]))
    volumes = collect([path], [root], classes=CHAIN.classes)
    again = prepare(volumes, cache, CHAIN, 0, progress=False)
    assert (again.done, again.skipped) == (0, 2)
    assert {path: path.stat().st_mtime_ns for path in (cache / "volumes").iterdir()} == files
    after = Cache.open(cache, CHAIN)
    assert after.entries[0] == dataclasses.replace(entry, class_label="NCP", section="training")
    assert [class_of(after, one) for one in after.entries[:3]] == [2, 2, 1]
    one, other = ([Part("ct", c, c.entries, 1.0)] for c in (before, after))
    assert fingerprint(one) != fingerprint(other)

    # The same cache without classes, then with others: what is stored is the same.
    plain = Chain(**{f.name: getattr(CHAIN, f.name) for f in dataclasses.fields(Chain)})
    prepare(collect([path], [root]), cache, plain, 0, progress=False)
    two = dataclasses.replace(CHAIN, classes=(("healthy", (0,)), ("ill", (1, 2))))
    named = dataclasses.replace(CHAIN, classes=(("Normal", (0,)), ("CP", (1,))))
    assert Cache.open(cache, plain).entries == after.entries
    assert fingerprint([Part("ct", Cache.open(cache, plain), after.entries, 1.0)]) == fingerprint(
        [Part("ct", Cache.open(cache, plain), before.entries, 1.0)]
    )
    with pytest.raises(InputError, match="found the label 'NCP', expected one of healthy, 0, ill"):
        class_of(Cache.open(cache, two), after.entries[0])
    assert class_of(Cache.open(cache, named), after.entries[2]) == 1
    assert verify(cache, 1, progress=False).intact == 36


def test_a_volume_without_a_label_is_told(ccii, tmp_path):
    root, lists = ccii
    plain = Chain(**{f.name: getattr(CHAIN, f.name) for f in dataclasses.fields(Chain)})
    volumes = collect(lists, [root])[:2]
    prepare(volumes, tmp_path / "cache", plain, 0, progress=False)
    cache = Cache.open(tmp_path / "cache", CHAIN)
    with pytest.raises(InputError, match=r"Normal/0/0: found no label, expected one of Normal, 0,"):
        class_of(cache, next(entry for entry in cache.entries if "Normal" in entry.id))


def test_crops_are_near_the_middle(ccii, tmp_path, generator):
    root, lists = ccii
    chain = dataclasses.replace(CHAIN, fit="random_crop")
    volumes = collect(lists, [root], classes=CHAIN.classes)[-2:]
    prepare(volumes, tmp_path / "cache", chain, 0, progress=False)
    cache = Cache.open(tmp_path / "cache", chain)
    crops = MiddleCrops(size=SIZE, shift=(1, 9, 0))
    for entry in cache.entries:
        middle = middle_of(cache, entry, crops)
        images = collate_volumes([middle], crops=crops)["images"]
        np.testing.assert_array_equal(images[0, ..., 0], center_crop(cache.read_whole(entry), SIZE))
        drawn = [draw_volume(cache, entry, crops=crops, generator=generator) for _ in range(99)]
        places = [{one.corner[axis] for one in drawn} for axis in range(3)]
        assert entry.stored[:2] == (20, 20)
        assert places == [{1, 2, 3}, {0, 1, 2, 3, 4}, {middle.corner[2]}]


# ---- a run


def _values(root, lists, workdir, **changes):
    config = finetune_ccii.get_config()
    values = config.to_dict()
    common = {field.name for field in dataclasses.fields(encoders.Model)}
    values["model"] = {name: x for name, x in values["model"].items() if name in common}
    values["model"] |= {"encoder": "strided_cnn", "features": 8, "dtype": "float32"}
    values |= {"total_steps": 48, "log_every_steps": 1, "batch_size": 5}
    values["data"]["workers"] = 0
    values["data"]["sources"]["ct"] |= {
        "cache": str(root.parent / "cache"),
        "roots": (str(root),),
        "lists": tuple(map(str, lists)),
    }
    values["data"]["sources"]["ct"]["roots"] *= len(lists)
    values["data"]["sources"]["ct"]["chain"]["volume_size"] = SIZE
    values["crops"]["size"] = SIZE
    values["optimizer"] |= {"warmup_steps": 2, "learning_rate": 8e-3}
    values["validation"] |= {"every_steps": 16}
    values["checkpoint"]["every_steps"] = 100
    for name, value in changes.items():
        *sections, last = name.split("__")
        place = values
        for section in sections:
            place = place[section]
        place[last] = value
    return parse(values, str(workdir))


def _rows(workdir):
    rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {
        (row["step"], name): value
        for row in rows
        for name, value in row.items()
        if name in ("loss", "accuracy", "gradient_norm") or name.startswith("validation/")
    }


@pytest.fixture(scope="module")
def unbroken(ccii, tmp_path_factory):
    root, lists = ccii
    workdir = tmp_path_factory.mktemp("runs") / "unbroken"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ENCODERS, "strided_cnn", strided_cnn.ENCODER)
        patch.setitem(encoders.ENCODERS, "strided_cnn", strided_cnn.Settings)
        loop.run(_values(root, lists, workdir), workdir, METHOD)
    return workdir


def test_it_learns_and_says_what_it_found(unbroken):
    found = json.loads((unbroken / "cases.json").read_text("utf-8"))
    likely = [max(c["probabilities"], key=c["probabilities"].get) for c in found["cases"]]
    right = np.mean(
        [c["reference"] == name for c, name in zip(found["cases"], likely, strict=True)]
    )
    assert _rows(unbroken)[found["step"], "validation/accuracy"] == pytest.approx(right)
    output = "".join(path.read_text() for path in (unbroken / "logs").iterdir())
    assert "24 volumes to train on, 12 held out" in output
    assert "class 1 CP: 8 training volumes, 4 held out" in output
    assert "12 volumes of 6 patients" in output
    rows = _rows(unbroken)
    first, last = (np.mean([rows[step, "loss"] for step in range(a, a + 8)]) for a in (1, 41))
    assert last < 0.85 * first
    assert rows[48, "validation/auc"] > 0.9
    assert rows[48, "validation/auc_low"] <= rows[48, "validation/auc"]
    assert rows[48, "validation/auc"] == pytest.approx(
        np.mean([rows[48, f"validation/auc_{name}"] for name in NAMES])
    )
    assert sorted(path.name for path in (unbroken / "pictures").iterdir()) == [
        f"confusion_{step:07d}.png" for step in (16, 32, 48)
    ]
    card = read_card(unbroken / "classification.safetensors")
    assert card["classes"] == list(NAMES)
    assert card["classifier"] == [32, 3]
    assert card["task"] == "classification"


def test_preempted_it_goes_on_bit_for_bit(ccii, unbroken, tmp_path, monkeypatch):
    root, lists = ccii
    experiment = _values(root, lists, tmp_path / "broken")
    with monkeypatch.context() as patch:
        patch.setattr(distributed, "stop_before", lambda batch, _: "SIGTERM" * (batch == 13))
        with pytest.raises(loop.PreemptedError):
            loop.run(experiment, tmp_path / "broken", METHOD)
    loop.run(experiment, tmp_path / "broken", METHOD)
    assert _rows(tmp_path / "broken") == _rows(unbroken)
    ours, theirs = (f / "classification.safetensors" for f in (tmp_path / "broken", unbroken))
    assert ours.read_bytes() == theirs.read_bytes()


def test_microbatches_change_rounding_alone(ccii, tmp_path):
    root, lists = ccii

    def parameters(**changes):
        experiment = _values(root, lists, tmp_path, head__hidden=6, **changes)
        program = make_program(experiment, make_mesh(1, jax.devices()[:1]))
        generator = np.random.default_rng(0)
        batch = {
            name: jnp.asarray(generator.integers(0, 3, leaf.shape), leaf.dtype)
            for name, leaf in program.batch.items()
        }
        return jax.device_get(program.step(program.init(), batch)[0].params)

    whole, parts = parameters(model__crops_per_pass=0), parameters(model__crops_per_pass=1)
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=2e-5)


class _Constant:
    """A program that says the same of all volumes."""

    def __init__(self, program, logits):
        self.mesh, self._logits = program.mesh, logits
        self.predict = jax.jit(lambda state, batch: jnp.tile(self._logits, (5, 1)))


def _validator(unbroken, logits=(0.0, 0.0, 1.0), keep=lambda entry: True):
    experiment = parse(json.loads((unbroken / "config.json").read_text()))
    cache = Cache.open(experiment.data.sources["ct"].cache, experiment.data.sources["ct"].chain)
    entries = tuple(e for e in cache.entries if e.section == "validation" and keep(e))
    program = make_program(experiment, make_mesh(1, jax.devices()[:1]))
    constant = _Constant(program, jnp.asarray(logits))
    return ClassValidator(experiment, [Part("ct", cache, entries, 1.0)], constant)


def test_one_class_for_all_is_warned_of(unbroken):
    found = _validator(unbroken)({"none": jnp.zeros(())}, 5)
    (finding,) = found.findings
    assert "all 12 held-out volumes are predicted 'NCP'; the learning rate is" in finding.text
    assert (finding.kind, "optimizer.learning_rate" in finding.advice) == ("chance", True)
    assert (found.metrics["auc"], found.score) == (0.5, 0.5)
    assert found.metrics["accuracy"] == pytest.approx(1 / 3)
    assert "AUC 0.5000 (0.500 to 0.500), accuracy 0.3333" in found.text


def test_held_out_volumes_of_one_class_are_told(unbroken):
    with pytest.raises(InputError, match="all 4 held-out volumes are of the class 'CP', expected"):
        _validator(unbroken, keep=lambda entry: "/CP/" in entry.id)


def test_training_volumes_of_one_class_are_told(unbroken):
    experiment = parse(json.loads((unbroken / "config.json").read_text()))
    source = experiment.data.sources["ct"]
    cache = Cache.open(source.cache, source.chain)

    def part(*names):
        entries = tuple(e for e in cache.entries if any(f"/{n}/" in e.id for n in names))
        return [Part("ct", cache, entries, 1.0)]

    with pytest.raises(InputError, match="all 12 training volumes are of the class 'CP', expected"):
        describe_classes(part("CP"), [], NAMES)
    lines = describe_classes(part("CP", "Normal"), part("NCP"), NAMES)
    assert lines[2:] == [
        "  class 2 NCP: 0 training volumes, 12 held out",
        "WARNING: no training volume is NCP: it will never be predicted",
    ]


# ---- prediction


def _predict(weights, images, output, *flags):
    files = [str(weights)] if not isinstance(weights, list) else list(map(str, weights))
    given = ["--input", str(images), "--output", str(output), *flags]
    return main(["--weights", *files, *given])


def _table(output):
    with (output / "predictions.csv").open() as file:
        return {row["image"]: row for row in csv.DictReader(file)}


def test_predictions_are_those_of_the_validation(ccii, unbroken, tmp_path, capsys):
    root, _ = ccii
    weights = unbroken / "classification.safetensors"
    assert _predict(weights, root, tmp_path / "all") == 0
    assert "36 of 36 images done" in capsys.readouterr().out
    table = _table(tmp_path / "all")
    held_out = {name: row for name, row in table.items() if name.split("/")[1] in "45"}
    assert len(held_out) == 12
    right = np.mean([name.startswith(row["predicted"] + "/") for name, row in held_out.items()])
    rows = _rows(unbroken)
    assert right == pytest.approx(rows[48, "validation/accuracy"])
    probabilities = np.array(
        [[float(r[f"probability_{n}"]) for n in NAMES] for r in table.values()]
    )
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-5)
    cross_entropy = -np.mean(
        [np.log(float(row[f"probability_{name.split('/')[0]}"])) for name, row in held_out.items()]
    )
    assert cross_entropy == pytest.approx(rows[48, "validation/cross_entropy"], abs=1e-3)
    report = json.loads((tmp_path / "all" / "report.json").read_text())
    assert (report["task"], report["classes"]) == ("classification", list(NAMES))
    assert report["weights"][0]["sha256"] == read_card(weights)["sha256"]
    assert len(report["files"]) == 36


def test_an_ensemble_is_the_mean_of_its_probabilities(ccii, unbroken, tmp_path):
    root, _ = ccii
    one, other = unbroken / "classification.safetensors", tmp_path / "other.safetensors"
    save_file({name: 1.5 * array for name, array in load_file(one).items()}, other)
    card = json.loads((unbroken / f"{one.name}.json").read_text())
    (tmp_path / f"{other.name}.json").write_text(json.dumps({**card, "sha256": None}))
    both = [one, other]
    found = []
    for number, weights in enumerate([both[0], both[1], both]):
        assert _predict(weights, root / "CP" / "0", tmp_path / str(number)) == 0
        rows = _table(tmp_path / str(number))
        found.append([[float(r[f"probability_{n}"]) for n in NAMES] for r in rows.values()])
    np.testing.assert_allclose(found[2], np.mean(found[:2], axis=0), atol=2e-6)
    assert _predict(both[0], root / "CP" / "0", tmp_path / "mirror", "--mirror", "xy") == 0


def test_one_bad_image_does_not_stop_the_others(ccii, unbroken, tmp_path, capsys):
    root, _ = ccii
    for name, path in (("a", root / "CP/0/0"), ("b", root / "CP/0/1")):
        _save(tmp_path / "in" / name, [np.asarray(Image.open(p)) for p in sorted(path.iterdir())])
    (tmp_path / "in" / "a" / "3.png").write_bytes(b"")
    weights = unbroken / "classification.safetensors"
    assert _predict(weights, tmp_path / "in", tmp_path / "out") == 1
    assert "a: damaged slice: 3.png" in capsys.readouterr().err
    assert list(_table(tmp_path / "out")) == ["b"]


def test_wrong_flags(ccii, unbroken, tmp_path, capsys):
    root, _ = ccii
    weights = unbroken / "classification.safetensors"
    assert _predict(weights, root, tmp_path, "--preview") == 2
    assert "--preview: found it with weights for classification" in capsys.readouterr().err
    assert _predict(weights, root, tmp_path, "--config", "configs/demo.py") == 2
    assert "task: found 'voco', expected 'segmentation' or 'classification'" in (
        capsys.readouterr().err
    )
    with pytest.raises(InputError, match="task: found 'classification', expected 'segmentation'"):
        load_segmenter([weights])
    assert read_experiments([weights]).task == "classification"


# ---- settings that cannot be


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"crops__shift": (1, 0, 0)}, r"crops.shift: found \(1, 0, 0\) with data.sources.ct.chain"),
        ({"crops__size": (32, 32, 32)}, "chain.volume_size: found .* expected crops.size"),
        ({"head__hidden": -1}, "head.hidden: found -1"),
        ({"augment__rotate_probability": 0.5, "crops__size": (8, 16, 8)}, "expected crops.size"),
        ({"data__folds": 1}, "fold: found 0 of 1"),
        (
            {"data__sources__ct__chain__classes": (("a", (0,)),)},
            "chain.classes: found a, expected 2 to 256",
        ),
        (
            {"data__sources__ct__chain__classes": (("a", (0,)), ("b", (0,)))},
            "classes: found the names a, b with the values",
        ),
        (
            {"data__sources__ct__chain__classes": (("1", (0,)), ("b", (1,)))},
            "classes: found 1 as the name of a class and as a value of another",
        ),
    ],
)
def test_impossible_settings(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        _values(tmp_path, ["a.csv"], tmp_path, **changes)


# ---- phantoms


def test_lesions_are_all_that_differs(tmp_path):
    """In the liver alone, and not where there are none."""
    shape = (48, 48, 24)
    path = make_phantoms(tmp_path, 2, 3, shape, lesions=True)
    entries = json.loads(path.read_text())["training"]
    assert [entry["label"] for entry in entries] == [0, 1]
    stored = [np.asarray(nibabel.load(tmp_path / e["image"]).dataobj) for e in entries]
    for index, found in enumerate(stored):
        plain, organs = (image for image in phantom(3, index, shape))
        slope, intercept = plain.header.get_slope_inter()
        differs = np.abs(found - (plain.dataobj * slope + intercept)) > 1
        assert differs.any() == (index == 1)
        blurred = np.asarray(organs.dataobj) == 2
        for axis, step in itertools.product(range(3), (-1, 1)):
            blurred = blurred | np.roll(np.asarray(organs.dataobj) == 2, step, axis)
        assert (differs & blurred).sum() >= 0.8 * differs.sum()
