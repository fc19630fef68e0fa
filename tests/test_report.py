import asyncio
import base64
import hashlib
import io
import itertools
import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
import sklearn.decomposition
import sklearn.metrics
from PIL import Image
from scipy.ndimage import maximum_filter1d
from test_contact_sheet import ODD, fill

from voco_jax import train
from voco_jax.config.load import load, to_dict
from voco_jax.data.cache import Cache
from voco_jax.errors import InputError
from voco_jax.report import page as report
from voco_jax.report.embedding_map import nearest_cells, project
from voco_jax.report.images import spread
from voco_jax.report.page import main, render
from voco_jax.report.results import confusion, segmentations
from voco_jax.report.run import read_run
from voco_jax.report.series import read_metrics
from voco_jax.report.svg import Curve, plot, thin
from voco_jax.report.volumes import summarise_source
from voco_jax.training import distributed, loop

NOW = 1_800_000_000.0
HOSTILE = "<script>alert('1')</script>\"&<img src=x onerror=alert(1)>"
VOID = {"meta", "img", "br", "hr", "input", "link"}


class Page(HTMLParser):
    """Reads strictly: every element is closed, in order; keeps what tests ask for."""

    def __init__(self, text):
        super().__init__()
        self.stack, self.elements, self.words, self.rows = [], [], [], {}
        self._row = None
        assert text.startswith("<!DOCTYPE html>")
        self.feed(text)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag, attributes):
        names = [name for name, _ in attributes]
        assert len(names) == len(set(names)), (tag, names)
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.stack.append(tag)
        if tag == "tr":
            tables = [a.get("id") for t, a in self.elements if t == "table"]
            self._row = self.rows.setdefault(tables[-1], [])
            self._row.append([])
        elif tag in ("td", "th") and self._row is not None:
            self._row[-1].append("")
        elif tag == "data" and self._row and self._row[-1]:
            self._row[-1][-1] = dict(attributes)["value"]

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.stack, f"</{tag}> closes nothing"
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if self.stack and self.stack[-1] in ("td", "th") and self._row and self._row[-1]:
            self._row[-1][-1] += data
        if not self.stack or self.stack[-1] not in ("script", "style"):
            self.words.append(data)

    @property
    def text(self):
        return " ".join("".join(self.words).split())

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def make(folder, steps=40, total=40, lines="", **changes):
    """A workdir as a run leaves it; changes: settings by dotted name, "." written as "__"."""
    folder.mkdir(parents=True)
    overrides = {name.replace("__", "."): value for name, value in changes.items()}
    experiment = load("configs/demo.py", {"total_steps": str(total), **overrides}, str(folder))
    (folder / "config.json").write_text(json.dumps(to_dict(experiment)), "utf-8")
    generator = np.random.default_rng(steps)
    with (folder / "metrics.jsonl").open("w", encoding="utf-8") as file:
        for step in range(1, steps + 1):
            loss, rate = generator.uniform(0.1, 1, 2).tolist()
            values = {"loss": loss, "pos": loss / 2, "learning_rate": rate * 1e-5}
            values |= {"volumes_per_second": 0.5}
            file.write(json.dumps({"step": step, **values}) + "\n")
            if step % 10 == 0:
                found = {"validation/position_accuracy": step / 100, "validation/chance": 1 / 9}
                file.write(json.dumps({"step": step, **found}) + "\n")
        file.write(lines)
    return folder


def draw(path, size=(60, 40), seed=0):
    path.parent.mkdir(exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8)
    Image.fromarray(noise).save(path)


def numbers(text):
    """Metric -> value and step of each run, of the page's table."""
    _, *rows = Page(text).rows["numbers"]
    return {row[0]: row[1:] for row in rows}


def test_its_numbers_are_those_of_the_metrics(tmp_path):
    folder = make(tmp_path / "run")
    last = {}
    for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines():
        row = json.loads(line)
        last |= {name: [repr(value), str(row["step"])] for name, value in row.items()}
    del last["step"]
    shown = numbers(render([folder], NOW))
    for name, (value, step) in last.items():
        assert shown[name][0].startswith(value)  # of <data>, then what is shown of it
        assert shown[name][1] == step
    assert shown.keys() == last.keys()


