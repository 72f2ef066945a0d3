"""Gradients by kernels, of the operations of 4D blocks with frozen statistics and of 3D blocks."""

from __future__ import annotations

import json
from collections.abc import Callable

import effformer.kernels.mlp_backward
import pytest
import torch
from compiling import TESTS, needs_compiler
from compiling import run as run_compiled
from effformer.kernels.launch import recorded
from gradient_cases import MAPS, SHAPE, TOKENS, by, check, draw, draw_grad
from machine import DEVICE, DTYPES
from torch import Tensor

import effformer
from effformer import ops, reference
from effformer.testing import (
    LAYOUTS,
    Case,
    attention_mixer_case,
    bias_attention_case,
    conv_mlp_case,
    draw_map,
    linear_mlp_case,
    meta4d_case,
    unwritten_is_nan,
)

pytestmark = pytest.mark.usefixtures("kernel_device")


# --- accuracy ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mean", [0.0, 4.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operation", [*MAPS, *TOKENS])
def test_all_gradients(operation: str, dtype: torch.dtype, mean: float) -> None:
    """Of every argument, also where channels have means of four deviations."""
    check(draw(operation, dtype, mean))


@pytest.mark.parametrize("channels", [48, 224])
def test_widths_of_networks(channels: int) -> None:
    check(meta4d_case(draw_map((2, channels, 7, 10), torch.float16), 4 * channels))


@pytest.mark.parametrize("tokens", [49, 70])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_of_networks(dtype: torch.dtype, tokens: int) -> None:
    """In one tile of tokens, and in several."""
    check(bias_attention_case(3, tokens, dtype, num_heads=2, key_dim=32, value_dim=128))


@pytest.mark.parametrize("tokens", [5, 18])
def test_the_bias_gradient_of_many_images(tokens: int) -> None:
    """More images than parts of the sum, so that a program adds several; in one tile and in two."""
    check(bias_attention_case(19, tokens, torch.float32, num_heads=1, key_dim=8, value_dim=8))


