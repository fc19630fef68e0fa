"""Folders of DICOM files as scanners, archives and CDs leave them; made with pydicom."""

import subprocess
from pathlib import Path

import nibabel
import numpy as np
import pytest
from dcm2niix import bin as dcm2niix
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid
from scans import body

from voco_jax.data.formats.dicom_files import series_in
from voco_jax.data.formats.dicom_series import _SHORT as SHORT
from voco_jax.data.formats.readers import VolumeError, load
from voco_jax.data.volumes import orient_ras

CT, CAPTURE = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.7"
SERIES = "1.2.3.4"
HU = body().astype(np.int16)
SIDE = [1, 0, 0, 0, 0, -1]


def image_of(plane, kind=CT, series=SERIES, **tags):
    """An object with pixels; of `tags` those that are None are left out."""
    meta, made, uid = FileMetaDataset(), Dataset(), generate_uid()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = kind, uid
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    colours = plane.ndim > 2
    values = {
        "file_meta": meta,
        "SOPClassUID": kind,
        "SOPInstanceUID": uid,
        "StudyInstanceUID": "1.2.3",
        "SeriesInstanceUID": series,
        "Modality": "CT",
        "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"],
        "ImagePositionPatient": [-30, -20, 0],
        "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
        "PixelSpacing": [2.5, 2],
        "SliceThickness": 3,
        "SamplesPerPixel": 3 if colours else 1,
        "PlanarConfiguration": 0 if colours else None,
        "PhotometricInterpretation": "RGB" if colours else "MONOCHROME2",
        "Rows": plane.shape[0],
        "Columns": plane.shape[1],
        "BitsAllocated": 8 * plane.itemsize,
        "BitsStored": 8 * plane.itemsize,
        "HighBit": 8 * plane.itemsize - 1,
        "PixelRepresentation": 0,
        "RescaleSlope": 1,
        "RescaleIntercept": -1024,
        "PixelData": plane.tobytes(),
    }
    for name, value in (values | tags).items():
        if value is not None:
            setattr(made, name, value)
    made["PixelData"].VR = "OW" if plane.itemsize > 1 else "OB"
    return made


def save(made, path, preamble=True, implicit=False):
    if preamble:
        made.save_as(path, enforce_file_format=True)
    else:
        del made.file_meta
        made.save_as(path, implicit_vr=implicit, little_endian=True)


def series(folder, change=lambda k: {}, name="IM{:04}", **how):
    """A CT of twelve slices; `change` gives the tags of one."""
    folder.mkdir(exist_ok=True)
    for k in range(HU.shape[2]):
        plane = np.ascontiguousarray((HU[:, :, k].T + 1024).astype(np.uint16))
        tags = {"InstanceNumber": k + 1, "ImagePositionPatient": [-30, -20, 3.0 * k], **change(k)}
        save(image_of(plane, **tags), folder / name.format(k), **how)
    return folder


def without_pixels(kind):
    made = image_of(np.zeros((4, 4), np.uint16), kind, "1.2.99")
    for name in (
        "PixelData",
        "Rows",
        "Columns",
        "ImagePositionPatient",
        "PhotometricInterpretation",
    ):
        delattr(made, name)
    return made


