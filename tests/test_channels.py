"""Images of several channels, a file each: lists, cache, training, prediction."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import nibabel
import numpy as np
import pytest
import segmentation_main
import strided_cnn

from configs import finetune_brats, finetune_demo
from voco_jax.config import encoders as settings
from voco_jax.config.common import LabelledChain
from voco_jax.config.finetuning import SegmentationFinetuning
from voco_jax.config.load import parse
from voco_jax.data.cache import Cache
from voco_jax.data.datalists import read_list
from voco_jax.data.folds import split_patients
from voco_jax.data.prepare import prepare
from voco_jax.data.verify import verify
from voco_jax.errors import InputError
from voco_jax.evaluation.predict import main
from voco_jax.finetune.segmentation import METHOD
from voco_jax.models.encoders import ENCODERS
from voco_jax.training import loop

NAMES = ("t1", "t2")
CHAIN = LabelledChain(
    axes="RAS",
    spacing=(),
    window=(1.0, 99.0),
    window_unit="percentile",
    crop_foreground=True,
    foreground_threshold=0.0,
    fit="random_crop",
    volume_size=(16, 16, 16),
    dtype="float16",
    classes=(("background", (0,)), ("tumour", (1, 4))),
    channels=NAMES,
)


def _save(voxels, path, axes):
    affine = np.diag([1.0, 1.0, 2.0, 1.0])
    turn = nibabel.orientations.axcodes2ornt(axes)
    nibabel.save(nibabel.Nifti1Image(voxels, affine).as_reoriented(turn), path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four brains without skull; t2 is brighter, covers more, and lies in the file otherwise."""
    folder, entries = tmp_path_factory.mktemp("brains"), []
    generator = np.random.default_rng(4)
    x, y, z = np.meshgrid(*(np.arange(n) - n / 2 for n in (40, 44, 24)), indexing="ij")
    for number in range(4):
        place = folder / f"p{number}"
        place.mkdir()
        label = np.where((x - 4) ** 2 + y**2 + (1.5 * z) ** 2 < 40, 4, 0).astype(np.uint8)
        paths = []
        for name, radius, mean, axes in (("t1", 12, 300, "RAS"), ("t2", 15, 900, "LPS")):
            noise = generator.normal(mean + number, mean / 10, label.shape)
            inside = x**2 + y**2 + (1.5 * z) ** 2 < radius**2
            values = np.where(inside, noise + mean * (label > 0), 0)
            _save(values.astype(np.int16), place / f"p{number}_{name}.nii.gz", axes)
            paths.append(f"p{number}/p{number}_{name}.nii.gz")
        _save(label, place / f"p{number}_seg.nii.gz", "PIR")
        seg = f"p{number}/p{number}_seg.nii.gz"
        entries.append({"image": paths, "label": seg, "fold": number % 2})
    (folder / "list.json").write_text(json.dumps({"training": entries}))
    return folder


