"""What a compiled program does on each device, read from its HLO text: loops counted in full.

XLA's `cost_analysis()` takes the body of a loop once, whatever its trip count, and does not tell
collectives apart. The text says everything: https://openxla.org/xla/operation_semantics
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

import numpy as np

_BITS = re.compile(r"\d+")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_IOTA = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(
    r"\b(body|calls|to_apply|true_computation|false_computation|branch_computations)="
    r"(\{[^}]*\}|%[\w.\-]+)"
)
_KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "collective-permute",
    "all-to-all",
    "ragged-all-to-all",
    "collective-broadcast",
)
# Nothing is read or written for these, or what they call is counted instead.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call",
    "conditional", "after-all", "partition-id", "replica-id", "opt-barrier", "add-dependency",
    "async-start", "async-update", "async-done", "domain",
}  # fmt: skip
_VIEWS = {"bitcast", "reshape", "get-tuple-element"}
_PARTS = {"dynamic-slice", "slice", "gather"}


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a shape.

    Attributes:
        size: bytes of its elements.
        stored: bytes it takes in the device's main memory: tiles are padded (a TPU's are of 8 x
            128 elements), and 0 for what the compiler keeps on the chip.
    """

    size: int
    stored: int


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: `name = shape opcode(operands), attributes`."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]  # of its shape, tuples flattened
    operands: tuple[str, ...]
    inside: str  # the text between the parentheses
    attributes: str

    @functools.cached_property
    def called(self) -> dict[str, tuple[str, ...]]:
        """Attribute -> computations, of those that it runs or is made of."""
        found = _CALLED.findall(self.attributes)
        return {key: tuple(_NAME.findall(names)) for key, names in found}


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions by name, in order; `root` is the one whose value is the result."""

    instructions: dict[str, Instruction]
    root: str


@dataclasses.dataclass(frozen=True)
class Collective:
    """One kind of collective at one place of the program.

    Attributes:
        kind: as XLA calls it.
        times: how often a step runs it.
        size: bytes of the whole array (or arrays) that each group works on, each time.
        group: the devices of the first group, as positions in the mesh.
    """

    kind: str
    times: int
    size: int
    group: tuple[int, ...]

    @property
    def sent(self) -> float:
        """Bytes that each device sends in a step, by the algorithms that send least."""
        n = len(self.group)
        share = {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1.0}
        share["collective-broadcast"] = 1.0
        return self.times * self.size * share.get(self.kind, (n - 1) / n)


@dataclasses.dataclass(frozen=True)
class Program:
    """A parsed HLO module; see `parse`."""

    computations: dict[str, Computation]
    entry: str
    devices: int

    @functools.cached_property
    def runs(self) -> list[tuple[Computation, Instruction, int]]:
        """What runs, where it stands and how often; without the insides of fusions."""
        return list(self._walk(self.entry, 1))

    @functools.cached_property
    def unknown_loops(self) -> int:
        """Loops whose trip count the text does not tell; their bodies are counted once."""
        return sum(
            self._trips(computation, one) is None
            for computation, one, _ in self.runs
            if one.opcode == "while"
        )

    def collectives(self) -> list[Collective]:
        """All of them; those that take no part in moving data (groups of one) are left out.

        A TPU spreads one collective over several fusions, to hide it behind their work: they name
        the same channel.
        """
        found, channels = [], set()
        for computation, one, times in self.runs:
            inner = [(computation, one)]
            if one.opcode == "fusion":
                inner = list(self._inside(one))
            for place, each in inner:
                kind = each.opcode.removesuffix("-start")
                if kind not in _KINDS:
                    continue
                channel = re.search(r"channel_id=(\d+)", each.attributes)
                if one.opcode == "fusion" and channel:
                    if (id(computation), channel[1]) in channels:
                        continue
                    channels.add((id(computation), channel[1]))
                group = self._group(each)
                size = sum(a.size for o in each.operands for a in place.instructions[o].arrays)
                root = place.instructions[place.root]
                if kind == "all-gather":
                    size *= len(group)
                elif kind == "all-reduce" and one.opcode == "fusion" and "slice" in root.opcode:
                    kind = "reduce-scatter"  # what TPUs run for an all-reduce of which a part stays
                if len(group) > 1:
                    found.append(Collective(kind, times, size, group))
        return found

    def traffic(self) -> int:
        """Bytes read from and written to main memory by a step, outside of collectives.

        An upper bound of what a perfect cache would leave: every instruction reads its operands
        (of slices only the part) and writes its result (of updates in place only the part).
        """
        total = 0
        for computation, one, times in self.runs:
            kind = one.opcode.removesuffix("-start")
            if one.opcode in _FREE or one.opcode.endswith("-done") or kind in _KINDS:
                continue
            if one.opcode == "custom-call" and '"AllocateBuffer"' in one.attributes:
                continue
            total += times * self._moved(computation, one)
        return total

    def _walk(self, name: str, times: int) -> Iterator[tuple[Computation, Instruction, int]]:
        computation = self.computations[name]
        for one in computation.instructions.values():
            yield computation, one, times
            if one.opcode == "while":
                for body in one.called["body"]:
                    yield from self._walk(body, times * (self._trips(computation, one) or 1))
            elif one.opcode in ("call", "conditional", "async-start"):
                for names in one.called.values():
                    for inner in names:
                        yield from self._walk(inner, times)

    def _inside(self, fusion: Instruction) -> Iterator[tuple[Computation, Instruction]]:
        for name in fusion.called.get("calls", ()):
            computation = self.computations[name]
            for one in computation.instructions.values():
                yield computation, one
                if one.opcode == "fusion":
                    yield from self._inside(one)

    def _trips(self, computation: Computation, loop: Instruction) -> int | None:
        """As XLA noted it, or of a counter that the condition compares with a constant."""
        if noted := re.search(r'known_trip_count[^\d}]*"n":"(\d+)"', loop.attributes):
            return int(noted[1])
        named = re.search(r"condition=%([\w.\-]+)", loop.attributes)
        assert named is not None
        condition = self.computations[named[1]]
        root = condition.instructions[condition.root]
        if root.opcode != "compare" or "direction=LT" not in root.attributes:
            return None
        counter, limit = (condition.instructions[name] for name in root.operands)
        index, end = _index(counter), _constant(condition, limit.name)
        if index is None or end is None:
            return None
        start, step = 0, 1  # of jax.lax.scan; checked where the text tells
        given = computation.instructions[loop.operands[0]]
        if given.opcode == "tuple":
            start = _constant(computation, given.operands[index]) or 0
        body = self.computations[loop.called["body"][0]]
        result = body.instructions[body.root]
        if result.opcode == "tuple":
            update = body.instructions[result.operands[index]]
            if update.opcode == "add":
                steps = [_constant(body, name) for name in update.operands]
                step = next((value for value in steps if value), 1)
        return max(0, -(-(end - start) // step))

    def _group(self, one: Instruction) -> tuple[int, ...]:
        if pairs := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", one.attributes):
            return (int(pairs[1]), int(pairs[2]))
        return first_group(one.attributes, self.devices)

    def _moved(self, computation: Computation, one: Instruction) -> int:
        """Bytes read and written by one instruction."""
        operands = [computation.instructions[name] for name in one.operands]
        result = sum(array.stored for array in one.arrays)
        if one.opcode == "copy-start":  # (result, operand, context), one of them on the chip
            return sum(array.stored for array in one.arrays[:2])
        if one.opcode in ("slice-start", "dynamic-slice-start"):  # (operand, result, context)
            operand, part = one.arrays[:2]
            return part.stored + (part.size if operand.stored else 0)
        if one.opcode == "fusion" and one.called.get("calls"):
            inner = self.computations[one.called["calls"][0]]
            parameters = {_index(i): i for i in inner.instructions.values() if _is_parameter(i)}
            read = sum(
                min(self._read(inner, parameters[n].name), _stored(operand))
                for n, operand in enumerate(operands)
                if n in parameters
            )
            return read + min(result, self._written(inner, inner.root))
        if one.opcode in _PARTS:
            return 2 * result
        if one.opcode == "dynamic-update-slice":
            return 2 * _stored(operands[1])
        return result + sum(map(_stored, operands))

    def _read(self, computation: Computation, name: str) -> int:
        """Bytes that a fusion reads of one of its parameters."""
        read = 0
        whole = _stored(computation.instructions[name])
        for user in computation.instructions.values():
            if name not in user.operands:
                continue
            if user.opcode in _PARTS and user.operands[0] == name:
                # What a fusion computes inside is not stored: its size counts, of slices too.
                read += sum(array.size for array in user.arrays)
            elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
                continue
            elif user.opcode in _VIEWS:
                read += self._read(computation, user.name)
            elif user.opcode == "fusion":
                inner = self.computations[user.called["calls"][0]]
                for one in inner.instructions.values():
                    if _is_parameter(one) and user.operands[_index(one) or 0] == name:
                        read += self._read(inner, one.name)
            else:
                return whole
        return min(read, whole)

    def _written(self, computation: Computation, name: str) -> int:
        """Bytes that a fusion writes of its result."""
        one = computation.instructions[name]
        if one.opcode == "tuple":
            return sum(self._written(computation, operand) for operand in one.operands)
        if one.opcode in _VIEWS and one.operands:
            return self._written(computation, one.operands[0])
        if one.opcode == "dynamic-update-slice":
            update = computation.instructions[one.operands[1]]
            return sum(array.size for array in update.arrays)
        if one.opcode == "fusion":
            inner = self.computations[one.called["calls"][0]]
            return self._written(inner, inner.root)
        return _stored(one)


def parse(text: str) -> Program:
    """Reads the text of `jax.stages.Compiled.as_text()`.

    Raises:
        ValueError: there is no entry computation in it.
    """
    computations: dict[str, Computation] = {}
    entry, name, root = "", "", ""
    found: dict[str, Instruction] = {}
    for line in text.splitlines():
        if header := _HEADER.match(line):
            name, found, root = header[2], {}, ""
            entry = name if header[1] else entry
        elif line.startswith("}") and name:
            computations[name] = Computation(found, root)
            name = ""
        elif name and (match := _INSTRUCTION.match(line)):
            one = _instruction(*match.groups()[1:])
            found[one.name] = one
            root = one.name if match[1] else root
    if not entry:
        raise ValueError("HLO text: found no ENTRY computation")
    partitions = re.search(r"num_partitions=(\d+)", text)
    return Program(computations, entry, int(partitions[1]) if partitions else 1)


def _instruction(name: str, shape: str, opcode: str, rest: str) -> Instruction:
    depth, end = 1, len(rest)
    for position, character in enumerate(rest):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            end = position
            break
    inside = rest[:end]
    arrays = tuple(_array(*match) for match in _ARRAY.findall(shape))
    operands = tuple(_NAME.findall(inside)) if opcode not in ("constant", "parameter") else ()
    return Instruction(name, opcode, arrays, operands, inside, rest[end + 1 :])


def _array(dtype: str, dimensions: str, layout: str) -> Array:
    width = _BITS.search(dtype)  # the first number: of f8e4m3 the 8; a token has none
    bits = 8 if dtype == "pred" else int(width[0]) if width else 0
    sizes = [int(size) for size in dimensions.split(",") if size]
    size = math.prod(sizes) * bits // 8
    order, _, tiling = layout.partition(":")
    if re.search(r"S\([1-9]", tiling):
        return Array(size, 0)
    tile = re.match(r"T\(([\d,]+)\)", tiling)
    minor = [sizes[int(axis)] for axis in order.split(",") if axis]
    if tile and minor:
        tiles = [int(extent) for extent in tile[1].split(",")][::-1]
        minor += [1] * (len(tiles) - len(minor))
        for position, extent in enumerate(tiles):
            minor[position] = -(-minor[position] // extent) * extent
        return Array(size, math.prod(minor) * bits // 8)
    return Array(size, size)


def first_group(attributes: str, devices: int) -> tuple[int, ...]:
    """The first of the groups of devices that work together, as any of XLA's notations has it.

    Args:
        attributes: of the collective; no groups in it: all devices are one.
        devices: of the program.
    """
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return tuple(int(device) for device in listed[1].split(","))
    if iota := re.search(rf"replica_groups=\[([\d,]+)\]<={_IOTA}", attributes):
        order = _iota(iota[2], iota[3])
        return tuple(order.reshape([int(size) for size in iota[1].split(",")])[0].tolist())
    # GPUs: of several meshes one is made, its devices maybe in another order.
    mesh = re.search(
        rf"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((?:{_IOTA}|([\d,]+))\))?\s*"
        r"\{([^}]*)\}",
        attributes,
    )
    if mesh:
        axes = re.findall(r"'([^']+)'=(\d+)", mesh[1])
        sizes = [int(size) for _, size in axes]
        order = np.arange(math.prod(sizes))
        if mesh[2]:
            order = _iota(mesh[2], mesh[3])
        elif mesh[4]:
            order = np.array([int(device) for device in mesh[4].split(",")])
        used = re.findall(r"'([^']+)'", mesh[5])
        group = order.reshape(sizes)[tuple(slice(None) if a in used else 0 for a, _ in axes)]
        return tuple(group.ravel().tolist())
    return tuple(range(devices))


def _iota(sizes: str, order: str | None) -> np.ndarray:
    """`[4,2]T(1,0)`: the numbers from 0 on in that shape, its axes in that order."""
    shape = [int(size) for size in sizes.split(",")]
    return (
        np.arange(math.prod(shape))
        .reshape(shape)
        .transpose([int(axis) for axis in order.split(",")] if order else range(len(shape)))
        .ravel()
    )


def _stored(one: Instruction) -> int:
    return sum(array.stored for array in one.arrays)


def _is_parameter(one: Instruction) -> bool:
    return one.opcode == "parameter"


def _index(one: Instruction) -> int | None:
    """Of a parameter its number, of a `get-tuple-element` the element's."""
    if one.opcode == "parameter":
        return int(one.inside)
    found = re.search(r"\bindex=(\d+)", one.attributes)
    return int(found[1]) if found else None


def _constant(computation: Computation, name: str) -> int | None:
    """The value of an integer constant, copies of it included; None: it is none."""
    one = computation.instructions[name]
    while one.opcode in ("copy", "bitcast", "convert") and one.operands:
        one = computation.instructions[one.operands[0]]
    found = re.fullmatch(r"-?\d+", one.inside) if one.opcode == "constant" else None
    return int(found[0]) if found else None
