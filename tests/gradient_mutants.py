"""Planted faults in the gradients and in training (`mutants.py`)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """`old`, which stands once in `file`, becomes `new`."""

    fault: str
    file: str
    old: str
    new: str

    @property
    def name(self) -> str:
        return f"{self.fault} ({self.file})"


_BACKWARD = ("test_backward.py", "test_backward_use.py", "test_train_mode.py", "test_train_networks.py")
_TRAINING = ("test_train_mode.py", "test_train_networks.py")
GRADIENT_JUDGES = {
    "effformer/gradients.py": _BACKWARD,
    "effformer/model/batch_norm.py": _TRAINING,
    "effformer/model/blocks.py": _TRAINING,
    "effformer/train_ops.py": _TRAINING,
    "kernels/activation_backward.py": _BACKWARD,
    "kernels/attention_mixer_backward.py": _BACKWARD,
    "kernels/attention_pieces.py": _BACKWARD,
    "kernels/bias_attention_backward.py": _BACKWARD,
    "kernels/bias_attention_backward_tiles.py": _BACKWARD,
    "kernels/combine.py": _TRAINING,
    "kernels/layer_norm_backward.py": _BACKWARD,
    "kernels/linear_mlp_backward.py": _BACKWARD,
    "kernels/meta4d_backward.py": _BACKWARD,
    "kernels/meta4d_train.py": _TRAINING,
    "kernels/meta4d_train_backward.py": _TRAINING,
    "kernels/processes.py": _TRAINING,
    "kernels/mlp_backward.py": _BACKWARD,
    "kernels/pool_mixer_backward.py": _BACKWARD,
    "kernels/statistics.py": _TRAINING,
    "kernels/vendor.py": _BACKWARD,
}
GRADIENT_MUTANTS = (
    # blocks of maps
    Mutant("a line weighed by those around the pixel written", "kernels/pool_mixer_backward.py", "line, lines = _averaged(h + (i - 1), H)", "(line, lines), lines = _averaged(h + (i - 1), H), _averaged(h, H)[1]"),
    Mutant("a column weighed by those around the pixel written", "kernels/pool_mixer_backward.py", "column, columns = _averaged(w + (j - 1), W)", "(column, columns), columns = _averaged(w + (j - 1), W), _averaged(w, W)[1]"),
    Mutant("padding counted", "kernels/pool_mixer_backward.py", "tl.where(i < SIZE - 1, 1.0, 0.0)", "1.0"),
    Mutant("gradient of the centre dropped", "kernels/pool_mixer_backward.py", "moved = -grad", "moved = 0.0 * grad"),
    Mutant("gradient without the layer scale", "kernels/pool_mixer_backward.py", "grad + layer_scale * moved", "grad + moved"),
    Mutant("no pixel taken from x", "kernels/pool_mixer_backward.py", "(x - first) * moved", "x * moved"),
    Mutant("shares rounded twice", "kernels/pool_mixer_backward.py", "(1.0 / (lines * columns))", "((1.0 / lines) * (1.0 / columns))"),
    Mutant("sums of a tile written over another's", "kernels/pool_mixer_backward.py", "i_m.to(tl.int64) * C + c", "0 * i_m.to(tl.int64) + c"),
    Mutant("weight1's gradient without scale1", "kernels/meta4d_backward.py", "found.weight1 * (size * mlp.scale1)[:, None]", "found.weight1 * size"),
    Mutant("scale1's gradient without the size", "kernels/meta4d_backward.py", "found.scale1 * size", "found.scale1"),
    Mutant("shift1's gradient without the size", "kernels/meta4d_backward.py", "found.shift1 * size", "found.shift1"),
    Mutant("x's gradient without scale1", "kernels/mlp_backward.py", "return (mlp.weight1 * mlp.scale1[:, None]).to(mlp.weight1.dtype)", "return mlp.weight1"),
    Mutant("the residual's gradient lost", "kernels/meta4d_backward.py", "torch.addcmul(rows, found.x, size,", "torch.addcmul(0 * rows, found.x, size,"),
    Mutant("x's gradient without the size", "kernels/meta4d_backward.py", "torch.addcmul(rows, found.x, size,", "torch.addcmul(rows, found.x, size / size,"),
    Mutant("the gradient without scale2", "kernels/vendor.py", "torch.mul(grad, scale / size, out=found)", "torch.div(grad, size, out=found)"),
    Mutant("weight2's gradient without scale2", "kernels/meta4d_backward.py", "found.weight2 * scale2[:, None]", "found.weight2"),
    Mutant("rows of the first part in all", "kernels/mlp_backward.py", "first // BLOCK_M + i_m", "i_m"),
    Mutant("weight1's gradient of the last part alone", "kernels/mlp_backward.py", "of_weight1 = _added(of_weight1, ", "of_weight1 = _added(None, "),
    Mutant("weight2's gradient of the last part alone", "kernels/mlp_backward.py", "of_weight2 = _added(of_weight2, ", "of_weight2 = _added(None, "),
    Mutant("shift1's gradient of the first tile alone", "kernels/mlp_backward.py", "partial[0].sum(0, dtype=torch.float64).float()", "partial[0][0]"),
    Mutant("scale1's gradient of the first tile alone", "kernels/mlp_backward.py", "partial[1].sum(0, dtype=torch.float64).float()", "partial[1][0]"),
    Mutant("the activation's input for the product", "kernels/mlp_backward.py", "tl.sum(b_dh * b_t, 0)", "tl.sum(b_dh * b_hidden, 0)"),
    Mutant("the doubled activation stored", "kernels/mlp_backward.py", '.removesuffix("_x2")', ""),
    Mutant("shift2's gradient summed in 16 bits", "kernels/meta4d_backward.py", "rows.sum(0, dtype=torch.float32)", "rows.cumsum(0)[-1].float()"),
    Mutant("sums of products in 16 bits", "kernels/vendor.py", "return a.float() @ b.float()", "return (a @ b).float()"),
    Mutant("hidden channels beyond the last one", "kernels/mlp_backward.py", "mask = inside[:, None] & there[None, :]", "mask = inside[:, None]"),
    Mutant("gradient of the density of another deviation", "kernels/activation_backward.py", "tl.exp(-0.5 * x * x)", "tl.exp(-x * x)"),
    Mutant("sides of GELU's derivative swapped", "kernels/activation_backward.py", "1.0 - tail, tail", "tail, 1.0 - tail"),
    Mutant("a coefficient of GELU's derivative", "kernels/activation_backward.py", "+ EXP3_SLOPE[1])", "+ EXP3_SLOPE[2])"),
    Mutant("NaN lost in GELU's derivative", "kernels/activation_backward.py", " + 0.0 * x", ""),
    Mutant("relu's derivative on the wrong side", "kernels/activation_backward.py", "x <= 0, 0.0, 1.0", "x <= 0, 1.0, 0.0"),
    Mutant("silu's derivative of a part", "kernels/activation_backward.py", "(1.0 + x * (1.0 - sigmoid))", "(1.0 - sigmoid)"),
    Mutant("hard_swish's derivative halved", "kernels/activation_backward.py", "x * (1 / 3) + 0.5", "x * (1 / 6) + 0.5"),
    Mutant("gradients of the map before pooling", "kernels/meta4d_backward.py", "_mlp_gradients(grad, mixed,", "_mlp_gradients(grad, source,"),
    Mutant("the pooling's own gradient left out", "kernels/meta4d_backward.py", "        if layer_scale is not None:\n            dx", "        if False:\n            dx"),
    Mutant("a second derivative silently lost", "effformer/gradients.py", "if torch.is_grad_enabled():", "if False:"),
    Mutant("a copy of the weights kept", "effformer/gradients.py", "ctx.save_for_backward(*inputs[_SETTINGS:])", "ctx.save_for_backward(*[None if one is None else one.clone() for one in inputs[_SETTINGS:]])"),
    # attention
    Mutant("scores without their mean over the row", "kernels/bias_attention_backward.py", "b_p * (b_dp - tl.sum(b_p * b_dp, 1)[:, None])", "b_p * b_dp"),
    Mutant("weighted mean by column", "kernels/bias_attention_backward.py", "tl.sum(b_p * b_dp, 1)[:, None]", "tl.sum(b_p * b_dp, 0)[None, :]"),
    Mutant("queries without the scale", "kernels/bias_attention_backward.py", "store_pieces(p_out, b_dq, SCALE,", "store_pieces(p_out, b_dq, 1.0,"),
    Mutant("keys from rows of scores", "kernels/bias_attention_backward.py", "b_ds.T, b_q", "b_ds, b_q"),
    Mutant("values from rows of probabilities", "kernels/bias_attention_backward.py", "b_p.T, b_grad", "b_p, b_grad"),
    Mutant("the bias' gradient of the last image alone", "kernels/bias_attention_backward.py", "total += b_ds", "total = b_ds"),
    Mutant("the bias' gradient times the scale", "kernels/bias_attention_backward.py", "total += b_ds", "total += b_ds * SCALE"),
    Mutant("the bias' gradient of the first images alone", "kernels/bias_attention_backward.py", "parts.sum(0)", "parts[0]"),
    Mutant("probabilities that do not sum to 1", "kernels/bias_attention_backward.py", "b_p * (1.0 / tl.sum(b_p, 1))[:, None]", "b_p"),
    Mutant("rows beyond the last token counted", "kernels/bias_attention_backward.py", "tl.where(there[:, None], b_p *", "tl.where(n[:, None] >= 0, b_p *"),
    Mutant("tiles: sum not faded", "kernels/bias_attention_backward_tiles.py", "b_sum * fade + ", "b_sum + "),
    Mutant("tiles: weighted mean not faded", "kernels/bias_attention_backward_tiles.py", "b_weighted * fade + ", "b_weighted + "),
    Mutant("tiles: weighted mean not divided", "kernels/bias_attention_backward_tiles.py", "b_weighted * reciprocal", "b_weighted"),
    Mutant("tiles: maximum of the last tile", "kernels/bias_attention_backward_tiles.py", "tl.maximum(b_max, tl.max(b_s, 1))", "tl.max(b_s, 1)"),
    Mutant("tiles: queries of the last tile of keys", "kernels/bias_attention_backward_tiles.py", "b_dq = add_products(b_dq, b_ds", "b_dq = add_products(zero_pieces(KEY_WIDTHS, BLOCK_M), b_ds"),
    Mutant("tiles: keys without the scale", "kernels/bias_attention_backward_tiles.py", "b_dk, SCALE,", "b_dk, 1.0,"),
    Mutant("tiles: bias of the queries' own line", "kernels/bias_attention_backward_tiles.py", "p_bias + _times(m, N, DENSE)[:, None], p_row", "p_bias + _times(t, N, DENSE)[:, None], p_row"),
    Mutant("tiles: statistics of another head", "kernels/bias_attention_backward_tiles.py", "(image * HEADS + i_h * N) * 3", "(image * HEADS + i_h * 0) * 3"),
    Mutant("one piece of the values left out", "kernels/attention_pieces.py", "tl.static_range(1, len(WIDTHS))", "tl.static_range(1, 1)"),
    Mutant("a copy of strided queries left out", "kernels/bias_attention_backward.py", "qkv.contiguous(), bias", "qkv, bias"),
    # blocks of tokens
    Mutant("norm: mean of the gradient left in", "kernels/layer_norm_backward.py", "(weighted - mean - normalised * along)", "(weighted - normalised * along)"),
    Mutant("norm: gradient along the row left in", "kernels/layer_norm_backward.py", "(weighted - mean - normalised * along)", "(weighted - mean)"),
    Mutant("norm: weight left out", "kernels/layer_norm_backward.py", "weighted = weight * b_grad", "weighted = b_grad"),
    Mutant("norm: residual left out", "kernels/layer_norm_backward.py", "(b_residual.to(tl.float32) + moved)", "moved"),
    Mutant("norm: size left out", "kernels/layer_norm_backward.py", "* (reciprocal * size)", "* reciprocal"),
    Mutant("norm: sums of the last tile alone", "kernels/layer_norm_backward.py", "of_weight += tl.sum", "of_weight = tl.sum"),
    Mutant("norm: bias' sum without the size", "kernels/layer_norm_backward.py", "of_bias * size", "of_bias"),
    Mutant("weight of queries, keys and values without the size", "kernels/attention_mixer_backward.py", "normed.flatten(0, 1)) * size", "normed.flatten(0, 1))"),
    Mutant("projection's weight without the scale", "kernels/attention_mixer_backward.py", "product * scale[:, None]", "product"),
    Mutant("the bias' gradient without the size", "kernels/attention_mixer_backward.py", "dbias * size", "dbias"),
    Mutant("scale of the projection from the wrong weight", "kernels/attention_mixer_backward.py", "row_products(product, proj_weight)", "row_products(product, proj_weight * 0 + 1)"),
    Mutant("MLP on tokens: weight2 without the scale", "kernels/linear_mlp_backward.py", "sums.weight2 * scale2[:, None]", "sums.weight2"),
    Mutant("MLP on tokens: shift1 without the size", "kernels/linear_mlp_backward.py", "sums.shift1 * size", "sums.shift1"),
    # training
    Mutant("training: norm2's term of the mean left out", "kernels/meta4d_train_backward.py", "-shared * total - terms[2] * mean2", "-terms[2] * mean2"),
    Mutant("training: norm2's term of the deviation left out", "kernels/meta4d_train_backward.py", "terms[2] = -shared * inverse2 * along", "terms[2] = 0 * shared"),
    Mutant("training: norm1's correction of y left out", "kernels/meta4d_train_backward.py", "dy.sub_((flat_map(given) @ square.to(dtype)).to(dy.dtype)).sub_(line.to(dy.dtype))", "pass"),
    Mutant("training: norm1's line left out of y", "kernels/meta4d_train_backward.py", ".sub_(line.to(dy.dtype))", ""),
    Mutant("training: mean1 left out of k0", "kernels/meta4d_train_backward.py", "scale1 * total / count - k1 * mean1", "scale1 * total / count"),
    Mutant("training: covariance left out of weight1", "kernels/meta4d_train_backward.py", "torch.outer(along_mean, middle) + (own * k1)[:, None] * (wide @ covariance.double())", "torch.outer(along_mean, middle)"),
    Mutant("training: mean left out of weight1", "kernels/meta4d_train_backward.py", "torch.outer(along_mean, middle) + (own", "(own"),
    Mutant("training: stochastic depth left out of norm2's sums", "kernels/combine.py", "    if KEEP:\n        grad *= tl.load(keep_ptr + b)[:, None]\n", ""),
    Mutant("training: stochastic depth of the first image", "kernels/combine.py", "kept *= tl.load(keep_ptr + b)[:, None]", "kept *= tl.load(keep_ptr + 0 * b)[:, None]"),
    Mutant("training: stochastic depth left out of pooling", "kernels/combine.py", "other=0.0)[None, :] * tl.load(keep_ptr + b)[:, None]", "other=0.0)[None, :]"),
    Mutant("training: stochastic depth left out of pooling's gradient", "kernels/pool_mixer_backward.py", "        moved *= tl.load(keep_ptr + b)[:, None]\n", "        moved *= 1.0\n"),
    Mutant("training: mean not taken from the inner result", "kernels/combine.py", "tl.where(mask, grad * (x - mean), 0.0)", "tl.where(mask, grad * x, 0.0)"),
    Mutant("training: layer_scale2 without norm2's bias", "kernels/meta4d_train_backward.py", "norm_weight2 * along2 + norm_bias2 * total2", "norm_weight2 * along2"),
    Mutant("training: mean not taken from the hidden", "kernels/mlp_backward.py", "    if HAS_CENTRE:", "    if False:"),
    Mutant("training: no pivot", "kernels/statistics.py", "mean * mean > 16.0 * variance", "mean * mean < 0.0 * variance"),
    Mutant("training: every mean a pivot", "kernels/statistics.py", "mean * mean > 16.0 * variance", "mean * mean >= 0.0 * variance"),
    Mutant("training: parts of the covariance apart left out", "kernels/statistics.py", "(within + apart.T @ apart) / count", "within / count"),
    Mutant("training: sums not taken from the covariance", "kernels/statistics.py", "- (sums / counts).T @ sums", ""),
    Mutant("training: tiles apart left out of the variance", "kernels/statistics.py", "squares.sum(0) + ((means - mean).square() * counts).sum(0)", "squares.sum(0)"),
    Mutant("training: the last part counted as a full one", "kernels/statistics.py", ".clamp(0, size)", ".clamp(size, size)"),
    Mutant("training: parts of the hidden weighed alike", "kernels/meta4d_train.py", "counts.append(len(part))", "counts.append(1)"),
    Mutant("training: float32 statistics from the covariance", "kernels/meta4d_train.py", "if dtype == torch.float32:", "if False:"),
    Mutant("training: given statistics with the convolution's bias", "kernels/meta4d_train.py", "mean1.clone() if bias1 is None else mean1 - bias1", "mean1.clone()"),
    Mutant("training: unbiased variance left out", "effformer/model/batch_norm.py", "var * (count / (count - 1))", "var"),
    Mutant("training: momentum None taken for 0.1", "effformer/model/batch_norm.py", "momentum = 1.0 / float(norm.num_batches_tracked)", "momentum = 0.1"),
    Mutant("training: batches not counted", "effformer/model/batch_norm.py", "norm.num_batches_tracked.add_(1)", "pass"),
    Mutant("processes: norm2's sums of this one alone", "kernels/meta4d_train_backward.py", "summed(total2, along2, group)", "(total2, along2)"),
    Mutant("processes: norm1's sums of this one alone", "kernels/meta4d_train_backward.py", "summed(total1, along1, group) if batched else", "(total1, along1) if batched else"),
    Mutant("processes: rows of all taken for this one's", "kernels/meta4d_train_backward.py", "torch.outer(along_mean, middle) + (own * k1)", "torch.outer(along_mean, middle) + (count * k1)"),
    Mutant("processes: the whole mean of this one's share", "kernels/meta4d_train_backward.py", "own * (k0 + k1 * (wide @ middle))", "own * (k0 + k1 * mean1)"),
    Mutant("processes: every one weighed alike", "kernels/processes.py", "counts, means, variances = every[:, 0],", "counts, means, variances = 0 * every[:, 0] + 1,"),
    Mutant("processes: statistics of o of this one alone", "kernels/meta4d_train.py", "merged_statistics(len(rows), *channel_statistics(branch), group)", "merged_statistics(len(rows), *channel_statistics(branch), \"\")"),
    Mutant("processes: values of this one alone", "effformer/train_ops.py", "found[8] if process_group else count", "count"),
    Mutant("training: float32 gradients not centred", "kernels/meta4d_train_backward.py", "centred = batched and dtype == torch.float32", "centred = False"),
    Mutant("training: running means without the convolution's bias", "effformer/train_ops.py", "one if bias is None else one + bias.detach()", "one"),
    Mutant("training: stochastic depth of tokens left out", "effformer/model/blocks.py", "return result if keep is None else torch.addcmul(x, result - x, keep[:, None, None]).to(x.dtype)", "return result"),
)  # fmt: skip
