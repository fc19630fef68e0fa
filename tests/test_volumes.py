import dataclasses
import gzip
import pickle
import struct
import tracemalloc

import nibabel
import numpy as np
import pytest
import torch
from conftest import shared_file
from hypothesis import given, settings
from hypothesis import strategies as st

from voco_jax.data.prepare import CHAIN_10K
from voco_jax.data.resample import resize
from voco_jax.data.volumes import (
    VolumeError,
    dequantise,
    foreground_box,
    load,
    orient_ras,
    prepare_volume,
    quantise,
)
from voco_jax.errors import InputError

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


def body(shape=(20, 18, 12), seed=0):
    """Air with a textured box of tissue in it, off centre; HU."""
    hu = np.full(shape, -1000.0)
    noise = np.random.default_rng(seed).normal(60, 40, shape)
    part = np.s_[2:-5, 4:-2, 1:-3]
    hu[part] = np.rint(np.maximum(noise[part], 0))
    return hu


def save(path, hu, axes="RAS", spacing=(2, 2.5, 3), dtype=np.int16, slope=(1, 0), version=1):
    kind = nibabel.Nifti1Image if version == 1 else nibabel.Nifti2Image
    stored = (hu - slope[1]) / slope[0]
    stored = np.rint(stored).astype(dtype) if np.dtype(dtype).kind in "iu" else stored.astype(dtype)
    image = kind(stored, np.diag([*spacing, 1.0]), dtype=dtype)
    image.header.set_data_dtype(dtype)
    turn = nibabel.orientations.ornt_transform(
        nibabel.orientations.axcodes2ornt("RAS"), nibabel.orientations.axcodes2ornt(axes)
    )
    image = image.as_reoriented(turn)
    image.header.set_slope_inter(*slope)
    nibabel.save(image, path)
    return path


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


def test_trailing_axes_of_one_voxel_are_dropped(tmp_path):
    save(tmp_path / "a.nii", body())
    nibabel.save(
        nibabel.Nifti1Image(body().astype(np.int16)[..., None, None], np.diag([2, 2.5, 3, 1])),
        tmp_path / "b.nii",
    )
    volumes = [prepare_volume(tmp_path / name, CHAIN).voxels for name in ("a.nii", "b.nii")]
    np.testing.assert_array_equal(*volumes)


def test_padding_values_do_not_matter(tmp_path):
    hu = body()
    a = prepare_volume(save(tmp_path / "a.nii", hu), CHAIN)
    for padding in (-1024, -2048, -3024):
        b = prepare_volume(save(tmp_path / "b.nii", np.where(hu < -900, padding, hu)), CHAIN)
        assert b.box == a.box
        np.testing.assert_array_equal(a.voxels, b.voxels)


def test_compression_is_recognised_by_content(tmp_path):
    save(tmp_path / "a.nii", body())
    content = (tmp_path / "a.nii").read_bytes()
    (tmp_path / "b.nii").write_bytes(gzip.compress(content[:900]) + gzip.compress(content[900:]))
    a, b = (load(tmp_path / name).voxels for name in ("a.nii", "b.nii"))
    np.testing.assert_array_equal(a, b)


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


# ---- refusals


def reason(path):
    with pytest.raises(VolumeError) as caught:
        prepare_volume(path, CHAIN)
    assert str(caught.value) == f"{path}: {caught.value.reason}"
    return caught.value.reason


def patched(path, offset, content):
    """A copy of a valid file with some header bytes changed."""
    save(path, body())
    data = bytearray(path.read_bytes())
    data[offset : offset + len(content)] = content
    path.write_bytes(data)
    return path


def test_files_that_are_no_nifti(tmp_path):
    path = tmp_path / "a.nii.gz"
    assert reason(path).startswith("missing file")
    path.touch()
    assert reason(path).startswith("empty file")
    path.write_bytes(b"hello")
    assert reason(path).startswith("not a NIfTI")
    path.write_bytes(np.random.default_rng(0).bytes(5000))
    assert reason(path).startswith("not a NIfTI")
    path.write_bytes(gzip.compress(b"hello" * 1000))
    assert reason(path).startswith("not a NIfTI")
    assert reason(tmp_path).startswith("not a file: found a folder")
    path.write_bytes(b"\x1f\x8b" + b"x" * 600)
    assert reason(path).startswith("damaged gzip")
    (tmp_path / "loop.nii").symlink_to("loop.nii")
    assert reason(tmp_path / "loop.nii").startswith("unreadable")


