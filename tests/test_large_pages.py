"""A command that restarts itself with large pages."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from voco_jax.large_pages import VALUE, VARIABLE

SCRIPT = """
import json, os, sys
from voco_jax.large_pages import restart_with_large_pages
restart_with_large_pages()
print(json.dumps([os.getpid(), sys.argv, sys.flags.utf8_mode, os.environ["GLIBC_TUNABLES"]]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="run on another system than Linux")
@pytest.mark.parametrize("chosen", [None, "glibc.malloc.perturb=0"])
def test_same_process_same_arguments(tmp_path, chosen):
    """And what the user has set is left alone."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    environment["PYTHONPATH"] = str(Path(__file__).parents[1])
    if chosen:
        environment[VARIABLE] = chosen
    command = [sys.executable, "-X", "utf8", str(script), "--flag=a b", "c"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as process:
        pid, arguments, utf8, value = json.loads(process.communicate()[0])
    assert pid == process.pid
    assert arguments == [str(script), "--flag=a b", "c"]
    assert utf8 == 1
    assert value == (chosen or VALUE)


COMMAND = """
import os, sys
from voco_jax.evaluation import commands

def restart(*arguments):
    heavy = {"jax", "numpy", "pyarrow"} & set(sys.modules)
    print("restarted", *sorted(heavy))
    sys.exit(0)

os.execv = restart
commands.NAME()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="run on another system than Linux")
@pytest.mark.parametrize("name", ["embed", "predict"])
def test_console_commands_restart_before_heavy_imports(name):
    root = Path(__file__).parents[1]
    scripts = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["project"]["scripts"]
    assert scripts[f"voco-{name}"] == f"voco_jax.evaluation.commands:{name}"
    environment = {key: value for key, value in os.environ.items() if key != VARIABLE}
    environment["PYTHONPATH"] = str(root)
    code = COMMAND.replace("NAME", name)
    done = subprocess.run([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE)
    assert done.stdout == b"restarted\n"
