"""Weight files of the wild and hostile ones, read and loaded into our model's parameters."""

import functools
import itertools
import re
import shlex
from collections import OrderedDict

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
from weight_files import saved

from voco_jax.errors import InputError
from voco_jax.interop.files import weights
from voco_jax.interop.files.weights import describe, read
from voco_jax.interop.layout import select
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


NAMES = [key for key in encoder_state() if key.startswith(("swinViT.", "encoder2."))]


def bare(names, *others):
    """The names that are found in a file with these ones, and what is left aside of it."""
    found = select(dict.fromkeys([*names, *others], 0), int, "teacher", "w.pt")
    return list(found.tensors), found.set_aside


@pytest.mark.parametrize(
    "renamed",
    [
        lambda name: name.replace("swinViT.", "swinViT._orig_mod."),
        lambda name: name.replace(".blocks.1.", ".blocks.1._orig_mod."),
        lambda name: "module._orig_mod." + name,
        lambda name: name.replace("layers2.0.", "layers2.0._checkpoint_wrapped_module."),
        lambda name: "_fsdp_wrapped_module." + name.replace(".0.", ".0._fsdp_wrapped_module."),
        lambda name: "_fsdp_wrapped_module._fpw_module." + name,
        lambda name: name.replace("encoder2.", "encoder2.module."),
        lambda name: f"network.{name}",
        lambda name: f"encoder.{name}",
        lambda name: f"encoder1.{name}",
        lambda name: f"model.net.0.{name}",
        lambda name: f"_forward_module.lightning.out.{name}",
        lambda name: f"net.backbone._orig_mod.{name.replace('swinViT', 'swin_vit')}",
    ],
)
def test_wrappers_within_names_and_attributes_of_any_name(renamed):
    names = list(map(renamed, NAMES))
    assert names != NAMES
    assert bare(names) == (NAMES, ())


@pytest.mark.parametrize("other", ["loss.weight", "out.weight", "net.aux.bias", "swinViT2.a"])
def test_what_is_beside_an_attribute_keeps_its_name(other):
    kept = other.removeprefix("net.")
    assert bare([f"network.{name}" for name in NAMES], other) == ([*NAMES, kept], ())


@pytest.mark.parametrize("front", ["", "ema.", "model.net."])
def test_averaged_models(front):
    """Of torch.optim.swa_utils, as it writes them; the counter is no weight."""
    network = torch.nn.ModuleDict({"encoder1": torch.nn.Linear(2, 2), "out": torch.nn.Linear(2, 1)})
    averaged = torch.optim.swa_utils.AveragedModel(torch.nn.DataParallel(network)).state_dict()
    keys = [front + key for key in averaged if key != "n_averaged"]
    front = "module.net." if front.startswith("model") else front
    counter = f"{front}n_averaged"
    names, aside = bare([f"{front}module.{name}" for name in NAMES], counter)
    assert (names, aside) == (NAMES, (counter,))
    if not front:
        assert bare(keys, counter) == (list(network.state_dict()), (counter,))


@pytest.mark.parametrize("key", ["_fsdp_wrapped_module._flat_param", "net.layers1.flat_param"])
def test_flattened_parameters_of_fsdp(key):
    with pytest.raises(InputError, match=r"w\.pt: .*flat_param is .*, flattened.*FULL_STATE_DICT"):
        bare(NAMES, key)


@pytest.mark.parametrize("front", ["network.", "module.lightning."])
def test_student_and_teacher_under_an_attribute(front):
    names = [f"{front}{who}.{name}" for who in ("student", "teacher") for name in NAMES]
    found = select(dict.fromkeys(names, 0), int, "student", "w.pt")
    assert (found.networks, found.network) == (("teacher", "student"), "student")
    assert found.sources == {name: f"{front}student.{name}" for name in NAMES}


def old_monai_names(state):
    """A SwinUNETR's state as MONAI's model_swinvit.pt has it."""
    return {
        "module." + key.removeprefix("swinViT.").replace("mlp.linear", "mlp.fc"): value
        for key, value in state.items()
        if key.startswith("swinViT.")
    }


def test_monais_self_supervised_weights(tmp_path):
    """As MONAI's own SwinUNETR.load_from reads them."""
    state = monai_state(use_v2=False, window_size=4)
    path = saved(tmp_path, {"state_dict": old_monai_names(state)}, "model_swinvit.pt")
    monai = SwinUNETR(in_channels=1, out_channels=2, feature_size=12, use_v2=False, window_size=4)
    monai.load_from(torch.load(path, weights_only=True))
    template = encoder()
    template["swinViT"] = {k: v for k, v in template["swinViT"].items() if "c_0" not in k}
    with pytest.raises(InputError, match=r"no convolution encoders.*allow missing 'encoder\*'"):
        load(template, path)
    params, report = load(template, path, ["encoder*"])
    ours, theirs = to_torch({"swinViT": params["swinViT"]}), monai.state_dict()
    parameters = {name for name, _ in monai.named_parameters() if name.startswith("swinViT.")}
    assert set(ours) == set(report.matched) == parameters
    assert all((array == theirs[name].numpy()).all() for name, array in ours.items())
    assert any("module.patch_embed.proj.weight for swinViT.p" in note for note in report.notes)


