"""Weight files that are damaged, hostile or something else."""

import io
import json
import pickle
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from weight_files import entry, safetensors, saved

from voco_jax.errors import InputError
from voco_jax.interop.files.weights import describe, read


class Bomb:
    """Pickles as a call of whatever it is given."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (Bomb(exec, "raise SystemExit(3)"), "builtins.exec"),
        (Bomb(bytearray, 10**12), "builtins.bytearray"),
        (Bomb(torch.Tensor, 10**6, 10**6), "torch.Tensor"),
        ({"state_dict": {"out.a": torch.ones(1)}, "best": np.float64(0.5)}, "numpy."),
        (torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
        ({"out.a": torch.ones(2, 2).to_sparse()}, "torch.serialization._get_layout"),
        ({"out.a": torch.ones(2, dtype=torch.complex64)}, "torch.ComplexFloatStorage"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_pickles_that_need_more_than_weights(tmp_path, content, found):
    path = saved(tmp_path, content)
    with pytest.raises(InputError, match="weights_only") as caught:
        read(path)
    assert found in str(caught.value)
    assert "torch.save" in str(caught.value)  # the fix


def test_expanded_tensor(tmp_path):
    bomb = torch.zeros(1).expand(10**6, 10**6)
    path = saved(tmp_path, {"out.a": bomb})
    with pytest.raises(InputError, match=r"claims shape \(1000000, 1000000\).*\.clone\(\)"):
        read(path)


def test_many_tensors_of_one_storage(tmp_path):
    base = torch.zeros(1000)
    path = saved(tmp_path, {f"out.{i}": base[:] for i in range(200)})
    with pytest.raises(InputError, match="claim 800000 bytes in all"):
        read(path)


def rewritten(path, change, **options):
    """The zip archive with its pickle or names changed."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    entries = change(entries)
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return path


def test_storage_that_claims_more_than_the_file_has(tmp_path):
    path = saved(tmp_path, {"out.a": torch.zeros(77)})
    big = b"K\x4d", b"\x8a\x05\x00\x00\x00\x00\x10"  # 77 -> 2**36 elements
    rewritten(path, lambda e: {k: v.replace(*big) for k, v in e.items()})
    with pytest.raises(InputError, match=f"claims {4 * 2**36} bytes, the file has 308"):
        read(path)


def pickled(folder, content):
    """A file of torch.save with another pickle."""
    path = saved(folder, {"out.a": torch.zeros(1)})
    return rewritten(path, lambda e: {k: content if "data.pkl" in k else v for k, v in e.items()})


DEEP = b")" + b"\x85" * 10**5  # a tuple in a tuple in a tuple


@pytest.mark.parametrize(
    "content",
    [
        b"}" + DEEP + b"K\x01s",
        b"}(" + DEEP + b"K\x01u",
        b"cbuiltins\nset\n](" + DEEP + b"e\x85R",
        b"ccollections\nCounter\n](" + DEEP + b"e\x85R",
    ],
    ids=["setitem", "setitems", "set", "counter"],
)
def test_keys_whose_hash_would_end_the_process(tmp_path, content):
    path = pickled(tmp_path, b"\x80\x02" + content + b".")
    with pytest.raises(InputError, match="neither text nor number"):
        describe(path)


@pytest.mark.parametrize(
    ("value", "function"),
    [
        (b"}(" + b"".join(b"M" + i.to_bytes(2, "little") + b"N" for i in range(1000)) + b"u", name)
        for name in (b"collections\nOrderedDict", b"collections\nCounter", b"torch\nSize")
    ]
    + [(b"X\xe8\x03\x00\x00" + b"a" * 1000, b"_codecs\nencode")],
)
def test_pickle_that_copies_one_value_many_times(tmp_path, value, function):
    copies = b"h\x01h\x00\x85R" * 2000
    content = b"\x80\x02" + value + b"q\x00c" + function + b"\nq\x01](" + copies + b"e."
    with pytest.raises(InputError, match=r"copies its values again|collections\.OrderedDict"):
        describe(pickled(tmp_path, content))


