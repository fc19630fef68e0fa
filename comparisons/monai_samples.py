"""MONAI's side of pipeline_against_monai.py: its cache, and the published chain on it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from voco_jax.config.pretraining import Pretraining


def dataset(paths: Sequence[str], folder: Path) -> Any:
    """MONAI's cached volumes: float32 tensors of 1 x 384 x 384 x 96."""
    import monai.transforms as mt
    from monai.data import PersistentDataset

    chain = [
        mt.LoadImaged("image"),
        mt.EnsureChannelFirstd("image"),
        mt.Orientationd("image", axcodes="RAS", labels=None),
        mt.ScaleIntensityRanged("image", -175, 250, 0, 1, clip=True),
        mt.CropForegroundd("image", "image", lambda x: x > 0.3),
        mt.Resized("image", (384, 384, 96), mode="trilinear", align_corners=True),
    ]
    items = [{"image": path} for path in paths]
    return PersistentDataset(items, mt.Compose(chain), folder / "monai")


class MonaiSamples:
    """The published per-sample chain on cached volumes, for torch's DataLoader."""

    def __init__(
        self, paths: Sequence[str], folder: Path, config: Pretraining, augment: bool
    ) -> None:
        import monai.transforms as mt

        crops, some = config.crops, config.augment
        self._grid, self._size, self._subs = crops.grid, crops.crop_size, crops.sub_volumes
        self._volumes = dataset(paths, folder)
        self._resize = mt.Resized("image", crops.encoder_size, mode="trilinear", align_corners=True)
        flips = [
            mt.RandFlipd("image", prob=some.flip_probability, spatial_axis=axis)
            for axis in range(3)
        ]
        turn = mt.RandRotate90d("image", prob=some.rotate_probability, max_k=3)
        shift = mt.RandShiftIntensityd("image", some.shift, prob=some.shift_probability)
        self._change = mt.Compose([*flips, turn, shift] if augment else [])
        self._generator = np.random.default_rng(0)

    def __len__(self) -> int:
        return len(self._volumes)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Sub-volumes (s, 1, x, y, z), base crops (n, 1, x, y, z), labels (s, n)."""
        import torch

        image = self._volumes[index]["image"]
        size, grid = np.asarray(self._size), np.asarray(self._grid)
        cells = np.stack(np.meshgrid(*map(np.arange, grid), indexing="ij"), -1).reshape(-1, 3)
        centres = [
            [
                # As published: an axis with one cell is taken whole.
                half if cells == 1 else self._generator.integers(half, cells * length - half)
                for half, cells, length in zip(size // 2, grid, size, strict=True)
            ]
            for _ in range(self._subs)
        ]
        subs = [self._crop(image, np.asarray(centre)) for centre in centres]
        bases = [self._crop(image, cell * size + size // 2) for cell in cells]
        labels = torch.zeros(self._subs, len(cells))
        for row, centre in enumerate(centres):
            for column, cell in enumerate(cells):
                distance = np.abs(np.asarray(centre) - cell * size - size // 2)
                labels[row, column] = float(np.prod(np.maximum(size - distance, 0) / size))
        return {"subs": torch.stack(subs), "bases": torch.stack(bases), "labels": labels}

    def _crop(self, image: Any, centre: np.ndarray) -> Any:
        import monai.transforms as mt

        crop = mt.SpatialCropd("image", roi_center=centre, roi_size=self._size)
        return self._change(self._resize(crop({"image": image})))["image"]
