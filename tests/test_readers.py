import contextlib
import dataclasses
import gzip
import os
import pickle
import struct
import subprocess
import sys
import time
import tracemalloc
import zlib

import nibabel
import numpy as np
import pytest
import SimpleITK
from chains import CHAIN_10K
from conftest import shared_file
from hypothesis import given, settings
from hypothesis import strategies as st
from scans import body, save, save_series

from voco_jax.data.cache import Cache
from voco_jax.data.collect import scan
from voco_jax.data.formats import readers
from voco_jax.data.formats.readers import StoredVolume, VolumeError, file_signature, load
from voco_jax.data.prepare import prepare
from voco_jax.errors import InputError

FORMATS = ("nii", "nii.gz", "img", "hdr", "nrrd", "nhdr", "mha", "mhd")


def reason(path):
    with pytest.raises(VolumeError) as caught:
        load(path)
    assert str(caught.value) == f"{path}: {caught.value.reason}"
    return caught.value.reason


def image(voxels=None, spacing=(2.0, 2.5, 3.0), turn=0.0):
    """ITK's image of x y z voxels; `turn` about z, degrees."""
    stored = body().astype(np.int16) if voxels is None else voxels
    result = SimpleITK.GetImageFromArray(np.ascontiguousarray(stored.T))
    result.SetSpacing(spacing)
    result.SetOrigin((-20.5, 31.25, 7.0))
    cos, sin = np.cos(np.deg2rad(turn)), np.sin(np.deg2rad(turn))
    result.SetDirection((cos, -sin, 0, sin, cos, 0, 0, 0, 1))
    return result


def write(path, picture, packed=False):
    """Through ITK; whatever name of a pair is given, both files."""
    name = str(path)
    SimpleITK.WriteImage(
        picture, name[:-3] + "img" if name.endswith("hdr") and "nhdr" not in name else name, packed
    )
    return path


def same(source, expected, affine):
    np.testing.assert_array_equal(source.hounsfield(source.voxels), expected)
    np.testing.assert_allclose(source.affine, affine, atol=2e-4)
    assert source.axes == "".join(nibabel.aff2axcodes(affine))
    np.testing.assert_allclose(source.spacing, nibabel.affines.voxel_sizes(affine), rtol=1e-5)


# ---- one image in every format


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["headneck_kbp_247", "abdomen_totalseg"])
def test_a_real_ct_is_the_same_in_every_format(tmp_path, name):
    """HU and affine equal nibabel's and MONAI's of the original, in all formats that ITK writes."""
    import monai.transforms as mt

    original = shared_file("ct", "images", f"{name}.nii.gz")
    picture = SimpleITK.ReadImage(str(original))
    nifti = nibabel.load(original)
    expected = nifti.get_fdata(dtype=np.float32)
    same(load(original), expected, nifti.affine)
    for number, format in enumerate(FORMATS):
        for packed in (False, True)[: 1 if "i" in format else 2]:
            same(
                load(write(tmp_path / f"{number}{packed}.{format}", picture, packed)),
                expected,
                nifti.affine,
            )
    read = mt.LoadImage(image_only=True)(str(original))
    np.testing.assert_array_equal(read.numpy(), expected)
    np.testing.assert_allclose(read.affine.numpy(), nifti.affine)


def test_a_real_ct_as_dicom_series(tmp_path):
    original = shared_file("ct", "images", "chest_lungdx_a0001.nii.gz")
    nifti = nibabel.load(original)
    save_series(tmp_path / "series", SimpleITK.ReadImage(str(original)) + 1024, rescale=(1, -1024))
    source = load(tmp_path / "series")
    assert source.voxels.dtype == np.int16
    same(source, nifti.get_fdata(dtype=np.float32), nifti.affine)
    files = SimpleITK.ImageSeriesReader.GetGDCMSeriesFileNames(str(tmp_path / "series"))
    itk = SimpleITK.ReadImage(files)
    np.testing.assert_array_equal(SimpleITK.GetArrayViewFromImage(itk).T, source.voxels)
    np.testing.assert_allclose(itk.GetSpacing(), source.spacing, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["u1", "i2", "u2", "i4", "u4", "f4", "f8"])
@pytest.mark.parametrize("format", FORMATS)
def test_types_and_oblique_axes_agree_with_nibabel(tmp_path, format, dtype):
    voxels = np.arange(5 * 4 * 3).reshape(5, 4, 3).astype(dtype)
    picture = image(voxels, turn=25)
    nifti = nibabel.load(write(tmp_path / "true.nii", picture))
    source = load(write(tmp_path / f"a.{format}", picture, packed=True))
    assert source.voxels.dtype.itemsize == np.dtype(dtype).itemsize
    same(source, voxels.astype(np.float32), nifti.affine)


