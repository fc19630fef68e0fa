"""An encoder with its weights, for Python: volumes in, features out; see docs/features.md.

A volume is embedded as pre-training saw it: prepared by the chain of the weights' card, cut into
crops, each resized to the encoder's size, and encoded without augmentation, dropout and projector.
Its features are the mean of its crops'.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from voco_jax.config.common import Chain
from voco_jax.config.load import AnyExperiment
from voco_jax.data.crops import cut
from voco_jax.data.volumes import dequantise, prepare_files, quantise
from voco_jax.errors import InputError
from voco_jax.models.encoder import PROJECTOR
from voco_jax.models.network import EncoderOutput, Network
from voco_jax.models.projector import similarity
from voco_jax.training.compile import compiler_options
from voco_jax.training.images import resize, to_unit
from voco_jax.training.mesh import make_mesh
from voco_jax.types import Params, Size

File = str | PathLike[str]
Volume = File | Sequence[File] | np.ndarray
"""A file or a folder of slices, of an image with several channels a file each; or voxels."""


@dataclass(frozen=True)
class Crops:
    """The features of a volume's crops.

    Attributes:
        corners: (n, 3) first voxel of each in the prepared volume.
        grid: how many there are along x, y, z; the last axis is the fastest.
        vectors: (n, features) float32.
    """

    corners: np.ndarray
    grid: Size
    vectors: np.ndarray


@dataclass(frozen=True, kw_only=True, eq=False)
class Encoder:
    """An encoder with its weights, of `load_encoder`; calling it gives the features of a volume.

    Attributes:
        weights: the file.
        digest: its SHA-256; of random weights what they are.
        experiment: that made it.
        chain: how volumes are prepared.
        crop_size: voxels of a prepared volume that are encoded at a time.
        encoder_size: voxels that each crop is resized to before.
        size: numbers of a vector.
        has_projector: whether the file has the projector, which `similarity_map` takes.
        notes: what the reader of the weights should know.
        batch: crops at a time.
    """

    weights: Path
    digest: str
    experiment: AnyExperiment = field(repr=False)
    chain: Chain
    crop_size: Size
    encoder_size: Size
    size: int
    has_projector: bool
    notes: tuple[str, ...]
    batch: int
    _network: Network = field(repr=False)
    _params: Params = field(repr=False)

    def __call__(self, volume: Volume) -> np.ndarray:
        """The features of a whole volume: the mean of its crops' vectors.

        Args:
            volume: a file in any format that is read, a folder of a DICOM series, for weights of
                several channels a file for each; or the voxels of a prepared volume, x y z in RAS
                order (and channels, if there are several), 0..1 of the window.

        Returns:
            (features,) float32.

        Raises:
            InputError: no usable volume, or voxels of another size or range.
        """
        return mean_vector(self.crops(volume).vectors)

    def crops(self, volume: Volume) -> Crops:
        """The features of each crop of a volume; see `__call__`.

        The crops are the base crops of pre-training. Where a volume keeps its own size (a chain
        with fit "random_crop", as for fine-tuning), as few crops as cover it lie evenly in it.
        """
        return self.encode(self.stored(volume))

    def prepare(self, files: File | Sequence[File], take_doubtful: bool = False) -> np.ndarray:
        """The voxels of a volume as pre-training saw them.

        Args:
            files: see `__call__`.
            take_doubtful: take also what seems to be no image of the chain's kind.

        Returns:
            x y z (and channels, if there are several), float32, 0..1.

        Raises:
            VolumeError: no usable volume.
        """
        paths = [files] if isinstance(files, str | PathLike) else list(files)
        prepared = prepare_files([Path(path) for path in paths], self.chain, take_doubtful)
        voxels = [dequantise(quantise(one.voxels, self.chain.dtype)) for one in prepared]
        return voxels[0] if len(voxels) == 1 else np.stack(voxels, axis=-1)

    def stored(self, volume: Volume) -> np.ndarray:
        """A volume as a cache keeps it: x y z channels, in the chain's dtype; see `__call__`."""
        voxels = volume if isinstance(volume, np.ndarray) else self.prepare(volume)
        whole = None if self.chain.fit == "random_crop" else self.chain.volume_size
        return self._checked(voxels, whole, "volume")

    def encode(self, voxels: np.ndarray) -> Crops:
        """The features of each crop of what `stored` returned."""
        corners, grid = crop_corners(voxels.shape[:3], self.crop_size)
        found = [
            self._encode(self._params, crops)[: len(rows)]
            for rows, (crops,) in self._batches(corners, voxels)
        ]
        return Crops(corners, grid, np.concatenate(jax.device_get(found)))

    def pool(self, voxels: np.ndarray, labels: np.ndarray, members: np.ndarray) -> np.ndarray:
        """The features under masks: as `pooled`, each cell weighed with its share of the mask.

        The feature maps of all crops are averaged over their cells. A mask goes through the same
        resize as the image; a cell's weight is the share of it that the mask covers. A mask of all
        voxels has the features of the volume.

        Args:
            voxels: what `stored` returned.
            labels: x y z of the same size, uint8; 0 is part of no mask.
            members: (masks, labels) float32: 1 where a label is part of a mask.

        Returns:
            (masks, features) float32; NaN of a mask without voxels.
        """
        corners, _ = crop_corners(labels.shape, self.crop_size)
        inside = members.max(axis=0)[cut(labels, corners, self.crop_size)]
        kept = corners[inside.any(axis=(1, 2, 3))]
        sums = np.zeros((len(members), self.size + 1))
        for _, (crops, own) in self._batches(kept, voxels, labels):
            sums += jax.device_get(self._pool(self._params, crops, own, members))
        with np.errstate(invalid="ignore"):
            return (sums[:, :-1] / sums[:, -1:]).astype(np.float32)

    def project(self, vectors: np.ndarray) -> np.ndarray:
        """(n, features) of crops -> (n, projector's size) float32; its batch norm is over these n.

        Raises:
            ValueError: a single row.
        """
        return np.asarray(self._project({PROJECTOR: self._params[PROJECTOR]}, vectors))

    def crop(self, voxels: np.ndarray) -> np.ndarray:
        """The features of a single crop: x y z voxels of `crop_size` -> (features,) float32.

        Raises:
            InputError: another size or range.
        """
        return self.encode(self._checked(voxels, self.crop_size, "sub-volume")).vectors[0]

    def _checked(self, voxels: np.ndarray, size: Size | None, what: str) -> np.ndarray:
        """Voxels of 0..1 (or as cached) as a cache keeps them, with an axis of channels."""
        channels = len(getattr(self.chain, "channels", ())) or 1
        if voxels.ndim == 3:
            voxels = voxels[..., None]
        found = voxels.shape[:3]
        fits = found == size if size else all(map(int.__ge__, found, self.crop_size))
        if voxels.ndim != 4 or voxels.shape[3] != channels or not fits:
            raise InputError(
                f"{what}: found shape {voxels.shape}, expected {size or self.crop_size} voxels"
                f"{'' if size else ' or more'} and {channels} channel{'s' * (channels > 1)}, as "
                "encoder.prepare(file) returns them"
            )
        if voxels.dtype == np.uint8 and self.chain.dtype == "uint8":
            return voxels
        low, high = float(voxels.min()), float(voxels.max())
        if not (low >= 0 and high <= 1):  # also where one is NaN
            raise InputError(
                f"{what}: found values from {low:g} to {high:g}, expected 0 to 1 of the window, as "
                "encoder.prepare(file) returns them"
            )
        return quantise(voxels, self.chain.dtype)

    def _batches(
        self, corners: np.ndarray, *volumes: np.ndarray
    ) -> Iterator[tuple[np.ndarray, list[np.ndarray]]]:
        """Corners and the crops there, always `batch` of them: compiled once; the rest is zeros."""
        for start in range(0, len(corners), self.batch):
            rows = corners[start : start + self.batch]
            batch = []
            for volume in volumes:
                crops = np.zeros((self.batch, *self.crop_size, *volume.shape[3:]), volume.dtype)
                cut(volume, rows, self.crop_size, crops[: len(rows)])
                batch.append(crops)
            yield rows, batch

    @functools.cached_property
    def _encode(self) -> Callable[..., jax.Array]:
        return _compiled(lambda params, crops: self._run(params, crops).pooled)

    @functools.cached_property
    def _project(self) -> Callable[..., jax.Array]:
        return _compiled(
            lambda params, rows: self._network.apply({"params": params}, rows, method="project")
        )

    @functools.cached_property
    def _pool(self) -> Callable[..., jax.Array]:
        def pool(params: Params, crops: jax.Array, labels: jax.Array, members: Any) -> Any:
            output = self._run(params, crops)

            def one(member: jax.Array) -> jax.Array:
                share = resize(member[labels], self.encoder_size)
                parts = [_sum_under(share, x) for x in output.features or output.hidden_states[-1:]]
                return jnp.concatenate([*parts, _sum(share, (3, 2, 1, 0))[None]])

            return jax.lax.map(one, members)

        return _compiled(pool)

    def _run(self, params: Params, crops: jax.Array) -> EncoderOutput:
        images = resize(to_unit(crops), self.encoder_size)
        output: Any = self._network.apply({"params": params}, images, False, method="encode")
        return output


