"""The 4D block in training by kernels: batch statistics, stochastic depth, and the gradients of both."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
from compiling import TESTS, needs_compiler
from compiling import run as run_compiled
from effformer.kernels import operators
from effformer.kernels.launch import recorded
from effformer.kernels.statistics import channel_statistics, covariance
from machine import DEVICE, DTYPES
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from train_cases import TENSORS, TRAINED, draw, within

from effformer import ops
from effformer.testing import LAYOUTS, draw_map, float32_as_such, meta4d_case, meta4d_train_case, unwritten_is_nan

pytestmark = pytest.mark.usefixtures("kernel_device")
SHAPE = (3, 24, 9, 11)  # 297 pixels: more than two tiles of rows, and a part of one


# --- accuracy ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("mean", [0.0, 4.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_result_statistics_and_gradients(dtype: torch.dtype, mean: float, frozen: bool) -> None:
    """With stochastic depth and without, of inputs with channels' means of 0 and 4 deviations."""
    for keep in (False, True):
        assert within(draw(SHAPE, dtype, mean=mean, keep=keep, frozen=frozen)) == []


@pytest.mark.parametrize("channels", [48, 224])
def test_widths_of_networks(channels: int) -> None:
    assert within(draw((2, channels, 7, 10), torch.float16, hidden=2 * channels, mean=1.0)) == []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    case = draw((3, 20, 5, 7), torch.float16, layout=layout, keep=True)
    assert within(case) == []
    assert within(case._replace(grad=case.grad.contiguous())) == []
    assert within(case._replace(grad=torch.tensor(0.5).half().expand_as(case.grad))) == []
    result, gradients = case.by("triton")
    _, eager = case.by("eager")
    assert result[0].stride() == ops.pool_mixer(case.tensors[0], case.tensors[1], backend="triton").stride()
    assert gradients[0].stride() == eager[0].stride()


@pytest.mark.parametrize("activation", ["relu", "silu", "hard_swish"])
def test_activations(activation: str) -> None:
    for dtype in DTYPES:
        assert within(draw(SHAPE, dtype, activation=activation)) == []


def test_convolutions_without_a_bias() -> None:
    for frozen in (False, True):
        assert within(draw((2, 20, 5, 9), torch.float16, bias=False, frozen=frozen)) == []


@needs_compiler
def test_bfloat16_as_compiled() -> None:
    """The compiled kernels, executed on the CPU for three GPUs: within the rule, and without a fault."""
    if DEVICE.type == "cuda":
        pytest.skip("the GPU itself computes bfloat16")
    found = json.loads(run_compiled(str(TESTS / "train_worker.py")))
    assert len(found) == 6
    for one in found:
        assert not one["wrong"], one
        assert not one["faults"], one
        assert {"gram_kernel", "combine_kernel", "gradient_sums_kernel", "mlp_backward_kernel"} <= set(one["kernels"])


# --- statistics -------------------------------------------------------------------------------------------------------


def _relative(found: Tensor, exact: Tensor) -> float:
    return ((found - exact).abs() / exact.abs()).max().item()


@pytest.mark.parametrize(
    ("mean", "correlation", "bound"),
    [(0.0, 0.0, 1e-6), (4.0, 0.0, 1e-4), (30.0, 0.0, 1e-5), (0.0, 0.99, 2e-5), (0.0, 0.9999, 5e-3)],
)
def test_variances_from_the_covariance(mean: float, correlation: float, bound: float) -> None:
    """Of hidden units that see differences of channels, which may be almost alike, in float16."""
    rows, channels = 5000, 32
    common = torch.randn(rows, 1) * correlation**0.5
    x = (common + torch.randn(rows, channels) * (1 - correlation) ** 0.5 + mean * torch.randn(channels).sign()).half()
    weight = torch.randn(64, channels)
    weight = (weight - weight.mean(1, keepdim=True)).double()
    middle, found = covariance(x)
    exact = x.double()
    assert torch.allclose(middle, exact.mean(0), rtol=1e-6, atol=1e-6)
    variance = ((weight @ found) * weight).sum(1)
    assert _relative(variance, (exact @ weight.T).var(0, correction=0)) < bound


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [2, 100, 1000])
def test_means_and_variances_of_channels(rows: int, dtype: torch.dtype) -> None:
    x = (torch.randn(rows, 40) + 30).to(dtype)
    with unwritten_is_nan():
        mean, variance = channel_statistics(x)
    assert _relative(mean, x.double().mean(0)) < 1e-6
    assert _relative(variance, x.double().var(0, correction=0)) < 1e-4


