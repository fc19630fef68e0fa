"""Left and right, front and head lie the same way round in every picture."""

import dataclasses

import numpy as np
import pytest
from chains import CHAIN_10K

from voco_jax.data.array import write_volume
from voco_jax.data.cache import Cache, CacheWriter, checksum
from voco_jax.data.manifest import Entry
from voco_jax.report import contact_sheet, preview
from voco_jax.report.planes import VIEWS, as_shown
from voco_jax.report.positions import draw_positions
from voco_jax.report.preview import draw_preview
from voco_jax.report.segmentations import Segmentation, draw_cases

SHAPE = (40, 36, 32)
LEFT_BACK_LOW = np.s_[4:12, 4:12, 4:12]  # RAS: small indices are left, back, feet


def phantom():
    """A bright block in the patient's left, at the back, near the feet."""
    volume = np.full(SHAPE, 0.2, np.float32)
    volume[LEFT_BACK_LOW] = 1.0
    return volume


def parts(picture, is_ground):
    """The axial, coronal and sagittal panel: the columns that hold something of the slices."""
    columns = np.flatnonzero(is_ground.sum(axis=0) > 60)
    starts = np.flatnonzero(np.diff(columns, prepend=-99) > 5)
    for start, end in zip(starts, [*starts[1:], len(columns)], strict=True):
        part = np.s_[:, columns[start] : columns[end - 1] + 1]
        rows = np.flatnonzero(is_ground[part].sum(axis=1) > 30)
        yield picture[rows[0] : rows[-1] + 1, part[1]]


def where(panel, hit):
    """The middle of what is hit: share of the panel from its left, and from its top."""
    y, x = np.nonzero(hit(panel.astype(int)))
    return x.mean() / panel.shape[1], y.mean() / panel.shape[0]


def is_lower_right(panel, hit):
    x, y = where(panel, hit)
    return 0.6 < x < 0.9 and 0.6 < y < 0.9


def test_as_shown():
    """The corner at the right and the front is the top left one."""
    plane = np.arange(6).reshape(3, 2)
    np.testing.assert_array_equal(as_shown(plane), [[5, 3, 1], [4, 2, 0]])
    assert as_shown(np.zeros((3, 2, 4))).shape == (2, 3, 4)
    assert [view.letters[:2] for view in VIEWS] == [("R", "L"), ("R", "L"), ("A", "P")]


def test_cases():
    labels = np.zeros(SHAPE, np.uint8)
    labels[0, 0, 0] = labels[-1, -1, -1] = 1  # keep the crop to the whole volume
    wrong = labels.copy()
    wrong[LEFT_BACK_LOW] = 2
    picture = draw_cases([Segmentation("", phantom() * 0.2, labels, wrong, (1, 1, 1))])[60:]

    def orange(panel):
        return abs(panel - (255, 159, 28)).sum(axis=-1) < 60

    ground = np.ptp(picture, axis=2) < 8
    panels = list(parts(picture, ground & (picture[..., 0] < 80)))
    assert [is_lower_right(panel, orange) for panel in panels] == [True] * 3


def test_preview():
    labels = np.zeros(SHAPE, np.uint8)
    labels[LEFT_BACK_LOW] = 1
    picture = draw_preview(phantom(), labels, ("background", "organ"), (1, 1, 1), "")
    colour = np.multiply(preview._colour(0), 255) * preview._OPACITY

    def coloured(panel):
        return (panel[..., 2] - panel[..., 0] > 40) & (abs(panel - colour).sum(axis=-1) < 500)

    panels = list(parts(picture, (picture < 100).all(axis=2)))
    assert [is_lower_right(panel, coloured) for panel in panels[:3]] == [True] * 3


def test_positions_slice_box_and_maps():
    """The sub-volume's box, its cell in both maps and the slice's block are at one side."""
    grid, crop = (4, 3, 1), (10, 12, 32)
    cells = np.full((1, 4, 3, 1), 0.05)
    cells[0, 0, 0, 0] = 1.0
    maps = cells.reshape(1, 12)
    volume = np.full(SHAPE, 0.5)
    volume[2:8, 2:10] = 1.0
    origins = np.array([[0, 0, 0]])
    picture = draw_positions(volume, origins, maps, maps, grid=grid, crop_size=crop, title="")
    picture = picture[60:-20].astype(int)
    third = picture.shape[1] // 3
    ground = (np.ptp(picture, axis=2) < 10) & (abs(picture[..., 0] - 128) < 12)
    (shown,) = list(parts(picture[:, :third], ground[:, :third]))[:1]
    assert is_lower_right(shown, lambda p: (p > 245).all(axis=-1))
    red = where(shown, lambda p: abs(p - (0xFF, 0x5A, 0x5F)).max(axis=-1) < 24)
    assert red[0] > 0.75
    assert red[1] > 0.6
    dark = (picture[..., 2] > 70) & (picture[..., 0] < 80) & (picture[..., 1] < 40)
    for number in (1, 2):
        side = np.s_[:, number * third - 40 : (number + 1) * third - 60]
        y, x = np.nonzero(dark[side])
        bright = np.argwhere(abs(picture[side] - (253, 231, 37)).sum(axis=-1) < 30)
        bright = bright[bright[:, 1] <= x.max() + 130]
        assert len(bright) > 500
        assert np.median(bright[:, 1]) > np.median(x) + 50
        assert np.median(bright[:, 0]) > np.median(y) + 30


@pytest.mark.parametrize("fit", ["resize", "random_crop"])
def test_contact_sheet(tmp_path, fit):
    chain = dataclasses.replace(CHAIN_10K, volume_size=SHAPE, fit=fit)
    volume = np.full(SHAPE, 60, np.uint8)
    volume[:22, :20, :18] = 255
    with CacheWriter(tmp_path, chain) as writer:
        (slot,) = writer.reserve(1)
        write_volume(writer.path, slot, volume)
        box = ((0, 0, 0), SHAPE)
        facts = {"shape": SHAPE, "spacing": (1.0, 1.0, 1.0), "box": box, "stored": SHAPE}
        writer.add(
            Entry("a", slot, "training", "/a", "", "RAS", window=chain.window, foreground=0.5,
                  mean=0.3, checksum=checksum(volume), **facts)
        )  # fmt: skip
    cache = Cache.open(tmp_path, chain)
    panels = contact_sheet.slices(cache, contact_sheet.survey(cache)[0])
    for panel in map(np.asarray, panels):
        x, y = where(panel, lambda p: (p > 200).all(axis=-1))
        assert x > 0.6
        assert y > 0.6
