"""Encoders in Python and tables of features: against MONAI, closed forms, and kills."""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
import pytest
import segmentation_main
import strided_cnn
from by_rule import weight_by_rule
from scans import body, save

import voco_jax
from configs import demo
from voco_jax.config import encoders
from voco_jax.config.common import LabelledChain
from voco_jax.config.load import parse, to_dict
from voco_jax.data.crops import base_origins
from voco_jax.data.labels import fit_labels, prepare_labels
from voco_jax.data.phantom import make_phantoms
from voco_jax.data.prepare import main as prepare
from voco_jax.data.resample import center_crop
from voco_jax.data.volumes import prepare_volume
from voco_jax.errors import InputError
from voco_jax.evaluation import embed, embed_store
from voco_jax.evaluation.encoder import Encoder, crop_corners
from voco_jax.evaluation.features import read_table
from voco_jax.evaluation.load_encoder import read_encoder
from voco_jax.evaluation.table_rows import same_rows
from voco_jax.interop.export import Card, export
from voco_jax.interop.names import from_torch, torch_shapes
from voco_jax.models.attention import attend
from voco_jax.models.encoders import ENCODERS, build_encoder, build_segmentation_network
from voco_jax.models.initial_values import describe_parameters
from voco_jax.models.network import Network
from voco_jax.voco import losses
from voco_jax.voco.step import State, make_predict

ROOT = Path(__file__).resolve().parents[1]
STRIDED = {"encoder": "strided_cnn", "features": 4}


@pytest.fixture(autouse=True)
def _second_encoder(monkeypatch):
    monkeypatch.setitem(ENCODERS, "strided_cnn", strided_cnn.ENCODER)
    monkeypatch.setitem(encoders.ENCODERS, "strided_cnn", strided_cnn.Settings)


def _experiment(model=STRIDED, crop=(20, 16, 10), size=(16, 16, 8), grid=(2, 2, 1), **chain):
    """Small pre-training; of a strided CNN it compiles in a second."""
    values = demo.get_config().to_dict()
    if "encoder" in model:
        common = {field.name for field in dataclasses.fields(encoders.Model)}
        values["model"] = {name: x for name, x in values["model"].items() if name in common}
    values["model"] |= model
    values["crops"] |= {"crop_size": crop, "encoder_size": size, "grid": grid}
    volume = tuple(int(n) for n in np.multiply(crop, grid))
    values["data"]["sources"]["ct"]["chain"] |= {"volume_size": volume, **chain}
    return parse(values, "run")


def _weights(path, experiment, with_projector=False, seed=""):
    """Weights by a rule, and their card."""
    network = Network(build_encoder(experiment.model, "cpu", attend), 16, jnp.float32)
    template = nn.unbox(describe_parameters(network, experiment.crops.encoder_size))
    values = {
        name: weight_by_rule(seed + name, shape) for name, shape in torch_shapes(template).items()
    }
    params = from_torch(values, template)[0]
    card = Card(config=to_dict(experiment), step=1, network="teacher", data_fingerprint="f1e2")
    export(params, path, card, with_projector=with_projector)
    return params


@pytest.fixture
def scans_folder(tmp_path):
    """Three small CTs, one of them in a folder of its own."""
    for number, axes in enumerate(("RAS", "LPS", "PLI")):
        folder = tmp_path / "scans" / ("deep" if number == 2 else ".")
        folder.mkdir(parents=True, exist_ok=True)
        save(folder / f"ct_{number}.nii.gz", body((40, 36, 24), number), axes)
    return tmp_path / "scans"


@pytest.fixture
def weights(tmp_path):
    _weights(tmp_path / "w.safetensors", _experiment())
    return tmp_path / "w.safetensors"


def _run(weights, source, output, *more):
    options = ["--weights", weights, "--input", source, "--output", output, *more]
    return embed.main([str(one) for one in options])


# ---- against MONAI, by the code of docs/features.md


def _blocks(page):
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text("utf-8"), re.DOTALL)


