"""Fine-tuning for segmentation: its losses and step, a whole run through the loop, prediction."""

import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import nibabel
import numpy as np
import pytest
import scans
import segmentation_main
import strided_cnn
from conftest import shared_file

from configs import finetune_btcv, finetune_hippocampus
from voco_jax.config import encoders
from voco_jax.config.load import parse
from voco_jax.data.cache import Cache
from voco_jax.data.formats.readers import load as load_volume
from voco_jax.data.formats.stored import VolumeError
from voco_jax.errors import InputError
from voco_jax.evaluation.dicom_seg import write_dicom_seg
from voco_jax.evaluation.masks import write_mask
from voco_jax.evaluation.metrics import count_overlap, dice
from voco_jax.evaluation.predict import Segmenter, load_segmenter, main
from voco_jax.evaluation.sliding_window import Windows
from voco_jax.finetune import augment, losses
from voco_jax.finetune.segmentation import METHOD, describe_classes, make_program
from voco_jax.interop.card import read_card
from voco_jax.models.encoders import ENCODERS
from voco_jax.training import loop
from voco_jax.training.mesh import make_mesh

ROOT = Path(__file__).resolve().parents[1]
PREEMPTED = 75


@pytest.fixture(autouse=True)
def _second_encoder(monkeypatch):
    monkeypatch.setitem(ENCODERS, "strided_cnn", strided_cnn.ENCODER)
    monkeypatch.setitem(encoders.ENCODERS, "strided_cnn", strided_cnn.Settings)


# ---- losses


@pytest.mark.parametrize("include_background", [False, True])
@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize(("nr", "dr"), [(0.0, 1e-6), (1e-5, 1e-5)])
def test_loss_is_monais(generator, include_background, batch, nr, dr):
    """DiceCELoss and its gradient, float64; one class is in no crop."""
    import torch
    from monai.losses import DiceCELoss

    logits = 2 * generator.normal(size=(2, 4, 5, 6, 4))
    labels = generator.integers(0, 3, (2, 4, 5, 6))
    theirs = torch.from_numpy(np.moveaxis(logits, -1, 1).copy()).requires_grad_()
    loss = DiceCELoss(
        include_background=include_background,
        to_onehot_y=True,
        softmax=True,
        smooth_nr=nr,
        smooth_dr=dr,
        batch=batch,
        lambda_dice=0.7,
        lambda_ce=1.3,
    )(theirs, torch.from_numpy(labels)[:, None])
    loss.backward()

    def ours(logits):
        found = losses.dice_loss(
            logits,
            jnp.asarray(labels),
            include_background=include_background,
            smooth_nr=nr,
            smooth_dr=dr,
            batch=batch,
        )
        return 0.7 * found + 1.3 * losses.cross_entropy(logits, jnp.asarray(labels))

    with jax.enable_x64(True):
        value, gradient = jax.value_and_grad(ours)(jnp.asarray(logits))
    assert abs(float(value) - loss.item()) < 1e-12
    expected = np.moveaxis(theirs.grad.numpy(), 1, -1)
    np.testing.assert_allclose(gradient, expected, rtol=1e-9, atol=1e-14)


# ---- augmentation


def _draws(count, **changes):
    options = finetune_btcv.get_config().augment.to_dict()
    options = {name: (0.0, 0.0, 0.0) if name == "flip_probability" else 0.0 for name in options}
    return augment.draw(jax.random.key(1), count, **{**options, **changes})


