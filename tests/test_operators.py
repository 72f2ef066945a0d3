"""The kernels as PyTorch operators: registration, gradients, autocast, and the choice of backend."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from effformer.kernels import attention_mixer, bias_attention, conv_mlp, head, launch, linear_mlp, meta4d, pool_mixer
from machine import DEVICE, ON_GPU, SLACK
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from effformer import EfficientFormer, backend, create_model, freeze, ops, set_backend
from effformer.testing import (
    LAYOUTS,
    Case,
    accuracy,
    attention_mixer_case,
    bias_attention_case,
    conv_mlp_case,
    conv_norm_case,
    draw_map,
    head_case,
    linear_mlp_case,
    meta4d_case,
    pool_mixer_case,
    randomise,
)
from effformer.workload import DIFFERENTIABLE

pytestmark = pytest.mark.usefixtures("kernel_device")
interpreted_only = pytest.mark.skipif(ON_GPU, reason="what the interpreter refuses")

OPERATORS: dict[str, Callable[..., Tensor]] = {
    "pool_mixer": pool_mixer.pool_mixer,
    "conv_mlp": conv_mlp.conv_mlp,
    "meta4d": meta4d.meta4d,
    "bias_attention": bias_attention.bias_attention,
    "attention_mixer": attention_mixer.attention_mixer,
    "linear_mlp": linear_mlp.linear_mlp,
    "head": head.head,
}


def cases(dtype: torch.dtype = torch.float16) -> dict[str, Case]:
    x, tokens = draw_map((2, 20, 5, 7), dtype), torch.randn(2, 9, 20).to(dtype)
    return {
        "pool_mixer": pool_mixer_case(x),
        "conv_mlp": conv_mlp_case(x, 40),
        "meta4d": meta4d_case(x, 40),
        "conv_norm": conv_norm_case(x, 24, "silu"),
        "bias_attention": bias_attention_case(2, 9, dtype, num_heads=2, key_dim=4, value_dim=6),
        "attention_mixer": attention_mixer_case(tokens, num_heads=2, key_dim=4, value_dim=6),
        "linear_mlp": linear_mlp_case(tokens, 40),
        "head": head_case(tokens, 7),
    }


def operator_arguments(case: Case) -> tuple[Any, ...]:
    return (*case.arguments, *case.options.values())


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name: str) -> None:
    torch.library.opcheck(OPERATORS[name], operator_arguments(cases()[name]))


def test_opcheck_of_a_block_in_three_launches() -> None:
    case = meta4d_case(draw_map((2, 240, 3, 2), torch.float32, "contiguous"), 40)
    torch.library.opcheck(OPERATORS["meta4d"], operator_arguments(case))


def test_opcheck_of_a_prepared_bias() -> None:
    case = cases(torch.float32)["attention_mixer"]
    arguments = list(operator_arguments(case))
    arguments[5] = bias_attention.prepare_bias(arguments[5], 4, 6, torch.float32)
    torch.library.opcheck(OPERATORS["attention_mixer"], (*arguments, True))


@torch.no_grad()
def test_a_prepared_bias_is_for_the_kernels_alone() -> None:
    case = cases(torch.float32)["attention_mixer"]
    bias, sizes = case.arguments[5], {"key_dim": 4, "value_dim": 6}
    prepared = ops.prepare_bias(bias, **sizes, dtype=torch.float32)
    arguments = (*case.arguments[:5], prepared, *case.arguments[6:])
    found = ops.attention_mixer(*arguments, **case.options, prepared=True, backend="triton")
    assert accuracy(found, case.exact(), case.run("eager")).passes()
    with pytest.raises(ValueError, match="prepared: got True, allowed is False where eager PyTorch computes"):
        ops.attention_mixer(*arguments, **case.options, prepared=True, backend="eager")
    with pytest.raises(ValueError, match=r"bias: got shape \[2, 9, 16\], allowed is \[2, 9, 9\]"):
        ops.attention_mixer(*arguments, **case.options, backend="triton")
    with pytest.raises(ValueError, match=r"bias: got shape \[2, 9, 8\]"):
        ops.prepare_bias(bias[..., :8], **sizes, dtype=torch.float32)
    for name in sizes:
        with pytest.raises(ValueError, match=f"{name}: got 0"):
            ops.prepare_bias(bias, **sizes | {name: 0}, dtype=torch.float32)
    with pytest.raises(ops.UnsupportedError, match="not torch.float64"):
        ops.prepare_bias(bias, **sizes, dtype=torch.float64)


def test_opcheck_of_pooled_features() -> None:
    x, *norm = head_case(torch.randn(2, 9, 20)).arguments
    torch.library.opcheck(OPERATORS["head"], (x, *norm, None, None, 1e-5))


@pytest.mark.parametrize(
    "shape", [(2, 20, 5, 7), (2, 20, 1, 1), (1, 1, 5, 7), (2, 1, 1, 1), (0, 20, 5, 7), (1, 20, 1, 7)]
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fake_and_real_agree_on_strides(layout: str, shape: tuple[int, int, int, int]) -> None:
    for case in (
        pool_mixer_case(draw_map(shape, torch.float16, layout)),
        meta4d_case(draw_map(shape, torch.float16, layout), 40),
    ):
        real = OPERATORS[case.operation](*operator_arguments(case))
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fakes = tuple(mode.from_tensor(argument) for argument in case.arguments)
            fake = OPERATORS[case.operation](*fakes, *case.options.values())
        assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)


# --- the network ------------------------------------------------------------------------------------------------------


class Recorder(TorchDispatchMode):
    """Counts operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[function.name()] += 1
        return function(*args, **(kwargs or {}))


