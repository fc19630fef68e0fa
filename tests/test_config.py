"""Configs: what is accepted, and the one clear error for each thing that is not."""

import ast
import dataclasses
import io
import json
import os
import re
import sys
from pathlib import Path

import pytest

from configs import tiny, voco_10k
from voco_jax.config.config_files import shipped
from voco_jax.config.load import (
    EXPERIMENTS,
    command_parser,
    differences,
    field_names,
    load,
    override,
    parse,
    parse_arguments,
    to_dict,
)
from voco_jax.config.pretraining import Pretraining
from voco_jax.errors import InputError
from voco_jax.files import compilation_cache
from voco_jax.models.swin_unetr_pytorch import Architecture, causes, decoder_shapes, encoder_shapes

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden_configs"
SHIPPED = {
    "demo": "configs/demo.py",
    "hippocampus": "configs/hippocampus.py",
    "small": "configs/small.py",
    "small-cpu": "configs/small.py:cpu",
    "tiny": "configs/tiny.py",
    "voco_10k": "configs/voco_10k.py",
    "voco_paper": "configs/voco_paper.py",
    **{f"voco_160k-{size}": f"configs/voco_160k.py:{size}" for size in "blh"},
    **{
        f"finetune_{name}": f"configs/finetune_{name}.py"
        for name in ["brats", "btcv", "ccii", "demo", "headneck", "hippocampus", "lesion_demo"]
    },
    **{f"finetune_{name}": f"configs/finetune_{name}.py" for name in ("lits", "mmwhs", "spleen")},
    **{
        f"finetune_{name}-published": f"configs/finetune_{name}.py:published"
        for name in ("brats", "btcv", "ccii", "lits", "mmwhs", "spleen")
    },
}


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_shipped_configs_are_as_reviewed(name):
    """A change of any setting of a shipped config is a difference in its golden file."""
    found = to_dict(load(SHIPPED[name]))
    assert to_dict(parse(found)) == found
    golden = GOLDEN / f"{name}.json"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    assert differences(json.loads(golden.read_text("utf-8")), found) == []


def test_every_shipped_config_has_a_golden_file():
    files = {path.stem for path in (ROOT / "configs").glob("*.py")} - {"regions"}
    assert {name.partition("-")[0] for name in SHIPPED} == files
    assert {path.stem for path in GOLDEN.glob("*.json")} == set(SHIPPED)


def test_shipped_configs_have_names():
    assert "regions" not in shipped()  # no get_config()
    assert to_dict(load("voco_160k:l")) == to_dict(load(ROOT / "configs/voco_160k.py:l"))
    assert to_dict(load("demo.py")) == to_dict(load(ROOT / "configs/demo.py"))
    with pytest.raises(InputError, match=r"voco_11k: no such config file.* shipped: .*voco_10k"):
        load("voco_11k")
    with pytest.raises(InputError, match="--config: found device 'tpu', expected gpu or cpu"):
        load("small:tpu")


