"""The HLO text of a compiled program: its instructions, and how often each runs.

XLA's `cost_analysis()` takes the body of a loop once, whatever its trip count, and does not tell
collectives apart. The text says everything: https://openxla.org/xla/operation_semantics
"""

import functools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(
    r"\b(body|condition|calls|to_apply|true_computation|false_computation|branch_computations)="
    r"(\{[^}]*\}|%[\w.\-]+)"
)


@dataclass(frozen=True)
class Array:
    """One array of a shape.

    Attributes:
        size: bytes of its elements.
        stored: bytes it takes in the device's main memory: tiles are padded (a TPU's are of 8 x
            128 elements), and 0 for what the compiler keeps on the chip.
    """

    size: int
    stored: int


@dataclass(frozen=True)
class Instruction:
    """One line: `name = shape opcode(operands), attributes`."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]  # of its shape, tuples flattened
    operands: tuple[str, ...]
    inside: str  # the text between the parentheses
    attributes: str

    @property
    def size(self) -> int:
        """Bytes of all elements of its arrays."""
        return sum(array.size for array in self.arrays)

    @property
    def stored(self) -> int:
        """Bytes that its arrays take in main memory."""
        return sum(array.stored for array in self.arrays)

    @property
    def index(self) -> int | None:
        """Of a parameter its number, of a `get-tuple-element` the element's."""
        if self.opcode == "parameter":
            return int(self.inside)
        found = re.search(r"\bindex=(\d+)", self.attributes)
        return int(found[1]) if found else None

    @functools.cached_property
    def called(self) -> dict[str, tuple[str, ...]]:
        """Attribute -> computations, of those that it runs or is made of."""
        found = _CALLED.findall(self.attributes)
        return {key: tuple(_NAME.findall(names)) for key, names in found}


@dataclass(frozen=True)
class Computation:
    """Instructions by name, in order; `root` is the one whose value is the result."""

    instructions: dict[str, Instruction]
    root: Instruction

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        """By their numbers."""
        of = self.instructions.values()
        return {int(one.inside): one for one in of if one.opcode == "parameter"}

    def operands(self, one: Instruction) -> list[Instruction]:
        """The instructions whose values `one` takes."""
        return [self.instructions[name] for name in one.operands]

    def constant(self, name: str) -> int | None:
        """The value of an integer constant, copies of it included; None: it is none."""
        one = self.instructions[name]
        while one.opcode in ("copy", "bitcast", "convert") and one.operands:
            one = self.instructions[one.operands[0]]
        found = re.fullmatch(r"-?\d+", one.inside) if one.opcode == "constant" else None
        return int(found[0]) if found else None


@dataclass(frozen=True)
class Module:
    """A parsed HLO module; see `parse`."""

    computations: dict[str, Computation]
    entry: str
    devices: int

    @functools.cached_property
    def executed(self) -> list[tuple[Computation, Instruction, int]]:
        """What runs, in which computation, how often; without the insides of fusions."""
        return list(self._walk(self.entry, 1))

    @functools.cached_property
    def unknown_loops(self) -> int:
        """Loops whose trip count the text does not tell; their bodies are counted once."""
        return sum(
            self._trip_count(computation, one) is None
            for computation, one, _ in self.executed
            if one.opcode == "while"
        )

    def called(self, one: Instruction, key: str = "calls") -> Computation:
        """The first computation that an attribute names; of a fusion its inside."""
        return self.computations[one.called[key][0]]

    def _walk(self, name: str, count: int) -> Iterator[tuple[Computation, Instruction, int]]:
        computation = self.computations[name]
        for one in computation.instructions.values():
            yield computation, one, count
            if one.opcode == "while":
                trips = self._trip_count(computation, one) or 1
                yield from self._walk(one.called["body"][0], count * trips)
            elif one.opcode in ("call", "conditional", "async-start"):
                for names in one.called.values():
                    for inner in names:
                        yield from self._walk(inner, count)

    def _trip_count(self, computation: Computation, loop: Instruction) -> int | None:
        """As XLA noted it, or of a counter that the condition compares with a constant."""
        if noted := re.search(r'known_trip_count[^\d}]*"n":"(\d+)"', loop.attributes):
            return int(noted[1])
        condition = self.called(loop, "condition")
        if condition.root.opcode != "compare" or "direction=LT" not in condition.root.attributes:
            return None
        counter, limit = condition.operands(condition.root)
        index, end = counter.index, condition.constant(limit.name)
        if index is None or end is None:
            return None
        start, step = 0, 1  # of jax.lax.scan; checked where the text tells
        initial = computation.operands(loop)[0]
        if initial.opcode == "tuple":
            start = computation.constant(initial.operands[index]) or 0
        body = self.called(loop, "body")
        if body.root.opcode == "tuple":
            update = body.operands(body.root)[index]
            if update.opcode == "add":
                steps = map(body.constant, update.operands)
                step = next((value for value in steps if value), 1)
        return max(0, -(-(end - start) // step))


def numbers(text: str) -> list[int]:
    """Of a list such as "4,2"; "": none."""
    return [int(number) for number in text.split(",") if number]


def parse(text: str) -> Module:
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
            computations[name] = Computation(found, found[root])
            name = ""
        elif name and (match := _INSTRUCTION.match(line)):
            one = _instruction(*match.groups()[1:])
            found[one.name] = one
            root = one.name if match[1] else root
    if not entry:
        raise ValueError("HLO text: found no ENTRY computation")
    partitions = re.search(r"num_partitions=(\d+)", text)
    return Module(computations, entry, int(partitions[1]) if partitions else 1)


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
    width = re.search(r"\d+", dtype)  # the first number: of f8e4m3 the 8; a token has none
    bits = 8 if dtype == "pred" else int(width[0]) if width else 0
    sizes = numbers(dimensions)
    size = math.prod(sizes) * bits // 8
    order, _, tiling = layout.partition(":")
    if re.search(r"S\([1-9]", tiling):
        return Array(size, 0)
    tile = re.match(r"T\(([\d,]+)\)", tiling)
    minor = [sizes[axis] for axis in numbers(order)]
    if tile and minor:
        tiles = numbers(tile[1])[::-1]
        minor += [1] * (len(tiles) - len(minor))
        for position, extent in enumerate(tiles):
            minor[position] = -(-minor[position] // extent) * extent
        return Array(size, math.prod(minor) * bits // 8)
    return Array(size, size)
