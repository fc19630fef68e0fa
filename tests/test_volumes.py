import dataclasses
import itertools

import nibabel
import numpy as np
import pytest
import torch
from chains import CHAIN_10K
from conftest import shared_file
from hypothesis import given, settings
from hypothesis import strategies as st
from scans import body, save

from voco_jax.data.formats.readers import VolumeError, load
from voco_jax.data.resample import resize
from voco_jax.data.volumes import (
    dequantise,
    foreground_box,
    orient_ras,
    prepare_volume,
    quantise,
)

CHAIN = dataclasses.replace(CHAIN_10K, volume_size=(32, 24, 16))


def monai_chain(path, chain=CHAIN):
    import monai.transforms as mt

    low, high = chain.window
    steps = mt.Compose(
        [
            mt.LoadImaged("image"),
            mt.EnsureChannelFirstd("image"),
            mt.Orientationd("image", axcodes="RAS"),
            mt.ScaleIntensityRanged("image", low, high, 0, 1, clip=True),
            mt.CropForegroundd("image", "image", lambda x: x > chain.foreground_threshold),
            mt.Resized("image", chain.volume_size, mode="trilinear", align_corners=True),
        ]
    )
    out = steps({"image": str(path)})
    box = (
        tuple(map(int, out["foreground_start_coord"])),
        tuple(map(int, out["foreground_end_coord"])),
    )
    return out["image"].numpy()[0], box


# ---- agreement with MONAI


@pytest.mark.filterwarnings("ignore")
def test_chain_agrees_with_monai_on_real_ct():
    """10k settings, every volume: within 1e-4, same box, half a quantisation step in the cache."""
    chain = CHAIN_10K
    files = sorted(shared_file("ct", "images").glob("*.nii.gz"))
    assert len(files) == 15
    for file in files:
        expected, box = monai_chain(file, chain)
        ours = prepare_volume(file, chain)
        assert ours.box == box, file.name
        assert ours.voxels.dtype == np.float32
        assert np.abs(ours.voxels - expected).max() < 1e-5, file.name
        stored = quantise(ours.voxels, "uint8")
        assert stored.dtype == np.uint8
        assert np.abs(dequantise(stored) - expected).max() <= 1 / 510 + 1e-6, file.name
        assert ours.mean == pytest.approx(expected.mean(), abs=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "stored",
    [
        {"axes": "LPS", "dtype": np.int32},
        {"axes": "PLI", "dtype": np.float32},
        {"axes": "SAR", "slope": (0.5, -1024)},
        {"axes": "RPI", "dtype": np.float64, "version": 2},
        {"axes": "ASL", "dtype": ">i2"},
        {"axes": "IRA", "dtype": np.uint16, "slope": (1, -1024)},
        {"axes": "LAS", "slope": (0.37, 11.5)},
    ],
    ids=str,
)
@pytest.mark.parametrize("suffix", ["nii", "nii.gz"])
def test_every_way_to_store_agrees_with_monai(tmp_path, stored, suffix):
    path = save(tmp_path / f"a.{suffix}", body(), **stored)
    expected, box = monai_chain(path)
    ours = prepare_volume(path, CHAIN)
    assert (ours.axes, ours.box) == (stored["axes"], box)
    assert np.abs(ours.voxels - expected).max() < 1e-5
    assert ours.shape == (20, 18, 12)
    assert ours.spacing == pytest.approx((2, 2.5, 3))


@pytest.mark.filterwarnings("ignore")
def test_oblique_and_contradicting_headers_agree_with_monai(tmp_path):
    oblique = nibabel.Nifti1Image(body().astype(np.int16), None)
    angle = np.deg2rad(20)
    turn = np.array(
        [[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]]
    )
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag([-2.0, 3.0, -1.5])
    oblique.set_sform(affine, 1)
    oblique.header.set_zooms((2.0, 3.0, 1.5))  # MONAI believes no other sform
    contradicting = nibabel.Nifti1Image(body().astype(np.int16), None)
    contradicting.set_qform(np.diag([-2.0, 2, 2, 1]), 1)
    contradicting.set_sform(np.diag([5.0, -5, 5, 1]), 1)
    for name, image in (("oblique", oblique), ("contradicting", contradicting)):
        path = tmp_path / f"{name}.nii.gz"
        nibabel.save(image, path)
        expected, box = monai_chain(path)
        ours = prepare_volume(path, CHAIN)
        assert ours.box == box
        assert np.abs(ours.voxels - expected).max() < 1e-5


