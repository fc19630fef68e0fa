"""Probes against scikit-learn and leaving out by hand; folds, intervals, leaks, refusals."""

import csv
import json
import re

import numpy as np
import pytest
from feature_tables import make_table
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.linear_model import LogisticRegression, Ridge, RidgeClassifier
from sklearn.metrics import balanced_accuracy_score, roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler, normalize

from voco_jax.errors import InputError
from voco_jax.evaluation import probe_folds, probe_methods
from voco_jax.evaluation.class_metrics import balanced_accuracy
from voco_jax.evaluation.features import read_table, write_table
from voco_jax.evaluation.label_columns import column, match, patients, read_labels
from voco_jax.evaluation.linear_probe import balanced_weights, fit_linear_probe
from voco_jax.evaluation.probe import main
from voco_jax.evaluation.probe_folds import (
    Labelled,
    draw_patients,
    encode,
    make_folds,
    measure_all,
    predict,
)
from voco_jax.evaluation.probe_methods import fit_probe, logistic, neighbours
from voco_jax.evaluation.table_rows import take


@pytest.fixture
def rows(generator):
    """60 rows of 20 patients, three classes of other sizes, 12 features that tell a little."""
    labels = np.repeat([0, 1, 2], [30, 20, 10])
    features = generator.normal(3, 2, (60, 12))
    features[:, :3] += 1.5 * np.eye(3)[labels]
    return features, labels, generator.permutation(np.arange(60) % 20)


# ---- the linear probe


def test_the_linear_probe_is_ridge_regression(rows):
    features, labels, groups = rows
    probe = fit_linear_probe(features, labels, groups, 3)
    scaler = StandardScaler().fit(features)
    scaled = scaler.transform(features)
    model = RidgeClassifier(alpha=probe.strength, class_weight="balanced").fit(scaled, labels)
    # Its targets are -1 and 1.
    expected = model.decision_function(scaled)
    np.testing.assert_allclose(2 * probe.scores(features) - 1, expected, atol=1e-8)
    sums = probe.scores(features).sum(axis=1)
    np.testing.assert_allclose(sums, 1, atol=1e-9)


@pytest.mark.parametrize("one_each", [True, False])
def test_leaving_out_is_what_refitting_gives(rows, one_each):
    features, labels, groups = rows
    groups = np.arange(60) if one_each else np.where(groups < 5, 0, groups)  # of 15 and of 3 rows
    probe = fit_linear_probe(features, labels, groups, 3)
    weights = balanced_weights(labels)
    scaled, targets = StandardScaler().fit_transform(features), np.eye(3)[labels]

    def left_out(strength):
        found = np.empty((60, 3))
        for group in np.unique(groups):
            kept, away = groups != group, groups == group
            model = Ridge(alpha=strength)
            model.fit(scaled[kept], targets[kept], sample_weight=weights[kept])
            found[away] = model.predict(scaled[away])
        return found

    np.testing.assert_allclose(probe.left_out, left_out(probe.strength), atol=1e-8)
    strengths = 60 * 10.0 ** np.arange(-4, 4)
    errors = [(weights[:, None] * (targets - left_out(s)) ** 2).sum() for s in strengths]
    assert probe.strength == pytest.approx(strengths[np.argmin(errors)])


def test_more_features_than_rows_and_dead_features(rows, generator):
    features, labels, groups = rows
    wide = np.concatenate([features, generator.normal(size=(60, 200)), np.full((60, 2), 7.3)], 1)
    wide[:, -1] += 1e-7 * generator.normal(size=60)  # constant in float32
    probe = fit_linear_probe(wide, labels, groups, 3)
    assert np.abs(probe.weights[-1]).max() < 1e-6
    model = make_pipeline(StandardScaler(), Ridge(alpha=probe.strength))
    model.fit(wide[:, :-1], np.eye(3)[labels], ridge__sample_weight=balanced_weights(labels))
    np.testing.assert_allclose(probe.scores(wide), model.predict(wide[:, :-1]), atol=1e-5)
    with pytest.raises(ValueError, match="one group"):
        fit_linear_probe(features, labels, np.zeros(60), 3)


# ---- kNN and logistic regression