def similarity_map(sub_volume: np.ndarray, volume: Volume, encoder: Encoder) -> np.ndarray:
    """Where a sub-volume lies: how similar it is to each base crop, as VoCo predicts overlaps.

    Where the weights have the projector (`voco-export --with-projector`), relu(cosine) of the
    projected features, of which pre-training learned that it is the overlap. Else of the pooled
    features themselves: these are alike for all crops of a scan, and only their order tells.

    Args:
        sub_volume: x y z voxels of `encoder.crop_size`, cut out of what `encoder.prepare` returned.
        volume: as of `encoder(volume)`.
        encoder: of `load_encoder`.

    Returns:
        An array of the grid, x y z crops, float32, 0..1.

    Raises:
        InputError: no usable volume, or voxels of another size or range.
    """
    first, crops = encoder.crop(sub_volume), encoder.crops(volume)
    rows = np.concatenate([first[None], crops.vectors])
    if encoder.has_projector:
        rows = encoder.project(rows)
    found = similarity(jnp.asarray(rows[:1]), jnp.asarray(rows[1:]))
    return np.minimum(found, 1).reshape(crops.grid)  # a cosine may be rounded to more


def mean_vector(vectors: np.ndarray) -> np.ndarray:
    """(n, features) of the crops of a volume -> its own, (features,) float32."""
    return vectors.mean(axis=0, dtype=np.float64).astype(np.float32)


