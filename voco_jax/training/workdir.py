"""The workdir: whose it is."""

import json
from pathlib import Path

from voco_jax.config import Config, differences, may_change, to_dict
from voco_jax.data.cache import write_whole
from voco_jax.errors import InputError
from voco_jax.training.checkpoint import FOLDER as CHECKPOINTS

CONFIG = "config.json"


def claim_workdir(workdir: Path, config: Config) -> Path:
    """Makes the workdir this experiment's own, or checks that it is.

    Args:
        workdir: made if missing.
        config: compared with the one that the workdir was started with.

    Returns:
        The resolved path.

    Raises:
        InputError: the workdir holds another experiment, is a file or cannot be written.
    """
    path = workdir / CONFIG
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        # Before the first checkpoint there is nothing to resume: settings may still be mended.
        if any(folder.name.isdigit() for folder in (workdir / CHECKPOINTS).glob("*")):
            _check_same_experiment(path, config)
        write_whole(path, json.dumps(to_dict(config), indent=2) + "\n")
    except OSError as error:
        raise InputError(
            f"{workdir}: cannot be used as --workdir ({error}); choose another"
        ) from error
    return workdir.resolve()


def _check_same_experiment(path: Path, config: Config) -> None:
    try:
        old = dict(json.loads(path.read_text("utf-8")))
    except (FileNotFoundError, ValueError, TypeError) as error:
        raise InputError(
            f"{path}: cannot be read ({error}), so it is not known whose checkpoints are beside "
            "it; choose another --workdir"
        ) from error
    changed = [
        line for line in differences(old, to_dict(config)) if not may_change(line.split(": ")[0])
    ]
    if changed:
        raise InputError(
            f"{path.parent}: holds another experiment; {'; '.join(changed)}. "
            "Choose another --workdir, or set these back to resume"
        )
