"""README and docs/: every command parses or runs, links and names exist, spelling."""

import ast
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pages
import pytest
import yaml
from pages import PAGES, ROOT, blocks, prose
from PIL import Image

import voco_jax
from voco_jax.config import load
from voco_jax.data.crops import overlap_labels
from voco_jax.data.labels import prepare_labels
from voco_jax.data.phantom import make_phantoms
from voco_jax.data.volumes import prepare_volume
from voco_jax.report import method

BLOCKS = [block for page in PAGES for block in blocks(page)]
ALL_PAGES = [*PAGES, ROOT / "CHANGELOG.md"]
SHELL = ("sh", "bash")
# Of other projects; a block with any other program says what it needs.
FOREIGN = {"pip", "python", "pytest", "ruff", "mypy", "lint-imports", "tensorboard", "cd", "uv"}
FOREIGN_FLAGS = {
    "--logdir",
    "--shm-size",
    "--cpus-per-task",
    "--nthreads",
    "--preload",
    "--build-arg",
}


def test_blocks_say_what_becomes_of_them():
    silent = [str(b) for b in BLOCKS if b.language in (*SHELL, "python") and not b.mark]
    assert not silent, f"without <!-- runs --> or <!-- needs: ... -->: {silent}"
    languages = {block.language for block in BLOCKS}
    assert languages <= {*SHELL, "python", "json", "yaml", "bibtex", "", "text"}


def test_commands_parse():
    """By their own parsers, and with settings that exist; nothing is run."""
    wrong, ours = [], 0
    for block in (one for one in BLOCKS if one.language in SHELL):
        for words in pages.commands(block.text):
            try:
                known = pages.parse(words)
            except pages.Refused as error:
                wrong.append(f"{block}: {' '.join(words)}: {error}")
                continue
            ours += known
            if not known and words[0] not in FOREIGN and not block.mark.startswith("needs"):
                wrong.append(f"{block}: {words[0]}: not a command of this project")
    assert not wrong, "\n".join(wrong)
    assert ours > 20


def test_commands_in_the_text_parse():
    """Between backticks; what is left out of them may be required."""
    wrong = []
    for page in PAGES:
        for code in _codes(page):
            if not re.match(r"(python (-m )?[\w.]+|voco-\w+) .*--", code) or "..." in code:
                continue
            try:
                pages.parse(next(pages.commands(code)))
            except pages.Refused as error:
                if "arguments are required" not in str(error):
                    wrong.append(f"{page.name}: {code}: {error}")
    assert not wrong, "\n".join(wrong)


def test_refuses_what_is_wrong():
    """The checks above can fail."""
    for line in (
        "python -m voco_jax.nothing --x",
        "python -m voco_jax.plan --config configs/demo.py --topolgy cpu:1",
        "python main.py --config configs/demo.py --workdir r --config.nothing=1",
        "python main.py --config configs/demo.py --workdir r --config.batch_size=many",
        "python main.py --config configs/absent.py --workdir r",
        "python -m voco_jax.benchmark stp --config configs/demo.py",
        "voco-export --checkpoint r --nothing",
        "launch/absent.sh --config configs/demo.py",
    ):
        try:
            pages.parse(next(pages.commands(line)))
        except pages.Refused:
            continue
        pytest.fail(f"parsed: {line}")


def test_python_blocks_use_what_exists():
    """They compile, and what they import of the project and its `voco_jax.x` are there."""
    for block in (one for one in BLOCKS if one.language == "python"):
        for node in ast.walk(ast.parse(block.text)):
            if isinstance(node, ast.ImportFrom) and node.module:
                if node.module.split(".")[0] in ("voco_jax", "configs"):
                    module = importlib.import_module(node.module)
                    for alias in node.names:
                        found = hasattr(module, alias.name) or importlib.util.find_spec(
                            f"{node.module}.{alias.name}"
                        )
                        assert found, f"{block}: {node.module}.{alias.name}"
            elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "voco_jax":
                assert hasattr(voco_jax, node.attr), f"{block}: voco_jax.{node.attr}"


