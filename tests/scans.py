"""Small CT files for tests."""

import nibabel
import numpy as np
import SimpleITK


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


def save_series(
    folder, image, series="1.2.3", prefix="", rescale=(1, 0), place=lambda index, point: point
):
    """Writes the slices of an ITK image, its voxels as stored, as a DICOM series.

    `rescale` is (slope, intercept) or a function of the slice's index; `place` gets a slice's index
    and position and returns another one, or None for no file.
    """
    folder.mkdir(exist_ok=True)
    writer = SimpleITK.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    direction = image.GetDirection()
    columns = [direction[axis::3] for axis in range(3)]
    for index in range(image.GetSize()[2]):
        point = place(index, image.TransformIndexToPhysicalPoint((0, 0, index)))
        if point is None:
            continue
        slope, intercept = rescale(index) if callable(rescale) else rescale
        piece = image[:, :, index]
        piece = SimpleITK.JoinSeries(piece)
        piece.SetSpacing(image.GetSpacing())
        tags = {
            "0008|0016": "1.2.840.10008.5.1.4.1.1.2",
            "0008|0018": f"{series}.{index + 1}",
            "0008|0060": "CT",
            "0020|000d": "1.2",
            "0020|000e": series,
            "0020|0013": str(index + 1),
            "0020|0032": "\\".join(f"{x:.6f}" for x in point),
            "0020|0037": "\\".join(f"{x:.8f}" for x in (*columns[0], *columns[1])),
            "0028|1052": "0",
            "0028|1053": "1",
        }
        for tag, value in tags.items():
            piece.SetMetaData(tag, value)
        path = folder / f"{prefix}{index:04d}.dcm"
        writer.SetFileName(str(path))
        writer.Execute(piece)
        content = path.read_bytes()
        for tag, old, new in (("1052", b"0 ", intercept), ("1053", b"1 ", slope)):
            text = f"{new:<8}".encode()
            head = b"\x28\0" + bytes.fromhex(tag)[::-1]
            length, new_length = (len(value).to_bytes(4, "little") for value in (old, text))
            assert content.count(head + length + old) == 1
            content = content.replace(head + length + old, head + new_length + text)
        path.write_bytes(content)
