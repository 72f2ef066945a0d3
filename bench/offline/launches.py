"""The launches of the published networks, described and not run, for the audit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from ...config import PRESETS
from ...kernels.bias_attention import bias_attention_launch, new_values, prepare_bias
from ...kernels.fold import Parameters
from ...kernels.launch import Launch, recorded
from ...kernels.layer_norm import layer_norm_launch
from ...kernels.layout import token_rows
from ...kernels.operators import IMPLEMENTATIONS
from ...kernels.register import arguments_of
from ...kernels.tiling.device import Device, stand_in
from ...testing import Case, bias_attention_case, conv_norm_case, draw_case, draw_map
from ...workload import network_work

Described = tuple[str, str, Launch]  # operation, shape of its input with anything unusual, launch


def network_launches(
    name: str, dtype: torch.dtype, device: Device, *, batch: int = 256, size: tuple[int, int] = (224, 224)
) -> Iterator[Described]:
    """The launches of a published network's work on `device`; nothing is allocated.

    Maps are channels_last. Images come in the layouts that users have: contiguous in `dtype` (and in float32), and
    [batch, height, width, 3] in uint8. `attention_mixer` contains `bias_attention`, which is described once more with
    a prepared bias alone. Gradients are included, and training of 256 and of 8 images of 224 by 224.
    """
    for work in network_work(PRESETS[name], batch, size):
        if work.operation == "bias_attention":
            yield _prepared(batch, work.shape[1], dtype, device, **work.options)
        elif work.part == "stem, 1st":
            kinds = [(dtype, "contiguous", ""), (torch.uint8, "channels_last", ", uint8")]
            if dtype != torch.float32:  # of a live network
                kinds.append((torch.float32, "contiguous", ", under autocast"))
            for images, layout, note in kinds:
                draw = partial(_convolution, work.shape, images, layout, dtype=dtype, **work.options)
                yield from _launches(draw, device, note)
        else:
            draw = partial(draw_case, work.operation, work.shape, dtype, **work.options)
            yield from _launches(draw, device)
            if work.operation in ("meta4d", "attention_mixer", "linear_mlp"):
                yield from backward_launches(draw, device)
            if work.operation == "meta4d" and batch in (256, 8) and size == (224, 224):
                yield from training_launches(work.shape, dtype, device, **work.options)


def training_launches(
    shape: tuple[int, ...], dtype: torch.dtype, device: Device, *, hidden: int, activation: str = "gelu"
) -> list[Described]:
    """The launches of a 4D block in training, with stochastic depth, and of all its gradients."""
    channels, eps = shape[1], (1e-5, 1e-5)
    with stand_in(device), torch.device("meta"), recorded(run=False) as launches:
        wide, narrow = torch.empty(hidden), torch.empty(channels)
        x, keep = draw_map(shape, dtype), torch.empty(shape[0])
        first = torch.empty(hidden, channels, dtype=dtype), wide, wide, wide
        second = torch.empty(channels, hidden, dtype=dtype), narrow, narrow, narrow
        given = (x, narrow, *first, *second, narrow, keep, keep)
        _, *kept = IMPLEMENTATIONS["meta4d_train"](*given, *[None] * 4, *eps, activation, "")
        IMPLEMENTATIONS["meta4d_train_backward"](x, *given, *kept, *eps, activation, "", [True] * 11)
    return [("meta4d_train", f"{list(shape)}", launch) for launch in launches]


def backward_launches(draw: Callable[[], Case], device: Device, note: str = "") -> list[Described]:
    """The launches of all gradients of a call of an operation."""
    with stand_in(device), torch.device("meta"), recorded(run=False) as launches:
        case = draw()
        x, operator = case.arguments[0], f"{case.operation}_backward"
        grad = new_values(x, **_heads(case)) if case.operation == "bias_attention" else torch.empty_like(x)
        options = case.options | {"needed": [True] * len(case.arguments)}
        IMPLEMENTATIONS[operator](*arguments_of(operator, (grad, *case.arguments), options))
    return [
        (operator, f"{list(x.shape)}{note}", launch)
        for launch in launches
        if launch.kernel.__name__.endswith("_backward_kernel")  # what is computed anew comes with the forward
    ]


def _heads(case: Case) -> dict[str, int]:
    return {name: case.options[name] for name in ("num_heads", "key_dim")}


def unusual_launches(dtype: torch.dtype, device: Device) -> Iterator[Described]:
    """Launches that no published network has, for entries of the table: odd channels, wide or few tokens, mixed dtypes.

    They keep alive the entries that other networks, autocast and `deterministic=False` need.
    """
    for channels in (24, 80):
        for operation in ("meta4d", "conv_mlp", "pool_mixer"):
            mlp: dict[str, Any] = {} if operation == "pool_mixer" else {"hidden": 4 * channels}
            yield from _launches(partial(draw_case, operation, (8, channels, 28, 28), dtype, **mlp), device)
    pool = partial(draw_case, "pool_mixer", (8, 48, 28, 28), dtype, "contiguous")
    yield from _launches(pool, device, ", contiguous")
    with stand_in(device), torch.device("meta"):
        rows, vector = token_rows(torch.empty(8, 49, 8192, dtype=dtype)), torch.empty(8192)
        norm = layer_norm_launch(rows, vector, vector, 1e-5, rows)
    yield "layer_norm", "[8, 49, 8192]", norm
    yield _fold(dtype, device)
    yield from _launches(partial(draw_case, "head", (8, 49, 8192), dtype), device)
    for tokens, key, value in ((12, 32, 128), (12, 48, 160), (49, 48, 160), (49, 320, 32)):
        heads = {"num_heads": 8, "key_dim": key, "value_dim": value}
        attention = partial(bias_attention_case, 8, tokens, dtype, **heads)
        for operation, _, launch in (*_launches(attention, device), *backward_launches(attention, device)):
            yield operation, f"[8, {tokens}, 8 * (2 * {key} + {value})]", launch
        yield _prepared(8, tokens, dtype, device, **heads)
    if dtype == torch.float32:  # as under autocast: few rows, and the products alone are in 16 bit
        few = ("linear_mlp", (1, 49, 448), 1792), ("linear_mlp", (8, 49, 448), 1792), ("meta4d", (2, 512, 7, 7), 2048)
        for operation, shape, hidden in few:
            draw = partial(_of_half_weights, operation, shape, hidden)
            yield from _launches(draw, device, ", weights in float16")
    else:
        for maps in ((1, 224, 14, 14), (8, 448, 7, 7), (2, 512, 7, 7), (1, 768, 7, 7)):
            draw = partial(draw_case, "meta4d", maps, dtype, hidden=4 * maps[1])
            yield from _launches(draw, device, ", in any order", deterministic=False)


def _fold(dtype: torch.dtype, device: Device) -> Described:
    """The fold of a live network's parameters: one kernel for each dtype of products."""
    vector, matrix = torch.empty(8), torch.empty(8, 8)
    with stand_in(device):
        parameters = Parameters([vector, matrix], dtype)
        parameters.fold_layer_scale(vector, vector)
        parameters.mean(matrix, matrix)
        launch = parameters.launch(dict.fromkeys(map(id, parameters.folded), 0), 1 << 10, torch.device("meta"))
    assert launch is not None
    return "fold", "parameters of a live network", launch