def test_config_blocks_are_configs():
    """A block with a get_config() is a complete config of its task."""
    found = [b for b in BLOCKS if b.language == "python" and "def get_config" in b.text]
    assert found
    for block in found:
        names: dict = {}
        exec(compile(block.text, str(block), "exec"), names)
        load.parse(names["get_config"]())


# ---- the preprocessing in MONAI


@pytest.mark.filterwarnings("ignore")
def test_monais_compose_is_our_chain(tmp_path):
    """The blocks of docs/monai.md as they stand, on phantoms, beside `prepare_volume`."""
    found = [b.text for b in BLOCKS if b.page.name == "monai.md" and "mt.Compose(" in b.text]
    features, finetuning = (_compose(text) for text in found)
    without = _compose(found[0].replace(", align_corners=True", ""))
    make_phantoms(tmp_path, 2, 0, (64, 64, 32), labelled=True)
    for image in sorted(tmp_path.glob("phantom_*.nii.gz")):
        chain = load.load(ROOT / "configs" / "voco_10k.py").data.sources["ct"].chain
        ours = prepare_volume(image, chain).voxels
        assert np.abs(features({"image": image})["image"].numpy()[0] - ours).max() < 1e-5
        assert np.abs(without({"image": image})["image"].numpy()[0] - ours).max() > 0.1

        chain = load.load(ROOT / "configs" / "finetune_btcv.py").data.sources["ct"].chain
        label = image.with_name(f"label_{image.name}")
        volume = prepare_volume(image, chain)
        theirs = finetuning({"image": image, "label": label})
        assert np.abs(theirs["image"].numpy()[0] - volume.voxels).max() < 1e-3
        ours = prepare_labels(label, chain, volume).voxels
        assert (theirs["label"].numpy()[0] == ours).mean() > 0.9999  # halves may be rounded apart


def _compose(text: str):
    names: dict = {}
    exec(text, names)
    return names["preprocess"]


def test_data_blocks_parse():
    for block in BLOCKS:
        if block.language == "json":
            json.loads(block.text)
        elif block.language == "yaml":
            assert yaml.safe_load(block.text)


# ---- links and names


def test_links_lead_somewhere():
    wrong = []
    for page in ALL_PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
            path, _, anchor = target.partition("#")
            if re.match(r"https?:", path):
                continue
            file = (page.parent / path).resolve() if path else page
            if not file.exists() or (anchor and anchor not in _anchors(file)):
                wrong.append(f"{page.name}: {target}")
    assert not wrong, wrong


def test_every_page_is_reachable_from_readme():
    readme = (ROOT / "README.md").read_text("utf-8")
    missing = [page.name for page in PAGES[1:] if page.name not in readme]
    assert not missing


def _anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ +(.*)$", prose(page), re.MULTILINE):
        anchor = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        count = sum(one == anchor or one.startswith(f"{anchor}-") for one in found)
        found.add(f"{anchor}-{count}" if anchor in found else anchor)
    return found


def _codes(page: Path) -> list[str]:
    """What stands between backticks."""
    return [re.sub(r"\s+", " ", code) for code in re.findall(r"`([^`]+)`", prose(page))]


def test_names_in_the_text_exist():
    """Files, modules, settings and flags; names with capitals stand for the reader's own."""
    files = {str(path.relative_to(ROOT)) for path in _sources()}
    files |= {str(p.relative_to(ROOT)) for p in ROOT.glob("*/**") if p.is_dir()}
    sources = "".join(p.read_text("utf-8") for p in _sources() if p.suffix in (".py", ".sh"))
    flags = set(re.findall(r"--[a-z][\w-]+", sources)) | FOREIGN_FLAGS
    wrong = []
    for page in PAGES:
        for code in _codes(page):
            for flag in re.findall(r"(?<![\w-])--[a-z][\w-]+(?![\w.-]*\.)", code):
                if flag not in flags and flag not in ("--config",):
                    wrong.append(f"{page.name}: {flag}")
            for name in re.findall(r"--config\.([\w.]+(?:\[\d\])?)", code):
                if not pages.is_setting(name) and name not in ("field", "section.field"):
                    wrong.append(f"{page.name}: --config.{name}")
            if not _exists(code, files):
                wrong.append(f"{page.name}: {code}")
    assert not wrong, wrong