def test_labels_go_where_their_images_go():
    images = jnp.asarray(np.random.default_rng(0).random((32, 6, 6, 4, 2)), jnp.float32)
    labels = (images[..., 1] * 1000).astype(jnp.int32)
    draws = _draws(32, flip_probability=(0.5, 0.5, 0.5), rotate_probability=0.7)
    moved, with_them = augment.apply(images, labels, draws)
    np.testing.assert_array_equal((moved[..., 1] * 1000).astype(jnp.int32), with_them)
    assert (moved != images).any(axis=(1, 2, 3, 4)).mean() > 0.7


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"scale_probability": 1.0, "scale": 0.3}, lambda x, d: x * d.scales),
        ({"shift_probability": 1.0, "shift": 0.3}, lambda x, d: x + d.shifts),
        ({"gamma_probability": 1.0, "gamma": 0.5}, lambda x, d: x**d.exponents),
        ({}, lambda x, d: x),
    ],
)
def test_intensities_change_and_labels_do_not(changes, expected):
    images = jnp.full((64, 2, 2, 2, 1), 0.4)
    labels = jnp.ones((64, 2, 2, 2), jnp.int32)
    draws = _draws(64, **changes)
    found, same = augment.apply(images, labels, draws)
    np.testing.assert_array_equal(same, labels)
    np.testing.assert_allclose(found[:, 0, 0, 0, 0], expected(np.float32(0.4), draws), rtol=1e-5)
    if changes:
        assert np.unique(np.asarray(found[:, 0, 0, 0, 0])).size > 32


def test_noise_has_its_deviation():
    images = jnp.zeros((200, 8, 8, 8, 1))
    draws = _draws(200, noise_probability=0.5, noise=0.2)
    found, _ = augment.apply(images, images[..., 0].astype(jnp.int32), draws)
    np.testing.assert_allclose(found.std(axis=(1, 2, 3, 4)), draws.deviations, rtol=0.1, atol=1e-6)
    assert 0.35 < (np.asarray(draws.deviations) == 0).mean() < 0.65


# ---- the step


def _program(**changes):
    values = segmentation_main.get_config()
    for name, value in changes.items():
        *sections, last = name.split("__")
        place = values
        for section in sections:
            place = place[section]
        place[last] = value
    return make_program(parse(values, "/nowhere"), make_mesh(1, jax.devices()[:1]))


def _batch(program):
    generator = np.random.default_rng(0)
    return {
        name: jnp.asarray(
            generator.integers(0, 6 if name == "labels" else 256, leaf.shape), leaf.dtype
        )
        for name, leaf in program.batch.items()
    }


def _one_step(program):
    state = program.init()
    before = jax.device_get(state.params)
    state, metrics = program.step(state, _batch(program))
    state, metrics = program.step(state, _batch(program))
    return before, jax.device_get(state.params), jax.device_get(metrics)


def test_microbatches_change_rounding_alone():
    whole, parts = _one_step(_program()), _one_step(_program(model__crops_per_pass=1))
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=2e-5)


def test_a_frozen_encoder_stays_and_the_decoder_learns():
    before, after, metrics = _one_step(_program(optimizer__freeze_encoder=True))
    for name in before:
        same = jax.tree.map(np.array_equal, before[name], after[name])
        assert all(jax.tree.leaves(same)) == name.startswith("conv")
    assert metrics["gradient_norm"] > 0


# ---- a run


def _start(workdir, *flags):
    script = "tests/segmentation_main.py"
    command = [sys.executable, script, f"--config={script}", f"--workdir={workdir}", *flags]
    environment = {**os.environ, "PYTHONPATH": "."}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **pipes)


def _finish(process, status=0):
    output = process.communicate(timeout=300)[0]
    assert process.returncode == status, output
    return output


def _rows(workdir):
    path = workdir / "metrics.jsonl"
    rows = map(json.loads, path.read_text().splitlines())
    return {
        (row["step"], name): value
        for row in rows
        for name, value in row.items()
        if name in ("loss", "gradient_norm") or name.startswith("validation/")
    }


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("segmentation") / "unbroken"
    return workdir, _finish(_start(workdir))