def test_statistics_of_several_parts_of_the_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 they are those of the product itself, whose parts are merged."""
    case = draw(SHAPE, torch.float32, mean=4.0)
    whole, _ = case.by("triton")
    monkeypatch.setattr("effformer.kernels.mlp_backward.MOST_HIDDEN", 100 * case.hidden)
    assert within(case) == []
    parts, _ = case.by("triton")
    for one, other in zip(whole, parts, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-5)


# --- what is computed, kept and repeated ------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [False, True])
def test_what_is_not_needed_is_not_computed(frozen: bool) -> None:
    """Each argument alone has the gradient that it has beside all others."""
    case = draw((2, 20, 5, 9), torch.float16, keep=True, frozen=frozen)
    _, whole = case.by("triton")
    for place in range(TRAINED):
        with recorded() as launches:
            _, alone = case.by("triton", [place == other for other in range(TRAINED)])
        assert [one is not None for one in alone] == [place == other for other in range(TRAINED)]
        assert torch.equal(alone[place], whole[place]), place
        names = {one.kernel.__name__ for one in launches}
        assert ("pool_mixer_backward_kernel" in names) == (place < 2), place
        assert ("mlp_backward_kernel" in names) == (place < 7), place
        assert ("gradient_sums_kernel" in names) == (place >= 7 or not frozen), place


def test_the_same_bits_twice_from_any_memory() -> None:
    case = draw(SHAPE, torch.float16, keep=True)
    first = case.by("triton")
    with unwritten_is_nan():
        second = case.by("triton")
    for one, other in zip([*first[0], *first[1]], [*second[0], *second[1]], strict=True):
        assert torch.equal(one, other)


def test_two_maps_are_kept_for_the_backward() -> None:
    """The input and an inner result; matrices of C x C and vectors beside them."""
    case = draw((4, 24, 16, 16), torch.float16, keep=True)
    leaves = [
        one if one is None or place >= TRAINED else one.requires_grad_() for place, one in enumerate(case.tensors)
    ]
    known = {one.untyped_storage().data_ptr() for one in leaves[1:] if one is not None}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = ops.meta4d_train(*leaves, backend="triton").result
    others = sorted(size for place, size in kept.items() if place not in known)
    assert others[-2:] == [leaves[0].nbytes] * 2
    assert sum(others[:-2]) <= 4 * (24 * 24 + 2 * 24 + 3 * 24 + 2 * case.hidden)
    result.sum().backward()


class _Operations(TorchDispatchMode):
    """Counts PyTorch's operations that compute: no views, no new tensors, no products of matrices."""

    _FREE = re.compile(
        r"view|permute|expand|slice|select|unsqueeze|transpose|^t$|detach|empty|split|alias|squeeze|lift|^mm$"
    )
    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        self.count += not self._FREE.search(function.overloadpacket.__name__)
        return function(*arguments, **(keywords or {}))


def _small_operations(operator: str, *arguments: Any) -> tuple[int, list[Tensor]]:
    with recorded(run=False), _Operations() as operations:
        found = operators.IMPLEMENTATIONS[operator](*arguments)
    return operations.count, found


def test_small_operations_of_a_block() -> None:
    """The figures of docs/training.md: operations beside kernels and products, counted on the CPU in float16."""
    if DEVICE.type == "cuda":
        pytest.skip("counted on the CPU")
    x = draw_map((2, 48, 8, 8), torch.float16)
    backward, _ = _small_operations("meta4d_backward", x, *meta4d_case(x, 192).arguments, "gelu", [True] * 8)
    given, options = meta4d_train_case(x, 192).arguments, (1e-5, 1e-5, "gelu", "")
    train, found = _small_operations("meta4d_train", *given, *[None] * 4, *options)
    train_backward, _ = _small_operations("meta4d_train_backward", x, *given, *found[1:], *options, [True] * TRAINED)
    text = (TESTS.parent / "docs" / "training.md").read_text()
    assert f"{train} forward and {train_backward} backward with batch statistics, and {backward} backward" in text


