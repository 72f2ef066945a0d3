"""The fused operations in plain PyTorch: the specification that every kernel is tested against.

Any floating dtype, any device, gradients by autograd. In low precision each step is rounded to the input's dtype, as
separate eager modules would round it. In float64, these functions are the reference of the accuracy rule. They do not
check arguments: `effformer.ops` does.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# Activations without parameters, by NetsPresso's names. gelu is the exact (erf) form.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
    "hard_swish": F.hardswish,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
}


def pool_mixer(x: Tensor, layer_scale: Tensor) -> Tensor:
    """Pooling token mixer with its residual, paper section 4 (MB4D): x + layer_scale * (avg_pool3x3(x) - x).

    Padding does not count into the average. x [B, C, H, W], layer_scale [C].
    """
    pooled = F.avg_pool2d(x, kernel_size=3, stride=1, padding=1, count_include_pad=False)
    return x + (layer_scale[:, None, None] * (pooled - x)).to(x.dtype)


# Pixels from 0 to 255 minus this are exact in float16 and bfloat16, and near 0 on average.
PIXEL_OFFSET = 120


def conv_norm(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    activation: str | None = None,
    border: Tensor | None = None,
) -> Tensor:
    """3x3 convolution of stride 2 and padding 1, BatchNorm, activation: act(scale * conv(x) + shift).

    x [B, C, H, W], weight [O, C, 3, 3], scale and shift [O]. uint8 x counts as x - PIXEL_OFFSET, in the weight's dtype,
    and its padding as border [C].
    """
    dtype = x.dtype if border is None else weight.dtype
    if border is None:
        y = F.conv2d(x, weight, stride=2, padding=1)
    else:
        batch, channels, height, width = x.shape
        padded = border.to(weight.dtype)[:, None, None].expand(batch, channels, height + 2, width + 2).contiguous()
        padded[:, :, 1:-1, 1:-1] = x.to(weight.dtype) - PIXEL_OFFSET
        y = F.conv2d(padded, weight, stride=2)
    y = _affine(y, scale, shift)
    return (y if activation is None else ACTIVATIONS[activation](y)).to(dtype)


def conv_mlp(
    x: Tensor,
    weight1: Tensor,
    scale1: Tensor,
    shift1: Tensor,
    weight2: Tensor,
    scale2: Tensor,
    shift2: Tensor,
    *,
    activation: str = "gelu",
) -> Tensor:
    """1x1 convolutional MLP with its residual, paper section 4 (MB4D).

    x + scale2 * (weight2 @ act(scale1 * (weight1 @ x) + shift1)) + shift2, for each pixel;
    x [B, C, H, W], weight1 [hidden, C], weight2 [C, hidden], scale1 and shift1 [hidden], scale2 and shift2 [C].
    """
    hidden = _affine(F.conv2d(x, weight1[:, :, None, None]), scale1, shift1)
    hidden = ACTIVATIONS[activation](hidden)
    y = _affine(F.conv2d(hidden, weight2[:, :, None, None]), scale2, shift2)
    return x + y.to(x.dtype)


def bias_attention(
    qkv: Tensor,
    bias: Tensor,
    *,
    num_heads: int,
    key_dim: int,
    dropout: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Multi-head attention with a learned bias, paper section 4 (MB3D): softmax(q @ k.T * key_dim**-0.5 + bias) @ v.

    qkv [B, N, num_heads * (2 * key_dim + value_dim)], the channels of each head being q | k | v;
    bias [num_heads, N, N]; returns [B, N, num_heads * value_dim]. `dropout` acts on the probabilities.
    """
    q, k, v = split_heads(qkv, num_heads=num_heads, key_dim=key_dim)
    scores = (q @ k.transpose(-2, -1)) * key_dim**-0.5
    weights = (scores + bias).to(scores.dtype).softmax(dim=-1)
    if dropout is not None:
        weights = dropout(weights)
    return (weights @ v).transpose(1, 2).flatten(2).to(qkv.dtype)


def meta4d(
    x: Tensor,
    layer_scale1: Tensor,
    weight1: Tensor,
    scale1: Tensor,
    shift1: Tensor,
    weight2: Tensor,
    scale2: Tensor,
    shift2: Tensor,
    *,
    activation: str = "gelu",
) -> Tensor:
    """A whole 4D MetaBlock in eval mode: `conv_mlp(pool_mixer(x, layer_scale1), ...)`."""
    y = pool_mixer(x, layer_scale1)
    return conv_mlp(y, weight1, scale1, shift1, weight2, scale2, shift2, activation=activation)


