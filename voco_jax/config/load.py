"""Config files and `--config.section.field=value` flags -> an experiment, for every command."""

import argparse
import ast
import dataclasses
import difflib
import fnmatch
import importlib.metadata
import importlib.util
import io
import json
import os
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin

import ml_collections
import pydantic

import voco_jax
from voco_jax.config.common import WORKDIR, Experiment
from voco_jax.config.config_files import plain, read
from voco_jax.config.encoders import ENCODERS, Model
from voco_jax.config.finetuning import ClassificationFinetuning, SegmentationFinetuning
from voco_jax.config.pretraining import Pretraining
from voco_jax.errors import InputError
from voco_jax.files import local_path

AnyExperiment = Pretraining | SegmentationFinetuning | ClassificationFinetuning
EXPERIMENTS: dict[str, type[AnyExperiment]] = {
    "voco": Pretraining,
    "segmentation": SegmentationFinetuning,
    "classification": ClassificationFinetuning,
}
"""What a config file's `task` makes of it."""


# ---- the command line


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"flags: {message} (see --help)")


def command_parser(program: str, description: str | None, examples: str) -> argparse.ArgumentParser:
    """A parser whose mistakes are `InputError`s and whose --help ends with examples.

    From now on nothing that this process prints can fail for its encoding.

    Args:
        program: as a user types it, without `python`: `main.py` or `-m package.module`.
        description: as a rule the module's docstring.
        examples: lines of arguments, one command each.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a file's name may not be in its encoding
            stream.reconfigure(errors="backslashreplace")
    typed = Path(sys.argv[0]).name  # a console script of pyproject.toml, or else Python's file
    typed = typed if typed.startswith("voco-") else f"python {program}"
    lines = "".join(f"  {typed} {line}\n" for line in examples.strip().splitlines())
    parser = _Parser(
        prog=typed,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog=f"examples:\n{lines}",
    )
    parser.add_argument("--version", action="version", version=_versions(), help="show it and exit")
    return parser


def _versions() -> str:
    jax = importlib.metadata.version("jax")
    return f"voco_jax {voco_jax.__version__}, jax {jax}, Python {platform.python_version()}"


def parse_arguments(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None
) -> tuple[argparse.Namespace, dict[str, str]]:
    """The command's own flags, and `--config.section.field=value` as name -> text.

    Args:
        parser: of `command_parser`.
        arguments: of the command line; None: this process's.

    Raises:
        InputError: a flag that is neither, or a setting without a value.
    """
    options, rest = parser.parse_known_args(arguments)
    overrides: dict[str, str] = {}
    while rest:
        flag = rest.pop(0)
        name, equals, value = flag.removeprefix("--config.").partition("=")
        if flag.startswith("--config.") and not equals and rest and not rest[0].startswith("--"):
            equals, value = "=", rest.pop(0)
        if not flag.startswith("--config.") or not equals:
            raise InputError(
                f"flags: found {flag!r}, expected those of --help, and --config.section.field=value"
            )
        overrides[name] = value
    return options, overrides


def positive(text: str) -> int:
    """For argparse: a whole number of 1 or more."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"found {value}, expected 1 or more")
    return value


# ---- a file's settings


def load(
    path: str | os.PathLike[str],
    overrides: Mapping[str, Any] | None = None,
    workdir: str | None = None,
) -> AnyExperiment:
    """A config file with some settings set anew.

    Args:
        path: of the file, or a shipped config's name; with :TEXT behind it, `get_config(TEXT)` is
            called.
        overrides: by dotted name; see `override`.
        workdir: replaces "{workdir}" in every setting; None: left as it stands.

    Raises:
        InputError: no such file, or impossible settings.
    """
    return parse(override(read(path), overrides or {}), workdir)


def load_pretraining(
    path: str | os.PathLike[str], overrides: Mapping[str, Any] | None = None
) -> Pretraining:
    """As `load`, for what pre-training alone has.

    Raises:
        InputError: also for a config of another task.
    """
    experiment = load(path, overrides)
    if not isinstance(experiment, Pretraining):
        raise InputError(
            f"{path}: task: found {experiment.task!r}, expected 'voco': this is for pre-training"
        )
    return experiment