def test_neighbours_are_those_of_scikit_learn(rows):
    features, labels, groups = rows
    train = np.arange(60) % 4 > 0
    scores = neighbours(features[train], labels[train], groups[train], 3)(features[~train])
    # Of unit vectors the squared Euclidean distance is twice that of the cosine.
    model = KNeighborsClassifier(5, weights=lambda distance: 2 / distance**2)
    model.fit(normalize(features[train]), labels[train])
    np.testing.assert_allclose(scores, model.predict_proba(normalize(features[~train])), rtol=1e-6)


def test_a_few_labels_have_fewer_neighbours(rows):
    features, labels, groups = rows
    few = np.array([0, 30, 50])  # of each class one: five neighbours would tell nothing
    scores = neighbours(features[few], labels[few], groups[few], 3)(features)
    assert set(scores.max(axis=1)) == {1.0}


def test_logistic_regression_chooses_c_inside(rows):
    features, labels, groups = rows
    scores = logistic(features, labels, groups, 3)(features)
    strengths = 10.0 ** np.arange(-4, 1)

    def pipeline(strength):
        model = LogisticRegression(C=strength, class_weight="balanced", max_iter=1_000)
        return make_pipeline(StandardScaler(), model)

    inner = StratifiedGroupKFold(3, shuffle=True, random_state=0)
    found = []
    for strength in strengths:
        predicted = np.empty(60, int)
        for train, test in inner.split(features, labels, groups):
            fitted = pipeline(strength).fit(features[train], labels[train])
            predicted[test] = fitted.predict(features[test])
        found.append(balanced_accuracy_score(labels, predicted))
    assert len(set(found)) > 1
    best = strengths[np.argmax(found)]
    expected = pipeline(best).fit(features, labels).predict_proba(features)
    np.testing.assert_allclose(scores, expected, atol=1e-9)


@pytest.mark.parametrize("method", probe_methods.METHODS)
def test_a_class_that_was_not_seen_is_never_said(rows, method):
    features, labels, groups = rows
    seen = labels < 2
    scores = fit_probe(method, features[seen], labels[seen], groups[seen], 4)(features)
    assert scores.shape == (60, 4)
    assert set(scores.argmax(axis=1)) == {0, 1}
    only = labels == 1
    scores = fit_probe(method, features[only], labels[only], groups[only], 4)(features)
    assert set(scores.argmax(axis=1)) == {1}
    one = groups == 0  # a single patient
    fit_probe(method, features[one], labels[one], groups[one], 4)


# ---- folds and metrics


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_no_patient_is_on_both_sides(data):
    count = data.draw(st.integers(30, 60))
    seed = data.draw(st.integers(0, 1000))
    generator = np.random.default_rng(seed)
    names = np.array([f"p{i}" for i in generator.integers(0, 15, count)])
    values = np.array(["a", "b", "c", ""])[generator.integers(0, 4, count)]
    kept, labelled, left_out = encode(values, names, 3)
    assert set(values[kept]) == set(labelled.names)
    assert set(left_out) == set(values) - set(labelled.names) - {""} | {"(none)"} & (
        {"(none)"} if "" in values else set()
    )
    if len(labelled.names) < 2:
        return
    fractions = (0.1, 0.5, 1.0)
    folds = make_folds(labelled, 3, fractions, 2)
    for seed in range(2):
        for fraction in fractions:
            own = [fold for fold in folds if (fold.seed, fold.fraction) == (seed, fraction)]
            tested = np.concatenate([fold.test for fold in own])
            assert sorted(tested) == list(range(len(kept)))
            for fold in own:
                train, test = labelled.patients[fold.train], labelled.patients[fold.test]
                assert not set(train) & set(test)
                # A patient whose labels are known brings all rows.
                assert set(fold.train) == set(np.flatnonzero(np.isin(labelled.patients, train)))
    for small, large in ((0, 1), (1, 2)):  # nested
        assert set(folds[small].train) <= set(folds[large].train)


def test_fractions_are_of_patients_and_of_every_class():
    labels = np.repeat([0, 1], [80, 20])
    names = np.repeat(np.arange(50), 2)
    rows = draw_patients(labels, names, 0.2, 0)
    assert np.bincount(labels[rows]).tolist() == [16, 4]
    assert len(np.unique(names[rows])) == 10
    assert np.bincount(labels[draw_patients(labels, names, 0.01, 0)]).tolist() == [2, 2]
    assert len(draw_patients(labels, names, 1.0, 0)) == 100


