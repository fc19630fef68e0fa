"""Weight files of the wild and hostile ones, read and loaded into our model's parameters."""

import functools
import io
import itertools
import json
import pickle
import re
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from conftest import shared_file
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.networks.nets import SwinUNETR
from networks import network as any_network
from networks import settings as model_settings
from networks import shapes
from safetensors.numpy import save_file
from safetensors.torch import load_file as load_torch_file
from safetensors.torch import save_file as save_torch_file

from voco_jax.errors import InputError
from voco_jax.interop.files import weights
from voco_jax.interop.files.weights import describe, read
from voco_jax.interop.load import load_into
from voco_jax.interop.names import to_torch, torch_shapes

DECODER = ("decoder*", "out.*")


@functools.cache
def monai_state(feature_size=12, use_v2=True, window_size=4):
    model = SwinUNETR(
        in_channels=1,
        out_channels=3,
        feature_size=feature_size,
        use_v2=use_v2,
        window_size=window_size,
    )
    return dict(model.state_dict())


@functools.cache
def network():
    """Zeros in the shape of our network with a projector, feature size 12, v2, window 4."""
    model = any_network(feature_size=12, window_size=(4, 4, 4), projector_size=16)
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes(model))


def load(params, source, *args, window_size=(4, 4, 4), **options):
    model = model_settings(feature_size=12, window_size=window_size)
    return load_into(params, source, *args, model=model, **options)


def encoder():
    return {key: tree for key, tree in network().items() if key != "proj_head"}


def encoder_state():
    return {k: v for k, v in monai_state().items() if not k.startswith(("decoder", "out."))}


def prefixed(prefix, state):
    return {prefix + key: value for key, value in state.items()}


def saved(folder, content, name="w.pt", **options):
    torch.save(content, folder / name, **options)
    return folder / name


def assert_loaded(params, state):
    """Our parameters are the state's tensors, bit for bit."""
    ours = to_torch(params)
    assert len(ours) == 137
    for name, array in ours.items():
        assert array.tobytes() == state[name].numpy().tobytes(), name


def test_our_names_and_shapes_are_monais():
    expected = {
        key: tuple(value.shape)
        for key, value in encoder_state().items()
        if not key.endswith("relative_position_index")
    }
    assert torch_shapes(encoder()) == expected


def test_projector_names_are_the_published_ones():
    golden = np.load(shared_file("golden", "voco_10k_step.npz"))
    assert set(torch_shapes(network())) == set(golden["param_keys"].tolist())


WRAPPERS = ((), ("state_dict",), ("network_weights",), ("net",), ("model",), ("net", "state_dict"))
PREFIXES = ("", "module.", "backbone.", "student.", "module.backbone.", "module.teacher.backbone.")


@pytest.mark.parametrize(("wrappers", "prefix"), list(itertools.product(WRAPPERS, PREFIXES)))
def test_wrappers_and_prefixes(tmp_path, wrappers, prefix):
    small = {
        k: v for k, v in encoder_state().items() if k.startswith(("swinViT.layers1.", "encoder1."))
    }
    content = prefixed(prefix, OrderedDict(small))
    for wrapper in reversed(wrappers):
        content = {wrapper: content, "epoch": 7, "optimizer": {"state": {0: torch.ones(2)}}}
    tensors = read(saved(tmp_path, content))
    assert tensors.keys() == small.keys()
    assert all((tensors[key] == value.numpy()).all() for key, value in small.items())


@pytest.mark.parametrize("wrapper", ["student", "teacher"])
def test_nested_network_and_old_name(tmp_path, wrapper):
    state = {key.replace("swinViT", "swin_vit"): v for key, v in encoder_state().items()}
    path = saved(tmp_path, {wrapper: {"state_dict": prefixed("module.", state)}}, "w.ckpt")
    params, report = load(encoder(), path)
    assert_loaded(params, monai_state())
    assert any(wrapper in note for note in report.notes)


