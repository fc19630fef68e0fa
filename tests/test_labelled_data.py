"""Images with labels: into the cache, checked, split and cropped."""

import dataclasses
import json
import re
from functools import partial

import nibabel
import numpy as np
import pytest

from configs import finetune_demo
from voco_jax.config.common import LabelledChain
from voco_jax.config.finetuning import LabelledCrops
from voco_jax.config.load import parse
from voco_jax.data.array import CHUNK
from voco_jax.data.cache import Cache
from voco_jax.data.collect import collect
from voco_jax.data.datalists import read_list
from voco_jax.data.folds import split_patients
from voco_jax.data.labelled_crops import collate_crops, draw_crop
from voco_jax.data.pipeline import Part, fingerprint, stream_batches
from voco_jax.data.prepare import prepare
from voco_jax.data.verify import verify
from voco_jax.data.volumes import file_positions
from voco_jax.errors import InputError

CLASSES = (("background", (0, 9)), ("left", (1,)), ("right", (2, 4)))
CHAIN = LabelledChain(
    axes="RAS",
    spacing=(2.0, 2.0, 3.0),
    window=(-175.0, 250.0),
    window_unit="HU",
    crop_foreground=True,
    foreground_threshold=0.3,
    fit="random_crop",
    volume_size=(16, 16, 16),
    dtype="uint8",
    classes=CLASSES,
)
AXES = ("LPS", "RAS", "PIR")


def _image(index, generator):
    """Air around a body with two balls, in its own axes; and its label."""
    shape, spacing = (60 + index, 70, 52), np.array([1.5, 1.7, 2.23 + 0.1 * index])
    x, y, z = np.meshgrid(*(np.arange(n) - n / 2 for n in shape), indexing="ij")
    hu = np.where((x / 25) ** 2 + (y / 28) ** 2 + (z / 22) ** 2 < 1, 40.0, -1000.0)
    label = np.zeros(shape, np.uint8)
    for value, side in ((1, -10), (2, 10)):
        label[(x - side) ** 2 + (y - 4) ** 2 + z**2 < 36] = value
    label[30:33, 20:23, 25:27] = 4
    label[30:33, 26:28, 25:27] = 9
    hu += 100 * (label > 0) + generator.normal(size=shape)
    affine = np.diag([*spacing, 1])
    affine[:3, 3] = generator.uniform(-50, 50, 3)
    turn = nibabel.orientations.ornt_transform(
        nibabel.io_orientation(affine),
        nibabel.orientations.axcodes2ornt(AXES[index % len(AXES)]),
    )
    return (
        nibabel.Nifti1Image(array, affine).as_reoriented(turn)
        for array in (hu.astype(np.int16), label)
    )


def _folder(path, count=3):
    generator, entries = np.random.default_rng(3), []
    path.mkdir(exist_ok=True)
    for index in range(count):
        image, label = _image(index, generator)
        names = f"p{index // 2}_ct{index}.nii.gz", f"p{index // 2}_seg{index}.nii.gz"
        for one, name in zip((image, label), names, strict=True):
            nibabel.save(one, path / name)
        entries.append(dict(zip(("image", "label"), names, strict=True)))
    (path / "list.json").write_text(json.dumps({"training": entries}))
    return read_list(path / "list.json", path, labelled=True)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("labelled")
    prepare(_folder(folder / "files"), folder / "cache", CHAIN, 0, progress=False)
    return Cache.open(folder / "cache", CHAIN)


def test_labels_lie_on_their_images(cache):
    """Where the label says so the image is 100 HU brighter, on the cache's grid."""
    for entry in cache.entries:
        image, label = cache.read_whole(entry).astype(float), cache.read_label(entry)
        assert label.shape == entry.stored
        assert set(np.unique(label)) == {0, 1, 2}
        for number in (1, 2):
            assert abs(np.median(image[label == number]) / 255 * 425 - 175 - 140) < 3


def test_labels_are_monais(cache):
    """Orientation and nearest neighbours, as MONAI's Orientationd and Spacingd."""
    import monai.transforms as mt

    chain = mt.Compose(
        [
            mt.LoadImage(image_only=True, ensure_channel_first=True),
            mt.Orientation("RAS", labels=None),
            mt.Spacing(CHAIN.spacing, mode="nearest", padding_mode="border"),
        ]
    )
    for entry in cache.entries:
        theirs = np.asarray(chain(entry.label.path))[0].astype(int)
        box = tuple(slice(a, b) for a, b in zip(*entry.box, strict=True))
        numbers = np.array([0, 1, 2, 0, 2, 0, 0, 0, 0, 0])[theirs][box]
        ours = cache.read_label(entry)
        np.testing.assert_array_equal(ours, numbers)  # no voxel lies just between two


