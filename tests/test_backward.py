"""Gradients by kernels, of pooling, the convolutional MLP and the 4D block with frozen statistics."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable

import effformer.kernels.mlp_backward
import gradient_cases
import pytest
import torch
from compiling import TESTS, needs_compiler
from compiling import run as run_compiled
from effformer.kernels import meta4d_backward as operators
from effformer.kernels import pool_mixer_backward as pooling
from effformer.kernels.launch import recorded
from gradient_cases import by, check, draw_grad
from machine import DEVICE, DTYPES
from torch import Tensor

import effformer
from effformer import EfficientFormer, ops, reference
from effformer.testing import (
    LAYOUTS,
    Case,
    conv_mlp_case,
    draw_map,
    float32_as_such,
    meta4d_case,
    pool_mixer_case,
    randomise,
    unwritten_is_nan,
)

pytestmark = pytest.mark.usefixtures("kernel_device")
CASES: dict[str, Callable[[Tensor], Case]] = {
    "pool_mixer": pool_mixer_case,
    "conv_mlp": lambda x: conv_mlp_case(x, 2 * x.shape[1] + 3),
    "meta4d": lambda x: meta4d_case(x, 2 * x.shape[1] + 3),
}
SHAPE = (2, 24, 11, 13)  # 286 pixels: more than two tiles of rows, and channels that no tile divides


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


@pytest.mark.parametrize("shape", [(1, 16, 1, 1), (2, 8, 1, 6), (3, 1, 4, 1), (1, 33, 2, 2)])
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
    for arguments, most in ((leaves, 1), ([x.float().detach().requires_grad_(), *leaves[1:]], 1)):
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
        assert sum(others) <= most * arguments[0].nbytes
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


# --- as people call it ------------------------------------------------------------------------------------------------


def test_autocast() -> None:
    """Products in float16; parameters in float32 have gradients in float32, which are not rounded to 16 bits."""
    case = meta4d_case(draw_map((2, 24, 6, 7), torch.float32), 50)
    grad = draw_grad(case)

    def compute(backend: str) -> gradient_cases.Gradients:
        def function(*given: Tensor) -> Tensor:
            with torch.autocast(DEVICE.type, torch.float16):
                return ops.meta4d(*given, backend=backend)

        return gradient_cases.of(function, case.arguments, grad)

    found, exact = compute("triton"), by(case, "exact", grad)
    for place, (one, wanted) in enumerate(zip(found.of, exact.of, strict=True)):
        assert one is not None
        assert wanted is not None
        assert one.dtype == torch.float32
        assert torch.allclose(one.double(), wanted, rtol=0, atol=4e-3 * wanted.abs().max().item()), place
    weight = found.of[2]
    assert weight is not None
    assert (weight != weight.half().float()).any()


@pytest.mark.parametrize("operation", CASES)
def test_a_second_derivative_is_refused(operation: str) -> None:
    case = CASES[operation](draw_map((1, 8, 3, 4), torch.float32))
    x = case.arguments[0].requires_grad_()
    result = getattr(ops, operation)(x, *case.arguments[1:], **case.options, backend="triton")
    (first,) = torch.autograd.grad(result.square().sum(), x, create_graph=True)
    with pytest.raises(ops.UnsupportedError, match="no second derivative, use backend='eager'"):
        first.sum().backward()


def test_functional_gradients() -> None:
    case = conv_mlp_case(draw_map((2, 8, 3, 5), torch.float32), 20)

    def loss(x: Tensor, weight: Tensor, backend: str) -> Tensor:
        arguments = x, weight, *case.arguments[2:]
        return ops.conv_mlp(*arguments, backend=backend).square().sum()

    with float32_as_such():
        found, wanted = (
            torch.func.grad(loss, argnums=(0, 1))(*case.arguments[:2], backend) for backend in ("triton", "eager")
        )
    for one, other in zip(found, wanted, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-4 * other.abs().max().item())


def test_forward_mode_is_refused() -> None:
    case = pool_mixer_case(draw_map((1, 8, 3, 4), torch.float32))
    x, scale = case.arguments
    with pytest.raises(ops.UnsupportedError, match="in forward mode"):
        torch.func.jvp(lambda x: ops.pool_mixer(x, scale, backend="triton"), (x,), (x,))


def test_operators_pass_opcheck() -> None:
    case = meta4d_case(draw_map((2, 20, 3, 5), torch.float16), 40)
    x, *rest = case.arguments
    grad = draw_grad(case)
    given = (grad, x, *rest[:-1], "gelu")
    for needed in ([True] * 8, [True, False] * 4):
        torch.library.opcheck(operators.meta4d_backward, (*given, needed))
    torch.library.opcheck(operators.meta4d_backward, (grad, x, None, *rest[1:-1], "relu", [True, False, *[True] * 6]))
    for wanted in itertools.product((True, False), repeat=2):
        torch.library.opcheck(pooling.pool_mixer_backward, (grad, x, rest[0], list(wanted)))


def test_an_empty_batch() -> None:
    for make in CASES.values():
        case = make(draw_map((0, 16, 4, 5), torch.float16))
        found = by(case, "triton", case.arguments[0].clone())
        for one, argument in zip(found.of, case.arguments, strict=True):
            assert one is not None
            assert one.shape == argument.shape
            assert not one.any()


def _network_gradients(network: EfficientFormer, x: Tensor, backend: str) -> dict[str, Tensor]:
    effformer.set_backend(network, backend)
    network.zero_grad()
    with float32_as_such():
        result = network(x)
        (result[0] if isinstance(result, tuple) else result).square().mean().backward()
    return {name: one.grad for name, one in network.named_parameters() if one.grad is not None}


def test_a_network_with_frozen_statistics(narrow: Callable[..., EfficientFormer]) -> None:
    """4D blocks by kernels in both directions, the rest by its modules; every parameter has eager's gradient."""
    network = narrow(dtype=torch.float32)
    x = torch.randn(2, 3, 64, 64)
    wanted = _network_gradients(network, x, "eager")
    with recorded() as launches:
        found = _network_gradients(network, x, "triton")
    names = {one.kernel.__name__ for one in launches}
    assert {"mlp_backward_kernel", "pool_mixer_backward_kernel"} <= names
    assert not {name for name in names if name.startswith(("bias_attention", "conv_norm", "head", "layer_norm"))}
    assert found.keys() == wanted.keys()
    for name, one in found.items():
        assert torch.allclose(one, wanted[name], rtol=0, atol=2e-4 * wanted[name].abs().max().item()), name
    checkpointed = network
    checkpointed.set_grad_checkpointing(True)
    again = _network_gradients(checkpointed, x, "triton")
    for name, one in again.items():
        assert torch.allclose(one, found[name], rtol=0, atol=1e-5 * one.abs().max().item()), name


