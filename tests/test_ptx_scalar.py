"""Integer instructions, bits, comparisons and conversions of the machine that executes PTX, against Python's integers."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from fractions import Fraction

import pytest
from effformer.bench.offline.ptx.registry import UnknownInstructionError
from ptx_numbers import BF16, F16, F32, F64, Format, extreme
from ptx_runs import Expected, check_rows, operands, read, rows, run

FORMATS: dict[str, Format] = {"f16": F16, "bf16": BF16, "f32": F32, "f64": F64}
INTEGERS = [0, 1, 2, 3, 7, 31, 32, 33, 255, -1, -2, -3, -7, 0x7FFF, 0x8000, -0x8000, 0xFFFF, 0x7FFFFFFF, -0x80000000, 0xFFFFFFFF,
            2**63 - 1, -(2**63), 0x80808080, 0x7F7F7F7F]  # fmt: skip


def cut(value: int, size: int) -> int:
    return value & (1 << size) - 1


def number(word: int, kind: str) -> int:
    """The integer that the lower bits of a word hold."""
    size = int(kind[1:])
    value = cut(word, size)
    return value - (1 << size) if kind[0] == "s" and value >> size - 1 else value


def toward_zero(a: int, b: int) -> int:
    return int(math.copysign(1, a) * math.copysign(1, b)) * (abs(a) // abs(b))


def integer(label: str, size: int) -> Expected:
    """What an integer instruction gives."""
    name, _, immediate = label.partition(" ")
    *parts, kind = name.split(".")
    op, part = parts[0], parts[1] if len(parts) > 1 else ""

    def result(a: int, b: int, c: int) -> int | None:
        if op == "dp4a":
            signs = "s" if part == "s32" else "u", kind[0]
            x, y = (
                [number(word >> 8 * place, f"{sign}8") for place in range(4)]
                for word, sign in zip((a, b), signs, strict=True)
            )
            return cut(sum(i * j for i, j in zip(x, y, strict=True)) + c, 32)
        if op == "popc":
            return cut(a, int(kind[1:])).bit_count()
        if op == "clz":
            return int(kind[1:]) - cut(a, int(kind[1:])).bit_length()
        b = int(immediate.rstrip("U"), 0) if immediate else b
        x, y = number(a, kind), number(b, kind)
        if op in ("div", "rem"):
            if y == 0:
                return None
            return cut(toward_zero(x, y) if op == "div" else x - toward_zero(x, y) * y, size)
        if op in ("mul", "mad"):
            product = x * y >> int(kind[1:]) if part == "hi" else x * y
            return cut(product + (c if op == "mad" else 0), size)
        return cut(
            {"add": x + y, "sub": x - y, "min": min(x, y), "max": max(x, y), "neg": -x, "abs": abs(x), "and": x & y}[
                op
            ],
            size,
        )

    return result


def test_integer_arithmetic() -> None:
    check_rows("integers", operands([cut(value, 64) for value in INTEGERS], 1), integer)


def bitwise(label: str, size: int) -> Expected:
    """What an instruction on bits gives."""
    name, _, immediate = label.partition(" ")
    op, *parts = name.split(".")

    def permuted(a: int, b: int, selector: int) -> int:
        both, found = cut(a, 32) | cut(b, 32) << 32, 0
        for place in range(4):
            pick = selector >> 4 * place & 15
            byte = both >> 8 * (pick & 7) & 255
            found |= ((255 if byte >> 7 else 0) if pick & 8 else byte) << 8 * place
        return found

    def field(a: int, start: int, length: int) -> int:
        """As the pseudo code of the PTX ISA."""
        sign = a >> min(start + length - 1, 31) & 1 if parts[0] == "s32" and length else 0
        bits = [a >> start + i & 1 if i < length and start + i <= 31 else sign for i in range(32)]
        return sum(bit << i for i, bit in enumerate(bits))

    def result(a: int, b: int, c: int) -> int:
        if parts[-1] == "pred":
            p, q = number(a, "s32") < number(b, "s32"), cut(a, 32) < cut(b, 32)
            return int({"and": p and q, "or": p or q, "xor": p != q, "not": not p, "mov": q}[op])
        if op in ("and", "or", "xor", "not"):
            return cut({"and": a & b, "or": a | b, "xor": a ^ b, "not": ~a}[op], size)
        if op in ("shl", "shr"):
            amount = min(cut(b, 32), size)
            return cut(a << amount if op == "shl" else number(a, f"{parts[0][0]}{size}") >> amount, size)
        if op == "shf":
            amount = min(cut(c, 32), 32) if parts[1] == "clamp" else c & 31
            low, high = cut(a, 32), cut(b, 32)
            return cut(
                high << amount | low >> 32 - amount if parts[0] == "l" else high << 32 - amount | low >> amount, 32
            )
        if op == "bfe":
            return field(cut(a, 32), b & 255, c & 255)
        if op == "bfi":
            start, length = cut(c, 32) >> 8 & 255, c & 255
            return sum((a >> i - start if start <= i < start + length else b >> i) << i & 1 << i for i in range(32))
        if op == "prmt":
            return permuted(a, b, int(immediate, 0) if immediate else c)
        assert op == "lop3"
        table = int(immediate)
        return sum((table >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | c >> i & 1) & 1) << i for i in range(32))

    return result


def test_bits() -> None:
    fields = [0x0800, 0x041F, 0x1F01, 0x2002, 0x2010, 0xFF10, 0x00FF, 0x7654, 0x89AB, 0xFEDC]
    check_rows("bits", operands([cut(value, 64) for value in INTEGERS[:-5] + fields], 2), bitwise)


FLOATS32 = [0x00000000, 0x80000000, 0x00000001, 0x80000001, 0x007FFFFF, 0x00800000, 0x80800000, 0x3F800000, 0xBF800000, 0x3F000000,
            0xBF000000, 0x3FC00000, 0x40200000, 0x7F7FFFFF, 0xFF7FFFFF, 0x7F800000, 0xFF800000, 0x7FC00000]  # fmt: skip
DOUBLES = [0x0000000000000000, 0x8000000000000000, 0x3FF0000000000000, 0xBFF0000000000000, 0x7FF0000000000000, 0xFFF0000000000000,
           0x7FF8000000000000, 0x0000000000000001]  # fmt: skip


def compared(label: str, size: int) -> Expected:
    """What a comparison, or a selection after it, gives."""
    parts = label.split(".")

    def compare(name: str, a: int, b: int, kind: str, *, ftz: bool = False) -> bool:
        unordered = False
        x: float = number(a, "u" + kind[1:])
        y: float = number(b, "u" + kind[1:])
        if kind[0] == "f":
            bits = [F32.flush(int(one)) if ftz else int(one) for one in (x, y)]
            x, y = (FORMATS[kind].value(one) for one in bits)
            unordered = math.isnan(x) or math.isnan(y)
            if name in ("num", "nan"):
                return unordered == (name == "nan")
            if unordered:
                return len(name) == 3
            name = name[:2]
        elif kind[0] == "s":
            x, y = number(a, kind), number(b, kind)
        return {"eq": x == y, "ne": x != y, "lt": x < y, "le": x <= y, "gt": x > y, "ge": x >= y, "lo": x < y, "ls": x <= y,
                "hi": x > y, "hs": x >= y}[name]  # fmt: skip

    def result(a: int, b: int, c: int) -> int:
        if label == "selp.f32":
            is_nan = F32.is_nan(cut(a, 32))
            return 0x3F800000 if is_nan or compare("le", a, b, "f32") else cut(b, 32)
        if parts[0] == "selp":
            return cut(a if cut(a, 32) < cut(b, 32) else b, size)
        found = compare(parts[1], a, b, parts[-1], ftz="ftz" in parts)
        other = number(b, "s32") > number(c, "s32")
        if "and" in parts:
            return int(found and other)
        if "or" in parts:
            return int(found or other)
        return int(found != other if "xor" in parts else found)

    return result


@pytest.mark.parametrize(
    ("edges", "seed"), [(FLOATS32, 3), (DOUBLES + [value << 32 | 0x80000001 for value in FLOATS32], 4), (INTEGERS, 5)]
)
def test_comparisons(edges: list[int], seed: int) -> None:
    check_rows("comparisons", operands([cut(value, 64) for value in edges], seed), compared)


def rounded(x: float, how: str) -> int:
    exact = Fraction(x)
    return {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}[how](exact)


def to_integer(x: float, how: str, to: str, of: str) -> int:
    size = int(to[1:])
    if math.isnan(x):
        return 0 if of != "f64" and size < 64 else 1 << size - 1
    least, most = (-(1 << size - 1), (1 << size - 1) - 1) if to[0] == "s" else (0, (1 << size) - 1)
    if math.isinf(x):
        return most if x > 0 else least
    return min(max(rounded(x, how), least), most)


def tf32(bits: int, how: str) -> int | Callable[[int], bool] | None:
    """10 bits of the fraction are left, by the size alone: ties go away from zero. NaN stays one, unless a signalling."""
    if F32.is_nan(bits):
        return F32.is_nan if bits & 0x400000 else None
    size, sign = bits & 0x7FFFFFFF, bits & 0x80000000
    if how == "rna" and size < F32.infinity:
        size += 0x1000
    return sign | size & ~0x1FFF


def converted(label: str, size: int) -> Expected:
    """What a conversion gives."""
    if label.startswith("mov"):
        return moved(label)
    parts = label.split(".")
    to, of, modes = parts[-2], parts[-1], parts[1:-2]

    def one(bits: int, to: str) -> int:
        """A float as another, NaN as the canonical one."""
        if "relu" in modes and not F32.is_nan(bits):
            bits = extreme(bits, 0, F32, largest=True)
        found = FORMATS[to].bits(FORMATS[of].value(bits))
        return F32.flush(found) if "ftz" in modes and to == "f32" else found

    def result(a: int, b: int, c: int) -> int | Callable[[int], bool] | None:
        if of not in FORMATS:
            value = number(a, of)
            if to in FORMATS:
                return FORMATS[to].bits(Fraction(value))
            if "sat" in modes:
                limit = 1 << int(to[1:]) - (to[0] == "s")
                value = min(max(value, -limit if to[0] == "s" else 0), limit - 1)
            return cut(number(cut(value, 64), to), size)
        bits = cut(a, FORMATS[of].size)
        if "ftz" in modes and of == "f32":
            bits = F32.flush(bits)
        if to == "tf32":
            return tf32(bits, modes[0])
        if to.endswith("x2"):
            return one(bits, to[:-2]) << 16 | one(cut(b, 32), to[:-2])
        x = FORMATS[of].value(bits)
        if to not in FORMATS:
            return cut(to_integer(x, modes[0], to, of), size)
        if modes and modes[0] in ("rni", "rzi", "rmi", "rpi"):
            whole = (
                F32.bits(Fraction(rounded(x, modes[0])), negative_zero=x < 0 or bits == 0x80000000)
                if math.isfinite(x)
                else bits
            )
            return lambda found: F32.same(found, whole)
        wanted = one(bits, to)
        if to in ("f16", "bf16"):
            return wanted
        return lambda found: FORMATS[to].same(found, wanted)

    return result


def moved(label: str) -> Expected:
    """What a packing or unpacking move gives."""
    return {
        "mov.b64 pack": lambda a, b, c: cut(a, 32) | cut(b, 32) << 32,
        "mov.b64 upper": lambda a, b, c: a >> 32,
        "mov.b64 lower": lambda a, b, c: cut(a, 32),
        "mov.b32 upper": lambda a, b, c: a >> 16 & 0xFFFF,
        "mov.b32 pack": lambda a, b, c: cut(b, 16) | cut(a, 16) << 16,
        "mov.b64 pack of four": lambda a, b, c: cut(a, 16) | cut(b, 16) << 16 | cut(c, 16) << 32 | cut(a, 16) << 48,
    }[label]


HALVES = [0x0000, 0x8000, 0x0001, 0x8001, 0x03FF, 0x0400, 0x3C00, 0xBC00, 0x3800, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7E00, 0x3F80, 0x7F7F,
          0x7F80, 0xFF80, 0x7FC0, 0x0040]  # fmt: skip
LARGE = [F64.bits(x) for x in (2.0**31, 2.0**31 - 1, 2.0**31 - 0.5, -(2.0**31) - 0.5, 2.0**32, 2.0**32 - 0.5, 2.0**63, -(2.0**63), 2.0**64,
                               2.0**64 - 2048, 65504.0, 65519.999, 65520.0, 2.0**-25, 2.0**-24 * 1.5, 2.5, 3.5, -0.5, 0.4999)]  # fmt: skip
WIDE = [F32.bits(x) for x in (2.0**31, 2.0**31 - 128, -(2.0**31), 2.0**32, 2.0**63, 2.0**64, 127.5, 128.0, -128.5, 255.5, 32767.5, 65519.996,
                              65520.0, 2.0**-25, 2.0**-24 * 1.5, 1 + 2.0**-8, 1 + 2.0**-7 + 2.0**-8, 1 + 2.0**-11, -2.5, 3.5, 0.4999)]  # fmt: skip


def test_conversions() -> None:
    unusual = [0x7F800001, 0x7FFFFFFF, 0x7F7FF000]
    edges = [*FLOATS32, *unusual, *WIDE, *DOUBLES, *LARGE, *HALVES, *(cut(value, 64) for value in INTEGERS)]
    check_rows("conversions", operands(edges, 6), converted)


def test_conversions_of_middling_floats() -> None:
    """Values around one, where rounding to whole numbers and to half formats does something."""
    check_rows("conversions", operands([0], 7, lambda rng: rng.getrandbits(64) & ~0x70000000 | 0x3C000000), converted)


# --- what is not known ------------------------------------------------------------------------------------------------

ONE = """\
.version 8.8
.target sm_90a
.address_size 64
.visible .entry one(
	.param .u64 one_param_0
)
.reqntid 32
{
	.reg .pred %p<3>;
	.reg .b16 %h<4>;
	.reg .b32 %r<4>;
	.reg .b64 %w<4>;
	mov.b32 %r1, 1;
	mov.b32 %r2, 2;
	setp.eq.s32 %p1, %r1, %r2;
	INSTRUCTION
	ret;
}
"""


@pytest.mark.parametrize(
    "text",
    ["frobnicate.b32 %r3, %r1, %r2", "add.sat.s32 %r3, %r1, %r2", "add.rz.f32 %r3, %r1, %r2", "cvt.rn.satfinite.e4m3x2.f32 %h1, %r1, %r2",
     "mul.wide.s64 %w1, %w2, %w3", "prmt.b32.f4e %r3, %r1, %r2, %r1", "bfe.u64 %w1, %w2, %r1, %r2", "setp.lt.s32 %p1|%p2, %r1, %r2",
     "shfl.sync.bfly.b32 %r3, %r1, 1, 31, 15", "add.s32 %r3, %r1, %r2, %r1", "cvt.rn.tf32.f32 %r3, %r1", "brx.idx %r1, table", "@%p1 bar.sync 0", "bar.sync 1, 32",
     "abs.ftz.bf16 %h1, %h2", "cvt.sat.u32.u64 %r3, %w1", "cvt.rn.f16.s64 %h1, %w1", "cvt.rn.bf16.f64 %h1, %w1"],
)  # fmt: skip
def test_unknown_instructions_are_named(text: str) -> None:
    line = ONE.splitlines().index("\tINSTRUCTION") + 1
    with pytest.raises(UnknownInstructionError, match=re.escape(f"PTX line {line}: {text}")):
        run(ONE.replace("INSTRUCTION", f"{text};"), outputs=[(1, "u4")])


def test_all_rows_of_a_file_are_read() -> None:
    ptx = read("integers")
    assert len(rows(ptx)) == ptx.count("st.global") == 84
