"""What the network is meant to reach on an H200 in 16 bit at 224x224, and whether it did.

A target that is not measured in full, against every rung and with a finite error beside the speed, is unmeasured. One
whose figures have a remark beside them (a machine that drifted, an option that did not act) is in doubt.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from ...config import PRESETS
from ..measure.roofline import network_parts
from .comparison import KERNELS, Comparison, Measured, Result
from .tables import Table, share, times

SIZE = "224x224"
DTYPES = ("bfloat16", "float16")
BATCHES = (1, 8, 64, 256, 1024)
FLOOR_SHARE = 0.55
MEMORY_SHARE = 0.5


@dataclass(frozen=True)
class Network:
    throughput: float
    latency: float


NETWORKS = {
    "efficientformer_l1": Network(throughput=2.5, latency=2.5),
    "efficientformer_l3": Network(throughput=2.0, latency=2.0),
    "efficientformer_l7": Network(throughput=1.6, latency=1.5),
}


def target_table(measured: Measured) -> Table:
    """Every target, in bfloat16 and float16, with what was measured: "met", "missed" or "unmeasured"."""
    rows = [row for dtype in DTYPES for row in (*_networks(measured, dtype), *_kernels(measured, dtype))]
    rows.append(_losses(measured))
    remark = "Set for an H200, 16 bit, 224x224, against the baseline of the same run; operations at batch 256."
    return Table("Targets", ("target", "dtype", "at least / at most", "measured", "outcome"), tuple(rows), remark)


def _networks(measured: Measured, dtype: str) -> Iterator[tuple[str, ...]]:
    cells = {(c.op, c.batch): c for c in measured.backbones if c.dtype == dtype and c.size == SIZE}
    for name, target in NETWORKS.items():
        large, single = cells.get((name, 256)), cells.get((name, 1))
        label, doubted = f"{name}, batch 256: ", _is_doubted(large)
        found = _of(large, lambda cell: cell.speedup("img/s"))
        yield _row(f"{label}throughput over the baseline", dtype, found, target.throughput, times, doubt=doubted)
        found = _of(large, _floor_share)
        yield _row(f"{label}of the floor's speed", dtype, found, FLOOR_SHARE, share, doubt=doubted)
        found = _of(large, _memory)
        yield _row(
            f"{label}peak activation memory, ours over the baseline",
            dtype,
            found,
            MEMORY_SHARE,
            share,
            most=True,
            doubt=doubted,
        )
        found = _of(single, lambda cell: cell.speedup("ms"))
        yield _row(
            f"{name}, batch 1: latency, baseline over ours",
            dtype,
            found,
            target.latency,
            times,
            doubt=_is_doubted(single),
        )


def _is_doubted(cell: Comparison | None) -> bool:
    return cell is not None and bool(cell.doubts)


def _floor_share(cell: Comparison) -> float | None:
    return None if cell.ours is None else cell.ours.roofline


def _memory(cell: Comparison) -> float | None:
    """Activations of ours over the baseline's."""
    ours, baseline = cell.ours, cell.baseline("img/s")
    if ours is None or baseline is None:
        return None
    of_ours, of_baseline = (result.evidence.get("activations MiB") for result in (ours, baseline))
    return of_ours / of_baseline if of_ours is not None and of_baseline else None


def _kernels(measured: Measured, dtype: str) -> Iterator[tuple[str, ...]]:
    cells = {(c.op, c.shape): c for c in measured.kernels if c.dtype == dtype}
    maps, tokens = _shapes("meta4d"), _shapes("linear_mlp")
    for target, operation, shapes, least in (
        ("pool mixer: of the measured bandwidth", "pool_mixer", maps, 0.85),
        ("Meta4D: of the floor, least of all stages", "meta4d", maps, FLOOR_SHARE),
        ("MLP of a 4D block: of the floor, least of all stages", "conv_mlp", maps, FLOOR_SHARE),
        ("MLP of a 3D block: of the floor, least of all networks", "linear_mlp", tokens, FLOOR_SHARE),
    ):
        found = [_of(cells.get((operation, shape)), _floor_share) for shape in shapes]
        yield _row(target, dtype, _least(found), least, share)
    attention = [c for c in measured.kernels if c.op == "bias_attention" and c.dtype == dtype and _is_49_tokens(c)]
    found = [_of(cell, _over_sdpa) for cell in attention]
    yield _row("attention at 49 tokens: over SDPA with a padded bias", dtype, _least(found), 3.0, times)


def _shapes(operation: str) -> list[tuple[int, ...]]:
    """Its inputs in the networks, at batch 256 and 224x224."""
    parts = [part for name in NETWORKS for part in network_parts(PRESETS[name], 256, (224, 224), torch.bfloat16)]
    return [part.shape for part in parts if part.op == operation]


def _is_49_tokens(cell: Comparison) -> bool:
    return cell.batch == 256 and cell.shape[1] == 49


def _over_sdpa(cell: Comparison) -> float | None:
    sdpa = cell.results.get("SDPA")
    if sdpa is None or cell.ours is None or not (sdpa.ran("ms") and cell.ours.ran("ms")):
        return None
    return (sdpa.value("ms") or math.nan) / (cell.ours.value("ms") or math.nan)


def _losses(measured: Measured) -> tuple[str, ...]:
    cells = [cell for cell in measured.backbones if cell.dtype in DTYPES]
    found = [(cell, _of(cell, _slowest)) for cell in cells]
    known = [(cell, ratio) for cell, ratio in found if ratio is not None]
    slower = sum(not ratio >= 1 for _, ratio in known)
    slower += sum(
        bool(cell.ours and not cell.ours.ran("ms") and cell.baseline("ms")) for cell, ratio in found if ratio is None
    )
    wanted = {(name, dtype, batch) for name in NETWORKS for dtype in DTYPES for batch in BATCHES}
    tried = {
        (cell.op, cell.dtype, cell.batch) for cell in cells if cell.size == SIZE and _of(cell, _slowest) is not None
    }
    outcome = "missed" if slower else "met" if wanted <= tried else "unmeasured"
    outcome += ", in doubt" if known and any(cell.doubts for cell, _ in known) else ""
    target = "no network, batch, dtype and size where ours is slower than the baseline, or takes longer"
    return target, "both", "0", f"{slower} of {len(known)} measured", outcome


def _slowest(cell: Comparison) -> float | None:
    return _least([cell.speedup("img/s"), cell.speedup("ms")])


def _of(cell: Comparison | None, figure: Callable[[Comparison], float | None]) -> float | None:
    """The figure, if its error was measured too and is finite, and no rung of a network was left out."""
    if cell is None or cell.ours is None or not _has_error(cell.ours):
        return None
    return figure(cell) if cell.file == KERNELS or cell.has_every_rung else None


def _has_error(result: Result) -> bool:
    value = result.value("max error")
    return value is not None and math.isfinite(value)


def _least(found: Sequence[float | None]) -> float | None:
    """The least, NaN if one is; None if one is missing."""
    known = [value for value in found if value is not None]
    if not known or len(known) < len(found):
        return None
    return math.nan if any(map(math.isnan, known)) else min(known)


def _row(
    target: str,
    dtype: str,
    found: float | None,
    bound: float,
    words: Callable[[float | None], str],
    *,
    most: bool = False,
    doubt: bool = False,
) -> tuple[str, ...]:
    outcome = "unmeasured"
    if found is not None:
        outcome = "met" if (found <= bound if most else found >= bound) else "missed"
        outcome += ", in doubt" if doubt else ""
    return target, dtype, words(bound), words(found), outcome
