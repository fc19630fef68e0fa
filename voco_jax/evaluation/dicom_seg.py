"""Masks as DICOM segmentation objects, which refer to the slices of their series."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import voco_jax
from voco_jax.data.formats.dicom import ordered_slices
from voco_jax.data.formats.dicom_series import is_series
from voco_jax.data.formats.readers import FormatError
from voco_jax.data.formats.stored import StoredVolume, VolumeError
from voco_jax.errors import InputError

_SCHEME = "99VOCO"  # of codes of our own: the classes are names that the user chose
# Attributes that a DICOM-SEG has to have but that may say nothing; anonymised series lack them.
_MAY_BE_EMPTY = (
    *("PatientID", "PatientName", "PatientBirthDate", "PatientSex"),
    *("StudyID", "StudyDate", "StudyTime", "AccessionNumber", "ReferringPhysicianName"),
)


def check_highdicom() -> None:
    """Call it before a long prediction, not only after.

    Raises:
        InputError: the library is not installed.
    """
    if importlib.util.find_spec("highdicom") is None:
        raise InputError(
            "--format: dicom-seg needs highdicom, which is not installed: pip install highdicom"
        )


def write_dicom_seg(
    labels: np.ndarray, stored: StoredVolume, names: Sequence[str], path: Path
) -> None:
    """Writes a mask as a DICOM segmentation object, a binary segment for each class that there is.

    Args:
        labels: numbers of classes, along the axes of `stored`.
        stored: the series, as its folder has it.
        names: of all classes, the background first.
        path: of the file.

    Raises:
        VolumeError: the image is no DICOM series, the mask is empty, or the series' headers lack
            what such an object has to name.
    """
    import highdicom
    from highdicom.seg import SegmentAlgorithmTypeValues, SegmentationTypeValues
    from pydicom import dcmread

    if not (stored.path.is_dir() or is_series(stored.path)):
        raise VolumeError(
            stored.path, "no DICOM series: a DICOM-SEG refers to one; use --format nifti"
        )
    present = [number for number in range(1, len(names)) if (labels == number).any()]
    if not present:
        raise VolumeError(stored.path, "nothing found: a DICOM-SEG cannot be empty")
    software = f"voco_jax {voco_jax.__version__}"
    algorithm = highdicom.AlgorithmIdentificationSequence(
        "voco_jax", highdicom.sr.CodedConcept("123110", "DCM", "Artificial Intelligence"), software
    )
    structure = highdicom.sr.CodedConcept("123037004", "SCT", "Anatomical Structure")
    numbers = np.zeros(len(names), np.uint8)
    numbers[present] = np.arange(1, len(present) + 1)  # segments are counted without gaps
    segments = [
        highdicom.seg.SegmentDescription(
            segment_number=index,
            segment_label=names[number],
            segmented_property_category=structure,
            segmented_property_type=highdicom.sr.CodedConcept(
                f"CLASS{number}", _SCHEME, names[number][:64]
            ),
            algorithm_type=SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=algorithm,
        )
        for index, number in enumerate(present, 1)
    ]
    x, y, z = stored.spacing
    try:
        slices = [dcmread(one, stop_before_pixels=True) for one in ordered_slices(stored.path)]
        for one in slices:
            for keyword in _MAY_BE_EMPTY:
                if keyword not in one:
                    setattr(one, keyword, "")
            one.SliceThickness = one.get("SliceThickness") or z
        found = highdicom.seg.Segmentation(
            source_images=slices,
            pixel_array=numbers[labels.transpose(2, 1, 0)],
            segmentation_type=SegmentationTypeValues.BINARY,
            segment_descriptions=segments,
            pixel_measures=highdicom.PixelMeasuresSequence((y, x), z, z),
            series_instance_uid=highdicom.UID(),
            series_number=1,
            sop_instance_uid=highdicom.UID(),
            instance_number=1,
            manufacturer="voco_jax",
            manufacturer_model_name="voco_jax",
            software_versions=software,
            device_serial_number="0",
        )
    except (AttributeError, KeyError, TypeError, ValueError, FormatError) as error:
        raise VolumeError(
            stored.path,
            f"cannot be referred to by a DICOM-SEG ({error}); complete the headers of the series, "
            "or use --format nifti",
        ) from error
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".part_{path.name}")
    found.save_as(part)
    part.replace(path)