def test_big_endian_and_packed_pairs(tmp_path):
    voxels = body().astype(">i2")
    stored = voxels.T.tobytes()
    header = {
        "a.nhdr": "NRRD0004\ntype: short\ndimension: 3\nsizes: 20 18 12\nencoding: gz\n"
        "endian: big\nspace: RAS\nspace directions: (2,0,0) (0,2.5,0) (0,0,3)\n"
        "space origin: (1,2,3)\ndata file: a.bin\n",
        "a.mhd": "NDims = 3\nDimSize = 20 18 12\nElementType = MET_SHORT\n"
        "ElementSpacing = 2 2.5 3\n"
        "TransformMatrix = -1 0 0 0 -1 0 0 0 1\nOffset = -1 -2 3\nElementByteOrderMSB = True\n"
        "HeaderSize = -1\nElementDataFile = b.bin\n",
    }
    (tmp_path / "a.bin").write_bytes(gzip.compress(stored))
    (tmp_path / "b.bin").write_bytes(b"some header" + stored)
    affine = np.array([[2, 0, 0, 1], [0, 2.5, 0, 2], [0, 0, 3, 3], [0, 0, 0, 1]])
    for name, text in header.items():
        (tmp_path / name).write_text(text)
        same(load(tmp_path / name), voxels.astype(np.float32), affine)
    pair = nibabel.Nifti1Pair(voxels.astype("<i2"), affine)
    pair.header.set_slope_inter(0.5, -3)
    nibabel.save(pair, tmp_path / "p.img.gz")
    for name in ("p.img.gz", "p.hdr.gz"):
        same(load(tmp_path / name), voxels * np.float32(0.5) - 3, affine)


# ---- DICOM series


def test_per_slice_rescale(tmp_path):
    """As PET and some MR have it: each slice by its own tags."""
    scale = [(1 + 0.25 * (index % 3), -1024 - 10 * index) for index in range(12)]
    save_series(tmp_path, image(), rescale=lambda index: scale[index])
    source = load(tmp_path)
    slopes, intercepts = np.array(scale).T
    same(source, (body() * slopes + intercepts).astype(np.float32), source.affine)
    assert source.voxels.dtype == np.float32
    save_series(tmp_path, image(), rescale=lambda index: (1 + index % 2, -index))
    expected = body() * (1 + np.arange(12) % 2) - np.arange(12)
    same(load(tmp_path), expected.astype(np.float32), source.affine)
    assert load(tmp_path).voxels.dtype == np.int16


def test_hu_that_need_more_than_16_bits(tmp_path):
    voxels = body() + 1000
    voxels[3, 3, 8] = 30000
    save_series(tmp_path, image(voxels.astype(np.int16)), rescale=(1, 20000))
    source = load(tmp_path)
    assert source.voxels.dtype == np.int32
    np.testing.assert_array_equal(source.voxels, voxels + 20000)


def test_localisers_and_other_objects_are_left_aside(tmp_path):
    save_series(tmp_path, image())
    expected = load(tmp_path)
    scout = image(np.ones((9, 9, 2), np.int16))
    save_series(tmp_path, scout, series="1.2.9", prefix="scout")
    (tmp_path / "notes.txt").write_text("not DICOM")
    (tmp_path / ".hidden").touch()
    report = bytearray((tmp_path / "0000.dcm").read_bytes())
    at = report.index(b"1.2.840.10008.5.1.4.1.1.2\0")
    report[at : at + 26] = b"1.2.840.10008.5.1.4.1.1.88"
    (tmp_path / "report.dcm").write_bytes(report)
    same(load(tmp_path), expected.voxels.astype(np.float32), expected.affine)
    save_series(tmp_path, image(), series="1.2.8", prefix="second")
    message = reason(tmp_path)
    assert message.startswith("several series: ")
    assert message.count("(CT, 12 slices, 20x18, 2x2.5x3 mm)") == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda k, p: (p[0], p[1] + 1.0 * k, p[2]), "gantry tilt: the axes are 18.4 degrees"),
        (lambda k, p: (p[0], p[1], p[2] + 0.5 * (k >= 5)), "irregular slice spacing: 3.5 mm"),
        (
            lambda k, p: (p[0] + 0.9 * (k == 5), *p[1:]),
            "irregular slice spacing: 3 mm between .*sideways",
        ),
        (
            lambda k, p: (p[0], p[1], p[2] - 3.0 * (k == 5)),
            "duplicate slices: 0004.dcm and 0005.dcm",
        ),
        (lambda k, p: (p[0], p[1], 0.0), "duplicate slices: "),
        (
            lambda k, p: None if k == 4 else p,
            "irregular slice spacing: 6 mm between 0003.dcm and 0005",
        ),
        (lambda k, p: None if k else p, "not 3-D: shape 20x18x1"),
    ],
)
def test_slices_that_are_no_regular_stack(tmp_path, change, message):
    save_series(tmp_path, image(), place=change)
    with pytest.raises(VolumeError, match=message):
        load(tmp_path)


def test_small_irregularities_are_rounding(tmp_path):
    save_series(tmp_path, image(), place=lambda k, p: (p[0], p[1], round(p[2], 0) + 0.1 * (k % 2)))
    assert load(tmp_path).spacing[2] == pytest.approx(3, abs=0.02)