def test_state_whose_keys_would_end_the_process(tmp_path):
    """torch.load hashes the keys of an OrderedDict's state: a deep one is a segmentation fault."""
    state = b"](" + DEEP + b"K\x01\x86e"
    with pytest.raises(InputError, match="rebuilt with its own code"):
        describe(pickled(tmp_path, b"\x80\x02ccollections\nOrderedDict\n)R" + state + b"b."))


def text(value):
    return b"X" + len(value).to_bytes(4, "little") + value


STORAGE = (
    b"(" + text(b"storage") + b"ctorch\nFloatStorage\n" + text(b"0") + text(b"cpu") + b"K\x01tQ"
)
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"


def tensor(shape, strides, offset=b"K\x00"):
    """A pickle's instructions for a tensor of one element's storage."""
    rest = b"\x89ccollections\nOrderedDict\n)R"
    return REBUILD + b"(" + STORAGE + offset + shape + strides + rest + b"tR"


HUGE = b"\x8a\xff" + b"\x7f" * 255
"""A number of 614 digits; longer ones are no instruction of torch.save."""
LISTS = (
    b"](K\x00"
    + b"".join(b"eq" + bytes([i]) + b"](" + 8 * (b"h" + bytes([i])) for i in range(12))
    + b"e"
)
"""Eight times the same list in a list, and so on: printed, 10 GB."""
ARGUMENTS = (
    STORAGE
    + b"q\x00](h\x00K\x00))"
    + b"K\x00" * 50_000
    + b"eq\x01"
    + REBUILD
    + b"q\x02]("
    + b"h\x02h\x01R" * 30_000
    + b"e"
)
"""A tensor's arguments in a list of 50,000, time and again."""
PICKLES = {
    "deep_key": b"})" + b"\x85" * 10**6 + b"Ns",
    "dict_in_itself": b"}q\x00" + text(b"model") + b"h\x00s",
    "list_as_storage": LISTS
    + b"q\x20("
    + text(b"storage")
    + b"ctorch\nFloatStorage\nh\x20NK\x01tQ",
    "list_as_shape": LISTS + b"q\x20" + tensor(b"h\x20", b"h\x20"),
    "huge_extent": tensor(HUGE + b"\x85", b"K\x01\x85"),
    "huge_stride": tensor(b"K\x01\x85", HUGE + b"\x85"),
    "huge_offset": tensor(b"K\x01\x85", b"K\x01\x85", HUGE),
    "huge_product": tensor(b"(" + HUGE * 5000 + b"t", b"(" + b"K\x01" * 5000 + b"t"),
    "no_elements": tensor(b"(K\x00" + HUGE * 5000 + b"t", b"(" + b"K\x01" * 5001 + b"t"),
    "arguments": ARGUMENTS,
    "long_name": b"}" + text(b"net." * 400_000 + b"a") + tensor(b")", b")") + b"s",
    "long_key": STORAGE.replace(text(b"0"), text(b"\x01" * 10**6)),
    "long_type": STORAGE.replace(b"FloatStorage", b"F" * 10**6),
    "names": b"}(" + b"".join(text(b"%d" % i) + b"N" for i in range(200_000)) + b"u",
    "memo": b"N" + b"".join(b"r" + i.to_bytes(4, "little") for i in range(400_000)),
    "long": b"N0" * 3_000_000 + b"N",
}
HEADERS = {
    "sf_names": {f"{i}": entry([0], 0, 0) for i in range(30_000)},
    "sf_long_name": {"net." * 500_000: entry([1], 0, 4)},
    "sf_dimensions": {"out.a": entry([1] * 600_000, 0, 4)},
    "sf_digits": b'{"out.a":{"dtype":"F32","shape":[' + b"9" * 4000 + b'],"data_offsets":[0,4]}}',
    "sf_long_dtype": {"n" * 10**6: entry([1], 0, 1, "F8_E4M3")},
    "sf_deep": b'{"a":' * 10**5 * 4,
}
HEADER_DATA = {"sf_names": b"", "sf_long_dtype": b"1"}
MEASURE = """
import json, re, sys, time
from voco_jax.interop.inspect import main
for path in sys.argv[1:]:
    start = time.perf_counter()
    assert main([path]) == 2, path
    print(json.dumps([path, time.perf_counter() - start]))
print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
"""


