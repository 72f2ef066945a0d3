"""The audit's rules on orders of instructions: each finds planted faults, and one that Triton compiles."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from effformer.bench.offline import compile as offline
from effformer.bench.offline.hazards import early_accesses, overwritten_operands
from test_audit import run

TTGIR = """\
  tt.func public @kernel() {
    %acc = ttng.tmem_alloc : () -> !ttg.memdesc<128x64xf32>
    %bars = ttg.local_alloc : () -> !ttg.memdesc<2x1xi64>
    %bar = ttg.memdesc_index %bars[%c0] : !ttg.memdesc<2x1xi64> -> !ttg.memdesc<1xi64>
    ttng.tc_gen5_mma %x, %w, %acc, %false, %true, %bar[%true] {is_async} : !ttg.memdesc<128x32xbf16> loc(#loc1)
    %last:2 = scf.for %i = %c0 to %c8 step %c1 iter_args(%phase = %c0, %waited = %bar) -> (i32, !ttg.memdesc<1xi64>)  : i32 {
      %next = ttg.memdesc_index %bars[%phase] : !ttg.memdesc<2x1xi64> -> !ttg.memdesc<1xi64>
      ttng.wait_barrier %waited, %phase : !ttg.memdesc<1xi64>
      %value = ttng.tmem_load %acc : !ttg.memdesc<128x64xf32> -> tensor<128x64xf32> loc(#loc2)
      ttng.tmem_store %value, %acc, %true : tensor<128x64xf32> -> !ttg.memdesc<128x64xf32>
      ttng.tc_gen5_mma %x, %w, %acc, %true, %true, %next[%true] {is_async} : !ttg.memdesc<128x32xbf16>
      scf.yield %phase, %next : i32, !ttg.memdesc<1xi64> loc(#loc3)
    } loc(#loc4)
    ttng.wait_barrier %last#1, %last#0 : !ttg.memdesc<1xi64>
    %result = ttng.tmem_load %acc : !ttg.memdesc<128x64xf32> -> tensor<128x64xf32>
    tt.return
  }
"""


def test_products_are_waited_for() -> None:
    assert early_accesses(TTGIR) == []


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("ttng.wait_barrier %last#1, %last#0", ["%result = ttng.tmem_load %acc"]),
        ("ttng.wait_barrier %waited, %phase", ["%value = ttng.tmem_load %acc", "ttng.tmem_store %value, %acc, %true"]),
    ],
)
def test_a_missing_wait_is_seen(line: str, found: list[str]) -> None:
    assert TTGIR.count(line) == 1
    assert early_accesses(TTGIR.replace(line, "arith.nop"))[: len(found)] == found


def test_a_wait_ends_one_product_and_a_commit_all_before_it() -> None:
    two = "    ttng.tc_gen5_mma %x, %w, %acc, %true, %true, %bar[%true] {is_async}\n"
    start = TTGIR.partition("    %last")[0]
    end = "    %a = ttng.tmem_load %acc : !ttg.memdesc<128x64xf32>\n"
    wait = "    ttng.wait_barrier %bar, %c0\n"
    assert early_accesses(start + two + wait + end) == ["%a = ttng.tmem_load %acc"]
    assert early_accesses(start + two + wait + wait + end) == []
    bare = "    ttng.tc_gen5_mma %x, %w, %acc, %true, %true {is_async}\n"
    commit = "    ttng.tc_gen5_commit %bar : !ttg.memdesc<1xi64>\n"
    assert early_accesses(start + wait + bare + end) == ["%a = ttng.tmem_load %acc"]
    assert early_accesses(start + wait + bare + bare + commit + wait + wait + end) == []
    assert early_accesses(start + end.replace("%acc", "%other")) == []


SASS = """\
        /*0010*/                   F2FP.BF16.F32.PACK_AB R136, R5, R4 ;     /* 0x0 */
        /*0020*/                   WARPGROUP.ARRIVE ;     /* 0x0 */
        /*0030*/                   HGMMA.64x64x16.F32.BF16 R88, R136, gdesc[UR16], R88 ;     /* 0x0 */
        /*0040*/                   HGMMA.64x64x16.F32.BF16 R88, R140, gdesc[UR16], R88, gsb0 ;     /* 0x0 */
        /*0050*/                   IADD3 R3, R3, 0x1, RZ ;     /* 0x0 */
        /*0060*/                   HGMMA.64x32x16.F32.BF16 R20, R144, gdesc[UR16], R20, gsb0 ;     /* 0x0 */
        /*0070*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;     /* 0x0 */
        /*0080*/                   MOV R137, R6 ;     /* 0x0 */
        /*0090*/              @!P0 BRA 0x10 ;     /* 0x0 */
        /*00a0*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;     /* 0x0 */
        /*00b0*/                   MOV R144, R6 ;     /* 0x0 */
        /*00c0*/                   EXIT ;     /* 0x0 */
"""


def overwritten(sass: str) -> list[str]:
    instructions = [(int(m[1], 16), m[2], m[3]) for m in map(offline._INSTRUCTION.match, sass.splitlines()) if m]
    return overwritten_operands(instructions, offline._loops(instructions))


def test_operands_in_registers_are_kept() -> None:
    assert overwritten(SASS) == []


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ("IADD3 R3, R3, 0x1, RZ", "IADD3 R143, R3, 0x1, RZ", "IADD3 R143, R3, 0x1, RZ"),
        ("IADD3 R3, R3, 0x1, RZ", "LDS.128 R132, [R3]", None),
        ("IADD3 R3, R3, 0x1, RZ", "LDS.128 R136, [R3]", "LDS.128 R136, [R3]"),
        ("IADD3 R3, R3, 0x1, RZ", "LDS.64 R134, [R3]", None),
        ("IADD3 R3, R3, 0x1, RZ", "LDSM.16.M88.4 R140, [R3]", "LDSM.16.M88.4 R140, [R3]"),
        ("IADD3 R3, R3, 0x1, RZ", "SHFL.BFLY PT, R141, R3, 0x1, 0x1f", "SHFL.BFLY PT, R141, R3, 0x1, 0x1f"),
        ("IADD3 R3, R3, 0x1, RZ", "STS.128 [R136], R4", None),
        ("IADD3 R3, R3, 0x1, RZ", "ISETP.GE.AND P0, PT, R137, 0x5, PT", None),
        ("MOV R137, R6", "MOV R145, R6", "MOV R145, R6"),
        ("MOV R137, R6", "IMAD.WIDE R146, R6, 0x4, R8", "IMAD.WIDE R146, R6, 0x4, R8"),
        # Over the back edge: the second product still runs in the next round.
        ("F2FP.BF16.F32.PACK_AB R136, R5, R4", "F2FP.BF16.F32.PACK_AB R144, R5, R4", "F2FP.BF16.F32.PACK_AB R144, R5, R4"),
        ("HGMMA.64x32x16.F32.BF16 R20", "HGMMA.64x32x16.F32.BF16 R128", "HGMMA.64x32x16.F32.BF16 R128, R144, gdesc[UR16], R20, gsb0"),
    ],
)  # fmt: skip
def test_a_write_to_an_operand_is_seen(old: str, new: str, found: str | None) -> None:
    assert SASS.count(old) == 1
    assert overwritten(SASS.replace(old, new)) == ([] if found is None else [found])


@pytest.mark.parametrize("planted", [False, True])
def test_machine_code_is_read(planted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The audit gives the rule what the disassembler prints: all instructions, and the loops."""
    sass = SASS.replace("F2FP.BF16.F32.PACK_AB R136", "F2FP.BF16.F32.PACK_AB R144") if planted else SASS

    class Kernel:
        asm: Any = {"cubin": b"", "ttgir": ""}  # noqa: RUF012
        metadata = SimpleNamespace(shared=0)

    monkeypatch.setattr(offline, "ASTSource", lambda **_: None)
    monkeypatch.setattr(offline.triton, "compile", lambda *_, **__: Kernel)
    monkeypatch.setattr(offline, "_cuobjdump", lambda option, _: sass if option == "-sass" else "REG:8")
    source = offline.Source("a:b", {}, {}, {}, {}, 90)
    expected = ["a register is written that a product reads: F2FP.BF16.F32.PACK_AB R144, R5, R4"] if planted else []
    assert offline._compile(None, source).hazards == expected


BLACKWELL = """
import json
from dataclasses import replace
import torch
from effformer.bench.offline.compile import compile_launch
from effformer.bench.offline.launches import network_launches
from effformer.kernels.tiling.device import BLACKWELL

found = {}
for operation, shape, launch in network_launches("efficientformer_l1", torch.bfloat16, BLACKWELL, batch=2):
    if operation == "conv_norm" and shape == "[2, 48, 56, 56]":
        assert launch.num_stages > 1
        found["own"] = launch.constants["DEPTHS"], compile_launch(launch, 100).hazards
        chained = {"DEPTHS": (32, 16), "BLOCK_K": 48}
        found["chained"] = None, compile_launch(replace(launch, constants=launch.constants | chained), 100).hazards
print(json.dumps(found))
"""


def test_chained_products_on_blackwell() -> None:
    """As Triton compiles them: the rule sees the fault, and the launcher chains none there."""
    done = run(code=BLACKWELL)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert len(found["own"][0]) == 1
    assert found["own"][1] == []
    assert any("an accumulator is touched while a product on it runs" in hazard for hazard in found["chained"][1])