GREY, PAGE = np.zeros((9, 7), np.uint16), np.zeros((9, 7, 3), np.uint8)
SCOUT = {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"], "ImageOrientationPatient": SIDE}
BESIDE = {
    "dose page": (lambda: image_of(PAGE, CAPTURE, "1.2.5"), "not a grey image"),
    "colour page in the series": (lambda: image_of(PAGE), "not a grey image"),
    "protocol page": (
        lambda: image_of(PAGE[..., 0], CAPTURE, "1.2.6", ImagePositionPatient=None),
        "no position",
    ),
    "page in the series": (
        lambda: image_of(
            GREY, ImageType=["DERIVED", "SECONDARY", "SCREEN SAVE"], ImageOrientationPatient=None
        ),
        "no orientation",
    ),
    "palette": (
        lambda: image_of(
            PAGE[..., 0],
            CAPTURE,
            "1.2.7",
            PhotometricInterpretation="PALETTE COLOR",
            **{
                f"{colour}PaletteColorLookupTable{part}": value
                for colour in ("Red", "Green", "Blue")
                for part, value in (("Descriptor", [256, 0, 16]), ("Data", bytes(512)))
            },
        ),
        "not a grey image",
    ),
    "scout": (lambda: image_of(GREY, CT, "1.2.1", **SCOUT), "localiser"),
    "scout in the series": (lambda: image_of(GREY, **SCOUT), "localiser"),
    "scout, MONOCHROME1": (
        lambda: image_of(
            GREY, CT, "1.2.1", ImageOrientationPatient=SIDE, PhotometricInterpretation="MONOCHROME1"
        ),
        "not a grey image",
    ),
    "scout in the series, MONOCHROME1, not called one": (
        lambda: image_of(
            GREY, ImageOrientationPatient=SIDE, PhotometricInterpretation="MONOCHROME1"
        ),
        "not a grey image",
    ),
    "scout in the series, not called one": (
        lambda: image_of(GREY, ImageOrientationPatient=SIDE),
        "another series",
    ),
    "several frames": (
        lambda: image_of(np.zeros((2, 18 * 20), np.uint16), CAPTURE, "1.2.8", NumberOfFrames=2,
                         Rows=18, Columns=20),
        "several frames",
    ),
    **{
        name: (lambda uid=uid: without_pixels(uid), "no image")
        for name, uid in {
            "dose report": "1.2.840.10008.5.1.4.1.1.88.67",
            "Siemens CSA": "1.3.12.2.1107.5.9.1",
            "Philips private": "1.3.46.670589.11.0.0.12.1",
            "real world value mapping": "1.2.840.10008.5.1.4.1.1.67",
            "presentation state": "1.2.840.10008.5.1.4.1.1.11.1",
            "RT structures": "1.2.840.10008.5.1.4.1.1.481.3",
            "encapsulated PDF": "1.2.840.10008.5.1.4.1.1.104.1",
            "fiducials": "1.2.840.10008.5.1.4.1.1.66.2",
            "DICOMDIR": "1.2.840.10008.1.3.10",
        }.items()
    },
}  # fmt: skip


@pytest.mark.parametrize("what", BESIDE)
@pytest.mark.parametrize("name", ["zz", "zz.dcm"])
def test_what_lies_beside_slices_is_set_aside(tmp_path, what, name):
    make, reason = BESIDE[what]
    series(tmp_path / "ct")
    save(make(), tmp_path / "ct" / name)
    found = load(tmp_path / "ct")
    np.testing.assert_array_equal(found.voxels, HU)
    assert [file for file, _ in found.aside] == [name]
    assert found.aside[0][1].startswith(f"{reason}: ")
    assert found.modality == "CT"


def by_dcm2niix(folder, out):
    out.mkdir()
    subprocess.run([dcm2niix, "-b", "n", "-f", "%j", "-o", out, folder], capture_output=True)
    (made,) = (path for path in out.glob("*.nii") if np.prod(nibabel.load(path).shape) == HU.size)
    image = nibabel.as_closest_canonical(nibabel.load(made))
    return image.get_fdata(dtype=np.float32), image.affine


def test_with_all_of_it_the_ct_is_as_dcm2niix_writes_it(tmp_path):
    folder = series(tmp_path / "ct")
    for number, (make, _) in enumerate(BESIDE.values()):
        save(make(), folder / f"other{number}")
    found = load(folder)
    assert len(found.aside) == len(BESIDE)
    # dcm2niix mixes what is in the CT's own series and says nothing of its place: not for it.
    for number, what in enumerate(BESIDE):
        if "in the series" in what:
            (folder / f"other{number}").unlink()
    expected, affine = by_dcm2niix(folder, tmp_path / "out")
    found = orient_ras(found)
    np.testing.assert_array_equal(found.hounsfield(found.voxels), expected)
    np.testing.assert_allclose(found.affine, affine, atol=1e-4)


@pytest.mark.parametrize("implicit", [True, False])
@pytest.mark.parametrize("name", ["IM{:04}", "{}.dcm", "1.2.840.{}"])
def test_slices_without_a_preamble(tmp_path, name, implicit):
    folder = series(tmp_path / "ct", name=name, preamble=False, implicit=implicit)
    np.testing.assert_array_equal(load(folder).voxels, HU)
    assert series_in([path.name for path in folder.iterdir()], str(folder)) == ["."]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("VERSION", b"2.1\n"),
        ("LOCKFILE", b""),
        ("README", b"viewer " * 500),
        ("AUTORUN", b"\x08\0\0\0 of no class"),
        ("AAA", bytes(300)),
        ("run.exe", b"MZ"),
        ("index.htm", b"<p>"),
    ],
)
def test_files_of_a_cd(tmp_path, name, content):
    folder = series(tmp_path / "ct")
    (folder / name).write_bytes(content)
    found = load(folder)
    np.testing.assert_array_equal(found.voxels, HU)
    assert [file for file, _ in found.aside] == [name]
    assert found.aside[0][1].startswith("no DICOM: ")
    assert series_in([path.name for path in folder.iterdir()], str(folder)) == ["."]