def test_it_trains_validates_and_says_what_it_found(unbroken):
    workdir, output = unbroken
    assert "class 1 lungs: in 4 training volumes" in output
    # A class that no volume has: said, and no part of the mean.
    assert "WARNING: no training volume has bladder: it will never be predicted" in output
    assert "bladder in none)" in output
    assert "validation at step 12: Dice" in output
    assert "on the files' grids (lungs " in output
    rows = _rows(workdir)
    assert rows[12, "loss"] < 0.8 * rows[1, "loss"]
    assert sorted(path.name for path in (workdir / "pictures").iterdir()) == [
        f"segmentations_{step:07d}.png" for step in (4, 8, 12)
    ]
    found = json.loads((workdir / "cases.json").read_text("utf-8"))
    assert found["step"] == 12
    for name in ("lungs", "liver"):  # the cases are what the means are of
        values = [case["dice"][name] for case in found["cases"]]
        known = [value for value in values if value is not None]
        assert rows[12, f"validation/dice_{name}"] == pytest.approx(np.mean(known))
    assert {case["dice_resampled"]["bladder"] for case in found["cases"]} == {None}
    card = read_card(workdir / "segmentation.safetensors")
    assert card["classes"] == ["background", "lungs", "liver", "spleen", "kidneys", "bladder"]
    assert card["chain"]["spacing"] == [12.0, 12.0, 12.0]
    assert card["crop_size"] == [32, 32, 16]


def test_killed_and_preempted_it_goes_on_bit_for_bit(unbroken, tmp_path):
    workdir = tmp_path / "broken"
    killed = _start(workdir)
    for _ in itertools.takewhile(lambda _: killed.poll() is None, itertools.count()):
        if (workdir / "checkpoints" / "3").exists():
            break
        time.sleep(0.01)
    killed.kill()
    killed.communicate()
    preempted = _start(workdir, "--config.validation.every_steps=4")
    for line in preempted.stdout:
        if "compiled in" in line:
            break
    preempted.send_signal(signal.SIGTERM)
    assert "preempted (SIGTERM); saved step" in _finish(preempted, PREEMPTED)
    assert "resuming at step" in _finish(_start(workdir))
    assert _rows(workdir) == _rows(unbroken[0])
    ours, theirs = (folder / "segmentation.safetensors" for folder in (workdir, unbroken[0]))
    assert ours.read_bytes() == theirs.read_bytes()


def test_twins_start_elsewhere(unbroken, tmp_path, capsys):
    """From the file every key is told; scratch and shuffled say what they are."""
    weights = unbroken[0] / "segmentation.safetensors"
    firsts = {}
    for twin, said in (
        ("none", "10 matched, 0 missing, 0 unexpected, 0 of another shape"),
        ("scratch", "is left aside (init.twin)"),
        ("shuffled", "in a random order"),
    ):
        values = segmentation_main.get_config() | {"init_from": str(weights), "total_steps": 3}
        values["data"]["sources"]["ct"]["cache"] = str(unbroken[0] / "cache")
        values["init"]["twin"] = twin
        values["validation"]["every_steps"] = 0
        loop.run(parse(values, str(tmp_path / twin)), tmp_path / twin, METHOD)
        assert said in capsys.readouterr().out
        firsts[twin] = _rows(tmp_path / twin)[1, "loss"]
    assert firsts["none"] < firsts["scratch"]
    assert firsts["scratch"] == _rows(unbroken[0])[1, "loss"]
    assert len(set(firsts.values())) == 3


# ---- prediction


@pytest.fixture(scope="module")
def weights(unbroken):
    return unbroken[0] / "segmentation.safetensors"