@pytest.mark.parametrize("nested", [True, False])
def test_student_and_teacher(tmp_path, nested):
    state = {"encoder1.layer.conv1.conv.weight": torch.zeros(1), "swinViT.a": torch.zeros(2)}
    other = {key: value + 1 for key, value in state.items()}
    both = {"student": state, "teacher": other}
    if not nested:
        both = {**prefixed("student.", state), **prefixed("teacher.", other)}
    path = saved(tmp_path, both)
    assert all((array == 1).all() for array in read(path).values())
    assert all((array == 0).all() for array in read(path, "student").values())
    with pytest.raises(InputError, match="network: found 'pupil'"):
        read(path, "pupil")


def test_voco_v2_checkpoint(tmp_path):
    heads = {"layer1.0.weight": torch.ones(2)}
    content = {"backbone.swinViT.a": torch.zeros(1)} | prefixed("teacher.", heads)
    content |= {"student.layer1.0.weight": torch.zeros(2)}
    tensors = read(saved(tmp_path, content))
    assert tensors.keys() == {"swinViT.a", "proj_head.layer1.0.weight"}
    assert (tensors["proj_head.layer1.0.weight"] == 1).all()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"swinViT.a": torch.ones(1), "module.swinViT.a": torch.ones(1)}, "both swinViT.a"),
        ({"net": {"out.a": torch.ones(1)}, "model": {"out.a": torch.ones(1)}}, "net.out.a and mo"),
        ({"student": {"teacher.out.a": torch.ones(1)}}, "names both networks"),
        ({"epoch": 3, "weights": {"a": torch.ones(1)}}, "found no weights but epoch, weights"),
        ([torch.ones(1)], "found no weights but list"),
        ({}, "found no weights"),
    ],
)
def test_unclear_contents(tmp_path, content, message):
    with pytest.raises(InputError, match=re.escape(message)):
        read(saved(tmp_path, content))


def test_nesting_without_end(tmp_path):
    content = {"out.a": torch.ones(1)}
    for _ in range(50):
        content = {"model": content}
    with pytest.raises(InputError, match="nested deeper"):
        read(saved(tmp_path, content))


@pytest.mark.parametrize(
    "dtype",
    [
        *(torch.float32, torch.float16, torch.bfloat16, torch.float64),
        *(torch.int64, torch.uint16, torch.bool),
    ],
)
def test_dtypes_views_and_parameters(tmp_path, dtype):
    values = (torch.randn(4, 6) * 3).to(dtype)
    content = {"out.a": values, "out.b": values.T[1:3], "out.c": torch.tensor(1).to(dtype)}
    if dtype.is_floating_point:
        content["out.d"] = torch.nn.Parameter(values[2])
    tensors = read(saved(tmp_path, content))
    half = dtype in (torch.float16, torch.bfloat16)
    for name, value in content.items():
        expected = (value.float() if half else value).detach().numpy()
        assert tensors[name].dtype == expected.dtype
        assert (tensors[name] == expected).all()
        assert tensors[name].shape == expected.shape


@given(
    st.dictionaries(
        st.from_regex(r"(swinViT|encoder1)\.[a-z]{1,5}(\.[0-9a-z]{1,3}){0,2}", fullmatch=True),
        st.lists(st.integers(0, 4), max_size=4),
        min_size=1,
        max_size=5,
    ),
    st.sampled_from([".pt", ".safetensors"]),
)
@settings(max_examples=40, deadline=None)
def test_written_files_come_back_bit_for_bit(tmp_path_factory, shapes, suffix):
    bits = np.random.default_rng(0)
    tensors = {
        name: bits.integers(0, 2**32, shape, np.uint32).view(np.float32)
        for name, shape in shapes.items()
    }
    path = tmp_path_factory.mktemp("trip") / f"w{suffix}"
    weights.write(tensors, path, suffix)
    back = read(path)
    assert back.keys() == tensors.keys()
    for name, array in tensors.items():
        assert back[name].shape == array.shape
        assert back[name].tobytes() == array.tobytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_safetensors_half_precision_is_read_as_torch_reads_it(tmp_path, dtype):
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.uint16)
    save_torch_file({"out.a": bits.view(dtype).reshape(4, -1)}, tmp_path / "w.safetensors")
    array = read(tmp_path / "w.safetensors")["out.a"]
    assert array.dtype == np.float32
    expected = load_torch_file(tmp_path / "w.safetensors")["out.a"].float().numpy()
    assert array.shape == expected.shape
    assert np.isnan(array).any()
    np.testing.assert_array_equal(array, expected)
    numbers = ~np.isnan(expected)
    assert (np.signbit(array) == np.signbit(expected))[numbers].all()  # -0.0


