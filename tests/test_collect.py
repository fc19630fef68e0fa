"""Folders as data sets come: what is a volume, what is not, and that every file is one of these."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import nibabel
import pytest
import SimpleITK
from chains import CHAIN_10K
from scans import body, save

from voco_jax.data.cache import Cache
from voco_jax.data.collect import collect, scan
from voco_jax.data.manifest import read_manifest
from voco_jax.data.prepare import main
from voco_jax.data.storage import Folder
from voco_jax.errors import InputError

LAYOUTS = {
    "TotalSegmentator": (
        ["s0000/ct.nii.gz", "s0001/ct.nii.gz"],
        ["s0000/segmentations/liver.nii.gz", "s0001/segmentations/lung_upper_lobe_left.nii.gz"],
        ["meta.csv"],
    ),
    "nnU-Net": (
        ["imagesTr/la_003_0000.nii.gz", "imagesTs/la_001_0000.nrrd"],
        ["labelsTr/la_003.nii.gz", "labelsTs/la_001.nrrd", "gt_segmentations/la_003.nii.gz"],
        ["dataset.json"],
    ),
    "Decathlon": (
        ["imagesTr/spleen_2.nii.gz", "imagesTs/spleen_1.nii.gz"],
        ["labelsTr/spleen_2.nii.gz"],
        ["dataset.json", "._dataset.json", "imagesTr/._spleen_2.nii.gz"],
    ),
    "AMOS": (["imagesVa/amos_1.nii.gz"], ["labelsVa/amos_1.nii.gz"], []),
    "BTCV": (["img/img0001.nii.gz"], ["label/label0001.nii.gz"], []),
    "LiTS": (["volume-0.nii"], ["segmentation-0.nii"], []),
    "CT-ORG": (["volume-0.nii.gz"], ["labels-0.nii.gz"], []),
    "KiTS": (["case_00000/imaging.nii.gz"], ["case_00000/segmentation.nii.gz"], ["kits.json"]),
    "VerSe": (["rawdata/sub-1_ct.nii.gz"], ["derivatives/sub-1_seg-vert_msk.nii.gz"], []),
    "SegTHOR": (["Patient_01/Patient_01.nii.gz"], ["Patient_01/GT.nii.gz"], []),
    "AbdomenCT-1K": (["Case_00001_0000.nii.gz"], ["Mask/Case_00001.nii.gz"], []),
    "AbdomenAtlas": (["B_1/ct.nii.gz"], ["B_1/combined_labels.nii.gz"], []),
    "ImageCAS": (["1.img.nii.gz"], ["1.label.nii.gz"], []),
    "3D-IRCADb": (["P1/PATIENT_DICOM/image_0.dcm"], ["P1/MASKS_DICOM/liver/image_0.dcm"], ["P1/i"]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(tmp_path, layout):
    images, masks, others = LAYOUTS[layout]
    for name in [*images, *masks, *others]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    aside = []
    found = {volume.id.partition("/")[2] for volume in scan(tmp_path, aside=aside)}
    assert found == {name.removesuffix("/image_0.dcm") for name in images}
    assert {name: why.partition(":")[0] for name, why in aside if name in masks} == dict.fromkeys(
        masks, "a segmentation"
    )
    assert sorted(name for name, _ in aside) == sorted(masks + others)
    everything = {volume.path for volume in scan(tmp_path, segmentations=True)}
    assert len(everything) == len(images) + len(masks)


@pytest.mark.parametrize(
    "name",
    [
        "unlabeled/ct.nii.gz",
        "masked_faces/a.nii",
        "segmented/ct_001.nii.gz",
        "CT_delta.nrrd",
        "agt/1.mha",
        "gtv_study/2.nii",
        "Maskell, John/ct.nii.gz",
    ],
)
def test_a_ct_is_not_taken_for_a_segmentation(tmp_path, name):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).touch()
    assert len(scan(tmp_path)) == 1


def test_a_folder_of_nothing_but_segmentations_is_told(tmp_path):
    (tmp_path / "labelsTr").mkdir()
    (tmp_path / "labelsTr" / "a.nii.gz").touch()
    with pytest.raises(InputError, match=r"among 1 files .* \(1 are named as segmentations: "):
        scan(tmp_path)
    assert len(scan(tmp_path / "labelsTr")) == 1  # the folder that was asked for


def test_every_file_is_a_volumes_or_set_aside(tmp_path):
    files = ["a.mhd", "a.raw", "b.hdr", "b.img", "c.nii.gz", "notes.txt", "raw/d.raw", ".x", "e"]
    files += ["series/1.dcm", "series/2.dcm", "series/README", "series/sub/f.nrrd"]
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    for suffix in ("mhd", "raw"):
        (tmp_path / f"a.{suffix}").unlink()
    SimpleITK.WriteImage(SimpleITK.Image(3, 3, 3, SimpleITK.sitkInt16), str(tmp_path / "a.mhd"))
    (tmp_path / "link").symlink_to("series")
    (tmp_path / ".git").mkdir()
    aside = []
    found = {v.id.partition("/")[2]: v.files for v in scan(tmp_path, aside=aside)}
    assert found == {"a.mhd": 2, "b.hdr": 2, "c.nii.gz": 1, "series": 3, "series/sub/f.nrrd": 1}
    assert sorted(aside) == [
        (".git", "hidden: its name begins with a dot"),
        (".x", "hidden: its name begins with a dot"),
        ("e", "no volume: a name without a suffix"),
        ("link", "a link to a folder: not followed"),
        ("notes.txt", "no volume: a name that ends in .txt"),
        ("raw/d.raw", "no volume: a name that ends in .raw"),
    ]
    assert sum(found.values()) + len(aside) == len(files) + 2


SIZE = ["--size", "32", "24", "16", "--workers", "0"]


def test_names_that_are_not_utf_8_are_failures_and_the_cache_stays_good(tmp_path, capsys):
    data, cache = tmp_path / "data", tmp_path / "cache"
    (data / "Patient M\udcfcller").mkdir(parents=True)
    for name in ("good.nii", "Patient M\udcfcller/ct.nii.gz", "b\udce4d.nii"):
        nibabel.save(nibabel.load(save(tmp_path / "x.nii", body())), data / name)
    for prepared in (1, 0):
        assert main(["--scan", str(data), "--cache", str(cache), *SIZE]) == 0
        assert f"{prepared} prepared now" in (said := capsys.readouterr().out)
        assert "failed, name not UTF-8: 2\n" in said
    failures = [json.loads(line) for line in (cache / "failures.jsonl").read_text().splitlines()]
    assert [one["id"] for one in failures] == [
        "data/Patient M\\xfcller/ct.nii.gz",
        "data/b\\xe4d.nii",
    ]
    assert main(["--verify", "--cache", str(cache)]) == 0
    assert main(["--scan", str(data), "--cache", f"{cache}\udcff", *SIZE]) == 2
    assert "a name that is not UTF-8: rename it" in capsys.readouterr().err


def test_a_cache_that_holds_such_a_name_can_be_opened(tmp_path):
    """As they were written before such names were refused."""
    save(tmp_path / "good.nii", body())
    cache = tmp_path / "cache"
    assert main(["--scan", str(tmp_path), "--cache", str(cache), *SIZE]) == 0
    manifest = cache / "manifest.jsonl"
    manifest.write_text(manifest.read_text().replace("good.nii", "M\\udcfcller.nii"))
    (found,) = read_manifest(Folder.at(cache)).values()
    assert found.id.endswith("/M\\xfcller.nii")
    chain = dataclasses.replace(CHAIN_10K, volume_size=(32, 24, 16))
    opened = Cache.open(cache, chain)
    assert opened.read(opened.entries[0]).shape == (32, 24, 16)


@pytest.mark.parametrize(
    "name",
    [
        "a b.nii",
        "new\nline.nii",
        "tab\t.nii",
        "q\"u'o.nii",
        "ü😀.nii",
        "50%#?.nii",
        "~.nii",
        "$a$.nii",
    ],
)
def test_odd_names_are_carried(tmp_path, name):
    save(tmp_path / name, body())
    cache = tmp_path / f"cache {name}"
    assert main(["--scan", str(tmp_path), "--cache", str(cache), *SIZE]) == 0
    (entry,) = read_manifest(Folder.at(cache)).values()
    assert entry.id == f"{tmp_path.name}/{name}"
    assert main(["--verify", "--cache", str(cache)]) == 0


def test_a_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "ct").mkdir()
    save(tmp_path / "ct" / "a.nii", body())
    (tmp_path / "list.json").write_text(json.dumps({"training": ["a.nii"]}))
    assert main(["--scan=~/ct", "--cache=~/cache", *SIZE]) == 0
    assert (tmp_path / "cache" / "cache.json").exists()
    (listed,) = collect(["~/list.json"], ["~/ct"])
    (scanned,) = scan("~/ct")
    assert listed.path == scanned.path == tmp_path / "ct" / "a.nii"


@pytest.mark.parametrize("name", ["a\\ud800.nii", "\\udcfc.nii"])
def test_a_list_with_what_is_no_text(tmp_path, name):
    (tmp_path / "list.json").write_text(f'{{"training": ["{name}"]}}')
    with pytest.raises(InputError, match=r'list.json: training\[0\]: found ".*", expected'):
        collect([tmp_path / "list.json"], [tmp_path])


def test_files_add_up_in_the_summary(tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    save(data / "a.nii", body())
    save(data / "b_seg.nii", body() > 0)
    (data / "c.nii").write_bytes(b"no")
    (data / "list.csv").touch()
    assert main(["--scan", str(data), "--cache", str(tmp_path / "c"), *SIZE]) == 0
    said = capsys.readouterr().out
    assert "set aside, a segmentation: 1 files\nset aside, no volume: 1 files\n" in said
    assert "4 files: 1 of volumes taken, 1 of failed ones, 2 set aside, each with its rea" in said
    lines = (tmp_path / "c" / "set_aside.jsonl").read_text().splitlines()
    assert json.loads(lines[0]) == {"file": "b_seg.nii", "reason": "a segmentation: by its name"}


@pytest.mark.scripts
def test_real_folders():
    """The short form of what docs/data.md records, dcm2niix beside us."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "robustness.real_folders", "--patients", "12"],
        cwd=Path(__file__).resolve().parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("12 patients, 11 volumes: 0 problems\n")
    for why in ("localiser", "no image", "no DICOM"):
        assert f"set aside, {why}: " in done.stdout
