"""A process without Triton's interpreter: counts launches anew that have records; prints them as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict

import torch
from effformer.bench.offline.counted import count_network

L1 = "efficientformer_l1"
# Launches of most kernels, on every kind of matrix unit; each takes a second or less.
PARTS: list[tuple[int, int, set[str]]] = [
    (256, 90, {"stem, 1st", "stem, 2nd", "downsampling 1", "stage 1, 4D", "head"}),
    (1, 90, {"stage 2, 4D", "stage 4, attention", "stage 4, MLP", "head"}),
    (256, 80, {"stem, 1st", "stem, 2nd"}),
    (1, 80, {"head"}),
    (256, 100, {"stage 1, 4D"}),
]


def main() -> None:
    torch.set_num_threads(1)
    for batch, capability, parts in PARTS:
        for record in count_network(L1, batch, torch.bfloat16, capability, wanted=lambda work: work.part in parts):  # noqa: B023
            print(json.dumps(asdict(record)))  # noqa: T201


if __name__ == "__main__":
    main()