@pytest.mark.parametrize(("heads", "key_dim", "value_dim"), [(1, 20, 13), (3, 8, 300), (1, 100, 16)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_unusual_heads(dtype: torch.dtype, heads: int, key_dim: int, value_dim: int) -> None:
    """Dimensions that no tile divides, and more values than one piece holds."""
    check(bias_attention_case(2, 19, dtype, num_heads=heads, key_dim=key_dim, value_dim=value_dim))


@pytest.mark.parametrize("tokens", [9, 40])
def test_masks(tokens: int) -> None:
    """A bias of -inf takes keys away for good, a large finite one does not overflow."""
    case = bias_attention_case(2, tokens, torch.float32, num_heads=2, key_dim=16, value_dim=16)
    bias = case.arguments[1]
    bias[0, :, 3], bias[1, 2, 4:], bias[1, 5, 0] = -torch.inf, -torch.inf, 3e4
    found, exact = (by(case, how, draw_grad(case)).gradients for how in ("triton", "exact"))
    for one, wanted in zip(found, exact, strict=True):
        assert torch.allclose(one.double(), wanted, rtol=0, atol=2e-5 * wanted.abs().max().item())
    assert not found[1][0, :, 3].any()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("operation", MAPS)
def test_layouts(operation: str, layout: str) -> None:
    """Of the input, and of the gradient that comes from above."""
    case = MAPS[operation](draw_map((3, 20, 5, 7), torch.float16, layout))
    check(case)
    grad = draw_grad(case)
    for other in ("contiguous", "channels_last"):
        order = torch.channels_last if other == "channels_last" else torch.contiguous_format
        found, eager = (by(case, how, grad.contiguous(memory_format=order)).gradients[0] for how in ("triton", "eager"))
        assert found.stride() == eager.stride()
    expanded = torch.tensor(0.5, dtype=grad.dtype, device=grad.device).expand_as(grad)
    check(case, expanded)


@pytest.mark.parametrize("operation", TOKENS)
def test_layouts_of_tokens(operation: str) -> None:
    """Slices, tokens of a contiguous map, one token for all; and such gradients from above."""
    case = draw(operation, torch.float16)
    x, *others = case.arguments
    batch, tokens, channels = x.shape
    sliced = torch.randn(batch, tokens + 1, 2 * channels, dtype=x.dtype)[:, 1:, ::2]
    of_a_map = torch.randn(batch, channels, tokens, dtype=x.dtype).transpose(1, 2)
    repeated = torch.randn(1, 1, channels, dtype=x.dtype).expand(batch, tokens, channels)
    for given in (sliced, of_a_map, repeated):
        check(Case(operation, (given, *others), case.options))
    grad = draw_grad(case)
    check(case, grad.transpose(1, 2).contiguous().transpose(1, 2))
    check(case, torch.tensor(0.5, dtype=grad.dtype, device=grad.device).expand_as(grad))


@pytest.mark.parametrize("activation", ["relu", "silu", "swish", "hard_swish"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_activations(activation: str, dtype: torch.dtype) -> None:
    check(conv_mlp_case(draw_map((2, 20, 5, 9), dtype), 50, activation))
    check(linear_mlp_case(torch.randn(2, 23, 20).to(dtype), 50, activation))


@pytest.mark.parametrize("shape", [(1, 16, 1, 1), (2, 8, 1, 6), (3, 4, 4, 1), (1, 33, 2, 2)])
def test_small_maps(shape: tuple[int, int, int, int]) -> None:
    for make in MAPS.values():
        check(make(draw_map(shape, torch.float16)))
    for make in TOKENS.values():  # of so few numbers the largest errors are chance: a bound in place of the rule
        case = make(torch.randn(shape[0], shape[2] * shape[3], shape[1]).half())
        found, exact = (by(case, how, draw_grad(case)).gradients for how in ("triton", "exact"))
        for one, wanted in zip(found, exact, strict=True):
            assert torch.allclose(one.double(), wanted, rtol=0, atol=4e-3 * wanted.abs().max().item())


def test_rows_in_several_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scratch for a part of the rows at a time: the last part is not full, nor is its last tile."""
    case = meta4d_case(draw_map(SHAPE, torch.float16), 50)
    whole = by(case, "triton", draw_grad(case))
    monkeypatch.setattr(effformer.kernels.mlp_backward, "MOST_HIDDEN", 50 * 130)
    with recorded() as launches:
        parts = by(case, "triton", draw_grad(case))
    assert sum(one.kernel.__name__ == "mlp_backward_kernel" for one in launches) == 3
    check(case)
    for one, other in zip(whole.gradients, parts.gradients, strict=True):
        assert torch.allclose(one.float(), other.float(), rtol=1e-2, atol=1e-2 * one.abs().max().item())


def test_small_layer_scales_do_not_underflow() -> None:
    """A scale of 1e-6 would leave a float16 gradient nothing but zeros before the first product."""
    case = meta4d_case(draw_map((2, 24, 6, 7), torch.float16), 50)
    tiny = tuple(one * 1e-6 if place == 6 else one for place, one in enumerate(case.arguments))
    grad = draw_grad(case)
    found, exact = (by(Case(case.operation, tiny, case.options), how, grad) for how in ("triton", "exact"))
    shift1, wanted = found.gradients[4], exact.gradients[4]
    assert torch.allclose(shift1.double(), wanted, rtol=0, atol=0.02 * wanted.abs().max().item())
    zero = tuple(torch.zeros_like(one) if place == 6 else one for place, one in enumerate(case.arguments))
    check(Case(case.operation, zero, case.options))


def test_gradcheck_of_the_reference() -> None:
    """The specification's own gradients, against differences."""
    cases = [make(draw_map((1, 3, 3, 2), torch.float64)) for make in MAPS.values()]
    heads = {"num_heads": 2, "key_dim": 2, "value_dim": 3}
    x = torch.randn(1, 4, 3).double()
    cases += [attention_mixer_case(x, **heads), linear_mlp_case(x, 5)]
    cases.append(bias_attention_case(1, 3, torch.float64, **heads))
    for case in cases:
        arguments = [one.double().requires_grad_() for one in case.arguments]
        function = getattr(reference, case.operation)
        assert torch.autograd.gradcheck(lambda *given: function(*given, **case.options), arguments)  # noqa: B023


@needs_compiler
def test_bfloat16_as_compiled() -> None:
    """The compiled kernels, executed on the CPU for three GPUs: within the rule, and without a fault."""
    if DEVICE.type == "cuda":
        pytest.skip("the GPU itself computes bfloat16")
    found = json.loads(run_compiled(str(TESTS / "gradients_worker.py")))
    assert len(found) == 21
    for one in found:
        assert not one["wrong"], one
        assert not one["faults"], one
        assert any("backward" in name for name in one["kernels"]), one


# --- what is computed, kept and repeated ------------------------------------------------------------------------------


_BACKWARD: dict[str, Callable[[int], list[str]]] = {
    "pool_mixer": lambda place: ["pool_mixer_backward_kernel"],
    "conv_mlp": lambda place: ["mlp_backward_kernel"] * (place < 6),  # shift2's needs no more than the gradient
    "meta4d": lambda place: ["mlp_backward_kernel"] * (place < 7) + ["pool_mixer_backward_kernel"] * (place < 2),
    "bias_attention": lambda place: ["attention_backward_kernel"],
    "attention_mixer": lambda place: (
        ["attention_backward_kernel"] * (place < 6) + ["layer_norm_backward_kernel"] * (place < 3)
    ),
    "linear_mlp": lambda place: ["mlp_backward_kernel"] * (place < 7) + ["layer_norm_backward_kernel"] * (place < 3),
}


@pytest.mark.parametrize("operation", [*MAPS, *TOKENS])
def test_what_is_not_needed_is_not_computed(operation: str) -> None:
    """Each argument alone has the gradient that it has beside all others, by fewer launches."""
    case = draw(operation, torch.float16)
    grad, count = draw_grad(case), len(case.arguments)
    whole = by(case, "triton", grad)
    for place in range(count):
        with recorded() as launches:
            alone = by(case, "triton", grad, [place == other for other in range(count)])
        for other, found in enumerate(alone.gradients):
            assert (found is not None) == (other == place)
        assert torch.equal(alone.gradients[place], whole.gradients[place]), place
        names = [one.kernel.__name__ for one in launches]
        back = [name for name in names if name.endswith("_backward_kernel")]
        assert sorted(back) == sorted(_BACKWARD[operation](place)), place


@pytest.mark.parametrize("operation", [*MAPS, *TOKENS])
def test_the_same_bits_twice_from_any_memory(operation: str) -> None:
    case = draw(operation, torch.float16)
    grad = draw_grad(case)
    first = by(case, "triton", grad)
    with unwritten_is_nan():  # under PyTorch's deterministic algorithms
        second = by(case, "triton", grad)
    for one, other in zip(first.gradients, second.gradients, strict=True):
        assert torch.equal(one, other)


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


def test_the_input_alone_is_kept_of_tokens() -> None:
    """Of attention and MLP, beside the parameters and the bias."""
    case = draw("attention_mixer", torch.float16)
    mlp = linear_mlp_case(case.arguments[0], 90)
    for one in (case, mlp):
        leaves = [argument.requires_grad_() for argument in one.arguments]
        known = {leaf.untyped_storage().data_ptr() for leaf in leaves}
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, kept=kept: (kept.append(tensor.untyped_storage().data_ptr()), tensor)[1],
            lambda tensor: tensor,
        ):
            getattr(ops, one.operation)(*leaves, **one.options, backend="triton").sum().backward()
        assert set(kept) == known


def test_nan_and_infinities_reach_the_parameters() -> None:
    """GradScaler looks for them."""
    case = meta4d_case(draw_map((2, 20, 5, 9), torch.float16), 50)
    for value in (float("inf"), float("nan")):
        grad = draw_grad(case)
        grad[1, 3, 2, 4] = value
        found = by(case, "triton", grad)
        for place in range(8):
            assert not found.gradients[place].isfinite().all(), place


@pytest.mark.parametrize("operation", TOKENS)
def test_nan_and_infinities_reach_the_parameters_of_tokens(operation: str) -> None:
    case = draw(operation, torch.float16)
    for value in (float("inf"), float("nan")):
        grad = draw_grad(case)
        grad[1, 3, 2] = value
        for place, one in enumerate(by(case, "triton", grad).gradients):
            assert not one.isfinite().all(), place


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinities_of_the_input(dtype: torch.dtype) -> None:
    """They stand in the gradients where float64 has them."""
    x = draw_map((2, 20, 5, 9), dtype)
    x[0, 3, 2, 4], x[1, 5, 1, 1] = float("nan"), float("inf")
    case = conv_mlp_case(x, 50)
    found, exact = (by(case, how, draw_grad(case)) for how in ("triton", "exact"))
    for place, (one, wanted) in enumerate(zip(found.gradients, exact.gradients, strict=True)):
        assert torch.equal(one.isfinite(), wanted.isfinite()), place
