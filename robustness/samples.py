"""Small CTs as files of every format that is read."""

import os
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import nibabel
import SimpleITK

from voco_jax.data.phantom import phantom
from voco_jax.errors import InputError


@dataclass
class Sample:
    """A volume as files: names relative to its folder, contents; the volume's own name."""

    format: str
    name: str  # "": the folder, a DICOM series
    files: dict[str, bytes]
    links: dict[str, str] = field(default_factory=dict)
    specials: dict[str, str] = field(default_factory=dict)  # name -> "pipe" or "folder"

    @property
    def header(self) -> str:
        """The file with the header; of a series, the first."""
        return self.name.replace(".img", ".hdr") or min(self.files)

    @property
    def data(self) -> str:
        """The file with the voxels; of a series, the last."""
        if not self.name:
            return max(self.files)
        others = [name for name in self.files if name != self.header]
        return others[0] if others else self.name

    def write(self, folder: Path) -> Path:
        """Writes the files; returns the volume's path."""
        folder.mkdir(parents=True)
        for name, content in self.files.items():
            if name not in self.links and name not in self.specials:
                (folder / name).write_bytes(content)
        for name, target in self.links.items():
            (folder / name).symlink_to(target)
        for name, kind in self.specials.items():
            if kind == "pipe":
                os.mkfifo(folder / name)
            else:
                (folder / name).mkdir()
        return folder / self.name if self.name else folder


def sources(folder: Path | None, longest: int = 64) -> list[SimpleITK.Image]:
    """Every third real CT, or three phantoms; every nth voxel, so that they are small.

    Raises:
        InputError: a folder without NIfTI files.
    """
    with tempfile.TemporaryDirectory() as scratch:
        if folder is None:
            paths = [Path(scratch, f"{index}.nii") for index in range(3)]
            for index, path in enumerate(paths):
                nibabel.save(phantom(1, index, (64, 64, 40))[0], path)
        else:
            paths = sorted(folder.glob("*.nii.gz"))[::3]
            if not paths:
                raise InputError(f"--ct: found no *.nii.gz in {folder}, expected a folder of CTs")
        images = [SimpleITK.ReadImage(str(path), SimpleITK.sitkInt16) for path in paths]
    small = []
    for image in images:
        x, y, z = (max(1, -(-size // longest)) for size in image.GetSize())
        small.append(image[::x, ::y, :: max(z, image.GetSize()[2] // 24)])
    return small


FORMATS = (
    *("nii", "nii.gz", "hdr", "img", "nrrd", "nrrd packed", "nhdr", "nhdr packed"),
    *("mha", "mha packed", "mhd", "mhd packed", *["series"] * 4),
)


def sample(image: SimpleITK.Image, format: str, scratch: Path) -> Sample:
    """An image written in a format."""
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    suffix, _, packed = format.partition(" ")
    name = "" if suffix == "series" else f"a.{suffix}"
    if suffix == "series":
        _write_series(scratch, image)
    else:
        written = "a.img" if suffix == "hdr" else name
        SimpleITK.WriteImage(image, str(scratch / written), bool(packed))
    return Sample(format, name, {file.name: file.read_bytes() for file in scratch.iterdir()})


def _write_series(folder: Path, image: SimpleITK.Image) -> None:
    """One DICOM file a slice, stored as HU + 1024."""
    writer = SimpleITK.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    direction = image.GetDirection()
    columns = [direction[axis::3] for axis in range(3)]
    for index in range(image.GetSize()[2]):
        piece = SimpleITK.JoinSeries(image[:, :, index] + 1024)
        piece.SetSpacing(image.GetSpacing())
        point = image.TransformIndexToPhysicalPoint((0, 0, index))
        tags = {
            "0008|0016": "1.2.840.10008.5.1.4.1.1.2",  # a CT
            "0008|0018": f"1.2.3.{index + 1}",
            "0008|0060": "CT",
            "0020|000d": "1.2",
            "0020|000e": "1.2.3",  # the series
            "0020|0013": str(index + 1),
            "0020|0032": "\\".join(f"{x:.6f}" for x in point),
            "0020|0037": "\\".join(f"{x:.8f}" for x in (*columns[0], *columns[1])),
            "0028|1052": "0",
            "0028|1053": "1",
        }
        for tag, value in tags.items():
            piece.SetMetaData(tag, value)
        path = folder / f"{index:04d}.dcm"
        writer.SetFileName(str(path))
        writer.Execute(piece)
        # ITK would rescale the voxels as well, so the header gets its numbers here.
        content = path.read_bytes()
        for element, old, new in ((b"\x52", b"0 ", b"-1024   "), (b"\x53", b"1 ", b"1       ")):
            head = b"\x28\0" + element + b"\x10"
            length, new_length = (len(value).to_bytes(4, "little") for value in (old, new))
            assert content.count(head + length + old) == 1
            content = content.replace(head + length + old, head + new_length + new)
        path.write_bytes(content)
