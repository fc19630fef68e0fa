"""A config file and `--config.section.field=value` flags -> a `Config`, for commands with argparse.

`main.py` leaves that to ml_collections' flags; the other commands have flags of their own.
"""

import argparse
import ast
from collections.abc import Mapping, Sequence
from typing import Any

from voco_jax.config import Config, check_field, load, parse
from voco_jax.errors import InputError


def parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """`--config.section.field=value` -> value, a Python literal or else a string.

    Args:
        arguments: what argparse did not know.

    Raises:
        InputError: another flag, no such field, or no "=".
    """
    values: dict[str, Any] = {}
    for argument in arguments:
        setting = argument.removeprefix("--config.")
        if setting == argument or "=" not in setting:
            raise InputError(
                f"flags: found {argument!r}, expected those of --help, and "
                "--config.section.field=value"
            )
        values.update([parse_setting(setting)])
    return values


def parse_setting(text: str) -> tuple[str, Any]:
    """`section.field=value` -> (dotted name, value).

    Raises:
        InputError: there is no such field.
    """
    name, _, value = text.partition("=")
    check_field(name)
    try:
        return name, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return name, value


def load_config(path: str, overrides: Mapping[str, Any]) -> Config:
    """A config file with some fields set anew.

    Args:
        path: as `voco_jax.config.load` takes it.
        overrides: by dotted name.

    Raises:
        InputError: no such file, or impossible settings.
    """
    settings = load(path)
    for name, value in overrides.items():
        *sections, field = name.split(".")
        place = settings
        for section in sections:
            if section not in place:  # only sources have names that a user chooses
                raise InputError(
                    f"config: {name}: found no {section!r}, expected one of {', '.join(place)}"
                )
            place = place[section]
        place[field] = value
    return parse(settings)


def positive(text: str) -> int:
    """For argparse: a whole number of 1 or more."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"found {value}, expected 1 or more")
    return value