@contextmanager
def pretend_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Within it, "auto" takes the (interpreted) kernels on the CPU, as it would on a GPU."""
    with monkeypatch.context() as patch:
        patch.setattr(backend, "_why_not_device", lambda device, dtype, asked_for: None)
        yield


@pytest.mark.parametrize(
    ("name", "blocks_3d"), [("efficientformer_l1", 1), ("efficientformer_l3", 4), ("efficientformer_l7", 8)]
)
@pytest.mark.parametrize("choice", ["triton", "auto"])
def test_every_block_runs_on_the_kernels(
    name: str, blocks_3d: int, choice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted on meta tensors: the blocks leave no convolution, norm or product to PyTorch."""
    network = create_model(name, device="meta", dtype=torch.float16, backend=choice).eval()
    x = torch.empty(1, 3, 224, 224, dtype=torch.float16, device="meta")
    with pretend_gpu(monkeypatch), torch.no_grad(), Recorder() as recorder:
        network(x)
    seen = recorder.seen
    assert seen["effformer::meta4d"] == sum(network.config.depths) - blocks_3d
    assert seen["effformer::attention_mixer"] == seen["effformer::linear_mlp"] == blocks_3d
    assert seen["aten::convolution"] == 2 + 3  # stem and downsampling
    assert seen["aten::native_layer_norm"] == 1
    assert seen["aten::addmm"] == 2  # the heads
    assert not any(seen[f"aten::{other}"] for other in ("bmm", "mm", "gelu", "avg_pool2d", "_softmax"))