def test_padding_values_do_not_matter(tmp_path):
    hu = body()
    hu[4:7, 5:9, 2:5] = -100  # fat, as every CT has
    a = prepare_volume(save(tmp_path / "a.nii", hu), CHAIN)
    for padding in (-1024, -2048, -3024):
        b = prepare_volume(save(tmp_path / "b.nii", np.where(hu < -900, padding, hu)), CHAIN)
        assert b.box == a.box
        np.testing.assert_array_equal(a.voxels, b.voxels)


# ---- parts


def test_orient_ras_is_a_view_with_its_affine(tmp_path):
    source = load(save(tmp_path / "a.nii", body(), axes="PLI"))
    turned = orient_ras(source)
    assert np.shares_memory(source.voxels, turned.voxels)
    assert nibabel.aff2axcodes(turned.affine) == ("R", "A", "S")
    np.testing.assert_allclose(turned.affine[:3, :3], np.diag([2, 2.5, 3]), atol=1e-6)
    np.testing.assert_array_equal(turned.voxels, body().astype(np.int16))


def test_threshold_itself_is_background(tmp_path):
    hu = np.full((4, 4, 4), -1000.0)
    hu[1, 2, 3], hu[2, 2, 3] = -47.5, -47  # exactly 0.3 of the window, and just above
    source = load(save(tmp_path / "a.nii", hu, dtype=np.float32))
    assert foreground_box(source, (-175, 250), 0.3) == ((2, 2, 3), (3, 3, 4))


@settings(max_examples=60, deadline=None)
@given(
    old=st.tuples(*[st.integers(1, 17)] * 3),
    new=st.tuples(*[st.integers(1, 17)] * 3),
    order=st.permutations(range(3)),
    flips=st.tuples(*[st.sampled_from([1, -1])] * 3),
)
def test_resize_agrees_with_torch(old, new, order, flips):
    stored = np.random.default_rng(0).random([old[axis] for axis in order], np.float32)
    volume = stored.transpose(np.argsort(order))[tuple(slice(None, None, f) for f in flips)]
    assert volume.shape == old
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(volume.copy())[None, None], new, mode="trilinear", align_corners=True
    )
    np.testing.assert_allclose(resize(volume, new), expected[0, 0].numpy(), atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=50))
def test_quantisation_is_within_half_a_step(values):
    volume = np.array(values, np.float32).reshape(-1, 1, 1)
    coarse = quantise(volume, "uint8")
    assert np.abs(dequantise(coarse) - volume).max() <= 1 / 510 + 1e-7
    np.testing.assert_array_equal(quantise(dequantise(coarse), "uint8"), coarse)
    assert np.abs(dequantise(quantise(volume, "float16")) - volume).max() <= 2**-12


@pytest.mark.parametrize("dtype", ["uint8", "float16"])
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_it_is_stored_alike_whatever_its_order_in_memory(order, dtype):
    volume = np.random.default_rng(0).random((7, 6, 5), np.float32)
    other = np.ascontiguousarray(volume.transpose(order)).transpose(np.argsort(order))
    stored = quantise(other[::-1, :, ::-1], dtype)
    expected = np.rint(255 * volume) if dtype == "uint8" else volume
    assert stored.flags.c_contiguous
    assert stored.dtype == dtype
    np.testing.assert_array_equal(stored, expected[::-1, :, ::-1].astype(dtype))
    channels = quantise(np.stack([other, other], axis=-1), dtype)
    np.testing.assert_array_equal(channels[..., 1], expected.astype(dtype))


# ---- refusals


def reason(path):
    with pytest.raises(VolumeError) as caught:
        prepare_volume(path, CHAIN)
    assert str(caught.value) == f"{path}: {caught.value.reason}"
    return caught.value.reason


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_voxels_that_are_no_numbers(tmp_path, value):
    hu = body()
    hu[3, 4, 5] = value
    path = save(tmp_path / "a.nii", hu, dtype=np.float32)
    assert reason(path).startswith("NaN or infinite voxels")


def test_constant_and_empty_volumes(tmp_path):
    assert reason(save(tmp_path / "a.nii", np.zeros((5, 5, 5)))) == "constant: every voxel is 0 HU"
    faint = np.where(body() > -900, -60, -1000)
    assert reason(save(tmp_path / "a.nii", faint)).startswith(
        "no foreground: the largest voxel is -60 HU, expected some above -47.5"
    )