@pytest.mark.parametrize("size", [0, 100, 3000])
def test_a_damaged_slice_is_no_file_of_a_cd(tmp_path, size):
    folder = series(tmp_path / "ct")
    (folder / "IM0011").write_bytes(bytes(size))  # the last: the others are a regular stack
    with pytest.raises(VolumeError, match="damaged slice: IM0011"):
        load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ImagePositionPatient": None}, "no position"),
        ({"PixelSpacing": None}, "no pixel spacing"),
        ({"PhotometricInterpretation": "MONOCHROME1"}, "not a grey image"),
        ({"ImageOrientationPatient": [1, 0, 0, 0, 0.99, 0.14]}, "mixed slices|absurd orientation"),
    ],
)
def test_a_slice_with_a_damaged_header_is_not_set_aside(tmp_path, change, message):
    folder = series(tmp_path / "ct", lambda k: change if k == 11 else {})
    with pytest.raises(VolumeError, match=message):
        load(folder)


def test_copies_are_set_aside(tmp_path):
    folder = series(tmp_path / "ct")
    for name in ("IM0003", "IM0011"):
        (folder / f"copy of {name}").write_bytes((folder / name).read_bytes())
    found = load(folder)
    np.testing.assert_array_equal(found.voxels, HU)
    assert len(found.aside) == 2
    assert all(why.startswith("a copy: of ") for _, why in found.aside)


@pytest.mark.parametrize(
    ("tag", "values"),
    [
        ("AcquisitionNumber", (1, 2)),
        ("TemporalPositionIdentifier", (1, 2)),
        ("NominalPercentageOfCardiacPhase", (40.0, 75.0)),
        ("EchoNumbers", (1, 2)),
        ("KVP", (80, 140)),
        ("ConvolutionKernel", ("B30f", "B70f")),
        ("SeriesNumber", (3, 4)),
    ],
)
@pytest.mark.parametrize("places", ["between", "the same"])
def test_two_volumes_in_one_series_are_told(tmp_path, tag, values, places):
    """Slices of the second at the places of the first's, or halfway: a regular grid again."""

    def change(k):
        place = 3.0 * (k // 2) if places == "the same" else 1.5 * k
        return {tag: values[k % 2], "ImagePositionPatient": [-30, -20, place]}

    with pytest.raises(
        VolumeError, match=rf"several volumes: one series with {SHORT[tag]} \S+ \(6 "
    ):
        load(series(tmp_path / "ct", change))


def test_two_volumes_that_only_their_numbers_tell_apart(tmp_path):
    def change(k):
        return {"InstanceNumber": 1 + k // 2 + 6 * (k % 2)}

    with pytest.raises(
        VolumeError, match=r"several volumes: .* images 1 to 6 .*, images 7 to 12 \(6 images\)"
    ):
        load(series(tmp_path / "ct", change))


@pytest.mark.parametrize(
    "change",
    [
        lambda k: {"AcquisitionNumber": 1 + k // 4},  # one after the other, as of a long scan
        lambda k: {"AcquisitionNumber": k + 1},
        lambda k: {"InstanceNumber": 12 - k},
        lambda k: {"InstanceNumber": (5 * k) % 12},
        lambda k: {"InstanceNumber": None},
        lambda k: {"AcquisitionNumber": 1 if k % 2 else None},
        lambda k: {"SOPInstanceUID": "1.2.3.4.5"},
    ],
)
def test_one_volume_is_not_told_for_two(tmp_path, change):
    np.testing.assert_array_equal(load(series(tmp_path / "ct", change)).voxels, HU)


def test_names_that_are_not_utf_8(tmp_path):
    """ITK would end the process."""
    folder = series(tmp_path / "ct")
    (folder / "IM0003").rename(Path(str(folder), "IM000\udcfc"))
    with pytest.raises(VolumeError, match=r"name not UTF-8: .*IM000\\xfc; rename it"):
        load(folder)
    folder.rename(tmp_path / "P\udce4tient")
    with pytest.raises(VolumeError, match=r"name not UTF-8: .*P\\xe4tient; rename it"):
        load(tmp_path / "P\udce4tient")
