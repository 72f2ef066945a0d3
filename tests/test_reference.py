"""The specification against arithmetic written out by hand, in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from effformer import ops, reference


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype)


def mlp_arguments(channels: int, hidden: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """weight1, scale1, shift1, weight2, scale2, shift2 as `ops.conv_mlp` takes them."""
    vectors = torch.float64 if dtype == torch.float64 else torch.float32
    return (
        draw(hidden, channels).mul(channels**-0.5).to(dtype),
        (torch.rand(hidden, dtype=torch.float64) + 0.5).to(vectors),
        draw(hidden).to(vectors),
        draw(channels, hidden).mul(hidden**-0.5).to(dtype),
        (torch.rand(channels, dtype=torch.float64) + 0.5).to(vectors),
        draw(channels).to(vectors),
    )


def pool_by_hand(x: Tensor, layer_scale: Tensor) -> Tensor:
    out = torch.empty_like(x)
    height, width = x.shape[2:]
    for y, z in itertools.product(range(height), range(width)):
        rows = slice(max(y - 1, 0), y + 2)
        columns = slice(max(z - 1, 0), z + 2)
        mean = x[:, :, rows, columns].mean(dim=(2, 3))  # of the pixels that are there
        out[:, :, y, z] = x[:, :, y, z] + layer_scale * (mean - x[:, :, y, z])
    return out


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (2, 2), (3, 4), (7, 6)])
def test_pool_mixer(size: tuple[int, int]) -> None:
    x, layer_scale = draw(2, 3, *size), draw(3)
    assert torch.allclose(ops.pool_mixer(x, layer_scale), pool_by_hand(x, layer_scale), rtol=0, atol=1e-14)


def test_conv_mlp() -> None:
    x = draw(2, 3, 4, 5)
    w1, s1, b1, w2, s2, b2 = arguments = mlp_arguments(3, 7)
    for b, y, z in itertools.product(range(2), range(4), range(5)):
        hidden = s1 * (w1 @ x[b, :, y, z]) + b1
        hidden = 0.5 * hidden * (1 + torch.erf(hidden / 2**0.5))
        want = x[b, :, y, z] + s2 * (w2 @ hidden) + b2
        assert torch.allclose(ops.conv_mlp(x, *arguments)[b, :, y, z], want, rtol=0, atol=1e-13)


def test_meta4d_is_the_two_in_a_row() -> None:
    x, layer_scale, arguments = draw(2, 3, 6, 5), draw(3), mlp_arguments(3, 7)
    want = ops.conv_mlp(pool_by_hand(x, layer_scale), *arguments, activation="silu")
    assert torch.allclose(ops.meta4d(x, layer_scale, *arguments, activation="silu"), want, rtol=0, atol=1e-13)


def test_bias_attention() -> None:
    heads, key_dim, value_dim, tokens = 3, 2, 5, 6
    qkv, bias = draw(2, tokens, heads * (2 * key_dim + value_dim)), draw(heads, tokens, tokens)
    got = ops.bias_attention(qkv, bias, num_heads=heads, key_dim=key_dim)
    assert got.shape == (2, tokens, heads * value_dim)
    per_head = 2 * key_dim + value_dim
    for b, h, n in itertools.product(range(2), range(heads), range(tokens)):
        head = qkv[b, :, h * per_head : (h + 1) * per_head]
        q, k, v = head[:, :key_dim], head[:, key_dim : 2 * key_dim], head[:, 2 * key_dim :]
        weights = torch.exp(k @ q[n] / key_dim**0.5 + bias[h, n])  # row n: what token n looks at
        want = (weights / weights.sum()) @ v
        assert torch.allclose(got[b, n, h * value_dim : (h + 1) * value_dim], want, rtol=0, atol=1e-13)


def test_head() -> None:
    x, scale, shift, weight, bias = draw(2, 6, 5), draw(5), draw(5), draw(3, 5), draw(3)
    centred = x - x.sum(2, keepdim=True) / 5
    normed = centred / ((centred**2).sum(2, keepdim=True) / 5 + 1e-3).sqrt() * scale + shift
    pooled = (normed[:, 0] + normed[:, 1] + normed[:, 2] + normed[:, 3] + normed[:, 4] + normed[:, 5]) / 6
    assert torch.allclose(reference.head(x, scale, shift, eps=1e-3), pooled, rtol=0, atol=1e-12)
    logits = (pooled[:, None, :] * weight).sum(2) + bias
    assert torch.allclose(reference.head(x, scale, shift, weight, bias, eps=1e-3), logits, rtol=0, atol=1e-12)


def test_fold_batch_norm() -> None:
    conv, norm = torch.nn.Conv2d(3, 5, 1).double(), torch.nn.BatchNorm2d(5, eps=0.3).double().eval()
    for tensor in (norm.weight, norm.bias, norm.running_mean):
        torch.nn.init.normal_(tensor)
    torch.nn.init.uniform_(norm.running_var, 0.1, 2)
    gamma, x = draw(5), draw(2, 3, 4, 4)
    arguments = (norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps)
    for scaled in (None, gamma):
        scale, shift = ops.fold_batch_norm(conv.bias, *arguments, scaled)
        bare = torch.nn.functional.conv2d(x, conv.weight)
        want = norm(conv(x)) * (1 if scaled is None else scaled[:, None, None])
        assert torch.allclose(bare * scale[:, None, None] + shift[:, None, None], want, rtol=0, atol=1e-13)
    scale, shift = ops.fold_batch_norm(None, *arguments)
    assert torch.allclose(bare * scale[:, None, None] + shift[:, None, None], norm(bare), rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_folding_happens_in_float32(dtype: torch.dtype) -> None:
    norm = torch.nn.BatchNorm2d(5, dtype=dtype)
    scale, shift = ops.fold_batch_norm(None, norm.weight, norm.bias, norm.running_mean, norm.running_var, 1e-5)
    assert scale.dtype == shift.dtype == torch.float32
    assert scale[0] != 1  # 1 / sqrt(1 + 1e-5) would round to 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "slice"])
def test_low_precision_stays_close_and_keeps_the_dtype(dtype: torch.dtype, layout: str) -> None:
    wide = draw(2, 32, 9, 7).to(dtype)
    x = {
        "contiguous": wide[:, :16].contiguous(),
        "channels_last": wide[:, :16].contiguous(memory_format=torch.channels_last),
        "slice": wide[:, ::2],
    }[layout]
    layer_scale, arguments = torch.rand(16), mlp_arguments(16, 64, dtype)
    got = ops.meta4d(x, layer_scale, *arguments)
    want = reference.meta4d(x.double(), layer_scale.double(), *(a.double() for a in arguments))
    assert got.dtype == dtype
    assert (got.double() - want).abs().max() <= 16 * torch.finfo(dtype).eps * want.abs().max()

    qkv, bias = draw(2, 12, 2 * 40).to(dtype), torch.randn(2, 12, 12)
    got = ops.bias_attention(qkv, bias, num_heads=2, key_dim=8)
    want = reference.bias_attention(qkv.double(), bias.double(), num_heads=2, key_dim=8)
    assert got.dtype == dtype
    assert (got.double() - want).abs().max() <= 16 * torch.finfo(dtype).eps * want.abs().max()


def test_gradients() -> None:
    x, layer_scale, arguments = draw(1, 3, 4, 3), draw(3), mlp_arguments(3, 5)
    inputs = [tensor.requires_grad_() for tensor in (x, layer_scale, *arguments)]
    assert torch.autograd.gradcheck(lambda *a: ops.meta4d(*a), inputs)
    qkv, bias = draw(1, 4, 2 * 7).requires_grad_(), draw(2, 4, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda q, b: ops.bias_attention(q, b, num_heads=2, key_dim=2), (qkv, bias))


def test_no_input_is_changed() -> None:
    x, layer_scale, arguments = draw(1, 3, 4, 3), draw(3), mlp_arguments(3, 5)
    qkv, bias = draw(1, 4, 2 * 7), draw(2, 4, 4)
    tensors = (x, layer_scale, *arguments, qkv, bias)
    before = [tensor.clone() for tensor in tensors]
    for activation in ops.ACTIVATIONS:
        out = ops.meta4d(x, layer_scale, *arguments, activation=activation)
        out.zero_()  # nor may the output be a view of an input
    ops.pool_mixer(x, layer_scale).zero_()
    ops.bias_attention(qkv, bias, num_heads=2, key_dim=2).zero_()
    assert all(torch.equal(one, other) for one, other in zip(before, tensors, strict=True))


def test_empty_batches() -> None:
    assert ops.meta4d(draw(0, 3, 4, 3), draw(3), *mlp_arguments(3, 5)).shape == (0, 3, 4, 3)
    assert ops.bias_attention(draw(0, 4, 14), draw(2, 4, 4), num_heads=2, key_dim=2).shape == (0, 4, 6)