def test_balanced_accuracy_with_weights_is_that_of_repeated_rows(generator):
    labels, predicted = generator.integers(0, 3, (2, 40))
    assert balanced_accuracy(labels, predicted) == pytest.approx(
        balanced_accuracy_score(labels, predicted)
    )
    weights = generator.integers(0, 3, (2, 40))
    weights[1, labels == 2] = 0  # a resample that lacks a class
    expected = balanced_accuracy_score(labels.repeat(weights[0]), predicted.repeat(weights[0]))
    found = balanced_accuracy(labels, predicted, weights)
    np.testing.assert_allclose(found, [expected, np.nan])


def test_metrics_are_those_of_scikit_learn_and_intervals_cover(generator):
    """Scores that are right with a known probability, which the 95 % interval covers so often."""
    patients = np.repeat(np.arange(40), 3).astype(str)
    covered = 0
    for _ in range(40):
        labels = generator.permutation(np.repeat([0, 1], 60))
        right = generator.random(40)[patients.astype(int)] < 0.7  # all of a patient's, or none
        scores = np.eye(2)[np.where(right, labels, 1 - labels)][None]
        (found,) = measure_all(Labelled(labels, ("a", "b"), patients), [scores])
        low, high = found["accuracy"].interval
        covered += low <= 0.7 <= high
    assert 34 <= covered <= 40
    noisy = generator.random((1, 120, 2))
    (found,) = measure_all(Labelled(labels, ("a", "b"), patients), [noisy])
    expected = balanced_accuracy_score(labels, noisy[0].argmax(axis=1))
    assert found["balanced_accuracy"].mean == pytest.approx(expected)
    areas = [roc_auc_score(labels == one, noisy[0][:, one]) for one in (0, 1)]
    assert found["auroc"].mean == pytest.approx(np.mean(areas))


def test_random_features_are_at_chance_and_seeds_differ(generator):
    names = np.repeat(np.arange(40), 3).astype(str)
    labels = np.repeat(generator.permutation(np.arange(40) % 2), 3)
    # Crops of a patient are alike: with some of them in training the label would be known.
    features = np.repeat(generator.normal(size=(40, 20)), 3, 0) + 0.1 * generator.normal(
        size=(120, 20)
    )
    labelled = Labelled(labels, ("a", "b"), names)
    folds = make_folds(labelled, 4, (1.0,), 2)
    scores = predict(features, labelled, folds, lambda: None)
    for found in measure_all(labelled, list(scores.values())):
        low, high = found["balanced_accuracy"].interval
        assert low < 0.5 < high
        assert found["balanced_accuracy"].seeds[0] != found["balanced_accuracy"].seeds[1]
    leaky = Labelled(labels, ("a", "b"), np.arange(120).astype(str))
    scores = predict(features, leaky, make_folds(leaky, 4, (1.0,), 1), lambda: None)
    assert measure_all(leaky, [scores["knn", 1.0]])[0]["balanced_accuracy"].mean > 0.95


# ---- labels


RANDOM = "random weights, seed 0"
LABELS = "\ufeffname;site;part\nv0.nii.gz; A;x\nv1#001;B;y\nv2;A;\n"


def test_labels_are_found_by_id_volume_or_file(tmp_path):
    path = tmp_path / "labels.csv"
    path.write_text(LABELS, "utf-8")
    table = make_table(
        np.eye(5),
        ["v0", "v0", "v1", "v1", "v2"],
        [f"{v}#00{i}" for v, i in (("v0", 0), ("v0", 1), ("v1", 0), ("v1", 1), ("v2", 0))],
        corner=[(0, 8, 16)] * 4 + [None],
    )
    rows = match(table, read_labels(path, "name"), path)
    assert column(table, rows, "site").tolist() == ["A", "A", "", "B", "A"]
    assert column(table, rows, "part").tolist() == ["x", "x", "", "y", ""]
    assert column(table, rows, "corner_y").tolist() == ["8"] * 4 + [""]
    assert column(table, rows, "corner")[0] == "0x8x16"
    assert column(table, rows, "spacing")[0] == "1x1x2.5"
    with pytest.raises(InputError, match=r"column 'scanner': found name, part, site in the CSV"):
        column(table, rows, "scanner")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "found the columns (none), expected each once and among them id or volume"),
        ("name,part\na,b\n", "found the columns name, part, expected each once and among them id"),
        ("id,part,part\na,b,c\n", "expected each once"),
        (
            'id,part\nv0,"a\nv1,b\n',
            "labels.csv: not CSV (unexpected end of data), expected a header",
        ),
        (f"id,part\nv0,{'a' * 140_000}\n", "labels.csv: not CSV (field larger than field limit"),
        ("id,part\nv0\n", "row 2: found 1 cells, not 2"),
        ("id,part\nv0,a\nv0,b\n", "row 3: found 'v0' twice; one row each"),
        ("id,part\ncase9,a\n", "found rows for case9, expected ids of the table, as v0, volumes"),
    ],
)
def test_label_files_are_refused(tmp_path, text, words):
    path = tmp_path / "labels.csv"
    path.write_text(text, "utf-8")
    with pytest.raises(InputError, match=re.escape(words)):
        match(make_table(np.eye(2), ["v0", "v1"]), read_labels(path), path)
    with pytest.raises(InputError, match=r"none\.csv: cannot be read"):
        read_labels(tmp_path / "none.csv")