def test_damaged_series(tmp_path):
    assert reason(tmp_path).startswith("no DICOM: found a folder without")
    save_series(tmp_path, image())
    slice = tmp_path / "0007.dcm"
    whole = slice.read_bytes()
    for kept in (0, 100, 1000, len(whole) - 100):
        slice.write_bytes(whole[:kept])
        assert reason(tmp_path).startswith(("damaged slice: 0007.dcm", "unreadable: ", "no "))
        assert "0007.dcm" in reason(tmp_path)
    slice.unlink()
    (tmp_path.parent / "elsewhere.dcm").write_bytes(whole)
    slice.symlink_to(tmp_path.parent / "elsewhere.dcm")
    assert reason(tmp_path).startswith("outside its folder")
    slice.unlink()
    os.mkfifo(slice)
    assert reason(tmp_path).startswith("not a file")
    slice.unlink()
    save_series(tmp_path, image(np.ones((7, 7, 12), np.int16)), prefix="b")
    assert reason(tmp_path).startswith("mixed slices")


# ---- headers that name other files


@pytest.mark.parametrize("format", ["nhdr", "mhd"])
@pytest.mark.parametrize(
    "name",
    [
        "../secret.raw",
        "/etc/passwd",
        "sub/../../secret.raw",
        "..\\secret.raw",
        "link.raw",
        "out/secret.raw",
    ],
)
def test_data_files_stay_in_the_folder_of_their_header(tmp_path, format, name):
    folder = tmp_path / "data"
    folder.mkdir()
    path = write(folder / f"a.{format}", image())
    (folder / "a.raw").rename(tmp_path / "secret.raw")
    (folder / "link.raw").symlink_to("../secret.raw")
    (folder / "out").symlink_to("..")
    path.write_text(path.read_text().replace("a.raw", name))
    assert reason(path).startswith("outside its folder: ")
    assert file_signature(path) == (path.stat().st_size, path.stat().st_mtime_ns)


def test_data_files_that_are_none(tmp_path):
    for format in ("nhdr", "mhd"):
        path = write(tmp_path / f"a.{format}", image())
        text = path.read_text()
        path.write_text(text.replace("a.raw", "gone.raw"))
        assert reason(path).startswith("missing file: its data")
        path.write_text(text.replace("a.raw", "LIST"))
        assert reason(path).startswith("several data files")
        path.write_text(text.replace("a.raw", "a%03d.raw 1 3 1"))
        assert reason(path).startswith("several data files")
    write(tmp_path / "p.img", image())
    (tmp_path / "p.img").unlink()
    assert reason(tmp_path / "p.hdr").startswith("missing file: its data are in 'p.img'")
    os.mkfifo(tmp_path / "q.nii")
    assert reason(tmp_path / "q.nii").startswith("not a file")


