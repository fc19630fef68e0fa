"""Whether a volume can be what its chain is for: a CT in HU, or an image at all.

Masks, MR, PET and CT that was scaled (to 0..1, 0..255, z-scores, or without its rescale intercept)
are read without an error, and a network would be trained on what the window makes of them. The
limits below leave room around all real volumes that they were tried on: 17 CTs (chest, abdomen,
heart, head and neck, leg; in three orientations and dtypes, padded with -1024 to -3024), 202 MRs
and 215 segmentations. Each line says what was found.
"""

import numpy as np

from voco_jax.config.common import Chain
from voco_jax.data.formats.stored import StoredVolume

# Share of the voxels from -1024 (what is below is padding) to -50 HU: air, lung and fat. CTs have
# 44 % at least, 2 % without what is -1024; masks, MRs and CTs without their intercept have none.
_LOW_HU, _LOW_SHARE = (-1024.0, -50.0), 0.001
# From -200 to 300 HU: soft tissue. CTs have 6 % at least.
_SOFT_HU, _SOFT_SHARE = (-200.0, 300.0), 0.01
# Above 500 HU: bone, contrast, metal. CTs have 5 % at most; upside down, of air, 27 % at least.
_HIGH_HU, _HIGH_SHARE = 500.0, 0.2
# Different ones of 256 after the window. CTs have over 240 with a window of soft tissue, but few
# with one of bone, and in 0..1 one; masks have 2.
_GREY_VALUES_HU, _GREY_VALUES = 2, 8
# Of neighbours that are not both background: equal ones. MRs have 8 % at most, segmentations 50 %.
_EQUAL_SHARE = 0.3
_SAMPLES = 48  # along each axis at most: the shares of 110,592 voxels are those of all

TAKE_ALL_THE_SAME = "if it is right all the same, add --take-doubtful"


def doubt(source: StoredVolume, window: tuple[float, float], chain: Chain) -> str:
    """Why a volume is hardly what its chain is for, or "".

    Args:
        source: without NaN, not constant.
        window: values that become 0 and 1.
        chain: with window_unit="HU" the volume has to be a CT in HU; else any image will do.

    Returns:
        A few fixed words, a colon, what was found and what was expected.
    """
    in_hu = chain.window_unit == "HU"
    if in_hu and source.modality not in ("", "CT"):
        return (
            f"another modality: the file says {source.modality[:30]}, expected CT for a window in "
            "HU (for MR see configs/hippocampus.py's chain)"
        )
    sample = source.hounsfield(_sampled(source.voxels)).ravel()
    if in_hu and (found := _not_in_hu(sample)):
        return f"not in HU: {found}; found {sample.min():g} to {sample.max():g}"
    low, high = window  # never equal
    grey = np.unique(np.rint(np.clip((sample - low) / (high - low), 0, 1) * 255)).size
    least = _GREY_VALUES_HU if in_hu else _GREY_VALUES
    if grey < least:
        return (
            f"few grey values: {grey} are left of {sample.min():g} to {sample.max():g} after the "
            f"window of {low:g} to {high:g}, expected at least {least}; is it a mask, or the "
            "window that of another organ?"
        )
    share = 0.0 if in_hu else _equal_neighbours(source.voxels)
    if share > _EQUAL_SHARE:
        return (
            f"a segmentation: {share:.0%} of the neighbouring voxels are equal, the background "
            f"left aside, expected at most {_EQUAL_SHARE:.0%} in an image"
        )
    return ""


def _not_in_hu(sample: np.ndarray) -> str:
    """What of some voxels no CT in HU has, or ""."""
    (dark, light), (first, last) = _LOW_HU, _SOFT_HU
    low = np.mean((sample >= dark) & (sample < light))
    soft = np.mean((sample >= first) & (sample <= last))
    high = np.mean(sample > _HIGH_HU)
    if low < _LOW_SHARE:
        return (
            f"{low:.2%} of the voxels are from {dark:g} to {light:g} HU, expected at least "
            f"{_LOW_SHARE:.1%} of air, lung or fat (a mask, MR, PET, or without its intercept?)"
        )
    if soft < _SOFT_SHARE:
        return (
            f"{soft:.2%} of the voxels are from {first:g} to {last:g} HU, expected at least "
            f"{_SOFT_SHARE:.0%} of soft tissue (another slope or intercept?)"
        )
    if high > _HIGH_SHARE:
        return (
            f"{high:.0%} of the voxels are above {_HIGH_HU:g} HU, expected at most "
            f"{_HIGH_SHARE:.0%} (turned upside down by a negative slope?)"
        )
    return ""


def _sampled(voxels: np.ndarray) -> np.ndarray:
    """Voxels at equal distances."""
    x, y, z = (-(-size // _SAMPLES) for size in voxels.shape)
    return voxels[::x, ::y, ::z]


def _equal_neighbours(voxels: np.ndarray) -> float:
    """The share of equal neighbours among those of which one at least is not background."""
    values, counts = np.unique(_sampled(voxels), return_counts=True)
    background = values[counts.argmax()]
    y, z = (-(-size // _SAMPLES) for size in voxels.shape[1:])
    before, after = voxels[:-1, ::y, ::z], voxels[1:, ::y, ::z]
    inside = (before != background) | (after != background)
    return float(np.mean(before[inside] == after[inside])) if inside.any() else 1.0
