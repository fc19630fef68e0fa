import json
import os

import pytest
from conftest import shared_file

from voco_jax.data.collect import collect, scan
from voco_jax.data.datalists import Volume, combine, read_list
from voco_jax.errors import InputError

# list -> (root folder, training, validation), as published
PUBLISHED = {
    "btcv.json": ("data/BTCV", 24, 6),
    "dataset_TCIAcovid19_0.json": ("data/TCIAcovid19", 722, 49),
    "dataset_LUNA16_0.json": ("data/Luna16-jx", 843, 45),
    "stoic21.json": ("data/stoic21", 2000, 0),
    "Totalsegmentator_dataset.json": ("data/Totalsegmentator_dataset", 1203, 0),
    "flare23.json": ("data/Flare23", 4000, 0),
    "HNSCC.json": ("data/HNSCC_convert_v1", 1071, 0),
}


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_published_lists_read_whole():
    for name, (root, training, validation) in PUBLISHED.items():
        volumes = read_list(shared_file("datalists", name), root)
        sections = [volume.section for volume in volumes]
        assert (sections.count("training"), sections.count("validation")) == (training, validation)
        assert all(volume.id.startswith(os.path.basename(root) + "/") for volume in volumes)
    lists = [shared_file("datalists", name) for name in PUBLISHED]
    volumes = collect(lists, [root for root, _, _ in PUBLISHED.values()])
    assert sum(volume.section == "training" for volume in volumes) == 9863
    assert len(volumes) == 9863 + 100


def test_entries_are_objects_or_paths_and_other_sections_are_left_aside(tmp_path):
    root = tmp_path / "BTCV"
    content = {
        "training": [{"image": "a/1.nii.gz", "label": "/elsewhere"}, "./2.nii"],
        "validation": ["3.nii.gz"],
        "test": ["/not/read"],
    }
    assert read_list(write(tmp_path / "l.json", content), root) == [
        Volume("BTCV/a/1.nii.gz", root / "a/1.nii.gz", "training"),
        Volume("BTCV/2.nii", root / "2.nii", "training"),
        Volume("BTCV/3.nii.gz", root / "3.nii.gz", "validation"),
    ]


def test_id_is_the_same_from_anywhere(tmp_path, monkeypatch):
    path = write(tmp_path / "l.json", {"training": ["1.nii"]})
    (tmp_path / "CT").mkdir()
    (tmp_path / "link").symlink_to("CT")
    monkeypatch.chdir(tmp_path / "CT")
    ids = {read_list(path, root)[0].id for root in (".", "../CT", "../link", tmp_path / "CT")}
    assert ids == {"CT/1.nii"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        (["1.nii"], "found a JSON list, expected a Decathlon list"),
        ({"train": []}, "found an object with the keys 'train', expected"),
        ({}, "with the keys none"),
        ({"training": {"image": "1.nii"}}, "training: found a JSON dict, expected a list"),
        ({"training": [3]}, r"training\[0\]: found 3, expected"),
        ({"training": [{"label": "1.nii"}]}, r"training\[0\]: found .*label"),
        ({"training": [{"image": ["1.nii", "2.nii"]}]}, r"training\[0\]: found"),
        ({"training": [""]}, r"training\[0\]: found"),
        ({"training": ["a\0b"]}, r"training\[0\]: found"),
        ({"training": [], "validation": []}, "found no volumes"),
    ],
)
def test_bad_lists(tmp_path, content, message):
    with pytest.raises(InputError, match=message):
        read_list(write(tmp_path / "list.json", content), tmp_path)


def test_missing_list(tmp_path):
    with pytest.raises(InputError, match=r"no\.json: cannot read this list: No such file"):
        read_list(tmp_path / "no.json", tmp_path)


@pytest.mark.parametrize(
    "image",
    [
        "/etc/passwd",
        "../x.nii",
        "a/../../x.nii",
        "a/../x.nii",
        "out/x.nii",
        "file.nii",
        ".",
        "out",
        "root/..",
        "./",
    ],
)
def test_paths_stay_under_the_root(tmp_path, image):
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "x.nii").touch()
    (root / "out").symlink_to(tmp_path)
    (root / "file.nii").symlink_to(tmp_path / "x.nii")
    with pytest.raises(InputError, match=r"training\[0\]: .* leads out of the root folder"):
        read_list(write(tmp_path / "l.json", {"training": [image]}), root)


def test_links_inside_the_root_are_followed(tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "a.nii").symlink_to("store/x.nii")
    volume = read_list(write(tmp_path / "l.json", {"training": ["a.nii"]}), tmp_path)[0]
    assert volume.path == tmp_path / "store/x.nii"
    assert volume.id == f"{tmp_path.name}/a.nii"


