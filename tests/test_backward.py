"""Gradients by kernels, of pooling, the convolutional MLP and the 4D block with frozen statistics."""

from __future__ import annotations

import json

import effformer.kernels.mlp_backward
import pytest
import torch
from compiling import TESTS, needs_compiler
from compiling import run as run_compiled
from effformer.kernels.launch import recorded
from gradient_cases import CASES, SHAPE, by, check, draw_grad
from machine import DEVICE, DTYPES
from torch import Tensor

import effformer
from effformer import ops, reference
from effformer.testing import (
    LAYOUTS,
    Case,
    conv_mlp_case,
    draw_map,
    meta4d_case,
    unwritten_is_nan,
)

pytestmark = pytest.mark.usefixtures("kernel_device")


# --- accuracy ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mean", [0.0, 4.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operation", CASES)
def test_all_gradients(operation: str, dtype: torch.dtype, mean: float) -> None:
    """Of every argument, also where channels have means of four deviations."""
    x = draw_map(SHAPE, torch.float32)
    x += mean * torch.randn(x.shape[1])[:, None, None]
    check(CASES[operation](x.to(dtype)))


@pytest.mark.parametrize("channels", [48, 224])
def test_widths_of_networks(channels: int) -> None:
    check(meta4d_case(draw_map((2, channels, 7, 10), torch.float16), 4 * channels))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("operation", CASES)
def test_layouts(operation: str, layout: str) -> None:
    """Of the input, and of the gradient that comes from above."""
    case = CASES[operation](draw_map((3, 20, 5, 7), torch.float16, layout))
    check(case)
    grad = draw_grad(case)
    for other in ("contiguous", "channels_last"):
        order = torch.channels_last if other == "channels_last" else torch.contiguous_format
        found, eager = (by(case, how, grad.contiguous(memory_format=order)).of[0] for how in ("triton", "eager"))
        assert found is not None
        assert eager is not None
        assert found.stride() == eager.stride()
    expanded = torch.tensor(0.5, dtype=grad.dtype, device=grad.device).expand_as(grad)
    check(case, expanded)


