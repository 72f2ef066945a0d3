"""Gradients of a 4D MetaBlock in training, from its input x and its inner result o (`meta4d_train.py`).

BatchNorm's own gradients need two sums over all rows for each norm. With t = W1 · y, G = keep2 * grad and dh the
gradient at the activation's input:

    of o    A * G + B * o + K     from Σ G and Σ G * (o - mean2)
    of t    scale1 * dh - k0 - k1 * t     from Σ dh and Σ dh * t

The terms k0 and k1 are known after dh, which is never in memory as a whole. So they come as products of C x C
matrices afterwards: into the gradient of y as y · (W1ᵀ diag(k1) W1), into that of W1 by the covariance of y. With given
statistics B, K, k0 and k1 are 0. Of a group of processes, the sums are over all rows; the gradients of parameters are
those of this process's own rows, which wrappers add up.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .combine import combine, gradient_sums
from .layout import dense_map, new_map
from .meta4d_train import folded, pooled
from .mlp_backward import BackwardMlp, Wanted, mlp_sums
from .pool_mixer_backward import pool_mixer_gradients
from .processes import summed
from .register import register_gradients
from .vendor import flat_map, size_of


def _implementation(
    grad: Tensor,
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
    o: Tensor,
    mean1: Tensor,
    var1: Tensor,
    mean2: Tensor,
    var2: Tensor,
    mean: Tensor,
    covariance: Tensor,
    values: Tensor,
    eps1: float,
    eps2: float,
    activation: str,
    group: str,
    needed: Sequence[bool],
) -> list[Tensor | None]:
    found: list[Tensor | None] = [None] * 11
    dtype, batched, count = weight1.dtype, mean.numel() > 0, values.float()
    own = x.numel() // max(x.shape[1], 1)  # of `count` rows those of this process
    grad, source = dense_map(grad), dense_map(x)
    weight1, weight2, layer_scale1 = weight1.contiguous(), weight2.contiguous(), layer_scale1.contiguous()
    scale1, shift1, inverse1 = folded(mean1, var1, norm_weight1, norm_bias1, eps1)
    inverse2 = torch.rsqrt(var2 + eps2)
    of_o = layer_scale2 * norm_weight2 * inverse2
    total2 = along2 = torch.zeros_like(of_o)
    if batched or any(needed[7:]):
        total2, along2 = gradient_sums(grad, o, keep2, mean2)  # Σ G, Σ G * (o - mean2)
        along2 = along2 * inverse2
        found[7] = (torch.zeros_like(total2) if batched else of_o * total2) if bias2 is not None else None
        found[8] = layer_scale2 * along2
        found[9] = layer_scale2 * total2
        found[10] = norm_weight2 * along2 + norm_bias2 * total2
    if any(needed[:7]):
        size = size_of(of_o)
        nothing = torch.zeros_like(of_o)
        terms = [of_o, nothing, nothing, nothing]
        if batched:
            total, along = summed(total2, along2, group)
            shared = of_o / count
            terms[2] = -shared * inverse2 * along
            terms[3] = -shared * total - terms[2] * mean2
        above = combine(grad, o, keep2, torch.stack(terms) / size, dtype)

        y = pooled(source, layer_scale1, keep1)
        given = y.to(dtype)
        mlp = BackwardMlp(weight1, scale1.contiguous(), shift1.contiguous(), weight2, activation, centre=mean1)
        back = needed[0] or needed[1]
        wanted = Wanted(back, needed[2], True, True, needed[6])
        centred = batched and dtype == torch.float32
        right = flat_map(given) - mean if centred else None  # else a large mean would cancel in the sum
        sums = mlp_sums(given, above, flat_map(above), mlp, wanted, right)
        assert sums.scale1 is not None
        assert sums.shift1 is not None
        total1 = sums.shift1 * size
        along1 = sums.scale1 * size * inverse1  # Σ dh * normalised t
        found[3] = (torch.zeros_like(total1) if batched else scale1 * total1) if bias1 is not None else None
        found[4], found[5] = along1, total1
        found[6] = None if sums.weight2 is None else sums.weight2 * size
        total, along = summed(total1, along1, group) if batched else (total1, along1)
        k1 = scale1 * inverse1 * along / count
        k0 = scale1 * total / count - k1 * mean1
        if sums.weight1 is not None:
            of_weight = sums.weight1 * (size * scale1)[:, None]
            if batched:
                wide, middle = weight1.double(), mean.double()
                along_mean = own * (k0 + k1 * (wide @ middle)) - (scale1 * total1 if centred else 0.0)
                of_weight -= torch.outer(along_mean, middle) + (own * k1)[:, None] * (wide @ covariance.double())
            found[2] = of_weight
        if sums.x is not None:
            rows = flat_map(grad)
            dy = torch.addcmul(rows, sums.x, size, out=rows.new_empty(rows.shape))
            if batched:
                wide = weight1.float()
                square, line = wide.T @ (k1[:, None] * wide), k0 @ wide
                dy.sub_((flat_map(given) @ square.to(dtype)).to(dy.dtype)).sub_(line.to(dy.dtype))
            batch, channels, height, width = x.shape
            dy = dy.view(batch, height, width, channels).permute(0, 3, 1, 2)
            found[:2] = pool_mixer_gradients(dy, x, layer_scale1, needed[:2], keep1)
    return [one if wanted else None for one, wanted in zip(found, needed, strict=True)]


meta4d_train_backward = register_gradients(
    "meta4d_train_backward(Tensor grad, Tensor x, Tensor layer_scale1, Tensor weight1, Tensor? bias1, "
    "Tensor norm_weight1, Tensor norm_bias1, Tensor weight2, Tensor? bias2, Tensor norm_weight2, Tensor norm_bias2, "
    "Tensor layer_scale2, Tensor? keep1, Tensor? keep2, Tensor o, Tensor mean1, Tensor var1, Tensor mean2, "
    "Tensor var2, Tensor mean, Tensor covariance, Tensor values, float eps1, float eps2, str activation, str group, "
    "bool[] needed) -> Tensor[]",
    _implementation,
    new_map,
)
