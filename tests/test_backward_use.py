"""Gradients by kernels as people call them: autocast, transformations, compilers, whole networks."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import gradient_cases
import pytest
import torch
from effformer.kernels import operators
from effformer.kernels.launch import recorded
from gradient_cases import MAPS, TOKENS, by, draw, draw_grad
from machine import DEVICE
from torch import Tensor

import effformer
from effformer import EfficientFormer, ops
from effformer.testing import (
    conv_mlp_case,
    draw_map,
    float32_as_such,
    meta4d_case,
    pool_mixer_case,
    randomise,
)

pytestmark = pytest.mark.usefixtures("kernel_device")


def test_autocast() -> None:
    """Products in float16; parameters in float32 have gradients in float32, which are not rounded to 16 bits."""
    case = meta4d_case(draw_map((2, 24, 6, 7), torch.float32), 50)
    grad = draw_grad(case)

    def function(*given: Tensor) -> Tensor:
        with torch.autocast(DEVICE.type, torch.float16):
            return ops.meta4d(*given, backend="triton")

    found, exact = gradient_cases.of(function, case.arguments, grad), by(case, "exact", grad)
    for place, (one, wanted) in enumerate(zip(found.gradients, exact.gradients, strict=True)):
        assert one.dtype == torch.float32
        assert torch.allclose(one.double(), wanted, rtol=0, atol=4e-3 * wanted.abs().max().item()), place
    weight = found.gradients[2]
    assert (weight != weight.half().float()).any()


@pytest.mark.parametrize("operation", ["conv_mlp", "meta4d"])
def test_autocast_of_expanded_maps(operation: str) -> None:
    """A cast of a map that repeats a pixel may lay its channels apart."""
    case = MAPS[operation](torch.randn(2, 24, 1, 1).expand(-1, -1, 5, 7))
    grad = draw_grad(case)

    def function(*given: Tensor) -> Tensor:
        with torch.autocast(DEVICE.type, torch.float16):
            return getattr(ops, operation)(*given, backend="triton")

    found, exact = gradient_cases.of(function, case.arguments, grad), by(case, "exact", grad)
    for place, (one, wanted) in enumerate(zip(found.gradients, exact.gradients, strict=True)):
        assert torch.allclose(one.double(), wanted, rtol=0, atol=6e-3 * wanted.abs().max().item()), place


@pytest.mark.parametrize("operation", [*MAPS, *TOKENS])
def test_a_second_derivative_is_refused(operation: str) -> None:
    case = draw(operation, torch.float32)
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


def test_a_compiled_step_without_breaks() -> None:
    """As operators in the graph, in both directions; the same bits as without a compiler."""
    case = meta4d_case(draw_map((2, 16, 5, 6), torch.float32), 32)
    grad = draw_grad(case)

    def step(*given: Tensor) -> Tensor:
        return ops.meta4d(*given, backend="triton")

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    with float32_as_such():
        plain, found = (gradient_cases.of(function, case.arguments, grad) for function in (step, compiled))
    for one, other in zip(plain.gradients, found.gradients, strict=True):
        assert torch.equal(one, other)


def test_scaled_losses() -> None:
    """GradScaler skips a step whose gradients overflow, and halves its scale; the next one is taken."""
    case = conv_mlp_case(draw_map((2, 16, 4, 5), torch.float32), 32)
    weight = torch.nn.Parameter(case.arguments[1])
    optimizer = torch.optim.SGD([weight], lr=1e-3)
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**40, growth_interval=1000)
    before, steps = weight.detach().clone(), 0
    while torch.equal(weight, before):
        optimizer.zero_grad()
        with torch.autocast(DEVICE.type, torch.float16):
            x, _, *rest = case.arguments
            loss = ops.conv_mlp(x, weight, *rest, backend="triton").float().square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        steps += 1
        assert steps < 40
    assert steps > 1
    assert weight.isfinite().all()


def test_forward_mode_is_refused() -> None:
    case = pool_mixer_case(draw_map((1, 8, 3, 4), torch.float32))
    x, scale = case.arguments
    with pytest.raises(ops.UnsupportedError, match="in forward mode"):
        torch.func.jvp(lambda x: ops.pool_mixer(x, scale, backend="triton"), (x,), (x,))


def test_operators_pass_opcheck() -> None:
    case = meta4d_case(draw_map((2, 20, 3, 5), torch.float16), 40)
    x, *rest = case.arguments
    grad = draw_grad(case)
    given = (grad, x, *rest, "gelu")
    for needed in ([True] * 8, [True, False] * 4):
        torch.library.opcheck(operators.meta4d_backward, (*given, needed))
    torch.library.opcheck(operators.meta4d_backward, (grad, x, None, *rest[1:], "relu", [True, False, *[True] * 6]))
    for wanted in itertools.product((True, False), repeat=2):
        torch.library.opcheck(operators.pool_mixer_backward, (grad, x, rest[0], list(wanted)))
    for operation, options in (
        ("attention_mixer", (2, 16, 1e-5)),
        ("linear_mlp", ("gelu", 1e-5)),
        ("bias_attention", (2, 16)),
    ):
        case = draw(operation, torch.float16)
        count = len(case.arguments)
        for needed in ([True] * count, [place % 2 == 0 for place in range(count)]):
            arguments = (draw_grad(case), *case.arguments, *options, needed)
            torch.library.opcheck(getattr(operators, f"{operation}_backward"), arguments)


def test_an_empty_batch() -> None:
    cases = [make(draw_map((0, 16, 4, 5), torch.float16)) for make in MAPS.values()]
    cases += [make(torch.randn(0, 9, 16).half()) for make in TOKENS.values()]
    for case in cases:
        found = by(case, "triton", draw_grad(case))
        for one, argument in zip(found.gradients, case.arguments, strict=True):
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
    """Blocks by kernels in both directions, the rest by its modules; every parameter has eager's gradient."""
    network = narrow(dtype=torch.float32)
    x = torch.randn(2, 3, 64, 64)
    wanted = _network_gradients(network, x, "eager")
    with recorded() as launches:
        found = _network_gradients(network, x, "triton")
    names = {one.kernel.__name__ for one in launches}
    blocks = {"mlp_backward_kernel", "pool_mixer_backward_kernel", "layer_norm_backward_kernel"}
    assert blocks | {"attention_backward_kernel"} <= names
    assert not {name for name in names if name.startswith(("conv_norm", "head"))}
    assert found.keys() == wanted.keys()
    for name, one in found.items():
        assert torch.allclose(one, wanted[name], rtol=0, atol=2e-4 * wanted[name].abs().max().item()), name
    checkpointed = network
    checkpointed.set_grad_checkpointing(True)
    again = _network_gradients(checkpointed, x, "triton")
    for name, one in again.items():
        assert torch.allclose(one, found[name], rtol=0, atol=1e-5 * one.abs().max().item()), name


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