@pytest.mark.parametrize("front", ["", "module.", "network.vit.", "encoder."])
def test_swin_transformer_without_its_root(front):
    """As in MONAI's files; in ssl_pretrained_weights.pth stages are nested once more."""
    nested = ".0.0." if front == "encoder." else ".0."
    names = [
        front + name.removeprefix("swinViT.").replace(".0.blocks", f"{nested}blocks")
        if name.startswith("swinViT.")
        else name
        for name in NAMES
    ]
    assert bare(names, f"{front}mask_token") == ([*NAMES, "mask_token"], ())


def run(command, monkeypatch, folder):
    """Runs a `python -c` command of a message in this process."""
    program, option, code = shlex.split(command)
    assert (program, option) == ("python", "-c")
    monkeypatch.chdir(folder)
    exec(code, {})


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_command_for_one_of_two_networks(tmp_path, monkeypatch, suffix):
    """Two attributes hold the same names: the command takes one of them out."""
    names = NAMES[:20]
    state = {
        f"{who}.{name}": torch.full((1,), i)
        for i, who in enumerate(("net$(", "ema'\""))
        for name in names
    }
    path = tmp_path / f"w{suffix}"
    if suffix == ".pt":
        torch.save({"state_dict": state}, path)
    else:
        save_torch_file(state, path)
    with pytest.raises(InputError, match="are both swinViT") as caught:
        read(path)
    run(str(caught.value).partition("as with: ")[2], monkeypatch, tmp_path)
    tensors = read(tmp_path / f"w_taken{suffix}")
    assert set(tensors) == set(names)
    assert len({float(array[0]) for array in tensors.values()}) == 1


def test_command_for_weights_in_a_dict_of_another_name(tmp_path, monkeypatch):
    path = saved(tmp_path, {"epoch": 3, "ema_state": {"out.a": torch.ones(1)}})
    with pytest.raises(InputError, match="found no weights but epoch, ema_state") as caught:
        read(path)
    run(str(caught.value).partition("as with: ")[2], monkeypatch, tmp_path)
    assert list(read(tmp_path / "w_taken.pt")) == ["out.a"]


def test_command_where_only_an_unknown_prefix_differs(tmp_path, monkeypatch):
    """Of a file without the block by whose name a prefix is found."""
    state = prefixed("module.my.", encoder_state())
    del state["module.my.swinViT.layers1.0.blocks.0.attn.qkv.weight"]
    path = saved(tmp_path, {"state_dict": state})
    with pytest.raises(
        InputError, match=r"136 names differ .* by the prefix 'my\.' alone"
    ) as caught:
        load(encoder(), path)
    command = re.search(r"take it away with: (.*)", str(caught.value))[1]
    run(command, monkeypatch, tmp_path)
    _, report = load(encoder(), tmp_path / "w_taken.pt", ["swinViT.layers1.0.blocks.0.attn.qkv.*"])
    assert len(report.matched) == 136
    tensors = {name.removeprefix("module."): value.numpy() for name, value in state.items()}
    with pytest.raises(InputError, match=r"prefix 'my\.' alone: take it away\n"):
        load(encoder(), tensors)


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
    path.write_bytes(weights.serialise(tensors, suffix))
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


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.bool])
def test_whole_numbers_in_place_of_weights(tmp_path, dtype):
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in encoder_state().items()}
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(
        InputError, match=rf"found {name} in encoder1.* and 132 more, expected weig"
    ):
        load(encoder(), saved(tmp_path, state))


def test_one_weight_in_whole_numbers_is_refused_also_where_channels_are_spread(tmp_path):
    key = "swinViT.patch_embed.proj.weight"
    state = {**encoder_state(), key: encoder_state()[key].to(torch.int16)}
    template = jax.tree.map(lambda leaf: leaf, encoder())
    for module in (
        template["swinViT"]["patch_embed"]["proj"],
        *(template["encoder1"]["layer"][name]["conv"] for name in ("conv1", "conv3")),
    ):
        module["kernel"] = np.repeat(module["kernel"], 2, axis=-2)
    path = saved(tmp_path, state)
    for tree in (encoder(), template):
        with pytest.raises(
            InputError, match=r"found int16 in swinViT\.patch_embed\.proj: weight, ex"
        ):
            load(tree, path)


@pytest.mark.parametrize(("value", "shown"), [(1e300, "1e+300"), (-3.5e38, "-3.5e+38")])
def test_values_beyond_float32(tmp_path, value, shown):
    name = "encoder2.layer.conv1.conv.weight"
    state = {**encoder_state(), name: encoder_state()[name].double()}
    state[name][3, 2, 1, 0, 2] = value
    with pytest.raises(
        InputError, match=rf"found {re.escape(shown)} in {name} \(float64\), expect"
    ):
        load(encoder(), saved(tmp_path, state))
    state[name][3, 2, 1, 0, 2] = 3e38
    params, _ = load(encoder(), saved(tmp_path, state))
    assert params["encoder2"]["layer"]["conv1"]["conv"]["kernel"].max() == np.float32(3e38)


def test_report_escapes_control_characters(tmp_path):
    state = {**encoder_state(), "\x1b[2Jevil": torch.ones(1)}
    with pytest.raises(InputError) as caught:
        load(encoder(), saved(tmp_path, state))
    assert "\x1b" not in str(caught.value)
    assert "evil" in str(caught.value)


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