def test_who_belongs_together():
    volumes = ["a", "a", "b", "c", "d"]
    digests = ["1", "1", "2", "2", "3"]  # b and c are one scan
    table = make_table(np.eye(5), volumes, list("01234"), digest=digests)
    found, notes = patients(table, [{}] * 5, None)
    assert found.tolist() == ["a", "a", "b", "b", "d"]
    assert notes == ["1 patients have the voxels of another: kept together"]
    rows = [{"who": who} for who in ("p", "p", "", "q", "p")]
    assert patients(table, rows, "who")[0].tolist() == ["p", "p", "b", "b", "p"]
    with pytest.raises(InputError, match="column who: a: found the patients p and q, expected one"):
        patients(table, [{"who": who} for who in "pqppp"], "who")


def test_series_of_a_folder_are_one_patient():
    """Reconstructions of a scan; the files need not be there."""
    names = ("series-3-Chest_B30f-1a2b3c", "series-4-Chest_B70f-4d5e6f-echo_2")
    paths = [f"/gone/{folder}/{name}" for folder in ("a", "b") for name in names]
    paths += ["/gone/a/series.nii.gz", "/gone/b"]  # a file, and a folder with one volume
    volumes = [path.removeprefix("/gone/") for path in paths]
    table = make_table(np.eye(6), volumes, path=paths)
    found, notes = patients(table, [{}] * 6, None)
    assert found.tolist() == ["/gone/a", "/gone/a", "/gone/b", "/gone/b", *volumes[4:]]
    assert notes == [
        "4 volumes are DICOM series of 2 folders: a folder is taken as a patient; --patient names "
        "a column that knows better"
    ]
    rows = [{"who": who} for who in ("p", "q", "", "", "p", "")]
    found, notes = patients(table, rows, "who")
    assert found.tolist() == ["p", "q", "/gone/b", "/gone/b", "p", "b"]
    assert "2 volumes are DICOM series of 1 folders" in notes[0]
    assert patients(table, [{"who": who} for who in "pqrstu"], "who")[1] == []


def test_a_share_with_the_patients_of_the_next_is_left_out(study, capsys):
    write, run, _ = study
    write(3.0, 0.0)
    flags = ["--fractions", "0.01,0.04,0.5,1", "--seeds", "1", "--folds", "2"]
    status, results = run("--label", "dx", *flags)
    assert status == 0
    counts = {row["fraction"]: row["training_patients"] for row in results["results"]}
    assert counts == {0.04: 2, 0.5: pytest.approx(15, abs=1), 1: 30}
    assert len(results["results"]) == 2 * 3 * len(counts)
    assert {gain["fraction"] for gain in results["above_random_weights"]} == set(counts)
    note = "left out: 1 %, as it has the patients of 4 %"
    assert results["label"]["notes"] == [note]
    assert note in capsys.readouterr().out.splitlines()
    how = results["how"]
    assert how["knn"].startswith("5 neighbours by cosine, or as many as the rarest class has")
    assert how["knn"].endswith("votes by 1 / distance")
    assert "a class that is no patient's most frequent one may be missing" in how["fraction"]


def test_a_class_may_be_missing_from_few_patients():
    """Class 1 is nobody's most frequent label; results.json says so."""
    labels, names = np.array([0, 0, 1, 0, 0, 0]), np.array([0, 0, 0, 1, 1, 1])
    found = {tuple(np.unique(labels[draw_patients(labels, names, 0.5, s)])) for s in range(9)}
    assert found == {(0,), (0, 1)}


