"""prepare --exclude, --prune, --write-list, --dry-run."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from scans import body, save

from voco_jax.data.cache import Cache, CacheWriter, read_chain
from voco_jax.data.collect import scan
from voco_jax.data.datalists import read_list
from voco_jax.data.prepare import main
from voco_jax.data.tend import Exclusion, volume_of, write_list
from voco_jax.errors import InputError
from voco_jax.files import write_atomically
from voco_jax.report import page

FLAGS = ["--size", "24", "24", "16", "--workers", "0"]


@pytest.fixture
def data(tmp_path):
    """Six volumes, two of them in a folder."""
    folder = tmp_path / "data"
    (folder / "sub").mkdir(parents=True)
    for index in range(6):
        name = f"{index}.nii.gz" if index < 4 else f"sub/{index}.nii.gz"
        save(folder / name, body(seed=index))
    return folder


@pytest.fixture
def cache(data, tmp_path):
    assert main(["--scan", str(data), "--cache", str(tmp_path / "cache"), *FLAGS]) == 0
    return tmp_path / "cache"


def ids(cache):
    return [entry.id for entry in Cache.open(cache, read_chain(cache)).entries]


def listed(path, *lines):
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return str(path)


def names(*numbers):
    return [f"data/{n}.nii.gz" if n < 4 else f"data/sub/{n}.nii.gz" for n in numbers]


def test_excluded_volumes_are_not_prepared(data, tmp_path, capsys):
    lines = ["data/1.nii.gz", str(data / "2.nii.gz"), "data/sub/", "# a remark", "", "data/9.nii"]
    file = listed(tmp_path / "out.txt", *lines)
    flags = ["--scan", str(data), "--cache", str(tmp_path / "c"), "--exclude", file, *FLAGS]
    assert main(flags) == 0
    assert ids(tmp_path / "c") == names(0, 3)
    said = capsys.readouterr().out
    assert "asked for 2: 2 prepared now" in said
    assert "excluded: 4 volumes" in said
    assert f"{file}: 1 lines name no volume: data/9.nii\n" in said
    assert "6 files: 2 of volumes taken, 0 of failed ones, 4 of excluded ones, 0 set aside" in said
    lines = (tmp_path / "c/set_aside.jsonl").read_text("utf-8").splitlines()
    found = [json.loads(line) for line in lines]
    assert [one["file"] for one in found] == names(1, 2, 4, 5)
    assert found[0]["reason"] == f"excluded: by {file}"


@pytest.mark.parametrize(
    "text",
    [
        "page,id,reasons\n1,data/0.nii.gz,x\n1,data/3.nii.gz,\n",
        "data/0.nii.gz,x\ndata/3.nii.gz\n",
        "image\n0.nii.gz\n3.nii.gz\n",  # as a list's: below the root
    ],
)
def test_csv_names_volumes_by_its_column(tmp_path, data, text):
    path = tmp_path / "index.csv"
    path.write_text(text, "utf-8")
    exclude = Exclusion(path)
    assert [volume.id for volume in scan(data) if exclude.has(volume)] == names(0, 3)
    assert exclude.unused == []


def test_what_is_in_the_cache_stays_until_it_is_pruned(data, cache, tmp_path, capsys):
    file = listed(tmp_path / "out.txt", *names(1, 4))
    flags = ["--scan", str(data), "--cache", str(cache), "--exclude", file, *FLAGS]
    capsys.readouterr()
    assert main(flags) == 0
    said = capsys.readouterr().out
    assert "2 excluded volumes are in the cache, and training uses them: add --prune" in said
    assert "in none of the lists" not in said
    assert len(ids(cache)) == 6
    files = sorted(os.listdir(cache / "volumes"))
    assert main([*flags, "--dry-run", "--prune"]) == 0
    said = capsys.readouterr().out
    assert "--prune would take out: data/1.nii.gz\n--prune would take out: data/sub/4.nii" in said
    assert len(ids(cache)) == 6
    assert main([*flags, "--prune"]) == 0
    assert (
        "taken out of the cache: 2 volumes: data/1.nii.gz, data/sub/4.nii.gz; a run"
        in capsys.readouterr().out
    )
    assert ids(cache) == names(0, 2, 3, 5)
    # A run that began before reads them still, for 30 days.
    assert sorted(os.listdir(cache / "volumes")) == files
    with CacheWriter(cache, read_chain(cache)):
        pass
    assert sorted(os.listdir(cache / "volumes")) == files
    assert len(json.loads((cache / "unused.json").read_text("utf-8"))) == 2


def test_prune_takes_out_what_no_list_names_any_more(data, cache, capsys):
    shutil.rmtree(data / "sub")
    flags = ["--scan", str(data), "--cache", str(cache), *FLAGS]
    assert main(flags) == 0
    assert "2 volumes of the cache are in none of the lists given" in capsys.readouterr().out
    assert main([*flags, "--prune"]) == 0
    assert ids(cache) == names(0, 1, 2, 3)


def test_prune_refuses_what_is_hardly_meant(data, cache, tmp_path, capsys):
    for number in range(1, 4):
        (data / f"{number}.nii.gz").unlink()
    shutil.rmtree(data / "sub")
    flags = ["--scan", str(data), "--cache", str(cache), *FLAGS]
    assert main([*flags, "--prune"]) == 1
    said = capsys.readouterr().err
    assert "--prune: would take out 5 of 6 volumes (data/1.nii.gz, data/2.nii.gz," in said
    assert "if it is meant: --prune 5" in said
    assert len(ids(cache)) == 6
    assert main([*flags, "--prune", "4"]) == 1
    assert "expected at most 4" in capsys.readouterr().err
    assert main([*flags, "--prune", "5"]) == 0
    assert ids(cache) == names(0)
    # A disk that is not mounted: an empty folder is an error before anything is looked at.
    (data / "0.nii.gz").unlink()
    assert main([*flags, "--prune", "9"]) == 2
    assert "found no CT volume among 0 files" in capsys.readouterr().err
    # Another folder: all would go.
    save(data / "new.nii.gz", body())
    file = listed(tmp_path / "out.txt", "data")
    assert main(["--cache", str(cache), "--exclude", file, "--prune", "9"]) == 2
    assert "would take out all 1 volumes" in capsys.readouterr().err
    assert ids(cache) == names(0)


def test_prune_keeps_volumes_that_fail_now(data, cache):
    (data / "2.nii.gz").write_bytes(b"damaged since")
    assert main(["--scan", str(data), "--cache", str(cache), *FLAGS, "--prune"]) == 0
    assert ids(cache) == names(0, 1, 2, 3, 4, 5)


def test_a_cache_by_itself(cache, tmp_path, capsys):
    file = listed(tmp_path / "out.txt", *names(0, 5), "nothing")
    capsys.readouterr()
    assert main(["--cache", str(cache), "--exclude", file]) == 0
    said = capsys.readouterr().out
    assert "2 of 6 volumes are excluded; take them out with --prune" in said
    assert "1 lines name no volume: nothing" in said
    assert main(["--cache", str(cache), "--exclude", file, "--prune", "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith("data/0.nii.gz\ndata/sub/5.nii.gz\n")
    assert len(ids(cache)) == 6
    assert main(["--cache", str(cache), "--exclude", file, "--prune"]) == 0
    assert "2 volumes: data/0.nii.gz, data/sub/5.nii.gz; a run" in capsys.readouterr().out
    assert ids(cache) == names(1, 2, 3, 4)
    assert main(["--cache", str(cache), "--prune"]) == 2
    assert "nothing says which volumes are wanted" in capsys.readouterr().err


def test_what_was_pruned_stays_out(data, cache, tmp_path, capsys):
    file = listed(tmp_path / "out.txt", "data/1.nii.gz", str(data / "sub"))
    flags = ["--scan", str(data), "--cache", str(cache), *FLAGS]
    assert main([*flags, "--exclude", file, "--prune"]) == 0
    kept = cache / "excluded.txt"
    remark, *lines = kept.read_text("utf-8").splitlines()
    assert remark.startswith("# ")
    assert lines == names(1, 4, 5)
    file = listed(tmp_path / "out.txt", *names(0, 4))  # the cache by itself: added
    assert main(["--cache", str(cache), "--exclude", file, "--prune"]) == 0
    assert f"later runs leave them out: {kept}" in capsys.readouterr().out
    assert kept.read_text("utf-8").splitlines() == [remark, *names(1, 4, 5, 0)]
    assert main(flags) == 0
    said = capsys.readouterr().out
    assert ids(cache) == names(2, 3)
    assert "asked for 2: 0 prepared now, 2 already there" in said
    assert f"excluded: 4 volumes\n4 of them by {kept}, where --prune put them: delete a" in said
    last = (cache / "set_aside.jsonl").read_text("utf-8").splitlines()[-1]
    assert json.loads(last)["reason"] == f"excluded: by {kept}"
    # Of a file of this run only what that does not name counts as by the cache's.
    assert main([*flags, "--exclude", file]) == 0
    assert "excluded: 4 volumes\n2 of them by" in capsys.readouterr().out
    assert main([*flags, "--dry-run"]) == 0
    assert "2 volumes, 2 of them in the cache; 4 excluded" in capsys.readouterr().out
    assert main([*flags, "--write-list", str(tmp_path / "l.json")]) == 0
    assert "2 training, 0 validation" in capsys.readouterr().out
    kept.write_text("".join(f"{line}\n" for line in names(1, 4, 5)), "utf-8")
    assert main(flags) == 0
    assert ids(cache) == names(0, 2, 3)
    # A cache that is deleted but for it.
    for path in cache.iterdir():
        if path != kept:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert main(flags) == 0
    assert ids(cache) == names(0, 2, 3)
    capsys.readouterr()
    kept.write_text("data\n", "utf-8")
    assert main(flags) == 2
    assert f"all 6 are excluded (see also {kept})" in capsys.readouterr().err
    kept.write_bytes(b"\xff\n")
    assert main(flags) == 2
    assert f"{kept}: found bytes that are not UTF-8" in capsys.readouterr().err


def test_a_prune_that_is_refused_excludes_nothing(data, cache, tmp_path):
    file = listed(tmp_path / "out.txt", *names(0, 1))
    flags = ["--cache", str(cache), "--exclude", file, "--prune", "1"]
    assert main(flags) == 2
    assert main(["--scan", str(data), *flags, *FLAGS]) == 1
    assert main(["--scan", str(data), "--cache", str(cache), "--exclude", file, *FLAGS]) == 0
    assert not (cache / "excluded.txt").exists()


def test_a_list_of_a_scan_and_back(data, tmp_path, capsys):
    out = str(tmp_path / "list.json")
    assert main(["--scan", str(data), "--write-list", out]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{out}: 6 training, 0 validation; use it with --datalist {out} --root")
    assert json.loads(Path(out).read_text("utf-8")) == {
        "training": [{"image": name.removeprefix("data/")} for name in names(*range(6))],
        "validation": [],
    }
    assert read_list(out, data) == scan(data)
    flags = re.search(r"--datalist \S+ --root \S+", said)[0].split()
    assert main([*flags, "--cache", str(tmp_path / "c"), *FLAGS]) == 0
    assert ids(tmp_path / "c") == names(*range(6))


def test_a_list_of_a_cache_without_what_is_excluded(data, cache, tmp_path, capsys):
    first = tmp_path / "first.json"
    content = {"training": ["0.nii.gz", "sub/4.nii.gz"], "validation": [{"image": "1.nii.gz"}]}
    first.write_text(json.dumps(content), "utf-8")
    flags = ["--datalist", str(first), "--root", str(data), "--cache", str(tmp_path / "c")]
    assert main([*flags, *FLAGS]) == 0
    file, out = listed(tmp_path / "out.txt", *names(4)), str(tmp_path / "list.json")
    flags = ["--cache", str(tmp_path / "c"), "--exclude", file, "--write-list", out]
    assert main(flags) == 0
    assert "1 training, 1 validation" in capsys.readouterr().out
    assert json.loads(Path(out).read_text("utf-8")) == {
        "training": [{"image": "0.nii.gz"}],
        "validation": [{"image": "1.nii.gz"}],
    }


def test_labels_channels_and_folds_are_kept(tmp_path):
    root = tmp_path / "set"
    listed = tmp_path / "l.json"
    entry = {"image": ["a_t1.nii", "a_t2.nii"], "label": "labels/a.nii", "fold": 3}
    listed.write_text(json.dumps({"training": [entry], "validation": []}), "utf-8")
    how = {"labelled": True, "channels": ("t1", "t2")}
    volumes = read_list(listed, root, **how)
    write_list(volumes, tmp_path / "out.json", [])
    assert json.loads((tmp_path / "out.json").read_text("utf-8"))["training"] == [entry]
    assert read_list(tmp_path / "out.json", root, **how) == volumes
    for name in ("set", "other"):
        (tmp_path / name).mkdir()
        save(tmp_path / name / "x.nii", body())
    volumes = scan(root) + scan(tmp_path / "other")
    with pytest.raises(InputError, match=r"1 of 2 volumes are not below .*; a list has one root"):
        write_list(volumes, tmp_path / "out.json", [str(root)])


def test_links_keep_their_place_in_the_list(tmp_path, data):
    (data / "link.nii.gz").symlink_to(data / "sub/4.nii.gz")
    (data / "sub/5.nii.gz").unlink()
    volumes = [volume for volume in scan(data) if "sub" not in volume.id]
    write_list(volumes, tmp_path / "l.json", [])
    assert read_list(tmp_path / "l.json", data) == volumes


def test_bad_files(tmp_path, cache, capsys):
    (tmp_path / "empty.txt").write_text("# nothing\n\n", "utf-8")
    for name, words in (("none.txt", "cannot read"), ("empty.txt", "names nothing")):
        assert main(["--cache", str(cache), "--exclude", str(tmp_path / name)]) == 2
        assert words in capsys.readouterr().err
    (entry,) = Cache.open(cache, read_chain(cache)).entries[:1]
    assert volume_of(entry).id == entry.id
    with pytest.raises(InputError, match="found no volumes"):
        write_list([], tmp_path / "l.json", [])


@pytest.mark.parametrize("text", ['id\n"data/0.nii.gz\n' + "x" * 140_000, "id\rdata/0.nii.gz\r"])
def test_what_is_no_csv_is_one_error(tmp_path, cache, capsys, text):
    (tmp_path / "x.csv").write_bytes(text.encode())
    assert main(["--cache", str(cache), "--exclude", str(tmp_path / "x.csv")]) == 2
    assert f"{tmp_path / 'x.csv'}: not CSV (" in capsys.readouterr().err


def test_a_report_is_not_written_over_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(page, "render", lambda workdirs: "<html>")
    with pytest.raises(InputError, match=r"\.: cannot write here: this is a folder"):
        page.write_report([], Path("."))


def test_a_folder_is_no_file_to_write(tmp_path, data, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    for folder in (".", "..", "sub", "/"):
        assert main(["--scan", str(data), "--write-list", folder]) == 2
        said = capsys.readouterr().err
        assert f"{folder}: cannot write this list: this is a folder, expected a file" in said
        with pytest.raises(IsADirectoryError):
            write_atomically(Path(folder), "x")
    assert not list(tmp_path.glob("*.part"))
