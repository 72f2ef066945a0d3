"""A process without Triton's interpreter: samples the programs of operations, and prints what it found as JSON."""

from __future__ import annotations

import json
import sys

import torch
from effformer.bench.offline.execution import executing
from effformer.bench.offline.ptx.machine import Options
from effformer.bench.offline.sampling import first_middle_last, in_turn, sample
from effformer.kernels.tiling.device import TARGETS

from effformer.testing import draw_case

CASES = {
    "meta4d": ((6, 448, 7, 7), {"hidden": 448}),  # pooling and two products, or a split MLP and its sum
    "attention_mixer": ((12, 49, 96), {"num_heads": 2, "key_dim": 32, "value_dim": 64}),
}


def main() -> None:
    torch.manual_seed(0)
    report = []
    for capability in (80, 100):
        for operation, (shape, options) in CASES.items():
            case = draw_case(operation, shape, torch.bfloat16, **options)
            device = TARGETS[capability]
            chosen = sample(lambda: case.run("triton"), device)  # noqa: B023
            with executing(device, options=Options(), choose=in_turn(chosen.programs)) as part:
                sampled = case.run("triton")
            with executing(device, options=Options()) as whole:
                expected = case.run("triton")
            mask = part.written(sampled)
            report.append(
                {
                    "name": f"{operation} sm_{capability}",
                    "grids": [one.launch.grid for one in whole.executed],
                    "programs": [one.outcome.programs for one in part.executed],
                    "last": chosen.programs[-1] == first_middle_last(whole.executed[-1].launch.grid),
                    "faults": [str(fault) for execution in (part, whole) for _, fault in execution.faults]
                    + [str(fault) for faults in chosen.faults for fault in faults],
                    "written": int(mask.sum()),
                    "elements": mask.numel(),
                    "all": bool(whole.written(expected).all()),
                    "same": torch.equal(sampled[mask], expected[mask]),
                }
            )
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main()