# ---- the command


@pytest.fixture
def study(tmp_path, generator, monkeypatch):
    """60 scans: features that tell ill from well, and the scanner, which goes with it."""
    monkeypatch.setattr(probe_folds, "RESAMPLES", 100)
    monkeypatch.setattr(probe_methods, "STRENGTHS", np.array([0.1]))
    labels = np.arange(60) % 2
    scanner = np.where(np.arange(60) % 5 > 0, labels, 1 - labels)
    features = generator.normal(size=(60, 8))
    volumes = [f"v{i}" for i in range(60)]
    lines = [f"v{i},{('well', 'ill')[labels[i]]},{'GS'[scanner[i]]},{20 + i}" for i in range(60)]
    text = "\n".join(["id,dx,scanner,age", *lines, ""])
    (tmp_path / "labels.csv").write_text(text, "utf-8")
    random = make_table(generator.normal(size=(60, 8)), volumes, weights=RANDOM)
    write_table(tmp_path / "r.parquet", random)

    def write(of_class, of_scanner):
        features[:, :2] += of_class * np.eye(2)[labels]
        features[:, 3] += of_scanner * scanner
        write_table(tmp_path / "t.parquet", make_table(features, volumes))

    def run(*more):
        arguments = ["--table", "t.parquet", "--random", "r.parquet", "--labels", "labels.csv"]
        arguments = [str(tmp_path / one) if "." in one else one for one in arguments]
        status = main([*arguments, *more, "--output", str(tmp_path / "out")])
        path = tmp_path / "out" / "results.json"
        return status, json.loads(path.read_text("utf-8")) if path.exists() else {}

    return write, run, tmp_path


def test_what_tells_the_scanner_is_told(study, capsys):
    write, run, _ = study
    write(0.0, 6.0)
    flags = ["--fractions", "1", "--seeds", "1", "--leak", "scanner", "--leak", "spacing"]
    status, results = run("--label", "dx", *flags)
    assert status == 0
    said = "\n".join(results["words"])
    assert "scanner is told from the features as well as dx, or better (1.00 against" in said
    assert "they may tell scanner rather than dx" in said
    assert "scanner alone, without any image, gives dx with a balanced accuracy of 0.80" in said
    assert re.search(r"among rows with the same scanner, dx is told with .*: no better than", said)
    assert "spacing: no two values of enough patients for the folds" in said
    leak = results["leaks"][0]
    assert leak["values"] == ["G", "S"]
    assert leak["told"]["linear"]["mean"] == 1
    told = capsys.readouterr().out
    assert all(word in told for word in results["words"])
    assert "majority class" in told


def test_what_tells_the_disease_is_told(study, capsys):
    write, run, folder = study
    write(3.0, 0.0)
    flags = ["--fractions", "0.05,1", "--seeds", "2", "--leak", "scanner"]
    status, results = run("--label", "dx", *flags)
    assert status == 0
    said = "\n".join(results["words"])
    assert "the weights tell dx better than random weights" in said
    assert "scanner is told from the features, but less well than dx" in said
    assert "among rows with the same scanner, dx is told with" in said
    assert "no better" not in said
    rows = {(r["features"], r["method"], r["fraction"]): r for r in results["results"]}
    assert len(rows) == 12
    ours = rows["these weights", "linear", 1.0]["balanced_accuracy"]
    assert ours["mean"] > 0.8
    assert ours["interval"][0] < ours["mean"] < ours["interval"][1]
    assert len(ours["seeds"]) == 2
    assert rows["random weights", "linear", 1.0]["balanced_accuracy"]["mean"] < 0.7
    assert rows["these weights", "knn", 0.05]["training_patients"] == 2
    assert results["majority_class"]["accuracy"] == 0.5
    (gain,) = [
        g for g in results["above_random_weights"] if g["method"] == "linear" and g["fraction"] == 1
    ]
    theirs = rows["random weights", "linear", 1.0]["balanced_accuracy"]["mean"]
    assert gain["balanced_accuracy"] == pytest.approx(ours["mean"] - theirs)
    with open(folder / "out" / "predictions.csv", encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["id"] for line in lines] == [f"v{i}" for i in range(60)]
    right = np.mean([line["linear"] == line["label"] for line in lines])
    assert right == pytest.approx(ours["mean"], abs=0.1)
    with Image.open(folder / "out" / "probe.png") as picture:
        assert picture.size[0] > 600
    assert "100 % (48)" in capsys.readouterr().out