def test_hostile_files_end_in_one_line_soon_and_in_little_memory(tmp_path):
    paths = []
    for name, content in PICKLES.items():
        path = pickled(tmp_path, b"\x80\x02" + content + b".")
        paths.append(path.rename(tmp_path / f"{name}.pt"))
    for name, header in HEADERS.items():
        path = safetensors(tmp_path, header, HEADER_DATA.get(name, b"1234"))
        paths.append(path.rename(tmp_path / f"{name}.safetensors"))
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, paths)],
        capture_output=True,
        text=True,
        check=True,
    )
    errors = done.stderr.splitlines()
    assert [line.partition(": ")[2].partition(": ")[0] for line in errors] == list(map(str, paths))
    assert all(line.isprintable() and len(line) < 1500 for line in errors)
    *times, peak = map(json.loads, done.stdout.splitlines())
    assert [path for path, seconds in times if seconds > 2] == []
    assert peak < 300 * 2**10  # kB


@pytest.mark.parametrize("last", [b"}", b"}(" + text(b"out.a") + tensor(b")", b")") + b"u"])
def test_same_dict_time_and_again_is_opened_once(tmp_path, last):
    """Four times the same dict in a dict, and so on for eight, would be 65,536."""
    keys = list(map(text, (b"net", b"model", b"module", b"backbone")))
    levels = [b"q%c}(%bu" % (i, b"".join(b"%bh%c" % (key, i) for key in keys)) for i in range(8)]
    path = pickled(tmp_path, b"\x80\x02" + last + b"".join(levels) + b".")
    if last == b"}":
        with pytest.raises(
            InputError, match=r"no weights but net\.net\.net\.net\.net\.net\.net\.mo"
        ):
            describe(path)
    else:
        assert list(describe(path).tensors) == ["out.a"]
        assert len(describe(path).set_aside) == 8 * 3


def test_archive_of_many_entries(tmp_path):
    """zipfile would make an object of each."""
    with zipfile.ZipFile(tmp_path / "w.pt", "w") as archive:
        archive.writestr("w/data.pkl", b"\x80\x02}.")
        archive.filelist *= 50_000
    with pytest.raises(InputError, match="a directory of 2800000 bytes, of at most 2097152"):
        describe(tmp_path / "w.pt")


def test_tensor_with_a_negative_bit(tmp_path):
    """As PyTorch saves the imaginary part of a conjugate; NumPy has none such."""
    tensor = torch.complex(torch.zeros(3), torch.arange(3.0)).conj().imag
    assert tensor.is_neg()
    path = saved(tmp_path, {"out.a": tensor})
    assert read(path)["out.a"].tolist() == [0, -1, -2]


