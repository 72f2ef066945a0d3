"""The device that tests use, a GPU or a CPU with Triton's interpreter, and the accuracy rule there.

On a GPU `measured` notes errors beside eager's, and `notes` hands them to the fixture that reports them with the test.
"""

from __future__ import annotations

import math
import os
from typing import Any

import pytest
import torch
from effformer.kernels import launch
from effformer.kernels.bias_attention import bias_attention_launch, new_values, prepare_bias
from effformer.kernels.launch import INTERPRETED

from effformer.testing import Accuracy, Case

DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")
ON_GPU = DEVICE.type == "cuda"
# Whether tests marked `gpu` run here nevertheless, tiny, so that mistakes in them show without a GPU.
REHEARSED = not ON_GPU and os.environ.get("EFFFORMER_REHEARSE") == "1"

DTYPES = [torch.float16, torch.float32] + [torch.bfloat16] * ON_GPU  # the interpreter has no bfloat16

# Of results that one algorithm computes on a CPU, and several on a GPU: cuDNN's for each layout, sums in any order.
SLACK = 1e-4 if ON_GPU else 1e-5

_LEAST_ELEMENTS = 1000  # of a result whose errors say something as a ratio

_notes: dict[tuple[str, str], dict[str, float]] = {}


def check(case: Case, ulps: float = 2.0, name: str | None = None) -> None:
    """The accuracy rule for `case` on the kernels, interpreted with `ulps` in place of its 2.

    A GPU gets the 2: it sums in an order that depends on the configuration, and eager in one of its own.
    """
    found = case.accuracy("triton")
    measured(name or case.operation, case.arguments[0], found)
    assert found.passes(ulps if INTERPRETED else max(ulps, 2.0)), found
    assert found.max_error > 0 or found.eager_max_error == 0 or ulps >= 2, (
        "a result that is exactly float64's was not computed in this dtype"
    )


class Prepared(Case):
    """A call of `bias_attention` whose bias is prepared before the kernel sees it."""

    @torch.no_grad()
    def run(self, backend: str) -> torch.Tensor:
        if backend != "triton":
            return super().run(backend)
        (qkv, bias), (heads, key_dim) = self.arguments, self.options.values()
        out = new_values(qkv, heads, key_dim)
        prepared = prepare_bias(bias, key_dim, out.shape[2] // heads, qkv.dtype)
        launch.run(bias_attention_launch(qkv, prepared, heads, key_dim, out, prepared=True))
        return out


def prepared(case: Case) -> Prepared:
    """The same call with a prepared bias."""
    return Prepared(case.operation, case.arguments, case.options)


def measured(what: str, result: torch.Tensor, found: Accuracy) -> None:
    """Note the errors of `result`, which is of the operation, block or network `what`."""
    slack = max(found.max_error - 2 * found.eager_max_error, found.mean_error - 1.5 * found.eager_mean_error, 0.0)
    note = {"ulps": slack / found.ulp}  # of the 2 that the rule allows
    if result.numel() >= _LEAST_ELEMENTS and found.eager_mean_error > 0:
        note["max"] = found.max_error / found.eager_max_error
        note["mean"] = found.mean_error / found.eager_mean_error
    worst = _notes.setdefault((what, str(result.dtype).removeprefix("torch.")), {})
    for name, value in note.items():
        worst[name] = max(worst.get(name, -math.inf), value)


def notes() -> list[dict[str, Any]]:
    """The worst of what was measured since the last call, by operation and dtype."""
    found = [{"what": what, "dtype": dtype} | worst for (what, dtype), worst in _notes.items()]
    _notes.clear()
    return found


def room(size: int) -> None:
    """Skip the test unless `size` bytes of the GPU's memory are free (on a CPU, untouched memory costs nothing)."""
    if ON_GPU:
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0]
        if free < size:
            pytest.skip(f"needs {size / 2**30:.0f} GiB of the GPU's memory, of which {free / 2**30:.0f} are free")


def same(one: torch.Tensor, other: torch.Tensor) -> None:
    """Equal in every element, NaN to NaN."""
    if torch.equal(one, other):
        return
    assert one.shape == other.shape
    differ = (one != other) & ~(one.isnan() & other.isnan())
    if count := int(differ.sum()):
        place = tuple(differ.nonzero()[0].tolist())
        most = (one[differ].double() - other[differ].double()).abs().max().item()
        raise AssertionError(
            f"{count} of {one.numel()} elements differ, by up to {most:.3e}; the first at {place}: "
            f"{one[place].item()!r} and {other[place].item()!r}"
        )


def finite(x: torch.Tensor) -> None:
    """No NaN, no infinity."""
    if count := int((~x.isfinite()).sum()):
        raise AssertionError(f"{count} of {x.numel()} elements are not finite")


def id_of(value: object) -> str | None:
    """Names of dtypes in tests' ids; others as pytest has them."""
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None
