"""Config files: those that are shipped, by their names, and any other."""

import contextlib
import importlib.util
import os
import sys
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_collections

from voco_jax.errors import InputError

DEFAULT = "voco_10k"
"""The shipped config that the others start from."""
SHIPPED = next(
    folder
    for folder in (Path(__file__).parents[1] / "configs", Path(__file__).parents[2] / "configs")
    if folder.is_dir()
)
"""The shipped configs' folder: in the package once it is installed, in a checkout beside it."""


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a config file's `get_config()` returns, as nested dicts.

    Args:
        path: as `load` takes it.

    Raises:
        InputError: there is no such file, it fails, or it has no `get_config()`.
    """
    file, *argument = str(path).split(":", 1)
    named = SHIPPED / f"{file.removesuffix('.py')}.py"
    if not os.path.isfile(file) and Path(file).name == file and named.stem in shipped():
        file = str(named)
    spec = importlib.util.spec_from_file_location("voco_config", file)
    if not os.path.isfile(file) or spec is None or spec.loader is None:
        raise InputError(
            f"--config: {file}: no such config file, expected a .py with get_config(), or one of "
            f"those that are shipped: {', '.join(shipped())}"
        )
    module = importlib.util.module_from_spec(spec)
    with _configs_importable(Path(file)):
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            raise InputError(f"{file}: this config file fails: {error!r}") from error
        if not hasattr(module, "get_config"):
            raise InputError(f"{file}: found no get_config() in it; see configs/voco_10k.py")
        try:
            return plain(module.get_config(*argument))
        except InputError:
            raise
        except Exception as error:
            where = ":".join([file, *argument])
            raise InputError(f"{where}: this config fails: {error!r}") from error


def shipped() -> list[str]:
    """The names of the configs that come with this package."""
    found = (path for path in SHIPPED.glob("*.py") if "def get_config(" in path.read_text("utf-8"))
    return sorted(path.stem for path in found)


@contextlib.contextmanager
def _configs_importable(file: Path) -> Iterator[None]:
    """While a config file runs, `configs` is those of the working folder, then the shipped ones.

    For a shipped one the shipped ones come first. Installed they lie in this package, for any
    project may have a folder named configs.
    """
    folders = [os.path.join(os.getcwd(), "configs"), str(SHIPPED)]
    if file.resolve().parent == SHIPPED.resolve():
        folders.reverse()
    package = types.ModuleType("configs")
    package.__path__ = folders
    before = {name: module for name, module in sys.modules.items() if _of_configs(name)}
    for name in before:
        del sys.modules[name]
    sys.modules["configs"] = package
    sys.path.insert(0, os.getcwd())  # what else a config file imports from its project's root
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # removed by the file itself
            sys.path.remove(os.getcwd())
        for name in [name for name in sys.modules if _of_configs(name)]:
            del sys.modules[name]
        sys.modules.update(before)


def _of_configs(module: str) -> bool:
    return module.partition(".")[0] == "configs"


def plain(config: ml_collections.ConfigDict | Mapping[str, Any]) -> dict[str, Any]:
    """A config as nested dicts."""
    return config.to_dict() if isinstance(config, ml_collections.ConfigDict) else dict(config)
