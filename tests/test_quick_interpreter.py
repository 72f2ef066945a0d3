"""The quick interpreter of these tests against Triton's own."""

from __future__ import annotations

import runpy
from pathlib import Path

import machine
import pytest
import torch
import triton
import triton.language as tl
from quick_interpreter import KNOWN, ORIGINAL, QUICK, using
from triton.language import core
from triton.runtime import interpreter

pytestmark = [
    pytest.mark.skipif(machine.ON_GPU, reason="nothing is interpreted here"),
    pytest.mark.skipif(not KNOWN, reason=f"Triton {triton.__version__} interprets by its own functions"),
]


@triton.jit
def scaled_sums_kernel(x_ptr, out_ptr, rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Sums of rows by a helper of ours and one of Triton's, at offsets of 32 bits, with a mask and a loop."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in tl.range(0, WIDTH, 16):
        c = first + tl.arange(0, 16)
        mask = (row < rows)[:, None] & (c < WIDTH)[None, :]
        total += tl.sum(_halved(tl.load(x_ptr + row[:, None] * WIDTH + c[None, :], mask=mask, other=0.0)), 1)
    tl.store(out_ptr + row, total.to(out_ptr.dtype.element_ty), mask=row < rows)


@triton.jit
def _halved(b_x):
    return b_x.to(tl.float32) * 0.5


@triton.jit
def arithmetic_kernel(out_ptr, x, y, OPERATION: tl.constexpr):
    if OPERATION == "add":
        z = x + y
    elif OPERATION == "sub":
        z = x - y
    else:
        z = x * y
    tl.store(out_ptr, z)


@triton.jit
def misfit_kernel(out_ptr):
    tl.store(out_ptr + tl.arange(0, 8), tl.arange(0, 4) + tl.arange(0, 8))


def test_same_bits() -> None:
    results = []
    for functions in (ORIGINAL, QUICK, ORIGINAL):
        for dtype in (torch.float32, torch.float16):
            torch.manual_seed(0)
            x, out = torch.randn(11, 37).to(dtype), torch.full((11,), torch.nan, dtype=dtype)
            with using(functions):
                scaled_sums_kernel[(3,)](x, out, 11, WIDTH=37, BLOCK=4)
            results.append(out)
    assert not torch.stack([r.float() for r in results]).isnan().any()
    for result, other in zip(results, results[2:], strict=False):
        assert torch.equal(result, other)


@pytest.mark.parametrize(("operation", "x", "y"), [("add", 2**31 - 1, 1), ("sub", -(2**31), 1), ("mul", 2**16, 2**15)])
def test_overflow_is_an_error(operation: str, x: int, y: int) -> None:
    out = torch.zeros(1, dtype=torch.int32)
    with using(QUICK):
        with pytest.raises(Exception, match=f"int32 overflow detected for operation {operation}"):
            arithmetic_kernel[(1,)](out, x, y, OPERATION=operation)
        arithmetic_kernel[(1,)](out, x - 1 if x > 0 else x + 1, y, OPERATION=operation)  # the last that fits
    assert out.item() == {"add": 2**31 - 1, "sub": -(2**31), "mul": (2**16 - 1) * 2**15}[operation]


@pytest.mark.parametrize("scalar", [one for one in vars(core).values() if type(one) is core.dtype and one != core.void])
def test_same_types(scalar: core.dtype) -> None:
    for kind in (scalar, core.pointer_type(scalar)):
        for shape in ([4], [core.constexpr(2), core.constexpr(8)], core.tuple([1, 2, 4])):
            blocks, tensors, dtypes = [], [], []
            for functions in (ORIGINAL, QUICK):
                with using(functions):
                    block = core.block_type(kind, shape)
                    dtypes += [functions[0](one) for one in (kind, block) if "fp4" not in one.name]
                    tensors.append([_shown(core.tensor(None, one)) for one in (kind, block)])
                    blocks.append(_shown(block))
            assert blocks[0] == blocks[1]
            assert tensors[0] == tensors[1]
            assert dtypes[: len(dtypes) // 2] == dtypes[len(dtypes) // 2 :]
    with using(QUICK), pytest.raises(TypeError, match="0d"):
        core.block_type(scalar, ())


def test_shapes_that_do_not_fit_are_an_error() -> None:
    """Of 4 and of 8 elements: broadcasting is for sides of 1 alone."""
    for functions in (ORIGINAL, QUICK):
        with using(functions), pytest.raises(Exception, match="incompatible dimensions at index 0: 4 and 8"):
            misfit_kernel[(1,)](torch.zeros(8))


def test_other_tritons_keep_their_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their interpreter may lack the functions that are replaced here: the import must not fail."""
    monkeypatch.setattr(triton, "__version__", "9.9.0")
    monkeypatch.delattr(interpreter, "_patch_lang")
    monkeypatch.delattr(interpreter, "interpreter_semantic")
    found = runpy.run_path(str(Path(__file__).with_name("quick_interpreter.py")))
    assert not found["KNOWN"]


def _shown(one: object) -> dict[str, str]:
    return {name: repr(value) for name, value in vars(one).items() if name != "_sizes"}