@pytest.mark.parametrize("format", ["nrrd", "nhdr", "mha", "mhd", "hdr"])
def test_truncated_and_damaged_data(tmp_path, format):
    for packed in (False, True):
        path = write(tmp_path / f"a.{format}", image(), packed)
        beside = [f for f in tmp_path.iterdir() if f.suffix in (".raw", ".zraw", ".gz", ".img")]
        file = beside[0] if beside else path
        whole = file.read_bytes()
        for kept in (len(whole) - 1, len(whole) // 2 + 400):
            file.write_bytes(whole[:kept])
            assert reason(path).startswith("truncated")
        if packed and format != "hdr":
            damaged = bytearray(whole)
            damaged[-2] ^= 1
            file.write_bytes(damaged)
            assert reason(path).startswith(("damaged gzip", "truncated gzip"))
        for old in (*beside, path):
            old.unlink(missing_ok=True)


def test_what_is_unsupported(tmp_path):
    nrrd, meta = (write(tmp_path / f"a.{f}", image()) for f in ("nhdr", "mhd"))
    texts = {nrrd: nrrd.read_text(), meta: meta.read_text()}
    for path, old, new, message in [
        (nrrd, "encoding: raw", "encoding: bzip2", "unsupported NRRD: encoding 'bzip2'"),
        (nrrd, "encoding: raw", "encoding: raw\nline skip: 2", "unsupported NRRD: encoding 'raw'"),
        (nrrd, "(2,0,0)", "(nan,0,0)", "absurd spacing: nanx2.5x3 mm"),
        (nrrd, "(0,0,3)", "(0,2,3)", "gantry tilt: the axes are 33.7"),
        (nrrd, "(0,0,3)", "(0,0,0)", "absurd spacing: 2x2.5xnan"),
        (nrrd, "NRRD0004", "NRRX0004", "not an NRRD"),
        (nrrd, "sizes: 20 18 12", "sizes: 200000 200000 200000", "absurd size"),
        (nrrd, "sizes: 20 18 12", "sizes: 20 18 120", "truncated: found"),
        (nrrd, "dimension: 3", "dimension: 2", "unreadable: dimension 2 and 3 sizes"),
        (nrrd, "endian: little\n", "", "unreadable: endian is ''"),
        (nrrd, "type: short", "type: char", "not a grey image: voxels are 'char'"),
        (nrrd, "space:", "spaces:", "unreadable: 'spaces: left-posterior-superior'"),
        (nrrd, "left-posterior-superior", "PIR", "unsupported NRRD: space 'PIR'"),
        (nrrd, "encoding: raw", "encoding: raw\nspacings: 2 2 2", "absurd spacing: space, space d"),
        (nrrd, "encoding: raw", "encoding: raw\nencoding: raw", "unreadable: in its header pynrrd"),
        (nrrd, "space directions", "space origins", "unreadable: 'space origins: "),
        (meta, "NDims", "NDims2", "not a MetaImage"),
        (meta, "ElementSpacing", "ElementSpacing2", "absurd spacing: none in its header"),
        (
            meta,
            "BinaryData = True",
            "BinaryData = False",
            "unsupported MetaImage: its voxels are text",
        ),
        (
            meta,
            "NDims = 3",
            "NDims = 3\nElementToIntensityFunctionSlope = 2",
            "unsupported MetaImage: slope 2",
        ),
        (meta, "NDims = 3", "NDims = 3\nHeaderSize = x", "unreadable: HeaderSize"),
        (meta, "DimSize = 20 18 12", "DimSize = 20 -18 12", "not 3-D: shape 20x-18x12"),
        (meta, "DimSize = 20 18 12", "DimSize = 20 1e30 12", "unreadable: DimSize"),
        (meta, "NDims = 3", "NDims = 99999999", "not 3-D: NDims"),
        (meta, "2 2.5 3", "2 -2.5 3", "absurd spacing"),
        (
            meta,
            "ElementType = MET_SHORT",
            "ElementType = MET_SHORT\nElementNumberOfChannels = 3",
            "",
        ),
        (meta, "1 0 0 0 1 0 0 0 1", "1 0 0 0 1 0 0 0 0", "absurd"),
        (meta, "1 0 0 0 1 0 0 0 1", "1 0 0 0 1 0 0 0.3 1", "gantry tilt"),
    ]:
        assert old in texts[path], old
        path.write_text(texts[path].replace(old, new))
        assert reason(path).startswith(message), (new, reason(path))
    colours = SimpleITK.GetImageFromArray(np.zeros((4, 5, 6, 3), np.uint8), isVector=True)
    four = SimpleITK.GetImageFromArray(np.zeros((2, 4, 5, 6), np.int16), isVector=False)
    for format in ("nrrd", "mha"):
        assert reason(write(tmp_path / f"c.{format}", colours)).startswith("not a grey image")
        assert reason(write(tmp_path / f"d.{format}", four)).startswith(("not 3-D", "not a grey"))


NRRD = "NRRD0005\ntype: short\ndimension: 3\nsizes: 5 4 3\nencoding: raw\nendian: little\n"
OBLIQUE = "(1.6,1.2,0.1) (-0.9,1.2,0) (0,-0.1,3)"  # up to 4 degrees from right angles
UPRIGHT = "(0,1.7320508,1) (2.1,0,0) (0,-1.5,2.5980762)"
PLACED = f"space directions: {UPRIGHT}\nspace origin: (1.5,-20,300.25)\n"


def nrrd(path, header, content):
    path.write_bytes(header.encode(errors="surrogateescape") + b"\n" + content)
    return path


@pytest.mark.parametrize(
    ("lines", "change"),
    [
        *((f"space: {name}\n{PLACED}", {}) for name in ("RAS", "LAS", "LPS", "ras", "scanner-xyz")),
        *(
            (f"space: {name}\n{PLACED}", {})
            for side in ("right-anterior", "left-anterior", "left-posterior")
            for name in (f"{side}-superior", f"{side}-Superior".replace("-", " "))
        ),
        ("space: leftanteriorsuperior\n" + PLACED, {}),
        ("space: 3D-right-handed\n" + PLACED, {}),
        ("space dimension: 3\n" + PLACED, {}),
        ("space: RAS\n" + PLACED.splitlines()[0] + "\n", {}),
        ("space: RAS\nspacedirections: ( 2, 0,0) (0 ,3 , 0)(0,0,4 )\nspaceorigin: (1, 2, 3)\n", {}),
        ("spacings: 1.25 2 0.7\n", {}),
        ("spacings: 1.25 2 0.7\naxis mins: -10 20 30\n", {}),
        ("spacings: 1.25 2 0.7\naxismins: -10 20 30\ncenterings: node cell ???\n", {}),
        ("Spacings: 1.25 2 0.7\nspace:=RAS\n# spacings: 1 1 1\ncontent: a: b\nold min: 0\n", {}),
        (
            "spacings: 1.25 2 0.7 3 4\naxis mins: 1 2 3 0 0\n",
            {"dimension: 3": "dimension: 5", "sizes: 5 4 3": "sizes: 5 4 3 1 1"},
        ),
        (  # as ITK writes four axes
            "space dimension: 4\nspace directions: (2,0,0,0) (0,0,3,0) (0,-4,0,0) (0,0,0,5)\n"
            "space origin: (1,2,3,4)\n",
            {"dimension: 3\nsizes: 5 4 3": "dimension: 4\nsizes: 5 4 3 1"},
        ),
        (
            "spacings: 1.25 2 0.7 nan\n",
            {"dimension: 3": "dimension: 4", "sizes: 5 4 3": "sizes: 5 4 3 1"},
        ),
        (
            f"space: RAS\nkinds: stub domain space domain\n{PLACED.replace(': (0,', ': none (0,')}",
            {"dimension: 3": "dimension: 4", "sizes: 5 4 3": "sizes: 1 5 4 3"},
        ),
        ("spacings: 1.25 2 0.7\n", {"endian: little": "endian: big"}),
        ("spacings: 1.25 2 0.7\n", {"type: short": "type: unsigned int", "little": "BIG"}),
        ("spacings: 1.25 2 0.7\n", {"type: short": "type: double", "little": "big"}),
        ("spacings: 1.25 2 0.7\n", {"type: short": "type: uint8_t", "endian: little\n": ""}),
        ("spacings: 1.25 2 0.7\nbyteskip: 7\n", {}),
        ("spacings: 1.25 2 0.7\nbyte skip: -1\n", {"\n": "\r\n"}),
    ],
)
def test_nrrd_headers_agree_with_itk(tmp_path, lines, change):
    """Every space, vectors and plain spacings, axes of one voxel, byte orders: as ITK reads it."""
    header = NRRD + lines
    for old, new in change.items():
        assert old in header
        header = header.replace(old, new)
    path = nrrd(tmp_path / "a.nrrd", header, np.random.default_rng(0).bytes(5 * 4 * 3 * 8 + 7))
    source, itk = load(path), SimpleITK.ReadImage(str(path))
    expected = np.squeeze(SimpleITK.GetArrayFromImage(itk)).T
    assert source.voxels.shape == (5, 4, 3)
    assert source.voxels.dtype.itemsize == expected.dtype.itemsize
    np.testing.assert_array_equal(source.voxels, expected)
    count = itk.GetDimension()
    steps = np.reshape(itk.GetDirection(), (count, count)) * itk.GetSpacing()
    to_ras = np.diag([-1, -1, 1])
    np.testing.assert_allclose(source.affine[:3, :3], to_ras @ steps[:3, :3], rtol=1e-15)
    np.testing.assert_array_equal(source.affine[:3, 3], to_ras @ itk.GetOrigin()[:3])


LONG = 2**20 - 300


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("#" + "x" * 2 * LONG, "absurd header: no end in the first"),
        ("a:=b\n" * (LONG // 5), "absurd spacing: none"),
        ("spacings: 1 1 1\n" * (LONG // 16), "unreadable: in its header pynrrd found NRRDError"),
        ("no field\n" * (LONG // 9), "unreadable: 'no field'"),
        ("spacings: " + "1 " * (LONG // 2), "absurd header: its spacings is"),
        ("space: RAS\nspace directions: " + "(1) " * (LONG // 4), "absurd header: its space dir"),
        ("space: RAS\nspace directions: " + " " * LONG, "unreadable: in its header pynrrd"),
        ("space: RAS\nspace directions: " + "(1) " * 999, "unreadable: space directions has"),
        ("space: RAS\nspace directions: " + "((((" * 99, "unreadable: in its header pynrrd"),
        ("space: RAS\nspace directions: none none none", "unsupported NRRD: space 'RAS' of 0"),
        ("space: RAS\nspace directions: (1e308,0,0) (0,1,0) (0,0,1)", "absurd spacing: nanx1x1"),
        ("space: RAS\nspace directions: (inf,0,0) (0,1,0) (0,0,1)", "absurd spacing: nanx1x1"),
        ("space: RAS\nspace directions: (1,0,0) none (0,0,1)", "absurd spacing: 1xnanx1"),
        (f"space: RAS\n{PLACED}".replace("300.25", "-inf"), "absurd spacing: "),
        (f"space: RAS\n{PLACED}".replace("300.25", "1e300"), "absurd spacing: "),
        (f"space: RAST\n{PLACED}", "unsupported NRRD: space 'RAST'"),
        (f"space dimension: {'9' * 99}\n{PLACED}", "unsupported NRRD: space"),
        (PLACED, "absurd spacing: space directions in its header"),
        ("space: RAS\nspacings: 1 1 1", "absurd spacing: space, spacings in its header"),
        (f"space: RAS\nspace directions: {OBLIQUE}", "gantry tilt: "),
        ("spacings: inf 1 1", "absurd spacing: [[inf"),
        ("spacings: nan 1 1", "absurd spacing: nanx1x1"),
        ("spacings: 1e300 1 1", "absurd spacing: [[1e+300"),
        ("spacings: -1e-9 1 1", "absurd spacing: 1e-09x1x1"),
        ("spacings: 1 1", "unreadable: spacings has [2] values"),
        ("spacings: one 1 1", "unreadable: in its header pynrrd found ValueError"),
        ("spacings: \udcff 1 1", "unreadable: in its header pynrrd found ValueError"),
        ("spacings: 1 1 1\nkinds: domain vector domain", "not a grey image: axis 1 is a 'vector'"),
        (
            f"spacings: 1 1 1\nbyte skip: {'9' * 4000}",
            "unsupported NRRD: encoding 'raw', byte skip",
        ),
        (f"spacings: 1 1 1\nbyte skip: {'9' * 5000}", "unreadable: in its header pynrrd"),
        ("spacings: 1 1 1\nbyte skip: 9000000000000000", "absurd size: "),
        ("spacings: 1 1 1\nbyte skip: -2", "unsupported NRRD: encoding 'raw', byte skip -2"),
        ("spacings: 1 1 1\nlineskip: 1", "unsupported NRRD: encoding 'raw', byte skip 0, line s"),
        ("spacings: 1 1 1\ndata file: LIST\na.raw\nb.raw", "several data files: found 'LIST'"),
        ("spacings: 1 1 1\ndata file: LIST 2\n" + "a\n" * (LONG // 2), "several data files"),
        ("spacings: 1 1 1\ndata file: %n%n%s", "several data files"),
        ("spacings: 1 1 1\ndata file: /etc/passwd", "outside its folder"),
        ("spacings: 1 1 1\ndata file: a\0b", "outside its folder"),
        ("spacings: 1 1 1\ndata file: .", "not a file"),
        ("spacings: 1 1 1\ndata file: " + "a/" * 5000, "missing file"),
    ],
    ids=lambda value: value[:40].encode(errors="replace").decode() if value else None,
)
def test_hostile_nrrd_headers(tmp_path, lines, expected):
    path = nrrd(tmp_path / "a.nrrd", f"{NRRD}{lines.strip()}\n", bytes(120))
    start = time.process_time()
    message = reason(path)
    file_signature(path)
    assert time.process_time() - start < 10  # 1 MiB of fields takes below one second
    assert message.startswith(expected), message
    assert len(message) < 500
    message.encode()


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("5 4 3", "1e300 4 3", "not 3-D: shape -"),
        ("5 4 3", "nan 4 3", "not 3-D: shape -"),
        ("5 4 3", "-5 -4 3", "not 3-D: shape -5x-4x3"),
        ("5 4 3", "9223372036854775807 2 2", "not 3-D: shape -"),
        ("5 4 3", "4294967296 4294967296 4294967296", "absurd size: "),
        ("5 4 3", "1300 1300 1300", "absurd size: "),
        ("5 4 3", "1290 1290 1290", "truncated: found"),
        ("5 4 3", "60", "unreadable: dimension 3 and 1 sizes"),
        ("dimension: 3", "dimension: " + "9" * 4000, "unreadable: dimension 9999"),
        ("dimension: 3", "dimension: 1e99", "unreadable: in its header pynrrd found ValueError"),
        ("dimension: 3\n", "", "unreadable: no dimension in its header"),
        ("NRRD0005", "NRRD0009", "unreadable: in its header pynrrd found NRRDError"),
        ("NRRD0005", "NRRD0005" + "5" * LONG, "unreadable: in its header pynrrd found NRRDError"),
        ("type: short", "type: " + "s" * 9999, "not a grey image: voxels are 'sss"),
        ("type: short", "type: block", "not a grey image: voxels are 'block'"),
    ],
    ids=lambda value: value[:40],
)
def test_hostile_nrrd_sizes_and_types(tmp_path, old, new, expected):
    header = NRRD.replace(old, new) + "spacings: 1 1 1\n"
    path = nrrd(tmp_path / "a.nrrd", header, bytes(120))
    tracemalloc.start()
    message = reason(path)
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()
    assert message.startswith(expected), message
    assert len(message) < 500


def test_bombs_take_no_memory(tmp_path):
    """Zeros that unpack to more than the header says, and headers that say more than there is."""
    text = (
        "NDims = 3\nDimSize = {0}\nElementType = MET_SHORT\nElementSpacing = 1 1 1\n"
        "CompressedData = True\nElementDataFile = LOCAL\n"
    )
    bomb = zlib.compress(bytes(64 * 2**20))
    (tmp_path / "a.mha").write_bytes(text.format("8 8 8").encode() + bomb)
    (tmp_path / "b.mha").write_bytes(text.format("1290 1290 1290").encode() + bomb)
    load(write(tmp_path / "warm.mha", image()))
    tracemalloc.start()
    assert not load(tmp_path / "a.mha").voxels.any()
    assert reason(tmp_path / "b.mha").startswith("absurd size")
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()


# ---- whether files have changed


def test_file_signature(tmp_path):
    save(tmp_path / "a.nii.gz", body())
    stat = (tmp_path / "a.nii.gz").stat()
    assert file_signature(tmp_path / "a.nii.gz") == (stat.st_size, stat.st_mtime_ns)
    write(tmp_path / "p.img", image())
    write(tmp_path / "m.mhd", image())
    write(tmp_path / "n.nhdr", image())
    save_series(tmp_path / "series", image())
    for path, part in (
        ("p.hdr", "p.img"),
        ("p.img", "p.hdr"),
        ("m.mhd", "m.raw"),
        ("n.nhdr", "n.raw"),
        ("series", "series/0003.dcm"),
    ):
        before = file_signature(tmp_path / path)
        os.utime(tmp_path / part, ns=(0, before[1] + 5))
        assert file_signature(tmp_path / path) == (before[0], before[1] + 5)
        with open(tmp_path / part, "ab") as file:
            file.write(b"12")
        assert file_signature(tmp_path / path)[0] == before[0] + 2
    with pytest.raises(OSError, match="No such file"):
        file_signature(tmp_path / "none")


def test_every_format_is_found_prepared_and_watched(tmp_path):
    """Of one image, scan -> prepare gives one prepared volume; a changed part is done again."""
    data = tmp_path / "data"
    for format in ("nii.gz", "img", "nrrd", "nhdr", "mha", "mhd"):
        (data / format).mkdir(parents=True)
        write(data / format / f"a.{format}", image())
    save_series(data / "series", image())
    chain = dataclasses.replace(CHAIN_10K, volume_size=(16, 16, 8))
    volumes = scan(data)
    assert prepare(volumes, tmp_path / "cache", chain, workers=0, progress=False).done == 7
    entries = Cache.open(tmp_path / "cache", chain).entries
    assert len({(entry.checksum, entry.axes, entry.shape, entry.box) for entry in entries}) == 1
    for part in ("img/a.img", "nhdr/a.raw", "mhd/a.raw", "series/0005.dcm"):
        os.utime(data / part, (10**9, 2 * 10**9))
    again = prepare(volumes, tmp_path / "cache", chain, workers=0, progress=False)
    assert (again.done, again.skipped) == (4, 3)


def test_a_new_format_is_a_line_in_the_table(tmp_path, monkeypatch):
    """Scans, reads and watches it; text files of numbers stand for one."""

    def load_text(path):
        voxels = np.loadtxt(path).reshape(3, 4, 5)
        return StoredVolume(path, voxels, 1.0, 0.0, np.diag([1.0, 2, 3, 1]), "RAS")

    text = readers.Format(
        suffixes=(".txt",), load=load_text, files=lambda path: [path, path.with_suffix(".log")]
    )
    (tmp_path / "a.TXT").write_text("7 " * 60)
    (tmp_path / "a.log").write_text("12345")
    assert reason(tmp_path / "a.TXT").startswith("not a NIfTI")
    monkeypatch.setattr(readers, "FORMATS", (*readers.FORMATS, text))
    (volume,) = scan(tmp_path)
    assert volume.path == tmp_path / "a.TXT"
    assert (load(volume.path).voxels == 7).all()
    assert file_signature(volume.path)[0] == 120 + 5
    with pytest.raises(OSError, match="No such file"):
        (tmp_path / "a.log").unlink() or file_signature(volume.path)
    (tmp_path / "a.TXT").write_text("seven")
    assert reason(volume.path).startswith("unreadable: ValueError: could not convert")


def test_nifti_needs_no_other_library(tmp_path):
    """SimpleITK takes a quarter of a second to import, pynrrd less."""
    save(tmp_path / "a.nii", body())
    code = (
        "import sys; from voco_jax.data.collect import scan; "
        "from voco_jax.data.formats.readers import file_signature, load; "
        f"path = scan({str(tmp_path)!r})[0].path; load(path); file_signature(path); "
        "print([name for name in ('SimpleITK', 'nrrd', 'jax') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"


# ---- NIfTI files


def test_trailing_axes_of_one_voxel_are_dropped(tmp_path):
    save(tmp_path / "a.nii", body())
    nibabel.save(
        nibabel.Nifti1Image(body().astype(np.int16)[..., None, None], np.diag([2, 2.5, 3, 1])),
        tmp_path / "b.nii",
    )
    volumes = [load(tmp_path / name).voxels for name in ("a.nii", "b.nii")]
    np.testing.assert_array_equal(*volumes)


def test_compression_is_recognised_by_content(tmp_path):
    save(tmp_path / "a.nii", body())
    content = (tmp_path / "a.nii").read_bytes()
    (tmp_path / "b.nii").write_bytes(gzip.compress(content[:900]) + gzip.compress(content[900:]))
    a, b = (load(tmp_path / name).voxels for name in ("a.nii", "b.nii"))
    np.testing.assert_array_equal(a, b)


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
    assert reason(tmp_path).startswith("no DICOM: found a folder")
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
    image.header["pixdim"][1:4], image.header["vox_offset"] = 2, 352
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
def test_any_header_is_read_or_refused(tmp_path_factory, changes):
    path = tmp_path_factory.getbasetemp() / "fuzz.nii"
    if not path.exists():
        save(path, body())
    content = bytearray(path.read_bytes())
    for offset, value in changes:
        content[offset] = value
    other = path.with_name("fuzzed.nii")
    other.write_bytes(content)
    try:
        assert load(other).voxels.ndim == 3
    except VolumeError as error:
        refused = error.reason
        assert ":" in refused


def test_errors_travel_between_processes():
    error = pickle.loads(pickle.dumps(VolumeError("a.nii", "constant: 0")))
    assert isinstance(error, InputError)
    assert (error.path, error.reason, str(error)) == ("a.nii", "constant: 0", "a.nii: constant: 0")


# ---- headers that other programs write


def nifti(path, *fields):
    """An LPS volume of 0.703125x0.703125x3 mm with an sform and a qform; fields at their offset."""
    affine = np.diag([-0.703125, -0.703125, 3, 1])
    made = nibabel.Nifti1Image(body().astype(np.int16), affine)
    made.set_qform(affine, 1)
    nibabel.save(made, path)
    with open(path, "r+b") as file:
        for offset, form, values in fields:
            file.seek(offset)
            file.write(struct.pack(form, *values))
    return path


PIXDIM, CODES, QUATERNION, SFORM, UNITS, OFFSET = 80, 252, 256, 280, 123, 108
NO_QFORM = ((CODES, "<2h", (0, 1)), (QUATERNION, "<3f", (0, 0, 0)))
OBLIQUE_SFORM = (SFORM, "<12f", (-0.6, 0.8, 0, 5, -0.8, -0.6, 0, 6, 0, 0, 3, 7))


@pytest.mark.parametrize(
    "fields",
    [
        *(
            [(PIXDIM, "<3f", sizes), *NO_QFORM]
            for sizes in ((0.703, 0.703, 3), (1, 1, 1), (0, 0, 0))
        ),
        [(PIXDIM, "<3f", (1.02, 1, 3)), *NO_QFORM, OBLIQUE_SFORM],
        [(CODES, "<2h", (1, 0))],
        [(40, "<8h", (4, 20, 18, 12, 0, 0, 0, 0))],
        [(40, "<8h", (7, 20, 18, 12, 1, 1, 1, 1))],
        [(UNITS, "<B", (255,))],
        [(344, "4s", (b"ni1\0",))],
        [(CODES, "<2h", (1, 0)), (QUATERNION, "<3f", (0, 0, 1.0000005))],
        [(72, "<h", (8,))],
    ],
)
def test_nifti_headers_agree_with_itk(tmp_path, fields):
    """Also where nibabel or MONAI refuse or turn them; the sform's voxel size is the right one."""
    path = nifti(tmp_path / "a.nii", *fields)
    source, itk = load(path), SimpleITK.ReadImage(str(path))
    itk = itk if itk.GetDimension() == 3 else itk[:, :, :, 0]
    np.testing.assert_array_equal(source.voxels, body())
    np.testing.assert_array_equal(SimpleITK.GetArrayFromImage(itk).T, body())
    directions = np.diag([-1, -1, 1]) @ np.reshape(itk.GetDirection(), (3, 3))
    np.testing.assert_allclose(source.affine[:3, :3] / source.spacing, directions, atol=1e-6)
    origin = np.multiply((-1, -1, 1), itk.GetOrigin())
    np.testing.assert_allclose(source.affine[:3, 3], origin, atol=1e-5)
    with contextlib.suppress(Exception):  # what nibabel reads, it reads as we do
        np.testing.assert_allclose(nibabel.load(path).affine, source.affine, rtol=1e-6)


@pytest.mark.parametrize(("unit", "factor"), [(1, 1e-3), (3, 1e3)])
def test_meters_and_microns(tmp_path, unit, factor):
    """As ITK; nibabel and MONAI leave them as they are."""
    sizes = np.multiply((0.703125, 0.703125, 3), factor)
    sform = np.diag([-1, -1, 1]) * sizes
    rows = np.hstack([sform, np.multiply([[-5], [6], [7]], factor)]).ravel()
    fields = [(UNITS, "<B", (unit,)), (PIXDIM, "<3f", sizes), (SFORM, "<12f", rows), *NO_QFORM]
    source = load(nifti(tmp_path / "a.nii", *fields))
    itk = SimpleITK.ReadImage(str(tmp_path / "a.nii"))
    np.testing.assert_allclose(source.spacing, itk.GetSpacing(), rtol=1e-6)
    np.testing.assert_allclose(source.affine[:3, 3], (-5, 6, 7), rtol=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ([(OFFSET, "<f", (0,))], "absurd offset: the header says that voxels begin at byte 0, exp"),
        ([(OFFSET, "<f", (float("nan"),))], "absurd offset: "),
        ([(OFFSET, "<f", (1e30,))], "absurd offset: "),
        ([(OFFSET, "<f", (-352,))], "unreadable: HeaderDataError: vox offset -352"),
        ([(112, "<2f", (1, float("nan")))], "unreadable: HeaderDataError: Valid slope but invalid"),
        ([(QUATERNION, "<3f", (0.9, 0.9, 0.9)), (CODES, "<2h", (1, 0))], "unreadable: "),
        ([(SFORM, "<12f", (0,) * 12), (CODES, "<2h", (0, 1))], "absurd spacing: 0x0x0 mm"),
    ],
)
def test_nifti_headers_that_say_nothing_usable(tmp_path, fields, message):
    assert reason(nifti(tmp_path / "a.nii", *fields)).startswith(message)


@pytest.mark.parametrize(
    "name", ["a\udcfc.nii", "M\udcfcller/a.nii.gz", "\udcff.nrrd", "b\udce9.mha"]
)
def test_names_that_are_not_utf_8(tmp_path, name):
    assert "\\x" in reason(tmp_path / name)
    assert reason(tmp_path / name).startswith("name not UTF-8: ")