def test_a_label_that_is_too_easy_is_told(study):
    write, run, folder = study
    write(30.0, 0.0)
    trained = read_table(folder / "t.parquet")
    random = make_table(trained.vectors + np.eye(8)[-1], trained.id, weights=RANDOM)
    write_table(folder / "r.parquet", random)
    _, results = run("--label", "dx", "--fractions", "1", "--seeds", "1")
    assert "random weights tell dx as well" in results["words"][0]
    assert "too easy to show what training has done" in results["words"][0]


def test_mistakes_are_one_line(study, capsys):
    write, run, folder = study
    write(1.0, 0.0)

    def error(*flags):
        assert run(*flags)[0] == 2
        return capsys.readouterr().err

    said = error("--label", "age")
    assert "column age: found 60 different numbers from 20 to 79, expected classes; add" in said
    said = error("--label", "dx", "--folds", "31")
    assert "found 0 classes of 31 or more patients; with fewer: ill (30), well (30)" in said
    assert "expected shares as 0.05,0.1" in error("--label", "dx", "--fractions", "0.5,2")
    assert "expected 2 or more" in error("--label", "dx", "--folds", "1")
    assert "column 'size': found age, dx" in error("--label", "size")
    assert "--kind: found crop, expected volume as in" in error("--label", "dx", "--kind", "crop")
    table, labels = str(folder / "t.parquet"), str(folder / "labels.csv")
    flags = ["--table", table, "--labels", labels, "--label", "dx", "--output", str(folder / "o")]
    assert main(flags) == 2
    assert (
        "make them with: python -m voco_jax.evaluation.embed --random-weights 0 --weights "
        f"voco.safetensors --input scans --output {folder / 't_random.parquet'}"
    ) in capsys.readouterr().err
    assert main([*flags, "--random", table]) == 2
    said = capsys.readouterr().err
    assert f"{table}: weights: found 'trained', expected 'random weights': make the" in said
    assert "python -m voco_jax.evaluation.embed --random-weights 0 --weights voco.saf" in said
    random = str(folder / "r.parquet")
    assert main(["--table", random, "--random", random, *flags[2:]]) == 2
    assert "found the features of --table, expected those of random" in capsys.readouterr().err
    other = read_table(folder / "r.parquet")
    for spoilt, words in (
        (take(other, range(59)), "found no row 'v59' (1 are missing)"),
        (make_table(np.eye(60), other.id, weights=RANDOM), "found 60 features, expected 8"),
        (
            make_table(other.vectors, other.id, weights=RANDOM, digest=["x"] * 60),
            "v0: found other voxels",
        ),
    ):
        write_table(folder / "bad.parquet", spoilt)
        assert main([*flags, "--random", str(folder / "bad.parquet")]) == 2
        assert words in capsys.readouterr().err


def test_tables_survive_and_others_are_refused(tmp_path, generator):
    table = make_table(
        generator.normal(size=(3, 5)),
        ["a", "a", "b"],
        ["a#000", "a#liver", "b#000"],
        kind=["crop", "organ", "crop"],
        organ=[None, "liver", None],
        corner=[(0, 1, 2), None, (3, 4, 5)],
        size=[(8, 8, 4), None, (8, 8, 4)],
    )
    write_table(tmp_path / "t.parquet", table)
    found = read_table(tmp_path / "t.parquet")
    for name, value in vars(table).items():
        np.testing.assert_array_equal(getattr(found, name), value) if name == "vectors" else None
        assert name == "vectors" or getattr(found, name) == value
    assert json.loads((tmp_path / "t.parquet.json").read_text("utf-8")) == table.manifest
    broken = make_table([[1, np.nan]], ["a"])
    write_table(tmp_path / "t.parquet", broken)
    with pytest.raises(InputError, match="a: found features that are not finite"):
        read_table(tmp_path / "t.parquet")
    write_table(tmp_path / "t.parquet", make_table(np.eye(2), ["a", "a"]))
    with pytest.raises(InputError, match="an id twice"):
        read_table(tmp_path / "t.parquet")
    (tmp_path / "t.csv").write_text("id,volume\n", "utf-8")
    with pytest.raises(InputError, match=r"t\.csv: cannot be read .* that voco_jax\.evaluation"):
        read_table(tmp_path / "t.csv")