def test_labels_of_the_file_are_kept_as_they_are(cache):
    for entry in cache.entries:
        label = nibabel.as_closest_canonical(nibabel.load(entry.label.path))
        values = np.asarray(label.dataobj)
        expected = np.array([0, 1, 2, 0, 2, 0, 0, 0, 0, 0])[values]
        np.testing.assert_array_equal(cache.read_file_label(entry), expected)


def test_file_positions_undo_the_chain(cache):
    """The balls' middles, in the file and in the cache."""
    for entry in cache.entries:
        positions = file_positions(entry.shape, entry.spacing, CHAIN, entry.box, entry.stored)
        ours, file = cache.read_label(entry), cache.read_file_label(entry)
        for number in (1, 2):
            middle = np.argwhere(file == number).mean(0)
            there = [
                np.interp(m, np.arange(len(p)), p) for m, p in zip(middle, positions, strict=True)
            ]
            np.testing.assert_allclose(there, np.argwhere(ours == number).mean(0), atol=0.2)


def test_chunks_count_every_voxel(cache):
    for entry in cache.entries:
        label = cache.read_label(entry)
        for number, chunks in enumerate(entry.label.chunks, 1):
            assert sum(count for _, count in chunks) == (label == number).sum()
        assert max(entry.stored) <= CHUNK or len(entry.label.chunks[0]) > 0


def _broken(kind, label):
    values = np.asarray(label.dataobj).copy()
    if kind == "cut":
        return nibabel.Nifti1Image(values[:-1], label.affine)
    if kind == "moved":
        affine = label.affine.copy()
        affine[:3, 3] += 1
        return nibabel.Nifti1Image(values, affine)
    if kind == "value":
        values[0, 0, 0] = 77
        return nibabel.Nifti1Image(values, label.affine)
    return nibabel.Nifti1Image(values * np.float32(0.5), label.affine)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("cut", "another grid: .* voxels in RAS order, expected 60x70x52 as its image has"),
        ("moved", r"another grid: as many voxels as its image, but up to 1.73 mm away; do they"),
        ("value", r"unknown label: found the values 77, expected those of .* 0, 1, 2, 4, 9"),
        ("half", "unknown label: found the value 0.5, expected whole numbers"),
        ("gone", "missing file"),
    ],
)
def test_a_wrong_label_is_a_failure_with_its_reason(tmp_path, kind, reason):
    volumes = _folder(tmp_path / "files", 2)
    path = volumes[0].label
    label = nibabel.load(path)
    broken = None if kind == "gone" else _broken(kind, label)  # read before it is replaced
    path.unlink()
    if broken is not None:
        nibabel.save(broken, path)
    summary = prepare(volumes, tmp_path / "cache", CHAIN, 0, progress=False)
    assert (summary.done, summary.failed) == (1, 1)
    assert re.search(reason, summary.failures[0].reason)
    assert str(path) in summary.failures[0].reason


def test_a_label_that_changed_is_prepared_anew(tmp_path):
    volumes = _folder(tmp_path / "files", 2)
    prepare(volumes, tmp_path / "cache", CHAIN, 0, progress=False)
    before = fingerprint([Part("a", one := Cache.open(tmp_path / "cache", CHAIN), one.entries, 1)])
    label = nibabel.load(volumes[1].label)
    values = np.asarray(label.dataobj).copy()
    values[values == 1] = 2
    volumes[1].label.unlink()
    nibabel.save(nibabel.Nifti1Image(values, label.affine), volumes[1].label)
    summary = prepare(volumes, tmp_path / "cache", CHAIN, 0, progress=False)
    assert (summary.done, summary.skipped) == (1, 1)
    cache = Cache.open(tmp_path / "cache", CHAIN)
    assert not (cache.read_label(cache.entries[1]) == 1).any()
    assert fingerprint([Part("a", cache, cache.entries, 1)]) != before
    files = sorted(path.name for path in (tmp_path / "cache" / "volumes").glob("c.*"))
    assert len(files) == 9  # three a volume, and the old ones for who reads them


def test_verify_reads_labels_too(tmp_path):
    prepare(_folder(tmp_path / "files", 2), tmp_path / "cache", CHAIN, 0, progress=False)
    cache = Cache.open(tmp_path / "cache", CHAIN)
    path = tmp_path / "cache" / "volumes" / f"c.{cache.entries[0].label.slot}.0.0.0"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    found = verify(tmp_path / "cache", progress=False)
    assert list(found.bad) == [cache.entries[0].id]
    assert found.intact == 1