@pytest.mark.parametrize("suffix", ["nii", "nii.gz"])
def test_truncated_files(tmp_path, suffix):
    path = save(tmp_path / f"a.{suffix}", body())
    content = path.read_bytes()
    expected = "truncated gzip" if suffix == "nii.gz" else "truncated: found"
    for kept in (len(content) - 1, len(content) - 9, len(content) // 2):
        path.write_bytes(content[:kept])
        assert reason(path).startswith(expected)
    path.write_bytes(content[:60])
    assert reason(path).startswith(("truncated gzip", "not a NIfTI"))


def test_damaged_gzip(tmp_path):
    path = save(tmp_path / "a.nii.gz", body())
    content = bytearray(path.read_bytes())
    content[-6] ^= 1  # of the checksum
    path.write_bytes(content)
    assert reason(path).startswith("damaged gzip")


@pytest.mark.parametrize(
    "shape", [(8, 8), (8, 8, 1), (1, 8, 8), (8, 8, 8, 2), (8, 8, 8, 1, 3), (8,)]
)
def test_not_three_dimensional(tmp_path, shape):
    image = nibabel.Nifti1Image(np.arange(np.prod(shape), dtype=np.int16).reshape(shape), np.eye(4))
    nibabel.save(image, tmp_path / "a.nii")
    assert reason(tmp_path / "a.nii").startswith("not 3-D: shape ")


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


@pytest.mark.parametrize("spacing", [(0.001, 1, 1), (1, 1, 80), (1, 1e30, 1)])
def test_absurd_spacing(tmp_path, spacing):
    assert reason(save(tmp_path / "a.nii", body(), spacing=spacing)).startswith("absurd spacing")


def test_absurd_affine(tmp_path):
    nan = struct.pack("<f", np.nan)
    assert reason(patched(tmp_path / "a.nii", 280, nan)).startswith("absurd spacing")
    image = nibabel.Nifti1Image(body().astype(np.int16), None)
    image.header["sform_code"] = 1
    for row, values in zip(("srow_x", "srow_y", "srow_z"), [(2, 2), (0, 0), (0, 0)], strict=True):
        image.header[row] = [*values, 0 if row != "srow_z" else 2, 0]
    image.header["pixdim"][1:4] = 2
    (tmp_path / "b.nii").write_bytes(
        image.header.binaryblock[:344] + b"n+1\0" + bytes(4) + body().astype("<i2").tobytes()
    )
    assert reason(tmp_path / "b.nii").startswith("absurd orientation")


@pytest.mark.parametrize("dtype", ["RGB", np.complex64])
def test_colours_and_complex_numbers(tmp_path, dtype):
    if dtype == "RGB":
        dtype = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])
    nibabel.save(nibabel.Nifti1Image(np.zeros((5, 5, 5), dtype), np.eye(4)), tmp_path / "a.nii")
    assert reason(tmp_path / "a.nii").startswith("not a grey image")


def test_absurd_sizes_take_no_memory(tmp_path):
    def dims(*sizes):
        return struct.pack("<8h", 3, *sizes, 1, 1, 1, 1)

    plain = patched(tmp_path / "a.nii", 40, dims(2000, 2000, 500))
    huge = patched(tmp_path / "b.nii", 40, dims(32767, 32767, 32767))
    packed = [tmp_path / "c.nii.gz", tmp_path / "d.nii.gz"]
    packed[0].write_bytes(gzip.compress(plain.read_bytes()))
    packed[1].write_bytes(gzip.compress(huge.read_bytes()))
    negative = patched(tmp_path / "e.nii", 40, dims(-5, 5, 5))
    tracemalloc.start()
    assert reason(plain).startswith("truncated: found")
    assert reason(huge).startswith("absurd size")
    assert reason(packed[0]).startswith("absurd size: the header claims 2000x2000x500 voxels")
    assert reason(packed[1]).startswith("absurd size")
    assert reason(negative).startswith(("not 3-D", "unreadable"))
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()


@settings(max_examples=150, deadline=None)
@given(
    changes=st.lists(st.tuples(st.integers(0, 351), st.integers(0, 255)), min_size=1, max_size=6)
)
def test_any_header_is_prepared_or_refused(tmp_path_factory, changes):
    path = tmp_path_factory.getbasetemp() / "fuzz.nii"
    if not path.exists():
        save(path, body())
    content = bytearray(path.read_bytes())
    for offset, value in changes:
        content[offset] = value
    other = path.with_name("fuzzed.nii")
    other.write_bytes(content)
    try:
        assert np.isfinite(prepare_volume(other, CHAIN).voxels).all()
    except VolumeError as error:
        refused = error.reason
    else:
        refused = ""
    assert not refused.startswith("unexpected")


def test_errors_travel_between_processes():
    error = pickle.loads(pickle.dumps(VolumeError("a.nii", "constant: 0")))
    assert isinstance(error, InputError)
    assert (error.path, error.reason, str(error)) == ("a.nii", "constant: 0", "a.nii: constant: 0")