def test_masks_are_those_of_the_validation(unbroken, weights, tmp_path, capsys):
    """On the phantom's own grid, header and axes; Dice as the run found it."""
    workdir, _ = unbroken
    cache = Cache.open(
        workdir / "cache", parse(read_card(weights)["config"]).data.sources["ct"].chain
    )
    held_out = json.loads((workdir / "volumes.json").read_text())["ct"]["held_out"]
    entries = [entry for entry in cache.entries if entry.id in held_out]
    found = []
    for entry in entries:
        flags = ["--weights", str(weights), "--input", entry.path, "--output", str(tmp_path)]
        assert main([*flags, "--overlap", "0.25", "--preview"]) == 0
        name = Path(entry.path).name
        image, mask = nibabel.load(entry.path), nibabel.load(tmp_path / name)
        np.testing.assert_array_equal(mask.affine, image.affine)
        assert mask.shape == image.shape
        assert mask.get_data_dtype() == np.uint8
        assert mask.header["qform_code"] == image.header["qform_code"]
        label = np.asarray(nibabel.load(entry.label.path).dataobj)
        found.append(dice(count_overlap(label, np.asarray(mask.dataobj), 6)))
        values = json.loads((tmp_path / "statistics.json").read_text())
        ml = values[name.removesuffix(".nii.gz")]["lungs"]["volume_ml"]
        voxel = abs(np.linalg.det(image.affine[:3, :3])) / 1000
        assert ml == pytest.approx((np.asarray(mask.dataobj) == 1).sum() * voxel, rel=1e-4)
        assert (tmp_path / name.replace(".nii.gz", ".png")).exists()
    assert "lungs" in capsys.readouterr().out
    rows = _rows(workdir)
    means = np.stack(found)[:, :5].mean(axis=0)
    for number, name in enumerate(("lungs", "liver", "spleen", "kidneys"), 1):
        assert means[number] == pytest.approx(rows[12, f"validation/dice_{name}"], abs=1e-3)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["weights"][0]["sha256"] == read_card(weights)["sha256"]


def _threshold(volume, window=(-175.0, 250.0)):
    """A segmenter that knows no more than whether a voxel is in the upper half of the window."""
    config = finetune_hippocampus.get_config()
    chain = config.data.sources.mr.chain
    chain.window, chain.window_unit, chain.volume_size = window, "value", (64, 64, 64)
    config.crops.size = (64, 64, 64)

    def predict(windows):
        above = jnp.asarray(windows[..., 0], jnp.float32) - 127.5
        return jnp.stack([jnp.zeros_like(above), above, jnp.full_like(above, -1e9)], -1)

    windows = Windows((64, 64, 64), 0.0, "constant", 4)
    return Segmenter(parse(config), (), predict, windows)([volume])


@pytest.mark.parametrize(
    "name",
    [
        *(
            f"ct/images/{one}"
            for one in ("abdomen_acrin_001", "abdomen_totalseg", "heart_totalseg")
        ),
        *(f"ct/images/{one}" for one in ("chest_lungdx_a0001", "headneck_kbp_247")),
        *(f"sarcoma/{one}" for one in ("STS_001_CT_image", "STS_002_MR_T1_image")),
    ],
)
def test_masks_lie_on_real_images_voxel_for_voxel(name, tmp_path):
    """Whatever their axes, shape, dtype and header: the mask is the image above a threshold."""
    path = shared_file(*f"{name}.nii.gz".split("/"))
    image = nibabel.load(path)
    write_mask(_threshold(stored := load_volume(path)), stored, tmp_path / "mask.nii.gz")
    mask = nibabel.load(tmp_path / "mask.nii.gz")
    values = (image.get_fdata(dtype=np.float32) + 175) / 425
    expected = np.rint(np.clip(values, 0, 1) * 255) > 127
    np.testing.assert_array_equal(np.asarray(mask.dataobj), expected)
    np.testing.assert_array_equal(mask.affine, image.affine)
    for field in ("pixdim", "qform_code", "sform_code", "xyzt_units", "srow_x", "quatern_b"):
        np.testing.assert_array_equal(mask.header[field], image.header[field])
    assert expected.any()


def sitk_image(hu, spacing, origin):
    import SimpleITK

    image = SimpleITK.GetImageFromArray(hu.astype(np.int16).transpose(2, 1, 0))
    image.SetSpacing(spacing)
    image.SetOrigin(origin)
    return image


