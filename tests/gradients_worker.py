"""A process without Triton's interpreter: gradients by the kernels as compiled for GPUs, as JSON (`test_backward.py`)."""

from __future__ import annotations

import json

import gradient_cases
import torch
from effformer.bench.offline.execution import executing
from effformer.kernels.tiling.device import TARGETS

from effformer.testing import draw_case

CASES = (
    ("meta4d", (2, 48, 9, 8), {"hidden": 192}),
    ("conv_mlp", (3, 20, 5, 7), {"hidden": 56}),
    ("meta4d", (1, 224, 7, 7), {"hidden": 448}),
    ("pool_mixer", (2, 40, 5, 7), {}),
    ("bias_attention", (2, 70, 2 * (2 * 32 + 128)), {"num_heads": 2, "key_dim": 32, "value_dim": 128}),
    ("attention_mixer", (2, 49, 80), {"num_heads": 2, "key_dim": 32, "value_dim": 128}),
    ("linear_mlp", (2, 49, 80), {"hidden": 320}),
)


def main() -> None:
    torch.set_num_threads(1)
    found = []
    for capability in (80, 90, 100):
        for operation, shape, options in CASES:
            torch.manual_seed(0)
            case = draw_case(operation, shape, torch.bfloat16, **options)
            with executing(TARGETS[capability]) as execution:
                checked = gradient_cases.errors(case)
            found.append(
                {
                    "what": f"{operation} {shape} on sm_{capability}",
                    "wrong": {name: str(error) for name, (error, within) in checked.items() if not within},
                    "faults": [str(fault) for _, fault in execution.faults],
                    "kernels": sorted({one.launch.kernel.__name__ for one in execution.executed}),
                }
            )
    print(json.dumps(found))  # noqa: T201


if __name__ == "__main__":
    main()