def test_scan(tmp_path):
    for name in ("b.nii.gz", "c/a.nii", "c/D.NII.GZ", "note.txt", ".part.nii"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    names = [volume.id.removeprefix(f"{tmp_path.name}/") for volume in scan(tmp_path)]
    assert names == ["b.nii.gz", "c/D.NII.GZ", "c/a.nii"]
    assert {volume.section for volume in scan(tmp_path)} == {"training"}


def test_scan_finds_every_format_once(tmp_path):
    dicom = bytes(128) + b"DICM"
    files = {
        "p/a.hdr": b"",
        "p/a.img": b"",
        "p/b.HDR.GZ": b"",
        "p/b.img.gz": b"",
        "p/alone.img": b"",
        "n/a.nrrd": b"",
        "n/b.nhdr": b"",
        "n/b.raw": b"",
        "n/b.raw.gz": b"",
        "m/a.mha": b"",
        "m/b.MHD": b"",
        "m/b.zraw": b"",
        "series/LICENSE": b"some text",
        "series/1.2.840.17": dicom,
        "series/1.2.840.18": dicom,
        "series/deep/I0001": dicom,
        "broken/1.dcm": b"",
        "cd/DICOMDIR": dicom,
        "plain/README": b"text" * 100,
        "plain/x.txt": dicom,
        ".git/a.nii": b"",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    os.mkfifo(tmp_path / "plain" / "PIPE")
    expected = ["broken", "m/a.mha", "m/b.MHD", "n/a.nrrd", "n/b.nhdr", "p/a.hdr", "p/alone.img"]
    expected += ["p/b.HDR.GZ", "series", "series/deep"]
    found = scan(tmp_path)
    assert [volume.id for volume in found] == [f"{tmp_path.name}/{name}" for name in expected]
    assert [volume.path for volume in found] == [tmp_path / name for name in expected]
    # A folder may be the series itself, and a list may name one.
    assert scan(tmp_path / "series")[0] == Volume("series/.", tmp_path / "series", "training")
    listed = read_list(
        write(tmp_path / "l.json", {"training": ["series/deep/", "p/a.hdr"]}), tmp_path
    )
    assert [volume.path for volume in listed] == [tmp_path / "series/deep", tmp_path / "p/a.hdr"]


def test_scan_and_links(tmp_path):
    root = tmp_path / "root"
    (root / "store").mkdir(parents=True)
    (root / "store" / "x").touch()
    (root / "a.nii").symlink_to("store/x")
    (root / "loop").symlink_to(root)
    volume = Volume("root/a.nii", root / "store/x", "training")
    assert scan(root) == [volume]
    (tmp_path / "link").symlink_to("root")
    assert scan(tmp_path / "link") == [volume]
    (root / "store" / "out.nrrd").symlink_to(tmp_path / "y.nrrd")
    with pytest.raises(InputError, match=r"store/out\.nrrd: this link leads out of the folder"):
        scan(root)


def test_scan_looks_into_few_files(tmp_path, monkeypatch):
    for index in range(50):
        (tmp_path / f"blob{index}").write_bytes(bytes(200))
    (tmp_path / "a.nii").touch()
    opened = []
    monkeypatch.setattr(
        "voco_jax.data.formats.dicom_files.is_dicom", lambda path: opened.append(path) or False
    )
    assert len(scan(tmp_path)) == 1
    assert len(opened) <= 3


def test_scan_of_nothing(tmp_path):
    with pytest.raises(InputError, match="found no CT volume"):
        scan(tmp_path)
    with pytest.raises(InputError, match="not a folder"):
        scan(tmp_path / "none")


def test_combine_keeps_each_volume_once(tmp_path):
    a = Volume("r/a", tmp_path / "a", "training")
    b = Volume("r/b", tmp_path / "b", "validation")
    other_id = Volume("s/a", tmp_path / "a", "training")
    assert combine([a, b, a, other_id, b]) == [a, b]


def test_combine_refuses_contradictions(tmp_path):
    a = Volume("r/a", tmp_path / "a", "training")
    with pytest.raises(InputError, match=r"two files have this id.*rename"):
        combine([a, Volume("r/a", tmp_path / "other", "training")])
    for id in ("r/a", "s/a"):
        with pytest.raises(InputError, match="held-out volume must not be trained on"):
            combine([a, Volume(id, tmp_path / "a", "validation")])


def test_collect_wants_one_root_or_one_a_list(tmp_path):
    lists = [write(tmp_path / f"{i}.json", {"training": [f"{i}.nii"]}) for i in range(3)]
    assert len(collect(lists, [tmp_path])) == 3
    with pytest.raises(InputError, match="found 2 root folders for 3 lists"):
        collect(lists, [tmp_path, tmp_path])