def test_nan_and_infinities_reach_the_parameters() -> None:
    case = draw((2, 20, 5, 9), torch.float16)
    for value in (float("inf"), float("nan")):
        grad = case.grad.clone()
        grad[1, 3, 2, 4] = value
        _, gradients = case._replace(grad=grad).by("triton")
        for place, one in enumerate(gradients):
            assert place in (3, 7) or not one.isfinite().all(), place  # of biases, which are 0


def test_an_empty_batch_with_given_statistics() -> None:
    case = draw((2, 20, 3, 4), torch.float16, frozen=True)
    x, *others = case.tensors
    empty = case._replace(tensors=[x[:0], *others], grad=case.grad[:0])
    result, gradients = empty.by("triton")
    assert result[0].shape == (0, 20, 3, 4)
    assert not any(one.any() for one in gradients)


# --- errors -----------------------------------------------------------------------------------------------------------


def test_wrong_arguments() -> None:
    case = draw((2, 20, 5, 9), torch.float32, frozen=True, keep=True)
    given = dict(zip(TENSORS, case.tensors, strict=True))

    def refused(error: type[Exception], words: str, **changed: Any) -> None:
        for backend in ("eager", "triton"):
            with pytest.raises(error, match=words):
                ops.meta4d_train(**given | changed, backend=backend)

    refused(ValueError, "mean1, var1, mean2, var2: got mean1, var1, var2 alone, allowed are all or none", mean2=None)
    refused(ValueError, r"keep1: got shape \[3\], allowed is \[2\]", keep1=torch.ones(3))
    refused(ValueError, r"bias1: got shape \[20\]", bias1=torch.ones(20))
    refused(TypeError, "norm_weight2: got torch.float16", norm_weight2=given["norm_weight2"].half())
    refused(ValueError, "layer_scale2: got shape", layer_scale2=torch.ones(3))
    refused(ValueError, "var2: got a tensor that needs a gradient", var2=given["var2"].clone().requires_grad_())
    one = {"mean1": None, "var1": None, "mean2": None, "var2": None, "keep1": None, "keep2": None}
    for shape in ((1, 20, 1, 1), (0, 20, 5, 9)):
        refused(ValueError, "two values a channel or more", x=torch.ones(shape), **one)


def test_second_derivatives_and_forward_mode() -> None:
    case = draw((2, 8, 3, 5), torch.float32)
    x, *others = case.tensors
    x.requires_grad_()
    (first,) = torch.autograd.grad(
        ops.meta4d_train(x, *others, backend="triton").result.square().sum(), x, create_graph=True
    )
    with pytest.raises(ops.UnsupportedError, match="no second derivative, use backend='eager'"):
        first.sum().backward()
    x = x.detach()
    with pytest.raises(ops.UnsupportedError, match="in forward mode"):
        torch.func.jvp(lambda x: ops.meta4d_train(x, *others, backend="triton").result, (x,), (x,))


def test_operators_pass_opcheck() -> None:
    for frozen, keep in ((False, True), (True, False)):
        case = draw((2, 20, 3, 5), torch.float16, frozen=frozen, keep=keep)
        options = (1e-5, 1e-5, "gelu", "")
        torch.library.opcheck(operators.meta4d_train, (*case.tensors, *options))
        _, *saved = operators.meta4d_train(*case.tensors, *options)
        for needed in ([True] * TRAINED, [place % 2 == 0 for place in range(TRAINED)]):
            arguments = (case.grad, *case.tensors[:13], *saved, *options, needed)
            torch.library.opcheck(operators.meta4d_train_backward, arguments)


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_without_gradients(layout: str) -> None:
    """Training mode under `torch.no_grad`, as for recomputing BatchNorm's statistics."""
    case = draw((2, 20, 5, 9), torch.float32, layout=layout)
    with torch.no_grad(), float32_as_such():
        one, other = (ops.meta4d_train(*case.tensors, backend=backend) for backend in ("triton", "eager"))
    assert one.values == other.values == 90
    for found, wanted in zip(one[:-1], other[:-1], strict=True):
        assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-5)
