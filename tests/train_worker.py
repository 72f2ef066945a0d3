"""A process without Triton's interpreter: training by the kernels as compiled, as JSON (`test_train_mode.py`)."""

from __future__ import annotations

import json

import torch
import train_cases
from effformer.bench.offline.execution import executing
from effformer.kernels.tiling.device import TARGETS


def main() -> None:
    torch.set_num_threads(1)
    found = []
    for capability in (80, 90, 100):
        for shape, keep in (((2, 48, 9, 8), True), ((1, 144, 7, 7), False)):
            torch.manual_seed(0)
            case = train_cases.draw(shape, torch.bfloat16, hidden=192, mean=2.0, keep=keep)
            with executing(TARGETS[capability]) as execution:
                wrong = train_cases.within(case)
            found.append(
                {
                    "what": f"{shape} on sm_{capability}",
                    "wrong": wrong,
                    "faults": [str(fault) for _, fault in execution.faults],
                    "kernels": sorted({one.launch.kernel.__name__ for one in execution.executed}),
                }
            )
    print(json.dumps(found))  # noqa: T201


if __name__ == "__main__":
    main()