def test_a_mask_of_a_dicom_series_lies_on_it(tmp_path):
    """Read back by ITK's axes: dcm2niix and ITK put the series' voxels where the mask's are."""
    sitk = pytest.importorskip("SimpleITK")
    hu = scans.body((40, 36, 20))
    image = sitk_image(hu, (2.0, 2.5, 3.0), (5.0, -7.0, 11.0))
    scans.save_series(tmp_path / "series", image)
    stored = load_volume(tmp_path / "series")
    write_mask(_threshold(stored), stored, tmp_path / "mask.nii.gz")
    mask = sitk.ReadImage(str(tmp_path / "mask.nii.gz"))
    np.testing.assert_allclose(mask.GetOrigin(), image.GetOrigin(), atol=1e-4)
    np.testing.assert_allclose(mask.GetDirection(), image.GetDirection(), atol=1e-6)
    np.testing.assert_allclose(mask.GetSpacing(), image.GetSpacing(), atol=1e-5)
    expected = np.rint(np.clip((hu.astype(np.int16) + 175.0) / 425, 0, 1) * 255) > 127
    np.testing.assert_array_equal(sitk.GetArrayFromImage(mask).transpose(2, 1, 0), expected)


def test_a_dicom_segmentation_refers_to_its_series(tmp_path):
    """Read by highdicom in its own axes: every voxel lies where the NIfTI mask has it."""
    pytest.importorskip("SimpleITK")
    highdicom = pytest.importorskip("highdicom", reason="needs highdicom")
    from pydicom import dcmread

    hu = scans.body((40, 36, 20))
    image = sitk_image(hu, (2.0, 2.5, 3.0), (5.0, -7.0, 11.0))
    folder = tmp_path / "series"
    scans.save_series(folder, image)
    stored = load_volume(folder)
    labels = _threshold(stored)
    labels[labels.shape[0] // 2 :] *= 3  # classes 1 and 3 of 4
    names = ("background", "left", "nothing", "right")
    in_file = nibabel.apply_orientation(labels, nibabel.orientations.axcodes2ornt(stored.axes))
    with pytest.raises(
        VolumeError, match=r"referred to by a DICOM-SEG .*Frame Of Reference UID.*--format nifti"
    ):
        write_dicom_seg(in_file, stored, names, tmp_path / "seg.dcm")
    for path in folder.iterdir():
        one = dcmread(path)
        one.FrameOfReferenceUID = "1.2.9"
        one.save_as(path)
    write_dicom_seg(in_file, stored, names, tmp_path / "seg.dcm")
    write_mask(labels, stored, tmp_path / "mask.nii.gz")
    found = highdicom.seg.segread(tmp_path / "seg.dcm")
    assert [found.get_segment_description(n).segment_label for n in (1, 2)] == ["left", "right"]
    volume = found.get_volume(combine_segments=True)
    to_ras = np.diag([-1.0, -1.0, 1.0, 1.0])
    theirs = nibabel.as_closest_canonical(
        nibabel.Nifti1Image(volume.array.astype(np.uint8), to_ras @ volume.affine)
    )
    ours = nibabel.as_closest_canonical(nibabel.load(tmp_path / "mask.nii.gz"))
    first = np.linalg.inv(ours.affine) @ theirs.affine @ np.array([0, 0, 0, 1.0])
    assert np.abs(first - np.rint(first)).max() < 1e-3  # empty slices at its ends are left out
    part = tuple(slice(round(a), round(a) + n) for a, n in zip(first, theirs.shape, strict=False))
    expected = np.array([0, 1, 0, 2])[np.asarray(ours.dataobj)]
    np.testing.assert_array_equal(np.asarray(theirs.dataobj), expected[part])
    assert (expected > 0).sum() == (np.asarray(theirs.dataobj) > 0).sum() > 100
    assert {1, 2} == set(np.unique(expected)) - {0}
    references = found.ReferencedSeriesSequence[0].ReferencedInstanceSequence
    assert len(references) == 20
    empty = np.zeros_like(in_file)
    with pytest.raises(VolumeError, match="nothing found"):
        write_dicom_seg(empty, stored, names, tmp_path / "none.dcm")
    other = dataclasses.replace(stored, path=tmp_path / "mask.nii.gz")
    with pytest.raises(VolumeError, match="no DICOM series"):
        write_dicom_seg(in_file, other, names, tmp_path / "none.dcm")
    assert not (tmp_path / "none.dcm").exists()


def test_an_ensemble_of_one_twice_is_one(weights, generator):
    one, two = load_segmenter([weights]), load_segmenter([weights, weights])
    windows = generator.integers(0, 256, (1, 32, 32, 16, 1), dtype=np.uint8)
    np.testing.assert_allclose(one.predict(windows), two.predict(windows), rtol=1e-5, atol=1e-6)


def test_mirroring_is_the_mean_of_the_flipped(weights, generator):
    one, both = load_segmenter([weights]), load_segmenter([weights], mirror="xz")
    windows = generator.integers(0, 256, (1, 32, 32, 16, 1), dtype=np.uint8)
    expected = np.mean(
        [np.flip(one.predict(np.flip(windows, axes)), axes) for axes in ((), (1,), (3,), (1, 3))],
        axis=0,
    )
    np.testing.assert_allclose(both.predict(windows), expected, rtol=1e-4, atol=1e-5)


def test_a_volume_smaller_than_a_window_is_padded(weights, tmp_path):
    image = np.full((9, 12, 8), -1000, np.int16)
    image[2:7, 3:9, 2:6] = 60 + np.arange(20).reshape(5, 1, 4)
    nibabel.save(nibabel.Nifti1Image(image, np.diag([10, 10, 11, 1])), tmp_path / "small.nii.gz")
    flags = ["--weights", str(weights), "--input", str(tmp_path / "small.nii.gz")]
    assert main([*flags, "--output", str(tmp_path / "masks")]) == 0
    assert nibabel.load(tmp_path / "masks" / "small.nii.gz").shape == image.shape


def test_one_bad_image_does_not_stop_the_others(weights, unbroken, tmp_path, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    phantom = next((unbroken[0] / "phantoms").glob("phantom_*.nii.gz"))
    (folder / "a.nii.gz").write_bytes(phantom.read_bytes()[:5000])
    (folder / "b.nii.gz").write_bytes(phantom.read_bytes())
    flags = ["--weights", str(weights), "--input", str(folder), "--output", str(tmp_path / "m")]
    assert main(flags) == 1
    assert "a.nii.gz: truncated gzip" in capsys.readouterr().err
    report = json.loads((tmp_path / "m" / "report.json").read_text())
    assert [bool(one["problem"]) for one in report["files"]] == [True, False]
    assert (tmp_path / "m" / "b.nii.gz").exists()


def test_the_same_command_does_what_is_missing(weights, unbroken, tmp_path, capsys):
    """As after a kill: what is whole is kept, with its statistics; what changed is done again."""
    images, output = tmp_path / "images", tmp_path / "masks"
    images.mkdir()
    phantoms = sorted((unbroken[0] / "phantoms").glob("phantom_*.nii.gz"))[:4]
    for name, phantom in zip("abcd", phantoms, strict=True):
        (images / f"{name}.nii.gz").write_bytes(phantom.read_bytes())

    def run(*flags):
        command = ["--weights", str(weights), "--input", str(images), "--output", str(output)]
        assert main([*command, "--overlap", "0", *flags]) == 0
        mean = json.loads((output / "statistics.json").read_text())
        files = json.loads((output / "report.json").read_text())["files"]
        assert sorted(mean) == [Path(one["input"]).name[0] for one in files] == list("abcd")
        times = {one: (output / f"{one}.nii.gz").stat().st_mtime_ns for one in "abcd"}
        return mean, times, capsys.readouterr().out

    first, times, _ = run()
    journal = output / "journal.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[:4]) + lines[4][:20])  # killed while it wrote d's line
    (output / "a.nii.gz").unlink()
    (images / "b.nii.gz").write_bytes(phantoms[3].read_bytes())
    second, later, said = run()
    assert "1 of 4 images were done before; kept" in said
    assert {one for one in "abcd" if later[one] == times[one]} == {"c"}
    assert second["c"] == first["c"]
    assert "4 of 4 images were done before; kept" in run()[2]
    assert "done before" not in run("--mirror", "z")[2]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--weights", "nothing.safetensors"], "nothing.safetensors: no such file"),
        (["--overlap", "1"], "--overlap: found 1.0, expected 0 to 0.9"),
        (["--mirror", "xx"], "--mirror: found 'xx', expected some of x, y, z"),
        (["--input", "nowhere"], "no such file or folder"),
        (["--config.seed=1"], "--config.seed: found it without --config"),
        (["--config", "configs/demo.py"], "configs/demo.py: task: found 'voco', expected 'segmen"),
    ],
)
def test_wrong_flags(weights, flags, message, tmp_path, capsys):
    given = {"--weights": str(weights), "--input": str(weights), "--output": str(tmp_path)}
    if len(flags) == 2:
        given[flags[0]] = flags[1]
    rest = flags if len(flags) == 1 else []
    assert main([*(text for pair in given.items() for text in pair), *rest]) == 2
    assert message in capsys.readouterr().err


