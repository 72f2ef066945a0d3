"""`effformer verify --target`: its output, its refusals, and a fault as users see it."""

from __future__ import annotations

import json

import pytest
from compiling import needs_compiler, start

from effformer.cli import main

SMALL = ["--size", "32x64", "--batch-size", "2", "--op", "pool_mixer", "conv_norm", "--dtype", "bf16"]

# A kernel whose first load is a mebibyte too far.
PLANTED = """
import sys
from unittest import mock
from effformer.bench.offline import execution
from effformer.cli import main

code = execution._code
def planted(function):
    text, program = code(function)
    load = next(one for one in program.instructions if one.name.startswith("ld.global"))
    load.operands[1] = load.operands[1].replace("+ 0", "+ 0x100000")
    return text, program

with mock.patch.object(execution, "_code", planted):
    sys.exit(main(["verify", "--target", "sm_80", *sys.argv[1:]]))
"""


@needs_compiler
def test_the_command() -> None:
    """bfloat16, which the interpreter does not have; every check names its kernels."""
    done = start("-m", "effformer.cli", "verify", "--target", "sm_90", "--json", *SMALL)
    assert done.returncode == 0, done.stderr
    assert "compiled for sm_90 and executed here" in done.stderr
    found = json.loads(done.stdout)
    assert (found["target"], found["interpreted"], found["passed"], found["batch_size"]) == ("sm_90", False, True, 2)
    assert {check["operation"] for check in found["checks"]} == {"pool_mixer", "conv_norm"}
    for check in found["checks"]:
        assert (check["verdict"], check["backend"], check["faults"]) == ("pass", "triton", [])
        assert check["ran"][0]["kernel"] == check["operation"]
        assert 0 < check["max_error"] < 2 * check["eager_max_error"] + 2 * check["ulp"]


@needs_compiler
def test_a_fault() -> None:
    """It names the kernel, the address, the source line, and the line of the PTX."""
    done = start("-c", PLANTED, *SMALL[:4], "--op", "pool_mixer", "--dtype", "fp16")
    assert done.returncode == 1
    lines = [line for line in done.stdout.splitlines() if "global read out of bounds" in line]
    assert lines
    for part in ("FAIL pool_mixer 2x48x8x16 float16: pool_mixer_kernel: ", "thread ", " bytes into ", ".py:",
                 "PTX line "):  # fmt: skip
        assert part in lines[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--target sm_70", "--target: got 'sm_70', allowed are sm_80, sm_86, sm_89, sm_90, sm_100, sm_120"),
        ("--target sm_90 --device cuda", "--device: got 'cuda' with --target, allowed is cpu"),
        ("--target sm_90 --repeats 2", "--repeats: got 2 with --target, allowed is 0"),
        ("--target sm_90", "TRITON_INTERPRET: got 1"),
        ("--truncate", "--truncate: got it without --target"),
    ],
)
def test_refusals(capsys: pytest.CaptureFixture[str], arguments: str, message: str) -> None:
    """In this process, which interprets."""
    try:
        status = main(["verify", *arguments.split()])
    except SystemExit as error:
        status = int(str(error))
    assert status in (1, 2)
    assert message in capsys.readouterr().err
