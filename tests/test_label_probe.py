"""The linear probe during pre-training: a whole run with labels, and labels that are refused."""

import json
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import strided_cnn
import strided_main

from voco_jax.config import encoders as settings
from voco_jax.config.load import parse
from voco_jax.errors import InputError
from voco_jax.models.encoders import ENCODERS
from voco_jax.training import loop
from voco_jax.voco.losses import RECIPES
from voco_jax.voco.probe import LabelProbe
from voco_jax.voco.step import State, make_predict
from voco_jax.voco.task import METHOD

ENTRIES = [SimpleNamespace(id=f"v{i}", study="") for i in range(12)]


def write(path, lines):
    path.write_text("\n".join(lines), "utf-8")
    return str(path)


def test_every_patient_is_told_by_the_others(tmp_path, generator):
    labels = np.arange(12) % 2
    lines = ["id,label,patient", *(f"v{i},{'ab'[labels[i]]},p{i // 4}" for i in range(11))]
    probe = LabelProbe(write(tmp_path / "l.csv", lines), ENTRIES)
    clear = generator.normal(size=(12, 5)) + 9 * np.eye(5)[labels]
    assert probe(clear) == {"probe_accuracy": 1.0, "probe_chance": 0.5}
    # Volumes of a patient are alike and have both labels: with one of them known, the other would
    # be told wrong every time; without, nothing is known of it.
    alike = np.repeat(generator.normal(size=(3, 5)), 4, 0) + 0.01 * generator.normal(size=(12, 5))
    assert 0.2 < probe(alike)["probe_accuracy"] < 0.8
    studies = [SimpleNamespace(id=f"v{i}", study=f"s{i // 4}") for i in range(12)]
    own = [line.rpartition(",")[0] for line in lines]
    assert LabelProbe(write(tmp_path / "l.csv", own), studies)(alike) == probe(alike)


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["id,class", "v0,a"], "found no column label"),
        (["id,label", "v0,a", "v1,b", "v2,b"], "found the labels a (1), b (2) (patients) for the "),
        (
            ["id,label", "x,a"],
            "found the labels none (patients) for the 12 held-out volumes, as v0",
        ),
        (["id,label,patient", *(f"v{i},{'ab'[i % 2]},p" for i in range(9))], "a (1), b (1) (pat"),
    ],
)
def test_labels_that_cannot_be_probed(tmp_path, lines, words):
    with pytest.raises(InputError) as raised:
        LabelProbe(write(tmp_path / "l.csv", lines), ENTRIES)
    assert words in str(raised.value)


def test_a_run_tells_it_at_each_validation(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(ENCODERS, "strided_cnn", strided_cnn.ENCODER)
    monkeypatch.setitem(settings.ENCODERS, "strided_cnn", strided_cnn.Settings)
    seen = []
    told = LabelProbe.__call__
    monkeypatch.setattr(
        LabelProbe, "__call__", lambda self, features: seen.append(features) or told(self, features)
    )
    values = strided_main.get_config()
    values["data"] |= {"phantoms": 8, "held_out": 0.6}
    values["validation"] |= {"volumes": 5}
    lines = ["id,label", *(f"phantom_0_160x160x80_{i:04d},{'ab'[i % 2]}" for i in range(8))]
    values["validation"]["probe_labels"] = write(tmp_path / "l.csv", lines)
    loop.run(parse(values, str(tmp_path)), tmp_path, METHOD)
    rows = [
        json.loads(line)
        for line in (tmp_path / "metrics.jsonl").read_text("utf-8").split("\n")[:-1]
    ]
    (row,) = [row for row in rows if "validation/probe_accuracy" in row]
    assert row["validation/probe_chance"] == 0.5
    assert f"probe {row['validation/probe_accuracy']:.1%} (chance 50.0%)" in capsys.readouterr().out
    (features,) = seen
    assert features.shape == (5, values["model"]["features"] * 4)
    assert len(np.unique(features, axis=0)) == 5


class Means(nn.Module):
    """Its features are a crop's mean and largest voxel."""

    def setup(self):
        self.proj_head = nn.Dense(3)

    def encode(self, x, train):
        axes = (1, 2, 3, 4)
        return SimpleNamespace(pooled=jnp.stack([x.mean(axes), x.max(axes)], axis=1))

    def project(self, pooled):
        return self.proj_head(pooled)

    def __call__(self, x):
        return self.project(self.encode(x, False).pooled)


def test_features_are_the_mean_over_the_base_crops(generator):
    network, size = Means(), (4, 4, 4)
    params = network.init(jax.random.key(0), jnp.zeros((1, *size, 1)))["params"]
    batch = {
        "subs": generator.integers(0, 256, (2, 3, *size), np.uint8),
        "bases": generator.integers(0, 200, (2, 5, *size), np.uint8),
        "labels": generator.random((2, 3, 5)).astype(np.float32),
    }
    predict = make_predict(network, encoder_size=size, recipe=RECIPES["paper"])
    found = predict(State(0, params, {}, ()), batch).pooled
    crops = batch["bases"].reshape(2, 5, -1) / 255
    expected = np.stack([crops.mean((1, 2)), crops.max(2).mean(1)], axis=1)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
