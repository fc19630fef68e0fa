"""What `pip install .` gives: the commands and the shipped configs, far from the checkout."""

import json
import os
import platform
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

import voco_jax

ROOT = Path(__file__).resolve().parents[1]
VERSIONS = (
    f"voco_jax {voco_jax.__version__}, jax {version('jax')}, Python {platform.python_version()}\n"
)
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["scripts"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder of an installation from a copy: pip leaves build/ in what it installs."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "setup.py", "requirements.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("configs", "voco_jax"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    target = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    command += ["--no-build-isolation", "--no-compile", "--target", str(target), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shutil.rmtree(source)
    return target


def _run(installed, folder, *command):
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


def test_every_command_has_a_script_that_knows_its_version(installed, tmp_path):
    assert {path.name for path in (installed / "bin").glob("voco-*")} == set(SCRIPTS)
    code = """
import importlib, sys
for script in sys.argv[1:]:
    module, _, function = script.partition(":")
    main = getattr(importlib.import_module(module), function)
    sys.argv = ["voco-x", "--version"]
    try:
        main()
    except SystemExit as end:
        assert not end.code, script
"""
    done = _run(installed, tmp_path, "-c", code, *SCRIPTS.values())
    assert done.stdout == VERSIONS * len(SCRIPTS)
    assert done.stderr == ""


def test_scripts_run_anywhere_with_shipped_configs(installed, tmp_path):
    """As a process each; a folder `configs` of the user's is in nobody's way."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "demo.py").write_text("raise ValueError('not this one')\n", "utf-8")
    scripts = installed / "bin"
    done = _run(installed, tmp_path, scripts / "voco-train", "--help")
    assert done.stdout.startswith("usage: voco-train ")
    assert "  voco-train --config " in done.stdout
    nothing = ("--config.data.phantoms=0", "--workdir=w", "--config.data.sources.ct.roots=none")
    done = _run(installed, tmp_path, scripts / "voco-train", "--config=tiny", *nothing)
    assert (done.returncode, done.stderr) == (
        2,
        "error: none: not a folder, expected one with CT volumes\n",
    )
    done = _run(installed, tmp_path, scripts / "voco-prepare", "--config=voco_160k:x")
    assert "found size 'x', expected one of b, l, h" in done.stderr


def test_shipped_configs_are_those_of_the_checkout(installed, tmp_path):
    code = """
import json, voco_jax
from voco_jax.config.config_files import shipped
from voco_jax.config.load import load, to_dict
print(json.dumps([voco_jax.__file__, {name: to_dict(load(name)) for name in shipped()}]))
"""
    place, found = json.loads(_run(installed, tmp_path, "-c", code).stdout)
    assert Path(place).is_relative_to(installed)
    golden = ROOT / "tests" / "golden_configs"
    assert set(found) == {path.stem.partition("-")[0] for path in golden.glob("*.json")}
    for name in found.keys() - {"voco_160k"}:
        assert found[name] == json.loads((golden / f"{name}.json").read_text("utf-8"))
    assert found["voco_160k"] == json.loads((golden / "voco_160k-b.json").read_text("utf-8"))
