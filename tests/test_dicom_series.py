"""Folders as PACS archives fill them: several series, and several volumes in a series."""

import json
import subprocess

import nibabel
import numpy as np
import pytest
from dcm2niix import bin as dcm2niix
from test_dicom import HU, PAGE, image_of, save, series

from voco_jax.data import jobs
from voco_jax.data.cache import Cache, read_chain
from voco_jax.data.collect import scan
from voco_jax.data.datalists import read_list
from voco_jax.data.formats.dicom_series import find_volumes, is_series
from voco_jax.data.formats.readers import VolumeError, file_signature, load
from voco_jax.data.prepare import main
from voco_jax.data.volumes import orient_ras
from voco_jax.evaluation.masks import find

FLAGS = ["--size", "24", "24", "16", "--workers", "0"]
SOFT = {"SeriesNumber": 3, "SeriesDescription": "Chest  B30f/1.25"}
BONE = {"SeriesNumber": 4, "SeriesDescription": "Chest BONE", "SeriesInstanceUID": "1.2.3.5"}
CORONAL = {
    "SeriesNumber": 501,
    "SeriesDescription": "MPR cor",
    "SeriesInstanceUID": "1.2.3.6",
    "ImageOrientationPatient": [1, 0, 0, 0, 0, -1],
    "ImageType": ["DERIVED", "SECONDARY", "MPR"],
}


def coronal(k):
    return CORONAL | {"ImagePositionPatient": [-30, 3.0 * k, 50]}


def dump(folder):
    """Three series, a dose page and a scout in one folder, their files mixed."""
    series(folder, lambda k: SOFT, "{}.a")
    for path in folder.iterdir():
        path.rename(path.with_suffix(""))
    for path in list(folder.iterdir()):
        path.rename(folder / f"IM{int(path.name):04}")
    series(folder, lambda k: BONE, "IM1{:03}")
    series(folder, coronal, "IM2{:03}")
    save(image_of(PAGE, "1.2.840.10008.5.1.4.1.1.7", "1.2.99"), folder / "IM3000")
    save(image_of(HU[..., 0].astype(np.uint16), series="1.2.98"), folder / "IM3001")
    return folder


def by_dcm2niix(folder, out):
    """The volumes in a folder by SeriesNumber, in RAS."""
    out.mkdir()
    subprocess.run([dcm2niix, "-b", "n", "-f", "%s", "-o", out, folder], capture_output=True)
    wanted = [path for path in out.iterdir() if path.stem in ("3", "4", "501")]
    made = {path.stem: nibabel.as_closest_canonical(nibabel.load(path)) for path in wanted}
    return {name: (image.get_fdata(dtype=np.float32), image.affine) for name, image in made.items()}


def test_each_series_is_as_dcm2niix_writes_it(tmp_path):
    folder = dump(tmp_path / "p")
    expected = by_dcm2niix(folder, tmp_path / "out")
    volumes, aside = find_volumes(folder)
    assert sorted(name for name, _ in aside) == ["IM3000", "IM3001"]
    assert [one.name.rpartition("-")[0] for one in volumes] == [
        "series-3-Chest_B30f_1.25",
        "series-4-Chest_BONE",
        "series-501-MPR_cor",
    ]
    for one in volumes:
        assert is_series(folder / one.name)
        found = orient_ras(load(folder / one.name))
        voxels, affine = expected[one.number]
        np.testing.assert_array_equal(found.hounsfield(found.voxels), voxels)
        np.testing.assert_allclose(found.affine, affine, atol=1e-4)
        assert not found.aside
    assert str(volumes[0]) == "3 Chest  B30f/1.25 (CT, 12 slices, 20x18, 2x2.5x3 mm)"
    assert [one.derived for one in volumes] == [False, False, True]


