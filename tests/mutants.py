"""Planted faults: each must turn the kernels' tests red. `make mutants` writes what happened to tests/mutants.txt.

A mutant replaces one piece of text in a copy of the package; the kernels' tests run on it, up to the first failure.
With words as arguments only the mutants run that have one of them in their name, with --new those that never ran; the
others' lines stay as they are.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from gradient_mutants import GRADIENT_JUDGES, GRADIENT_MUTANTS, Mutant
from plain import lay_out

ROOT = Path(__file__).parent.parent
RECORD = ROOT / "tests" / "mutants.txt"
TESTS = (
    "test_kernel_values.py",
    "test_kernels.py",
    "test_operators.py",
    "test_compilers.py",
    "test_split.py",
    "test_conv_norm.py",
    "test_kernel_shapes.py",
)
# The tests that run first, or alone, for a fault in one of these files.
_TABLE = ("test_configurations.py", *TESTS)
_SERVING = ("test_freeze.py", "test_freeze_refusals.py", "test_freeze_graphs.py")
JUDGES = {
    "kernels/tiling/choose.py": _TABLE,
    "kernels/tiling/device.py": _TABLE,
    "kernels/tiling/table.py": _TABLE,
    "kernels/bias_attention.py": ("test_kernel_values.py", "test_kernels.py::test_bias_attention", *TESTS),
    "kernels/conv_norm.py": ("test_conv_norm.py", "test_kernel_shapes.py::test_conv_norm"),
    "kernels/head.py": (
        "test_kernels.py::test_head",
        "test_kernels.py::test_nothing_is_written_beyond_the_last_class",
        *TESTS,
    ),
    "kernels/split_mlp.py": ("test_split.py", *TESTS),
    "effformer/backend.py": ("test_operators.py", "test_compilers.py", *TESTS),
    "effformer/serving/frozen.py": _SERVING,
    "effformer/serving/packing.py": _SERVING,
    "effformer/serving/options.py": _SERVING,
    "effformer/model/steps.py": _SERVING,
    "kernels/fold.py": ("test_plan.py", "test_live.py", "test_live_modules.py"),
    "kernels/plan.py": ("test_plan.py", "test_live.py", "test_live_modules.py"),
    "effformer/model/live.py": ("test_live.py", "test_live_modules.py", "test_host.py", "test_operators.py"),
    "effformer/model/end.py": ("test_live_modules.py",),
    "effformer/model/fusion.py": _SERVING,
    **GRADIENT_JUDGES,
}


MUTANTS = (
    *GRADIENT_MUTANTS,
    # pooling
    Mutant("padding counted, columns", "kernels/rows.py", "w_left, w_middle, w_right = _weights(w, W)", "w_left, w_middle, w_right = _weights(w * 0 + 1, W + 2)"),
    Mutant("padding counted, lines", "kernels/rows.py", "w_up, w_middle, w_down = _weights(h, H)", "w_up, w_middle, w_down = _weights(h * 0 + 1, H + 2)"),
    Mutant("neighbour beyond the right edge read", "kernels/rows.py", "tl.where(w < W - 1, stride_w, 0)", "tl.where(w < W, stride_w, 0)"),
    Mutant("neighbour above the first line read", "kernels/rows.py", "tl.where(h > 0, -stride_h, 0)", "tl.where(h >= 0, -stride_h, 0)"),
    Mutant("weights of the first line and the last swapped", "kernels/rows.py", "return w_before, tl.where(both, 1 / 3, 0.25), w_after", "return w_after, tl.where(both, 1 / 3, 0.25), w_before"),
    Mutant("a weight of zero at the edges", "kernels/rows.py", "return w_before, tl.where(both, 1 / 3, 0.25), w_after", "return tl.maximum(w_before, tl.where(both, 0.0, 0.5)), tl.where(both, 1 / 3, 0.0), tl.maximum(w_after, tl.where(both, 0.0, 0.5))"),
    Mutant("difference to the centre dropped", "kernels/rows.py", "layer_scale * (mean - x)", "layer_scale * mean"),
    Mutant("layer scale not applied", "kernels/rows.py", "layer_scale * (mean - x)", "(mean - x)"),
    Mutant("pooling residual skipped", "kernels/rows.py", "(x + layer_scale *", "(layer_scale *"),
    # rows and channels
    Mutant("lines and columns swapped", "kernels/rows.py", "p // W, p % W", "p // H, p % H"),
    Mutant("offset of an image in 32 bits", "kernels/rows.py", "offsets = b.to(tl.int64) * stride_b", "offsets = (b * stride_b).to(tl.int32)"),
    Mutant("offset of a dense row in 32 bits", "kernels/rows.py", "row.to(tl.int64) * stride_w", "(row * stride_w).to(tl.int32)"),
    Mutant("offset of a line in 32 bits", "kernels/rows.py", "h.to(tl.int64) * stride_h", "(h * stride_h).to(tl.int32)"),
    Mutant("offset of a column in 32 bits", "kernels/rows.py", "+ w.to(tl.int64) * stride_w", "+ (w * stride_w).to(tl.int32)"),
    Mutant("offset of a channel in 32 bits", "kernels/pool_mixer.py", "(c.to(tl.int64) * stride_xc)", "(c * stride_xc).to(tl.int32)"),
    Mutant("offsets of attention in 32 bits", "kernels/bias_attention.py", "offsets = i.to(tl.int64) * stride", "offsets = (i * stride).to(tl.int32)"),
    Mutant("offset of a tile of queries in 32 bits", "kernels/bias_attention.py", "first_row = (i_m * BLOCK_M).to(tl.int64)", "first_row = i_m * BLOCK_M"),
    Mutant("far bias taken for near", "kernels/bias_attention.py", "max(tokens * channels, tokens * sum(bias.stride()[1:])) <", "tokens * channels <"),
    Mutant("any strides taken for dense", "kernels/bias_attention.py", "qkv.is_contiguous() and", ""),
    Mutant("second tile written over the first", "kernels/rows.py", "tl.minimum(i_tile, rows) * BLOCK_M", "tl.minimum(i_tile, 0) * BLOCK_M"),
    Mutant("image of a row lost", "kernels/rows.py", "b = first // pixels + p // pixels", "b = first // pixels"),
    Mutant("channel mask missing at the last piece", "kernels/rows.py", "return sum(widths[: piece + 1]) > size", "return False"),
    Mutant("any strides taken for dense rows", "kernels/layout.py", "return rows and (", "return True or ("),
    Mutant("memory format of the input lost", "kernels/layout.py", "x.stride(1) == 1 and not x.is_contiguous()", "False"),
    Mutant("channels that lie apart read as if together", "kernels/layout.py", "x if _together(x) else", "x if True else"),
    Mutant("tokens that lie apart read as if together", "kernels/layout.py", "x if x.stride(2) == 1 or x.shape[2] == 1 else", "x if True else"),
    Mutant("result left in the copy", "kernels/layout.py", "return out if target is out else out.copy_(target)", "return out"),
    Mutant("strided weights read as dense", "kernels/layout.py", "a.contiguous() if", "a if"),
    # activations
    Mutant("GELU's tail added", "kernels/activation.py", "y = 0.5 * (x + tl.abs(x)) - gelu_tail", "y = 0.5 * (x + tl.abs(x)) + gelu_tail"),
    Mutant("a coefficient off by 1%", "kernels/activation.py", "-0.483782587", "-0.488620413"),
    Mutant("infinity lost in GELU", "kernels/activation.py", "tl.minimum(tl.abs(x), EXP3_CAP)", "tl.abs(x)"),
    Mutant("-inf becomes 0 in GELU", "kernels/activation.py", "y = 0.5 * (x + tl.abs(x)) -", "y = tl.maximum(x, 0.0) -"),
    Mutant("tanh-like erf scale", "kernels/activation.py", "0.7071067811865476", "0.7978845608028654"),
    Mutant("doubled GELU not halved", "kernels/activation.py", 'return 2.0 if form == "gelu_exp3_x2"', 'return 1.0 if form == "gelu_exp3_x2"'),
    Mutant("hard_swish unbounded", "kernels/activation.py", "tl.minimum(tl.maximum(x + 3.0, 0.0), 6.0)", "tl.maximum(x + 3.0, 0.0)"),
    # fused MLP
    Mutant("scale1 not applied", "kernels/mlp_loop.py", "b_hidden = b_hidden * _load_hidden(scale1_ptr, n, HIDDEN, BLOCK_H)", "b_hidden = b_hidden * 1.0"),
    Mutant("shift1 dropped", "kernels/mlp_loop.py", "b_hidden = b_hidden + _load_hidden(shift1_ptr, n, HIDDEN, BLOCK_H)", "b_hidden = b_hidden + 0.0"),
    Mutant("last hidden chunk skipped", "kernels/mlp_loop.py", "tl.range(first, last, BLOCK_H", "tl.range(first, last - 1 - (last - 1) % BLOCK_H, BLOCK_H"),
    Mutant("hidden channels beyond the last read", "kernels/mlp_loop.py", "mask=(c < C) & (n < HIDDEN)", "mask=(c < C)"),
    Mutant("scale2 not applied", "kernels/meta4d.py", "(b_acc[i] * scale2 +", "(b_acc[i] +"),
    Mutant("shift2 dropped", "kernels/meta4d.py", " + load_vector(shift2_ptr, c, C, WIDTHS, i))", ")"),
    Mutant("residual skipped", "kernels/meta4d.py", "result = residual.to(tl.float32) +", "result ="),
    Mutant("second accumulator forgets", "kernels/mlp_loop.py", "tl.dot(b_act, b_w2, b_acc[i],", "tl.dot(b_act, b_w2, b_acc[i] * (i == 0),"),
    Mutant("residual taken before pooling", "kernels/meta4d.py", "        if POOL and RELOAD:\n            # Rows beyond the end stand on the last one, which other threads may have overwritten by now.\n            residual = tl.load(p_out", "        if False:\n            residual = tl.load(p_out"),
    # split MLP
    Mutant("a chunk added twice", "kernels/split_mlp.py", "tl.minimum(first + CHUNK, HIDDEN)", "tl.minimum(first + CHUNK + BLOCK_H, HIDDEN)"),
    Mutant("all parts of the first chunk", "kernels/split_mlp.py", "first = i_s * CHUNK", "first = i_s * 0"),
    Mutant("parts written over the first", "kernels/split_mlp.py", "o_out += i_s.to(tl.int64) * stride_os", "o_out += i_s.to(tl.int64) * 0"),
    Mutant("offset of a part in 32 bits", "kernels/split_mlp.py", "i_s.to(tl.int64) * stride_os", "(i_s * stride_os).to(tl.int32)"),
    Mutant("rows past the end added", "kernels/split_mlp.py", "mask = inside[:, None] & channel_mask(", "mask = (row >= 0)[:, None] & channel_mask("),
    Mutant("a part stored and not added", "kernels/split_mlp.py", "tl.atomic_add(p_out, b_acc[i], mask=mask, sem=\"relaxed\")", "tl.store(p_out, b_acc[i], mask=mask)"),
    Mutant("last part forgotten", "kernels/split_mlp.py", "tl.static_range(PARTS)", "tl.static_range(max(PARTS - 1, 1))"),
    Mutant("sum begins with what was there", "kernels/split_mlp.py", "torch.empty if mlp.deterministic else torch.zeros", "torch.empty"),
    Mutant("channel tile ignored in the sum", "kernels/split_mlp.py", "c = i_c * BLOCK_C + tl.arange", "c = tl.arange"),
    Mutant("residual taken before pooling", "kernels/split_mlp.py", "residual = pool_tile(p_residual, there, h, w, H, W, stride_rh, stride_rw, layer_scale)", "residual = tl.load(p_residual, mask=there, other=0.0)"),
    Mutant("gain of the hidden forgotten", "kernels/split_mlp.py", "* (1.0 / X_GAIN)", ""),
    Mutant("shift2 dropped", "kernels/split_mlp.py", "(b_sum * scale2 + shift2)", "(b_sum * scale2)"),
    Mutant("any order allowed silently", "kernels/split_mlp.py", "if deterministic or not torch.are", "if True or not torch.are"),
    Mutant("always in order", "kernels/meta4d.py", "layer_scale1, Mlp(*mlp), out)", "layer_scale1, Mlp(*mlp)._replace(deterministic=True), out)"),
    # matrix products
    Mutant("inputs beyond the last read", "kernels/linear.py", "inside[:, None] & (first + k < INPUTS)[None, :]", "inside[:, None]"),
    Mutant("outputs beyond the last written", "kernels/linear.py", "mask = mask & there[None, :]", "mask = mask"),
    Mutant("column tile ignored in the shift", "kernels/linear.py", "tl.load(shift_ptr + n,", "tl.load(shift_ptr + n - i_n * BLOCK_N,"),
    Mutant("residual skipped", "kernels/linear.py", ".to(tl.float32) + value", ".to(tl.float32) * 0.0 + value"),
    Mutant("gain of the hidden forgotten", "kernels/linear.py", "* (1.0 / X_GAIN)", ""),
    Mutant("hidden rows lose the map's geometry", "kernels/layout.py", "(like.batch, like.height, like.width, channels)", "(1, 1, like.count, channels)"),
    # norm
    Mutant("eps dropped", "kernels/layer_norm.py", "variance + eps", "variance"),
    Mutant("padding counted into the variance", "kernels/layer_norm.py", "centred = tl.where(there, b_x - (tl.sum(b_x, 1) / C)[:, None], 0.0)", "centred = b_x - (tl.sum(b_x, 1) / C)[:, None]"),
    Mutant("norm's bias dropped", "kernels/layer_norm.py", "normalised * weight + bias", "normalised * weight"),
    # the network's end
    Mutant("tokens that do not exist counted", "kernels/head.py", "tl.where(t < tokens, tl.rsqrt(variance + eps), 0.0)", "tl.rsqrt(variance + eps)"),
    Mutant("padding counted into the variance", "kernels/head.py", "centred = tl.where(there, b_x - (tl.sum(b_x, 1) * (1.0 / C))[:, None], 0.0)", "centred = b_x - (tl.sum(b_x, 1) * (1.0 / C))[:, None]"),
    Mutant("only the last tile of tokens pooled", "kernels/head.py", "b_sum += tl.sum(centred", "b_sum = tl.sum(centred"),
    Mutant("norm's bias dropped", "kernels/head.py", "* weight + tl.load(norm_bias_ptr + c, mask=c < C, other=0.0)", "* weight"),
    Mutant("eps dropped", "kernels/head.py", "tl.rsqrt(variance + eps)", "tl.rsqrt(variance)"),
    Mutant("weights of the first classes for all", "kernels/head.py", "b_weight = _class_rows(weight_ptr, n + BLOCK_W,", "b_weight = _class_rows(weight_ptr, n,"),
    Mutant("classes beyond the last written", "kernels/head.py", "b_out.to(out_ptr.dtype.element_ty), mask=n < CLASSES)", "b_out.to(out_ptr.dtype.element_ty))"),
    Mutant("offset of a token in 32 bits", "kernels/head.py", "(t.to(tl.int64) * stride_xn)", "(t * stride_xn).to(tl.int32)"),
    Mutant("bias of the linear layer dropped", "kernels/head.py", "tl.sum(b_product, 1) + tl.load(bias_ptr + n, mask=n < CLASSES, other=0.0)", "tl.sum(b_product, 1)"),
    # attention
    Mutant("bias dropped", "kernels/bias_attention.py", "tl.where(tl.abs(b_bias) < float(\"inf\"), b_finite, b_bias)", "tl.where(tl.abs(b_bias) < float(\"inf\"), 0.0, b_bias)"),
    Mutant("bias not divided by the scale", "kernels/bias_attention.py", "b_finite, b_bias) * (1.0 / SCALE)", "b_finite, b_bias)"),
    Mutant("bias dropped in float32", "kernels/bias_attention.py", "return b_s if BIAS_FIRST else b_s + b_bias", "return b_s"),
    Mutant("a finite mask overflows", "kernels/bias_attention.py", "tl.where(tl.abs(b_bias) < float(\"inf\"), b_finite, b_bias)", "b_bias"),
    Mutant("bias index order swapped", "kernels/bias_attention.py", "_times(r_bias, stride_bm, DENSE)", "_times(r_bias, stride_bn, DENSE)"),
    Mutant("bias of the first head for all", "kernels/bias_attention.py", "i_h.to(tl.int64) * stride_bh", "i_h.to(tl.int64) * 0"),
    Mutant("values of the wrong head", "kernels/bias_attention.py", "p_values = p_head +", "p_values = qkv_ptr + i_b * stride_qb +"),
    Mutant("keys read for queries", "kernels/bias_attention.py", "_times(KEY_DIM + c, stride_qc, DENSE)", "_times(c, stride_qc, DENSE)"),
    Mutant("keys beyond the last not masked", "kernels/bias_attention.py", 'other=-float("inf"))', "other=0.0)"),
    Mutant("sum not faded with the maximum", "kernels/bias_attention.py", "b_sum = b_sum * fade +", "b_sum = b_sum +"),
    Mutant("values not faded with the maximum", "kernels/bias_attention.py", "faded = b_acc[i] * fade[:, None]", "faded = b_acc[i]"),
    Mutant("a masked tile poisons its row", "kernels/bias_attention.py", 'tl.where(b_new == -float("inf"), 0.0, b_new)', "b_new"),
    Mutant("no maximum subtracted", "kernels/bias_attention.py", "(b_s - tl.max(b_s, 1)[:, None]) * TO_BITS", "b_s * TO_BITS"),
    Mutant("values past 256 never written", "kernels/bias_attention.py", "i_h * VALUE_DIM + i_v * BLOCK_V\n", "i_h * VALUE_DIM\n"),
    Mutant("prepared bias not divided by the scale", "kernels/bias_attention.py", ") / key_dim**-0.5", ")"),
    Mutant("prepared finite mask overflows", "kernels/bias_attention.py", "bias.clamp(-limit, limit)", "bias"),
    Mutant("prepared keys beyond the last not masked", "kernels/bias_attention.py", "value=-torch.inf", "value=0.0"),
    Mutant("prepared mask forgotten", "kernels/bias_attention.py", "torch.where(bias.isinf(), bias, ", "torch.where(bias.isnan(), bias, "),
    # registration and choice
    Mutant("fake of another layout", "kernels/meta4d.py", "    _implementation,\n    new_map,", "    _implementation,\n    lambda x: new_map(x.contiguous()),"),
    Mutant("gradients silently lost", "effformer/backend.py", "return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)", "return False"),
    Mutant("tangents silently lost", "effformer/backend.py", "forward_ad._current_level >= 0", "False"),
    Mutant("autocast ignored", "effformer/backend.py", "return torch.get_autocast_dtype(x.device.type) if", "return x.dtype if"),
    Mutant("autocast's dtype not looked at", "effformer/backend.py", "if reason is None and products and", "if False and"),
    # configurations
    Mutant("a class beyond the device's shared memory", "kernels/tiling/device.py", "if known.shared_memory <= device.shared_memory and", "if"),
    Mutant("a class newer than the device", "kernels/tiling/device.py", "and known.capability <= device.capability", ""),
    Mutant("another card's tiles taken", "kernels/tiling/table.py", "self.gpu in (None, device.name)", "True"),
    Mutant("bounds of a shape ignored", "kernels/tiling/table.py", "return size <= number", "return True"),
    Mutant("multiples ignored", "kernels/tiling/table.py", "return size % number == 0", "return True"),
    Mutant("tiles of other kernels taken", "kernels/tiling/choose.py", 'if found["fingerprint"] != fingerprint():', "if False:"),
    Mutant("what was tuned here forgotten", "kernels/tiling/choose.py", "_tuned_table() if device.name else", ""),
    Mutant("tiles wider than the product", "kernels/tiling/choose.py", "return widths if outputs >= whole else", "return widths if True else"),
    Mutant("unknown activations let through", "effformer/backend.py", "if activation not in TRITON_ACTIVATIONS:", "if False:"),
    # convolutions
    Mutant("a tap above the map read", "kernels/conv_norm.py", "return (i >= 0) & (i < SIZE)", "return i < SIZE"),
    Mutant("a tap below the map read", "kernels/conv_norm.py", "return (i >= 0) & (i < SIZE)", "return (i >= 0) & (i <= SIZE)"),
    Mutant("taps in columns", "kernels/conv_norm.py", "tl.int64) + tap // 3, tl.full((), 0, tl.int64) + tap % 3", "tl.int64) + tap % 3, tl.full((), 0, tl.int64) + tap // 3"),
    Mutant("stride of 1", "kernels/conv_norm.py", "y, x = 2 * h - 1, 2 * w - 1", "y, x = h - 1, w - 1"),
    Mutant("padding after the map instead of before", "kernels/conv_norm.py", "y, x = 2 * h - 1, 2 * w - 1", "y, x = 2 * h, 2 * w"),
    Mutant("the last channels of a tap unmasked", "kernels/conv_norm.py", "if C % BLOCK_K == 0 or (C < BLOCK_K and not cut(DEPTHS, i, C)):", "if C % BLOCK_K == 0 or not cut(DEPTHS, i, C):"),
    Mutant("the first channels of each step", "kernels/conv_norm.py", "first = step % tl.cdiv(C, BLOCK_K) * BLOCK_K", "first = 0 * step"),
    Mutant("pixels not centred", "kernels/conv_norm.py", "b_x.to(tl.float32) - OFFSET", "b_x.to(tl.float32)"),
    Mutant("border of zeros", "kernels/conv_norm.py", "border = tl.load(border_ptr + c, mask=there, other=0.0)", "border = tl.load(border_ptr + c, mask=there & (c < 0), other=0.0)"),
    Mutant("convolution: offset of a line in 32 bits", "kernels/conv_norm.py", "y.to(tl.int64) * units_xh + x.to", "(y * units_xh).to(tl.int32) + x.to"),
    Mutant("convolution: offset of a tap in 32 bits", "kernels/conv_norm.py", "dy.to(tl.int64) * units_xh", "(dy * units_xh).to(tl.int32)"),
    Mutant("convolution: shift dropped", "kernels/conv_norm.py", "activate(b_acc[i] * scale + shift,", "activate(b_acc[i] * scale,"),
    Mutant("convolution: gain kept", "kernels/conv_norm.py", "ACTIVATION) * (1.0 / gain(ACTIVATION))", "ACTIVATION)"),
    Mutant("vendor: scale not folded", "kernels/conv_norm.py", "(weight * scale[:, None, None, None])", "weight"),
    Mutant("vendor: border of zeros", "kernels/conv_norm.py", "x = border.to(weight.dtype)[:, None, None]", "x = (0 * border).to(weight.dtype)[:, None, None]"),
    # the serving form
    Mutant("frozen: one head alone", "effformer/serving/packing.py", "(one.double() + other.double()) / 2", "one.double()"),
    Mutant("frozen: padding of pixels is black", "effformer/serving/packing.py", "border = 255 * mean - PIXEL_OFFSET", "border = 0 * mean - PIXEL_OFFSET"),
    Mutant("frozen: the border's share not taken back", "effformer/serving/packing.py", "shift - scale * (weight.sum((2, 3)) @ border)", "shift"),
    Mutant("frozen: std of the channels mixed up", "effformer/serving/packing.py", "(middle / std)[:, None, None]", "(middle / std.flip(0))[:, None, None]"),
    Mutant("frozen: weights shared with the model", "effformer/serving/packing.py", "torch.empty_like(tensor, dtype=kind, memory_format=layout).copy_(tensor.detach())", "tensor.detach().to(kind).contiguous(memory_format=layout)"),
    Mutant("frozen: new weights of the first convolution alone", "effformer/serving/packing.py", "for target, source in zip(self.tensors(), other.tensors(), strict=True):", "for target, source in list(zip(self.tensors(), other.tensors(), strict=True))[:1]:"),
    Mutant("frozen: another architecture's weights taken", "effformer/serving/packing.py", "if _structure(self) != _structure(other):", "if False:"),
    Mutant("frozen: bias of the image's sides, not the map's", "effformer/model/steps.py", "sides = halved(sides[0]), halved(sides[1])", "pass"),
    Mutant("frozen: a tapped norm goes on to the next stage", "effformer/serving/packing.py", '"inline": kind == "inline"', '"inline": True'),
    Mutant("frozen: hooks lost", "effformer/model/fusion.py", 'return f"it {change_of(module, kinds)}"', "pass"),
    Mutant("frozen: training mode let through", "effformer/serving/packing.py", "if model.training:", "if False:"),
    Mutant("frozen: a stem with other strides let through", "effformer/model/fusion.py", "return geometry ==", "return True or geometry =="),
    Mutant("frozen: old biases in the graphs", "effformer/serving/frozen.py", "                    target.copy_(source)", "                    pass"),
    Mutant("frozen: old biases without a graph", "effformer/serving/frozen.py", "            self._plans.clear()\n            self._model", "            self._model"),
    Mutant("frozen: graphs beyond the limit", "effformer/serving/frozen.py", "len(self._graphs) < self._max_graphs", "True"),
    Mutant("frozen: padded to the largest", "effformer/serving/frozen.py", "return min(larger)", "return max(larger)"),
    Mutant("frozen: padded to another size", "effformer/serving/frozen.py", "if known[1:] == key[1:] and", "if"),
    Mutant("frozen: padding returned", "effformer/serving/frozen.py", "result[:batch].clone(memory_format=torch.preserve_format)", "result.clone()"),
    Mutant("frozen: results overwritten", "effformer/serving/frozen.py", "if self._new_outputs else", "if False else"),
    Mutant("frozen: images not copied", "effformer/serving/frozen.py", "graph.images[:batch].copy_(images)", "pass"),
    Mutant("frozen: other images in the buffer's memory", "effformer/serving/frozen.py", "if (images.data_ptr(), images.stride()) !=", "if (images.data_ptr(), graph.images.stride()) !="),
    Mutant("frozen: autocast let in", "effformer/serving/frozen.py", "torch.no_grad(), no_autocast(self.device):", "torch.no_grad():"),
    Mutant("frozen: tensors of inference mode kept", "effformer/serving/frozen.py", "torch.inference_mode(False), ", ""),
    Mutant("frozen: threads do not wait", "effformer/serving/frozen.py", "with self._lock, torch.inference_mode(False)", "with torch.inference_mode(False)"),
    # live networks and plans
    Mutant("fold: eps dropped", "kernels/fold.py", "mask, 1.0) + eps)", "mask, 1.0))"),
    Mutant("fold: bias of the convolution not scaled", "kernels/fold.py", "i, mask, 0.0) * scale\n        gamma", "i, mask, 0.0)\n        gamma"),
    Mutant("fold: layer scale not in the shift", "kernels/fold.py", "shift * gamma, mask=mask)", "shift, mask=mask)"),
    Mutant("fold: mean of two heads is their sum", "kernels/fold.py", "(value * factor).to(matrices_ptr", "(value).to(matrices_ptr"),
    Mutant("fold: a filter's taps swapped", "kernels/fold.py", "one.permute(0, 2, 3, 1)", "one.permute(0, 3, 2, 1)"),
    Mutant("fold: bias resampled with the corners apart", "kernels/fold.py", "tl.maximum(size - 1, 1)", "tl.maximum(size, 1)"),
    Mutant("fold: keys beyond the last token allowed", "kernels/fold.py", 'tl.where(key < tokens, value, -float("inf"))', "value"),
    Mutant("fold: rows and columns of the bias swapped", "kernels/fold.py", "of_head += (next_y - y) * side * stride", "of_head += (next_y - y) * stride"),
    Mutant("fold: pieces after the first left out", "kernels/fold.py", "lines[:, 1] = block *", "lines[:, 1] = 0 *"),
    Mutant("fold: dtype of a second source taken for the first's", "kernels/fold.py", "i, mask, 0.0) - _load(p_line + 8, codes >> 4,", "i, mask, 0.0) - _load(p_line + 8, codes >> 5,"),
    Mutant("fold: a parameter of another dtype read in place", "kernels/fold.py", "if tensor.dtype == self.dtype and", "if"),
    Mutant("plan: a place shared too early", "kernels/plan.py", "if other_first <= last and first <= other_last:", "if other_first < last and first < other_last:"),
    Mutant("plan: a result computed by PyTorch let through", "kernels/plan.py", "if _storage(result) not in written or not whole:", "if not whole:"),
    Mutant("plan: a launch that reads what PyTorch computed let through", "kernels/plan.py", "and storage not in written:", "and False:"),
    Mutant("plan: offsets of views lost", "kernels/plan.py", "int(tensor.storage_offset()) * tensor.element_size()", "0 * tensor.element_size()"),
    Mutant("live: addresses not compared", "effformer/model/live.py", "and self._forms() == self._tensors", ""),
    Mutant("live: settings and hooks not compared", "effformer/model/live.py", "and self._attributes == self._seen", ""),
    Mutant("live: names of parameters not compared", "effformer/model/live.py", "(name, one.data_ptr(),", "(one.data_ptr(),"),
    Mutant("live: shapes of weights not checked", "effformer/model/live.py", "        _check_arguments(steps, x)\n", ""),
    Mutant("live: another device's plan taken", "effformer/model/live.py", "if state.devices != {x.device}:", "if False:"),
    Mutant("live: the sign of a negated view lost", "effformer/model/live.py", "x.resolve_neg() if x.is_neg() else x", "x"),
    Mutant("live: a weight that is no parameter read once", "kernels/fold.py", "tensor.data_ptr() not in self._places", "False"),
    Mutant("live: hooks compared with themselves", "effformer/model/live.py", "dict(value) if name in _COPIED else value", "value"),
    Mutant("live: strides not compared", "effformer/model/live.py", "one.shape, one.stride(), type(one))", "type(one))"),
    Mutant("live: a gradient lost", "effformer/model/live.py", 'return "a gradient is needed"', "return None"),
    Mutant("live: tracers see nothing", "effformer/model/live.py", "and torch._C._get_tracing_state() is None", ""),
    Mutant("live: vmap sees nothing", "effformer/model/live.py", "and torch._C._functorch.peek_interpreter_stack() is None", ""),
    Mutant("live: the images' alignment forgotten", "effformer/model/live.py", "x.data_ptr() % 16 == 0, dtype", "dtype"),
    Mutant("live: TF32's flags forgotten", "effformer/model/live.py", "return *form, *tf32_allowed()", "return form"),
    Mutant("live: a bias resized as a table, whatever was asked for", "effformer/model/live.py", 'if one.resize["resize"] != "table" and', "if False and"),
    Mutant("live: a replaced head computed as the old one", "effformer/model/end.py", "if not is_plain(head, (nn.Linear,)):", "if False:"),
    Mutant("live: a plan of autocast taken outside it", "effformer/model/live.py", "dtype, autocast(x.device.type), overriding()", "dtype, overriding()"),
    Mutant("live: another table's plan taken", "effformer/model/live.py", "autocast(x.device.type), overriding()", "autocast(x.device.type)"),
    Mutant("live: classes of modules not compared", "effformer/model/live.py", "                and [type(module) for module in self._modules] == self._classes\n", ""),
    Mutant("live: replicas planned", "effformer/model/live.py", 'vars(part.owner).get("_is_replica")', "False"),
    Mutant("live: a plan made by each thread", "effformer/model/live.py", "            if form not in state.plans:  # another thread made it\n", "            if True:\n"),
    Mutant("live: methods of subclasses ignored", "effformer/model/end.py", 'return replaces(self.network, EfficientFormer, "forward_head", "logits")', "return False"),
    Mutant("frozen: a gradient lost", "effformer/serving/options.py", "if torch.is_grad_enabled() and images.requires_grad:", "if False:"),
)  # fmt: skip


def plant(mutant: Mutant | None, place: Path) -> None:
    """Lay the package out in `place` as it is installed, with the mutant in it."""
    lay_out(place)
    if mutant is None:
        return
    file = place / (mutant.file if mutant.file.startswith("effformer/") else "effformer/" + mutant.file)
    text = file.read_text()
    if text.count(mutant.old) != 1:
        raise SystemExit(f"{mutant.fault}: stands {text.count(mutant.old)} times in {mutant.file}: {mutant.old!r}")
    file.write_text(text.replace(mutant.old, mutant.new))


def red(place: Path, tests: tuple[str, ...]) -> str | None:
    """The first of `tests` that fails on the package in `place`, None if all pass; single tests come before files."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider", "-p", "no:randomly"]
    single = [name for name in tests if "::" in name]  # pytest itself would run the files' other tests first
    for names in filter(None, (single, [name for name in tests if name not in single])):
        done = subprocess.run(
            [*command, "--hypothesis-seed=0", *(str(ROOT / "tests" / name) for name in names)],
            cwd=place,
            env={**os.environ, "PYTHONPATH": str(place)},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            failed = re.search(r"^(?:FAILED|ERROR) \S*?(test_\w+\.py\S*)", done.stdout, re.MULTILINE)
            return failed[1] if failed else f"the process died ({done.returncode})"
    return None


def main() -> None:
    killers, words = recorded(), sys.argv[1:]
    chosen = [mutant for mutant in MUTANTS if not words or any(word in mutant.name for word in words)]
    if words == ["--new"]:
        chosen = [mutant for mutant in MUTANTS if mutant.name not in killers]
    with tempfile.TemporaryDirectory() as folder:
        for mutant in chosen:  # all texts stand where they should, before the long part begins
            plant(mutant, Path(folder))
    for mutant in chosen:
        begin = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            plant(mutant, Path(folder))
            killer = red(Path(folder), JUDGES.get(mutant.file, TESTS))
        killers[mutant.name] = killer or "-"
        print(f"{line(mutant, killers)}  [{time.monotonic() - begin:.0f} s]", flush=True)
        RECORD.write_text("".join(line(mutant, killers) + "\n" for mutant in MUTANTS if mutant.name in killers))
    survived = [mutant.fault for mutant in chosen if killers[mutant.name] == "-"]
    print(f"{len(chosen) - len(survived)} of {len(chosen)} killed")
    sys.exit(bool(survived))


def recorded() -> dict[str, str]:
    """The test that killed each mutant in an earlier run, by the mutant's name; "-" for a survivor."""
    found = RECORD.read_text().splitlines() if RECORD.exists() else []
    known = {mutant.name for mutant in MUTANTS}
    pairs = (text[len("SURVIVED ") :].rsplit(": ", 1) for text in found)
    return {name: killer for name, killer in pairs if name in known}


def line(mutant: Mutant, killers: dict[str, str]) -> str:
    killer = killers[mutant.name]
    return f"{'SURVIVED' if killer == '-' else 'killed':8} {mutant.name}: {killer}"


if __name__ == "__main__":
    main()