@pytest.mark.parametrize("activation", ["relu", "silu", "swish", "hard_swish"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_activations(activation: str, dtype: torch.dtype) -> None:
    check(conv_mlp_case(draw_map((2, 20, 5, 9), dtype), 50, activation))


@pytest.mark.parametrize("shape", [(1, 16, 1, 1), (2, 8, 1, 6), (3, 4, 4, 1), (1, 33, 2, 2)])
def test_small_maps(shape: tuple[int, int, int, int]) -> None:
    for make in CASES.values():
        check(make(draw_map(shape, torch.float16)))


def test_rows_in_several_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scratch for a part of the rows at a time: the last part is not full, nor is its last tile."""
    case = meta4d_case(draw_map(SHAPE, torch.float16), 50)
    whole = by(case, "triton", draw_grad(case))
    monkeypatch.setattr(effformer.kernels.mlp_backward, "MOST_HIDDEN", 50 * 130)
    with recorded() as launches:
        parts = by(case, "triton", draw_grad(case))
    assert sum(one.kernel.__name__ == "mlp_backward_kernel" for one in launches) == 3
    check(case)
    for one, other in zip(whole.of, parts.of, strict=True):
        assert one is not None
        assert other is not None
        assert torch.allclose(one.float(), other.float(), rtol=1e-2, atol=1e-2 * one.abs().max().item())


def test_small_layer_scales_do_not_underflow() -> None:
    """A scale of 1e-6 would leave a float16 gradient nothing but zeros before the first product."""
    case = meta4d_case(draw_map((2, 24, 6, 7), torch.float16), 50)
    tiny = tuple(one * 1e-6 if place == 6 else one for place, one in enumerate(case.arguments))
    grad = draw_grad(case)
    found, exact = (by(Case(case.operation, tiny, case.options), how, grad) for how in ("triton", "exact"))
    shift1, wanted = found.of[4], exact.of[4]
    assert shift1 is not None
    assert wanted is not None
    assert torch.allclose(shift1.double(), wanted, rtol=0, atol=0.02 * wanted.abs().max().item())
    zero = tuple(torch.zeros_like(one) if place == 6 else one for place, one in enumerate(case.arguments))
    check(Case(case.operation, zero, case.options))


def test_gradcheck_of_the_reference() -> None:
    """The specification's own gradients, against differences."""
    for make in CASES.values():
        case = make(draw_map((1, 3, 3, 2), torch.float64))
        arguments = [one.double().requires_grad_() for one in case.arguments]
        function = getattr(reference, case.operation)
        assert torch.autograd.gradcheck(lambda *given: function(*given, **case.options), arguments)  # noqa: B023


@needs_compiler
def test_bfloat16_as_compiled() -> None:
    """The compiled kernels, executed on the CPU for three GPUs: within the rule, and without a fault."""
    if DEVICE.type == "cuda":
        pytest.skip("the GPU itself computes bfloat16")
    found = json.loads(run_compiled(str(TESTS / "gradients_worker.py")))
    assert len(found) == 12
    for one in found:
        assert not one["wrong"], one
        assert not one["faults"], one
        assert any("backward" in name for name in one["kernels"]), one


# --- what is computed, kept and repeated ------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", CASES)
def test_what_is_not_needed_is_not_computed(operation: str) -> None:
    """Each argument alone has the gradient that it has beside all others, by fewer launches."""
    case = CASES[operation](draw_map((2, 20, 5, 9), torch.float16))
    grad, count = draw_grad(case), len(case.arguments)
    whole = by(case, "triton", grad)
    for place in range(count):
        with recorded() as launches:
            alone = by(case, "triton", grad, [place == other for other in range(count)])
        for other, found in enumerate(alone.of):
            assert (found is not None) == (other == place)
        assert torch.equal(alone.of[place], whole.of[place]), place  # type: ignore[arg-type]
        names = [one.kernel.__name__ for one in launches]
        back_to_x = operation == "pool_mixer" or (operation == "meta4d" and place < 2)
        assert ("pool_mixer_backward_kernel" in names) == back_to_x, place
        hidden = operation != "pool_mixer" and place != count - 1  # shift2's needs no more than the gradient
        assert ("mlp_backward_kernel" in names) == hidden, place


@pytest.mark.parametrize("operation", CASES)
def test_the_same_bits_twice_from_any_memory(operation: str) -> None:
    case = CASES[operation](draw_map(SHAPE, torch.float16))
    grad = draw_grad(case)
    first = by(case, "triton", grad)
    with unwritten_is_nan():  # under PyTorch's deterministic algorithms
        second = by(case, "triton", grad)
    for one, other in zip(first.of, second.of, strict=True):
        assert torch.equal(one, other)  # type: ignore[arg-type]


def test_one_map_is_kept_for_the_backward() -> None:
    """Beside the parameters, of which no copy is kept."""
    x = draw_map((4, 24, 16, 16), torch.float16).requires_grad_()
    case = meta4d_case(x, 96)
    leaves = [x, *(one.requires_grad_() for one in case.arguments[1:])]
    for arguments in (leaves, [x.float().detach().requires_grad_(), *leaves[1:]]):
        kept: dict[int, int] = {}

        def keep(tensor: Tensor, kept: dict[int, int] = kept) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        dtype = torch.float16 if arguments[0].dtype == torch.float32 else None
        known = {one.untyped_storage().data_ptr() for one in arguments[1:]}
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast(DEVICE.type, dtype, enabled=dtype is not None),
        ):
            result = ops.meta4d(*arguments, **case.options, backend="triton")
        others = [size for place, size in kept.items() if place not in known]
        assert sum(others) <= arguments[0].nbytes
        result.sum().backward()


def test_nan_and_infinities_reach_the_parameters() -> None:
    """GradScaler looks for them."""
    case = meta4d_case(draw_map((2, 20, 5, 9), torch.float16), 50)
    for value in (float("inf"), float("nan")):
        grad = draw_grad(case)
        grad[1, 3, 2, 4] = value
        found = by(case, "triton", grad)
        for place in (0, 1, 2, 3, 4, 5, 6, 7):
            assert not found.of[place].isfinite().all(), place  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinities_of_the_input(dtype: torch.dtype) -> None:
    """They stand in the gradients where float64 has them."""
    x = draw_map((2, 20, 5, 9), dtype)
    x[0, 3, 2, 4], x[1, 5, 1, 1] = float("nan"), float("inf")
    case = conv_mlp_case(x, 50)
    found, exact = (by(case, how, draw_grad(case)) for how in ("triton", "exact"))
    for place, (one, wanted) in enumerate(zip(found.of, exact.of, strict=True)):
        assert one is not None
        assert wanted is not None
        assert torch.equal(one.isfinite(), wanted.isfinite()), place
