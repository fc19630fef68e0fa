"""Folders as hospitals and data sets have them: what is taken, set aside and fails, and as what.

    python -m robustness.real_folders --ct ../shared/ct/images     # 40 patients, two minutes

Makes a tree of patients: DICOM series, alone and several in a folder, with all that lies beside
slices (dose and protocol pages, scouts, reports, private objects, a DICOMDIR, files of the viewer
on the CD), in the layouts of TotalSegmentator, nnU-Net and Decathlon, NRRD and MetaImage, and what
is no CT or damaged. Prepares it, then checks that every file is accounted for as it should be, and
that each cached volume is, voxel for voxel, what dcm2niix (of DICOM), nibabel or ITK make of its
file. Needs the packages of requirements-test.txt.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import SimpleITK
from dcm2niix import bin as dcm2niix
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, ExplicitVRLittleEndian, ImplicitVRLittleEndian, generate_uid

from robustness.samples import sources
from voco_jax.config.common import Chain
from voco_jax.data.cache import ASIDE, FAILURES, Cache
from voco_jax.data.collect import scan
from voco_jax.data.formats.dicom_series import find_volumes
from voco_jax.data.formats.stored import Aside
from voco_jax.data.prepare import prepare
from voco_jax.errors import InputError

_CT, _MR = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.4"
_CAPTURE, _REPORT = "1.2.840.10008.5.1.4.1.1.7", "1.2.840.10008.5.1.4.1.1.88.67"
_VALUE_MAP, _PRIVATE = "1.2.840.10008.5.1.4.1.1.67", "1.3.12.2.1107.5.9.1"
_DICOMDIR = "1.2.840.10008.1.3.10"
# Whole volumes, whose grey values tell what became of each HU.
CHAIN = Chain(
    axes="RAS",
    spacing=(),
    window=(-1024.0, 1021.0),
    window_unit="HU",
    crop_foreground=False,
    foreground_threshold=0.3,
    fit="random_crop",
    volume_size=(8, 8, 8),
    dtype="uint8",
)


@dataclass
class Tree:
    """What was made, and what has to become of it; paths below the root."""

    root: Path
    taken: dict[str, Callable[[], np.ndarray]] = field(default_factory=dict)  # HU in RAS
    failed: dict[str, str] = field(default_factory=dict)  # beginning of the reason
    aside: dict[str, str] = field(default_factory=dict)  # likewise

    def folder(self, *parts: str) -> Path:
        """A folder below the root, made."""
        path = self.root.joinpath(*parts)
        path.mkdir(parents=True, exist_ok=True)
        return path

    def name(self, path: Path) -> str:
        """Of a file, below the root."""
        return path.relative_to(self.root).as_posix()


# ---- DICOM


def _object(kind: str, series: str, **tags: Any) -> Dataset:
    made, meta = Dataset(), FileMetaDataset()
    uid = generate_uid()
    made.file_meta, made.SOPClassUID, made.SOPInstanceUID = meta, UID(kind), uid
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = UID(kind), uid
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    made.StudyInstanceUID, made.SeriesInstanceUID, made.Modality = "1.2.3", series, "CT"
    for name, value in tags.items():
        setattr(made, name, value)
    return made


def _with_pixels(made: Dataset, pixels: np.ndarray, photometric: str = "MONOCHROME2") -> Dataset:
    made.Rows, made.Columns = pixels.shape[:2]
    made.SamplesPerPixel = pixels.shape[2] if pixels.ndim > 2 else 1
    if made.SamplesPerPixel > 1:
        made.PlanarConfiguration = 0
    made.PhotometricInterpretation, made.PixelRepresentation = photometric, 0
    made.BitsAllocated = made.BitsStored = 8 * pixels.itemsize
    made.HighBit = made.BitsStored - 1
    made.PixelData = np.ascontiguousarray(pixels).tobytes()
    made["PixelData"].VR = "OW" if pixels.itemsize > 1 else "OB"
    return made


def _slices(image: SimpleITK.Image, series: str, kind: str = _CT, **tags: Any) -> list[Dataset]:
    """The slices of an image in HU, stored as HU + 1024."""
    direction = image.GetDirection()
    turned = [direction[axis::3] for axis in range(2)]
    voxels = SimpleITK.GetArrayFromImage(image)
    found = []
    for index, plane in enumerate(voxels):
        made = _object(kind, series, **tags)
        made.ImageType, made.InstanceNumber = ["ORIGINAL", "PRIMARY", "AXIAL"], index + 1
        made.SeriesNumber, made.AcquisitionNumber = int(series.split(".")[-1]), 1
        place = image.TransformIndexToPhysicalPoint((0, 0, index))
        made.ImagePositionPatient = [f"{x:.6f}" for x in place]
        made.ImageOrientationPatient = [f"{x:.8f}" for x in (*turned[0], *turned[1])]
        x, y, z = image.GetSpacing()
        made.PixelSpacing, made.SliceThickness = [y, x], z
        made.RescaleSlope, made.RescaleIntercept = 1, -1024
        found.append(_with_pixels(made, (plane.clip(-1024) + 1024).astype(np.uint16)))
    return found


def _save(made: Dataset, path: Path, preamble: bool = True, implicit: bool = False) -> None:
    if not preamble:
        del made.file_meta
        made.save_as(path, implicit_vr=implicit, little_endian=True)
        return
    if implicit:
        made.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    made.save_as(path, enforce_file_format=True)


def _beside_slices(series: str) -> dict[str, tuple[Dataset, str]]:
    """What scanners and archives put beside slices, and the beginning of the reason."""
    grey, page = np.zeros((24, 30), np.uint16), np.zeros((40, 50, 3), np.uint8)
    view = {"ImagePositionPatient": [0, 0, 0], "PixelSpacing": [1, 1], "InstanceNumber": 1}
    side = {**view, "ImageOrientationPatient": [1, 0, 0, 0, 0, -1]}
    scout = {**side, "ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}
    page8 = np.zeros((40, 50), np.uint8)
    return {
        "dose": (_with_pixels(_object(_CAPTURE, "1.2.501"), page, "RGB"), "not a grey image"),
        "protocol": (_with_pixels(_object(_CAPTURE, "1.2.502"), page8), "no position"),
        "scout": (_with_pixels(_object(_CT, "1.2.1", **scout), grey, "MONOCHROME1"), "localiser"),
        "topogram": (_with_pixels(_object(_CT, series, **scout), grey), "localiser"),
        "lateral": (_with_pixels(_object(_CT, "1.2.2", **side), grey), "another series"),
        "frontal": (_with_pixels(_object(_CT, series, **side), grey), "another series"),
        "report": (_object(_REPORT, "1.2.503", Modality="SR"), "no image"),
        "values": (_object(_VALUE_MAP, "1.2.504", Modality="RWV"), "no image"),
        "private": (_object(_PRIVATE, "1.2.505"), "no image"),
        "DICOMDIR": (_object(_DICOMDIR, "1.2.506"), "no image"),
    }


_OF_THE_CD = {"VERSION": "2.1\n", "LOCKFILE": "", "README": "viewer " * 50, "index.htm": "<p>"}


def _dicom(tree: Tree, number: int, image: SimpleITK.Image) -> None:
    """A series with everything beside it."""
    folder = tree.folder("dicom", f"patient {number}")
    suffix, preamble, implicit = ("", ".dcm")[number % 2], number % 4 < 2, number % 8 >= 4
    series = f"1.2.9.{number + 1}"
    for index, made in enumerate(_slices(image, series)):
        _save(made, folder / f"IM{index:04d}{suffix}", preamble, implicit)
    for name, (made, reason) in _beside_slices(series).items():
        path = folder / (name if name == "DICOMDIR" else f"{name}{suffix}")
        _save(made, path)
        tree.aside[tree.name(path)] = reason
    for name, content in _OF_THE_CD.items():
        (folder / name).write_text(content)
        tree.aside[tree.name(folder / name)] = "no DICOM"
    tree.taken[tree.name(folder)] = lambda: by_dcm2niix(folder)


def _two_in_one(tree: Tree, number: int, image: SimpleITK.Image) -> None:
    """Two acquisitions of one series, whose slices alternate on a regular grid."""
    folder = tree.folder("dicom", f"twice {number}")
    for index, made in enumerate(_slices(image, "1.2.9")):
        made.AcquisitionNumber = 1 + index % 2
        _save(made, folder / f"{index}.dcm")
    voxels = np.maximum(by_slices(image), -1024)
    for one in find_volumes(folder)[0]:
        first = int(one.name[-1]) - 1
        tree.taken[tree.name(folder / one.name)] = lambda first=first: voxels[:, :, first::2]  # type: ignore[misc]


def _archive(tree: Tree, number: int, image: SimpleITK.Image) -> None:
    """A study as a PACS exports it: three series in one folder, their files mixed, and pages."""
    folder = tree.folder("dicom", f"archive {number}")
    reformatted = SimpleITK.PermuteAxes(image, (0, 2, 1))
    kinds = {2: ("Soft", image), 3: ("Lung 1.0", image), 4: ("MPR cor", reformatted)}
    for series, (description, one) in kinds.items():
        for index, made in enumerate(_slices(one, f"1.2.{number}.{series}")):
            made.SeriesDescription = description
            _save(made, folder / f"{index:04d}_{series}.dcm")
    for name, (made, reason) in _beside_slices("1.2.9").items():
        if name in ("dose", "report", "scout", "lateral"):
            _save(made, folder / f"{name}.dcm")
            tree.aside[tree.name(folder / f"{name}.dcm")] = reason
    for volume in find_volumes(folder)[0]:
        tree.taken[tree.name(folder / volume.name)] = lambda volume=volume: by_dcm2niix(  # type: ignore[misc]
            folder, volume.number
        )


def _magnetic(tree: Tree, number: int, image: SimpleITK.Image) -> None:
    folder = tree.folder("dicom", f"mr {number}")
    for index, made in enumerate(_slices(image, "1.2.9", _MR, Modality="MR")):
        _save(made, folder / f"{index}.dcm")
    tree.failed[tree.name(folder)] = "another modality"


# ---- other formats and layouts


def _mask(image: SimpleITK.Image) -> SimpleITK.Image:
    return SimpleITK.Cast(image > 0, SimpleITK.sitkUInt8)


def _write(tree: Tree, image: SimpleITK.Image, *parts: str) -> Path:
    path = tree.folder(*parts[:-1]) / parts[-1]
    SimpleITK.WriteImage(image, str(path))
    return path


def _total_segmentator(tree: Tree, number: int, image: SimpleITK.Image) -> None:
    own = ("totalsegmentator", f"s{number:04d}")
    path = _write(tree, image, *own, "ct.nii.gz")
    tree.taken[tree.name(path)] = lambda: by_nibabel(path)
    for organ in ("liver", "lung_upper_lobe_left"):
        mask = _write(tree, _mask(image), *own, "segmentations", f"{organ}.nii.gz")
        tree.aside[tree.name(mask)] = "a segmentation"


def _task(tree: Tree, number: int, image: SimpleITK.Image, name: str, channel: str) -> None:
    path = _write(tree, image, name, "imagesTr", f"case_{number}{channel}.nii.gz")
    mask = _write(tree, _mask(image), name, "labelsTr", f"case_{number}.nii.gz")
    tree.taken[tree.name(path)] = lambda: by_nibabel(path)
    tree.aside[tree.name(mask)] = "a segmentation"
    listed = tree.folder(name) / "dataset.json"
    listed.write_text("{}")
    tree.aside[tree.name(listed)] = "no volume"


def _nnunet(tree: Tree, number: int, image: SimpleITK.Image) -> None:
    _task(tree, number, image, "Dataset001_CT", "_0000")


def _decathlon(tree: Tree, number: int, image: SimpleITK.Image) -> None:
    _task(tree, number, image, "Task09_Spleen", "")


def _nrrd(tree: Tree, number: int, image: SimpleITK.Image) -> None:
    path = _write(tree, image, "nrrd", f"{number}.{('nrrd', 'nhdr')[number % 2]}")
    tree.taken[tree.name(path)] = lambda: by_itk(path)


def _meta(tree: Tree, number: int, image: SimpleITK.Image) -> None:
    path = _write(tree, image, "meta", f"{number}.{('mha', 'mhd')[number % 2]}")
    tree.taken[tree.name(path)] = lambda: by_itk(path)


def _scaled(tree: Tree, number: int, image: SimpleITK.Image) -> None:
    unit = SimpleITK.RescaleIntensity(SimpleITK.Cast(image, SimpleITK.sitkFloat32), 0.0, 1.0)
    tree.failed[tree.name(_write(tree, unit, "kaggle", f"{number}.nii.gz"))] = "not in HU"


def _unnamed_mask(tree: Tree, number: int, image: SimpleITK.Image) -> None:
    tree.failed[tree.name(_write(tree, _mask(image), "organs", f"{number}.nii.gz"))] = "not in HU"


def _truncated(tree: Tree, number: int, image: SimpleITK.Image) -> None:
    path = _write(tree, image, "copied", f"{number}.nii.gz")
    path.write_bytes(path.read_bytes()[:-2000])
    tree.failed[tree.name(path)] = "truncated gzip"


_TAKEN = [_total_segmentator, _nnunet, _decathlon, _nrrd, _meta]
_FAILED = [_magnetic, _scaled, _unnamed_mask, _truncated]
_SEVERAL = [_two_in_one, _archive]
# Each kind once, then more.
_PATIENTS = [_dicom, *_TAKEN, *_SEVERAL, *_FAILED, *[_dicom] * 12, _archive, *_TAKEN * 3]


def make(root: Path, images: Sequence[SimpleITK.Image], count: int) -> Tree:
    """Makes a tree of so many patients."""
    tree = Tree(root)
    for number in range(count):
        _PATIENTS[number % len(_PATIENTS)](tree, number, images[number % len(images)])
    return tree


# ---- what others make of a file: HU in RAS


def by_nibabel(path: Path) -> np.ndarray:
    """A NIfTI file."""
    image: Any = nibabel.as_closest_canonical(nibabel.load(path))
    return np.asarray(image.get_fdata(dtype=np.float32))


def by_itk(path: Path) -> np.ndarray:
    """Any file that ITK reads."""
    return by_slices(SimpleITK.ReadImage(str(path)))


def by_slices(image: SimpleITK.Image) -> np.ndarray:
    """An image of ITK's, whatever its axes."""
    turned = SimpleITK.DICOMOrient(image, "LPS")
    return SimpleITK.GetArrayFromImage(turned).T[::-1, ::-1].astype(np.float32)