def test_whose_configs_are_imported(tmp_path, monkeypatch):
    """A shipped config imports shipped ones; one of a user's project its own, then shipped ones."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "demo.py").write_text("raise ValueError('not this one')\n", "utf-8")
    (tmp_path / "configs" / "base.py").write_text("STEPS = 7\n", "utf-8")
    (tmp_path / "mine.py").write_text(
        "from configs import base, tiny_too, voco_10k\n\n"
        "def get_config():\n    config = voco_10k.get_config()\n"
        "    config.optimizer.warmup_steps = 0\n    config.total_steps = base.STEPS\n"
        "    return config\n",
        "utf-8",
    )
    with pytest.raises(InputError, match=r"mine.py: this config file fails: .*tiny_too"):
        load("mine.py")
    (tmp_path / "configs" / "tiny_too.py").touch()
    before, path = sys.modules.get("configs"), list(sys.path)
    assert load("mine.py").total_steps == 7
    assert load("tiny").total_steps == 4  # by way of demo
    (tmp_path / "tiny").write_text("", "utf-8")  # no .py: not a file to run
    with pytest.raises(InputError, match="--config: tiny: no such config file"):
        load("tiny")
    assert sys.modules.get("configs") is before
    assert sys.path == path


def test_voco_10k_has_the_published_settings():
    config = parse(voco_10k.get_config())
    assert (config.total_steps, config.batch_size, config.optimizer.warmup_steps) == (
        250_000,
        2,
        5_000,
    )
    assert config.data.sources["ct"].chain.volume_size == (384, 384, 96)
    assert config.crops.grid == (4, 4, 1)
    assert config.crops.encoder_size == (64, 64, 64)
    source = config.data.sources["ct"]
    assert len(source.lists) == 7
    roots = dict(zip(source.lists, source.roots, strict=True))
    assert roots["data/lists/HNSCC.json"] == "data/HNSCC_convert_v1"


def _broken(**changes):
    config = tiny.get_config().to_dict()
    for name, value in changes.items():
        *sections, field = name.split("__")
        holder = config
        for section in sections:
            holder = holder[section]
        holder[field] = value
    return config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__windowsize": 7}, r"model.windowsize: no such field, did you mean model.window_s"),
        ({"nonsense": 1}, r"nonsense: no such field"),
        ({"seed": None}, r"seed: found None, expected"),
        ({"model": None}, r"model: found None, expected"),
        (
            {"model__feature_size": None},
            r"config: model.feature_size: found None, expected: [^;]*$",
        ),
        (
            {"model__encoder": ["swin_unetr"]},
            r"model.encoder: found \['swin_unetr'\], expected one",
        ),
        ({"batch_size": 0}, r"batch_size: found 0, expected: .* greater than 0"),
        ({"projector_size": 0}, r"projector_size: found 0"),
        ({"batch_size": "two"}, r"batch_size: found 'two', expected: .* integer"),
        ({"recipe": "voco"}, r"recipe: found 'voco', expected: .*'voco_10k'"),
        ({"model__dtype": "float8"}, r"model.dtype: found 'float8'"),
        ({"crops__grid": (3, 1, 1)}, r"crops.grid: \(3, 1, 1\) crops .* cover \(96, 32, 64\)"),
        ({"crops__grid": (2, 1)}, r"crops.grid: value 3 is missing; give the whole tuple"),
        (
            {"data__sources__ct__chain__window": (250.0, -175.0)},
            r"data.sources.ct.chain.window: .*low < high",
        ),
        (
            {"data__sources__ct__lists": ("a.json",)},
            r"data.sources.ct.roots: found 0 roots for 1 lists",
        ),
        ({"optimizer__warmup_steps": 4}, r"optimizer.warmup_steps: found 4, expected less than"),
        ({"optimizer__learning_rate": float("nan")}, r"optimizer.learning_rate: found nan"),
        (
            {"augment__rotate_probability": 0.2, "crops__encoder_size": (32, 64, 64)},
            r"augment.rotate_probability: found 0.2 with crops.encoder_size \(32, 64, 64\)",
        ),
    ],
)
def test_one_clear_error_names_the_field(changes, message):
    with pytest.raises(InputError, match=message):
        parse(_broken(**changes))


def test_all_problems_are_in_one_message():
    with pytest.raises(InputError, match=r"total_steps.*; batch_size"):
        parse(_broken(batch_size=0, total_steps=-1))


def test_a_missing_field_is_named():
    config = tiny.get_config().to_dict()
    del config["model"]["remat"]
    with pytest.raises(InputError, match=r"model.remat: missing"):
        parse(config)


def test_runtime_fields_exist():
    assert set(Pretraining.runtime_fields) <= set(field_names(Pretraining))


FIELDS = {name for kind in EXPERIMENTS.values() for name in field_names(kind)}
SECTIONS = {part for name in FIELDS for part in name.split(".")[:-1]} - {"*"}


def texts(tree):
    """The texts in code that are no docstrings, with "*" for what is filled in."""
    seen = set()  # docstrings, and parts of texts that are read already
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr):
            seen.add(id(node.value))
        elif isinstance(node, ast.JoinedStr):
            seen |= {id(part) for part in node.values}
            yield "".join(
                part.value if isinstance(part, ast.Constant) else "*" for part in node.values
            )
        elif (
            isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in seen
        ):
            yield node.value


def settings_named(text):
    """What in a message looks like a setting: dotted with a section's name, or after `set`."""
    dotted = re.findall(r"(?<![\w/.{(-])([a-z_]+(?:\.(?:[a-z_0-9]+|\*))+)(?![\w(/*])", text)
    alone = re.findall(r"\bset ([a-z]+_[a-z_]+)\b(?!\()", text)
    return [name for name in dotted if name.split(".")[0] in SECTIONS] + alone


def is_setting(name):
    """Whether a field or a section ends so; "*" is any part."""
    pattern = "[^.]*".join(re.escape(part) for part in name.split("*"))
    return any(re.search(rf"(\A|\.){pattern}(\.|\Z)", field) for field in FIELDS)


def test_settings_that_messages_name_exist():
    found = {
        name
        for path in (ROOT / "voco_jax").rglob("*.py")
        for text in texts(ast.parse(path.read_text("utf-8")))
        for name in settings_named(text)
    } - {"data.pkl", "crops.parquet"}
    assert {"model.window_size", "projector_size", "data.sources.*.cache"} <= found
    assert sorted(name for name in found if not is_setting(name)) == []
    for wrong in ("model.in_channels", "init.allow", "modell.remat", "in_channels"):
        assert settings_named(f"set {wrong} to 4") == [wrong] * (wrong != "modell.remat")
        assert not is_setting(wrong)


