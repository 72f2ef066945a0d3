"""The kernels compiled for real GPUs, which needs none: in processes of their own, since this one interprets."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from multiprocessing import active_children
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from effformer.bench.offline import audit
from effformer.bench.offline import compile as offline
from effformer.bench.offline.compile import Compiled
from effformer.bench.offline.workers import compilers
from effformer.kernels.tiling.device import HOPPER

COMPILED = Compiled(
    registers=128,
    shared_memory=1000,
    spill_stores=3,
    spill_loads=4,
    loop_spills=0,
    tensor_cores={"HGMMA": 11},
    waits=2,
    products=11,
    instructions=1000,
    loop_instructions=320,
    loop_mufu=32,
)

PRODUCTS = {
    "conv_norm_kernel",
    "mlp_kernel",
    "mlp_backward_kernel",
    "split_mlp_kernel",
    "linear_kernel",
    "bias_attention_kernel",
    "attention_backward_kernel",
    "attention_rows_backward_kernel",
    "attention_tokens_backward_kernel",
    "attention_bias_backward_kernel",
    "gram_kernel",
}


def run(*arguments: str, code: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, *(["-c", code] if code else ["-m", "effformer.bench.offline.audit"]), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_l1_on_hopper(tmp_path: Path) -> None:
    """The quick part of `make audit`."""
    file = tmp_path / "audit.jsonl"
    done = run("--models", "efficientformer_l1", "--targets", "90", "--dtypes", "bfloat16", "--output", str(file))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert {record["kernel"] for record in records} == {
        "mlp_kernel",
        "split_mlp_kernel",
        "split_sum_kernel",
        "pool_mixer_kernel",
        "linear_kernel",
        "layer_norm_kernel",
        "bias_attention_kernel",
        "conv_norm_kernel",
        "head_kernel",
        "token_mean_kernel",
        "fold_kernel",
        "mlp_backward_kernel",
        "attention_backward_kernel",
        "attention_rows_backward_kernel",
        "attention_tokens_backward_kernel",
        "attention_bias_backward_kernel",
        "layer_norm_backward_kernel",
        "channel_statistics_kernel",
        "combine_kernel",
        "gradient_sums_kernel",
        "gram_kernel",
        "pool_keep_kernel",
        "pool_mixer_backward_kernel",
    }
    for record in records:
        compiled, kernel = record["compiled"], record["kernel"]
        assert record["faults"] == []
        assert 0 < compiled["registers"] <= 255
        assert compiled["shared_memory"] <= record["shared_memory_limit"] == 232_448
        assert compiled["loop_spills"] == 0
        assert (record["target"], record["dtype"], record["tensor_core"]) == ("sm_90", "bfloat16", "HGMMA")
        assert bool(compiled["tensor_cores"]) == (kernel in PRODUCTS)
        assert (record["instructions_per_hidden"] is not None) == (kernel in ("mlp_kernel", "split_mlp_kernel"))
        if kernel == "mlp_kernel":  # GELU alone is seven
            assert 7 < record["instructions_per_hidden"] < 20
            assert record["mufu_per_hidden"] == 1
        assert any(
            record["shapes"][0] in line.replace("  ", " ") or kernel in line for line in done.stdout.splitlines()
        )
    assert "worst registers" in done.stdout
    assert "0 with faults, 0 configurations missing or unused" in done.stdout


BAD = """
import json, sys
from effformer.bench.offline import audit
from effformer.kernels.tiling.table import read_entry
config = {"operation": "meta4d", "dtype": "float16", "where": {}}
found = []
for target, tiles in (
    (90, dict(block_m=128, block_h=128, reload=True, num_warps=8, num_stages=3)),
    (86, dict(block_m=128, block_h=128, reload=False, num_warps=8, num_stages=2)),
    (90, dict(block_m=128, block_h=64, reload=True, num_warps=4, num_stages=2)),
):
    entry = read_entry(config | {"device": f"sm_{target}", "use": tiles}, "bad")
    jobs, missing = audit.jobs(["efficientformer_l1"], [target], ["float16"], extra=[entry])
    assert not missing
    for job in jobs:
        if job.operation == "meta4d" and job.source.constants.get("C") == 224 and job.kernel == "mlp_kernel":
            found.append(audit.audit(job).faults)
