"""A 4D MetaBlock in training: BatchNorm with the batch's statistics or given ones, and stochastic depth.

    y = x + keep1 * layer_scale1 * (avg_pool3x3(x) - x)
    o = W2 · act(BatchNorm1(W1 · y))
    result = y + keep2 * layer_scale2 * BatchNorm2(o)

In 16 bits the statistics of W1 · y follow from the covariance of y's channels: the hidden map is never needed whole. In
float32 they come from W1 · y itself, since the covariance would cancel. With a `group` the batch is that of all its
processes (SyncBatchNorm). For the backward (`meta4d_train_backward.py`) x and o are kept, no other map.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .activation import form, gain
from .combine import combine, pool_keep
from .launch import run
from .layout import Rows, dense_map, new_map, token_rows
from .linear import linear_launch
from .mlp_backward import hidden_parts
from .pool_mixer import pool_mixer_launch
from .processes import merged_statistics
from .register import register, takes_arguments_of
from .statistics import channel_statistics, covariance, merged
from .vendor import flat_map


def pooled(x: Tensor, layer_scale: Tensor, keep: Tensor | None) -> Tensor:
    """y of x [B, C, H, W], whose channels lie next to each other; channels_last."""
    if keep is not None:
        return pool_keep(x, layer_scale, keep)
    out = torch.empty_like(x, memory_format=torch.channels_last)
    if x.numel():
        run(pool_mixer_launch(x, layer_scale, out))
    return out


def _rows(x: Tensor) -> Rows:
    return token_rows(x[None])


def _hidden_statistics(rows: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of weight · rows, float64 [hidden], from the product itself."""
    count, hidden = len(rows), len(weight)
    shift = weight.new_zeros(hidden, dtype=torch.float32)
    counts, means, squares = [], [], []
    for part in hidden_parts(count, hidden):
        product = rows.new_empty(len(part), hidden)
        run(linear_launch(_rows(rows[part.start : part.stop]), weight, None, shift, _rows(product), convolution=True))
        mean, variance = channel_statistics(product)
        counts.append(len(part))
        means.append(mean)
        squares.append(variance * len(part))
    return merged(means[0].new_tensor(counts), torch.stack(means), torch.stack(squares))


def _branch(rows: Tensor, weight1: Tensor, scale1: Tensor, shift1: Tensor, weight2: Tensor, activation: str) -> Tensor:
    """o of y's rows [rows, C]."""
    hidden, channels = weight1.shape
    out = torch.empty_like(rows)
    one, zero = weight1.new_ones(channels, dtype=torch.float32), weight1.new_zeros(channels, dtype=torch.float32)
    for part in hidden_parts(len(rows), hidden):
        given, target = (_rows(one[part.start : part.stop]) for one in (rows, out))
        act = rows.new_empty(len(part), hidden)
        x_gain = gain(form(activation, weight1.dtype))
        run(
            linear_launch(given, weight1, scale1, shift1, _rows(act), activation=activation, convolution=True),
            linear_launch(_rows(act), weight2, one, zero, target, x_gain=x_gain, convolution=True),
        )
    return out


def folded(mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(scale, shift, 1 / deviation) so that BatchNorm(z) = scale * z + shift; float32."""
    inverse = torch.rsqrt(var + eps)
    scale = weight * inverse
    return scale, bias - mean * scale, inverse


def _implementation(
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
    keep1: Tensor | None,
    keep2: Tensor | None,
    mean1: Tensor | None,
    var1: Tensor | None,
    mean2: Tensor | None,
    var2: Tensor | None,
    eps1: float,
    eps2: float,
    activation: str,
    group: str,
) -> list[Tensor]:
    dtype, source = weight1.dtype, dense_map(x)
    weight1, weight2 = weight1.contiguous(), weight2.contiguous()
    y = pooled(source, layer_scale1.contiguous(), keep1)
    rows = flat_map(y).to(dtype)
    mean, covariances = (rows.new_empty(0, dtype=torch.float32) for _ in range(2))
    count: Tensor | int = len(rows)
    if mean1 is None or var1 is None:
        mean, covariances = covariance(rows)
        if dtype == torch.float32:
            mean1, var1 = _hidden_statistics(rows, weight1)
        else:
            wide = weight1.double()
            mean1, var1 = wide @ mean, ((wide @ covariances) * wide).sum(1)
        _, mean1, var1 = merged_statistics(len(rows), mean1, var1, group)
        mean1, var1, mean, covariances = (one.float() for one in (mean1, var1, mean, covariances))
    else:
        mean1 = mean1.clone() if bias1 is None else mean1 - bias1
        var1 = var1.clone()
    scale1, shift1, _ = folded(mean1, var1, norm_weight1, norm_bias1, eps1)
    branch = _branch(rows, weight1, scale1, shift1, weight2, activation)
    if mean2 is None or var2 is None:
        count, mean2, var2 = merged_statistics(len(rows), *channel_statistics(branch), group)
        mean2, var2 = mean2.float(), var2.float()
    else:
        mean2 = mean2.clone() if bias2 is None else mean2 - bias2
        var2 = var2.clone()
    scale2, shift2, _ = folded(mean2, var2, norm_weight2, norm_bias2, eps2)
    nothing = torch.zeros_like(scale2)
    terms = torch.stack([layer_scale2 * scale2, layer_scale2 * shift2, nothing + 1, nothing])
    batch, channels, height, width = x.shape
    o = branch.view(batch, height, width, channels).permute(0, 3, 1, 2)
    out = combine(o, y, keep2, terms, x.dtype)
    if new_map(x).stride() != out.stride():
        out = new_map(x).copy_(out)
    values = count.view(1) if isinstance(count, Tensor) else x.new_full((1,), count, dtype=torch.float64)
    return [out, o, mean1, var1, mean2, var2, mean, covariances, values]


@takes_arguments_of(_implementation)
def _fake(x: Tensor, layer_scale1: Tensor, weight1: Tensor, *others: Any) -> list[Tensor]:
    mean1 = others[10]
    (hidden, channels), (batch, _, height, width) = weight1.shape, x.shape
    side = channels if mean1 is None else 0
    o = x.new_empty(batch, height, width, channels, dtype=weight1.dtype).permute(0, 3, 1, 2)
    vectors = (x.new_empty(size, dtype=torch.float32) for size in (hidden, hidden, channels, channels, side))
    square = x.new_empty((side, side) if side else (0,), dtype=torch.float32)
    return [new_map(x), o, *vectors, square, x.new_empty(1, dtype=torch.float64)]


meta4d_train = register(
    "meta4d_train(Tensor x, Tensor layer_scale1, Tensor weight1, Tensor? bias1, Tensor norm_weight1, "
    "Tensor norm_bias1, Tensor weight2, Tensor? bias2, Tensor norm_weight2, Tensor norm_bias2, Tensor layer_scale2, "
    "Tensor? keep1, Tensor? keep2, Tensor? mean1, Tensor? var1, Tensor? mean2, Tensor? var2, float eps1, float eps2, "
    "str activation, str group) -> Tensor[]",
    _implementation,  # type: ignore[arg-type]
    _fake,  # type: ignore[arg-type]
)