SECTIONS = {name.split(".")[0] for name in pages.SETTINGS if "." in name} | {"chain"}


def _exists(code: str, files: set[str]) -> bool:
    """Whether a name is there; True for whatever is no name of the project's."""
    if " " in code:  # a command, or words
        return True
    if module := re.fullmatch(r"(voco_jax|comparisons|robustness)((\.\w+)+)", code):
        return _importable(code, module[1])
    dotted = re.fullmatch(r"[a-z_]+(\.[a-z_]+)+", code) and not code.endswith(".py")
    if dotted and code.split(".")[0] in SECTIONS:
        return pages.is_setting(code)
    path, _, name = code.partition(":")
    known = re.match(r"(voco_jax|configs|docs|tests|comparisons|robustness|launch)/", path)
    if not (known or re.search(r"\.(py|md|sh)$", path)) or re.search(r"[A-Z*{ ]{2}|mine\.py", path):
        return True
    path = path.rstrip("/")
    found = [one for one in files if one == path or one.endswith(f"/{path}")]
    if not found or not name or not path.endswith(".py"):
        return bool(found)
    return any(
        re.search(rf"\b{re.escape(name)}\b", (ROOT / one).read_text("utf-8")) for one in found
    )


def _importable(name: str, top: str) -> bool:
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        module = ".".join(parts[:count])
        try:
            if importlib.util.find_spec(module) is None:
                continue
        except ModuleNotFoundError:
            continue
        return count == len(parts) or hasattr(importlib.import_module(module), parts[count])
    return False


def _sources() -> list[Path]:
    """Text of the project, what git ignores left out."""
    folders = ("voco_jax", "configs", "docs", "tests", "comparisons", "robustness", "launch")
    kinds = {".py", ".md", ".sh", ".toml", ".txt", ".cff"}
    found = [path for path in ROOT.iterdir() if path.is_file()]
    found += [path for folder in folders for path in (ROOT / folder).rglob("*")]
    return [path for path in found if path.suffix in kinds]


def test_spelling():
    """Words that codespell knows as misspelt; those meant are in pyproject.toml."""
    done = subprocess.run(
        [sys.executable, "-m", "codespell_lib", *map(str, _sources())],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


# ---- pictures, citation


def test_readmes_picture_is_drawn_by_the_project(tmp_path):
    """docs/method.png is what the command draws; fonts may differ by a little."""
    assert method.main(["--output", str(tmp_path / "method.png")]) == 0
    drawn, kept = (
        np.asarray(Image.open(path).convert("RGB"), np.float32)
        for path in (tmp_path / "method.png", ROOT / "docs" / "method.png")
    )
    assert drawn.shape == kept.shape
    assert (np.abs(drawn - kept).max(axis=-1) > 30).mean() < 0.01


def test_the_picture_shows_the_overlaps():
    """The colour of each cell of the heat map is as strong as its overlap ratio."""
    grid, size, origin = (3, 2, 1), (32, 32, 16), (40, 10, 0)
    volume = np.zeros(np.multiply(grid, size), np.float32)
    picture = method.draw_method(volume, origin, grid=grid, crop_size=size).astype(int)
    overlaps = overlap_labels(np.array([origin]), grid, size)[0].reshape(grid[:2])
    scale = method._SIDE / 96
    for (i, j), share in np.ndenumerate(overlaps):
        column = 896 + (96 - 32 * (i + 1) + 4) * scale  # a corner of the cell, right to left
        row = method._TOP + (64 - 32 * (j + 1) + 4) * scale
        found = picture[int(row), int(column)]
        white = np.array([255, 255, 255])
        expected = white + 0.9 * share * (np.array([217, 72, 15]) - white)
        assert np.abs(found - expected).max() < 4, (i, j)


def test_citation():
    """Fields that version 1.2.0 of the format requires, and our version."""
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(found)
    assert found["cff-version"] == "1.2.0"
    cite = (ROOT / "docs" / "cite.md").read_text("utf-8")
    assert found["version"] == voco_jax.__version__
    assert f"version = {{{voco_jax.__version__}}}" in cite
    assert found["preferred-citation"]["title"].split(": ")[1] in cite
