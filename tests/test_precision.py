"""`float32_as_such` and `with_tf32`, beside PyTorch's older and newer switches for TF32; each case in a process of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

CODE = """
import sys, torch
from effformer.testing import float32_as_such, with_tf32
backends = torch.backends

def readable(read):
    try:
        return read()
    except RuntimeError:
        return None

def state():
    flags = backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul, backends.mkldnn.matmul
    older = lambda: backends.cudnn.allow_tf32, torch.get_float32_matmul_precision
    return [flag.fp32_precision for flag in flags], [readable(read) for read in older]

exec(sys.argv[1])
before = state()
for setting, tf32, expected in ((float32_as_such, False, "ieee"), (with_tf32, True, "tf32")):
    try:
        with setting():
            assert state()[0] == [expected] * 4, state()
            assert backends.cudnn.allow_tf32 is backends.cuda.matmul.allow_tf32 is tf32
            with backends.cudnn.flags(enabled=True):
                pass
            raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    now = state()
    assert now[0] == before[0], (now, before)
    for one, other in zip(now[1], before[1]):
        assert other is None or one == other, (now, before)
"""


@pytest.mark.parametrize(
    "setting",
    [
        "pass",
        "backends.cudnn.allow_tf32 = False",
        "torch.set_float32_matmul_precision('high')",
        "torch.set_float32_matmul_precision('medium')",
        "backends.cuda.matmul.fp32_precision = 'tf32'",
        "backends.cudnn.conv.fp32_precision = 'ieee'",
        "backends.fp32_precision = 'tf32'",
    ],
)
def test_old_and_new_switches_work_within_it_and_come_back(setting: str) -> None:
    done = subprocess.run([sys.executable, "-c", CODE, setting], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