def test_curves_are_drawn_where_the_values_are():
    steps = np.arange(10, 110, 10)
    for logarithmic in (False, True):
        values = np.geomspace(0.02, 5, 10)
        curve = Curve("loss", (steps, values), 0)
        svg = str(plot([curve], "Loss", steps=200, logarithmic=logarithmic))
        at = {name: float(value) for name, value in re.findall(r'data-(\w+)="([-\d.e]+)"', svg)}
        points = re.search(r'points="([^"]+)"', svg)[1]
        x, y = np.array([pair.split(",") for pair in points.split()], float).T
        share = (at["bottom"] - y) / (at["bottom"] - at["top"])
        found = at["y0"] + share * (at["y1"] - at["y0"])
        if logarithmic:
            found = at["y0"] * (at["y1"] / at["y0"]) ** share
        np.testing.assert_allclose(found, values, rtol=0.01)
        shown = (x - at["left"]) / (at["right"] - at["left"]) * at["x1"]
        np.testing.assert_allclose(shown, steps, atol=0.1)
        assert at["x1"] == 200


def test_what_cannot_be_drawn_is_left_out():
    values = np.array([np.nan, 1.0, np.inf, 2.0, -np.inf])
    svg = str(plot([Curve("loss", (np.arange(5), values), 0)], "Loss", steps=5))
    assert len(re.search(r'points="([^"]+)"', svg)[1].split()) == 2
    assert "nan" not in svg
    assert "inf" not in svg
    for constant in (0.0, 3.0, 1e-30, -2.0, 1e12):
        assert "nan" not in str(
            plot([Curve("a", (np.arange(3), np.full(3, constant)), 0)], "a", steps=3)
        )