def override(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Sets settings from values, or from text as it stands on the command line.

    Args:
        values: nested dicts; not changed.
        overrides: dotted name (an element of a tuple as in `model.depths[0]`) -> text: a Python
            literal, or else a string; where the setting is a text it is taken as it stands, and
            where it is a tuple a single value is one of length 1.

    Raises:
        InputError: no such setting.
    """
    result = _copy(values)
    for name, text in overrides.items():
        field, index = _split_index(name)
        *sections, last = field.split(".")
        place = result
        for section in sections:
            inner = place.get(section)
            if not isinstance(inner, dict):
                raise InputError(f"config: {unknown(field, list(leaves(values)))}")
            place = inner
        if isinstance(place.get(last), dict):
            raise InputError(f"config: {field}: a section, set one of {', '.join(place[last])}")
        if last not in place:
            raise InputError(f"config: {unknown(field, list(leaves(values)))}")
        if index is None:
            place[last] = _value(text, place[last])
            continue
        elements = place[last]
        if not isinstance(elements, tuple | list) or index >= len(elements):
            raise InputError(f"config: {name}: found no element {index} in {elements!r}")
        changed = _value(text, elements[index])
        place[last] = (*elements[:index], changed, *elements[index + 1 :])
    return result


def _split_index(name: str) -> tuple[str, int | None]:
    found = re.fullmatch(r"(.+)\[(\d+)\]", name)
    return (found[1], int(found[2])) if found else (name, None)


def _value(text: Any, before: Any) -> Any:
    if isinstance(before, str) or not isinstance(text, str):
        return text
    try:
        value = ast.literal_eval(text)
    except (SyntaxError, ValueError):
        value = text
    single = isinstance(before, tuple | list) and not isinstance(value, tuple | list)
    return (value,) if single else value


# ---- an experiment


def parse(
    config: ml_collections.ConfigDict | Mapping[str, Any], workdir: str | None = None
) -> AnyExperiment:
    """Validates settings as a config file returns them.

    Args:
        config: a ConfigDict or nested mapping with exactly the fields of the experiment that its
            `task` names and of the encoder that its `model.encoder` names.
        workdir: see `load`.

    Returns:
        The frozen dataclass.

    Raises:
        InputError: unknown, missing or impossible fields; one message names them all, but for a
            wrong `task` or `model.encoder`.
    """
    values = plain(config)
    if workdir is not None:
        values = _fill_in(values, str(local_path("--workdir", workdir)))
    kind = _choose("task", values, EXPERIMENTS)
    problems: list[str] = []
    section = values.get("model")
    if isinstance(section, Mapping):
        encoder = _choose("model.encoder", {"model.encoder": section.get("encoder")}, ENCODERS)
        values = {**values, "model": _validated(encoder, section, "model.", problems)}
    told = ("model",) if problems else None
    experiment = _validated(kind, values, "", problems, told)
    if problems:
        raise InputError("config: " + "; ".join(problems))
    return experiment


def _choose(field: str, values: Mapping[str, Any], table: Mapping[str, Any]) -> Any:
    """What a table has of the name that a field holds."""
    name = values.get(field)
    if not isinstance(name, str) or name not in table:
        raise InputError(f"config: {field}: found {name!r}, expected one of {', '.join(table)}")
    return table[name]


def _validated(
    kind: Any,
    values: Mapping[str, Any],
    prefix: str,
    problems: list[str],
    told: tuple[str, ...] | None = None,
) -> Any:
    """The dataclass of a section; None where there are problems, which are added to the list.

    Args:
        kind: of the dataclass.
        values: of its fields.
        prefix: of their names.
        problems: messages so far.
        told: a field whose problems are among these.
    """
    try:
        return pydantic.TypeAdapter(kind).validate_python(dict(values))
    except pydantic.ValidationError as error:
        known = field_names(kind, prefix)
        items = [dict(item) for item in error.errors() if item["loc"] != told]
        problems += [_problem(item, prefix, known) for item in items]
        return None


def _problem(item: Mapping[str, Any], prefix: str, known: Sequence[str]) -> str:
    field = prefix + ".".join(str(part) for part in item["loc"])
    if item["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return unknown(field, known)
    if item["loc"] and isinstance(item["loc"][-1], int):
        field = field.rpartition(".")[0]
        position = f"value {item['loc'][-1] + 1}"
        if item["type"].startswith("missing"):
            return f"{field}: {position} is missing; give the whole tuple, as (7, 7, 7)"
        if item["type"] != "value_error":
            return f"{field}: {position}: found {item['input']!r}, expected: {item['msg']}"
    if item["type"].startswith("missing"):
        return f"{field}: missing; start from configs/voco_10k.py, which sets every field"
    if item["type"] == "value_error":
        message = item["msg"].removeprefix("Value error, ")
        return f"{field}.{message}" if field and not field.endswith(".") else f"{field}{message}"
    return f"{field}: found {item['input']!r}, expected: {item['msg']}"


def unknown(field: str, known: Sequence[str]) -> str:
    """The message about a setting that there is not.

    Args:
        field: dotted.
        known: those that there are, dotted; a part "*" is any name.
    """
    close = difflib.get_close_matches(field, known, n=1)
    hint = f", did you mean {close[0]}?" if close else f"; fields are {', '.join(known)}"
    return f"{field}: no such field{hint}"


def field_names(kind: Any, prefix: str = "") -> list[str]:
    """The dotted names of all fields of a config dataclass, leaves only; "*": any name."""
    names: dict[str, None] = {}  # in order
    for field in dataclasses.fields(kind):
        name = prefix + field.name
        inner: list[Any] = list(ENCODERS.values()) if field.type is Model else [field.type]
        for one in inner:
            if dataclasses.is_dataclass(one):
                names |= dict.fromkeys(field_names(one, f"{name}."))
            elif get_origin(one) is dict:
                names |= dict.fromkeys(field_names(get_args(one)[1], f"{name}.*."))
            else:
                names[name] = None
    return list(names)


def leaves(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """What nested dicts hold, by dotted name."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        inner = isinstance(value, dict)
        found |= leaves(value, f"{prefix}{name}.") if inner else {prefix + name: value}
    return found


def to_dict(experiment: Experiment) -> dict[str, Any]:
    """The experiment as nested plain values, ready for JSON; `parse` takes it back."""
    return json.loads(json.dumps(dataclasses.asdict(experiment)))  # type: ignore[call-overload]


def may_change(field: str, patterns: Sequence[str]) -> bool:
    """Whether a setting, by its dotted name, may differ when a workdir is resumed.

    Args:
        field: its name.
        patterns: the experiment's `runtime_fields`.
    """
    return any(fnmatch.fnmatchcase(field, pattern) for pattern in patterns)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs between two nested dicts of settings, as lines `field: old -> new`."""
    lines: list[str] = []

    def compare(a: Any, b: Any, name: str) -> None:
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            for key in sorted({*a, *b}):
                compare(a.get(key), b.get(key), f"{name}.{key}" if name else key)
        elif a != b:
            lines.append(f"{name}: {a!r} -> {b!r}")

    compare(old, new, "")
    return lines


def _copy(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: _copy(value) if isinstance(value, Mapping) else value
        for name, value in values.items()
    }


def _fill_in(values: Any, workdir: str) -> Any:
    """Replaces "{workdir}" in every text of nested dicts and tuples."""
    if isinstance(values, Mapping):
        return {name: _fill_in(value, workdir) for name, value in values.items()}
    if isinstance(values, tuple | list):
        return tuple(_fill_in(value, workdir) for value in values)
    return values.replace(WORKDIR, workdir) if isinstance(values, str) else values
