"""Configs: what is accepted, and the one clear error for each thing that is not."""

import json
import os
from pathlib import Path

import pytest

from configs import tiny, voco_10k
from voco_jax.config.load import (
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

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden_configs"
SHIPPED = {
    "demo": "configs/demo.py",
    "hippocampus": "configs/hippocampus.py",
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
