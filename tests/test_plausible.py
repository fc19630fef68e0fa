"""What is a CT in HU, and what is none; real volumes of shared/ and changed ones."""

import dataclasses
import json

import nibabel
import numpy as np
import pytest
from chains import CHAIN_10K
from conftest import shared_file
from scans import body, save

from voco_jax.config.load import load as parse_file
from voco_jax.data.formats.readers import load
from voco_jax.data.phantom import make_phantoms
from voco_jax.data.plausible import doubt
from voco_jax.data.prepare import main
from voco_jax.data.volumes import VolumeError, orient_ras, prepare_volume

CHAIN = dataclasses.replace(CHAIN_10K, volume_size=(32, 24, 16))
PERCENTILES = dataclasses.replace(CHAIN, window_unit="percentile", window=(0.5, 99.5))


def doubts(source, chain=CHAIN):
    window = chain.window
    if chain.window_unit == "percentile":
        low, high = np.percentile(source.hounsfield(source.voxels), window).tolist()
        window = (low, max(high, low + 1))  # equal ones are refused before
    return doubt(source, window, chain)


def volumes(folder, pattern, least):
    found = sorted(shared_file(folder).glob(pattern))
    assert len(found) >= least
    return [load(path) for path in found]


def test_no_real_ct_is_doubted():
    """Of any orientation, dtype and padding; with any scanner's smallest value."""
    for source in [*volumes("ct", "images/*", 15), *volumes("sarcoma", "*CT_image*", 2)]:
        hu = source.hounsfield(source.voxels)
        for voxels in (
            source.voxels,
            source.voxels[::-1].transpose(2, 0, 1),
            hu.astype(np.float64),
            np.where(hu <= -1000, np.float32(-3024), hu),
            np.where(hu <= -1000, np.float32(-32768), hu),
            np.maximum(hu, -1000),
            np.minimum(hu, 1000),
            np.clip(hu, -175, 250),
        ):
            changed = dataclasses.replace(source, voxels=voxels, modality="CT")
            assert doubts(changed) == "", source.path
        wide = dataclasses.replace(CHAIN, window=(-1000.0, 1000.0))
        assert doubts(source, wide) == ""
        stored = dataclasses.replace(source, voxels=(hu + 1024) / 0.5, slope=0.5, intercept=-1024.0)
        assert doubts(stored) == ""


