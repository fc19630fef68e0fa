"""The chain's resampling against MONAI: spacing, pad, crops, percentiles and the region presets."""

import dataclasses

import numpy as np
import pytest
from chains import CHAIN_10K
from conftest import shared_file
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import regions
from voco_jax.config.common import Chain
from voco_jax.data.resample import center_crop, pad, resample
from voco_jax.data.volumes import AIR, VolumeError, load, orient_ras, prepare_volume

pytestmark = pytest.mark.filterwarnings("ignore")
REGIONS = {name: Chain(**chain) for name, chain in regions.CHAINS.items()}


def monai_volume(path, chain, clip=True):
    """MONAI's transforms up to the random crop; ours clips padding below air before resampling."""
    import monai.transforms as mt

    low, high = chain.window
    scale = (
        mt.ScaleIntensityRanged("image", low, high, 0, 1, clip=True)
        if chain.window_unit == "HU"
        else mt.ScaleIntensityRangePercentilesd("image", low, high, 0, 1, clip=True)
    )
    fit = {
        "resize": [mt.Resized("image", chain.volume_size, mode="trilinear", align_corners=True)],
        "random_crop": [mt.SpatialPadd("image", chain.volume_size)],
        "center_crop": [
            mt.SpatialPadd("image", chain.volume_size),
            mt.CenterSpatialCropd("image", chain.volume_size),
        ],
    }[chain.fit]
    steps = [
        mt.LoadImaged("image"),
        mt.EnsureChannelFirstd("image"),
        mt.Orientationd("image", axcodes="RAS"),
        *([mt.Lambdad("image", lambda x: x.clamp(min=AIR))] if clip else []),
        *([mt.Spacingd("image", chain.spacing, mode="bilinear")] if chain.spacing else []),
        scale,
        *fit,
    ]
    return mt.Compose(steps)({"image": str(path)})["image"]


@pytest.mark.parametrize("region", REGIONS)
def test_region_presets_agree_with_monai_on_real_ct(region):
    """Within 1e-3 of the window, every voxel of every volume."""
    import monai.transforms as mt

    chain = REGIONS[region]
    images = shared_file("ct", "images")
    names = {
        "abdomen": ["abdomen_totalseg"],
        "chest": ["chest_lidc_0001", "heart_totalseg"],
        "head_neck": ["headneck_kbp_", "heart_totalseg"],
    }[region]
    paths = [sorted(images.glob(f"{name}*"))[0] for name in names]
    for path in paths:
        expected = monai_volume(path, chain)
        ours = prepare_volume(path, chain)
        assert ours.voxels.shape == tuple(expected.shape[1:]), path.name
        assert np.abs(ours.voxels - expected.numpy()[0]).max() < 1e-3, path.name
        if chain.fit == "random_crop":
            assert all(a >= b for a, b in zip(ours.voxels.shape, chain.volume_size, strict=True))
            crop = mt.RandSpatialCrop(chain.volume_size, random_size=False).set_random_state(0)
            found = crop(expected)
            part = tuple(slice(s.start, s.stop) for s in crop._slices)
            assert ours.voxels[part].shape == chain.volume_size
            assert np.abs(ours.voxels[part] - found.numpy()[0]).max() < 1e-3


def test_padding_below_air_does_not_bleed():
    """By design not MONAI's: -2048 beside the body is air, so that edges keep their values."""
    chain = REGIONS["chest"]
    path = next(iter(shared_file("ct", "images").glob("chest_lidc_0001*")))
    assert load(path).voxels.min() < AIR
    ours = prepare_volume(path, chain).voxels
    published = monai_volume(path, chain, clip=False).numpy()[0]
    differs = np.abs(ours - published) > 1e-3
    assert 0 < differs.mean() < 0.02  # the edge of the scanner's circle
    assert (ours >= published - 1e-3).all()


@pytest.mark.parametrize("spacing", [(), (2.0, 2.0, 3.0)])
def test_percentile_window_agrees_with_monai(spacing):
    chain = dataclasses.replace(
        CHAIN_10K,
        spacing=spacing,
        window=(1.0, 99.0),
        window_unit="percentile",
        crop_foreground=False,
        foreground_threshold=0.0,
        fit="center_crop",
        volume_size=(96, 160, 64),
    )
    path = next(iter(shared_file("ct", "images").glob("heart_totalseg*")))
    expected = monai_volume(path, chain, clip=False).numpy()[0]
    ours = prepare_volume(path, chain).voxels
    assert ours.shape == chain.volume_size
    assert np.abs(ours - expected).max() < 1e-3


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    shape=st.tuples(*[st.integers(2, 9)] * 3),
    spacing=st.tuples(*[st.floats(0.3, 5)] * 3),
    new=st.tuples(*[st.floats(0.3, 5)] * 3),
)
def test_spacing_agrees_with_monai_on_any_grid(shape, spacing, new):
    import torch
    from monai.data import MetaTensor
    from monai.transforms import Spacing

    volume = np.random.default_rng(0).random(shape, np.float32)
    affine = torch.diag(torch.tensor([*spacing, 1.0], dtype=torch.float64))
    image = MetaTensor(torch.from_numpy(volume)[None], affine=affine)
    expected = Spacing(new, mode="bilinear", padding_mode="border")(image).numpy()[0]
    ours = resample(volume, spacing, new)
    assert ours.shape == expected.shape
    assert np.abs(ours - expected).max() < 1e-4


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(shape=st.tuples(*[st.integers(1, 9)] * 3), size=st.tuples(*[st.integers(1, 9)] * 3))
def test_pad_and_centre_crop_agree_with_monai(shape, size):
    from monai.transforms import CenterSpatialCrop, SpatialPad

    volume = np.random.default_rng(0).random(shape, np.float32)
    padded = SpatialPad(size)(volume[None]).numpy()
    np.testing.assert_array_equal(pad(volume, size), padded[0])
    cropped = CenterSpatialCrop(size)(padded).numpy()[0]
    np.testing.assert_array_equal(center_crop(pad(volume, size), size), cropped)


def test_the_resampled_grid_knows_where_it_is():
    from voco_jax.data.volumes import _to_spacing

    path = next(iter(shared_file("ct", "images").glob("headneck_kbp_*")))
    source = orient_ras(load(path))
    chain = REGIONS["head_neck"]
    found = _to_spacing(source, chain)
    assert found.spacing == pytest.approx(chain.spacing)
    np.testing.assert_allclose(found.affine[:3, 3], source.affine[:3, 3])


def test_equal_percentiles_are_a_constant_volume(tmp_path):
    import nibabel

    voxels = np.zeros((20, 20, 20), np.int16)
    voxels[0, 0, 0] = 100
    nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), tmp_path / "a.nii.gz")
    chain = dataclasses.replace(CHAIN_10K, window=(1.0, 99.0), window_unit="percentile")
    with pytest.raises(VolumeError, match=r"constant: percentiles 1 and 99 are both 0"):
        prepare_volume(tmp_path / "a.nii.gz", chain)


def test_a_spacing_that_cannot_be_right_takes_no_memory(tmp_path):
    import nibabel

    voxels = np.arange(8, dtype=np.int16).reshape(2, 2, 2)
    affine = np.diag([25.0, 25.0, 25.0, 1.0])
    nibabel.save(nibabel.Nifti1Image(np.tile(voxels, (60, 60, 60)), affine), tmp_path / "a.nii")
    with pytest.raises(VolumeError, match=r"too large: 1984x1984x1984 voxels .* 25x25x25 mm right"):
        prepare_volume(tmp_path / "a.nii", REGIONS["abdomen"])
