"""Moves, parameters, and conversions between types."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from .numbers import F32, F64, TYPES, U32, UNSIGNED, Array, flush, from_bf16, to_bf16, to_f16, to_tf32, width
from .registry import Step, UnknownInstructionError, instruction

if TYPE_CHECKING:
    from .machine import Machine
    from .program import Instruction


@instruction(r"mov\.(?P<kind>pred|[subf](?:16|32|64))")
def move(m: Machine, i: Instruction, kind: str) -> Step:
    target, source = i.operands
    bits = kind if kind == "pred" else f"b{kind[1:]}"
    if target.startswith("{"):
        return _unpack(m, target, source, bits)
    if source.startswith("{"):
        return _pack(m, target, source, bits)
    registers, to, of = m.registers, m.target(target), m.source(source, bits)

    def run() -> None:
        if registers[of] is None:
            raise AttributeError(source)
        registers[to] = registers[of]

    return run, [to]


def _unpack(m: Machine, target: str, source: str, kind: str) -> Step:
    registers, of = m.registers, m.source(source, kind)
    targets = [m.target(name) for name in m.listed(target)]
    small = UNSIGNED[width(kind) // len(targets)]

    def run() -> None:
        parts = registers[of].view(small).reshape(-1, len(targets))
        for place, to in enumerate(targets):
            registers[to] = np.ascontiguousarray(parts[:, place])

    return run, targets


def _pack(m: Machine, target: str, source: str, kind: str) -> Step:
    registers, to, names = m.registers, m.target(target), m.listed(source)
    size = width(kind) // len(names)
    sources = [m.source(name, f"b{8 * size}") for name in names]
    # Compilers leave unused halves undefined.
    undefined = np.full(m.lanes, 0xDEADBEEF & (1 << 8 * size) - 1, UNSIGNED[size])

    def run() -> None:
        parts = [undefined if registers[of] is None else registers[of] for of in sources]
        registers[to] = np.stack(parts, 1).view(UNSIGNED[width(kind)]).reshape(-1)

    return run, [to]


@instruction(r"cvta(?:\.to)?\.(?P<space>global|shared|param)\.(?P<kind>u32|u64)")
def convert_address(m: Machine, i: Instruction, space: str, kind: str) -> Step:
    """Generic addresses are those of global memory here."""
    if space != "global":
        raise UnknownInstructionError(i, "generic addresses of shared memory")
    return move(m, i, kind)


@instruction(r"ld\.param\.(?P<kind>[subf](?:8|16|32|64))")
def load_parameter(m: Machine, i: Instruction, kind: str) -> Step:
    name, _, offset = i.operands[1].strip("[] ").partition("+")
    places = [place for place, (known, _) in enumerate(m.program.parameters) if known == name.strip()]
    if not places or offset.strip() not in ("", "0"):
        raise UnknownInstructionError(i, "no such parameter")
    registers, to, out = m.registers, m.target(i.operands[0]), m.storage(i.operands[0])
    value = m.launch.parameters[places[0]] % (1 << 8 * width(kind))
    if kind[0] == "s" and value >> 8 * width(kind) - 1:
        value -= 1 << 8 * width(kind)
    constant = np.full(m.lanes, value % (1 << 8 * np.dtype(out).itemsize), out)

    def run() -> None:
        registers[to] = constant

    return run, [to]


# --- conversions ------------------------------------------------------------------------------------------------------

_ROUNDINGS: dict[str, Callable[[Array], Array]] = {
    "rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil,
}  # fmt: skip
_INTEGER = r"[su](?:8|16|32|64)"


@instruction(rf"cvt(?P<saturate>\.sat)?\.(?P<to>{_INTEGER})\.(?P<of>{_INTEGER})")
def convert_integers(m: Machine, i: Instruction, saturate: str | None, to: str, of: str) -> Step:
    limits = np.iinfo(TYPES[to])
    if saturate and "u64" in (of, to):
        raise UnknownInstructionError(i)

    def function(value: Array) -> Array:
        if saturate:
            value = np.clip(value.astype(np.int64), limits.min, limits.max)
        return value.astype(TYPES[to])

    return _converted(m, i, to, of, function)


@instruction(
    rf"cvt\.(?P<rounding>rni|rzi|rmi|rpi)(?P<ftz>\.ftz)?(?:\.sat)?\.(?P<to>{_INTEGER})\.(?P<of>f16|bf16|f32|f64)"
)
def convert_to_integer(m: Machine, i: Instruction, rounding: str, ftz: str | None, to: str, of: str) -> Step:
    """Clamped to the range of the result; NaN gives 0 (the largest negative number for 64 bits)."""
    limits, kind = np.iinfo(TYPES[to]), TYPES[to]

    def function(value: Array) -> Array:
        exact = _ROUNDINGS[rounding]((flush(value) if ftz else value).astype(F64))
        nan = 0 if width(to) < 8 and of != "f64" else 1 << 8 * width(to) - 1
        inside = np.where(
            np.isnan(exact), 0, np.clip(exact, limits.min, np.nextafter(2.0 ** (8 * width(to) - (to[0] == "s")), 0))
        )
        found = np.where(exact >= limits.max, limits.max, inside.astype(kind))
        return np.where(np.isnan(exact), np.array(nan, UNSIGNED[width(to)]).view(kind), found.astype(kind))

    return _converted(m, i, to, of, function)


@instruction(rf"cvt\.rn\.(?P<to>f16|bf16|f32|f64)\.(?P<of>{_INTEGER})")
def convert_from_integer(m: Machine, i: Instruction, to: str, of: str) -> Step:
    if to in ("f16", "bf16") and width(of) > 4:
        raise UnknownInstructionError(i)

    def function(value: Array) -> Array:
        if to in ("f32", "f64"):
            return value.astype(TYPES[to])  # NumPy rounds once
        from .numbers import narrow

        return narrow(value.astype(F64), to)

    return _converted(m, i, to, of, function)


@instruction(r"cvt\.(?P<rounding>rni|rzi|rmi|rpi)(?P<ftz>\.ftz)?\.f32\.f32")
def round_to_whole(m: Machine, i: Instruction, rounding: str, ftz: str | None) -> Step:
    return m.lanewise(i, ["f32"], lambda a: _ROUNDINGS[rounding](flush(a) if ftz else a))


@instruction(r"cvt(?:\.rn)?(?P<ftz>\.ftz)?\.(?P<to>f16|bf16|f32|f64)\.(?P<of>f16|bf16|f32|f64)")
def convert_floats(m: Machine, i: Instruction, ftz: str | None, to: str, of: str) -> Step:
    """Only float32 is flushed."""
    if (to, of) == ("bf16", "f64"):
        raise UnknownInstructionError(i)

    def function(value: Array) -> Array:
        if ftz and of == "f32":
            value = flush(value)
        if to == "bf16":
            return to_bf16(value.astype(F32))
        found = to_f16(value) if to == "f16" else value.astype(TYPES[to])
        return flush(found) if ftz and to == "f32" else found

    return _converted(m, i, to, of, function)


@instruction(r"cvt\.rn(?P<relu>\.relu)?\.(?P<to>bf16x2|f16x2)\.f32")
def convert_to_pair(m: Machine, i: Instruction, relu: str | None, to: str) -> Step:
    """The first operand becomes the upper half."""
    convert = to_bf16 if to == "bf16x2" else to_f16

    def function(a: Array, b: Array) -> Array:
        if relu:
            a, b = (np.where(np.isnan(x), x, np.maximum(x, F32(0))) for x in (a, b))
        return convert(a).astype(U32) << U32(16) | convert(b).astype(U32)

    return m.lanewise(i, ["f32"] * 2, function)


@instruction(r"cvt\.(?P<rounding>rna|rn|rz)\.tf32\.f32")
def convert_to_tf32(m: Machine, i: Instruction, rounding: str) -> Step:
    if rounding == "rn":
        raise UnknownInstructionError(i)
    return m.lanewise(i, ["b32"], lambda a: to_tf32(a, nearest=rounding == "rna"))


def _converted(m: Machine, i: Instruction, to: str, of: str, function: Callable[[Array], Array]) -> Step:
    """`function` of the operand seen as type `of`; its result is extended to the register."""
    registers, target, source = m.registers, m.target(i.operands[0]), m.source(i.operands[1], f"b{8 * _size(of)}")
    out = m.storage(i.operands[0])

    def run() -> None:
        words = registers[source]
        if words.itemsize > _size(of):
            words = words.astype(UNSIGNED[_size(of)])
        value: Any = from_bf16(words) if of == "bf16" else words.view(TYPES[of])
        found = function(value)
        if found.itemsize < np.dtype(out).itemsize:
            signed = to[0] == "s"
            found = found.astype(TYPES[f"s{8 * np.dtype(out).itemsize}"] if signed else out)
        registers[target] = found.view(out)

    return run, [target]


def _size(kind: str) -> int:
    return 2 if kind == "bf16" else width(kind)