def test_lists_must_name_labels(tmp_path):
    (tmp_path / "list.json").write_text(json.dumps({"training": [{"image": "a.nii"}]}))
    with pytest.raises(InputError, match=r'training\[0\]: found .* expected .*"label": "path"'):
        read_list(tmp_path / "list.json", tmp_path, labelled=True)
    with pytest.raises(InputError, match="expected a Decathlon list for each root"):
        collect((), (str(tmp_path),), labelled=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fit": "resize"}, "fit: found 'resize' with classes"),
        ({"classes": (("background", (0,)),)}, "classes: found background, expected"),
        ({"classes": (("organ", (0,)), ("b", (1,)))}, "classes: found organ, b, expected"),
        ({"classes": (("background", (0,)), ("b", (0, 1)))}, "each name and each value once"),
        ({"classes": (("background", (0,)), ("b", ()))}, "at least one value for each name"),
    ],
)
def test_impossible_classes(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CHAIN, **change)


CROPS = LabelledCrops(size=(16, 16, 16), foreground=1.0, balance="classes")


def _draws(cache, crops, count=200):
    generator = np.random.default_rng(0)
    return [
        draw_crop(cache, cache.entries[0], crops=crops, generator=generator) for _ in range(count)
    ]


@pytest.mark.parametrize("balance", ["classes", "voxels"])
def test_crops_have_their_voxel_in_the_middle(cache, balance):
    """Each class as often as asked for, and every one of its voxels."""
    crops = dataclasses.replace(CROPS, balance=balance)
    drawn = _draws(cache, crops)
    batch = collate_crops(drawn, crops=crops)
    entry = cache.entries[0]
    counts = [sum(count for _, count in chunks) for chunks in entry.label.chunks]
    middle = batch["labels"][:, 8, 8, 8]
    assert (middle > 0).mean() > 0.9  # but near the border
    share = np.mean([one.voxel[1] == 1 for one in drawn])
    expected = 0.5 if balance == "classes" else counts[0] / sum(counts)
    assert abs(share - expected) < 0.12
    assert len({one.voxel for one in drawn}) > 100


def test_crops_are_the_cached_voxels(cache):
    crops = dataclasses.replace(CROPS, foreground=0.0)
    drawn = _draws(cache, crops, 5)
    batch = collate_crops(drawn, crops=crops)
    image, label = cache.read_whole(cache.entries[0]), cache.read_label(cache.entries[0])
    for row, one in enumerate(drawn):
        part = tuple(slice(a, a + 16) for a in one.corner)
        np.testing.assert_array_equal(batch["images"][row, ..., 0], image[part])
        np.testing.assert_array_equal(batch["labels"][row], label[part])


def test_batches_are_pure_functions_of_the_step(cache):
    def batches(start, workers=0):
        return stream_batches(
            [Part("a", cache, cache.entries, 1.0)],
            partial(draw_crop, crops=CROPS),
            partial(collate_crops, crops=CROPS),
            seed=3,
            batch_size=2,
            start_step=start,
            workers=workers,
        )

    whole = [batch for batch, _ in zip(batches(0), range(4), strict=False)]
    for later, batch in zip(batches(2), whole[2:], strict=False):
        np.testing.assert_array_equal(later["images"], batch["images"])
        np.testing.assert_array_equal(later["labels"], batch["labels"])
    assert any((whole[0]["labels"] != batch["labels"]).any() for batch in whole[1:])


def _data(**changes):
    config = parse(finetune_demo.get_config())
    return dataclasses.replace(config.data, **changes)


def test_folds_hold_every_patient_out_once(cache):
    entries = [
        dataclasses.replace(cache.entries[0], id=f"a/p{patient}_ct{scan}.nii.gz")
        for patient in range(7)
        for scan in range(3)
    ]
    seen = []
    for fold in range(3):
        data = _data(folds=3, fold=fold, patient=r"(p\d+)_")
        training, held_out = split_patients(entries, data, 5)
        patients = [{entry.id[:4] for entry in part} for part in (training, held_out)]
        assert not patients[0] & patients[1]
        assert len(training) + len(held_out) == len(entries)
        seen += patients[1]
    assert sorted(seen) == sorted({entry.id[:4] for entry in entries})


def test_fewer_labels_are_part_of_more(cache):
    entries = [dataclasses.replace(cache.entries[0], id=f"a/{i}") for i in range(40)]
    sets = []
    for share in (0.05, 0.2, 1.0):
        training, held_out = split_patients(entries, _data(labelled_fraction=share), 1)
        sets.append({entry.id for entry in training})
        assert len(held_out) == 8
    assert [len(one) for one in sets] == [2, 6, 32]
    assert sets[0] < sets[1] < sets[2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patient": "p"}, "data.patient: found 'p', expected a pattern with a group"),
        ({"patient": "(q)"}, "it is not in the id"),
        ({"folds": 9, "fold": 1}, "data.folds: found 9 for 3 patients"),
        ({"held_out": 1.0}, "all 3 patients of the cache are held out"),
    ],
)
def test_impossible_splits(cache, changes, message):
    with pytest.raises(InputError, match=message):
        split_patients(cache.entries, _data(**changes), 0)
