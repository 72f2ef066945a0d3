"""Races: every operation at every size, on a full GPU, again and again; each time the same bits."""

from __future__ import annotations

import pytest
import torch
from gpu_cases import WORKS, Work
from machine import DTYPES, ON_GPU, REHEARSED, check, id_of, same

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("kernel_device")]
REPEATS = 2 if REHEARSED else 100
NAN = float("nan")


@pytest.mark.parametrize("dtype", DTYPES, ids=id_of)
@pytest.mark.parametrize("work", WORKS, ids=str)
def test_the_same_bits_again(work: Work, dtype: torch.dtype) -> None:
    """First alone, then beside another stream's work, which takes multiprocessors away and shifts everything in time."""
    case = work.case(work.fills, dtype)
    check(case)
    first = case.run("triton")
    for _ in range(REPEATS):
        again = case.run("triton")
        same(again, first)
        again.fill_(NAN)  # the next result gets this memory: what it does not write shows
    if not ON_GPU:
        return
    beside = torch.cuda.Stream()
    load = torch.randn(2048, 2048, dtype=torch.float16)
    beside.wait_stream(torch.cuda.current_stream())
    for _ in range(REPEATS // 2):
        with torch.cuda.stream(beside):
            for _ in range(8):
                load @ load
        again = case.run("triton")
        same(again, first)
        again.fill_(NAN)
    torch.cuda.synchronize()
