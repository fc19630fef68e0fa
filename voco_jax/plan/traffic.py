"""The bytes that a compiled program moves to and from a device's main memory."""

from voco_jax.plan.collectives import KINDS
from voco_jax.plan.hlo import Computation, Instruction, Module

# Nothing is read or written for these, or what they call is counted instead.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call",
    "conditional", "after-all", "partition-id", "replica-id", "opt-barrier", "add-dependency",
    "async-start", "async-update", "domain",
}  # fmt: skip
_VIEWS = {"bitcast", "reshape", "get-tuple-element"}
_SLICES = {"dynamic-slice", "slice", "gather"}


def count_traffic(module: Module) -> int:
    """Bytes read from and written to main memory by a step, outside of collectives.

    An upper bound of what a perfect cache would leave: every instruction reads its operands
    (of slices only the part) and writes its result (of updates in place only the part).
    """
    total = 0
    for computation, one, count in module.executed:
        kind = one.opcode.removesuffix("-start")
        if one.opcode in _FREE or one.opcode.endswith("-done") or kind in KINDS:
            continue
        if one.opcode == "custom-call" and '"AllocateBuffer"' in one.attributes:
            continue
        total += count * _moved(module, computation, one)
    return total


def _moved(module: Module, computation: Computation, one: Instruction) -> int:
    """Bytes read and written by one instruction."""
    operands = computation.operands(one)
    if one.opcode == "copy-start":  # (result, operand, context), one of them on the chip
        return sum(array.stored for array in one.arrays[:2])
    if one.opcode in ("slice-start", "dynamic-slice-start"):  # (operand, result, context)
        operand, part = one.arrays[:2]
        return part.stored + (part.size if operand.stored else 0)
    if one.opcode == "fusion" and one.called.get("calls"):
        inner = module.called(one)
        read = sum(
            min(_read(module, inner, parameter.name), operands[number].stored)
            for number, parameter in inner.parameters.items()
        )
        return read + min(one.stored, _written(module, inner, inner.root))
    if one.opcode in _SLICES:
        return 2 * one.stored
    if one.opcode == "dynamic-update-slice":
        return 2 * operands[1].stored
    return one.stored + sum(operand.stored for operand in operands)


def _read(module: Module, computation: Computation, name: str) -> int:
    """Bytes that a fusion reads of one of its parameters."""
    read = 0
    stored = computation.instructions[name].stored
    for user in computation.instructions.values():
        if name not in user.operands:
            continue
        if user.opcode in _SLICES and user.operands[0] == name:
            read += user.size  # what a fusion computes inside is not stored: of slices the size
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
            continue
        elif user.opcode in _VIEWS:
            read += _read(module, computation, user.name)
        elif user.opcode == "fusion":
            inner = module.called(user)
            for number, parameter in inner.parameters.items():
                if user.operands[number] == name:
                    read += _read(module, inner, parameter.name)
        else:
            return stored
    return min(read, stored)


def _written(module: Module, computation: Computation, one: Instruction) -> int:
    """Bytes that a fusion writes of its result."""
    operands = computation.operands(one)
    if one.opcode == "tuple":
        return sum(_written(module, computation, operand) for operand in operands)
    if one.opcode in _VIEWS and operands:
        return _written(module, computation, operands[0])
    if one.opcode == "dynamic-update-slice":
        return operands[1].size
    if one.opcode == "fusion":
        inner = module.called(one)
        return _written(module, inner, inner.root)
    return one.stored
