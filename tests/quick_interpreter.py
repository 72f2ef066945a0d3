"""Triton's interpreter at three times its speed, for tests: the same results, with less Python for each operation.

A profile of the kernels' tests showed half of their time in four places: a table of dtypes that is built at each
operation, patches of `triton.language` at each call of a helper, a check of integers for overflow, itself interpreted,
and shapes that are wrapped and compared again and again. test_quick_interpreter.py compares both.

The check for overflow raises an error here. Triton's own asserts it where kernels are compiled for debugging, and is
silent in the interpreter.
"""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import triton
import triton.language as tl
from triton.language import core
from triton.runtime import interpreter

# The Tritons in which these functions were read and compared; others keep theirs.
KNOWN = triton.__version__.startswith(("3.6.", "3.7.", "3.9."))

_OPERATIONS = {"add": operator.add, "sub": operator.sub, "mul": operator.mul}


def get_np_dtype(triton_type: Any) -> np.dtype[Any]:
    scalar = triton_type.element_ty if isinstance(triton_type, core.block_type) else triton_type
    return np.dtype(np.uint64) if isinstance(scalar, core.pointer_type) else _dtype_named(scalar.name)


@functools.cache
def _dtype_named(name: str) -> np.dtype[Any]:
    return _get_np_dtype(core.dtype(name))


_patched: dict[Any, Any] = {}  # language module -> the function that stands in it while it is patched


def patch_lang(function: Any) -> Any:
    """Patch the language modules that `function` sees, unless the kernel that calls it has."""
    modules = _modules(function)
    if all(_patched.get(module) is module.static_range for module in modules):
        return interpreter._LangPatchScope()
    scope = _patch_lang(function)
    _patched.update({module: module.static_range for module in modules})
    return scope


@functools.cache
def _modules(function: Any) -> tuple[Any, ...]:
    values = function.__globals__.values()
    return tuple(module for module in (tl, core) if any(value is module for value in values))


def sanitize_overflow(self: Any, lhs: Any, rhs: Any, binary_op: Callable[..., Any]) -> None:
    """Raise an AssertionError if the exact result of `binary_op` on integers of up to 32 bits does not fit them."""
    kind = lhs.type.scalar
    if kind.int_bitwidth >= 64 or not self.builder.options.sanitize_overflow:
        return
    assert kind == rhs.type.scalar, (kind, rhs.type.scalar)
    exact = _OPERATIONS[binary_op.__name__](*(side.handle.data.astype(np.int64) for side in (lhs, rhs)))
    if exact.size and not (kind.get_int_min_value() <= exact.min() and exact.max() <= kind.get_int_max_value()):
        raise AssertionError(f"int{kind.int_bitwidth} overflow detected for operation {binary_op.__name__}")


def init_block_type(self: Any, element_ty: Any, shape: Any) -> None:
    sizes = tuple(size.value if isinstance(size, core.constexpr) else size for size in shape)
    self.element_ty, self._sizes = element_ty, sizes
    self.shape, self.numel, shown = _block(sizes)
    self.name = f"<{shown}, {element_ty.name}>"


@functools.cache
def _block(sizes: tuple[int, ...]) -> tuple[Any, int, str]:
    if not sizes:
        raise TypeError("0d block_type is forbidden")
    shape = core.tuple(sizes)
    return shape, core.validate_block_shape(sizes), str(shape)


def init_tensor(self: Any, handle: Any, type: Any) -> None:
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = _wrapped(_sizes(type))


def _sizes(triton_type: Any) -> tuple[int, ...]:
    if not isinstance(triton_type, core.block_type):
        return ()
    try:
        return triton_type._sizes
    except AttributeError:  # made by the original
        return tuple(triton_type.shape)


@functools.cache
def _wrapped(sizes: tuple[int, ...]) -> tuple[Any, Any]:
    numel = functools.reduce(operator.mul, sizes, 1)
    return core.tuple([core.constexpr(size) for size in sizes]), core.constexpr(numel)


def broadcast_impl_value(self: Any, lhs: Any, rhs: Any) -> tuple[Any, Any]:
    left, right = _sizes(lhs.type), _sizes(rhs.type)
    if left == right:
        return lhs, rhs
    if len(left) != len(right) or not left:
        return _broadcast_impl_value(self, lhs, rhs)
    sizes = tuple(b if a == 1 else a for a, b in zip(left, right, strict=True))
    if any(size not in (1, whole) for side in (left, right) for size, whole in zip(side, sizes, strict=True)):
        return _broadcast_impl_value(self, lhs, rhs)  # which raises the error

    def spread(side: Any, before: tuple[int, ...]) -> Any:
        if before == sizes:
            return side
        data = np.broadcast_to(side.handle.data, sizes)
        handle = interpreter.TensorHandle(data, side.handle.dtype)
        return core.tensor(handle, core.block_type(side.type.element_ty, sizes))

    return spread(lhs, left), spread(rhs, right)


_SEMANTIC = type(getattr(interpreter, "interpreter_semantic", None))
_PLACES = (
    (interpreter, "_get_np_dtype"),
    (interpreter, "_patch_lang"),
    (_SEMANTIC, "binary_op_sanitize_overflow_impl"),
    (core.block_type, "__init__"),
    (core.tensor, "__init__"),
    (_SEMANTIC, "broadcast_impl_value"),
)
QUICK = get_np_dtype, patch_lang, sanitize_overflow, init_block_type, init_tensor, broadcast_impl_value
ORIGINAL: tuple[Any, ...] = tuple(getattr(owner, name, None) for owner, name in _PLACES)  # None in other Tritons
_get_np_dtype, _patch_lang, *_, _broadcast_impl_value = ORIGINAL


@contextlib.contextmanager
def using(functions: tuple[Callable[..., Any], ...]) -> Iterator[None]:
    """Within it the interpreter has these functions: QUICK, or ORIGINAL."""
    before = [getattr(owner, name) for owner, name in _PLACES]
    for (owner, name), function in zip(_PLACES, functions, strict=True):
        setattr(owner, name, function)
    try:
        yield
    finally:
        for (owner, name), function in zip(_PLACES, before, strict=True):
            setattr(owner, name, function)
