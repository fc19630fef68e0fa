"""README and docs/ taken apart: blocks of code, commands, links; and commands parsed, not run.

Above a block stands what becomes of it, invisible when rendered:

    <!-- runs -->               test_docs.py executes it, in the order of the pages
    <!-- needs: a GPU -->       it is only parsed, for want of that
    <!-- test command -->       .ci/run executes it
"""

import argparse
import contextlib
import faulthandler
import importlib
import os
import re
import runpy
import shlex
import sys
import tomllib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import HAS_TORCH

from voco_jax.config import load
from voco_jax.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
# In the order in which a reader, and the scripted session, comes to them.
FIRST = ["README.md", "docs/first_run.md", "docs/which_config.md", "docs/data.md"]
PAGES = list(dict.fromkeys([*(ROOT / name for name in FIRST), *sorted(ROOT.glob("docs/*.md"))]))
PAGES.append(ROOT / "CONTRIBUTING.md")
SCRIPTS: dict[str, str] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"][
    "scripts"
]
MARKS = re.compile(r"<!-- (runs|needs: .+|test command) -->")


@dataclass(frozen=True)
class Block:
    """A fenced block of code."""

    page: Path
    line: int  # of its fence
    language: str
    text: str
    mark: str  # of MARKS; "": there is none above it

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> Iterator[Block]:
    """All fenced blocks of a page."""
    lines = page.read_text("utf-8").splitlines()
    starts: int | None = None
    for number, line in enumerate(lines):
        if not line.lstrip().startswith("```"):
            continue
        if starts is None:
            starts = number
            continue
        above = [text for text in lines[:starts] if text.strip()][-1:]
        found = MARKS.fullmatch(above[0].strip()) if above else None
        language = lines[starts].strip().removeprefix("```")
        text = "\n".join(lines[starts + 1 : number]) + "\n"
        yield Block(page, starts + 1, language, text, found[1] if found else "")
        starts = None
    assert starts is None, f"{page}: a block does not end"


def prose(page: Path) -> str:
    """A page without its blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)


def commands(text: str) -> Iterator[list[str]]:
    """The commands of a piece of shell, as words; without variables set before them."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.shlex(line, posix=True, punctuation_chars="&|;<>()")
        words.whitespace_split, words.commenters = True, "#"
        one: list[str] = []
        for word in [*words, ";"]:
            if word in ("&&", "||", "|", ";", "(", ")", "&"):
                if one:
                    yield one
                one = []
            elif one or not re.fullmatch(r"[A-Z_]+=.*", word):
                one.append(word)


class Parsed(BaseException):
    """The command's parser took its arguments; main() must not go on."""


class Refused(BaseException):
    """It did not."""


def parse(words: list[str]) -> bool:
    """Has a command's own parser read its arguments, and checks the settings that it names.

    Returns:
        Whether it is a command of this project.

    Raises:
        Refused: what is wrong with it.
    """
    program, *arguments = words
    if re.fullmatch(r"(sbatch )?launch/\w+\.sh", program) or program == "sbatch":
        script = Path(arguments.pop(0) if program == "sbatch" else program)
        if not (ROOT / script).is_file():
            raise Refused(f"{script}: no such file")
        return parse(["python", "main.py", *arguments]) if arguments else True  # as the script does
    if program == "python" and arguments[:1] == ["-m"]:
        module = arguments[1]
        if module.split(".")[0] not in ("voco_jax", "comparisons", "robustness"):
            return False
        if importlib.util.find_spec(module) is None:
            raise Refused(f"{module}: no such module")
        _run(lambda: runpy.run_module(module, run_name="__main__", alter_sys=True), arguments[1:])
        return True
    if program == "python" and arguments[:1] == ["launch/prepare_slurm.py"]:
        return parse(["python", "-m", "voco_jax.data.prepare", *arguments[1:]])  # as it says
    if program == "python" and arguments and arguments[0].endswith(".py"):
        file = ROOT / arguments[0]
        _run(lambda: runpy.run_path(str(file), run_name="__main__"), [str(file), *arguments[1:]])
        return True
    if program in SCRIPTS:
        module, function = SCRIPTS[program].split(":")
        _run(getattr(importlib.import_module(module), function), [program, *arguments])
        return True
    return False


def _run(main, argv):
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the module has been imported before
        patch.setattr(sys, "argv", argv)
        patch.setattr(argparse.ArgumentParser, "parse_known_args", _stopping())
        patch.setattr(faulthandler, "enable", lambda: None)  # wants a real stderr
        patch.setattr(os, "execv", lambda *_: None)  # restart_with_large_pages
        try:
            main()
        except Parsed:
            return
        except ModuleNotFoundError as error:
            if HAS_TORCH or error.name not in ("torch", "monai"):
                raise Refused(f"{error!r}") from error
            return  # not to be parsed here
        except Exception as error:
            raise Refused(f"{error!r}") from error
    raise Refused("it did not parse its arguments")


def _stopping():
    """`parse_known_args` that ends the program, once the outermost parser is done."""
    real, depth = argparse.ArgumentParser.parse_known_args, 0

    def parse_known_args(self, args=None, namespace=None, **options):
        nonlocal depth
        depth += 1
        try:
            found, rest = real(self, args, namespace, **options)
        except SystemExit as error:
            raise Refused(str(error)) if error.code else Parsed from error  # 0: --help, --version
        except InputError as error:
            raise Refused(str(error)) from error
        finally:
            depth -= 1
        if depth:
            return found, rest
        try:
            check_settings(getattr(found, "config", None), rest)
        except InputError as error:
            raise Refused(str(error)) from error
        raise Parsed

    return parse_known_args


class _Rest(argparse.ArgumentParser):
    """For `load.parse_arguments`: nothing is left to parse."""

    def parse_known_args(self, args=None, namespace=None):
        return argparse.Namespace(), list(args)


def check_settings(config: str | None, rest: list[str]) -> None:
    """`--config.field=value` against the config, or where that is the reader's, against all.

    Raises:
        InputError: there is no such setting, or not with that value.
    """
    _, overrides = load.parse_arguments(_Rest(), rest)
    if config is not None and Path(config).name.split(":")[0] != "mine.py":
        with contextlib.chdir(ROOT):
            load.load(config, overrides, "runs/x")
        return
    for name in overrides:
        if not is_setting(name):
            raise InputError(f"--config.{name}: no such setting")


SETTINGS = {name for kind in load.EXPERIMENTS.values() for name in load.field_names(kind)}


def is_setting(name: str) -> bool:
    """Whether some task has a setting, or a section, of this name; chain.X is of any source."""
    name = re.sub(r"\[\d+\]$", "", name)
    name = re.sub(r"^data\.sources\.\w+", "data.sources.*", name)
    name = re.sub(r"^chain\b", "data.sources.*.chain", name)
    return any(known == name or known.startswith(f"{name}.") for known in SETTINGS)