def test_zip_bomb(tmp_path):
    path = saved(tmp_path, {"out.a": torch.zeros(100_000)})
    rewritten(path, lambda entries: entries, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(InputError, match="is compressed or claims another size"):
        read(path)


def test_other_archives(tmp_path):
    path = saved(tmp_path, {"out.a": torch.zeros(1)})
    rewritten(path, lambda e: {k: v for k, v in e.items() if "data.pkl" not in k})
    with pytest.raises(InputError, match=r"without one w/data\.pkl"):
        read(path)
    script = tmp_path / "script.pt"
    path = saved(tmp_path, {"out.a": torch.zeros(1)}, "script.pt")
    rewritten(script, lambda e: {**e, "script/constants.pkl": b""})
    with pytest.raises(InputError, match="TorchScript"):
        read(script)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_damage_anywhere_is_noticed_or_harmless(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("damage")
    content = {"state_dict": {"out.a": torch.arange(50.0), "out.b": torch.ones(2, 3).half()}}
    path = saved(folder, content)
    whole = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        whole = whole[: data.draw(st.integers(0, len(whole) - 1))]
        truncated = True
    else:
        whole[data.draw(st.integers(0, len(whole) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        truncated = False
    path.write_bytes(whole)
    try:
        tensors = read(path)
    except InputError:
        return
    assert not truncated
    assert (tensors.get("out.a", np.arange(50)) == np.arange(50)).all()


def test_damaged_name_in_the_archive(tmp_path):
    path = saved(tmp_path, {"out.a": torch.arange(50.0)})
    content = path.read_bytes()
    path.write_bytes(content.replace(b"w/data.pkl", b"w/\xe4ata.pkl", 1))
    with pytest.raises(InputError, match="truncated or damaged"):
        read(path)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"hello", b"\x80\x02K\x01.", b"\x1f\x8b"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_files_that_are_something_else(tmp_path, content, suffix):
    path = tmp_path / f"w{suffix}"
    path.write_bytes(content)
    with pytest.raises(InputError, match="w" + re.escape(suffix)):
        read(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "found an empty file"),
        (b"\x10" + bytes(7) + b'{"a": {}}', r"found a safetensors file.* rename it"),
        (pickle.dumps({"out.a": 1}), "expected the zip archive that torch.save writes"),
    ],
)
def test_what_else_is_called_pt(tmp_path, content, message):
    path = tmp_path / "w.pt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        describe(path)
    assert "\n" not in str(caught.value)


LFS = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "an empty file.*fetch it again"),
        (LFS, "a Git LFS pointer.*git lfs pull"),
        (b"/annex/objects/SHA256E-s12--ab.pt\n", "a git-annex pointer.*git annex get"),
        (b"<!DOCTYPE html>\n<html><head><title>Sign in</title>", r"a web page \(HTML\).*signed in"),
        (b"\xef\xbb\xbf\r\n<HTML lang='en'><body>Quota exceeded", r"a web page \(HTML\)"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code>', r"a server's answer \(XML\)"),
        (b'{"error":"Repository not found"}', "JSON text"),
        (b"\x1f\x8b\x08\x00" + bytes(20), "a gzip archive.*gunzip"),
        (b"\x89HDF\r\n\x1a\n" + bytes(20), "an HDF5 file"),
        (bytes(4096), "zeros, a download that did not end.*fetch it again"),
    ],
)
def test_what_stands_in_for_a_weight_file(tmp_path, suffix, content, message):
    path = tmp_path / f"w{suffix}"
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"w\{suffix}: found {message}") as caught:
        read(path)
    assert "\n" not in str(caught.value)


def test_pytorch_file_called_safetensors(tmp_path):
    with pytest.raises(InputError, match=r"found a zip archive, as torch.*; rename it to \.pt"):
        read(saved(tmp_path, {"out.a": torch.ones(1)}, "w.safetensors"))


@pytest.mark.parametrize("length", [0x7B, 0x8B1F])
def test_safetensors_whose_length_looks_like_another_kind(tmp_path, length):
    """The first bytes of a sound file may be those of JSON or gzip."""
    header = json.dumps({"out.a": entry([1], 0, 4)}).encode().ljust(length)
    assert read(safetensors(tmp_path, header, b"1234"))["out.a"].tobytes() == b"1234"


@pytest.mark.parametrize(
    "header",
    [
        {"a": entry([10**6, 10**6], 0, 4 * 10**12)},
        {"a": entry([10**6, 10**6], 0, 4)},
        {"a": entry([-1, -1], 0, 4)},
        {"a": entry([1.0], 0, 4)},
        {"a": entry([2**70], 0, 4)},
        {"a": entry([2**32, 2**32], 0, 4)},
        {"a": entry([1], 0, 4), "b": entry([0, 2**63, 2**63], 4, 4)},
        {"a": entry([1] * 100_000, 0, 4)},
        {"a": entry([0], 4, 4)},
        {"a": entry([1], 0, 4), "b": entry([1], 0, 4)},
        {"a": entry([1], 4, 8)},
        {"a": entry([2], 0, 2, "F16")},
        {"\x1b[2J\n": entry([1], 0, 4, "X9")},
        {"\x1b[2J\n": entry([1], 4, 8)},
        {"a": {"shape": [1]}},
        {"a": entry([1], 0, 4), "__metadata__": {"format": 3}},
        b"{",
        b"[1]",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"\xff\xfe",
    ],
    ids=lambda header: str(header)[:40],
)
def test_safetensors_headers(tmp_path, header):
    """Each with the four bytes that the first tensor of a sound one would have."""
    path = safetensors(tmp_path, header, b"1234")
    with pytest.raises(InputError, match=r"w\.safetensors: its header is damaged \(.*fetch it"):
        read(path)
    with pytest.raises(InputError) as caught:
        read(path)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 600


