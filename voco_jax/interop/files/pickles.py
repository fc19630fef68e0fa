"""What a PyTorch pickle holds, without running it and without torch.

A `.pt` file is a pickle, which is a program. `torch.load(weights_only=True)` runs only a small part
of what pickle can do, but that part still takes as much memory as the file asks for
(`torch.Tensor(10**6, 10**6)`, `bytearray(10**12)`, a tensor expanded with stride 0). So the
pickle is first read here: opcodes push plain values, nothing is called, and what a tensor claims
is compared with what its storage has.
"""

import itertools
import math
import pickletools
from collections.abc import Callable, Iterable, Sized
from dataclasses import dataclass
from types import NoneType
from typing import Any

from voco_jax.errors import InputError
from voco_jax.interop.files.tensors import ITEM_SIZES, MAX_EXTENT, TensorSpec
from voco_jax.interop.match import printable


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


_STORAGES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16", "LongStorage": "int64", "IntStorage": "int32",
    "ShortStorage": "int16", "CharStorage": "int8", "ByteStorage": "uint8", "BoolStorage": "bool",
}  # fmt: skip
MAX_INSTRUCTIONS = 150_000
"""Of a pickle, read in half a second; two networks and their optimizer take 45,000."""
_PLAIN = (str, int, float, bool, NoneType)
"""Types of keys and members of sets: the hash of deeply nested tuples would end the process."""
_MARK = object()
_OPAQUE = object()
"""Stands for a harmless value that is of no interest (a set, bytes, a device)."""
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "MARK": lambda: _MARK,
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": lambda: _OPAQUE,
}
"""Instructions that push the same value each time."""
_LITERALS = frozenset(
    ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING")
)
"""Instructions that push their argument."""


@dataclass(frozen=True)
class _Global:
    module: str
    name: str

    def __str__(self) -> str:
        return printable(f"{self.module}.{self.name}"[:200])


def read_pickle(content: bytes, source: str, check: Callable[[Storage], None]) -> Any:
    """Reads the pickle of a PyTorch file.

    Args:
        content: the pickle.
        source: the file, for messages.
        check: called with each storage that the pickle names; raises where the file lacks it.

    Returns:
        The object, with a `TensorSpec` for each tensor.

    Raises:
        InputError: it needs more than weights do, claims more than it has, or is damaged.
    """
    try:
        return _Reader(source, check, len(content)).run(content)
    except InputError:
        raise
    except Exception as error:  # whatever a damaged or hostile pickle makes fail
        raise InputError(
            f"{source}: damaged, its pickle cannot be read "
            f"({type(error).__name__}: {printable(str(error))[:200]}); fetch the file again"
        ) from error