@pytest.mark.parametrize("count", [1, 3, 500, 503, 20_000])
def test_thinning_keeps_the_ends_and_every_extreme(count, generator):
    values = generator.normal(size=count)
    spikes = generator.integers(0, count, 3)
    values[spikes] = [99, -99, 50]
    kept = thin(values)
    assert kept[0] == 0
    assert kept[-1] == count - 1
    assert (np.diff(kept) > 0).all()
    assert len(kept) <= 502
    # Beside every point, at most a part away, one is drawn that is as large, and one as small.
    near = 2 * (count // 250 + 1) + 1
    for sign in (1, -1):
        drawn = np.full(count, -np.inf)
        drawn[kept] = sign * values[kept]
        assert (maximum_filter1d(drawn, near) >= sign * values).all()


def test_it_loads_nothing(tmp_path):
    folder = make(tmp_path / "run")
    draw(folder / "pictures" / "positions_0000040.png")
    text = render([folder], NOW)
    page = Page(text)
    sources = [a[n] for _, a in page.elements for n in ("src", "href", "action", "data") if n in a]
    assert sources
    assert all(re.match(r"#[a-z]+$|data:image/png;base64,", source) for source in sources)
    for tag in ("link", "iframe", "object", "embed", "form", "base", "use", "image"):
        assert not page.all(tag)
    style, script = (re.search(rf"<{t}>(.*?)</{t}>", text, re.S)[1] for t in ("style", "script"))
    assert not re.search(r"url\(|@import|https?:", style)
    assert not re.search(r"fetch|XMLHttp|import|https?://(?!www.w3.org/2000/svg)", script)
    # Inline handlers and styles would be refused: none are there.
    assert not [a for _, a in page.elements for name in a if name == "style" or name[:2] == "on"]
    (policy,) = [a["content"] for a in page.all("meta") if "http-equiv" in a]
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert "unsafe" not in policy
    for kind, content in (("style", style), ("script", script)):
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy


def test_hostile_names_are_text(tmp_path):
    name = HOSTILE.replace("/", "_")
    cache = fill(tmp_path / "cache", {0: {"id": HOSTILE}}, count=3)
    changes = {"data.sources.ct.cache": cache.path}
    line = json.dumps({"step": 40, HOSTILE: 1.0, f"validation/{HOSTILE}": 0.5})
    folder = make(tmp_path / name, lines=line, **changes)
    event = {"time": HOSTILE, "step": 5, "event": "finding", "kind": HOSTILE, "text": HOSTILE}
    stop = {"time": "now", "step": 5, "event": "stopped", "reason": HOSTILE}
    lines = "".join(json.dumps(one) + "\n" for one in (event | {"advice": HOSTILE}, stop))
    (folder / "events.jsonl").write_text(lines, "utf-8")
    (folder / "volumes.json").write_text(
        json.dumps({"ct": {"training": {HOSTILE: ""}, "held_out": {}}}), "utf-8"
    )
    (tmp_path / "cache" / "failures.jsonl").write_text(
        json.dumps({"id": HOSTILE, "reason": HOSTILE}), "utf-8"
    )
    (folder / "a.pt.json").write_text(json.dumps({"file": HOSTILE}), "utf-8")
    (folder / "environment.json").write_text(json.dumps({"devices": HOSTILE}), "utf-8")
    (folder / "logs").mkdir()
    (folder / "logs" / "process_0.log").write_text(HOSTILE, "utf-8")
    vectors = np.eye(6, 4, dtype=np.float32)
    cells = np.array([(i, 0, 0) for i in range(3)] * 2, np.int32)
    np.savez(
        folder / "embeddings.npz",
        embeddings=vectors,
        cells=cells,
        volumes=np.array([HOSTILE] * 3 + ["b"] * 3),
        step=40,
    )
    text = render([folder, make(tmp_path / "other")], NOW)
    page = Page(text)
    assert len(page.all("script")) == 1
    assert not [a for a in page.all("img") if "onerror" in a or not a["src"].startswith("data:")]
    assert page.text.count(HOSTILE) > 10
    assert {name, HOSTILE} <= {part.strip() for part in page.words}


def test_what_a_run_says_of_itself(tmp_path):
    folder = make(tmp_path / "run", steps=20)
    assert "not running" in Page(render([folder], NOW)).text

    lock = folder / "run.lock"
    lock.write_text("{}", "utf-8")
    running = read_run(folder, lock.stat().st_mtime + 10)
    assert (running.state, running.step, running.total) == ("running", 20, 40)
    assert running.seconds_left == 20 * 1 / 0.5  # steps, volumes a step, volumes a second
    assert "About 40 seconds left" in Page(render([folder], lock.stat().st_mtime + 10)).text
    assert read_run(folder, lock.stat().st_mtime + 1000).state == "lost"
    lock.write_text("", "utf-8")

    failed = {"time": "t", "step": 20, "event": "failed", "reason": "loss is not finite"}
    (folder / "events.jsonl").write_text(json.dumps(failed) + "\n", "utf-8")
    assert read_run(folder).state == "failed"
    assert "failed: loss is not finite" in Page(render([folder], NOW)).text
    assert read_run(make(tmp_path / "done")).state == "finished"


def test_findings_are_told_once_with_their_advice(tmp_path):
    folder = make(tmp_path / "run")
    found = [
        {"step": step, "event": "finding", "kind": kind, "text": f"{kind} {step}", "advice": "do"}
        for step, kind in ((10, "data_bound"), (20, "chance"), (30, "data_bound"))
    ]
    marks = [{"step": 12, "event": "stopped"}, {"step": 11, "event": "resumed"}]
    marks += [{"step": 35, "event": "resolved", "kind": "data_bound"}]
    lines = [json.dumps({"time": "t", **event}) for event in found + marks]
    (folder / "events.jsonl").write_text("\n".join([*lines, '{"time": "t", "st']), "utf-8")
    text = render([folder], NOW)
    words = Page(text).text
    assert "data bound data_bound 30" in words
    assert "Since step 10, last said at step 30; no longer so since step 35." in words
    assert "Found at step 20." in words
    assert words.index("chance 20") < words.index("data_bound 30")  # what holds comes first
    assert text.count('class="advice"') == 1
    assert "data_bound 10" not in words
    assert "resumed at step 11" in words
    charts = text.count('class="plot"')
    assert charts > 3
    assert text.count('class="mark"') == 2 * charts


def test_a_run_that_has_just_begun(tmp_path):
    folder = make(tmp_path / "run", steps=0)
    for _ in range(2):
        page = Page(render([folder], NOW))
        assert "No numbers yet" in page.text
        assert "Curves" not in page.text
        (folder / "metrics.jsonl").unlink(missing_ok=True)


def test_half_written_lines_are_left_out(tmp_path):
    good = '{"step": 41, "loss": 0.125, "note": "a", "flag": true}\n'
    bad = '[1]\n"a"\n{"step": "a", "loss": 9}\n{"loss": 9}\n{"step": 50, "loss": [9]}\n'
    folder = make(tmp_path / "run", lines=good + bad + '{"step": 42, "loss": 0.')
    series = read_metrics(folder / "metrics.jsonl")
    assert (series["loss"][0][-1], series["loss"][1][-1]) == (41, 0.125)
    assert "note" not in series
    assert "flag" not in series
    assert len(series["loss"][0]) == 41


def test_steps_that_were_done_again_count_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [(1, 0.5), (2, 0.4), (3, 0.3), (2, 0.25), (3, 0.2), (4, 0.1)]
    path.write_text("".join(json.dumps({"step": s, "loss": v}) + "\n" for s, v in rows), "utf-8")
    steps, values = read_metrics(path)["loss"]
    assert steps.tolist() == [1, 2, 3, 4]
    assert values.tolist() == [0.5, 0.25, 0.2, 0.1]


def test_files_of_a_strange_shape_stop_nothing(tmp_path):
    """Each value of a small file is once taken away and once exchanged for something else."""
    junk = itertools.cycle([None, "x", [[]], {"a": 1}, "\ud800", 10**30])
    folder = make(tmp_path / "run", steps=10)
    found = {"mean": 0.5, "interval": [0.1, 0.9], "cases": 2}
    contents = {
        "cases.json": {"cases": [{"id": "a", "reference": "b", "probabilities": {"b": 1.0}}]},
        "volumes.json": {"ct": {"training": {"a": ""}}},
        "environment.json": {"devices": "1 cpu", "versions": {"jax": "1"}},
        "events.jsonl": {"step": 3, "event": "finding", "kind": "flat", "text": "a", "advice": ""},
        "evaluation/summary.json": {
            "how": {},
            "classes": {"liver": {"dice": found}},
            "mean": {"dice": found},
            "cases": {"evaluated": 2, "left_out": 0},
        },
    }
    (folder / "evaluation").mkdir()
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content), "utf-8")
    Page(render([folder], NOW))
    for name, content in contents.items():
        for place in places(content):
            for other in ("without", next(junk)):
                (folder / name).write_text(json.dumps(exchange(content, place, other)), "utf-8")
                render([folder], NOW).encode()
        (folder / name).write_text(json.dumps(content), "utf-8")