def test_gradients_of_a_model_in_eval_mode(
    narrow: Callable[..., EfficientFormer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An operator without a gradient would silently give none: "auto" takes eager (see test_backward.py for "triton")."""
    x = torch.randn(2, 3, 64, 64)
    gradients = {}
    for choice in ("auto", "eager"):
        network = narrow(dtype=torch.float32, backend=choice)
        with pretend_gpu(monkeypatch), Recorder() as recorder:
            network(x).square().sum().backward()
        assert not any(name.startswith("effformer") for name in recorder.seen)
        gradients[choice] = [parameter.grad for parameter in network.parameters()]
    for auto, eager in zip(gradients["auto"], gradients["eager"], strict=True):
        assert auto is not None
        assert torch.allclose(auto, eager, rtol=0, atol=SLACK * eager.abs().max().item() if ON_GPU else 0)


def test_gradients_of_the_input_alone_are_seen_too(monkeypatch: pytest.MonkeyPatch) -> None:
    with pretend_gpu(monkeypatch):
        for case in cases(torch.float32).values():
            arguments = (case.arguments[0].clone().requires_grad_(), *case.arguments[1:])
            operation = getattr(ops, case.operation)
            operation(*arguments, **case.options).sum().backward()
            assert arguments[0].grad is not None
            if case.operation not in DIFFERENTIABLE:
                with pytest.raises(ops.UnsupportedError, match="a gradient is needed"):
                    operation(*arguments, **case.options, backend="triton")
            with torch.no_grad(), Recorder() as recorder:
                operation(*arguments, **case.options)
            assert recorder.seen[f"effformer::{case.operation}"] == 1


def test_forward_mode_gradients_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dual tensor does not say that a gradient is needed."""
    for case in cases(torch.float32).values():
        x, *rest = case.arguments

        def call(x: Tensor, backend: str, case: Case = case, rest: list[Tensor] = rest) -> Tensor:
            result: Tensor = getattr(ops, case.operation)(x, *rest, **case.options, backend=backend)
            return result

        tangent = torch.randn_like(x)
        with pretend_gpu(monkeypatch):
            auto = torch.func.jvp(lambda x: call(x, "auto"), (x,), (tangent,))[1]
            eager = torch.func.jvp(lambda x: call(x, "eager"), (x,), (tangent,))[1]
            assert torch.equal(auto, eager)
            assert eager.abs().max() > 0
            with pytest.raises(ops.UnsupportedError, match="a gradient is needed"):
                torch.func.jvp(lambda x: call(x, "triton"), (x,), (tangent,))


def test_an_operator_called_by_hand_is_not_silent() -> None:
    case = cases(torch.float32)["pool_mixer"]
    x = case.arguments[0].clone().requires_grad_()
    out = OPERATORS["pool_mixer"](x, case.arguments[1])
    with pytest.warns(UserWarning, match="effformer::pool_mixer: an autograd kernel was not registered"):
        out.sum().backward()


def test_autocast_computes_products_in_its_dtype(narrow: Callable[..., EfficientFormer]) -> None:
    """Weights stay float32; the residual stream has the dtype it came in."""
    x = torch.randn(2, 3, 64, 96)
    exact = narrow()(x.double())
    results = {}
    for choice in ("eager", "triton"):
        network = narrow(dtype=torch.float32, backend=choice)
        with torch.no_grad(), torch.autocast(DEVICE.type, torch.float16):
            results[choice] = network(x)
    errors = {name: (result.double() - exact).abs().max() for name, result in results.items()}
    assert 1e-5 < errors["triton"] <= 2 * errors["eager"]
    assert results["triton"].dtype == results["eager"].dtype

    for case in cases(torch.float32).values():
        with torch.autocast(DEVICE.type, torch.float16):
            out = case.run("triton")
            found = (out.double() - case.exact()).abs().max()
            assert out.dtype == case.run("eager").dtype == torch.float32, case.operation
        if case.operation != "pool_mixer":
            assert 1e-5 < found < 2e-2, case.operation  # float16's error, not float32's


@interpreted_only
def test_autocasts_dtype_is_looked_at_too() -> None:
    """On a CPU, autocast means bfloat16, which the interpreter does not compute."""
    for case in cases(torch.float32).values():
        with torch.autocast("cpu"):
            if case.operation == "pool_mixer":
                case.run("triton")
            else:
                with pytest.raises(ops.UnsupportedError, match="interpreter does not compute torch.bfloat16"):
                    case.run("triton")


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPERATORS)
def test_unsupported_dtypes(name: str) -> None:
    case = cases(torch.float32)[name]
    wide = Case(name, tuple(argument.double() for argument in case.arguments), case.options)
    with pytest.raises(ops.UnsupportedError, match=r"float16, torch.bfloat16, torch.float32, not torch.float64"):
        wide.run("triton")


@interpreted_only
@pytest.mark.parametrize("name", OPERATORS)
def test_the_interpreter_has_no_bfloat16(name: str) -> None:
    with pytest.raises(ops.UnsupportedError, match=r"interpreter does not compute torch.bfloat16"):
        cases(torch.bfloat16)[name].run("triton")


@pytest.mark.parametrize("activation", ["relu6", "leaky_relu"])
def test_unsupported_activations(activation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = draw_map((1, 20, 3, 3), torch.float32)
    for case in (
        conv_mlp_case(x, 9, activation),
        meta4d_case(x, 9, activation),
        linear_mlp_case(torch.randn(1, 4, 20), 9, activation),
    ):
        with pytest.raises(ops.UnsupportedError, match=f"gelu, relu, silu, swish, hard_swish, not '{activation}'"):
            case.run("triton")
        with pretend_gpu(monkeypatch):
            assert torch.equal(case.run("auto"), case.run("eager"))


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda", 0)
    assert ops.why_not_triton(torch.device("cpu")) == "'cpu' is not an NVIDIA GPU"
    assert ops.why_not_triton(torch.device("mps"), asked_for=True) == "'mps' is not an NVIDIA GPU"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "a card has 7.5" in str(ops.why_not_triton(cuda))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert ops.why_not_triton(cuda, torch.bfloat16) is None
    assert "not torch.float64" in str(ops.why_not_triton(cuda, torch.float64))
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert "ROCm" in str(ops.why_not_triton(cuda))


def test_tf32_follows_torchs_flags(narrow: Callable[..., EfficientFormer]) -> None:
    """One for what stands for convolutions, one for matrix products; also of a network that ran before."""
    x = torch.randn(1, 3, 64, 64)
    network = narrow(dtype=torch.float32, backend="triton", device=DEVICE)
    forms = network, freeze(network, torch.float32, backend="triton", cuda_graphs=False)
    conv, matmul = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = conv.fp32_precision, matmul.fp32_precision
    try:
        for flags in (("ieee", "ieee"), ("tf32", "ieee"), ("ieee", "tf32"), ("tf32", "tf32")):
            conv.fp32_precision, matmul.fp32_precision = flags
            for convolution, allowed in zip((True, False), flags, strict=True):
                assert launch.dot_precision(torch.float32, convolution=convolution) == allowed
                assert launch.dot_precision(torch.float16, convolution=convolution) == "ieee"
            for forward in forms:
                with torch.no_grad(), launch.recorded(run=False) as launches:
                    forward(x)
                found = {one.constants["PRECISION"] for one in launches if "PRECISION" in one.constants}
                assert ("tf32" in found) == ("tf32" in flags)
                assert (found == {"tf32"}) == (set(flags) == {"tf32"})
    finally:
        conv.fp32_precision, matmul.fp32_precision = before


def test_a_cpu_needs_the_interpreter() -> None:
    code = """
import torch
from effformer import ops
from effformer.kernels.pool_mixer import pool_mixer
x, scale = torch.zeros(1, 2, 3, 3), torch.zeros(2)
for call in (lambda: ops.pool_mixer(x, scale, backend="triton"), lambda: pool_mixer(x, scale)):
    try:
        call()
    except RuntimeError as error:
        print(type(error).__name__, error)
"""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    asked, operator = done.stdout.splitlines()
    assert asked.startswith("UnsupportedError backend='triton': 'cpu' is not an NVIDIA GPU")
    assert "TRITON_INTERPRET=1" in operator


def test_set_backend_switches_what_computes(narrow: Callable[..., EfficientFormer]) -> None:
    network, x = narrow(dtype=torch.float32), torch.randn(1, 3, 64, 64)
    randomise(network)
    for choice in ("triton", "eager"):
        set_backend(network, choice)
        with torch.no_grad(), launch.recorded() as launches:
            network(x)
        assert bool(launches) == (choice == "triton")


@pytest.mark.parametrize(
    ("operation", "match"),
    [
        (lambda backend: ops.pool_mixer(_huge(1, 8, 2**16, 2**15), torch.ones(8), backend=backend), None),
        (lambda backend: _huge_norm(backend), "32768 for LayerNorm"),
        (lambda backend: ops.bias_attention(_huge(1, 2, 4100), torch.zeros(1, 2, 2), num_heads=1, key_dim=2000, backend=backend), "key_dim: got 2000"),
    ],
)  # fmt: skip
def test_beyond_the_kernels_sizes_auto_takes_eager(
    operation: Callable[[str], object], match: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if this were a GPU; "triton" says what is too large."""
    monkeypatch.setattr(backend, "_why_not_device", lambda *_: None)
    for name in ("pool_mixer", "bias_attention", "head"):
        monkeypatch.setattr(ops.reference, name, lambda *_, **__: "eager")
    assert operation("auto") == "eager"
    if match is not None:  # test_sizes.py has the map
        with pytest.raises(ValueError, match=match):
            operation("triton")


def _huge(*shape: int) -> Tensor:
    """In the memory of one element."""
    return torch.zeros(1).expand(shape)


def _huge_norm(backend: str) -> object:
    return ops.head(_huge(1, 2, 2**15 + 1), torch.ones(2**15 + 1), torch.ones(2**15 + 1), backend=backend)