def by_dcm2niix(folder: Path, series: str = "*") -> np.ndarray:
    """The largest volume in a folder of DICOM files, or of a SeriesNumber there."""
    with tempfile.TemporaryDirectory() as out:
        command = [dcm2niix, "-b", "n", "-z", "n", "-f", "%s_%j", "-o", out, str(folder)]
        subprocess.run(command, capture_output=True, check=False)
        found = list(Path(out).glob(f"{series}_*.nii"))
        sizes = [nibabel.load(path).header.get_data_shape() for path in found]  # type: ignore[attr-defined]
        return by_nibabel(found[int(np.argmax([np.prod(size) for size in sizes]))])


def compare(tree: Tree, cache: Path) -> list[str]:
    """Prepares a tree and tells what is otherwise than it should be."""
    aside: list[Aside] = []
    volumes = scan(tree.root, aside=aside)
    summary = prepare(volumes, cache, CHAIN, workers=0, progress=False, aside=aside)
    print(summary)
    head = f"{tree.root.name}/"
    failed = {one["id"].removeprefix(head): one["reason"] for one in _lines(cache / FAILURES)}
    left = {one["file"].removeprefix(head): one["reason"] for one in _lines(cache / ASIDE)}
    opened = Cache.open(cache, CHAIN)
    entries = {entry.id.removeprefix(head): entry for entry in opened.entries}
    problems = []
    for what, found, expected in (("failed", failed, tree.failed), ("aside", left, tree.aside)):
        for name in sorted(found.keys() | expected.keys()):
            reason, wanted = found.get(name, "nothing"), expected.get(name, "no such line")
            if not reason.startswith(wanted):
                problems.append(f"{what}: {name}: found {reason!r}, expected {wanted!r}")
    if entries.keys() != tree.taken.keys():
        problems.append(f"taken: found {sorted(entries)}, expected {sorted(tree.taken)}")
    low, high = CHAIN.window
    for name, entry in entries.items():
        hu = tree.taken[name]()
        grey = np.rint(np.clip((hu - np.float32(low)) / np.float32(high - low), 0, 1) * 255)
        voxels = opened.read_whole(entry)[tuple(slice(size) for size in entry.shape)]
        if voxels.shape != grey.shape or not np.array_equal(voxels, grey):
            problems.append(f"voxels: {name}: {voxels.shape} are not those of {grey.shape}")
    files = sum(path.is_file() for path in tree.root.rglob("*"))
    counted = summary.files_taken + summary.files_failed + len(summary.aside)
    if counted != files:
        problems.append(f"files: {counted} are accounted for, {files} are there")
    return problems


def _lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def main() -> int:
    """The command; exit status 1 if anything became of a file that should not."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ct", type=Path, metavar="DIR", help="real CTs; default: phantoms")
    parser.add_argument("--patients", type=int, default=40, help="default 40")
    options = parser.parse_args()
    try:
        images = sources(options.ct)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as scratch:
        tree = make(Path(scratch, "tree"), images, options.patients)
        problems = compare(tree, Path(scratch, "cache"))
    print(*problems, sep="\n")
    print(f"{options.patients} patients, {len(tree.taken)} volumes: {len(problems)} problems")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