def _launches(draw: Callable[[], Case], device: Device, note: str = "", **options: object) -> list[Described]:
    """The launches of a call of an operation, with further options."""
    with stand_in(device), torch.device("meta"), recorded(run=False) as launches:
        case = draw()
        # The operator itself would answer tensors on the meta device with its fake.
        left = getattr(torch.ops.effformer, case.operation).default._schema.arguments[len(case.arguments) :]
        given = case.options | options
        IMPLEMENTATIONS[case.operation](*case.arguments, *(given.get(one.name, one.default_value) for one in left))
    return [(case.operation, f"{list(case.arguments[0].shape)}{note}", launch) for launch in launches]


def _convolution(shape: tuple[int, ...], images: torch.dtype, layout: str = "channels_last", **options: Any) -> Case:
    return conv_norm_case(draw_map(shape, images, layout), **options)


def _of_half_weights(operation: str, shape: tuple[int, ...], hidden: int) -> Case:
    case = draw_case(operation, shape, torch.float32, hidden=hidden)
    arguments = tuple(one.half() if one.ndim == 2 else one for one in case.arguments)
    return Case(operation, arguments, case.options)


def _prepared(
    batch: int, tokens: int, dtype: torch.dtype, device: Device, *, num_heads: int, key_dim: int, value_dim: int
) -> Described:
    """Attention with a prepared bias."""
    with stand_in(device), torch.device("meta"):
        heads = {"num_heads": num_heads, "key_dim": key_dim, "value_dim": value_dim}
        qkv, bias = bias_attention_case(batch, tokens, dtype, **heads).arguments
        bias, out = prepare_bias(bias, key_dim, value_dim, dtype), new_values(qkv, num_heads, key_dim)
        launch = bias_attention_launch(qkv, bias, num_heads, key_dim, out, prepared=True)
    return "bias_attention", f"{list(qkv.shape)}, prepared", launch
