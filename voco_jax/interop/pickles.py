"""What a PyTorch pickle holds, without running it and without torch.

A `.pt` file is a pickle, which is a program. `torch.load(weights_only=True)` runs only a small part
of what pickle can do, but that part still takes as much memory as the file asks for
(`torch.Tensor(10**6, 10**6)`, `bytearray(10**12)`, a tensor expanded with stride 0). So the
pickle is first read here: opcodes push plain values, nothing is called, and what a tensor claims
is compared with what its storage has.
"""

import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

from voco_jax.errors import InputError
from voco_jax.interop.match import printable


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """A tensor of a file, not read.

    Attributes:
        shape: as stored.
        dtype: PyTorch's name without `torch.`, as `float32`.
    """

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, kw_only=True)
class Storage:
    """The memory behind tensors.

    Attributes:
        key: its name in the file.
        dtype: of its elements; None: untyped, bytes.
        nbytes: its size.
    """

    key: str
    dtype: str | None
    nbytes: int


ITEM_SIZES = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint64": 8,
    "uint32": 4,
    "uint16": 2,
    "uint8": 1,
    "bool": 1,
}
"""Bytes of an element of each dtype that is read."""

_STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
_MARK = object()
_OPAQUE = object()
"""Stands for a harmless value that is of no interest (a set, bytes, a device)."""


@dataclass(frozen=True)
class _Global:
    module: str
    name: str

    def __str__(self) -> str:
        return printable(f"{self.module}.{self.name}")


def read_pickle(stream: BinaryIO, source: str, check: Callable[[Storage], None]) -> Any:
    """Reads one pickle of a PyTorch file, up to its end.

    Args:
        stream: positioned at the pickle; afterwards behind it. Its `read(n)` must not take memory
            for more than it has (`io.BytesIO`, `mmap.mmap`).
        source: the file, for messages.
        check: called with each storage that the pickle names; raises where the file lacks it.

    Returns:
        The object, with a `TensorSpec` for each tensor.

    Raises:
        InputError: it needs more than weights do, claims more than it has, or is damaged.
    """
    try:
        return _Reader(source, check).run(stream)
    except InputError:
        raise
    except Exception as error:  # whatever a damaged or hostile pickle makes fail
        raise InputError(
            f"{source}: damaged, its pickle cannot be read "
            f"({type(error).__name__}: {printable(str(error))[:200]}); fetch the file again"
        ) from error