@pytest.fixture(scope="module")
def cache(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("cache")
    prepare(_volumes(folder), path, CHAIN, 0, progress=False)
    return Cache.open(path, CHAIN)


def _volumes(folder):
    return read_list(folder / "list.json", folder, labelled=True, channels=NAMES)


@pytest.mark.parametrize("unit", ["percentile", "deviation"])
def test_channels_are_monais(folder, cache, unit, tmp_path):
    """Each its own intensities; one box for all, of every channel's foreground."""
    import monai.transforms as mt

    window = {"percentile": (1.0, 99.0), "deviation": (-6.0, 9.0)}[unit]
    if unit == "percentile":
        scale = mt.ScaleIntensityRangePercentiles(*window, 0, 1, clip=True, channel_wise=True)
    else:
        chain = dataclasses.replace(CHAIN, window=window, window_unit=unit)
        prepare(_volumes(folder), tmp_path, chain, 0, progress=False)
        cache = Cache.open(tmp_path, chain)
        normalise = mt.NormalizeIntensity(nonzero=True, channel_wise=True)
    for entry in cache.entries:
        files = [entry.path, entry.channels[0].path]
        one = [mt.LoadImage(image_only=True, ensure_channel_first=True)(path) for path in files]
        image = np.concatenate([mt.Orientation("RAS", labels=None)(x) for x in one])
        if unit == "deviation":
            # Voxels of 0 stay 0 there; ours have their z-score.
            normal = np.asarray(normalise(image.copy()))
            darkest = [-x[x > 0].mean() / x[x > 0].std() for x in image]
            normal = np.where(image == 0, np.reshape(darkest, (2, 1, 1, 1)), normal)
            crop = mt.CropForeground(lambda x: x > 0)
            box = tuple(slice(a, b) for a, b in zip(*crop.compute_bounding_box(image), strict=True))
            image = np.clip((normal[:, *box] - window[0]) / (window[1] - window[0]), 0, 1)
        else:
            image = np.asarray(mt.CropForeground(lambda x: x > 0)(scale(image)))
        ours = cache.read_channels(entry)
        assert ours.shape == (*entry.stored, 2)
        np.testing.assert_allclose(np.moveaxis(ours, -1, 0), image, atol=6e-4)  # float16
        assert entry.window != entry.channels[0].window


def test_a_part_is_a_part_of_every_channel(cache):
    entry = cache.entries[0]
    part = cache.read_channels(entry, (2, 3, 1), (8, 7, 6))
    np.testing.assert_array_equal(part, cache.read_channels(entry)[2:10, 3:10, 1:7])
    np.testing.assert_array_equal(part[..., 0], cache.read(entry, (2, 3, 1), (8, 7, 6)))


def test_verify_and_changes_know_every_channel(folder, tmp_path):
    files = shutil.copytree(folder, tmp_path / "files")
    path = tmp_path / "cache"
    prepare(_volumes(files), path, CHAIN, 0, progress=False)
    before = Cache.open(path, CHAIN).entries
    changed = files / "p1" / "p1_t2.nii.gz"
    image = nibabel.load(changed)
    nibabel.save(nibabel.Nifti1Image(np.asarray(image.dataobj)[::-1], image.affine), changed)
    summary = prepare(_volumes(files), path, CHAIN, 0, progress=False)
    assert (summary.done, summary.skipped) == (1, 3)
    after = Cache.open(path, CHAIN).entries
    assert [a.digest == b.digest for a, b in zip(before, after, strict=True)] == [1, 0, 1, 1]
    assert len(list((path / "volumes").glob("c.*"))) == (4 + 1) * 4
    slot = path / "volumes" / f"c.{after[2].channels[0].slot}.0.0.0"
    content = bytearray(slot.read_bytes())
    content[len(content) // 2] ^= 1
    slot.write_bytes(content)
    assert list(verify(path, progress=False).bad) == [after[2].id]


def test_a_channel_on_another_grid_is_a_failure_with_its_name(folder, tmp_path):
    files = shutil.copytree(folder, tmp_path / "files")
    path = files / "p0" / "p0_t2.nii.gz"
    image = nibabel.load(path)
    nibabel.save(nibabel.Nifti1Image(np.asarray(image.dataobj)[1:], image.affine), path)
    summary = prepare(_volumes(files), tmp_path / "cache", CHAIN, 0, progress=False)
    assert (summary.done, summary.failed) == (3, 1)
    reason = summary.failures[0].reason
    assert reason.startswith(
        f"channel {path}: another grid: 39x44x24 voxels in RAS order, expected"
    )
    assert "as its image's first channel has" in reason


@pytest.mark.parametrize(
    ("image", "channels"), [("a.nii", NAMES), (["a.nii"], NAMES), (["a.nii", "b.nii"], ())]
)
def test_a_list_has_a_path_for_each_channel(tmp_path, image, channels):
    (tmp_path / "list.json").write_text(json.dumps({"training": [{"image": image, "label": "l"}]}))
    expected = r'\["t1 path", "t2 path"\]' if channels else '"path"'
    with pytest.raises(
        InputError, match=rf'training\[0\]: found .* expected {{"image": {expected}'
    ):
        read_list(tmp_path / "list.json", tmp_path, labelled=True, channels=channels)


def test_folds_of_the_list_are_taken(cache):
    config = parse(finetune_demo.get_config())
    assert isinstance(config, SegmentationFinetuning)
    data = dataclasses.replace(config.data, folds=2, fold=1)
    training, held_out = split_patients(cache.entries, data, 0)
    assert [[entry.id[-12:-10] for entry in part] for part in (training, held_out)] == [
        ["p0", "p2"],
        ["p1", "p3"],
    ]
    with pytest.raises(InputError, match=r"data.folds: found 3, but the lists have the folds 0, 1"):
        split_patients(cache.entries, dataclasses.replace(data, folds=3), 0)
    with pytest.raises(InputError, match=r"data.patient: the lists have p in the folds 0, 1"):
        split_patients(cache.entries, dataclasses.replace(data, patient=r"/(p)\d_"), 0)


def test_brats_takes_four_channels():
    from voco_jax.finetune.segmentation import make_program
    from voco_jax.training.mesh import make_mesh

    for variant in ("corrected", "published"):
        config = finetune_brats.get_config(variant)
        program = make_program(parse(config), make_mesh(1, jax.devices()[:1]))
        assert program.batch["images"].shape == (1, 128, 128, 128, 4)
        stem = program.state.params["swinViT"]["patch_embed"]["proj"]["kernel"]
        assert stem.shape == (2, 2, 2, 4, 48)


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    values = segmentation_main.get_config()
    values |= {"total_steps": 100, "seed": 1}
    chain = json.loads(json.dumps(dataclasses.asdict(CHAIN))) | {"volume_size": (32, 32, 16)}
    source = values["data"]["sources"]["ct"] | {"chain": chain}
    source |= {"roots": (str(folder),), "lists": (str(folder / "list.json"),)}
    values["data"] |= {"sources": {"mr": source}, "phantoms": 0, "folds": 2}
    values["crops"]["balance"] = "voxels"
    values["validation"]["every_steps"] = 100
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ENCODERS, "strided_cnn", strided_cnn.ENCODER)
        patch.setitem(settings.ENCODERS, "strided_cnn", strided_cnn.Settings)
        loop.run(parse(values, str(workdir)), workdir, METHOD)
        yield workdir


def test_it_trains_and_predicts_files_named_by_channel(run, folder, tmp_path, capsys):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    expected = next(row["validation/dice"] for row in rows if "validation/dice" in row)
    flags = ["--weights", str(run / "segmentation.safetensors"), "--overlap", "0.25"]
    found = []
    for number in (0, 2):
        given = ["--input", str(folder / f"p{number}"), "--output", str(tmp_path)]
        assert main([*flags, *given]) == 0
        mask = nibabel.load(tmp_path / f"p{number}.nii.gz")
        first = nibabel.load(folder / f"p{number}" / f"p{number}_t1.nii.gz")
        np.testing.assert_array_equal(mask.affine, first.affine)
        label = nibabel.as_closest_canonical(
            nibabel.load(folder / f"p{number}" / f"p{number}_seg.nii.gz")
        )
        both = [np.asarray(one.dataobj) > 0 for one in (mask, label)]
        found.append(2 * (both[0] & both[1]).sum() / (both[0].sum() + both[1].sum()))
    assert expected > 0.2
    assert np.mean(found) == pytest.approx(expected, abs=1e-3)
    capsys.readouterr()
    shutil.copy(folder / "p0" / "p0_t1.nii.gz", tmp_path / "alone_t1.nii.gz")
    given = ["--input", str(tmp_path / "alone_t1.nii.gz"), "--output", str(tmp_path / "none")]
    assert main([*flags, *given]) == 2
    assert "alone: found the channels t1, expected also alone_t2.nii.gz" in capsys.readouterr().err
    given[1] = str(folder / "p0" / "p0_seg.nii.gz")
    assert main([*flags, *given]) == 2
    assert "expected NAME_t1.nii.gz, NAME_t2.nii.gz for each" in capsys.readouterr().err
    assert not Path(tmp_path / "none").exists()
