"""The first tests on a machine: its properties, and each operation once in each dtype."""

from __future__ import annotations

import os
import platform
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import triton
from effformer.kernels.launch import INTERPRETED, recorded
from effformer.kernels.tiling.device import device_class, device_of
from machine import DEVICE, DTYPES, ON_GPU, check, id_of, prepared

import effformer
from effformer import backend
from effformer.testing import (
    Case,
    attention_mixer_case,
    bias_attention_case,
    conv_mlp_case,
    conv_norm_case,
    draw_map,
    head_case,
    linear_mlp_case,
    meta4d_case,
    pool_mixer_case,
)

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("kernel_device")]


def cases(dtype: torch.dtype) -> dict[str, Case]:
    tokens = torch.randn(2, 49, 48).to(dtype)
    heads = {"num_heads": 2, "key_dim": 16, "value_dim": 24}
    return {
        "pool_mixer": pool_mixer_case(draw_map((2, 48, 9, 11), dtype)),
        "conv_mlp": conv_mlp_case(draw_map((2, 48, 9, 11), dtype), 96),
        "conv_norm": conv_norm_case(draw_map((2, 24, 9, 11), dtype), 48),
        "conv_norm of images": conv_norm_case(draw_map((2, 3, 9, 11), dtype, "contiguous"), 24, "relu"),
        "conv_norm of pixels": conv_norm_case(torch.randint(0, 256, (2, 3, 9, 11), dtype=torch.uint8), 24, None, dtype),
        "meta4d in one kernel": meta4d_case(draw_map((2, 48, 9, 11), dtype), 96),
        "meta4d in three kernels": meta4d_case(draw_map((2, 240, 16, 17), dtype), 96),
        "meta4d in parts": meta4d_case(draw_map((2, 240, 5, 6), dtype), 96),
        "bias_attention": bias_attention_case(2, 49, dtype, **heads),
        "bias_attention, prepared": prepared(bias_attention_case(2, 49, dtype, **heads)),
        "attention_mixer": attention_mixer_case(tokens, **heads),
        "linear_mlp": linear_mlp_case(tokens, 96),
        "head": head_case(tokens, 30),
        "head of pooled features": head_case(tokens),
    }


def test_the_machine(record_property: Callable[[str, object], None]) -> None:
    """Record the GPU; "auto" must take the kernels on it."""
    assert backend.why_not_triton(DEVICE, torch.bfloat16 if ON_GPU else torch.float16, asked_for=True) is None
    facts: dict[str, object] = {
        "effformer": str(Path(effformer.__file__).parent),
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # of a class of its own
        "triton": triton.__version__,
        "configurations": device_class(device_of(DEVICE)),
        "cores": os.cpu_count(),
        "compute-sanitizer": shutil.which("compute-sanitizer"),
    }
    if ON_GPU:
        assert backend.why_not_triton(DEVICE) is None
        assert not INTERPRETED
        found = torch.cuda.get_device_properties(0)
        facts |= {
            "gpu": found.name,
            "capability": f"{found.major}.{found.minor}",
            "multiprocessors": found.multi_processor_count,
            "memory": found.total_memory,
            "shared memory": found.shared_memory_per_block_optin,
            "gpus": torch.cuda.device_count(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    record_property("machine", facts)


@pytest.mark.parametrize("dtype", DTYPES, ids=id_of)
@pytest.mark.parametrize("name", cases(torch.float32))
def test_one_call(name: str, dtype: torch.dtype) -> None:
    check(cases(dtype)[name])


def test_what_is_launched() -> None:
    """The checked call ran our kernels."""
    with recorded() as launches:
        for case in cases(torch.float16).values():
            case.run("triton")
    seen = Counter(launch.kernel.__name__ for launch in launches)
    assert seen == {
        "pool_mixer_kernel": 2,
        "mlp_kernel": 2,
        "conv_norm_kernel": 3,
        "split_mlp_kernel": 1,
        "split_sum_kernel": 1,
        "linear_kernel": 2 + 2 + 2,
        "bias_attention_kernel": 3,
        "layer_norm_kernel": 2,
        "head_kernel": 1,
        "token_mean_kernel": 1,
    }


def test_auto_takes_the_kernels() -> None:
    case = cases(torch.float16)["meta4d in one kernel"]
    with recorded() as launches:
        case.run("auto")
    assert bool(launches) == ON_GPU
