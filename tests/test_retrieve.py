"""Nearest rows against brute force, precision against counting, the picture's slices, refusals."""

import csv
import dataclasses
import json

import numpy as np
import pytest
from chains import CHAIN_10K
from feature_tables import make_table
from PIL import Image
from scans import body, save

from voco_jax.data.volumes import prepare_volume
from voco_jax.evaluation import nearest, retrieve
from voco_jax.evaluation.features import write_table
from voco_jax.evaluation.nearest import find_neighbours, precision
from voco_jax.evaluation.retrieve import main
from voco_jax.report.neighbours import Tile, draw_neighbours, middle_planes

CHAIN = dataclasses.replace(CHAIN_10K, volume_size=(96, 96, 32))


def brute_force(vectors, query, groups, top):
    cosines = [
        (-float(v @ vectors[query] / np.linalg.norm(v) / np.linalg.norm(vectors[query])), row)
        for row, v in enumerate(vectors)
        if groups[row] != groups[query]
    ]
    return sorted(cosines)[:top]


@pytest.mark.parametrize("block", [1, 100_000])
def test_the_nearest_are_those_of_brute_force(generator, monkeypatch, block):
    monkeypatch.setattr(nearest, "_BLOCK", block)
    vectors = generator.normal(2, 1, (50, 6)) * generator.uniform(0.1, 9, (50, 1))
    groups = np.array([f"g{i % 12}" for i in range(50)])
    queries = [3, 49, 0]
    found = find_neighbours(vectors, queries, groups, 7)
    for place, query in enumerate(queries):
        expected = brute_force(vectors, query, groups, 7)
        assert found.rows[place].tolist() == [row for _, row in expected]
        np.testing.assert_allclose(
            found.similarities[place], [-cosine for cosine, _ in expected], atol=1e-6
        )


def test_equal_ones_come_in_order_and_there_may_be_too_few():
    vectors = np.array([[1.0, 0], [2, 0], [0, 1], [3, 0], [0, 0], [4, 0]])
    found = find_neighbours(vectors, [0], np.arange(6).astype(str), 3)
    assert found.rows.tolist() == [[1, 3, 5]]
    assert found.similarities.tolist() == [[1, 1, 1]]
    few = find_neighbours(vectors, [0], np.array(list("aaaabb")), 4)
    assert few.rows.tolist() == [[5, 4, -1, -1]]
    np.testing.assert_array_equal(few.similarities, [[1, 0, np.nan, np.nan]])


def test_precision_is_counted_and_chance_is_what_random_rows_have(generator):
    labels = np.repeat(["a", "b"], [30, 10])
    groups = np.array([f"g{i % 20}" for i in range(40)])
    features = np.eye(2)[(labels == "b").astype(int)] + 0.01 * generator.normal(size=(40, 2))
    queries = list(range(40))
    found = precision(find_neighbours(features, queries, groups, 3), queries, labels, groups)
    assert found["mean"] == 1
    drawn = []
    for seed in range(60):
        random = np.random.default_rng(seed).normal(size=(40, 30))
        neighbours = find_neighbours(random, queries, groups, 3)
        drawn.append(precision(neighbours, queries, labels, groups))
    assert np.mean([one["mean"] for one in drawn]) == pytest.approx(found["chance"], abs=0.02)
    low, high = drawn[0]["interval"]
    assert low < drawn[0]["mean"] < high
    right = [
        (labels[row] == labels[one]).mean()
        for one, row in zip(queries, neighbours.rows, strict=True)
    ]
    assert drawn[-1]["mean"] == pytest.approx(np.mean(right))