def places(value, path=()):
    for key in value if isinstance(value, dict) else range(len(value)):
        yield (*path, key)
        if isinstance(value[key], dict | list):
            yield from places(value[key], (*path, key))


def exchange(value, path, junk):
    value = value.copy()
    if len(path) > 1:
        value[path[0]] = exchange(value[path[0]], path[1:], junk)
    elif junk == "without":
        del value[path[0]]
    else:
        value[path[0]] = junk
    return value


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (None, b"", "no such folder"),
        ("notes.txt", b"hello", "found no config.json"),
        ("config.json", b"[1]", "cannot be read"),
        ("config.json", b"\xff\x00", "cannot be read"),
        ("metrics.jsonl", b"\x00\xff\n" * 9, "none of its 9 lines is a JSON object"),
    ],
)
def test_what_is_no_workdir_is_one_error(tmp_path, capsys, file, content, message):
    folder = tmp_path / "run"
    if file == "metrics.jsonl":
        make(folder)
    if file:
        folder.mkdir(exist_ok=True)
        (folder / file).write_bytes(content)
    assert main([str(folder)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {folder}: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (folder / "report.html").exists()


def test_damaged_files_beside_the_numbers_are_noted(tmp_path):
    folder = make(tmp_path / "run", **{"data.sources.ct.cache": str(tmp_path / "cache")})
    (tmp_path / "cache").mkdir()
    (folder / "evaluation").mkdir()
    names = ["volumes.json", "cases.json", "environment.json", "embeddings.npz", "a.pt.json"]
    names += ["evaluation/summary.json", "pictures/positions_0000010.png"]
    (folder / "pictures").mkdir()
    for name in names:
        (folder / name).write_bytes(b'{"classes": 3, \x00')
    words = Page(render([folder], NOW)).text
    for name in names:
        assert f"{name}: cannot be read" in words
    assert "The cache cannot be read" in words


def test_runs_side_by_side(tmp_path):
    one = make(tmp_path / "one")
    two = make(tmp_path / "two", steps=30, total=50, optimizer__learning_rate="0.003")
    other = make(tmp_path / "more" / "two", checkpoint__keep="7", data__phantoms="9")
    text = render([one, two, other], NOW)
    page = Page(text)
    head, *rows = page.rows["differences"]
    assert [name.strip() for name in head] == ["setting", "one", f"{tmp_path.name}/two", "more/two"]
    table = {row[0]: row[1:] for row in rows}
    assert table == {
        "total_steps": ["40", "50", "40"],
        "optimizer.learning_rate": ["0.001", "0.003", "0.001"],
        "data.phantoms": ["40", "40", "9"],
    }
    assert "checkpoint.keep" in page.text  # among those that change no number
    assert "export_to" in page.text
    shown = numbers(text)["loss"]
    for place, run in enumerate((one, two, other)):
        last = read_metrics(run / "metrics.jsonl")["loss"]
        assert shown[2 * place].startswith(repr(float(last[1][-1])))
        assert shown[2 * place + 1] == str(last[0][-1])
    labels = re.findall(r'<g class="(c\d)" data-label="([^"]+)"', text)
    assert len({label for _, label in labels}) == len({colour for colour, _ in labels}) == 3
    assert all(labels.count(pair) == len(labels) / 3 for pair in set(labels))
    assert text.count(">chance<") == 1
    with pytest.raises(InputError, match="found 19 workdirs, expected at most 18"):
        render([one] * 19, NOW)


def test_pictures_are_thinned_and_fit_into_the_page(tmp_path, monkeypatch):
    folders = [make(tmp_path / name) for name in "ab"]
    for folder in folders:
        for step in range(0, 40, 2):
            draw(folder / "pictures" / f"positions_{step:07d}.png", (90, 80), step)
    monkeypatch.setattr(report, "BUDGET", 40_000)
    page = Page(render(folders, NOW))
    sources = [image["src"].partition(",")[2] for image in page.all("img")]
    assert len(sources) == 8
    contents = [base64.b64decode(source) for source in sources]
    assert sum(map(len, contents)) <= 40_000
    assert all(Image.open(io.BytesIO(content)).width > 20 for content in contents)
    steps = [a["data-step"] for a in page.all("figure") if "data-step" in a]
    assert steps == ["0", "12", "26", "38"] * 2
    assert "4 of 20 pictures" in page.text


def test_what_is_spread():
    assert spread(range(5), 9) == [0, 1, 2, 3, 4]
    assert spread(range(100), 4) == [0, 33, 66, 99]
    assert spread("abc", 1) == ["c"]


def test_a_long_run_is_small(tmp_path):
    folder = make(tmp_path / "run", steps=30_000, total=100_000)
    text = render([folder], NOW)
    assert len(text) < 300_000
    Page(text)


def test_the_map_is_a_principal_component_analysis(generator):
    vectors = generator.normal(size=(40, 9)) * np.arange(1, 10)
    places, explained = project(vectors)
    theirs = sklearn.decomposition.PCA(2, svd_solver="full").fit(vectors)
    expected = theirs.transform(vectors)
    signs = np.sign((places * expected).sum(axis=0))
    np.testing.assert_allclose(places * signs, expected, atol=1e-9)
    assert explained == pytest.approx(theirs.explained_variance_ratio_.sum())
    assert project(np.ones((4, 3)))[1] == 0  # collapsed


def test_nearest_cells_are_counted_over_other_volumes(generator):
    vectors = generator.normal(size=(12, 5))
    cells = np.array([(i % 4, 0, 0) for i in range(12)])
    volumes = np.array(list("aaaabbbbcccc"))
    right, chances = [], []
    for i in range(12):
        others = [j for j in range(12) if volumes[j] != volumes[i]]
        cosines = [
            vectors[i] @ vectors[j] / np.linalg.norm(vectors[i]) / np.linalg.norm(vectors[j])
            for j in others
        ]
        right.append((cells[others[int(np.argmax(cosines))]] == cells[i]).all())
        chances.append(np.mean([(cells[j] == cells[i]).all() for j in others]))
    assert nearest_cells(vectors, cells, volumes) == pytest.approx(
        (np.mean(right), np.mean(chances))
    )
    assert nearest_cells(vectors, cells, np.array(["a"] * 12)) == (None, 0.0)


def test_tables_of_a_segmentation(tmp_path):
    folder = tmp_path / "run"
    make(folder, lines=json.dumps({"step": 40, "validation/dice_anterior": 0.5}) + "\n")
    experiment = load("configs/finetune_hippocampus.py", {}, str(folder))
    (folder / "config.json").write_text(json.dumps(to_dict(experiment)), "utf-8")
    cases = [
        {"id": f"case{n}", "dice": {"anterior": d, "posterior": None},
         "dice_resampled": {"anterior": d / 2, "posterior": 0.25}}
        for n, d in enumerate((0.8, 0.2, 0.5))
    ]  # fmt: skip
    (folder / "cases.json").write_text(json.dumps({"step": 40, "cases": cases}), "utf-8")
    found = segmentations(read_run(folder))
    first, second = found.classes
    assert (first.name, first.dice, first.resampled) == ("anterior", 0.5, pytest.approx(0.25))
    assert (first.cases, first.worst, first.lowest) == (3, "case1", 0.2)
    assert (second.dice, second.cases, second.worst) == (None, 0, "")
    assert [case.id for case in found.cases] == ["case1", "case2", "case0"]
    assert found.cases[0].dice == [0.2, None, 0.2]
    words = Page(render([folder], NOW)).text
    assert "case1" in words


def test_tables_of_a_classification(tmp_path, generator):
    folder = make(tmp_path / "run")
    names = ["benign", "malign", "none"]
    reference = generator.integers(0, 3, 30)
    shares = generator.dirichlet(np.ones(3), 30)
    cases = [
        {"id": str(n), "reference": names[r], "probabilities": dict(zip(names, p, strict=True))}
        for n, (r, p) in enumerate(zip(reference, shares.tolist(), strict=True))
    ]
    (folder / "cases.json").write_text(json.dumps({"step": 40, "cases": cases}), "utf-8")
    found = confusion(read_run(folder))
    expected = sklearn.metrics.confusion_matrix(reference, shares.argmax(axis=1))
    assert found.counts == expected.tolist()
    wrong = np.flatnonzero(reference != shares.argmax(axis=1))
    surest = max(wrong, key=lambda n: shares[n].max())
    assert found.wrong[0] == (
        str(surest), names[reference[surest]], names[shares[surest].argmax()], shares[surest].max(),
    )  # fmt: skip


def test_the_volumes_of_a_run(tmp_path):
    cache = fill(tmp_path / "cache", ODD)
    folder = make(tmp_path / "run", **{"data.sources.ct.cache": cache.path})
    ids = {entry.id: "" for entry in cache.entries}
    held_out = {"ct/000.nii": ids.pop("ct/000.nii")}
    parts = {"ct": {"training": ids, "held_out": held_out}}
    (folder / "volumes.json").write_text(json.dumps(parts), "utf-8")
    reasons = ["no image: empty", "unreadable: cut", "unreadable: short"]
    lines = [json.dumps({"id": f"f{i}", "path": "", "reason": r}) for i, r in enumerate(reasons)]
    (tmp_path / "cache" / "failures.jsonl").write_text("\n".join(lines), "utf-8")
    (tmp_path / "cache" / "set_aside.jsonl").write_text(
        json.dumps({"file": "scout.dcm", "reason": "localiser: 1 slice"}), "utf-8"
    )
    page = Page(render([folder], NOW))
    rows = [[cell.strip() for cell in row] for row in page.rows[None]]
    assert ["ct", "49", "1", "50", "3", "1", cache.path] in rows
    assert "Failed in ct: unreadable (2), no image (1)" in page.text
    assert ["scout.dcm", "localiser: 1 slice"] in rows
    shown = [a["alt"] for a in page.all("img")]
    assert len(shown) == 12
    assert {f"Three slices of ct/{slot:03d}.nii" for slot in ODD} == set(shown[: len(ODD)])
    assert "high z spacing: 10 mm (median 1.25 mm)" in page.text
    summary = summarise_source("ct", {"cache": "gs://bucket/cache"}, {}, 3, tmp_path)
    assert "object store" in summary.note  # which was not asked


def test_a_relative_cache_is_found_from_any_folder(tmp_path, monkeypatch):
    """The run was started in tmp_path, with --workdir runs/mine."""
    fill(tmp_path / "runs" / "mine" / "cache", {}, 3)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for name, count in (("runs/mine/cache", 3), ("runs/other/cache", None), ("", None)):
        settings, workdir = {"cache": name}, tmp_path / "runs" / "mine"
        summary = summarise_source("ct", settings, {}, 0, workdir)
        assert summary.cached == count
        assert (summary.note == "") == bool(count)


def test_of_a_cache_without_textures_only_what_is_drawn_is_read(tmp_path, monkeypatch):
    cache = fill(tmp_path / "cache", {}, 12)
    whole, read = Cache.read_whole, []

    def read_whole(self, entry):
        read.append(entry.id)
        return whole(self, entry)

    monkeypatch.setattr(Cache, "read_whole", read_whole)
    for most in (0, 1, 4):
        read.clear()
        shown = summarise_source("ct", {"cache": cache.path}, {}, most, tmp_path).thumbnails
        assert [one.id for one in shown] == read
        assert len(read) == most
        assert not any(one.reasons for one in shown)


def test_a_process_that_has_lost_the_others_writes_no_report(tmp_path, monkeypatch):
    def diverges(*_):
        raise loop.DivergedError("step 3: loss is not finite")

    def leave(status):
        raise SystemExit(status)

    made = []
    monkeypatch.setattr(loop, "run", diverges)
    monkeypatch.setattr(train, "_leave", leave)
    monkeypatch.setattr(train, "_write_report", made.append)
    monkeypatch.setattr(train.signals, "listen", lambda *_: None)
    flags = ["--config", "configs/demo.py", "--workdir", str(tmp_path)]
    for label, reports in (("process 0 of 2: ", []), ("", [str(tmp_path)])):
        monkeypatch.setattr(distributed, "label", lambda label=label: label)
        with pytest.raises(SystemExit, match="3"):
            train.main(flags)
        assert made == reports


def test_the_command(tmp_path, capsys, monkeypatch):
    folder = make(tmp_path / "run")
    assert main([str(folder)]) == 0
    assert capsys.readouterr().out.startswith(f"{folder}/report.html: 0.")
    first = (folder / "report.html").read_text("utf-8")
    assert "40" in numbers(first)["loss"]
    assert main([str(folder), "--output", str(tmp_path / "none" / "a.html")]) == 2
    assert "cannot write here" in capsys.readouterr().err
    assert main([]) == 2


def test_a_report_that_fails_harms_no_run(tmp_path, capsys, monkeypatch):
    folder = make(tmp_path / "run")
    train._write_report(str(folder))
    assert f"report: {folder}/report.html" in capsys.readouterr().out
    Page((folder / "report.html").read_text("utf-8"))

    def fails(*_):
        raise MemoryError("none left")

    monkeypatch.setattr(report, "write_report", fails)
    train._write_report(str(folder))
    assert "no report was written (MemoryError('none left'))" in capsys.readouterr().out
    log = (folder / "logs" / "process_0.log").read_text("utf-8")
    assert "none the worse" in log


@pytest.mark.scripts
@pytest.mark.skipif(not shutil.which("chromium"), reason="needs Chromium")
def test_a_browser_finds_nothing_wrong_and_would_find_it(tmp_path, capsys):
    render_reports = pytest.importorskip("robustness.render_reports")
    folder = make(tmp_path / "run")
    draw(folder / "pictures" / "positions_0000040.png", (1100, 300))
    good, bad = tmp_path / "good.html", tmp_path / "bad.html"
    text = render([folder, make(tmp_path / "other")], NOW)
    good.write_text(text, "utf-8")
    wrong = '<p class="wide"><img src="http://example.org/a.png" alt=""><script>1</script></p>'
    wide = f'<table><tr><td class="number">{"wide " * 400}</td></tr></table>'
    bad.write_text(text.replace("</main>", f"{wrong}{wide}</main>"), "utf-8")
    assert asyncio.run(render_reports.look_at_all([good], tmp_path)) == 0
    assert len(list(tmp_path.glob("0_good_*.png"))) == 4
    capsys.readouterr()
    assert asyncio.run(render_reports.look_at_all([bad], tmp_path)) > 0
    told = capsys.readouterr().out
    for what in ("console: ", "Content Security Policy", "scrolls sideways"):
        assert what in told
