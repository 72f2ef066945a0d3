"""Runs PTX on NumPy arrays by the machine of bench/offline/ptx, for tests."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from effformer.bench.offline.ptx.execute import execute
from effformer.bench.offline.ptx.faults import Fault
from effformer.bench.offline.ptx.global_memory import GlobalMemory, Region
from effformer.bench.offline.ptx.machine import Launch, Options
from effformer.bench.offline.ptx.program import parse

Array = npt.NDArray[Any]
Expected: TypeAlias = Callable[[int, int, int], int | Callable[[int], bool] | None]
Output = tuple[Any, Any] | Array
FIRST, APART = 1 << 20, 1 << 20  # the address of the first tensor, and the steps to the next ones
THREADS = 512  # of the kernels whose results are rows
FILES = Path(__file__).parent / "ptx"


@dataclass
class Ran:
    """What a launch left: its outputs in their order, what was found wrong, and the counts where they were asked for."""

    outputs: list[Array]
    faults: list[Fault]
    counts: dict[str, float]


def read(name: str) -> str:
    """The text of tests/ptx/<name>.ptx."""
    return (FILES / f"{name}.ptx").read_text()


def run(
    ptx: str,
    *inputs: Array,
    outputs: Sequence[Output] = (),
    shared_memory: int = 0,
    programs: int = 1,
    options: Options | None = None,
    scalars: Sequence[int] = (),
    outside: Mapping[int, Array] | None = None,
) -> Ran:
    """Run all programs of a kernel whose parameters are addresses of inputs, then of outputs, then integers.

    Args:
        ptx: text of the kernel.
        inputs: may only be read.
        outputs: of each its shape and dtype, for zeros that do not count as written, or its contents at first.
        shared_memory: bytes of a program.
        programs: of a grid of one axis.
        options: how to execute.
        scalars: bits of the parameters after the addresses.
        outside: by number of a tensor, inputs first, which of its elements do not belong to it.
    """
    memory, parameters = GlobalMemory(), []
    results = [np.zeros(*one) if isinstance(one, tuple) else one.copy() for one in outputs]
    given = [np.ascontiguousarray(value).copy() for value in inputs]
    for number, value in enumerate([*given, *results]):
        is_output = number >= len(given)
        name = f"output {number - len(given)}" if is_output else f"input {number}"
        region = Region(name, FIRST + number * APART, value.reshape(-1).view(np.uint8), value.itemsize, is_output)
        region.outside = outside.get(number) if outside else None
        if is_output and not isinstance(outputs[number - len(given)], tuple):
            region.writes[:] = 1
        memory.add(region)
        parameters.append(region.start)
    launch = Launch((programs, 1, 1), shared_memory, [*parameters, *scalars])
    outcome = execute(parse(ptx), launch, memory, options=options)
    return Ran(results, outcome.faults, outcome.counts)


def rows(ptx: str) -> list[tuple[str, int, str]]:
    """Of each store with a comment: the register of its address, the offset, and the comment, which names the result."""
    found = re.findall(r"st\.global\.\w+\s+\[(%\w+)(?:\+(\d+))?\], %\w+;\s*// (.*)", ptx)
    return [(register, int(offset or 0), comment.strip()) for register, offset, comment in found]


def check_rows(name: str, words: list[Array], expected: Callable[[str, int], Expected]) -> None:
    """Run tests/ptx/<name>.ptx, whose rows of results each hold one instruction's, and compare every value.

    Args:
        name: of the file; its kernel has 512 threads.
        words: uint64 operands a, b and c of each thread; narrower ones are their lower bits.
        expected: of the name and the bits of a result, the function that gives it from three words: its bits, a
            function that says whether bits are right, or None for what PTX leaves open.
    """
    ptx = read(name)
    found = rows(ptx)
    sizes = sorted({int(register[4:]) for register, _, _ in found})
    shapes = [
        ((sum(register == f"%out{size}" for register, _, _ in found), THREADS), f"u{size // 8}") for size in sizes
    ]
    ran = run(ptx, *words, outputs=shapes)
    assert not ran.faults, list(map(str, ran.faults))
    operands = list(zip(*(value.tolist() for value in words), strict=True))
    wrong, compared = [], 0
    for register, offset, label in found:
        size = int(register[4:])
        values = ran.outputs[sizes.index(size)][offset // (THREADS * size // 8)].tolist()
        right = expected(label, size)
        for given, value in zip(operands, values, strict=True):
            wanted = right(*given)
            compared += wanted is not None
            if wanted is None or (wanted(value) if callable(wanted) else wanted == value):
                continue
            instead = "" if callable(wanted) else f", wanted {wanted:#x}"
            wrong.append(f"{label} of {', '.join(f'{one:#x}' for one in given)}: got {value:#x}{instead}")
            break
    assert not wrong, "\n".join(["values differ", *wrong])
    assert compared > THREADS // 2 * len(found)


def operands(edges: list[int], seed: int, choose: Callable[[random.Random], int] | None = None) -> list[Array]:
    """Words a, b, c of the threads: all `edges`, many pairs of them as a and b, then random ones; c of both kinds."""
    rng = random.Random(seed)
    draw = choose or (lambda rng: rng.getrandbits(64))
    pairs = [(a, b) for a in edges for b in edges]
    rng.shuffle(pairs)
    pairs = [*zip(edges, reversed(edges), strict=True), *pairs][: THREADS * 3 // 4]
    pairs += [(draw(rng), draw(rng)) for _ in range(THREADS - len(pairs))]
    third = [rng.choice(edges) if rng.random() < 0.5 else draw(rng) for _ in pairs]
    return [np.array(values, np.uint64) for values in (*zip(*pairs, strict=True), third)]
