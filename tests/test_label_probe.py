"""The linear probe during pre-training: a whole run with labels, and labels that are refused."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import strided_cnn
import strided_main

from voco_jax.config import encoders as settings
from voco_jax.config.load import parse
from voco_jax.errors import InputError
from voco_jax.models.encoders import ENCODERS
from voco_jax.training import loop
from voco_jax.voco.probe import LabelProbe
from voco_jax.voco.task import METHOD

ENTRIES = [SimpleNamespace(id=f"v{i}") for i in range(12)]


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
    # Features differ, and are not those of sub-volumes or of the projector.
    (features,) = seen
    assert features.shape == (5, values["model"]["features"] * 4)
    assert len(np.unique(features, axis=0)) == 5
