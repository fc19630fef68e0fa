"""Synthetic CTs with plausible anatomy in HU, as NIfTI files; for the demo and the tests.

A torso from the pelvis to the lung tips in millimetres, origin at the diaphragm in the middle of
the body, x to the right, y to the front, z up: ellipsoids and tubes painted over one another,
then partial-volume blur and noise. Every phantom differs in build, organs, contrast, tilt, height
of the scan, and also in how the file stores it (orientation, spacing, padding, scaling), as real
files do. Left and right, front and back can be told apart everywhere.
"""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nibabel
import numpy as np

from voco_jax.data.progress import bar
from voco_jax.data.workers import available_cores
from voco_jax.types import Size

ORIENTATIONS = ("LPS", "LPS", "RAS", "LAS", "PLI", "RPI", "SAR")
AIR, FAT, MUSCLE = -1000.0, -100.0, 50.0
Point = tuple[float, float, float]
_THREADS = 8  # each takes some 100 MB


ORGANS = ("lungs", "liver", "spleen", "kidneys", "bladder")
"""What is 1, 2, ... in a phantom's label."""
_LUNGS, _LIVER, _SPLEEN, _KIDNEYS, _BLADDER = range(1, 6)


def make_phantoms(
    folder: str | Path,
    count: int,
    seed: int,
    shape: Size = (160, 160, 80),
    *,
    labelled: bool = False,
    lesions: bool = False,
) -> Path:
    """Writes phantoms and a Decathlon list that names them, paths relative to the folder.

    Files that are already there are left alone, so that a prepared cache stays valid.

    Args:
        folder: made if missing.
        count: number of phantoms.
        seed: phantom i depends on (seed, i, shape) only.
        shape: voxels x y z before reorientation; the field of view is about 390x390x360 mm.
        labelled: whether to write, and name, a label of each one's `ORGANS` too.
        lesions: whether every second phantom has lesions in its liver; the list says 1 of these as
            its label, 0 of the others.

    Returns:
        The list's path, `folder/phantoms.json`; all are in "training".
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    size = "x".join(map(str, shape))

    def make(index: int) -> dict[str, str | int]:
        ill = lesions and index % 2 == 1
        name = f"phantom_{seed}_{size}_{index:04d}{'_lesions' * ill}.nii.gz"
        files = [name, f"label_{name}"] if labelled else [name]
        if not all((folder / file).exists() for file in files):
            for file, image in zip(files, phantom(seed, index, shape, ill), strict=False):
                part = folder / f".part_{file}"
                nibabel.save(image, part)
                os.replace(part, folder / file)
        line: dict[str, str | int] = dict(zip(("image", "label"), files, strict=False))
        return {**line, "label": int(ill)} if lesions else line

    listed = []
    pool = ThreadPoolExecutor(min(available_cores(), _THREADS))
    with bar("phantoms", count, True) as shown, pool as threads:
        for line in threads.map(make, range(count)):
            listed.append(line)
            shown.update()
    content = {"name": "phantom CT", "training": listed}
    path = folder / "phantoms.json"
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return path


def phantom(
    seed: int, index: int, shape: Size, lesions: bool = False
) -> tuple[nibabel.Nifti1Image, nibabel.Nifti1Image]:
    """One synthetic CT and the label of its `ORGANS`.

    Args:
        seed: of the set.
        index: in the set.
        shape: voxels x y z before reorientation.
        lesions: whether there are some in the liver; nothing else differs.

    Returns:
        An int16 image in memory, in one of several orientations. Its voxels are as stored; the
        header's slope and intercept, which nibabel applies to files only, make HU of them. And a
        uint8 image with the same axes.
    """
    random = np.random.default_rng([seed, index])
    plane = random.uniform(370, 420) / max(shape[:2])
    spacing = np.array([plane, plane, random.uniform(320, 420) / shape[2]])
    body = _Body(random, shape, spacing)
    _paint_trunk(body)
    _paint_chest(body)
    _paint_abdomen(body)
    if lesions:
        _paint_lesions(body, np.random.default_rng([seed, index, 1]))
    hu = _blur(body.hu)
    hu += random.uniform(8, 20) * random.standard_normal(hu.shape, dtype=np.float32)
    return _store(hu, body.organs, spacing, random)


class _Body:
    """A volume in HU and the tools to paint in millimetres of the patient."""

    def __init__(self, random: np.random.Generator, shape: Size, spacing: np.ndarray) -> None:
        self.random = random
        self.hu = np.full(shape, AIR, np.float32)
        self.organs = np.zeros(shape, np.uint8)
        self.scale = random.uniform(0.9, 1.08)  # of all organs
        self.contrast = random.choice([0.0, 1.0]) * random.uniform(0.5, 1)  # agent in the blood
        shift = np.array([*random.uniform(-12, 12, 2), random.uniform(-70, 60)])
        turn = np.deg2rad(random.uniform(-6, 6, 2))
        axes = [
            ((np.arange(n) - (n - 1) / 2) * step - offset).astype(np.float32)
            for n, step, offset in zip(shape, spacing, shift, strict=True)
        ]
        x, y, z = np.meshgrid(*axes, indexing="ij", sparse=True)
        cos, sin = np.cos(turn).astype(np.float32), np.sin(turn).astype(np.float32)
        # A roll about z and a tilt about x: patients never lie straight.
        self.x = (cos[0] * x + sin[0] * y + 0 * z) / np.float32(self.scale)
        flat = cos[0] * y - sin[0] * x
        self.y = (cos[1] * flat + sin[1] * z) / np.float32(self.scale)
        self.z = (cos[1] * z - sin[1] * flat) / np.float32(self.scale)
        # Filled by the painters:
        self.cavity = self.chest = np.zeros(shape, bool)  # inside the ribs; above the diaphragm
        self.spine = 0.0  # y of the vertebrae's back
        self.axes = [axis / self.scale for axis in axes]
        self.table, self.level = y, z / self.scale  # y and z of the scanner, not of the patient

    def vary(self, value: float, by: float = 0.12) -> float:
        """A value some percent larger or smaller."""
        return value * self.random.uniform(1 - by, 1 + by)

    def near(self, center: Point, reach: Point) -> tuple[slice, ...]:
        """The part of the volume that holds a box around a point, tilts included; mm."""
        lean = 0.11 * (float(np.linalg.norm(center)) + max(reach))
        part = []
        for axis, middle, half in zip(self.axes, center, reach, strict=True):
            first, last = np.searchsorted(axis, [middle - half - lean, middle + half + lean])
            part.append(slice(int(first), int(last)))
        return tuple(part)

    def ellipsoid(
        self,
        center: Point,
        radii: Point,
        hu: float,
        where: np.ndarray | None = None,
        wobble: float = 4.0,
        organ: int = 0,
    ) -> None:
        """Paints an ellipsoid, moved and resized a little, only `where` allowed; labels it too."""
        cx, cy, cz = (c + self.random.normal(0, wobble) for c in center)
        rx, ry, rz = (self.vary(r) for r in radii)
        part = self.near((cx, cy, cz), (rx, ry, rz))
        x, y, z = self.x[part] - cx, self.y[part] - cy, self.z[part] - cz
        inside = (x / rx) ** 2 + (y / ry) ** 2 + (z / rz) ** 2 < 1
        if where is not None:
            inside &= where[part]
        self.hu[part][inside] = hu
        self.organs[part][inside] = organ

    def tube(self, center: tuple[float, float], radius: float, hu: float, span: np.ndarray) -> None:
        """Paints a vertical tube, only where `span` (of the whole volume) is true."""
        part = self.near((*center, 0), (radius, radius, 300))
        inside = (self.x[part] - center[0]) ** 2 + (self.y[part] - center[1]) ** 2 < radius**2
        self.hu[part][inside & span[part]] = hu
        self.organs[part][inside & span[part]] = 0


def _paint_trunk(body: _Body) -> None:
    """Skin, fat, muscle, the inner cavity, spine, ribs and the table."""
    random, x, y, z = body.random, body.x, body.y, body.z
    wide, deep = body.vary(150, 0.06), body.vary(104, 0.06)
    fat, bone = random.uniform(6, 30), random.uniform(180, 330)
    level = body.level
    waist = 1 - 0.07 * np.exp(-np.square((level + 80) / 80))
    waist = waist - 0.25 * np.clip((level - 190) / 150, 0, 1)
    # The back is flatter than the belly.
    back = np.where(y < 0, np.float32(0.96), np.float32(1.04))

    # How far outside the muscles' surface, mm; between an ellipse and a rectangle.
    across, along = np.square(x / (waist * wide)), np.square(y / (waist * deep * back))
    rho = np.sqrt(np.sqrt(across * across + along * along + 1.6 * across * along)) + 1e-3
    outside = np.sqrt(x * x + y * y) * (1 - 1 / rho)
    body.hu[outside < fat] = FAT
    body.hu[outside < 0] = MUSCLE
    body.cavity = cavity = outside < -20
    wall = (outside < -13) & ~cavity
    body.hu[cavity & (z < 10)] = FAT + 10
    ribs = wall & (z > -75) & (np.abs(x) > 22)
    height = z[ribs] + 0.45 * y[ribs] + 4 * np.sin(x[ribs] / 40)  # ribs fall to the front
    body.hu[ribs] = np.where(np.mod(height, 27) < 10, bone + 90, MUSCLE)
    body.hu[wall & (np.abs(x) < 19) & (y > 0) & (z > 20)] = 220  # breastbone
    body.spine = -(deep - 30)
    _paint_spine(body, bone)
    pelvis = (np.abs(outside + 28) < 7) & (z < -190 + 0.3 * y) & (y < 45) & (np.abs(x) > 35)
    body.hu[pelvis] = bone + 200
    if random.random() < 0.7:
        down = body.table + body.scale * (deep + fat) * 0.96 + random.uniform(16, 24)
        curve = down - 0.0009 * np.square(body.x[:, :1, :1])
        body.hu[np.broadcast_to(np.abs(curve) < 4, body.hu.shape)] = random.uniform(-250, -60)


def _paint_spine(body: _Body, bone: float) -> None:
    """Vertebrae with their arches and processes, discs, the canal, the muscles beside them."""
    back = body.spine
    part = body.near((0, back - 20, 0), (60, 45, 300))
    x, y, z = body.x[part], body.y[part], body.z[part]
    hu = body.hu[part]
    height = np.mod(z + body.random.uniform(0, 33), 33)
    disc = height < 7
    beside = np.square((np.abs(x) - 33) / 25) + np.square((y - back + 14) / 27) < 1
    hu[beside] = MUSCLE + 5
    middle = np.sqrt(x * x + np.square(y - back - 4))
    hu[(middle < 22) & ~disc] = bone + 250
    hu[(middle < 19) & ~disc] = bone
    hu[(middle < 20) & disc] = 90
    arch = np.sqrt(x * x + np.square(y - back + 23))
    hu[arch < 14] = bone + 280
    process = (np.abs(x) < 4) & (y < back - 33) & (y > back - 54) & ~disc
    hu[process & (hu > AIR / 2)] = bone + 150
    side = (np.abs(x) > 20) & (np.abs(x) < 42) & (np.abs(y - back + 22) < 5)
    hu[side & (height > 16)] = bone + 100
    hu[arch < 9] = 25


def _paint_chest(body: _Body) -> None:
    """Lungs above the diaphragm, heart, great vessels, windpipe, gullet."""
    random, x, y, z = body.random, body.x, body.y, body.z
    dome = 30 * np.exp(-np.square((x - 65) / 55)) + 14 * np.exp(-np.square((x + 70) / 55))
    dome = dome - 60 * np.square((y + 10) / 90) - 5
    chest = body.cavity & (z > dome)
    body.chest = chest
    x, y, z = x[chest], y[chest], z[chest]
    top = body.vary(225, 0.05)
    taper = 1 - np.square(np.clip((z - 0.62 * top) / (0.38 * top), 0, 1))
    across = np.square(x / 135) + np.square(y / 105)
    # Wide before the spine and at the roots of the lungs, narrow behind the breastbone.
    inner = 9 + 21 * np.exp(-np.square((y - body.spine - 32) / 42))
    inner += 9 * np.exp(-np.square((z - 85) / 30)) + 4 * np.sin(z / 17 + np.sign(x))
    grain = random.uniform(-880, -800) + 60 * np.clip(-y / 90, 0, 1)
    noise = random.standard_normal(body.hu.shape, dtype=np.float32)
    texture = _blur(_blur(noise)) * np.float32(160)  # HU: small vessels and airways
    grain += np.maximum(texture[chest], -40)
    lung = (np.abs(x) > inner) & (across < taper)
    body.hu[chest] = np.where(lung, grain, -60)  # the rest is fat
    body.organs[chest] = np.where(lung, _LUNGS, 0)
    z = body.z
    blood = 45 + 200 * body.contrast
    body.tube((2, body.spine + 46), 9, -970, chest & (z > 105))  # windpipe
    body.tube((-6, body.spine + 31), 8, 35, chest)  # gullet
    soft = body.chest | (z < 40)
    body.ellipsoid((-24, 26, 42), (58, 46, 52), 40, soft)
    body.ellipsoid((-38, 20, 36), (30, 24, 32), blood, soft)
    body.ellipsoid((14, 22, 48), (24, 25, 30), blood - 20, soft)
    body.ellipsoid((6, 20, 100), (17, 17, 42), blood, soft, wobble=2)  # rising aorta
    body.ellipsoid((27, 20, 110), (10, 10, 60), blood - 30, soft, wobble=2)  # upper hollow vein
    body.ellipsoid((-8, -4, 128), (26, 34, 12), blood, soft, wobble=2)  # the arch
    body.tube((-21, body.spine + 30), 12, blood, (z < 128) & (z > -150))
    for side in (-1, 1):
        for _ in range(16):  # vessels in the lungs
            center = side * random.uniform(35, 95), random.uniform(-45, 35), random.uniform(35, 150)
            radii = random.uniform(2, 5), random.uniform(2, 5), random.uniform(6, 25)
            body.ellipsoid(center, radii, 20, chest, organ=_LUNGS)


def _paint_abdomen(body: _Body) -> None:
    """Liver right, spleen and stomach left, kidneys, bowel with gas, bladder."""
    random, z = body.random, body.z
    belly = body.cavity & ~body.chest & (body.hu < 0)
    agent = body.contrast
    for _ in range(55):  # bowel loops
        center = random.uniform(-95, 95), random.uniform(-20, 75), random.uniform(-290, -85)
        size = random.uniform(14, 26)
        body.ellipsoid(center, (size, size, random.uniform(14, 34)), random.uniform(15, 50), belly)
        if random.random() < 0.35:
            high = (center[0], center[1] + 0.45 * size, center[2])
            body.ellipsoid(high, (size * 0.6, size * 0.4, size * 0.8), -900, belly, wobble=1)
    for side in (-1, 1):  # ascending and descending colon
        center_y = random.uniform(-10, 20)
        for level in range(-250, -90, 28):
            content = -850 if random.random() < 0.4 else 20
            body.ellipsoid((side * 105, center_y, level), (19, 19, 18), content, belly)
    liver = 60 + 50 * agent
    body.ellipsoid((58, 12, -28), (92, 82, 72), liver, belly, organ=_LIVER)
    body.ellipsoid((5, 48, -22), (70, 36, 40), liver, belly, organ=_LIVER)
    for _ in range(6):
        spot = random.uniform(20, 110), random.uniform(-40, 50), random.uniform(-70, 0)
        body.ellipsoid(spot, (5, 5, 9), liver + 55 * agent - 12, belly & (z < 0), organ=_LIVER)
    body.ellipsoid((48, 38, -75), (15, 17, 24), 8, belly)  # gall bladder
    body.ellipsoid((-60, 32, -32), (38, 44, 40), random.uniform(10, 60), belly)  # stomach
    body.ellipsoid((-58, 54, -30), (26, 16, 26), -920, belly)
    body.ellipsoid((-100, -32, -32), (30, 40, 46), 50 + 65 * agent, belly, organ=_SPLEEN)
    body.ellipsoid((-20, 10, -75), (55, 11, 13), 40 + 40 * agent, belly)  # pancreas
    for side in (-1, 1):
        kidney = (side * 62, body.spine + 28, -105 - 10 * side)
        body.ellipsoid(kidney, (28, 25, 52), 32 + 150 * agent, belly, wobble=2, organ=_KIDNEYS)
        hilum = (side * 50, body.spine + 32, kidney[2])
        body.ellipsoid(hilum, (13, 10, 22), -60 + 60 * agent, None, wobble=2)
        muscle = (side * 40, body.spine + 8, -170)
        body.ellipsoid(muscle, (20, 19, 95), MUSCLE + 8, body.cavity & (z < -60))  # psoas
    body.tube((20, body.spine + 31), 11, 45 + 120 * agent, (z < 20) & body.cavity)  # hollow vein
    low = body.cavity & (z < -230)
    body.ellipsoid((0, 25, -285), (42, 34, 32), 8, low, organ=_BLADDER)


def _paint_lesions(body: _Body, random: np.random.Generator) -> None:
    """Four to eight dense balls in the liver, 8 to 20 mm in radius, as filled with iodised oil.

    Args:
        body: with its liver.
        random: another generator than the body's, whose draws must not move.
    """
    liver = np.argwhere(body.organs == _LIVER)
    dense = random.uniform(1200, 1800)
    for x, y, z in liver[random.integers(len(liver), size=random.integers(4, 9))]:
        center = body.x[x, y, z], body.y[x, y, z], body.z[x, y, z]
        radius = random.uniform(8, 20)
        part = body.near(center, (radius, radius, radius))
        distances = (body.x[part], body.y[part], body.z[part])
        squares = sum((axis - c) ** 2 for axis, c in zip(distances, center, strict=True))
        inside = (squares < radius**2) & (body.organs[part] == _LIVER)
        body.hu[part][inside] = dense


def _blur(volume: np.ndarray) -> np.ndarray:
    """The weights 1 2 1 along each axis; edges repeat."""
    for axis in range(3):
        moved = np.moveaxis(volume, axis, 0)
        result = moved * np.float32(0.5)
        result[1:] += 0.25 * moved[:-1]
        result[:-1] += 0.25 * moved[1:]
        result[0] += 0.25 * moved[0]
        result[-1] += 0.25 * moved[-1]
        volume = np.moveaxis(result, 0, axis)
    return volume


def _store(
    hu: np.ndarray, organs: np.ndarray, spacing: np.ndarray, random: np.random.Generator
) -> tuple[nibabel.Nifti1Image, nibabel.Nifti1Image]:
    """HU in RAS order -> int16 image in some scanner's habits; and the label with its axes."""
    hu = np.clip(hu, -1024, 3071)
    if random.random() < 0.3:  # outside the scanner's circle
        x, y = (np.linspace(-1, 1, n, dtype=np.float32) ** 2 for n in hu.shape[:2])
        hu[x[:, None] + y[None, :] > 1] = -2048
    slope, intercept = [(1.0, 0.0), (1.0, 0.0), (1.0, -1024.0), (0.5, 0.0)][random.integers(4)]
    stored = np.rint((hu - intercept) / slope).astype(np.int16)
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = -spacing * (np.array(hu.shape) - 1) / 2 + random.uniform(-50, 50, 3)
    axes = ORIENTATIONS[random.integers(len(ORIENTATIONS))]
    turn = nibabel.orientations.ornt_transform(
        nibabel.io_orientation(affine), nibabel.orientations.axcodes2ornt(axes)
    )
    image, label = (
        nibabel.Nifti1Image(voxels, affine).as_reoriented(turn) for voxels in (stored, organs)
    )
    image.header.set_slope_inter(slope, intercept)
    for one in (image, label):
        one.header.set_xyzt_units("mm")
    return image, label