def test_weights_of_another_task_are_told(weights, tmp_path, capsys):
    card = json.loads(Path(f"{weights}.json").read_text())
    other = tmp_path / "other.safetensors"
    other.write_bytes(weights.read_bytes())
    flags = ["--weights", str(other), "--input", str(weights), "--output", str(tmp_path)]
    assert main(flags) == 2
    assert "found no card beside it (other.safetensors.json)" in capsys.readouterr().err
    del card["config"]["crops"]
    Path(f"{other}.json").write_text(json.dumps(card))
    assert main(flags) == 2
    assert "its card is of another version: config: crops: missing" in capsys.readouterr().err


# ---- settings and data that cannot be


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"crops__size": (32, 32, 32)}, "chain.volume_size: found .* expected crops.size"),
        ({"data__folds": 1}, "fold: found 0 of 1"),
        ({"init__twin": "shuffled"}, "init.twin: found 'shuffled' without init_from"),
        ({"model__crops_per_pass": 1, "loss__batch": True}, "model.crops_per_pass: found 1 with"),
        ({"optimizer__warmup_steps": 12}, "optimizer.warmup_steps: found 12"),
        ({"model__encoder": "unet"}, "model.encoder: found 'unet'"),
    ],
)
def test_impossible_settings(changes, message):
    with pytest.raises(InputError, match=message):
        _program(**changes)


