"""The operations' errors, and the backend that computes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_reference import draw, mlp_arguments
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from effformer import EfficientFormer, create_model, ops, set_backend
from effformer.model.blocks import Meta3D
from effformer.model.meta4d import Meta4D

W1, S1, B1, W2, S2, B2 = range(6)


def replaced(index: int, value: Tensor) -> tuple[Tensor, ...]:
    arguments = list(mlp_arguments(4, 8, torch.float32))
    arguments[index] = value
    return tuple(arguments)


X = torch.zeros(2, 4, 5, 5)
MLP = mlp_arguments(4, 8, torch.float32)
TOKENS = torch.zeros(2, 6, 4)
LINEAR = (MLP[W1], MLP[B1], MLP[W2], MLP[S2], MLP[B2])
HEADS = {"num_heads": 3, "key_dim": 3}
QKV, BIAS = torch.zeros(2, 6, 3 * 10), torch.zeros(3, 6, 6)


MIXER = (
    torch.ones(4),
    torch.ones(4),
    torch.ones(30, 4),
    torch.ones(30),
    BIAS,
    torch.ones(4, 12),
    torch.ones(4),
    torch.ones(4),
)


def mixed(index: int, value: Tensor) -> tuple[Tensor, ...]:
    return (*MIXER[:index], value, *MIXER[index + 1 :])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.pool_mixer(X[0], torch.ones(4)), ValueError, r"x: got shape \[4, 5, 5\]"),
        (lambda: ops.pool_mixer(X.int(), torch.ones(4)), TypeError, r"x: got torch.int32, allowed is a floating"),
        (lambda: ops.pool_mixer(X, torch.ones(5)), ValueError, r"layer_scale: got shape \[5\], allowed is \[4\]"),
        (lambda: ops.pool_mixer(X, torch.ones(4).double()), TypeError, "layer_scale: got torch.float64, allowed is torch.float32"),
        (lambda: ops.pool_mixer(X.double(), torch.ones(4)), TypeError, "layer_scale: got torch.float32, allowed is torch.float64"),
        (lambda: ops.pool_mixer(X.half(), torch.ones(4).half()), TypeError, "allowed is torch.float32 with an input of torch.float16"),
        (lambda: ops.pool_mixer(X, torch.ones(4), backend="cuda"), ValueError, "backend: got 'cuda'.*auto, eager, triton"),
        (lambda: ops.conv_mlp(X, *replaced(W1, torch.ones(8, 5))), ValueError, r"weight1: got shape \[8, 5\], allowed is \[hidden, 4\]"),
        (lambda: ops.conv_mlp(X, *replaced(W1, torch.ones(8, 4, 1, 1))), ValueError, "weight1: got shape"),
        (lambda: ops.conv_mlp(X, *replaced(W2, torch.ones(8, 4))), ValueError, r"weight2: got shape \[8, 4\], allowed is \[4, 8\]"),
        (lambda: ops.conv_mlp(X, *replaced(S1, torch.ones(4))), ValueError, r"scale1: got shape \[4\], allowed is \[8\]"),
        (lambda: ops.conv_mlp(X, *replaced(B2, torch.ones(8))), ValueError, r"shift2: got shape \[8\], allowed is \[4\]"),
        (lambda: ops.conv_mlp(X, *replaced(S2, torch.ones(4).half())), TypeError, "scale2: got torch.float16"),
        (lambda: ops.conv_mlp(X, *replaced(W2, torch.ones(4, 8).half())), TypeError, "weight2: got torch.float16, allowed is x's torch.float32"),
        (lambda: ops.conv_mlp(X, *MLP, activation="prelu"), ValueError, "activation: got 'prelu'.*gelu"),
        (lambda: ops.meta4d(X, torch.ones(3), *MLP), ValueError, r"layer_scale1: got shape \[3\]"),
        (lambda: ops.bias_attention(QKV[0], BIAS, num_heads=3, key_dim=3), ValueError, "qkv: got shape"),
        (lambda: ops.bias_attention(QKV, BIAS, num_heads=4, key_dim=3), ValueError, "30 channels with num_heads=4"),
        (lambda: ops.bias_attention(QKV, BIAS, num_heads=3, key_dim=5), ValueError, "value_dim of 1 or more"),
        (lambda: ops.bias_attention(QKV, BIAS[:, :5], num_heads=3, key_dim=3), ValueError, r"bias: got shape \[3, 5, 6\]"),
        (lambda: ops.bias_attention(QKV, BIAS.half(), num_heads=3, key_dim=3), TypeError, "bias: got torch.float16"),
        (lambda: ops.pool_mixer(X, torch.ones(4, device="meta")), ValueError, "layer_scale: got a tensor on meta, allowed is x's device cpu"),
        (lambda: ops.conv_mlp(X, *replaced(W2, torch.ones(4, 8, device="meta"))), ValueError, "weight2: got a tensor on meta"),
        (lambda: ops.attention_mixer(TOKENS[0], *MIXER, **HEADS), ValueError, r"x: got shape \[6, 4\], allowed is \[B, N, channels\]"),
        (lambda: ops.attention_mixer(TOKENS, *mixed(0, torch.ones(5)), **HEADS), ValueError, r"norm_weight: got shape \[5\], allowed is \[4\]"),
        (lambda: ops.attention_mixer(TOKENS, *mixed(2, torch.ones(30, 5)), **HEADS), ValueError, r"qkv_weight: got shape \[30, 5\], allowed is \[qkv channels, 4\]"),
        (lambda: ops.attention_mixer(TOKENS, *MIXER, num_heads=4, key_dim=3), ValueError, "qkv: got 30 channels with num_heads=4"),
        (lambda: ops.attention_mixer(TOKENS, *mixed(3, torch.ones(30).half()), **HEADS), TypeError, "qkv_bias: got torch.float16"),
        (lambda: ops.attention_mixer(TOKENS, *mixed(4, BIAS[:2]), **HEADS), ValueError, r"bias: got shape \[2, 6, 6\]"),
        (lambda: ops.attention_mixer(TOKENS, *mixed(5, torch.ones(4, 11)), **HEADS), ValueError, r"proj_weight: got shape \[4, 11\], allowed is \[4, 12\]"),
        (lambda: ops.attention_mixer(TOKENS, *mixed(6, torch.ones(4).double()), **HEADS), TypeError, "scale: got torch.float64"),
        (lambda: ops.linear_mlp(X, torch.ones(4), torch.ones(4), *LINEAR), ValueError, "x: got shape"),
        (lambda: ops.linear_mlp(TOKENS, torch.ones(4), torch.ones(3), *LINEAR), ValueError, r"norm_bias: got shape \[3\]"),
        (lambda: ops.linear_mlp(TOKENS.half(), torch.ones(4), torch.ones(4), *LINEAR), TypeError, "weight1: got torch.float32, allowed is x's torch.float16"),
        (lambda: ops.linear_mlp(TOKENS, torch.ones(4), torch.ones(4), *LINEAR, activation="tanh"), ValueError, "activation: got 'tanh'"),
        (lambda: ops.head(X, MLP[S2], MLP[B2]), ValueError, "x: got shape"),
        (lambda: ops.head(TOKENS, torch.ones(5), MLP[B2]), ValueError, r"norm_weight: got shape \[5\], allowed is \[4\]"),
        (lambda: ops.head(TOKENS, MLP[S2], MLP[B2], MLP[W1]), ValueError, "weight: got it alone, allowed are weight and bias together"),
        (lambda: ops.head(TOKENS, MLP[S2], MLP[B2], bias=MLP[B1]), ValueError, "bias: got it alone"),
        (lambda: ops.head(TOKENS, MLP[S2], MLP[B2], MLP[W2], MLP[B2]), ValueError, r"weight: got shape \[4, 8\], allowed is \[classes, 4\]"),
        (lambda: ops.head(TOKENS, MLP[S2], MLP[B2], MLP[W1].half(), MLP[B1]), TypeError, "weight: got torch.float16, allowed is x's torch.float32"),
        (lambda: ops.head(TOKENS, MLP[S2], MLP[B2], MLP[W1], MLP[B2]), ValueError, r"bias: got shape \[4\], allowed is \[8\]"),
        (lambda: ops.head(TOKENS, MLP[S2], MLP[B2], MLP[W1], MLP[B1].double()), TypeError, "bias: got torch.float64"),
        (lambda: ops.expand_bias(BIAS[0], 2, 3, resolution=6), ValueError, r"table: got shape \[6, 6\], allowed is \[num_heads, 36\]"),
        (lambda: ops.expand_bias(BIAS.int()[0], 2, 3, resolution=2), TypeError, "table: got torch.int32"),
        (lambda: ops.expand_bias(torch.ones(2, 4), 2, 3, resolution=2, resize="nearest"), ValueError, "resize: got 'nearest'"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_set_backend_reaches_every_block(narrow: Callable[..., EfficientFormer]) -> None:
    network = narrow()
    x = draw(1, 3, 64, 64)
    set_backend(network, "triton")
    with pytest.raises(ops.UnsupportedError, match="not torch.float64|interprets only"):
        network(x)
    for stage in network.stages:
        for block in stage.blocks:
            mixer = getattr(block, "token_mixer", None)
            assert {getattr(block, "backend", "triton"), getattr(mixer, "backend", "triton")} == {"triton"}
    network.stages[0].blocks[0].mlp.norm1.train()
    with pytest.raises(ops.UnsupportedError, match="one BatchNorm uses batch statistics"):
        network(x)
    set_backend(network.eval(), "eager")
    network(x)
    with pytest.raises(ValueError, match="backend: got 'fast'"):
        set_backend(network, "fast")
    with pytest.raises(ValueError, match="model: got Linear"):
        set_backend(torch.nn.Linear(1, 1), "eager")
    assert create_model("efficientformer_l1", backend="triton", device="meta").stages[0].blocks[0].backend == "triton"


# --- when a block is composed of modules --------------------------------------------------------------------------------


def block() -> Meta4D:
    from effformer import EfficientFormerConfig
    from effformer.testing import randomise

    config = EfficientFormerConfig(depths=(1, 1, 1, 1), widths=(8, 8, 8, 8), num_vit=0, proj_drop=0.5)
    return randomise(Meta4D(8, config, 0.5, 1e-5, "auto", dtype=torch.float64)).eval()


def test_the_fused_operation_and_the_modules_agree() -> None:
    meta4d, x = block(), draw(2, 8, 6, 5)
    assert meta4d.why_composed() is None
    fused = meta4d(x)
    seen: list[torch.Size] = []
    meta4d.mlp.fc1.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    assert "'mlp.fc1'" in meta4d.why_composed()
    assert torch.allclose(meta4d(x), fused, rtol=0, atol=1e-13)
    assert seen == [(2, 32, 6, 5)]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda b: b.train(), "batch statistics -> dropout is active"),
        (lambda b: b.mlp.norm2.train(), "batch statistics"),
        (lambda b: b.mlp.drop.train(), "dropout"),
        (lambda b: b.drop_path2.train(), "stochastic depth -> not torch.float64"),
        (lambda b: setattr(b, "mlp", torch.nn.Identity()), "'mlp'"),
        (lambda b: setattr(b, "token_mixer", torch.nn.Identity()), "'token_mixer'"),
        (lambda b: setattr(b.mlp, "act", torch.nn.Tanh()), "'mlp.act'"),
        (lambda b: setattr(b.mlp, "norm1", torch.nn.GroupNorm(1, 32).double()), "'mlp.norm1'"),
        (lambda b: setattr(b.mlp, "drop", torch.nn.Identity()), "'mlp.drop'"),
        (lambda b: setattr(b, "drop_path1", torch.nn.Dropout()), "'drop_path1'"),
        (lambda b: setattr(b.mlp.act, "approximate", "tanh"), "'mlp.act'"),
        (lambda b: setattr(b.token_mixer.pool, "kernel_size", 5), "'token_mixer.pool'"),
        (lambda b: setattr(b.token_mixer.pool, "count_include_pad", True), "'token_mixer.pool'"),
        (lambda b: setattr(b.mlp.fc1, "padding", (1, 1)), "'mlp.fc1'"),
        (lambda b: setattr(b.mlp.fc2, "stride", (2, 2)), "'mlp.fc2'"),
        (lambda b: setattr(b.mlp, "norm2", torch.nn.BatchNorm2d(8, affine=False).double().eval()), "'mlp.norm2'"),
        (lambda b: setattr(b.mlp, "forward", lambda x: x), "'mlp'"),
        (lambda b: setattr(b.mlp.fc1, "forward", lambda x: x), "'mlp.fc1'"),
        (lambda b: b.ls2.register_forward_pre_hook(lambda m, a: None), "'ls2'"),
        (lambda b: b.token_mixer.pool.register_full_backward_hook(lambda m, i, o: None), "'token_mixer.pool'"),
        (lambda b: torch.nn.utils.parametrizations.weight_norm(b.mlp.fc2), "'mlp.fc2'"),
        (
            lambda b: (setattr(b, "activation", "prelu"), setattr(b.mlp, "act", torch.nn.PReLU())),
            "'prelu' has parameters",
        ),
        (lambda b: setattr(b.mlp.norm1, "running_mean", None), "batch statistics"),
    ],
)
def test_reasons_for_composing(change: Callable[[Meta4D], Any], reason: str) -> None:
    """After the arrow the reason against "triton", which computes some modes in training."""
    meta4d, (reason, _, refusal) = block(), reason.partition(" -> ")
    change(meta4d)
    assert reason in meta4d.why_composed()
    meta4d.backend = "triton"
    with pytest.raises(ops.UnsupportedError, match=refusal or reason):
        meta4d(draw(1, 8, 4, 4))


def token_block() -> Meta3D:
    from effformer import EfficientFormerConfig
    from effformer.testing import randomise

    sizes = {"depths": (1, 1, 1, 1), "widths": (8, 8, 8, 8), "num_vit": 1, "num_heads": 2, "key_dim": 4}
    config = EfficientFormerConfig(**sizes, proj_drop=0.5, attn_drop=0.5)
    return randomise(Meta3D(8, config, 0.5, 1e-5, "auto", dtype=torch.float64)).eval()


def test_the_fused_operations_and_the_modules_of_a_token_block_agree() -> None:
    meta3d, x = token_block(), draw(2, 6, 8)
    assert meta3d.why_composed() is None
    fused = meta3d(x, 2, 3)
    seen: list[torch.Size] = []
    meta3d.token_mixer.qkv.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    assert "'token_mixer.qkv'" in meta3d.why_composed()
    assert torch.allclose(meta3d(x, 2, 3), fused, rtol=0, atol=1e-13)
    assert seen == [(2, 6, 2 * (4 + 4 + 16))]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda b: b.train(), "dropout"),
        (lambda b: b.token_mixer.attn_drop.train(), "dropout"),
        (lambda b: b.token_mixer.proj_drop.train(), "dropout"),
        (lambda b: b.mlp.drop1.train(), "dropout"),
        (lambda b: b.mlp.drop2.train(), "dropout"),
        (lambda b: b.drop_path1.train(), "stochastic depth -> not torch.float64"),
        (lambda b: setattr(b, "norm1", torch.nn.RMSNorm(8, dtype=torch.float64)), "'norm1'"),
        (lambda b: setattr(b, "norm2", torch.nn.LayerNorm(8, bias=False, dtype=torch.float64)), "'norm2'"),
        (lambda b: setattr(b, "norm1", torch.nn.LayerNorm((6, 8), dtype=torch.float64)), "'norm1'"),
        (lambda b: setattr(b, "token_mixer", torch.nn.Identity()), "'token_mixer'"),
        (lambda b: setattr(b.token_mixer, "proj", torch.nn.Linear(32, 8, bias=False).double()), "'token_mixer.proj'"),
        (lambda b: torch.nn.utils.parametrizations.weight_norm(b.token_mixer.qkv), "'token_mixer.qkv'"),
        (lambda b: b.token_mixer.attn_drop.register_forward_hook(lambda m, a, o: None), "'token_mixer.attn_drop'"),
        (lambda b: setattr(b.mlp, "act", torch.nn.ReLU()), "'mlp.act'"),
        (lambda b: setattr(b.mlp.fc2, "forward", lambda x: x), "'mlp.fc2'"),
        (lambda b: setattr(b, "ls2", torch.nn.Identity()), "'ls2'"),
        (lambda b: setattr(b, "drop_path2", torch.nn.Dropout()), "'drop_path2'"),
    ],
)
def test_reasons_for_composing_a_token_block(change: Callable[[Meta3D], Any], reason: str) -> None:
    meta3d, (reason, _, refusal) = token_block(), reason.partition(" -> ")
    change(meta3d)
    assert reason in meta3d.why_composed()
    meta3d.backend = "triton"
    with pytest.raises(ops.UnsupportedError, match=refusal or reason):
        meta3d(draw(1, 6, 8), 2, 3)


def test_a_changed_slope_is_seen() -> None:
    meta4d, x = block(), draw(1, 8, 4, 4)
    meta4d.activation, meta4d.mlp.act = "leaky_relu", torch.nn.LeakyReLU(0.3)
    changed = meta4d(x)
    meta4d.mlp.act.negative_slope = 0.01
    assert meta4d.why_composed() is None
    assert (meta4d(x) - changed).abs().max() > 1e-2


def test_hooks_for_all_modules_see_every_module() -> None:
    meta4d, seen = block(), []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append(type(module)))
    try:
        assert "hooks for all modules" in meta4d.why_composed()
        meta4d(draw(1, 8, 4, 4))
    finally:
        handle.remove()
    assert seen.count(torch.nn.Conv2d) == 2
    assert meta4d.why_composed() is None


def test_a_replaced_submodule_is_called() -> None:
    meta4d, x = block(), draw(1, 8, 4, 4)
    before = meta4d(x)
    meta4d.mlp.act = torch.nn.Tanh()
    assert (meta4d(x) - before).abs().max() > 1e-2


def test_frozen_statistics_while_fine_tuning_are_still_fused() -> None:
    meta4d = block()
    meta4d.mlp.drop.p = 0.0
    meta4d.drop_path1 = meta4d.drop_path2 = torch.nn.Identity()
    meta4d.train()
    meta4d.mlp.norm1.eval(), meta4d.mlp.norm2.eval()
    assert meta4d.why_composed() is None
    meta4d(draw(1, 8, 4, 4)).sum().backward()
    assert all(parameter.grad is not None for parameter in meta4d.parameters())


# --- the compiler -------------------------------------------------------------------------------------------------------


@pytest.fixture
def _no_compiled_code() -> None:
    torch._dynamo.reset()  # or sizes seen in another test would be traced as free ones, which takes longer


@pytest.mark.usefixtures("_no_compiled_code")
def test_compile_traces_the_whole_network() -> None:
    """No graph break, one graph for every batch; aot_eager, since Inductor takes minutes on a CPU."""
    from effformer.testing import randomise

    network = randomise(create_model("efficientformer_l1")).eval()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(network, backend=counter, fullgraph=True)
    with torch.no_grad():
        for batch in (2, 3, 5):
            x = torch.randn(batch, 3, 64, 64)
            torch._dynamo.mark_dynamic(x, 0)
            assert torch.allclose(compiled(x), network(x), rtol=0, atol=1e-5)
    assert counter.frame_count == 1


@pytest.mark.usefixtures("_no_compiled_code")
def test_compiles_where_a_default_device_is_set(narrow: Callable[..., EfficientFormer]) -> None:
    """PyTorch wraps all of its functions then, and its compiler sees through fewer of them."""
    network, x = narrow(depths=(1, 1, 1, 2)), torch.randn(1, 3, 64, 96, dtype=torch.float64)
    torch.set_default_device("cpu")
    try:
        with torch.no_grad():
            for call in (network, network.forward_intermediates):
                compiled, expected = torch.compile(call, backend="eager", fullgraph=True)(x), call(x)
                torch.testing.assert_close(compiled, expected, rtol=0, atol=1e-12)
    finally:
        torch.set_default_device(None)


@pytest.mark.usefixtures("_no_compiled_code")
def test_compiled_training_with_checkpointing_moves_statistics_once(narrow: Callable[..., EfficientFormer]) -> None:
    plain, recomputed = narrow().train(), narrow().train()
    recomputed.set_grad_checkpointing()
    x = draw(2, 3, 64, 64)
    plain(x).square().sum().backward()
    torch.compile(recomputed, backend="aot_eager", fullgraph=True)(x).square().sum().backward()
    for (name, one), other in zip(plain.named_parameters(), recomputed.parameters(), strict=True):
        assert (one.grad - other.grad).abs().max() < 1e-9, name
    for one, other in zip(plain.buffers(), recomputed.buffers(), strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-12)


@pytest.mark.usefixtures("_no_compiled_code")
def test_inductor_compiles_a_narrow_network(narrow: Callable[..., EfficientFormer]) -> None:
    network = narrow(dtype=torch.float32, depths=(1, 1, 1, 1))
    compiled = torch.compile(network, fullgraph=True)
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        assert torch.allclose(compiled(x), network(x), rtol=0, atol=1e-5)