def test_planes_and_their_way_round(generator):
    voxels = generator.random((6, 5, 4))
    axial, coronal = middle_planes(voxels)
    np.testing.assert_array_equal(axial, voxels[:, :, 2])
    np.testing.assert_array_equal(coronal, voxels[:, 2])
    voxels[:, :, 2:] = 0  # the middle is empty
    np.testing.assert_array_equal(middle_planes(voxels)[1], voxels[:, 2])
    np.testing.assert_array_equal(
        middle_planes(voxels)[0], voxels[:, :, int(voxels[:, :, 1].std() > voxels[:, :, 0].std())]
    )
    dark = np.zeros((8, 8, 8))
    dark[4:] = 1  # the patient's right half
    picture = draw_neighbours([[Tile(("q",), middle_planes(dark), (1, 1, 1))]], "t").astype(int)
    middle = picture[picture.shape[0] // 4]
    grey = np.flatnonzero((middle.max(1) - middle.min(1) < 9) & (middle.max(1) < 40))
    blue = np.flatnonzero(middle[:, 2] - middle[:, 0] > 60)
    assert grey.mean() > blue.mean(), "the right half is bright, and on the left"


@pytest.fixture
def folder(tmp_path, generator):
    """Four crops of each of three scans, of which one file is gone."""
    chain = dataclasses.asdict(CHAIN)
    volumes, ids, corners = [], [], []
    for scan in "abc":
        if scan != "c":
            save(tmp_path / f"{scan}.nii.gz", body((40, 36, 24), seed=ord(scan)))
        for number in range(4):
            volumes.append(scan)
            ids.append(f"{scan}#{number:03d}")
            corners.append((48 * (number // 2), 48 * (number % 2), 0))
    vectors = np.tile(np.eye(4), (3, 1)) + 0.05 * generator.normal(size=(12, 4))
    table = make_table(
        vectors,
        volumes,
        ids,
        corner=corners,
        size=[(48, 48, 32)] * 12,
        path=[str(tmp_path / f"{scan}.nii.gz") for scan in volumes],
        manifest={"chain": chain},
    )
    write_table(tmp_path / "t.parquet", table)
    random = make_table(
        generator.normal(size=(12, 4)), volumes, ids, "random weights, seed 0", digest=table.digest
    )
    write_table(tmp_path / "r.parquet", random)
    return tmp_path


def run(folder, *more):
    return main(["--table", str(folder / "t.parquet"), "--output", str(folder / "out"), *more])


def test_crops_with_a_picture(folder, capsys):
    assert run(folder, "--query", "a#002", "--top", "3") == 0
    with open(folder / "out" / "neighbours.csv", encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert {line["id"] for line in lines[:2]} == {"b#002", "c#002"}
    assert {line["id"][0] for line in lines} <= {"b", "c"}  # none of its own scan
    assert [line["rank"] for line in lines] == ["1", "2", "3"]
    assert lines[0]["id"] in capsys.readouterr().out
    with Image.open(folder / "out" / "neighbours.png") as picture:
        assert picture.size[0] > 600


def test_slices_are_those_of_the_prepared_crop(folder, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        retrieve,
        "draw_neighbours",
        lambda rows, title: drawn.append(rows) or np.zeros((2, 2, 3), np.uint8),
    )
    assert run(folder, "--query", "a#002", "--top", "2") == 0
    (((query, *found),),) = drawn
    whole = prepare_volume(folder / "a.nii.gz", CHAIN)
    part = whole.voxels[48:96, 0:48, 0:32]
    np.testing.assert_array_equal(query.planes[0], part[:, :, 16])
    np.testing.assert_array_equal(query.planes[1], part[:, 24])
    extent = np.subtract(whole.box[1], whole.box[0]) * whole.spacing
    np.testing.assert_allclose(np.multiply(query.spacing, (96, 96, 32)), extent)
    by_name = {tile.title[0]: tile for tile in found}
    assert by_name["c#002"].planes is None
    assert "c.nii.gz" in by_name["c#002"].note
    assert by_name["b#002"].planes is not None


def test_all_with_labels_and_random_weights(folder, capsys):
    flags = ["--query", "all", "--top", "2", "--label", "corner"]
    assert run(folder, *flags, "--random", str(folder / "r.parquet")) == 0
    results = json.loads((folder / "out" / "results.json").read_text("utf-8"))["precision_at_2"]
    assert results["these weights"]["mean"] == 1
    assert results["these weights"]["chance"] == 0.25
    assert results["random weights"]["mean"] < 0.7
    assert "of the 2 nearest have the query's corner; 0.250 by guessing" in capsys.readouterr().out


def test_series_of_the_query_s_folder_are_left_out(folder):
    paths = [f"/gone/{one}/series-{n}-B30f-1a2b3c" for one in "ab" for n in (1, 2)]
    volumes = [path.removeprefix("/gone/") for path in paths]
    manifest = {"chain": dataclasses.asdict(CHAIN)}
    write_table(
        folder / "t.parquet", make_table(np.eye(4) + 1, volumes, path=paths, manifest=manifest)
    )
    assert run(folder, "--query", volumes[0]) == 0
    with open(folder / "out" / "neighbours.csv", encoding="utf-8", newline="") as file:
        assert [line["id"] for line in csv.DictReader(file)] == volumes[2:]


def test_mistakes_are_one_line(folder, capsys):
    def error(*flags):
        assert run(folder, *flags) == 2
        return capsys.readouterr().err

    assert "--query: found 'a#02', expected all, or an id as a#002" in error("--query", "a#02")
    assert "--random: found it without --label" in error("--query", "all", "--random", "r.parquet")
    trained = ("--random", str(folder / "t.parquet"))
    said = error("--query", "all", "--label", "corner", *trained)
    assert "weights: found 'trained', expected 'random weights': make the table with" in said
    for query in ("all", "a#002", "a"):
        said = error("--query", query, "--label", "organ")
        assert "--label organ: found no row of" in said
    bare = make_table(np.eye(3), list("abc"))
    write_table(folder / "t.parquet", bare)
    assert "manifest: chain: found none that can be read" in error("--query", "a")
