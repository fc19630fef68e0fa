import dataclasses
import json

import numpy as np
import pytest
from chains import CHAIN_10K

from voco_jax.data.datalists import read_list
from voco_jax.data.phantom import ORGANS, make_phantoms, phantom
from voco_jax.data.volumes import load, orient_ras, prepare_volume

SHAPE = (80, 80, 40)


@pytest.fixture(scope="module")
def listed(tmp_path_factory):
    return make_phantoms(tmp_path_factory.mktemp("phantoms"), 12, 3, SHAPE)


def hounsfield(path):
    source = orient_ras(load(path))
    return source.hounsfield(source.voxels)


def test_a_list_that_prepare_reads(listed):
    volumes = read_list(listed, listed.parent)
    assert [volume.section for volume in volumes] == ["training"] * 12
    chain = dataclasses.replace(CHAIN_10K, volume_size=(64, 64, 32))
    for volume in volumes:
        prepared = prepare_volume(volume.path, chain)
        assert sorted(prepared.shape) == sorted(SHAPE)
        assert 0.15 < prepared.mean < 0.4  # real CT: 0.12..0.35
        first, last = prepared.box
        assert all(b - a > 20 for a, b in zip(first, last, strict=True))


def test_same_seed_same_files(tmp_path, listed):
    again = make_phantoms(tmp_path, 2, 3, SHAPE)
    names = [entry["image"] for entry in json.loads(again.read_text())["training"]]
    for name in names:
        np.testing.assert_array_equal(hounsfield(tmp_path / name), hounsfield(listed.parent / name))
    one, other = (phantom(seed, 0, SHAPE)[0].get_fdata() for seed in (3, 4))
    assert (one != other).any()


def test_existing_files_are_left_alone(tmp_path):
    shape = (32, 32, 16)
    path = make_phantoms(tmp_path, 2, 0, shape)
    before = {file: file.stat().st_mtime_ns for file in tmp_path.glob("*.nii.gz")}
    make_phantoms(tmp_path, 3, 0, shape)
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert len(json.loads(path.read_text())["training"]) == 3


def test_they_differ_as_real_files_do(listed):
    sources = [load(volume.path) for volume in read_list(listed, listed.parent)]
    assert len({source.axes for source in sources}) > 2
    assert len({source.spacing for source in sources}) == 12
    assert len({(source.slope, source.intercept) for source in sources}) > 1
    assert all(source.voxels.dtype == np.int16 for source in sources)


def test_anatomy_tells_left_from_right_and_front_from_back(listed):
    """Spine behind; on average the liver makes the right side of the upper belly denser."""
    behind, right = [], []
    for volume in read_list(listed, listed.parent):
        hu = hounsfield(volume.path)
        tissue = np.argwhere(hu > 0)
        first, last = tissue.min(axis=0), tissue.max(axis=0)
        middle, third = (first + last) / 2, (last[1] - first[1]) // 3
        central = hu[int(middle[0]) - 5 : int(middle[0]) + 5]
        bone = central > 180
        behind.append(bone[:, : first[1] + third].mean() > bone[:, last[1] - third :].mean())
        organ = np.argwhere((hu > 20) & (hu < 200))
        right.append(organ[:, 0].mean() - middle[0])
        assert hu.min() < -950
        assert ((hu > -920) & (hu < -700)).mean() > 0.01  # lung
    assert all(behind)
    assert np.mean(right) > 0


def test_labels_are_where_the_organs_are(tmp_path):
    """By the HU that each organ has: the label lies on its image, whatever the axes."""
    path = make_phantoms(tmp_path, 6, 3, SHAPE, labelled=True)
    for volume in read_list(path, tmp_path, labelled=True):
        hu = hounsfield(volume.path)
        label = orient_ras(load(volume.label)).voxels
        assert set(np.unique(label)) <= set(range(len(ORGANS) + 1))
        assert label.shape == hu.shape
        inside = {name: hu[label == number] for number, name in enumerate(ORGANS, 1)}
        assert np.median(inside["lungs"]) < -700
        assert 40 < np.median(inside["liver"]) < 130
        assert 30 < np.median(inside["spleen"]) < 130
        right, left = np.argwhere(label == 2).mean(0)[0], np.argwhere(label == 3).mean(0)[0]
        assert right > left  # x to the right: the liver is there