class _Reader:
    """The opcodes that torch.load(weights_only=True) knows, as a stack machine."""

    def __init__(self, source: str, check: Callable[[Storage], None]) -> None:
        self.source = source
        self.check = check
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, stream: BinaryIO) -> Any:
        arg: Any
        for opcode, arg, _ in pickletools.genops(stream):
            match opcode.name:
                case "STOP":
                    return self.stack.pop()
                case "PROTO":
                    pass
                case "MARK":
                    self.stack.append(_MARK)
                case "NONE":
                    self.stack.append(None)
                case "NEWTRUE" | "NEWFALSE":
                    self.stack.append(opcode.name == "NEWTRUE")
                case (
                    "BININT"
                    | "BININT1"
                    | "BININT2"
                    | "LONG1"
                    | "BINFLOAT"
                    | "BINUNICODE"
                    | "SHORT_BINSTRING"
                ):
                    self.stack.append(arg)
                case "BINPUT" | "LONG_BINPUT":
                    self.memo[arg] = self.stack[-1]
                case "BINGET" | "LONG_BINGET":
                    self.stack.append(self.memo[arg])
                case "GLOBAL":
                    module, _, name = arg.partition(" ")
                    self.stack.append(_Global(module.replace("__builtin__", "builtins"), name))
                case "EMPTY_TUPLE":
                    self.stack.append(())
                case "TUPLE1" | "TUPLE2" | "TUPLE3":
                    count = int(opcode.name[-1])
                    self.stack[-count:] = [tuple(self.stack[-count:])]
                case "TUPLE":
                    items = self._pop_mark()
                    self.stack.append(tuple(items))
                case "EMPTY_LIST":
                    self.stack.append([])
                case "APPEND":
                    item = self.stack.pop()
                    self.stack[-1].append(item)
                case "APPENDS":
                    items = self._pop_mark()
                    self.stack[-1].extend(items)
                case "EMPTY_DICT":
                    self.stack.append({})
                case "EMPTY_SET":
                    self.stack.append(_OPAQUE)
                case "SETITEM":
                    value, key = self.stack.pop(), self.stack.pop()
                    self.stack[-1][key] = value
                case "SETITEMS":
                    items = self._pop_mark()
                    self.stack[-1].update(zip(items[::2], items[1::2], strict=True))
                case "BINPERSID":
                    self.stack.append(self._storage(self.stack.pop()))
                case "REDUCE":
                    arguments, function = self.stack.pop(), self.stack.pop()
                    self.stack.append(self._call(function, arguments))
                case "BUILD":
                    self.stack.pop()
                    if not isinstance(self.stack[-1], dict):
                        raise self._refusal("an object that is rebuilt with its own code")
                case "NEWOBJ":
                    raise self._refusal(f"an object of type {self.stack[-2]}")
                case _:
                    raise self._refusal(f"the pickle instruction {opcode.name}")
        raise EOFError("no end of the pickle")

    def _pop_mark(self) -> list[Any]:
        # A stack without a mark raises here, as IndexError.
        items: list[Any] = []
        while (item := self.stack.pop()) is not _MARK:
            items.append(item)
        return items[::-1]

    def _refusal(self, need: str) -> InputError:
        return InputError(
            f"{self.source}: found {need}, expected tensors in plain dicts (it is read with "
            "weights_only, which runs no code of the file). If you trust where it comes from, "
            "make a clean copy: python -c \"import torch; c = torch.load('FILE', "
            "weights_only=False, map_location='cpu'); torch.save(c['state_dict'], 'clean.pt')\""
        )

    def _storage(self, persistent: Any) -> Storage:
        if persistent[0] == "module":
            raise self._refusal(f"an object of type {persistent[1]}")
        kind, storage_type, key, _, count, *view = persistent
        if kind != "storage" or any(item is not None for item in view):
            raise self._refusal("a storage of a form that PyTorch left in 2017")
        if not isinstance(storage_type, _Global) or type(count) is not int or count < 0:
            raise ValueError(f"storage {key!r} of {storage_type} with {count!r} elements")
        if storage_type == _Global("torch.storage", "UntypedStorage"):
            storage = Storage(key=str(key), dtype=None, nbytes=count)
        elif storage_type.module == "torch" and storage_type.name in _STORAGES:
            dtype = _STORAGES[storage_type.name]
            storage = Storage(key=str(key), dtype=dtype, nbytes=count * ITEM_SIZES[dtype])
        else:
            raise self._refusal(f"a tensor of type {storage_type}")
        self.check(storage)
        return storage

    def _call(self, function: Any, arguments: Any) -> Any:
        if not isinstance(function, _Global):
            raise ValueError("something that is no function is called")
        match (function.module, function.name):
            case ("collections", "OrderedDict" | "Counter"):
                return dict(*arguments)
            case ("torch", "Size"):
                return tuple(*arguments)
            case ("torch", "device") | ("builtins", "set") | ("_codecs", "encode"):
                return _OPAQUE
            case ("torch._utils", "_rebuild_parameter" | "_rebuild_parameter_with_state"):
                if not isinstance(arguments[0], TensorSpec):
                    raise ValueError("a parameter without a tensor")
                return arguments[0]
            case ("torch._utils", "_rebuild_tensor" | "_rebuild_tensor_v2"):
                storage, offset, shape, strides, *_ = arguments
                return self._tensor(storage, offset, shape, strides, storage.dtype)
            case ("torch._utils", "_rebuild_tensor_v3"):
                storage, offset, shape, strides, _, _, dtype, *_ = arguments
                return self._tensor(storage, offset, shape, strides, dtype.name)
        raise self._refusal(f"an object of type {function}")

    def _tensor(
        self, storage: Storage, offset: int, shape: Any, strides: Any, dtype: str | None
    ) -> TensorSpec:
        if dtype not in ITEM_SIZES:
            raise self._refusal(f"a tensor of type {printable(str(dtype))}")
        numbers = (offset, *shape, *strides)
        if len(shape) != len(strides) or any(type(n) is not int or n < 0 for n in numbers):
            raise ValueError(f"a tensor of shape {shape} with strides {strides}")
        spec = TensorSpec(shape=tuple(shape), dtype=dtype)
        capacity = storage.nbytes // ITEM_SIZES[dtype]
        count = 1
        for extent in shape:
            count *= extent
        steps = sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
        if count and (count > capacity or offset + steps >= capacity):
            raise InputError(
                f"{self.source}: found a tensor that claims shape {spec.shape} (strides "
                f"{tuple(strides)}, offset {offset}), expected at most the {capacity} elements "
                "that the file has for it; if it was expanded, save it with .clone(), else fetch "
                "the file again"
            )
        return spec
