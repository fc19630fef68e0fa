"""The three region recipes of the 160k release, as data sources for any config.

    config.data.sources = regions.sources("data", "data/lists")

Each source has its own chain, cache and weight; volumes are 192x192x64 when they reach the model.
The release says nothing of a crop to the foreground, so there is none.
"""

from typing import Any

VOLUME_SIZE = (192, 192, 64)

_COMMON: dict[str, Any] = {
    "axes": "RAS",
    "window_unit": "HU",
    "crop_foreground": False,
    "foreground_threshold": 0.0,  # a volume with nothing above it is refused
    "volume_size": VOLUME_SIZE,
    "dtype": "uint8",
}
_SOFT_TISSUE = {**_COMMON, "spacing": (1.5, 1.5, 1.5), "window": (-175.0, 250.0)}
CHAINS: dict[str, dict[str, Any]] = {
    "abdomen": {**_SOFT_TISSUE, "fit": "random_crop"},
    "chest": {
        **_COMMON,
        "spacing": (1.25, 1.25, 5.0),
        "window": (-1000.0, 500.0),
        "fit": "random_crop",
    },
    "head_neck": {**_SOFT_TISSUE, "fit": "resize"},  # also of unlabelled abdominal CT
}
WEIGHTS = {"abdomen": 8.0, "chest": 1.0, "head_neck": 8.0}


def sources(data: str, lists: str) -> dict[str, Any]:
    """Of each region: CT files in DATA/<region>, listed in LISTS/<region>.json.

    Args:
        data: folder of the regions' folders; the caches are made beside them.
        lists: folder of the lists; "": all that is in the regions' folders.
    """
    return {
        region: {
            "cache": f"{data}/cache_{region}",
            "roots": (f"{data}/{region}",),
            "lists": (f"{lists}/{region}.json",) if lists else (),
            "weight": WEIGHTS[region],
            "chain": dict(chain),
        }
        for region, chain in CHAINS.items()
    }