CHANGES = {
    "0..1": lambda hu: (hu + 1024) / 4095,
    "z-scores": lambda hu: (hu - hu.mean()) / hu.std(),
    "-1..1": lambda hu: np.clip(hu, -1000, 1000) / 1000,
    "0..255": lambda hu: np.clip((hu + 160) / 400, 0, 1) * 255,
    "0..4095": lambda hu: np.maximum(hu, -1024) + 1024,
    "0..4095, padded": lambda hu: np.where(hu <= -1024, -2000, hu + 1024),
    "intercept twice": lambda hu: hu - 1024,
    "upside down": lambda hu: -hu,
    "slope 1e30": lambda hu: hu * np.float32(1e30),
    "slope 1e-3": lambda hu: hu * np.float32(1e-3),
    "mask": lambda hu: hu > 100,
    "mask of 255": lambda hu: 255 * (hu > 100),
    "organs": lambda hu: np.digitize(hu, [-500, 0, 100, 300]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_ct_that_is_not_in_hu_is_doubted(change):
    for source in [*volumes("ct", "images/*", 15), *volumes("sarcoma", "*CT_image*", 2)]:
        changed = CHANGES[change](source.hounsfield(source.voxels))
        assert doubts(dataclasses.replace(source, voxels=changed)).startswith("not in HU: ")


def test_real_mr_and_segmentations():
    images = [*volumes("hippocampus", "images/*0.nii.gz", 10), *volumes("sarcoma", "*T1_im*", 2)]
    masks = [*volumes("ct", "labels/*", 11), *volumes("sarcoma", "*mask*", 4)]
    masks += volumes("hippocampus", "labels/*0.nii.gz", 10)
    for source in images + masks:
        assert doubts(source).startswith("not in HU: ")
    assert {doubts(source, PERCENTILES) for source in images} == {""}
    for source in masks:
        found = doubts(source, PERCENTILES)
        assert found.startswith(("a segmentation: ", "few grey values: ")), source.path


@pytest.mark.parametrize("modality", ["MR", "PT", "CR"])
def test_another_modality(tmp_path, modality):
    source = load(save(tmp_path / "a.nii", body()))
    assert doubts(source) == doubts(dataclasses.replace(source, modality="CT")) == ""
    other = dataclasses.replace(source, modality=modality)
    assert doubts(other).startswith(f"another modality: the file says {modality}, expected CT")
    assert doubts(other, PERCENTILES) == ""


def test_what_the_window_leaves(tmp_path):
    bone = dataclasses.replace(CHAIN, window=(400.0, 1800.0))
    source = load(save(tmp_path / "a.nii", body()))
    assert doubts(source, bone).startswith("few grey values: 1 are left of -1000 to ")
    hu = body()
    hu[5, 7:9, 4] = 500, 900  # as a window of bone leaves of the soft parts of a body
    assert doubts(load(save(tmp_path / "b.nii", hu)), bone) == ""
    mask = load(save(tmp_path / "c.nii", body() > 0))
    assert doubts(mask, PERCENTILES).startswith("few grey values: 2 are left of 0 to 1 after ")


def test_no_phantom_of_the_demos_is_doubted(tmp_path):
    for name, lesions in (("demo", False), ("finetune_lesion_demo", True)):
        make_phantoms(tmp_path / name, 6, 0, lesions=lesions)
        chain = parse_file(f"configs/{name}.py", {}, str(tmp_path)).data.sources["ct"].chain
        paths = sorted((tmp_path / name).rglob("*.nii.gz"))
        assert len(paths) == 6
        assert {doubts(load(path), chain) for path in paths} == {""}


def test_orientation_and_memory_change_nothing(tmp_path):
    sources = [load(save(tmp_path / f"{axes}.nii", body() + 1100, axes)) for axes in ("RAS", "PLI")]
    first, second = (doubts(orient_ras(source)) for source in sources)
    assert first == second != ""


def test_a_doubtful_volume_is_a_failure_unless_it_is_taken(tmp_path, capsys):
    data, cache = tmp_path / "data", tmp_path / "cache"
    data.mkdir()
    save(data / "ct.nii", body())
    save(data / "scaled.nii", (body() + 1000) / 2000, dtype=np.float32)
    nibabel.save(nibabel.load(save(tmp_path / "m.nii", body() > 50)), data / "liver.nii")
    with pytest.raises(VolumeError, match=r"not in HU: .*; if it is right .* --take-doubtful"):
        prepare_volume(data / "liver.nii", CHAIN)
    assert prepare_volume(data / "liver.nii", CHAIN, True).doubt.startswith("not in HU: ")

    command = ["--scan", str(data), "--cache", str(cache), "--size", "32", "24", "16"]
    command += ["--workers", "0"]
    assert main(command) == 0
    assert "1 prepared now, 0 already there, 2 failed" in (said := capsys.readouterr().out)
    assert "failed, not in HU: 2\n" in said
    assert main([*command, "--take-doubtful"]) == 0
    assert "2 prepared now, 1 already there, 0 failed" in (said := capsys.readouterr().out)
    assert "2 volumes of the cache are doubtful (--take-doubtful)\n" in said
    lines = [json.loads(line) for line in (cache / "manifest.jsonl").read_text().splitlines()]
    found = {line["id"]: line["doubt"][:10] for line in lines}
    assert found == {
        "data/ct.nii": "",
        "data/liver.nii": "not in HU:",
        "data/scaled.nii": "not in HU:",
    }
    assert main(command) == 0
    assert "0 prepared now, 3 already there, 0 failed" in capsys.readouterr().out
