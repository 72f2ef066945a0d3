"""Runs each kernel once, at sizes that fit no tile, and prints a digest of each result: one_of_each.py DTYPE

Runs in processes of its own: several that start at once, or one under compute-sanitizer. Only the kernels run on the
GPU; the CPU makes the arguments and compares the results.
"""

from __future__ import annotations

import hashlib
import sys

import torch
from effformer.kernels.launch import INTERPRETED

from effformer.testing import (
    Case,
    accuracy,
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

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")


def cases(dtype: torch.dtype) -> list[Case]:
    heads = {"num_heads": 2, "key_dim": 16, "value_dim": 24}
    tokens = torch.randn(2, 70, 40).to(dtype)
    maps = [draw_map((2, channels, 9, 11), dtype) for channels in (48, 61)]
    return [
        *(pool_mixer_case(x) for x in maps),
        pool_mixer_case(draw_map((2, 61, 9, 11), dtype, "contiguous")),
        *(meta4d_case(x, 100) for x in maps),
        conv_mlp_case(maps[0], 96),
        conv_norm_case(maps[0], 96),
        conv_norm_case(draw_map((2, 3, 33, 21), dtype, "contiguous"), 24, "relu"),
        conv_norm_case(torch.randint(0, 256, (2, 3, 33, 21), dtype=torch.uint8), 24, "relu", dtype),
        meta4d_case(draw_map((2, 96, 9, 11), dtype), 384),
        meta4d_case(draw_map((2, 224, 5, 3), dtype), 224),
        meta4d_case(draw_map((2, 230, 5, 27), dtype), 300),
        meta4d_case(draw_map((2, 448, 5, 3), dtype), 448),
        meta4d_case(draw_map((2, 224, 32, 33), dtype), 100),  # too many rows to be split
        meta4d_case(draw_map((2, 230, 16, 17), dtype), 100),
        bias_attention_case(2, 49, dtype, num_heads=2, key_dim=32, value_dim=128),
        bias_attention_case(2, 150, dtype, num_heads=2, key_dim=32, value_dim=128),
        attention_mixer_case(tokens, **heads),
        linear_mlp_case(tokens, 100),
        head_case(tokens, 30),
        head_case(tokens.repeat(20, 1, 1), 30),
    ]


def on_device(x: torch.Tensor) -> torch.Tensor:
    """A copy with x's strides, made by copying memory: no kernel runs for it."""
    order = sorted(range(x.ndim), key=lambda dim: -x.stride(dim))
    back = sorted(range(x.ndim), key=lambda position: order[position])
    return x.permute(order).contiguous().to(DEVICE).permute(back)


def moved(case: Case) -> Case:
    """The same call with its tensors on the GPU, those among the options, too."""
    options = {name: on_device(x) if isinstance(x, torch.Tensor) else x for name, x in case.options.items()}
    return Case(case.operation, tuple(map(on_device, case.arguments)), options)


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    for case in cases(getattr(torch, sys.argv[1])):
        result = on_cpu(moved(case).run("triton"))
        found = accuracy(result, case.exact(), case.run("eager"))
        bits = result.contiguous().view(torch.uint8).numpy().tobytes()
        shape = "x".join(map(str, case.arguments[0].shape))
        print(case.operation, shape, hashlib.sha256(bits).hexdigest()[:16], flush=True)
        if not found.passes():
            raise SystemExit(f"{case.operation} {shape}: {found}")


def on_cpu(x: torch.Tensor) -> torch.Tensor:
    order = sorted(range(x.ndim), key=lambda dim: -x.stride(dim))
    back = sorted(range(x.ndim), key=lambda position: order[position])
    return x.permute(order).cpu().permute(back)


if __name__ == "__main__":
    main()
