"""Tensor memory, its products and barriers in hand-written PTX, with results that are known."""

from __future__ import annotations

import numpy as np
import pytest
from effformer.bench.offline.ptx.registry import UnknownInstructionError
from ptx_memory_runs import kernel, names, result, run
from ptx_operands import SIZE, descriptor, encoded, fill, tile, whole
from ptx_runs import Array

MODES = {16: 0, 128: 2, 64: 4, 32: 6}  # bits 61 to 63 of a descriptor, by bytes of a swizzled row
TYPES = {"f16": 0, "bf16": 1, "tf32": 2}  # bits 7 to 9, and 10 to 12, of an instruction descriptor
SLOT, BARRIER = 60 << 10, (60 << 10) + 16  # where an address of tensor memory and a barrier lie

ALLOCATE = f"""
setp.eq.u32 %p1, %warp, 0;
@%p1 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%smem + {SLOT}], COLUMNS;
@%p1 tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;
setp.eq.u32 %p2, %t, 0;
@%p2 mbarrier.init.shared::cta.b64 [%smem + {BARRIER}], 1;
bar.sync 0;
ld.shared.b32 %r60, [%smem + {SLOT}];
and.b32 %r61, %warp, 3;
shl.b32 %r61, %r61, 21;
add.u32 %r61, %r61, %r60;
"""
GIVE_BACK = f"""
bar.sync 0;
@%p2 mbarrier.inval.shared::cta.b64 [%smem + {BARRIER}];
@%p1 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r60, COLUMNS;
"""
COMMIT = f"""
add.u32 %r1, %smem, {BARRIER};
@%p2 tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r1];
"""


def wait(phase: int) -> str:
    return f"""
WAIT{phase}:
mbarrier.try_wait.parity.shared::cta.b64 %p3, [%smem + {BARRIER}], {phase % 2};
@!%p3 bra WAIT{phase};
tcgen05.fence::after_thread_sync;
"""


def tensor_kernel(body: str, *, pointers: int, columns: int = 128, threads: int = 128) -> str:
    """%r60 is the address of the columns, %r61 that of the warp's rows."""
    whole_body = (ALLOCATE + body + GIVE_BACK).replace("COLUMNS", str(columns))
    return kernel(whole_body, pointers=pointers, threads=threads, target="sm_100a")


def from_global(pointer: int, count: int, first: int = 0, prefix: str = "c") -> str:
    """`count` words of each thread of each program."""
    lines = [
        f"mov.u32 %r0, %ctaid.x; mad.lo.u32 %r0, %r0, %threads, %t; mad.wide.u32 %rd1, %r0, {4 * count}, %g{pointer};"
    ]
    lines += [f"ld.global.v4.b32 {names(prefix, 4, first + n)}, [%rd1 + {4 * n}];" for n in range(0, count, 4)]
    return "\n".join(lines)


def to_global(pointer: int, count: int) -> str:
    lines = [
        f"mov.u32 %r0, %ctaid.x; mad.lo.u32 %r0, %r0, %threads, %t; mad.wide.u32 %rd1, %r0, {4 * count}, %g{pointer};"
    ]
    lines += [f"st.global.v4.b32 [%rd1 + {4 * n}], {names('c', 4, n)};" for n in range(0, count, 4)]
    return "\n".join(lines)


# --- loads and stores -----------------------------------------------------------------------------------------------------