@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.float8_e4m3fn, "F8_E4M3"), (torch.float8_e5m2, "F8_E5M2")]
)
def test_safetensors_of_other_dtypes(tmp_path, dtype, name):
    path = tmp_path / "w.safetensors"
    save_torch_file({"out.\x1ba": torch.ones(2).to(dtype)}, path)
    with pytest.raises(InputError, match=rf"out\.\\x1ba has dtype {name}, expected one of F64"):
        describe(path)


def test_whole_swin_unetr_and_allow_patterns(tmp_path):
    path = saved(tmp_path, monai_state())
    with pytest.raises(InputError, match=r"22 unexpected.*\n.*complete SwinUNETR.*'decoder\*'"):
        load(encoder(), path)
    params, report = load(encoder(), path, allow_unexpected=DECODER)
    assert_loaded(params, monai_state())
    assert len(report.matched) == 137
    assert len(report.unexpected) == 22
    with pytest.raises(
        InputError, match=r"(?s)6 missing.*likely cause: .*published weights have none"
    ):
        load(network(), path, allow_unexpected=DECODER)
    params, report = load(network(), path, ["proj_head.*"], DECODER, "student")
    assert report.missing[0] == "proj_head.layer1.0.weight" or len(report.missing) == 6
    assert (params["proj_head"]["layer1_0"]["kernel"] == 0).all()
    assert not (params["encoder1"]["layer"]["conv1"]["conv"]["kernel"] == 0).any()


def test_tensors_instead_of_a_file():
    tensors = {key: value.numpy() for key, value in encoder_state().items()}
    params, _ = load(encoder(), tensors)
    assert_loaded(params, monai_state())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"feature_size": 24}, "feature size is 24, the model's 12: set model.feature_size to 24"),
        ({"use_v2": False}, "the model has the v2 convolution blocks"),
        ({"window_size": 7}, "window size is (7, 7, 7), the model's (4, 4, 4)"),
    ],
)
def test_wrong_size_names_the_cause(tmp_path, options, message):
    path = saved(tmp_path, monai_state(**options))
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        load(encoder(), path, allow_unexpected=DECODER)
    text = str(caught.value)
    assert "likely cause" in text
    assert "matched" in text
    assert str(path) in text


def test_v2_weights_into_v1(tmp_path):
    template = encoder()
    template["swinViT"] = {k: v for k, v in template["swinViT"].items() if "c_0" not in k}
    with pytest.raises(InputError, match="the file has the v2 convolution blocks"):
        load(template, saved(tmp_path, encoder_state()))


def test_index_of_another_window(tmp_path):
    state = encoder_state()
    name = "swinViT.layers2.0.blocks.1.attn.relative_position_index"
    state[name] = state[name].flip(0)
    path = saved(tmp_path, state)
    with pytest.raises(
        InputError, match=r"1 buffers with other values(.|\n)*set model\.window_size"
    ):
        load(encoder(), path)
    with pytest.raises(
        InputError, match=r"8 buffers with other values(.|\n)*set model\.window_size"
    ):
        load(encoder(), saved(tmp_path, encoder_state()), window_size=(2, 4, 9))


