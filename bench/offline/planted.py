"""Plant faults in the compiled kernels, one statement each, and see whether they are found (`make planted`).

Each fault is one statement of PTX removed or changed, in a kernel at a small shape; the whole grid is executed, as
`make prove` does. A fault is seen by one of these:

- faults: the machine reports some that it does not report for the code as compiled;
- error: the code does not end, or is no PTX;
- inaccurate: the result breaks the accuracy rule;
- imprecise: it breaks the rule with `TIGHT` ulp in place of 2, which `make prove` applies to operations with sums over
  a whole row: a wrong shuffle in a norm's mean may stay within 2 ulp. The code as compiled keeps the tight rule.

Other faults have to be redundant, which `access_log` tells apart from the machine. For barriers, waits, commits: no
place of memory is touched by two threads, one of them writing, in an order that the barriers and waits left do not set,
and the bits of the result are those of the code as compiled. For other changes, at two draws of the arguments: each
store leaves the same bits in memory, and the result has the same bits. A fault that is neither is a failure.

Statements that no lane carries out at a kernel's shape are not chosen, nor masks that are on in all lanes. It needs no
GPU. The exit status is 0 when all faults are seen or redundant, else 1.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from ...apps.verify_report import describe_dtype
from ...files import write_whole
from ...kernels import meta4d
from ...kernels.tiling.table import DTYPES
from .access_log import AccessLog, form
from .execution import Executed
from .proof import SUMS, TIGHT, source
from .ptx.machine import Options
from .ptx_changes import KINDS, Change, changes
from .small_calls import CALLS, CompiledCall, SmallCall, family, known_faults

ORDERED = ("barrier removed", "warp barrier removed", "wait removed", "wait weakened", "commit removed")


# target, dtype -> faults of each kernel; float32 has other matrix instructions, and copies through registers.
PLAN = {(capability, "bfloat16"): 3 for capability in (80, 90, 100)}
PLAN |= {(capability, "bfloat16"): 1 for capability in (86, 89, 120)}
PLAN |= {(90, "float32"): 1, (100, "float16"): 1}
_BRIEF = ("pool_mixer", "conv_norm", "head")  # operations of the plans with one fault of a kernel
_BLOCK = SmallCall("meta4d", (11, 224, 14, 14), {"hidden": 128}, ("mlp",), programs=2)


@dataclass(frozen=True)
class Planted:
    """A planted fault; a line of `planted.jsonl`.

    Attributes:
        target, dtype, operation, shape, options, kernel: where.
        kind: of `ptx_changes.KINDS`.
        line, source, statement, change: PTX line, line of the kernel, the statement, and its replacement.
        seen: "faults", "error", "inaccurate" or "imprecise"; None where it was not seen.
        found: the first of the faults, the error, or the accuracy.
        ratio: of the largest error to eager's.
        redundant: the argument that it changes no result.
        note: a remark.
        triton, sources: versions of Triton and, as a digest (`proof.source`), of the kernels and their checks.
    """

    target: str
    dtype: str
    operation: str
    shape: tuple[int, ...]
    options: dict[str, Any]
    kernel: str
    kind: str
    line: int
    source: str
    statement: str
    change: str
    seen: str | None
    found: list[str]
    ratio: float | None
    redundant: str | None
    note: str
    triton: str
    sources: str

    @property
    def fine(self) -> bool:
        return (self.seen or self.redundant) is not None

    def __str__(self) -> str:
        verdict = self.seen or (f"redundant: {self.redundant}" if self.redundant else "NOT SEEN")
        text = f"{self.target:<6} {self.dtype:<8} {self.kernel:<21} {self.kind:<26} {self.source}: {verdict}"
        return f"{text}: {self.found[0]}" if self.found else text


# --- one fault --------------------------------------------------------------------------------------------------------


def plant(call: CompiledCall, one: Executed, change: Change, base: str = "", note: str = "") -> Planted:
    """Execute a kernel with a change; `base` is its code where that is not as compiled."""
    known = call.compiled[1]
    base = base or one.ptx
    if base != one.ptx:
        known = known_faults(call.run(one.ptx, base)[0])
    seen, found, errors, redundant = None, list[str](), None, None
    try:
        execution, result, subject = call.run(one.ptx, change.apply(base))
        new = [fault for kernel, fault in execution.faults if (kernel, fault.kind, fault.line) not in known]
        errors = call.accuracy(execution, result, subject)
        if new:
            new.sort(key=lambda fault: not fault.kind.startswith("global race"))  # rarer, and worse
            seen, found = "faults", [str(fault) for fault in new[:3]]
        elif not errors.passes():
            seen, found = "inaccurate", [str(errors)]
        elif call.small.operation in SUMS and not errors.passes(TIGHT):
            seen, found = "imprecise", [str(errors)]
    except Exception as error:  # of any kind: it is this fault's outcome
        seen, found = "error", [f"{type(error).__name__}: {error}"]
    if seen is None:
        redundant, why = argue(call, one, change)
        found = [] if redundant else [f"{errors}; {why}"]
    return Planted(
        target=f"sm_{call.capability}",
        dtype=describe_dtype(call.dtype),
        operation=call.small.operation,
        shape=call.small.shape,
        options=call.small.options,
        kernel=one.launch.kernel.__name__,
        kind=change.kind,
        line=change.line,
        source=change.source,
        statement=" ".join(change.old.split()),
        change=" ".join(change.new.split()) or "removed",
        seen=seen,
        found=found,
        ratio=errors.max_error / errors.eager_max_error if errors and errors.eager_max_error else None,
        redundant=redundant,
        note=note,
        triton=triton.__version__,
        sources=source(call.small.operation),
    )


def argue(call: CompiledCall, one: Executed, change: Change) -> tuple[str | None, str]:
    """Why a change is redundant, or None and why it is not."""
    exact, edited, mine = Options(), change.apply(one.ptx), form(one.program)
    ordered, fence = change.kind in ORDERED, change.old.startswith("wgmma.fence")
    if (change.kind == "fence removed" and not fence) or re.search(r"tcgen05\.wait|wgmma\.(wait|commit)", change.old):
        return None, "the machine misses it"
    loads = "loads take the same places"
    for seed in (0, 1):
        before, after = (
            AccessLog(lambda m: form(m.program) == mine, digests=not ordered, accesses=ordered) for _ in "ab"
        )
        _, expected, _ = call.run(options=exact, log=None if ordered else before, seed=seed)
        _, result, _ = call.run(one.ptx, edited, exact, after, seed)
        if not _same_bits(expected, result):
            return None, f"{int((expected != result).sum())} of {result.numel()} results differ"
        if ordered and (conflicts := after.conflicts()):
            return None, f"the machine misses it: {'; '.join(conflicts)}"
        if after.unfenced - before.unfenced and fence:
            return None, "the machine misses it: registers are taken between the fence left and a product"
        if not ordered and before.left() != after.left():
            return None, "stores differ"
        if before.taken() != after.taken():
            loads = "loads take other places, and no store depends on what they find there"
    if ordered:
        why = (f"of {after.count()} accesses none that writes meets one of another thread, a copy or a product, unless "
               "a barrier or wait that is left orders them")  # fmt: skip
    elif fence:
        why = "no instruction takes a register of a product between the last wgmma.fence that is left and the product"
    else:
        why = f"the {len(before.writes)} statements that store leave the same bits at the same places, and {loads}"
    return f"{why}; bits of the result equal; at two draws of the arguments", ""


def _same_bits(one: Tensor, other: Tensor) -> bool:
    kind = {2: torch.int16, 4: torch.int32}[one.element_size()]
    return torch.equal(one.contiguous().view(kind), other.contiguous().view(kind))


# --- which faults -----------------------------------------------------------------------------------------------------


def plan(seed: int = 0) -> Iterator[tuple[CompiledCall, Executed, Change]]:
    """Faults to plant: of each kernel those kinds that are rarest so far, at statements drawn by chance."""
    chance, used = random.Random(seed), Counter[str]()
    for (capability, dtype), count in PLAN.items():
        for small in CALLS:
            if count == 1 and small.operation not in _BRIEF:
                continue
            call = CompiledCall(small, capability, DTYPES[dtype])
            executed, _, log = call.compiled
            if small.operation in SUMS and not (errors := call.accuracy(*call.run())).passes(TIGHT):
                raise RuntimeError(f"{small.operation} on sm_{capability}: got {errors}, allowed are {TIGHT} ulp")
            for name in small.kernels:
                one = next(one for one in executed if family(one) == name)
                found = {
                    kind: [change for change in listed if _alive(change, log.ran.get((form(one.program), change.line)))]
                    for kind, listed in changes(one.program, one.ptx).items()
                }
                kinds = [kind for kind in KINDS if found[kind]]
                chance.shuffle(kinds)
                taken = set[int]()
                for kind in sorted(kinds, key=lambda kind: used[kind])[:count]:
                    listed = [change for change in found[kind] if change.line not in taken]
                    if listed:
                        change = chance.choice(listed)
                        taken.add(change.line)
                        used[kind] += 1
                        yield call, one, change


def _alive(change: Change, ran: tuple[bool, bool] | None) -> bool:
    """Whether the statement is carried out, and a mask is off somewhere. Barriers and branches always count."""
    if change.kind == "barrier removed" or (change.kind == "wait removed" and ran is None):
        return True
    return ran is not None and ran[0] and (ran[1] or not change.kind.startswith("mask"))


def debug_barriers() -> Iterator[Planted]:
    """The barrier between the stores of the residual and its loads, on each kind of GPU.

    As compiled it is redundant: each thread loads what it stored itself. It is there for a compiler that lays the two
    out in different ways. So the note has a second comparison, in code where loads take the rows of another warp and
    the barriers before this one are out: there its removal has to be a race in global memory.
    """
    lines = Path(meta4d.__file__).read_text(encoding="utf-8").splitlines()
    barrier, load = (1 + next(number for number, line in enumerate(lines) if text in line)
                     for text in ("tl.debug_barrier()", "residual = tl.load(p_out"))  # fmt: skip
    for capability in (80, 90, 100):
        call = CompiledCall(_BLOCK, capability, torch.bfloat16)
        one = call.compiled[0][0]
        found = changes(one.program, one.ptx)
        at_barrier = [change for change in found["barrier removed"] if change.source == f"meta4d.py:{barrier}"]
        mine = max(at_barrier, key=lambda change: change.line)
        base, rows = one.ptx, 2 * 2 * _BLOCK.shape[1]  # bytes of the two rows that a warp takes at once
        for change in found["barrier removed"]:
            base = change.apply(base) if change.line < mine.line else base
        for change in found["index changed"]:
            if change.source == f"meta4d.py:{load}":
                base = replace(change, new=re.sub(r"\+ 16\]", f"+ {rows}]", change.new)).apply(base)
        record = plant(call, one, mine, note="tl.debug_barrier of the 224-channel block")
        apart = plant(call, one, mine, base)
        races = [text for text in apart.found if text.startswith("global race: read of what another warp wrote")]
        apart_note = (
            f"{record.note}; with loads of another warp's rows, and earlier barriers out: {' '.join(races[:1])}"
        )
        yield replace(record, note=apart_note) if races else replace(record, redundant=None, found=apart.found)


def main(argv: Sequence[str] | None = None) -> int:
    """Plant all faults, record and print them, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the choice of statements")
    parser.add_argument("--output", type=Path, default=Path("bench/results/planted.jsonl"), metavar="FILE")
    arguments = parser.parse_args(argv)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(1)
    start, records = time.monotonic(), list[Planted]()
    for record in _all(arguments.seed):
        records.append(record)
        print(record, flush=True)
    write_whole(arguments.output, "".join(json.dumps(asdict(one)) + "\n" for one in records))
    print("\n" + "\n".join(table(records)))
    missed = [record for record in records if not record.fine]
    print(f"\n{len(records)} faults planted, {sum(one.seen is not None for one in records)} seen, "
          f"{len(missed)} neither seen nor redundant, {time.monotonic() - start:.0f} s")  # fmt: skip
    for record in missed:
        print(f"MISSED {record}")
    return 1 if missed else 0


def _all(seed: int) -> Iterator[Planted]:
    yield from debug_barriers()
    for call, one, change in plan(seed):
        yield plant(call, one, change)


def table(records: Sequence[Planted]) -> Iterator[str]:
    """Kinds and targets: how many were planted, and of these how many are redundant."""
    targets = sorted({one.target for one in records}, key=lambda name: int(name[3:]))
    yield f"{'kind':<28}" + "".join(f"{target:>10}" for target in targets) + f"{'all':>10}"
    for kind in KINDS:
        numbers = []
        for target in (*targets, ""):
            mine = [one for one in records if one.kind == kind and one.target.startswith(target)]
            extra = sum(one.seen is None for one in mine)
            numbers.append(f"{len(mine)} ({extra})" if extra else f"{len(mine)}")
        yield f"{kind:<28}" + "".join(f"{text:>10}" for text in numbers)


if __name__ == "__main__":
    sys.exit(main())