def test_a_swin_unetr_needs_crops_of_32():
    config = finetune_hippocampus.get_config()
    config.crops.size = (24, 64, 32)
    config.data.sources.mr.chain.volume_size = (24, 64, 32)
    with pytest.raises(InputError, match=r"crops.size: crop size: found \(24, 64, 32\)"):
        make_program(parse(config), make_mesh(1, jax.devices()[:1]))


def test_volumes_without_any_class_are_told(unbroken):
    from voco_jax.data.pipeline import Part

    chain = (
        parse(read_card(unbroken[0] / "segmentation.safetensors")["config"])
        .data.sources["ct"]
        .chain
    )
    cache = Cache.open(unbroken[0] / "cache", chain)
    label = cache.entries[0].label
    assert label is not None
    empty = dataclasses.replace(label, chunks=((),) * 5)
    entry = dataclasses.replace(cache.entries[0], label=empty)
    names = ("background", "lungs", "liver", "spleen", "kidneys", "bladder")
    with pytest.raises(InputError, match="all 1 training volumes are background alone"):
        describe_classes([Part("ct", cache, (entry,), 1.0)], names)
    some = dataclasses.replace(empty, chunks=(((0, 5),), (), (), (), ()))
    entry = dataclasses.replace(entry, label=some)
    lines = describe_classes([Part("ct", cache, (entry,), 1.0)], names)
    assert "WARNING: no training volume has liver, spleen, kidneys, bladder" in lines[-1]
