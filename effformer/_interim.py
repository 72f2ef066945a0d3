"""Eager stand-ins of operations that are about to land in `ops`."""

import torch
import torch.nn.functional as F

from . import ops, reference

PIXEL_OFFSET = 120


def conv_norm(x, weight, scale, shift, *, activation=None, border=None, backend="auto"):
    x = x.to(weight.dtype) - PIXEL_OFFSET if x.dtype == torch.uint8 else x
    if border is not None:
        padded = (
            border.to(weight.dtype)[None, :, None, None].expand(x.shape[0], -1, x.shape[2] + 2, x.shape[3] + 2).clone()
        )
        padded[:, :, 1:-1, 1:-1] = x
        y = F.conv2d(padded, weight, stride=2)
    else:
        y = F.conv2d(x, weight, stride=2, padding=1)
    y = torch.addcmul(shift[:, None, None], y, scale[:, None, None]).to(weight.dtype)
    return y if activation is None else reference.ACTIVATIONS[activation](y)


def head(x, norm_weight, norm_bias, weight=None, bias=None, *, eps=1e-5, backend="auto"):
    x = F.layer_norm(reference.upcast(x), x.shape[-1:], norm_weight, norm_bias, eps).mean(1).to(x.dtype)
    return x if weight is None else F.linear(x, weight, bias.to(x.dtype))


def meta4d(x, *tensors, deterministic=True, **options):
    return ops.meta4d(x, *tensors, **options)


def linear_mlp(x, *tensors, deterministic=True, **options):
    return ops.linear_mlp(x, *tensors, **options)
