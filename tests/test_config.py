"""Configs: what is accepted, and the one clear error for each thing that is not."""

import json

import pytest
from tiny import tiny_config

from configs import demo, voco_10k
from voco_jax.config import RUNTIME_FIELDS, Config, differences, field_names, parse, to_dict
from voco_jax.errors import InputError


@pytest.mark.parametrize("module", [demo, voco_10k])
def test_shipped_configs_are_valid_and_survive_json(module):
    config = parse(module.get_config())
    assert parse(json.loads(json.dumps(to_dict(config)))) == config


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
    config = tiny_config().to_dict()
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
        ({"batch_size": 0}, r"batch_size: found 0, expected: .* greater than 0"),
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
    config = tiny_config().to_dict()
    del config["model"]["remat"]
    with pytest.raises(InputError, match=r"model.remat: missing"):
        parse(config)


def test_runtime_fields_exist():
    assert set(RUNTIME_FIELDS) <= set(field_names(Config))


def test_differences_name_fields_and_values():
    old = to_dict(parse(tiny_config()))
    new = to_dict(parse(_broken(seed=1, model__depths=(2, 1, 1, 1))))
    assert differences(old, old) == []
    assert differences(old, new) == [
        "model.depths: [1, 1, 1, 1] -> [2, 1, 1, 1]",
        "seed: 0 -> 1",
    ]
