"""Runs of configs/tiny.py as real processes: started, waited for, their losses."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# How every run here differs from configs/tiny.py: it trains, and nothing else.
SETTINGS: dict[str, object] = {
    "data.phantoms": 6,
    "data.held_out": 0.0,
    "validation.every_steps": 0,
    "export_to": "",
}


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def start(
    workdir: Path,
    *,
    processes: int = 1,
    devices: int = 1,
    settings: Mapping[str, object] | None = None,
    environment: Mapping[str, str] | None = None,
) -> list[subprocess.Popen[str]]:
    """Starts the processes of one run.

    Args:
        workdir: of the run.
        processes: how many; one runs without flags.
        devices: of each process.
        settings: of the config, besides `SETTINGS`.
        environment: variables besides this process's own.

    Returns:
        The processes; stdout and stderr together go to their `stdout`.
    """
    flags = [f"--config.{k}={v}" for k, v in {**SETTINGS, **(settings or {})}.items()]
    command = [sys.executable, "main.py", "--config=configs/tiny.py", f"--workdir={workdir}"]
    variables = {
        **os.environ,
        **(environment or {}),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
    }
    port = _free_port()
    return [
        subprocess.Popen(
            command
            + flags
            + (
                [
                    f"--coordinator=127.0.0.1:{port}",
                    f"--processes={processes}",
                    f"--process_id={number}",
                ]
                if processes > 1
                else []
            ),
            cwd=ROOT,
            env=variables,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for number in range(processes)
    ]


def finish(processes: Sequence[subprocess.Popen[str]], timeout: float = 400) -> list[str]:
    """Waits for all; their outputs, read together: a full pipe stops its process."""
    with ThreadPoolExecutor(len(processes)) as readers:
        return list(readers.map(lambda p: p.communicate(timeout=timeout)[0], processes))


def losses(workdir: Path) -> dict[int, float]:
    """Step -> loss, of whole lines."""
    path = workdir / "metrics.jsonl"
    if not path.exists():
        return {}
    whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return {line["step"]: line["loss"] for line in map(json.loads, whole) if "loss" in line}