def test_names_are_those_of_before_when_series_come_and_go(tmp_path):
    names = [one.name for one in find_volumes(dump(tmp_path / "p"))[0]]
    for path in (tmp_path / "p").glob("IM1*"):
        path.unlink()
    assert [one.name for one in find_volumes(tmp_path / "p")[0]] == [names[0], names[2]]
    with pytest.raises(VolumeError, match=r"missing file: .* only series-3"):
        load(tmp_path / "p" / names[1])
    for path in (tmp_path / "p").glob("IM2*"):
        path.unlink()
    assert [one.name for one in find_volumes(tmp_path / "p")[0]] == ["."]  # as ever of one alone
    np.testing.assert_array_equal(load(tmp_path / "p").voxels, HU)
    np.testing.assert_array_equal(load(tmp_path / "p" / names[0]).voxels, HU)
    with pytest.raises(VolumeError, match=rf"missing file: .* only {names[0]}"):
        load(tmp_path / "p" / names[1])


def test_a_series_that_is_left_alone_is_the_volume_that_it_was(tmp_path, capsys):
    data, cache = tmp_path / "d", tmp_path / "c"
    data.mkdir()
    dump(data / "p")
    flags = ["--scan", str(data), "--cache", str(cache), *FLAGS]
    assert main(flags) == 0
    before = manifest(cache)
    for path in [*(data / "p").glob("IM1*"), *(data / "p").glob("IM2*")]:
        path.unlink()
    first = min(before)
    capsys.readouterr()
    assert main([*flags, "--dry-run", "--prune"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{first}: 3 Chest  B30f/1.25 (CT, 12 slices")
    assert "1 volumes, 1 of them in the cache" in said
    assert "--prune would take out 2 of 3 volumes" in said
    for prepared in (1, 0):  # its folder's files are others; then they are those
        assert main(flags) == 0
        assert f"asked for 1: {prepared} prepared now" in capsys.readouterr().out
        assert sorted(manifest(cache)) == sorted(before)
    assert manifest(cache)[first].checksum == before[first].checksum
    # By its name in a list and with its series chosen, too.
    listed = tmp_path / "l.json"
    listed.write_text(json.dumps({"training": [first.removeprefix("d/")], "validation": []}))
    flags = ["--datalist", str(listed), "--root", str(data), "--cache", str(cache), *FLAGS]
    for more in ([], ["--series", "b30f"]):
        assert main([*flags, *more]) == 0
        assert "asked for 1: 0 prepared now, 1 already there" in capsys.readouterr().out
    # Another series alone is another volume.
    for path in (data / "p").iterdir():
        path.unlink()
    series(data / "p", lambda k: SOFT | {"SeriesInstanceUID": "1.2.3.99"})
    assert main(["--scan", str(data), "--cache", str(cache), *FLAGS]) == 0
    assert sorted(manifest(cache)) == sorted(["d/p", *before])


def test_the_files_of_a_folder_are_looked_at_once(tmp_path, capsys, monkeypatch):
    data = tmp_path / "d"
    data.mkdir()
    dump(data / "p")
    series(data / "q")
    names = [one.name for one in find_volumes(data / "p")[0]]
    listed = tmp_path / "l.json"
    images = [*(f"p/{name}" for name in names), "q"]
    listed.write_text(json.dumps({"training": images, "validation": []}))
    flags = ["--datalist", str(listed), "--root", str(data), "--cache", str(tmp_path / "c"), *FLAGS]
    assert main(flags) == 0
    looks = []
    monkeypatch.setattr(
        jobs, "file_signature", lambda path: looks.append(path) or file_signature(path)
    )
    assert main(flags) == 0
    assert "0 prepared now, 4 already there" in capsys.readouterr().out
    assert len(looks) == 2
    (data / "p/IM0003").touch()
    assert main(flags) == 0
    assert "3 prepared now, 1 already there" in capsys.readouterr().out


def test_the_folder_itself_is_an_error_that_names_them(tmp_path):
    names = [one.name for one in find_volumes(dump(tmp_path / "p"))[0]]
    with pytest.raises(VolumeError, match="several series: 3 volumes in one folder") as caught:
        load(tmp_path / "p")
    assert all(name in str(caught.value) for name in names)


@pytest.mark.parametrize(
    ("tag", "values", "suffixes"),
    [
        ("EchoNumbers", (1, 2), ("echo_1", "echo_2")),
        ("TemporalPositionIdentifier", (1, 2), ("time_1", "time_2")),
        ("AcquisitionNumber", (7, 8), ("acquisition_7", "acquisition_8")),
        ("ConvolutionKernel", ("B30f", "B70f"), ("kernel_B30f", "kernel_B70f")),
    ],
)
def test_volumes_of_one_series(tmp_path, tag, values, suffixes):
    def change(k):
        return {tag: values[k % 2], "ImagePositionPatient": [-30, -20, 3.0 * (k // 2)]}

    folder = series(tmp_path / "p", change)
    volumes, _ = find_volumes(folder)
    assert [one.name.rpartition("-")[2] for one in volumes] == list(suffixes)
    for k, one in enumerate(volumes):
        np.testing.assert_array_equal(load(folder / one.name).voxels, HU[:, :, k::2])


def test_two_tags_tell_four_volumes_apart(tmp_path):
    def change(k):
        tags = {"EchoNumbers": 1 + k % 2, "AcquisitionNumber": 1 + k // 2 % 2}
        return tags | {"ImagePositionPatient": [-30, -20, 3.0 * (k // 4)]}

    folder = series(tmp_path / "p", change)
    for number, one in enumerate(find_volumes(folder)[0]):
        assert one.name.endswith(f"-acquisition_{1 + number // 2}_echo_{1 + number % 2}")
        first = 2 * (number // 2) + number % 2
        np.testing.assert_array_equal(load(folder / one.name).voxels, HU[:, :, first::4])


def manifest(cache):
    return {entry.id: entry for entry in Cache.open(cache, read_chain(cache)).entries}


def aside(cache):
    return [
        json.loads(line) for line in (cache / "set_aside.jsonl").read_text("utf-8").split("\n")[:-1]
    ]


def test_prepare_divides_folders_and_files_add_up(tmp_path, capsys):
    data, cache = tmp_path / "d", tmp_path / "c"
    data.mkdir()
    dump(data / "dump")
    series(data / "one")
    flags = ["--scan", str(data), "--cache", str(cache), *FLAGS]
    assert main(flags) == 0
    said = capsys.readouterr().out
    names = [one.name for one in find_volumes(data / "dump")[0]]
    found = manifest(cache)
    assert list(found) == [*(f"d/dump/{name}" for name in names), "d/one"]
    assert "asked for 4: 4 prepared now, 0 already there, 0 failed" in said
    assert "1 folders hold several DICOM series: taken as 3 volumes; --dry-run shows" in said
    assert "50 files: 48 of volumes taken, 0 of failed ones, 2 set aside" in said
    assert sorted(one["file"] for one in aside(cache)) == ["d/dump/IM3000", "d/dump/IM3001"]
    opened = Cache.open(cache, read_chain(cache))
    middle = [opened.read(entry).mean() for entry in opened.entries]
    assert middle[0] == middle[1] == middle[3] != middle[2]  # the coronal one
    assert len({entry.study for entry in opened.entries}) == 1 < len(opened.entries)
    assert "" not in {entry.study for entry in opened.entries}
    assert main(flags) == 0
    assert "asked for 4: 0 prepared now, 4 already there" in capsys.readouterr().out
    # A second series where there was one: the folder is a volume no more.
    series(data / "one", lambda k: BONE, "other{}")
    assert main(flags) == 0
    ids = sorted(manifest(cache))
    assert "d/one" not in ids
    assert sum(id.startswith("d/one/series-") for id in ids) == 2


def test_a_damaged_series_leaves_the_others(tmp_path, capsys):
    data, cache = tmp_path / "d", tmp_path / "c"
    data.mkdir()
    dump(data / "p")
    whole = (data / "p/IM1005").read_bytes()
    (data / "p/IM1005").write_bytes(whole[:-200])  # GDCM does not read its header either
    assert main(["--scan", str(data), "--cache", str(cache), *FLAGS]) == 0
    said = capsys.readouterr().out
    assert "2 prepared now, 0 already there, 1 failed" in said
    assert "38 files: 24 of volumes taken, 12 of failed ones, 2 set aside" in said
    (line,) = (cache / "failures.jsonl").read_text("utf-8").splitlines()
    found = json.loads(line)
    assert found["id"].startswith("d/p/series-4-Chest_BONE-")
    assert "(IM1005)" in found["reason"]
    (data / "p/IM1005").write_bytes(whole[:140])  # of no series: it may be of any
    assert main(["--scan", str(data), "--cache", str(tmp_path / "c2"), *FLAGS]) == 1
    assert "failed, unreadable: 1" in capsys.readouterr().err


def test_prune_keeps_series_whose_folder_cannot_be_read_now(tmp_path, capsys):
    data, cache = tmp_path / "d", tmp_path / "c"
    data.mkdir()
    dump(data / "p")
    series(data / "q")
    flags = ["--scan", str(data), "--cache", str(cache), *FLAGS]
    assert main(flags) == 0
    before = manifest(cache)
    (data / "p/IM0005").write_bytes(b"")
    capsys.readouterr()
    assert main([*flags, "--dry-run", "--prune"]) == 0
    assert "--prune would take out 0 of 4 volumes" in capsys.readouterr().out
    assert main([*flags, "--prune"]) == 0
    assert "failed, damaged slice: 1" in capsys.readouterr().out
    assert manifest(cache) == before


def test_series_are_chosen(tmp_path, capsys):
    data, cache = tmp_path / "d", tmp_path / "c"
    data.mkdir()
    dump(data / "p")
    series(data / "q", lambda k: BONE | {"SeriesInstanceUID": "1.2.3.77"})
    (data / "q/README").write_text("of the viewer")
    flags = ["--scan", str(data), "--cache", str(cache), *FLAGS]
    assert main([*flags, "--series", "^3 chest.*b30F"]) == 0
    assert [id.rpartition("-")[0] for id in manifest(cache)] == ["d/p/series-3-Chest_B30f_1.25"]
    said = capsys.readouterr().out
    assert "51 files: 12 of volumes taken, 0 of failed ones, 39 set aside" in said
    assert "set aside, a series not chosen: 36 files" in said
    assert main([*flags, "--series", "abdomen"]) == 2
    said = capsys.readouterr().err
    assert "--series: none of 4 volumes fits" in said
    assert "3 Chest  B30f/1.25; 4 Chest BONE; 501 MPR cor" in said
    assert main([*flags, "--series", "(chest"]) == 2
    assert "no regular expression" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rule", "wanted"), [("largest", "series-3-Thick"), ("thinnest", "series-4-Thin")]
)
def test_one_series_of_each_study(tmp_path, capsys, rule, wanted):
    """Original images before reformations, which have more and thinner slices."""
    data = tmp_path / "d"
    data.mkdir()
    series(data / "a", lambda k: {"SeriesNumber": 3, "SeriesDescription": "Thick"}, "A{}")
    thin = {"SeriesNumber": 4, "SeriesDescription": "Thin", "SeriesInstanceUID": "1.2.3.5"}

    def thinner(k):
        return thin | {"ImagePositionPatient": [-30, -20, 1.0 * k]}

    series(data / "a", thinner, "B{}")
    for k in (0, 1):
        (data / f"a/B{k}").unlink()
    series(data / "other folder", lambda k: coronal(k / 10) | {"SeriesInstanceUID": "1.2.3.9"})
    series(data / "other patient", lambda k: {"StudyInstanceUID": "1.2.9"})
    assert main(["--scan", str(data), "--dry-run", "--one-series", rule]) == 0
    said = capsys.readouterr().out
    listed = [line for line in said.splitlines() if line.startswith("d/")]
    assert [line.partition("-" if "series" in line else ":")[0] for line in listed] == [
        "d/a/series",
        "d/other patient",
    ]
    assert listed[0].startswith(f"d/a/{wanted}-")
    assert "2 volumes, 0 of them in the cache; 0 excluded" in said


@pytest.mark.parametrize("rule", ["largest", "thinnest"])
@pytest.mark.parametrize("wrong", ["damaged", "gap", "mixed"])
def test_one_series_is_one_that_can_be_read(tmp_path, capsys, rule, wrong):
    """Though the other is original, has more slices and thinner ones."""
    data = tmp_path / "d"
    data.mkdir()

    def thinner(k):
        size = {"PixelSpacing": [1, 1]} if wrong == "mixed" and k == 6 else {}
        return BONE | size | {"ImagePositionPatient": [-30, -20, 1.0 * k]}

    series(data / "a", thinner, "B{}")
    series(data / "a", coronal, "A{}")
    (data / "a/A0").unlink()
    if wrong == "damaged":
        (data / "a/B5").write_bytes((data / "a/B5").read_bytes()[:-200])
    elif wrong == "gap":
        (data / "a/A1").unlink()
        (data / "a/B5").unlink()
    flags = ["--scan", str(data), "--cache", str(tmp_path / "c"), "--one-series", rule, *FLAGS]
    assert main(flags) == 0
    assert [id.rpartition("-")[0] for id in manifest(tmp_path / "c")] == ["d/a/series-501-MPR_cor"]


def test_dry_run_shows_and_writes_nothing(tmp_path, capsys):
    data = tmp_path / "d"
    data.mkdir()
    dump(data / "p")
    assert main(["--scan", str(data), "--cache", str(tmp_path / "c"), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert ": 4 Chest BONE (CT, 12 slices, 20x18, 2x2.5x3 mm)\n" in said
    assert said.endswith("dry run: nothing was changed\n")
    assert not (tmp_path / "c").exists()


def test_lists_name_series_and_labelled_folders_are_not_divided(tmp_path):
    data = tmp_path / "d"
    data.mkdir()
    names = [one.name for one in find_volumes(dump(data / "p"))[0]]
    listed = tmp_path / "l.json"
    listed.write_text(json.dumps({"training": [f"p/{names[0]}"], "validation": [f"p/{names[1]}"]}))
    flags = ["--datalist", str(listed), "--root", str(data), "--cache", str(tmp_path / "c")]
    assert main([*flags, *FLAGS]) == 0
    assert {id: e.section for id, e in manifest(tmp_path / "c").items()} == {
        f"d/p/{names[0]}": "training",
        f"d/p/{names[1]}": "validation",
    }
    from voco_jax.data.series import divide

    (volume,) = scan(data)
    assert divide(volume) is not None
    listed.write_text(json.dumps({"training": [{"image": "p", "label": "m.nii"}]}))
    (labelled,) = read_list(listed, data, labelled=True)
    assert divide(labelled) is None


def test_a_series_has_changed_when_a_file_of_its_folder_has(tmp_path):
    folder = dump(tmp_path / "p")
    path = folder / find_volumes(folder)[0][0].name
    before = file_signature(path)
    (folder / "IM0003").write_bytes(b"x")
    assert file_signature(path) != before
    with pytest.raises(FileNotFoundError):
        file_signature(tmp_path / "none" / path.name)


def test_find_gives_every_series(tmp_path):
    folder = dump(tmp_path / "p")
    names = [one.name for one in find_volumes(folder)[0]]
    assert find(folder) == {name: folder / name for name in names}
    assert find(tmp_path) == {f"p/{name}": folder / name for name in names}
    assert list(find(tmp_path, series="bone")) == [f"p/{names[1]}"]
    assert find(folder / names[2]) == {names[2]: folder / names[2]}


def test_a_series_in_two_folders_is_told(tmp_path, capsys):
    """Half of it here, half there: each would be a volume."""
    data = tmp_path / "d"
    data.mkdir()
    series(data / "a")
    (data / "b").mkdir()
    for k in range(6, 12):
        (data / f"a/IM{k:04}").rename(data / f"b/IM{k:04}")
    assert main(["--scan", str(data), "--cache", str(tmp_path / "c"), *FLAGS]) == 0
    said = capsys.readouterr().out
    assert "2 volumes have a DICOM series that is in several folders (d/a, d/b ...)" in said