def test_batch_statistics_have_no_kernels_yet(narrow: Callable[..., EfficientFormer]) -> None:
    network = narrow(dtype=torch.float32, backend="triton").train()
    with pytest.raises(ops.UnsupportedError, match="batch statistics"):
        network(torch.randn(2, 3, 64, 64))


def test_training_steps_stay_near_float64() -> None:
    """Twenty steps of SGD with momentum on one block: as far from float64 as eager's, or 1.5 times as far."""
    network = randomise(effformer.create_model("efficientformer_l1", depths=(1, 1, 1, 1), num_vit=0, num_classes=0))
    block = network.stages[0].blocks[0].eval()
    x, target = torch.randn(2, 48, 6, 7), torch.randn(2, 48, 6, 7)
    ends = {}
    for how, dtype in (("exact", torch.float64), ("eager", torch.float32), ("triton", torch.float32)):
        own = copy.deepcopy(block).to(DEVICE, dtype)
        own.backend = "eager" if how == "exact" else how
        optimizer = torch.optim.SGD(own.parameters(), lr=0.02, momentum=0.9)
        with float32_as_such():
            for _ in range(20):
                optimizer.zero_grad()
                (own(x.to(dtype)) - target.to(dtype)).square().mean().backward()
                optimizer.step()
        ends[how] = torch.cat([one.detach().flatten().double() for one in own.parameters()])
    start = torch.cat([one.detach().flatten().double() for one in block.to(DEVICE).parameters()])
    moved = (ends["exact"] - start).norm()
    assert moved > 0.1
    ours, eager = ((ends[how] - ends["exact"]).norm() for how in ("triton", "eager"))
    assert ours <= 1.5 * eager + 1e-7 * moved