def crop_corners(shape: Sequence[int], size: Size) -> tuple[np.ndarray, Size]:
    """The fewest crops that cover a volume, evenly: of a multiple of their size the base grid.

    Args:
        shape: of the volume, no axis smaller than a crop's.
        size: of a crop.

    Returns:
        Corners (n, 3) in C order, and how many there are along x, y, z.
    """
    x, y, z = (-(-length // own) for length, own in zip(shape, size, strict=True))
    places = [
        [(length - own) * i // max(count - 1, 1) for i in range(count)]
        for length, own, count in zip(shape, size, (x, y, z), strict=True)
    ]
    return np.stack(np.meshgrid(*places, indexing="ij"), axis=-1).reshape(-1, 3), (x, y, z)


def _sum_under(share: jax.Array, features: jax.Array) -> jax.Array:
    """Features under a mask, summed: `b x y z` shares, `b X Y Z c` cells -> `c`."""
    batch, *cells, _ = features.shape
    voxels = np.array(share.shape[1:]) // cells
    blocks = np.stack([cells, voxels], axis=1).reshape(-1).tolist()
    weights = _sum(share.reshape(batch, *blocks), (6, 4, 2))
    return _sum(weights[..., None] * features.astype(jnp.float32), (3, 2, 1, 0))


def _sum(values: jax.Array, axes: Sequence[int]) -> jax.Array:
    """Over one axis after the other: float32 would lose digits in one sum over a whole crop."""
    for axis in axes:
        values = values.sum(axis=axis)
    return values


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Jitted for the first device, with products in full float32: what MONAI computes, to 1e-4."""
    jitted = jax.jit(function, compiler_options=compiler_options(make_mesh(1, [jax.devices()[0]])))

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        with jax.default_matmul_precision("highest"):
            return jitted(*arguments)

    return call
