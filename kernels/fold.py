"""Parameters as the other kernels take them, read where they lie at each call: one launch for a part of a network.

A network that is not frozen may change between two calls, and PyTorch does not tell of every write into a tensor. So
the kernel is given addresses alone. Its table has a line for each program, which computes a piece of one result:

    affine   scale and shift [C] of a BatchNorm, a layer scale or a bias; the mean of two vectors; float32
    matrix   a copy [n0, n1, n2, n3] in the products' dtype of a parameter of any strides, or the mean of two
    bias     the attention's bias [heads, N, K] as `bias_attention.prepare_bias` returns it, from its table; float32

Parameters may be float32, float16 or bfloat16. Sums are float32, in the order of `effformer.reference`.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .bias_attention import MOST_SCORE, padded_tokens
from .launch import INTERPRETED, Launch

COLUMNS = 16  # of the table
MOST_ELEMENTS = 2**31 - 2**16  # of a result: counted in 32 bits
ALIGNMENT = 16  # bytes, which compiled kernels expect of addresses

AFFINE, MATRIX, BIAS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class NotFoldableError(Exception):
    """Raised for parameters that the kernel cannot read; the message is the reason."""


@triton.jit
def fold_kernel(table_ptr, vectors_ptr, matrices_ptr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    p_line = table_ptr + tl.program_id(0) * COLUMNS
    kind, first, count = tl.load(p_line), tl.load(p_line + 1).to(tl.int32), tl.load(p_line + 2).to(tl.int32)
    target, codes = tl.load(p_line + 3), tl.load(p_line + 5).to(tl.int32)
    factor = tl.load(p_line + 15).to(tl.int32).to(tl.float32, bitcast=True)
    i = first + tl.arange(0, BLOCK)
    mask = i < count
    if kind == AFFINE:
        eps = tl.load(p_line + 12).to(tl.int32).to(tl.float32, bitcast=True)
        scale = _load(p_line + 6, codes, i, mask, 1.0)
        scale *= 1.0 / tl.sqrt_rn(_load(p_line + 9, codes >> 6, i, mask, 1.0) + eps)
        shift = _load(p_line + 7, codes >> 2, i, mask, 0.0) - _load(p_line + 8, codes >> 4, i, mask, 0.0) * scale
        shift += _load(p_line + 10, codes >> 8, i, mask, 0.0) * scale
        gamma = _load(p_line + 11, codes >> 10, i, mask, 1.0) * factor
        second = tl.load(p_line + 4)
        tl.store(vectors_ptr + target + i, scale * gamma, mask=mask & (i.to(tl.int64) * 0 + target >= 0))
        tl.store(vectors_ptr + second + i, shift * gamma, mask=mask)
    elif kind == MATRIX:
        n1, n2 = tl.load(p_line + 8).to(tl.int32), tl.load(p_line + 9).to(tl.int32)
        n3 = tl.load(p_line + 10).to(tl.int32)
        offsets = (i % n3).to(tl.int64) * tl.load(p_line + 14)
        offsets += (i // n3 % n2).to(tl.int64) * tl.load(p_line + 13)
        offsets += (i // n3 // n2 % n1).to(tl.int64) * tl.load(p_line + 12)
        offsets += (i // n3 // n2 // n1).to(tl.int64) * tl.load(p_line + 11)
        value = _load(p_line + 6, codes, offsets, mask, 0.0) + _load(p_line + 7, codes >> 2, offsets, mask, 0.0)
        tl.store(matrices_ptr + target + i, (value * factor).to(matrices_ptr.dtype.element_ty), mask=mask)
    else:
        side = tl.load(p_line + 9).to(tl.int32)
        height, width = tl.load(p_line + 10).to(tl.int32), tl.load(p_line + 11).to(tl.int32)
        keys, tokens = tl.load(p_line + 12).to(tl.int32), height * width
        key, query, head = i % keys, i // keys % tokens, i // keys // tokens
        there = mask & (key < tokens)
        y, next_y, fade_y = _resampled(tl.abs(query // width - key // width), side, height)
        x, next_x, fade_x = _resampled(tl.abs(query % width - key % width), side, width)
        of_head, stride = head.to(tl.int64) * tl.load(p_line + 7), tl.load(p_line + 8)
        upper = _load(p_line + 6, codes, of_head + (y * side + x) * stride, there, 0.0)
        upper = _blended(upper, _load(p_line + 6, codes, of_head + (y * side + next_x) * stride, there, 0.0), fade_x)
        of_head += (next_y - y) * side * stride
        lower = _load(p_line + 6, codes, of_head + (y * side + x) * stride, there, 0.0)
        lower = _blended(lower, _load(p_line + 6, codes, of_head + (y * side + next_x) * stride, there, 0.0), fade_x)
        value = _blended(upper, lower, fade_y)
        limit = MOST_SCORE * factor
        finite = tl.minimum(tl.maximum(value, -limit), limit)
        value = tl.where(tl.abs(value) < float("inf"), finite, value) / factor
        tl.store(vectors_ptr + target + i, tl.where(key < tokens, value, -float("inf")), mask=mask)


@triton.jit
def _load(address_ptr, code, offsets, mask, default):
    """Values in float32 from the address at `address_ptr`, `default` for address 0; `code` is of their dtype."""
    address = tl.load(address_ptr)
    # The address as a block: Triton 3.9's interpreter does not combine a mask with a scalar condition.
    mask &= offsets.to(tl.int64) * 0 + address != 0
    kind = code & 3
    if kind == 0:
        value = tl.load(address.to(tl.pointer_type(tl.float32)) + offsets, mask=mask, other=default)
    elif kind == 1:
        value = tl.load(address.to(tl.pointer_type(tl.float16)) + offsets, mask=mask, other=default).to(tl.float32)
    else:
        value = tl.load(address.to(tl.pointer_type(tl.bfloat16)) + offsets, mask=mask, other=default).to(tl.float32)
    return value


@triton.jit
def _resampled(offset, side, size):
    """Of an offset among `size`: the entry before it among `side`, the one after it, and the weight of the latter."""
    place = offset * ((side - 1).to(tl.float32) / tl.maximum(size - 1, 1).to(tl.float32))
    before = place.to(tl.int32)
    return before, tl.minimum(before + 1, side - 1), place - before


@triton.jit
def _blended(before, after, fade):
    # 0 times an infinite neighbour would be NaN.
    return tl.where(fade > 0, before * (1.0 - fade) + after * fade, before)


@dataclass(frozen=True)
class _Item:
    """Lines of the table that differ in their first element alone; the targets are tensors on the meta device."""

    kind: tl.constexpr
    count: int
    targets: tuple[Tensor | None, ...]
    codes: int
    columns: Sequence[int]
    factor: float


class Parameters:
    """The parameters of a part of a network as arguments of its launches: a source of `effformer.model.steps`.

    The methods return tensors on the meta device, which stand for memory: that of a parameter, where it is as the
    kernels read it, or a result of the fold. Nothing here keeps parameters in memory.

    Args:
        tensors: all that the part reads.
        dtype: of the matrix products.

    Raises (the methods):
        NotFoldableError: for parameters of another dtype, or vectors whose elements lie apart.
    """

    def __init__(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.kept: list[tuple[Tensor, int]] = []  # stands for a parameter, whose place in `tensors` this is
        self.folded: list[Tensor] = []  # stand for results of the fold
        self._places = {tensor.data_ptr(): place for place, tensor in enumerate(tensors)}
        self.addresses: Tensor | None = None  # the fold's table, on the device
        self._items: list[_Item] = []

    def own(self, tensor: Tensor) -> Tensor:
        """A matrix or filter in the products' dtype, filters channels_last; a vector in float32."""
        if tensor.is_meta:  # it is of the fold
            return tensor
        if tensor.ndim == 1:
            return self.upcast(tensor)
        layout = torch.channels_last if tensor.ndim == 4 else torch.contiguous_format
        if tensor.dtype == self.dtype and tensor.is_contiguous(memory_format=layout):
            return self.keep(tensor)
        return self._matrix(tensor, None, 1.0)

    def upcast(self, vector: Tensor) -> Tensor:
        if vector.dtype == torch.float32 and vector.is_contiguous():
            return self.keep(vector)
        return self._affine(bias=vector)[1]

    def keep(self, tensor: Tensor) -> Tensor:
        """A stand-in for the tensor's own memory; for a copy, where its address is no multiple of ALIGNMENT."""
        if tensor.data_ptr() % ALIGNMENT:
            return self._affine(bias=tensor)[1] if tensor.ndim == 1 else self._matrix(tensor, None, 1.0)
        stand_in = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        self.kept.append((stand_in, self._places[tensor.data_ptr()]))
        return stand_in

    def mean(self, one: Tensor, other: Tensor) -> Tensor:
        """(one + other) / 2 of two vectors or matrices of one shape."""
        return (
            self._affine(bias=one, conv_bias=other, factor=0.5)[1] if one.ndim == 1 else self._matrix(one, other, 0.5)
        )

    def fold_batch_norm(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        """(scale, shift) of the arguments of `effformer.reference.fold_batch_norm`."""
        return self._affine(*arguments, scaled=True)

    def fold_layer_scale(self, bias: Tensor, layer_scale: Tensor) -> tuple[Tensor, Tensor]:
        return self._affine(conv_bias=bias, layer_scale=layer_scale, scaled=True)

    def table(self, table: Tensor) -> Tensor:
        return table

    def expand_bias(
        self, table: Tensor, height: int, width: int, resolution: int, key_dim: int, value_dim: int
    ) -> Tensor:
        """The prepared bias of attention over a [height, width] map, its table [heads, resolution**2] resampled."""
        heads, side, tokens = table.shape[0], resolution, height * width
        if table.shape[1] != resolution**2:
            raise NotFoldableError(f"a table has {table.shape[1]} entries, and not {resolution**2}")
        keys = padded_tokens(tokens, key_dim, value_dim, self.dtype, table.device)
        target = torch.empty((heads, tokens, keys), dtype=torch.float32, device="meta")
        columns = (*self._address(table), *table.stride(), side, height, width, keys)
        self._add(BIAS, target.numel(), (target,), _CODES[table.dtype], columns, key_dim**-0.5)
        return target

    def launch(self, places: Mapping[int, int], bytes: int, device: torch.device) -> Launch | None:
        """The fold, given the byte offset of each of `folded` (by `id`); None where there is nothing to do.

        The arguments vectors_ptr and matrices_ptr are the memory that the offsets count from, of so many bytes.
        """
        if not self._items:
            return None
        block = block_on(device)
        self.addresses = lines = torch.cat([_lines(item, places, block) for item in self._items]).to(device)
        vectors, matrices = (
            torch.empty(bytes // dtype.itemsize, dtype=dtype, device="meta") for dtype in (torch.float32, self.dtype)
        )
        return Launch(
            fold_kernel,
            len(lines),
            {"table_ptr": lines, "vectors_ptr": vectors, "matrices_ptr": matrices},
            {"COLUMNS": COLUMNS, "BLOCK": block},
            None,
            num_stages=1,
        )

    def _affine(
        self,
        conv_bias: Tensor | None = None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        mean: Tensor | None = None,
        var: Tensor | None = None,
        eps: float = 0.0,
        layer_scale: Tensor | None = None,
        *,
        factor: float = 1.0,
        scaled: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """(scale, shift), of which the first is computed where it is `scaled`."""
        sources = weight, bias, mean, var, conv_bias, layer_scale
        size = next(len(source) for source in sources if source is not None)
        scale, shift = (torch.empty(size, dtype=torch.float32, device="meta") for _ in range(2))
        if any(source is not None and (len(source) != size or not source.is_contiguous()) for source in sources):
            raise NotFoldableError("elements of a vector lie apart")
        columns = (*self._address(*sources), _bits(eps))
        codes = sum(_CODES[source.dtype] << 2 * place for place, source in enumerate(sources) if source is not None)
        self._add(AFFINE, size, (scale if scaled else None, shift), codes, columns, factor)
        return scale, shift

    def _matrix(self, one: Tensor, other: Tensor | None, factor: float) -> Tensor:
        if other is not None and (other.shape, other.stride()) != (one.shape, one.stride()):
            raise NotFoldableError("two matrices differ in their layout")
        ordered = one.permute(0, 2, 3, 1) if one.ndim == 4 else one
        target = torch.empty(ordered.shape, dtype=self.dtype, device="meta")
        sizes = (*(1,) * (4 - one.ndim), *ordered.shape)
        strides = (*(0,) * (4 - one.ndim), *ordered.stride())
        columns = (*self._address(one, other), *sizes[1:], *strides)
        codes = _CODES[one.dtype] | (0 if other is None else _CODES[other.dtype] << 2)
        self._add(MATRIX, one.numel(), (target,), codes, columns, factor)
        return target.permute(0, 3, 1, 2) if one.ndim == 4 else target

    def _address(self, *tensors: Tensor | None) -> list[int]:
        for tensor in tensors:
            if tensor is not None and tensor.data_ptr() not in self._places:
                raise NotFoldableError("a weight is no parameter or buffer of its module")
            if tensor is not None and tensor.dtype not in _CODES:
                raise NotFoldableError(f"a parameter is {tensor.dtype}")
        return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]

    def _add(
        self,
        kind: tl.constexpr,
        count: int,
        targets: tuple[Tensor | None, ...],
        codes: int,
        columns: Sequence[int],
        factor: float,
    ) -> None:
        if count > MOST_ELEMENTS:
            raise NotFoldableError(f"a parameter has {count} elements")
        self.folded += [target for target in targets if target is not None]
        self._items.append(_Item(kind, count, targets, codes, columns, factor))


def block_on(device: torch.device) -> int:
    """Elements of a program. The interpreter takes a millisecond for a program, however small."""
    return 1 << 15 if INTERPRETED and device.type == "cpu" else 2048


def _lines(item: _Item, places: Mapping[int, int], block: int) -> Tensor:
    """Lines of the table, int64 [programs, COLUMNS]."""
    targets = [-1 if one is None else places[id(one)] // one.element_size() for one in item.targets]
    line = [item.kind.value, 0, item.count, *targets, *(0,) * (2 - len(targets)), item.codes, *item.columns]
    line += [0] * (COLUMNS - 1 - len(line)) + [_bits(item.factor)]
    lines = torch.tensor([line], device="cpu").repeat(-(-item.count // block), 1)
    lines[:, 1] = block * torch.arange(len(lines), device="cpu")
    return lines


def _bits(value: float) -> int:
    """A float32 as an integer of the same bits."""
    return int(struct.unpack("i", struct.pack("f", value))[0])