def meta4d_train(
    x: Tensor,
    layer_scale1: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    norm_weight1: Tensor,
    norm_bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor | None,
    norm_weight2: Tensor,
    norm_bias2: Tensor,
    layer_scale2: Tensor,
    keep1: Tensor | None = None,
    keep2: Tensor | None = None,
    mean1: Tensor | None = None,
    var1: Tensor | None = None,
    mean2: Tensor | None = None,
    var2: Tensor | None = None,
    *,
    eps1: float,
    eps2: float,
    activation: str = "gelu",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A whole 4D MetaBlock in training: BatchNorm with the batch's statistics or those given, and stochastic depth.

    x [B, C, H, W]; weight1 [hidden, C], weight2 [C, hidden]; layer scales, norm_weight2, norm_bias2, mean2, var2, bias2
    [C], the others [hidden]; keep1, keep2 [B]. Returns the result, and mean1, var1, mean2, var2 of the batch.
    """
    pooled = F.avg_pool2d(x, kernel_size=3, stride=1, padding=1, count_include_pad=False)
    y = x + _kept(layer_scale1[:, None, None] * (pooled - x), keep1).to(x.dtype)
    hidden = F.conv2d(y, weight1[:, :, None, None], None if bias1 is None else bias1.to(weight1.dtype))
    hidden, *first = _batch_norm(hidden, norm_weight1, norm_bias1, eps1, mean1, var1)
    branch = F.conv2d(
        ACTIVATIONS[activation](hidden), weight2[:, :, None, None], None if bias2 is None else bias2.to(weight2.dtype)
    )
    branch, *second = _batch_norm(branch, norm_weight2, norm_bias2, eps2, mean2, var2)
    return y + _kept(layer_scale2[:, None, None] * branch, keep2).to(x.dtype), first[0], first[1], second[0], second[1]


def _kept(branch: Tensor, keep: Tensor | None) -> Tensor:
    return branch if keep is None else branch * keep[:, None, None, None]


def _batch_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, mean: Tensor | None, var: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """BatchNorm of x [B, C, H, W], and its mean and variance (divided by the number of values)."""
    if mean is not None and var is not None:
        return F.batch_norm(x, mean, var, weight, bias, eps=eps), mean, var
    of_batch, about = torch.var_mean(upcast(x.detach()), (0, 2, 3), correction=0)
    return F.batch_norm(x, None, None, weight, bias, training=True, eps=eps), about, of_batch


def attention_mixer(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    bias: Tensor,
    proj_weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    num_heads: int,
    key_dim: int,
    eps: float,
) -> Tensor:
    """First half of a 3D MetaBlock, paper section 4: x + scale * (proj · attention(qkv · LayerNorm(x))) + shift.

    x [B, N, C], qkv_weight [num_heads * (2 * key_dim + value_dim), C], proj_weight [C, num_heads * value_dim].
    """
    qkv = F.linear(_layer_norm(x, norm_weight, norm_bias, eps), qkv_weight, qkv_bias.to(qkv_weight.dtype))
    values = bias_attention(qkv, bias, num_heads=num_heads, key_dim=key_dim)
    return x + torch.addcmul(shift, F.linear(values, proj_weight), scale).to(x.dtype)


def linear_mlp(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight1: Tensor,
    shift1: Tensor,
    weight2: Tensor,
    scale2: Tensor,
    shift2: Tensor,
    *,
    activation: str = "gelu",
    eps: float,
) -> Tensor:
    """Second half of a 3D MetaBlock, paper section 4: x + scale2 * (W2 · act(W1 · LayerNorm(x) + shift1)) + shift2.

    x [B, N, C], weight1 [hidden, C], weight2 [C, hidden], shift1 [hidden], the other vectors [C].
    """
    hidden = F.linear(_layer_norm(x, norm_weight, norm_bias, eps), weight1, shift1.to(weight1.dtype))
    hidden = ACTIVATIONS[activation](hidden)
    return x + torch.addcmul(shift2, F.linear(hidden, weight2), scale2).to(x.dtype)


def head(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float,
) -> Tensor:
    """The network's end: the mean of LayerNorm(x) over the tokens, and a linear layer on it where there is one.

    x [B, N, C], weight [classes, C], bias [classes]; returns [B, classes], or [B, C] without a weight.
    """
    pooled = _layer_norm(x, norm_weight, norm_bias, eps).mean(1)
    if weight is None or bias is None:
        return pooled
    return F.linear(pooled, weight, bias.to(weight.dtype)).to(x.dtype)


def split_heads(qkv: Tensor, *, num_heads: int, key_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k [B, num_heads, N, key_dim] and v [B, num_heads, N, value_dim] from qkv as in `bias_attention`."""
    batch, tokens, channels = qkv.shape
    # Compilers cannot see through Tensor.unflatten where a default device is set.
    heads = qkv.reshape(batch, tokens, num_heads, channels // num_heads).transpose(1, 2)
    value_dim = heads.shape[-1] - 2 * key_dim
    q, k, v = heads.split([key_dim, key_dim, value_dim], dim=-1)
    return q, k, v


def bias_index(height: int, width: int, device: torch.device | None = None) -> Tensor:
    """Entry of the bias table for each pair of tokens of a [height, width] map: |dy| * width + |dx|, int64 [N, N]."""
    y = torch.arange(height, device=device)
    x = torch.arange(width, device=device)
    dy = (y[:, None] - y[None, :]).abs()
    dx = (x[:, None] - x[None, :]).abs()
    return (dy[:, None, :, None] * width + dx[None, :, None, :]).flatten(0, 1).flatten(1)


def why_other_index(index: Tensor, resolution: int) -> str | None:
    """The reason why `index` is not `bias_index` of a square map of that side; None if it is, or on the meta device."""
    standard = bias_index(resolution, resolution, torch.device("cpu"))
    if index.shape == standard.shape and (index.is_meta or torch.equal(index.cpu().long(), standard)):
        return None
    return f"not the standard index |dy| * {resolution} + |dx|, the only one allowed"


def expand_bias(table: Tensor, height: int, width: int, *, resolution: int, resize: str) -> Tensor:
    """The attention bias [heads, N, N] of a [height, width] map, N = height * width, from its table [heads, T * T].

    "table" resamples the table in offset space, so that the bias between two tokens keeps its meaning at every size;
    "matrix-bilinear" (NetsPresso) and "matrix-bicubic" (the original dense variant) expand the table at [T, T] and
    resize the [T * T, T * T] matrix as if it were an image. All three are the plain lookup at [T, T].
    """
    if resize == "table":
        grid = table.reshape(table.shape[0], resolution, resolution)[None]
        grid = F.interpolate(grid, [height, width], mode="bilinear", align_corners=True)
        return grid[0].flatten(1)[:, bias_index(height, width, table.device)]
    matrix = table[:, bias_index(resolution, resolution, table.device)]
    tokens = height * width
    if resize == "matrix-bicubic" and matrix.requires_grad:
        return _resized_bicubic(matrix, tokens)
    mode = "bicubic" if resize == "matrix-bicubic" else "bilinear"
    return F.interpolate(matrix[None], [tokens, tokens], mode=mode, align_corners=False)[0]


def _resized_bicubic(matrix: Tensor, tokens: int) -> Tensor:
    """matrix [heads, M, M] at [heads, tokens, tokens], as `F.interpolate` resizes an image.

    R · matrix · Rᵀ with the fixed R that resizes one dimension: the gradient of `F.interpolate` adds in any order on a
    GPU. In float64, which neither autocast nor TF32 rounds.
    """
    size = matrix.shape[1]
    one = torch.eye(size, dtype=torch.float64, device=matrix.device)[None, None]
    resizing = F.interpolate(one, [tokens, size], mode="bicubic", align_corners=False)[0, 0]
    return (resizing @ matrix.double() @ resizing.T).to(matrix.dtype)


def fold_batch_norm(
    conv_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    layer_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(scale, shift) so that layer_scale * BatchNorm(y + conv_bias) == scale * y + shift; all [C].

    float32, or float64 where the statistics are.
    """
    weight, bias, running_mean, running_var = map(upcast, (weight, bias, running_mean, running_var))
    scale = weight * torch.rsqrt(running_var + eps)
    shift = bias - running_mean * scale
    if conv_bias is not None:
        shift = shift + upcast(conv_bias) * scale
    if layer_scale is not None:
        gamma = upcast(layer_scale)
        scale, shift = scale * gamma, shift * gamma
    return scale, shift


def fold_layer_scale(bias: Tensor, layer_scale: Tensor) -> tuple[Tensor, Tensor]:
    """(scale, shift) so that layer_scale * (y + bias) == scale * y + shift; all [C], float32 (float64 if they are)."""
    scale = upcast(layer_scale)
    return scale, scale * upcast(bias)


def upcast(x: Tensor) -> Tensor:
    """float32 of a 16-bit tensor; float32 and float64 as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(upcast(x), weight.shape, weight, bias, eps).to(x.dtype)


def _affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return torch.addcmul(shift[:, None, None], x, scale[:, None, None]).to(x.dtype)
