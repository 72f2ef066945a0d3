"""The kernels compiled for real GPUs, which needs none: a process of its own, since this one interprets."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

ODD = """
import torch
from effformer.bench.offline import compile_launch
from effformer.kernels.bias_attention import bias_attention_launch
from effformer.kernels.conv_mlp import conv_mlp_launches
from effformer.kernels.meta4d import meta4d_launches
from effformer.kernels.pool_mixer import pool_mixer_launch

def empty(*shape, of=torch.float32):
    return torch.empty(shape, dtype=of, device="meta")

half = torch.float16
maps = [empty(b, h, w, c, of=half).permute(0, 3, 1, 2) for b, c, h, w in ((1, 1, 1, 1), (1, 48, 1, 7), (3, 5, 7, 1), (1, 300, 1, 1))]
maps.append(empty(1, 5, 5, 48, of=half).permute(0, 3, 1, 2).expand(4, -1, -1, -1))
maps.append(empty(2**33, of=half).as_strided((2, 48, 4096, 4096), (2**32, 1, 2**31 + 8, 2**18)))
maps.append(empty(2**12, 2**10, 2**10, 3, of=half).permute(0, 3, 1, 2))  # 2**32 rows
launches = [pool_mixer_launch(x, empty(48), x) for x in (empty(2, 48, 7, 7, of=half), empty(2, 48, 7, 1, of=half))]
for x in maps:
    c = empty(x.shape[1])
    h = empty(2 * x.shape[1] - 1)
    out = empty(x.shape[0], *x.shape[2:], x.shape[1], of=half).permute(0, 3, 1, 2)
    mlp = (empty(len(h), len(c), of=half), h, h, empty(len(c), len(h), of=half), c, c, "gelu")
    launches += meta4d_launches(x, c, *mlp, out=out) + conv_mlp_launches(x, *mlp, out=out)
    launches.append(pool_mixer_launch(x, c, out))
for tokens, heads, key, value in ((1, 1, 1, 1), (2, 3, 5, 7), (70, 1, 300, 20), (40, 1, 48, 320)):
    qkv = empty(1, tokens, heads * (2 * key + value), of=half)
    launches.append(bias_attention_launch(qkv, empty(heads, tokens, tokens), heads, key, empty(1, tokens, heads * value, of=half)))
for launch in launches:
    assert compile_launch(launch, 90).shared_memory <= 232448, launch
print(len(launches))
"""

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


def test_odd_sizes_compile() -> None:
    """An argument of 1 becomes a constant, one beyond 2**31 takes 64 bits: the interpreter knows neither."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", ODD], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 25
