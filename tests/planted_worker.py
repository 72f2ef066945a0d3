"""A process without Triton's interpreter: plants one fault of most kinds, and prints the records as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace

import torch
from effformer.bench.offline.planted import Planted, plant
from effformer.bench.offline.ptx_changes import changes
from effformer.bench.offline.small_calls import CALLS, CompiledCall, family

# target, kernel, kind, which statement of those that have it
FAULTS = (
    (80, "mlp", "barrier removed", -1),
    (80, "mlp", "warp barrier removed", 0),
    (80, "mlp", "swizzle changed", -1),
    (90, "mlp", "wait removed", 0),
    (90, "mlp", "fence removed", 0),
    (90, "mlp", "matrix instruction changed", -1),
    (90, "pool_mixer", "mask inverted", -1),
    (90, "pool_mixer", "index changed", -1),
    (90, "token_mean", "shuffle changed", 0),
    (100, "conv_norm", "commit removed", -1),
    (100, "conv_norm", "wait weakened", 0),
    (100, "conv_norm", "mask dropped", -1),
    (100, "conv_norm", "shuffle changed", 0),  # redundant: all lanes hold the same
)


def planted() -> Iterator[Planted]:
    calls: dict[tuple[int, str], CompiledCall] = {}
    for capability, name, kind, number in FAULTS:
        small = next(small for small in CALLS if name in small.kernels)
        call = calls.setdefault((capability, name), CompiledCall(small, capability, torch.bfloat16))
        one = next(one for one in call.compiled[0] if family(one) == name)
        yield plant(call, one, changes(one.program, one.ptx)[kind][number])


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps([asdict(replace(one, found=one.found[:1])) for one in planted()]))  # noqa: T201