@pytest.mark.parametrize(
    ("changes", "setting"),
    [
        ({"feature_size": 24}, "model.feature_size"),
        ({"window_size": (7, 7, 7)}, "model.window_size"),
        ({"depths": (2, 2, 2, 1)}, "model.depths"),
        ({"num_heads": (3, 6, 12, 12)}, "model.num_heads"),
        ({"use_v2": False}, "model.use_v2"),
        ({"in_channels": 4}, "data.sources.*.chain.channels"),
    ],
)
def test_settings_that_hints_about_weights_name_exist(changes, setting):
    ours = Architecture(
        feature_size=12,
        in_channels=2,
        use_v2=True,
        depths=(2, 2, 2, 2),
        num_heads=(3, 6, 12, 24),
        window_size=(4, 4, 4),
        conv_encoders=True,
        decoder=True,
        out_channels=3,
    )
    theirs = dataclasses.replace(ours, **changes)
    file, model = (
        encoder_shapes(one) | decoder_shapes(one.feature_size, 3) for one in (theirs, ours)
    )
    (hint,) = causes(file, model, [])
    assert settings_named(hint) == [setting]
    assert is_setting(setting)


def test_differences_name_fields_and_values():
    old = to_dict(parse(tiny.get_config()))
    new = to_dict(parse(_broken(seed=1, model__depths=(2, 1, 1, 1))))
    assert differences(old, old) == []
    assert differences(old, new) == [
        "model.depths: [1, 1, 1, 1] -> [2, 1, 1, 1]",
        "seed: 0 -> 1",
    ]


@pytest.mark.parametrize(
    ("flags", "field", "value"),
    [
        (["--config.total_steps=7"], "total_steps", 7),
        (["--config.total_steps", "7"], "total_steps", 7),
        (["--config.model.depths=(2,1,1,1)"], "model.depths", (2, 1, 1, 1)),
        (["--config.model.depths[1]=3"], "model.depths", (1, 3, 1, 1)),
        (["--config.model.remat=true"], "model.remat", True),
        (["--config.export_to=2024.pt"], "export_to", "2024.pt"),
        (["--config.init_from="], "init_from", ""),
        (["--config.data.sources.ct.lists=()"], "data.sources.ct.lists", ()),
        (["--config.data.sources.ct.roots=/data/ct"], "data.sources.ct.roots", ("/data/ct",)),
        (["--config.optimizer.eps=1e-7"], "optimizer.eps", 1e-7),
    ],
)
def test_flags_set_what_they_name(flags, field, value):
    parser = command_parser("main.py", "", "")
    parser.add_argument("--config")
    options, overrides = parse_arguments(parser, ["--config", "configs/tiny.py", *flags])
    found = to_dict(load(ROOT / options.config, overrides))
    for part in field.split("."):
        found = found[part]
    assert found == (list(value) if isinstance(value, tuple) else value)
    assert override(tiny.get_config().to_dict(), {}) == tiny.get_config().to_dict()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steps=7"], r"flags: found '--steps=7', expected those of --help"),
        (["--config.total_steps"], r"flags: found '--config.total_steps', expected"),
        (
            ["--config.model.depths[4]=1"],
            r"model.depths\[4\]: found no element 4 in",
        ),
        (["--config.model=1"], r"config: model: a section, set one of "),
        (["--config.model.encoder=cnn"], r"model.encoder: found 'cnn', expected one of swin_unetr"),
        (["--config.task=segment"], r"task: found 'segment', expected one of voco"),
        (["--config.export_to=s3://bucket/a.pt"], r"export_to: found 's3://bucket/a.pt', expected"),
    ],
)
def test_a_wrong_flag_is_one_line(flags, message):
    parser = command_parser("main.py", "", "")
    with pytest.raises(InputError, match=message):
        load(ROOT / "configs/tiny.py", parse_arguments(parser, flags)[1])


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_what_is_printed_fits_every_encoding(encoding, monkeypatch):
    """As with PYTHONIOENCODING=ascii, or names of files that are not UTF-8."""
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding))
    command_parser("main.py", "", "")
    print("Müller\udcff.nii → ₂", flush=True)
    told = raw.getvalue().decode(encoding)
    assert told.endswith(".nii → ₂\n" if encoding == "utf-8" else ".nii \\u2192 \\u2082\n")
    assert "\\udcff" in told


@pytest.mark.parametrize(("typed", "shown"), [("/bin/voco-x", "voco-x"), ("x.py", "python x.py")])
def test_a_command_is_shown_as_it_was_typed(typed, shown, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [typed])
    with pytest.raises(SystemExit):
        command_parser("x.py", "", "--flag=1").parse_args(["--help"])
    out = capsys.readouterr().out
    assert out.startswith(f"usage: {shown} ")
    assert f"  {shown} --flag=1\n" in out


def test_without_a_home_no_folder_of_that_name_is_made(monkeypatch):
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as for a user without a name
    assert compilation_cache() == ""
    monkeypatch.undo()
    assert os.path.isabs(compilation_cache())