def places(shape: str, column: int, count: int, split: int, upper: bool = False) -> tuple[Array, Array]:
    """Row and column [128 threads, registers] that a warp's quarter gives to its threads."""
    thread, register = np.arange(128)[:, None], np.arange(count)[None, :]
    lane, first = thread % 32, thread // 32 * 32
    if shape == "32x32b":
        return first + lane + 0 * register, column + register
    return first + lane % 16 + 16 * upper + 0 * register, column + register + split * (lane // 16)


@pytest.mark.parametrize(
    ("shape", "count"), [("32x32b", 8), ("32x32b", 16), ("32x32b", 64), ("16x32bx2", 4), ("16x32bx2", 16)]
)
@pytest.mark.parametrize("upper", [False, True])
def test_moves_between_registers_and_tensor_memory(shape: str, count: int, upper: bool) -> None:
    """One shape stores at column 24, the other loads every row from column 0 on."""
    if shape == "32x32b":
        split, more, row = 0, "", 0
    else:
        split, more, row = count + 4, f", {count + 4}", 16 * upper
    fill_all = "\n".join(f"mov.b32 %c{n}, -1;" for n in range(128))
    ptx = tensor_kernel(f"""
    {fill_all}
    tcgen05.st.sync.aligned.32x32b.x128.b32 [%r61 + 0], {names("c", 128)};
    tcgen05.wait::st.sync.aligned;
    {from_global(0, count)}
    add.u32 %r1, %r61, {row << 16};
    tcgen05.st.sync.aligned.{shape}.x{count}.b32 [%r1 + 24]{more}, {names("c", count)};
    tcgen05.wait::st.sync.aligned;
    tcgen05.ld.sync.aligned.32x32b.x128.b32 {names("c", 128)}, [%r61 + 0];
    tcgen05.wait::ld.sync.aligned;
    {to_global(1, 128)}
    """, pointers=2)  # fmt: skip
    given = np.arange(128 * count, dtype=np.uint32).reshape(128, count)
    expected = np.full((128, 128), 0xFFFFFFFF, np.uint32)
    expected[places(shape, 24, count, split, upper)] = given
    assert (result(ptx, given, output=((128, 128), np.uint32)) == expected).all()


@pytest.mark.parametrize("count", [4, 8, 32])
def test_loads_of_halves(count: int) -> None:
    ptx = tensor_kernel(f"""
    {from_global(0, 128)}
    tcgen05.st.sync.aligned.32x32b.x128.b32 [%r61 + 0], {names("c", 128)};
    tcgen05.wait::st.sync.aligned;
    tcgen05.ld.sync.aligned.16x32bx2.x{count}.b32 {names("c", count)}, [%r61 + 8], 40;
    tcgen05.wait::ld.sync.aligned;
    {to_global(1, count)}
    """, pointers=2)  # fmt: skip
    given = np.arange(128 * 128, dtype=np.uint32).reshape(128, 128)
    found = result(ptx, given, output=((128, count), np.uint32))
    assert (found == given[places("16x32bx2", 8, count, 40)]).all()


def test_two_warpgroups_share_the_rows() -> None:
    """Warps w and w + 4 reach the same quarter; each program has columns of its own."""
    ptx = tensor_kernel(f"""
    shr.u32 %r1, %t, 7;
    mad.lo.u32 %r1, %r1, 8, %r61;
    {from_global(0, 8)}
    tcgen05.st.sync.aligned.32x32b.x8.b32 [%r1 + 0], {names("c", 8)};
    tcgen05.wait::st.sync.aligned;
    bar.sync 0;
    xor.b32 %r2, %t, 128;
    shr.u32 %r2, %r2, 7;
    mad.lo.u32 %r2, %r2, 8, %r61;
    tcgen05.ld.sync.aligned.32x32b.x8.b32 {names("c", 8)}, [%r2 + 0];
    tcgen05.wait::ld.sync.aligned;
    {to_global(1, 8)}
    """, pointers=2, columns=32, threads=256)  # fmt: skip
    given = np.arange(2 * 256 * 8, dtype=np.uint32).reshape(2, 256, 8)
    found = result(ptx, given, output=(given.shape, np.uint32), programs=2)
    assert (found == np.roll(given, 128, 1)).all()


# --- products -------------------------------------------------------------------------------------------------------------


def form_of(kind: str, rows: int, columns: int, *, a_depth_first: bool = True, b_depth_first: bool = True) -> int:
    """The instruction descriptor: float32 sums, types, whether operands lie along the rows, shape."""
    flags = (not a_depth_first) << 15 | (not b_depth_first) << 16
    return 1 << 4 | TYPES[kind] << 7 | TYPES[kind] << 10 | flags | columns >> 3 << 17 | rows >> 4 << 24


def rows_of(count: int, first: int = 0) -> Array:
    """The rows of tensor memory of a product: 64 lie in the lower (or upper) halves of the quarters."""
    row = np.arange(count)
    return row if count == 128 else row // 16 * 32 + row % 16 + first


def tensor_product(
    a: Array,
    b: Array,
    c: Array,
    kind: str,
    span: int,
    *,
    a_depth_first: bool = True,
    b_depth_first: bool = True,
    from_tensor: bool = False,
    keep: bool = True,
    first: int = 0,
    rounds: int = 1,
) -> Array:
    """[programs, rows, depth] · [programs, columns, depth]^T, `rounds` times, + c; `first`: of the rows, 0 or 16."""
    (programs, rows, depth), columns = a.shape, b.shape[1]
    steps = depth * SIZE[kind] // 32
    a_tiles = [tile(one, kind, span, depth_first=a_depth_first) for one in a]
    b_tiles = [tile(one, kind, span, depth_first=b_depth_first) for one in b]
    image = np.stack([np.concatenate([one.image, other.image]) for one, other in zip(a_tiles, b_tiles, strict=True)])
    one, other = a_tiles[0], b_tiles[0]
    words = encoded(a, kind).view(np.uint32)  # [programs, rows, 8 words of each instruction]
    tensor = np.full((programs, 128, 128), 0xFFFFFFFF, np.uint32)  # NaN
    tensor[:, rows_of(rows, first), :columns] = c.astype(np.float32).view(np.uint32)
    tensor[:, rows_of(rows, first), 64 : 64 + words.shape[2]] = words
    body = [
        fill(image.shape[1], 128),
        from_global(1, 128),
        f"tcgen05.st.sync.aligned.32x32b.x128.b32 [%r61], {names('c', 128)};",
        "tcgen05.wait::st.sync.aligned;",
        "tcgen05.fence::before_thread_sync;",
        "bar.sync 0;",
        f"mov.b32 %r59, {form_of(kind, rows, columns, a_depth_first=a_depth_first, b_depth_first=b_depth_first)};",
        f"add.u32 %r57, %r60, {first << 16}; add.u32 %r58, %r57, 64;",
        f"setp.ne.u32 %p4, {int(keep)}, 0; setp.eq.u32 %p5, 0, 0;",
    ]
    for turn in range(rounds):
        body.append(descriptor("%rd5", 0, one.descriptor | 1 << 46 | MODES[span] << 61))
        body.append(descriptor("%rd6", len(one.image), other.descriptor | 1 << 46 | MODES[span] << 61))
        for n in range(steps):
            left = f"[ %r58 + {8 * n} ]" if from_tensor else "%rd5"
            kept = 5 if n or turn else 4
            body.append(f"@%p2 tcgen05.mma.cta_group::1.kind::{'tf32' if kind == 'tf32' else 'f16'} "
                        f"[ %r57 + 0 ], {left}, %rd6, %r59, %p{kept};")  # fmt: skip
            body.append(f"add.s64 %rd5, %rd5, {one.step >> 4}; add.s64 %rd6, %rd6, {other.step >> 4};")
        body += [COMMIT, wait(turn)]
    body += [
        f"tcgen05.ld.sync.aligned.32x32b.x64.b32 {names('c', 64)}, [%r61];",
        "tcgen05.wait::ld.sync.aligned;",
        to_global(2, 64),
    ]
    ptx = tensor_kernel("\n".join(body), pointers=3)
    found = result(ptx, image, tensor, output=((programs, 128, 64), np.float32), programs=programs)
    others = np.setdiff1d(np.arange(128), rows_of(rows, first))
    assert np.isnan(found[:, others]).all()
    assert np.isnan(found[:, :, columns:]).all()
    return found[:, rows_of(rows, first), :columns]


def tensor_case(
    kind: str, span: int, rows: int = 128, columns: int = 64, programs: int = 1
) -> tuple[Array, Array, Array]:
    depth = max(span, 64 if span == 16 else 0) // SIZE[kind]
    return whole(6, programs, rows, depth), whole(7, programs, columns, depth), whole(8, programs, rows, columns)


def product(a: Array, b: Array, c: Array, rounds: int = 1) -> Array:
    return rounds * (a @ b.swapaxes(1, 2)) + c


@pytest.mark.parametrize("from_tensor", [False, True])
@pytest.mark.parametrize("rows", [64, 128])
@pytest.mark.parametrize("span", MODES)
@pytest.mark.parametrize("kind", TYPES)
def test_products_in_tensor_memory(kind: str, span: int, rows: int, from_tensor: bool) -> None:
    case = tensor_case(kind, span, rows)
    assert (tensor_product(*case, kind, span, from_tensor=from_tensor) == product(*case)).all()


@pytest.mark.parametrize(("a_depth_first", "b_depth_first"), [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("span", MODES)
def test_transposed_operands(span: int, a_depth_first: bool, b_depth_first: bool) -> None:
    case = tensor_case("bf16", span)
    found = tensor_product(*case, "bf16", span, a_depth_first=a_depth_first, b_depth_first=b_depth_first)
    assert (found == product(*case)).all()


def test_upper_halves_of_the_quarters() -> None:
    case = tensor_case("bf16", 128, rows=64, columns=16)
    assert (tensor_product(*case, "bf16", 128, first=16) == product(*case)).all()
    assert (tensor_product(*case, "bf16", 128, first=16, from_tensor=True) == product(*case)).all()


def test_sums_that_are_not_kept() -> None:
    a, b, c = tensor_case("f16", 64)
    assert (
        tensor_product(a, b, np.full_like(c, np.nan), "f16", 64, keep=False) == product(a, b, np.zeros_like(c))
    ).all()


def test_phases_of_a_barrier_and_programs() -> None:
    case = tensor_case("tf32", 128, columns=32, programs=2)
    assert (tensor_product(*case, "tf32", 128, rounds=3) == product(*case, rounds=3)).all()


@pytest.mark.parametrize(("form", "word", "reason"), [
    (form_of("bf16", 128, 64) | 1 << 13, 1 << 46, "instruction descriptor"),
    (form_of("tf32", 128, 64), 1 << 46, "instruction descriptor"),
    (form_of("bf16", 32, 64), 1 << 46, "32 rows"),
    (form_of("bf16", 128, 8), 1 << 46, "8 columns"),
    (form_of("bf16", 128, 64), 0, "matrix descriptor"),
    (form_of("bf16", 128, 64), 1 << 46 | 1 << 61, "matrix descriptor"),
    (form_of("bf16", 128, 64), 1 << 46 | 1 << 49, "base offset"),
])  # fmt: skip
def test_products_that_are_unknown(form: int, word: int, reason: str) -> None:
    ptx = tensor_kernel(f"""
    mov.b64 %rd5, 0x{word:x};
    setp.eq.u32 %p4, 0, 0;
    mov.b32 %r1, {form};
    @%p2 tcgen05.mma.cta_group::1.kind::f16 [ %r60 + 0 ], %rd5, %rd5, %r1, %p4;
    """, pointers=0)  # fmt: skip
    with pytest.raises(UnknownInstructionError, match=reason):
        run(ptx)