class _Reader:
    """The instructions that torch.load(weights_only=True) knows, as a stack machine.

    `budget`: items that the calls may copy in all; the pickle's length: every item takes a byte.
    """

    def __init__(self, source: str, check: Callable[[Storage], None], budget: int) -> None:
        self.source = source
        self.check = check
        self.budget = budget
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, content: bytes) -> Any:
        arg: Any
        instructions = itertools.islice(pickletools.genops(content), MAX_INSTRUCTIONS)
        for opcode, arg, _ in instructions:
            match opcode.name:
                case "STOP":
                    return self.stack.pop()
                case "PROTO":
                    pass
                case name if name in _CONSTANTS:
                    self.stack.append(_CONSTANTS[name]())
                case name if name in _LITERALS:
                    self.stack.append(arg)
                case "BINPUT" | "LONG_BINPUT":
                    self.memo[arg] = self.stack[-1]
                case "BINGET" | "LONG_BINGET":
                    self.stack.append(self.memo[arg])
                case "GLOBAL":
                    module, _, name = arg.partition(" ")
                    self.stack.append(_Global(module.replace("__builtin__", "builtins"), name))
                case name:
                    self._combine(name)
        raise InputError(
            f"{self.source}: its pickle goes on after {MAX_INSTRUCTIONS} instructions, expected at "
            "most that many, enough for 3,000 tensors; save the network's state_dict() alone"
        )

    def _combine(self, instruction: str) -> None:
        """What takes values from the stack."""
        match instruction:
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(instruction[-1])
                self.stack[-count:] = [tuple(self.stack[-count:])]
            case "TUPLE":
                self.stack.append(tuple(self._pop_mark()))
            case "APPEND":
                item = self.stack.pop()
                self.stack[-1].append(item)
            case "APPENDS":
                items = self._pop_mark()
                self.stack[-1].extend(items)
            case "SETITEM":
                value, key = self.stack.pop(), self.stack.pop()
                self._set_items([key, value])
            case "SETITEMS":
                self._set_items(self._pop_mark())
            case "BINPERSID":
                self.stack.append(self._storage(self.stack.pop()))
            case "REDUCE":
                arguments, function = self.stack.pop(), self.stack.pop()
                self.stack.append(self._call(function, arguments))
            case "BUILD":
                # torch hashes the keys of an OrderedDict's state, whatever it is.
                state = self.stack.pop()
                if not isinstance(self.stack[-1], dict) or not isinstance(state, dict):
                    raise self._refusal("an object that is rebuilt with its own code")
            case "NEWOBJ":
                raise self._refusal(f"an object of type {self.stack[-2]}")
            case _:
                raise self._refusal(f"the pickle instruction {instruction}")

    def _pop_mark(self) -> list[Any]:
        # A stack without a mark raises here, as IndexError.
        items: list[Any] = []
        while (item := self.stack.pop()) is not _MARK:
            items.append(item)
        return items[::-1]

    def _set_items(self, items: list[Any]) -> None:
        self._check_plain(items[::2])
        self.stack[-1].update(zip(items[::2], items[1::2], strict=True))

    def _check_plain(self, values: Iterable[Any]) -> None:
        if not all(isinstance(value, _PLAIN) for value in values):
            raise self._refusal("a key or member of a set that is neither text nor number")

    def _spend(self, copied: Sized) -> None:
        """One value that is called upon often would take more memory than the file has."""
        self.budget -= len(copied)
        if self.budget < 0:
            raise ValueError("it copies its values again and again")

    def _refusal(self, need: str) -> InputError:
        return InputError(
            f"{self.source}: found {need}, expected tensors in plain dicts (it is read with "
            "weights_only, which runs no code of the file). If you trust where it comes from, "
            "make a clean copy: python -c \"import torch; c = torch.load('FILE', "
            "weights_only=False, map_location='cpu'); torch.save(c['state_dict'], 'clean.pt')\""
        )

    def _storage(self, persistent: Any) -> Storage:
        _, storage_type, key, _, count = persistent
        # Values that are not plain stay out of messages: lists of lists may have no end.
        if not isinstance(storage_type, _Global) or not isinstance(key, str):
            raise ValueError("a storage without a name or a type")
        if not _is_extent(count):
            raise ValueError(f"storage {key} of another size than 0 to {MAX_EXTENT} elements")
        if storage_type == _Global("torch.storage", "UntypedStorage"):
            storage = Storage(key=key, dtype=None, nbytes=count)
        elif storage_type.module == "torch" and storage_type.name in _STORAGES:
            dtype = _STORAGES[storage_type.name]
            storage = Storage(key=key, dtype=dtype, nbytes=count * ITEM_SIZES[dtype])
        else:
            raise self._refusal(f"a tensor of type {storage_type}")
        self.check(storage)
        return storage

    def _call(self, function: Any, arguments: Any) -> Any:
        if not isinstance(function, _Global):
            raise ValueError("something that is no function is called")
        match (function.module, function.name):
            case ("collections", "OrderedDict") if not arguments:
                return {}
            case ("torch", "device"):
                return _OPAQUE
            case (
                ("collections", "Counter")
                | ("torch", "Size")
                | ("builtins", "set")
                | ("_codecs", "encode")
            ):
                self._spend(arguments[0])
                self._check_plain(arguments[0])
                return _OPAQUE
            case ("torch._utils", "_rebuild_parameter" | "_rebuild_parameter_with_state"):
                if not isinstance(arguments[0], TensorSpec):
                    raise ValueError("a parameter without a tensor")
                return arguments[0]
            case ("torch._utils", "_rebuild_tensor_v2"):
                storage, offset, shape, strides = arguments[:4]
                return self._tensor(storage, offset, shape, strides, storage.dtype)
            case ("torch._utils", "_rebuild_tensor_v3"):
                storage, offset, shape, strides, _, _, dtype = arguments[:7]
                return self._tensor(storage, offset, shape, strides, dtype.name)
        raise self._refusal(f"an object of type {function}")

    def _tensor(
        self, storage: Storage, offset: int, shape: Any, strides: Any, dtype: str | None
    ) -> TensorSpec:
        if dtype not in ITEM_SIZES:
            raise self._refusal(f"a tensor of type {printable(str(dtype)[:200])}")
        self._spend(shape)
        spec = TensorSpec(shape=tuple(shape), dtype=dtype)
        if len(strides) != len(shape) or not all(map(_is_extent, (offset, *strides))):
            raise ValueError(
                f"a tensor of {len(shape)} dimensions with {len(strides)} strides, or an offset or "
                f"stride that is not from 0 to {MAX_EXTENT}"
            )
        capacity = storage.nbytes // ITEM_SIZES[dtype]
        count = math.prod(shape)
        steps = sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
        if count and (count > capacity or offset + steps >= capacity):
            raise InputError(
                f"{self.source}: found a tensor that claims shape {spec.shape} (strides "
                f"{tuple(strides)}, offset {offset}), expected at most the {capacity} elements "
                "that the file has for it; if it was expanded, save it with .clone(), else fetch "
                "the file again"
            )
        return spec


def _is_extent(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_EXTENT
