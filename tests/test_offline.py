"""The kernels compiled for real GPUs, which needs none: a process of its own, since this one interprets."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

COMPILE = """
import json, sys, torch
from effformer.bench.offline import DEVICES, compile_launch, network_launches
target, dtype = int(sys.argv[1]), getattr(torch, sys.argv[2])
seen = set()
for operator, launch in network_launches("efficientformer_l1", dtype, DEVICES[target]):
    key = str((launch.kernel.__name__, sorted(launch.constants.items(), key=str)))
    if key in seen:
        continue
    seen.add(key)
    found = compile_launch(launch, target)
    print(json.dumps({
        "operator": operator, "kernel": launch.kernel.__name__, "registers": found.registers,
        "room": DEVICES[target].shared_memory - found.shared_memory, "loop_spills": found.loop_spills,
        "core": found.tensor_core[0], "waits": found.loop["WARPGROUP"], "products": found.loop["HGMMA"],
    }))
"""


@pytest.mark.parametrize(("target", "dtype", "core"), [(90, "bfloat16", "HGMMA"), (80, "float16", "HMMA")])
def test_l1_compiles_without_spills_in_loops(target: int, dtype: str, core: str) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE, str(target), dtype]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    records = [json.loads(line) for line in done.stdout.splitlines()]
    kernels = {record["kernel"] for record in records}
    assert kernels == {"mlp_kernel", "pool_mixer_kernel", "linear_kernel", "layer_norm_kernel", "bias_attention_kernel"}
    for record in records:
        assert record["loop_spills"] == 0, record
        assert record["room"] >= 0, record
        if record["kernel"] not in ("pool_mixer_kernel", "layer_norm_kernel"):
            assert record["core"] == core, record
        # ptxas that serialises asynchronous products waits about twice for each
        assert record["waits"] <= record["products"], record