def test_nothing_matched_is_an_error_whatever_is_allowed(tmp_path):
    path = saved(tmp_path, {"fc.weight": torch.ones(3, 3)})
    with pytest.raises(InputError, match=r"nothing matched[^\n]*\n.*no SwinUNETR encoder"):
        load(encoder(), path, ["*"], ["*"])


def test_values_that_are_not_finite(tmp_path):
    state = encoder_state()
    state["swinViT.patch_embed.proj.bias"] = torch.full((12,), float("nan"))
    with pytest.raises(InputError, match=r"NaN or infinite values in swinViT\.patch_embed\.proj"):
        load(encoder(), saved(tmp_path, state))


def test_report_escapes_control_characters(tmp_path):
    state = {**encoder_state(), "\x1b[2Jevil": torch.ones(1)}
    with pytest.raises(InputError) as caught:
        load(encoder(), saved(tmp_path, state))
    assert "\x1b" not in str(caught.value)
    assert "evil" in str(caught.value)


# Hostile and damaged files.


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


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "found an empty file"),
        (b"\x10" + bytes(7) + b'{"a": {}}', r"found a safetensors file.* rename it"),
        (b"version https://git-lfs\n", r"starts with b'version https://git-lfs\\n', expected"),
        (pickle.dumps({"out.a": 1}), "expected the zip archive that torch.save writes"),
    ],
)
def test_what_else_is_called_pt(tmp_path, content, message):
    path = tmp_path / "w.pt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        describe(path)
    assert "\n" not in str(caught.value)


def safetensors(folder, header, data=b"", *, size=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = folder / "w.safetensors"
    path.write_bytes((len(text) if size is None else size).to_bytes(8, "little") + text + data)
    return path


def entry(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


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


def test_missing_file_and_suffix(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read(tmp_path / "none.pt")
    with pytest.raises(InputError, match=r"found suffix '', expected.*interop\.export"):
        read(tmp_path)


def test_safetensors_needs_no_torch_and_describe_neither(tmp_path, monkeypatch):
    save_file({"out.a": np.ones(2, np.float32)}, tmp_path / "w.safetensors")
    path = saved(tmp_path, {"out.a": torch.ones(2)})
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    assert (read(tmp_path / "w.safetensors")["out.a"] == 1).all()
    assert describe(path).tensors["out.a"].shape == (2,)
    with pytest.raises(InputError, match="pip install torch"):
        read(path)


def test_pickles_of_protocol_5_are_refused_not_misread(tmp_path):
    buffer = io.BytesIO()
    torch.save({"out.a": torch.ones(2)}, buffer, pickle_protocol=5, pickle_module=pickle)
    Path(tmp_path / "w.pt").write_bytes(buffer.getvalue())
    with pytest.raises(InputError):
        read(tmp_path / "w.pt")


def test_projector_of_another_width_is_left_aside_where_both_patterns_allow_it():
    other = shapes(any_network(feature_size=12, window_size=(4, 4, 4), projector_size=32))
    tensors = to_torch(jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), other))
    projector = ("proj_head.*",)
    params, report = load(network(), tensors, projector, projector)
    assert {wrong.name for wrong in report.wrong_shape} >= {"proj_head.layer1.0.weight"}
    assert not np.any(params["proj_head"]["layer1_0"]["kernel"])
    assert np.all(params["encoder1"]["layer"]["conv1"]["conv"]["kernel"] == 1)
    for allowed in ((projector, ()), ((), projector)):
        with pytest.raises(InputError, match="of another shape"):
            load(network(), tensors, *allowed)


def test_safetensors_names_come_in_the_order_of_the_file(tmp_path):
    names = ["out.b", "out.c", "out.a"]
    header = {name: entry([1], 4 * i, 4 * i + 4) for i, name in enumerate(names)}
    assert list(read(safetensors(tmp_path, header, bytes(12)))) == names