@pytest.mark.filterwarnings("ignore")
def test_features_are_monais(tmp_path, monkeypatch):
    """Both codes of the page, run as they stand; and the table's rows are the same vectors."""
    pytest.importorskip("monai")
    model = {"depths": (2, 1, 1, 1)}
    experiment = _experiment(model, crop=(72, 48, 80), size=(64, 32, 64), grid=(1, 2, 1))
    _weights(tmp_path / "voco.safetensors", experiment, with_projector=True)
    make_phantoms(tmp_path, 1, seed=0, shape=(96, 96, 64))
    next(tmp_path.glob("*.nii.gz")).rename(tmp_path / "ct.nii.gz")
    monkeypatch.chdir(tmp_path)
    ours, theirs = {}, {}
    blocks = _blocks("features.md")
    exec(blocks[0], ours)
    exec(next(block for block in blocks if "SwinUNETR" in block), theirs)
    encoder, volume = ours["encoder"], theirs["volume"].numpy()
    assert np.abs(encoder.prepare("ct.nii.gz") - volume).max() < 1 / 255 + 1e-6
    assert ours["features"].shape == (encoder.size,) == (24 * 12,)
    np.testing.assert_allclose(ours["features"], theirs["features"], rtol=0, atol=1e-4)
    crops = encoder.crops(volume)
    expected = theirs["encode"](theirs["volume"]).numpy()
    np.testing.assert_allclose(crops.vectors, expected, rtol=0, atol=1e-4)
    assert np.abs(expected[0] - expected[1]).max() > 0.05
    assert _run("voco.safetensors", "ct.nii.gz", "features.parquet", "--crops") == 0
    table = read_table("features.parquet")
    np.testing.assert_allclose(table.vectors, expected, rtol=0, atol=1e-4)
    assert table.corner == [(0, 0, 0), (0, 48, 0)]
    seen = {}
    exec(blocks[-1], seen)
    np.testing.assert_array_equal(seen["vectors"], table.vectors)
    # Under a mask of everything the maps have the volume's features.
    ones = np.ones(volume.shape, np.uint8)
    found = encoder.pool(encoder.stored(volume), ones, np.array([[0, 1]], np.float32))
    np.testing.assert_allclose(found[0], ours["features"], rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_weights_without_a_card(tmp_path):
    """MONAI's own file; that nobody says which patch merging it is of, is told."""
    torch = pytest.importorskip("torch")
    from monai_reference import parameters, swin_unetr

    model = swin_unetr(feature_size=12, patch_merging="merging", window_size=(4, 4, 4), use_v2=True)
    torch.save(model.state_dict(), tmp_path / "monai.pt")
    config = ROOT / "configs" / "demo.py"
    with pytest.raises(InputError, match="found no card beside it"):
        voco_jax.load_encoder(tmp_path / "monai.pt")
    with pytest.warns(UserWarning, match="does not say which patch merging"):
        encoder = voco_jax.load_encoder(tmp_path / "monai.pt", config)
    assert (encoder.crop_size, encoder.size, encoder.has_projector) == ((32, 32, 64), 288, False)
    ours = torch_shapes(encoder._params)
    assert ours.keys() == parameters(model, tuple({name.split(".")[0] for name in ours})).keys()
    settings = {"model.feature_size": 24}
    with pytest.raises(InputError, match=r"set model\.feature_size to 12"):
        voco_jax.load_encoder(tmp_path / "monai.pt", config, settings=settings)


# ---- volumes and crops


def test_crops_cover_a_volume_evenly():
    corners, grid = crop_corners((60, 32, 10), (20, 16, 10))
    assert grid == (3, 2, 1)
    np.testing.assert_array_equal(corners, base_origins(grid, (20, 16, 10)))
    for length in range(16, 90):
        (corners, (count, *_)) = crop_corners((length, 8, 8), (16, 8, 8))
        first = corners[:, 0]
        assert count == len(corners) == -(-length // 16)
        assert (first[0], first[-1]) == (0, length - 16)
        steps = np.diff(first)
        assert count == 1 or (steps.max() <= 16 and steps.max() - steps.min() <= 1)


def test_an_encoder_takes_files_and_voxels(weights, scans_folder):
    encoder = voco_jax.load_encoder(weights)
    assert isinstance(encoder, Encoder)
    file = scans_folder / "ct_1.nii.gz"
    volume = encoder.prepare(file)
    assert (volume.shape, volume.dtype) == ((40, 32, 10), np.float32)
    features = encoder(str(file))
    np.testing.assert_array_equal(features, encoder(volume))
    np.testing.assert_array_equal(features, encoder(np.rint(255 * volume).astype(np.uint8)))
    crops = encoder.crops(volume)
    assert (crops.grid, crops.vectors.shape) == ((2, 2, 1), (4, encoder.size))
    np.testing.assert_allclose(features, crops.vectors.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(encoder.crop(volume[20:, :16]), crops.vectors[2], rtol=1e-5)
    for several in (2, 3):  # the last batch is filled up
        other = voco_jax.load_encoder(weights, batch=several)
        np.testing.assert_allclose(other.crops(volume).vectors, crops.vectors, rtol=1e-5)
    with pytest.raises(InputError, match=r"volume: found shape .* expected \(40, 32, 10\) voxels"):
        encoder(volume[:, :, :8])
    with pytest.raises(InputError, match="found values from -1000 to 40, expected 0 to 1"):
        encoder(np.linspace(-1000, 40, 12800).reshape(40, 32, 10))
    with pytest.raises(InputError, match="no such file"):
        encoder(scans_folder / "absent.nii.gz")


@pytest.mark.parametrize("with_projector", [True, False])
def test_similarity_map_is_the_method_s_prediction(tmp_path, generator, with_projector):
    experiment = _experiment()
    params = _weights(tmp_path / "w.safetensors", experiment, with_projector)
    encoder = voco_jax.load_encoder(tmp_path / "w.safetensors")
    assert encoder.has_projector == with_projector
    volume = generator.random((40, 32, 10), np.float32)
    sub = volume[7:27, 9:25]
    found = voco_jax.similarity_map(sub, volume, encoder)
    assert (found.shape, found.dtype) == ((2, 2, 1), np.float32)
    if not with_projector:
        rows = encoder.crops(volume).vectors
        own = encoder.crop(sub)
        expected = rows @ own / np.linalg.norm(rows, axis=1) / np.linalg.norm(own)
        np.testing.assert_allclose(found.reshape(-1), np.maximum(expected, 0), rtol=1e-5)
        return
    network = Network(build_encoder(experiment.model, "cpu", attend), 16, jnp.float32)
    predict = make_predict(network, encoder_size=(16, 16, 8), recipe=losses.RECIPES["paper"])
    quantised = np.rint(255 * volume).astype(np.uint8)
    corners = base_origins((2, 2, 1), (20, 16, 10))
    bases = np.stack([quantised[x : x + 20, y : y + 16] for x, y, _ in corners])
    batch = {"bases": bases[None], "subs": quantised[None, None, 7:27, 9:25]}
    batch["labels"] = np.zeros((1, 1, 4), np.float32)
    state = State(step=jnp.zeros(()), student=params, teacher={}, optimizer=None)
    expected = jax.jit(predict)(state, batch).similarities
    np.testing.assert_allclose(found.reshape(-1), expected[0, 0], atol=1e-5)
    assert np.ptp(found) > 0.05


def test_sources_that_differ_are_named(tmp_path):
    values = to_dict(_experiment())
    values["data"]["phantoms"] = 0
    (name,) = values["data"]["sources"]
    chest = json.loads(json.dumps(values["data"]["sources"][name]))
    chest["chain"]["window"], chest["cache"] = [-1000.0, 500.0], "another"
    values["data"]["sources"]["chest"] = chest
    experiment, path = parse(values), tmp_path / "w.safetensors"
    _weights(path, experiment)
    with pytest.raises(InputError, match="sources ct, chest prepare volumes differently"):
        voco_jax.load_encoder(path)
    wanted = experiment.data.sources["chest"].chain
    assert voco_jax.load_encoder(path, source="chest").chain == wanted
    assert read_encoder(path, like=wanted).chain == wanted  # as of a cache


def test_fine_tuned_weights_leave_their_decoder_aside(tmp_path, scans_folder):
    experiment = parse(segmentation_main.get_config(), "run")
    network = build_segmentation_network(experiment.model, "cpu", 1, 6, attend)
    template = nn.unbox(describe_parameters(network, experiment.crops.size))
    shapes = torch_shapes(template)
    values = {name: weight_by_rule(name, shape) for name, shape in shapes.items()}
    card = Card(config=to_dict(experiment), step=1, network="params", data_fingerprint="f1e2")
    export(from_torch(values, template)[0], tmp_path / "s.safetensors", card)
    encoder = voco_jax.load_encoder(tmp_path / "s.safetensors")
    assert encoder.crop_size == encoder.encoder_size == (32, 32, 16)
    volume = np.random.default_rng(0).random((48, 32, 20), np.float32)
    crops = encoder.crops(volume)
    assert crops.corners.tolist() == [[x, 0, z] for x in (0, 16) for z in (0, 4)]
    assert crops.grid == (2, 1, 2)
    again = encoder.crop(volume[16:, :, :16])
    np.testing.assert_allclose(crops.vectors[2], again, rtol=1e-5)
    assert encoder(scans_folder / "ct_0.nii.gz").shape == (encoder.size,)  # padded


# ---- organs


def test_pooling_under_masks_is_the_weighted_mean(weights, scans_folder, generator):
    """Against PyTorch: the mask through the same resize, cells' shares by average pooling."""
    torch = pytest.importorskip("torch")
    encoder = voco_jax.load_encoder(weights)
    volume = encoder.prepare(scans_folder / "ct_0.nii.gz")
    labels = generator.integers(0, 4, volume.shape).astype(np.uint8)
    labels[20:, :16] = 2  # one crop is all of one label
    members = np.array([[0, 1, 0, 0], [0, 0, 1, 0], [0, 1, 0, 1]], np.float32)
    found = encoder.pool(encoder.stored(volume), labels, members)
    module = build_encoder(encoder.experiment.model, "cpu", attend)

    def resized(crop):
        crop = torch.from_numpy(np.ascontiguousarray(crop, np.float32))[None, None]
        return torch.nn.functional.interpolate(
            crop, (16, 16, 8), mode="trilinear", align_corners=True
        )

    sums = np.zeros((3, encoder.size + 1))
    for x, y, _ in base_origins((2, 2, 1), (20, 16, 10)):
        part = np.s_[x : x + 20, y : y + 16]
        image = jnp.asarray(resized(volume[part])[0, 0][None, ..., None].numpy())
        features = module.apply({"params": encoder._params}, image, False).hidden_states[-1]
        for row, member in zip(sums, members, strict=True):
            share = torch.nn.functional.avg_pool3d(resized(member[labels[part]]), 8)
            row[:-1] += np.einsum("xyz,xyzc->c", share[0, 0].numpy(), np.asarray(features[0]))
            row[-1] += float(share.sum())
    np.testing.assert_allclose(found, sums[:, :-1] / sums[:, -1:], rtol=1e-4, atol=1e-6)
    only = np.where(np.arange(40)[:, None, None] >= 20, labels, 0)
    only[:, 16:] = 0
    (alone,) = encoder.pool(encoder.stored(volume), only, members[1:2])
    np.testing.assert_allclose(alone, encoder.crops(volume).vectors[2], rtol=1e-4, atol=1e-6)
    assert np.isnan(encoder.pool(encoder.stored(volume), labels * 0, members)).all()


@pytest.mark.parametrize("spacing", [(), (3.0, 2.0, 5.0)])
def test_labels_go_where_the_cache_s_go(tmp_path, generator, spacing):
    """Of volumes that keep their size: as `prepare_labels`; padded on both sides."""
    chain = _experiment(spacing=spacing).data.sources["ct"].chain
    values = {**dataclasses.asdict(chain), "fit": "random_crop", "volume_size": (50, 20, 30)}
    classes = (("background", (0,)), ("a", (1,)), ("b", (2,)))
    labelled = LabelledChain(**values, classes=classes)
    labels = generator.integers(0, 3, (40, 36, 24))
    save(tmp_path / "ct.nii.gz", body((40, 36, 24)))
    save(tmp_path / "label.nii.gz", labels, dtype=np.uint8)
    volume = prepare_volume(tmp_path / "ct.nii.gz", labelled)
    expected = prepare_labels(tmp_path / "label.nii.gz", labelled, volume).voxels
    found = fit_labels(labels, volume.spacing, labelled, volume.box, volume.voxels.shape)
    np.testing.assert_array_equal(found, expected)
    middle = dataclasses.replace(chain, fit="center_crop", volume_size=(50, 20, 9))
    volume = prepare_volume(tmp_path / "ct.nii.gz", middle)
    found = fit_labels(labels, volume.spacing, middle, volume.box, (50, 20, 9))
    np.testing.assert_array_equal(found, center_crop(expected, (50, 20, 9)))


def test_labels_of_resized_volumes_are_the_nearest(tmp_path, generator):
    """Where the voxels of a volume resized with aligned corners lie in its box."""
    labels = generator.integers(0, 200, (40, 36, 24))
    chain = _experiment().data.sources["ct"].chain
    volume = prepare_volume(save(tmp_path / "ct.nii.gz", body((40, 36, 24))), chain)
    assert volume.box != ((0, 0, 0), (40, 36, 24))
    places = [
        np.rint(np.linspace(first, last - 1, count)).astype(int)
        for first, last, count in zip(*volume.box, (40, 32, 10), strict=True)
    ]
    found = fit_labels(labels, volume.spacing, chain, volume.box, (40, 32, 10))
    np.testing.assert_array_equal(found, labels[np.ix_(*places)])


def test_organs_of_files(tmp_path, weights, scans_folder, capsys):
    for path in scans_folder.rglob("*.nii.gz"):
        mask = tmp_path / "masks" / path.relative_to(scans_folder)
        mask.parent.mkdir(parents=True, exist_ok=True)
        labels = np.zeros((40, 36, 24))
        labels[5:20, 5:20, 5:20], labels[22:30] = 7, 9
        save(mask, np.where(labels == 9, 0, labels) if "ct_0" in path.name else labels)
    (tmp_path / "masks" / "deep" / "ct_2.nii.gz").unlink()
    (tmp_path / "dataset.json").write_text(
        json.dumps({"labels": {"background": 0, "liver": 7, "both": [7, 9], "none": 3}}), "utf-8"
    )
    output, options = tmp_path / "t.parquet", ("--masks", tmp_path / "masks", "--organs")
    assert _run(weights, scans_folder, output, *options, tmp_path / "dataset.json") == 1
    printed = capsys.readouterr()
    assert "no mask: found none named 'deep/ct_2' among the --masks" in printed.err
    assert "organ none: found in no mask" in printed.out
    table = read_table(output)
    assert table.id == ["ct_0#liver", "ct_0#both", "ct_1#liver", "ct_1#both"]
    assert set(table.kind) == {"organ"}
    assert table.organ == ["liver", "both"] * 2
    assert np.abs(table.vectors[2] - table.vectors[3]).max() > 1e-4
    np.testing.assert_allclose(table.vectors[0], table.vectors[1])
    assert table.manifest["organs"] == {"liver": 2, "both": 2, "none": 0}
    encoder = voco_jax.load_encoder(weights)
    chain, file = encoder.chain, scans_folder / "ct_0.nii.gz"
    volume = prepare_volume(file, chain)
    labels = np.zeros((40, 36, 24), np.uint8)
    labels[5:20, 5:20, 5:20] = 1
    fitted = fit_labels(labels, volume.spacing, chain, volume.box, chain.volume_size)
    members = np.array([[0, 1]], np.float32)
    expected = encoder.pool(encoder.stored(file), fitted, members)
    np.testing.assert_allclose(table.vectors[0], expected[0], rtol=1e-5)
    save(tmp_path / "masks" / "ct_1.nii.gz", np.zeros((40, 36, 24)))  # nothing in it any more
    assert _run(weights, scans_folder, output, *options, tmp_path / "dataset.json") == 1
    assert read_table(output).id == ["ct_0#liver", "ct_0#both"]
    assert _run(weights, scans_folder, output, *options, tmp_path / "dataset.json") == 1
    assert read_table(output).id == ["ct_0#liver", "ct_0#both"]
    save(tmp_path / "masks" / "ct_1.nii.gz", np.zeros((40, 36, 20)))
    assert _run(weights, scans_folder, output, *options, "7") == 1
    assert "another grid: 40x36x20 voxels" in capsys.readouterr().err
    assert read_table(output).id == ["ct_0#7"]
    assert _run(weights, scans_folder, output, *options, "liver") == 2
    assert "--organs: found 'liver', expected liver=6, a label" in capsys.readouterr().err


# ---- the table


def test_table_of_a_folder_and_of_its_cache(tmp_path, weights, scans_folder, capsys):
    (scans_folder / "broken.nii.gz").write_bytes(b"no volume")
    output = tmp_path / "deep" / "t.parquet"
    assert _run(weights, scans_folder, output) == 1
    printed = capsys.readouterr()
    assert "3 of 4 volumes done" in printed.out
    assert "failed: " in printed.err
    assert "broken.nii.gz" in printed.err
    table = read_table(output)
    assert table.id == table.volume == ["ct_0", "ct_1", "deep/ct_2"]
    assert table.path[2] == str(scans_folder / "deep" / "ct_2.nii.gz")
    assert (table.spacing[0], table.shape[0]) == ((2.0, 2.5, 3.0), (40, 36, 24))
    assert set(table.weights) == {voco_jax.load_encoder(weights).digest}
    assert (table.kind[0], table.organ[0], table.corner[0], table.size[0]) == (
        *("volume", None, None, None),
    )
    manifest = json.loads((output.parent / "t.parquet.json").read_text("utf-8"))
    assert manifest == json.loads(json.dumps(table.manifest))
    assert [one["id"] for one in manifest["failures"]] == ["broken"]
    assert not list(output.parent.glob("*.journal/*.parquet"))
    for row, path in zip(table.vectors, table.path, strict=True):
        np.testing.assert_array_equal(row, voco_jax.load_encoder(weights)(path))

    flags = {"volume_size": "(40, 32, 10)", "dtype": "uint8"}
    settings = [f"--config.data.sources.ct.chain.{name}={value}" for name, value in flags.items()]
    settings += ["--config.crops.crop_size=(20, 16, 10)", "--config.crops.grid=(2, 2, 1)"]
    cache = tmp_path / "cache"
    (scans_folder / "broken.nii.gz").unlink()
    arguments = ["--config", str(ROOT / "configs" / "demo.py"), *settings, "--workers", "1"]
    arguments += [f"--config.data.sources.ct.roots=('{scans_folder}',)"]
    arguments += [f"--config.data.sources.ct.cache={cache}", "--config.data.phantoms=0"]
    assert prepare(arguments) == 0
    assert _run(weights, cache, tmp_path / "c.parquet", "--crops") == 0
    crops = read_table(tmp_path / "c.parquet")
    assert crops.id[:5] == [
        *(f"scans/ct_0.nii.gz#{n:03d}" for n in range(4)),
        "scans/ct_1.nii.gz#000",
    ]
    assert crops.digest[::4] == table.digest
    np.testing.assert_allclose(
        crops.vectors.reshape(3, 4, -1).mean(axis=1), table.vectors, rtol=1e-5
    )
    _weights(tmp_path / "other.safetensors", _experiment(window=(-100.0, 300.0)))
    capsys.readouterr()
    assert _run(tmp_path / "other.safetensors", cache, tmp_path / "c.parquet") == 2
    assert "cache -> card): window: (-175.0, 250.0) -> (-100.0, 300.0)" in capsys.readouterr().err


class _Killed(BaseException):
    pass


def test_the_same_command_goes_on_where_it_was(tmp_path, weights, scans_folder, monkeypatch):
    for number in range(3, 7):
        save(scans_folder / f"ct_{number}.nii.gz", body((40, 36, 24), number))
    unbroken, output = tmp_path / "unbroken.parquet", tmp_path / "t.parquet"
    assert _run(weights, scans_folder, unbroken, "--crops") == 0
    done = []
    rows_of = embed.rows_of

    def counted(volume, *more):
        if len(done) == 5:
            raise _Killed
        done.append(volume.id)
        return rows_of(volume, *more)

    monkeypatch.setattr(embed, "rows_of", counted)
    monkeypatch.setattr(embed_store, "PART_ROWS", 8)  # two volumes
    with pytest.raises(_Killed):
        _run(weights, scans_folder, output, "--crops")
    assert not output.exists()
    monkeypatch.setattr(
        embed, "rows_of", lambda volume, *_: done.append(volume.id) or rows_of(volume, *_)
    )
    parts = tmp_path / "t.parquet.journal"
    assert len(list(parts.glob("*.parquet"))) == 2
    kept = shutil.copytree(parts, tmp_path / "kept")
    assert _run(weights, scans_folder, output, "--crops") == 0
    assert done == [f"ct_{n}" for n in (0, 1, 3, 4, 5)] + ["ct_5", "ct_6", "deep/ct_2"]
    assert _columns(output) == _columns(unbroken)
    for part in kept.glob("*.parquet"):  # killed after the table, before its parts had gone
        shutil.copy(part, parts)
    done.clear()
    assert _run(weights, scans_folder, output, "--crops") == 0
    assert not done
    assert sorted(read_table(output).id) == sorted(read_table(unbroken).id)
    save(scans_folder / "ct_1.nii.gz", body((40, 36, 24), 11))  # another file since
    assert _run(weights, scans_folder, output, "--crops") == 0
    assert done == ["ct_1"]
    table = read_table(output)
    assert sorted(table.volume) == sorted(read_table(unbroken).volume)
    encoder = voco_jax.load_encoder(weights)
    own = table.vectors[[one == "ct_1" for one in table.volume]]
    np.testing.assert_array_equal(own, encoder.crops(scans_folder / "ct_1.nii.gz").vectors)
    (scans_folder / "ct_0.nii.gz").unlink()
    assert _run(weights, scans_folder, output, "--crops") == 0
    assert "ct_0" not in read_table(output).volume


def test_one_process_a_table_which_is_on_the_disk_before_its_parts_go(
    tmp_path, weights, scans_folder, monkeypatch, capsys
):
    output = tmp_path / "new" / "t.parquet"
    synced, fsync, rows_of, inner = set(), embed_store.os.fsync, embed.rows_of, []

    def counted(descriptor):
        fsync(descriptor)
        found = os.fstat(descriptor)
        synced.add((found.st_ino, found.st_size))

    def second(*arguments):
        if not inner:
            inner.append(None)
            before = sorted(output.parent.rglob("*"))
            inner[0] = _run(weights, scans_folder, output, "--crops")
            assert sorted(output.parent.rglob("*")) == before
        return rows_of(*arguments)

    monkeypatch.setattr(embed_store.os, "fsync", counted)
    monkeypatch.setattr(embed, "rows_of", second)
    assert _run(weights, scans_folder, output) == 0
    assert inner == [4]
    said = capsys.readouterr().err
    assert f"{output}: another embed is writing this table (process {os.getpid()} on" in said
    found = output.stat()
    assert (found.st_ino, found.st_size) in synced
    assert _run(weights, scans_folder, output) == 0  # free again


def test_who_lost_the_table_writes_no_more(tmp_path):
    with contextlib.ExitStack() as stack:
        store = embed_store.Store(tmp_path / "t.parquet", {}, 4, stack)
        store._lost.append("process 7 on b")
        with pytest.raises(OSError, match=r"another embed has taken this table over .process 7 on"):
            store.finish([], {})
    assert not (tmp_path / "t.parquet").exists()


def _columns(path):
    table = pq.read_table(path)
    return {name: table[name].to_pylist() for name in table.column_names}


def test_other_weights_start_over(tmp_path, weights, scans_folder):
    output = tmp_path / "t.parquet"
    assert _run(weights, scans_folder, output) == 0
    before = read_table(output)
    _weights(weights, _experiment(), seed="other")
    assert _run(weights, scans_folder, output) == 0
    table = read_table(output)
    assert table.id == before.id
    assert not set(table.weights) & set(before.weights)
    assert (np.abs(table.vectors - before.vectors).max(axis=1) > 1e-3).all()
    assert _run(weights, scans_folder, output, "--crops") == 0  # another kind of rows
    assert set(read_table(output).kind) == {"crop"}
    _weights(weights, _experiment({**STRIDED, "features": 8}))
    (scans_folder / "ct_0.nii.gz").write_bytes(b"broken since")
    assert _run(weights, scans_folder, output) == 1
    table = read_table(output)
    assert (table.id, table.vectors.shape) == (before.id[1:], (2, 32))


def test_random_weights_are_another_row_of_the_same_scans(tmp_path, weights, scans_folder):
    tables = []
    for number, options in enumerate([(), ("--random-weights", 0), ("--random-weights", 1)]):
        output = tmp_path / f"{number}.parquet"
        assert _run(weights, scans_folder, output, *options) == 0
        tables.append(read_table(output))
    trained, first, second = tables
    assert trained.digest == first.digest == second.digest
    assert set(first.weights) == {"random weights, seed 0"}
    assert same_rows(trained, first, "1.parquet").id == trained.id
    with pytest.raises(InputError, match=r"0\.parquet: weights: found .*: make the table with: py"):
        same_rows(first, trained, "0.parquet")
    assert np.abs(first.vectors - trained.vectors).max() > 1e-3
    assert np.abs(first.vectors - second.vectors).max() > 1e-3
    assert _run(weights, scans_folder, tmp_path / "0.parquet", "--random-weights", 0) == 0
    np.testing.assert_array_equal(read_table(tmp_path / "0.parquet").vectors, first.vectors)


def test_bad_input(tmp_path, weights, scans_folder, capsys):
    output = tmp_path / "t.parquet"

    def error(*arguments):
        assert _run(*arguments) == 2
        return capsys.readouterr().err

    assert "expected a file FILE.parquet" in error(weights, scans_folder, tmp_path / "t.csv")
    assert "a table a kind" in error(weights, scans_folder, output, "--crops", "--masks", tmp_path)
    assert "expected a folder of masks" in error(weights, scans_folder, output, "--organs", "a=1")
    assert "no such file or folder" in error(weights, tmp_path / "absent", output)
    masks = ("--masks", scans_folder)
    assert "--organs: found none, and the weights' card" in error(
        weights, scans_folder, output, *masks
    )
    (tmp_path / "w.safetensors.json").unlink()
    assert "found no card beside it" in error(weights, scans_folder, output)
    config = (*("--config", ROOT / "configs" / "voco_160k.py"), "--batch", "2")
    assert "sources abdomen, " in error(weights, scans_folder, output, *config)
    assert "source: found 'a', expected one of" in error(
        weights, scans_folder, output, *config, "--source", "a"
    )
    assert not output.exists()


# ---- the package


def test_few_names_are_public_and_cheap():
    """Importing the package imports neither JAX nor NumPy; nothing else is public in it."""
    code = (
        "import sys, voco_jax; assert not {'jax', 'numpy', 'torch'} & set(sys.modules); "
        "print(*sorted(n for n in vars(voco_jax) if n[0] != '_'), '|', *dir(voco_jax)); "
        "print(voco_jax.load_encoder.__module__)"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout.split("\n")
    assert printed[0] == "| Encoder __version__ load_encoder similarity_map"
    assert printed[1] == "voco_jax.evaluation.load_encoder"
    assert sorted(voco_jax.__all__) == sorted(dir(voco_jax))
    with pytest.raises(AttributeError, match="no attribute 'encoder_of'"):
        voco_jax.encoder_of  # noqa: B018