def test_safetensors_header_that_the_others_differ_from(tmp_path):
    tensors = read(safetensors(tmp_path, {"a": entry([1], 0, 4)}, b"1234"))
    assert tensors["a"].tobytes() == b"1234"
    with pytest.raises(InputError, match="its header is damaged"):
        read(safetensors(tmp_path, {"a": entry([1], 0, 4)}, b"12345"))


@pytest.mark.parametrize("size", [2**63, 2**40, 100])
def test_safetensors_header_longer_than_the_file(tmp_path, size):
    with pytest.raises(InputError, match=f"header claims {size} bytes"):
        read(safetensors(tmp_path, {}, size=size))


def test_safetensors_header_of_many_names(tmp_path):
    """The library would take seconds and hundreds of megabytes for it."""
    header = {f"swinViT.layers.{i}.weight": entry([1], 4 * i, 4 * i + 4) for i in range(60_000)}
    path = safetensors(tmp_path, header, bytes(240_000))
    size = path.stat().st_size - 8 - 240_000
    with pytest.raises(InputError, match=f"header claims {size} bytes, expected at most 2097152;"):
        describe(path)


def test_safetensors_header_of_ten_gigabytes(tmp_path):
    path = safetensors(tmp_path, {}, size=10**10)
    with path.open("r+b") as file:
        file.truncate(11 * 10**9)  # takes no room on the disk
    with pytest.raises(InputError, match="header claims 10000000000 bytes, expected at most 20971"):
        describe(path)


def test_pickles_of_protocol_5_are_refused_not_misread(tmp_path):
    buffer = io.BytesIO()
    torch.save({"out.a": torch.ones(2)}, buffer, pickle_protocol=5, pickle_module=pickle)
    Path(tmp_path / "w.pt").write_bytes(buffer.getvalue())
    with pytest.raises(InputError):
        read(tmp_path / "w.pt")


def test_safetensors_names_come_in_the_order_of_the_file(tmp_path):
    names = ["out.b", "out.c", "out.a"]
    header = {name: entry([1], 4 * i, 4 * i + 4) for i, name in enumerate(names)}
    assert list(read(safetensors(tmp_path, header, bytes(12)))) == names


def test_file_from_before_pytorch_1_6(tmp_path):
    """The message names the format, and its command converts the file."""
    old = {"swinViT.a": torch.arange(3.0)}
    path = saved(tmp_path, {"net": old}, _use_new_zipfile_serialization=False)
    with pytest.raises(InputError, match=r"w\.pt: found the format from before PyTorch 1\.6") as e:
        read(path)
    code = re.search(r'python -c "(.*)"', str(e.value))[1]
    code = code.replace("FILE", str(path)).replace("new.pt", str(tmp_path / "new.pt"))
    subprocess.run([sys.executable, "-c", code], check=True)
    assert (read(tmp_path / "new.pt")["swinViT.a"] == np.arange(3)).all()


@pytest.mark.scripts
def test_mutated_files_are_read_or_refused():
    """The short form of what docs/reliability.md records."""
    done = subprocess.run(
        [sys.executable, "-m", "robustness.fuzz_weights", "--files", "104", "--seed", "1"],
        cwd=Path(__file__).resolve().parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("104 weight files, seed 1: 0 problems\n")