print(json.dumps(found))
"""


def test_bad_configurations_are_refused_by_name() -> None:
    done = run(code=BAD)
    assert done.returncode == 0, done.stderr[-3000:]
    large, larger, spilling = json.loads(done.stdout)
    assert any("bytes of shared memory, and the GPU has 232448" in fault for fault in large), large
    assert any("bytes of shared memory, and the GPU has 101376" in fault for fault in larger), larger
    assert any("spills inside the loop" in fault for fault in spilling), spilling


def faults(
    kernel: str = "mlp_kernel", dtype: str = "float16", block_m: int = 64, precision: str = "ieee", **changes: Any
) -> list[str]:
    source = SimpleNamespace(constants={"PRECISION": precision})
    job = audit.Job("meta4d", ["x"], dtype, HOPPER, source, {"BLOCK_M": block_m}, 0)  # type: ignore[arg-type]
    job.__class__ = type("Job", (audit.Job,), {"kernel": kernel})
    return list(audit._faults(job, replace(COMPILED, **changes), 1000, "HGMMA"))


def test_rules() -> None:
    assert faults() == []  # spills outside the loop are none
    assert faults(loop_spills=2) == ["2 spills inside the loop"]
    assert faults(shared_memory=1001) == ["1001 bytes of shared memory, and the GPU has 1000"]
    assert faults(hazards=["a register is written"]) == ["a register is written"]
    assert faults(waits=22) == ["serialised products: 22 waits for 11 in the loop"]
    assert faults("linear_kernel", loop_instructions=0) == ["7 spills, and the loop is unrolled"]
    for kernel in ("mlp_kernel", "split_mlp_kernel", "linear_kernel", "bias_attention_kernel"):
        assert faults(kernel, tensor_cores={"HMMA": 4}) == [
            "no HGMMA: its matrix products are not on the target's tensor cores"
        ]
        assert faults(kernel, tensor_cores={"HMMA": 4}, block_m=32) == []
        assert len(faults(kernel, tensor_cores={}, block_m=32)) == 1
        assert faults(kernel, "float32", tensor_cores={}) == []
        assert len(faults(kernel, "float32", precision="tf32x3", tensor_cores={})) == 1
    assert faults("pool_mixer_kernel", tensor_cores={}) == []


def test_spills_in_any_loop_count() -> None:
    """Not only in the one with the matrix products."""
    names = ["LDL", "STL", "BRA", "HGMMA", "STL", "FADD", "BRA", "LDL"]
    code = [(16 * i, name, "") for i, name in enumerate(names)]
    code[2], code[6] = (32, "BRA", " 0x10 "), (96, "BRA", " 0x30 ")
    code += [(128, "EXIT", ""), (144, "NOP", ""), (160, "BRA", " 0x90 "), (176, "BRA", " 0x0 ")]  # cold code, and back
    code.append((192, "BRA", " 0xc0 "))  # to itself, at the end of every program
    loops = offline._loops(code)
    assert loops == [(16, 32), (48, 96), (144, 160)]
    assert offline._hot_loop(code, loops) == {"HGMMA": 1, "STL": 1, "FADD": 1, "BRA": 1}


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks into /proc")
def test_processes_that_compile_do_not_interpret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    before = set(active_children())
    with compilers(2):
        started = set(active_children()) - before
        assert os.environ["TRITON_INTERPRET"] == "1"
        assert len(started) == 2
        for process in started:
            assert b"TRITON_INTERPRET" not in Path(f"/proc/{process.pid}/environ").read_bytes()


def test_what_is_missing_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No entry for a shape, an entry that no shape reaches, a kernel that does not compile."""
    table = audit.config.Table([e for e in audit.config.shipped_table().entries if e.operations != ("linear",)])
    monkeypatch.setattr(audit.config, "shipped_table", lambda: table)
    _, missing = audit.jobs(sorted(audit.PRESETS), [90], ["float16"])
    assert any("sm_90: L1: no configuration for linear of {'outputs': 1792, 'inputs': 448" in line for line in missing)
    assert any("no audited shape uses it" in line for line in missing)  # what came after the shape that failed

    monkeypatch.undo()
    jobs, _ = audit.jobs(["efficientformer_l1"], [90], ["float16"])
    monkeypatch.setattr(
        audit, "compile_source", lambda *_: (_ for _ in ()).throw(RuntimeError("out of registers\nmore"))
    )
    assert audit.audit(jobs[0]).faults == ["does not compile: RuntimeError: out of registers"]
    here = SimpleNamespace(map=lambda of, jobs, caches: [of(jobs[0])])
    monkeypatch.setattr(audit, "compilers", lambda workers: contextlib.nullcontext(here))
    assert audit.main(["--models", "efficientformer_l1", "--targets", "90", "--dtypes", "float16"]) == 1


ODD = """
import torch
from effformer.bench.offline.compile import compile_launch
from effformer.kernels.bias_attention import bias_attention_launch
from effformer.kernels.conv_mlp import conv_mlp_launches
from effformer.kernels.tiling.device import CONSUMER, stand_in
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
with stand_in(CONSUMER):  # a few images at the last stage of L3
    x, c, h = empty(2, 7, 7, 512, of=half).permute(0, 3, 1, 2), empty(512), empty(2048)
    w1, w2 = empty(2048, 512, of=half), empty(512, 2048, of=half)
    split = meta4d_launches(x, c, w1, h, h, w2, c, c, "gelu", out=torch.empty_like(x))[0]
assert compile_launch(split, 86).shared_memory <= CONSUMER.shared_memory, split
print(len(launches))
"""


def test_odd_sizes_compile() -> None:
    """An argument of 1 becomes a constant, one beyond 2**31 takes 64 bits: the interpreter knows neither."""
    done = run(code=ODD)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 25
