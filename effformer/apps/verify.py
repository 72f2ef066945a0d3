"""Whether the kernels compute what they should on this machine: what `effformer verify` does.

`checks` lists what there is to check: each fused operation at the shapes that it has in a network, and whole networks.
`verify` runs them one after another on the kernels and holds each result against float64, by the rule of
`effformer.testing.Accuracy`. Kernels that cannot run here are never replaced by eager PyTorch: such a check is skipped,
and says why.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..config import check_choice, check_count, preset
from ..factory import create_model
from ..model.network import EfficientFormer, set_backend
from ..ops import why_not_triton
from ..testing import (
    Case,
    accuracy,
    attention_mixer_case,
    bias_attention_case,
    conv_mlp_case,
    conv_norm_case,
    draw_map,
    float32_as_such,
    head_case,
    linear_mlp_case,
    meta4d_case,
    pool_mixer_case,
    randomise,
    unwritten_is_nan,
)
from .verify_report import NETWORK, Outcome, Ran
from .verify_report import Check as Check

if TYPE_CHECKING:
    from ..kernels.launch import Launch

DTYPES = (torch.float16, torch.bfloat16, torch.float32)

_MAP_CASES: dict[str, Callable[..., Case]] = {
    "pool_mixer": pool_mixer_case,
    "conv_mlp": conv_mlp_case,
    "meta4d": meta4d_case,
    "conv_norm": conv_norm_case,
}
_TOKEN_CASES: dict[str, Callable[..., Case]] = {
    "attention_mixer": attention_mixer_case,
    "linear_mlp": linear_mlp_case,
    "head": head_case,
}
OPERATIONS = (*_MAP_CASES, "bias_attention", *_TOKEN_CASES, NETWORK)


# --- what there is to check -------------------------------------------------------------------------------------------


def checks(
    models: Iterable[str] = ("efficientformer_l1",),
    operations: Iterable[str] = OPERATIONS,
    dtypes: Iterable[torch.dtype] = DTYPES,
    *,
    size: tuple[int, int] = (224, 224),
    batch_size: int = 2,
) -> list[Check]:
    """Every operation in every dtype, at each shape that it has in these networks once, and the networks themselves.

    Args:
        models: names of published networks.
        operations: of `OPERATIONS`.
        dtypes: of `DTYPES`.
        size: height and width of the images.
        batch_size: of the images, 1 or more.

    Raises:
        ValueError: for an unknown model or operation, or a batch size below 1.
    """
    check_count("batch_size", batch_size, least=1)
    operations, dtypes = tuple(dict.fromkeys(operations)), tuple(dict.fromkeys(dtypes))
    for operation in operations:
        check_choice("operations", operation, OPERATIONS)
    found: dict[tuple[Any, ...], list[str]] = {}
    for model in dict.fromkeys(models):
        for where, operation, shape, options in _calls(model, size, batch_size):
            found.setdefault((operation, shape, *options.items()), []).append(where)
    ordered = sorted(found, key=lambda key: OPERATIONS.index(key[0]))
    return [
        Check(operation, shape, dtype, dict(options), tuple(found[operation, shape, *options]))
        for operation, shape, *options in ordered
        for dtype in dtypes
        if operation in operations
    ]


def _calls(model: str, size: tuple[int, int], batch: int) -> Iterator[tuple[str, str, tuple[int, ...], dict[str, Any]]]:
    """(where, operation, input's shape, options) of all that `model` computes of `OPERATIONS`."""
    config = preset(model)
    (height, width), inputs = size, 3
    for outputs in (config.widths[0] // 2, config.widths[0]):
        convolution: dict[str, Any] = {"outputs": outputs, "activation": "relu"}
        yield f"{model} stem", "conv_norm", (batch, inputs, height, width), convolution
        height, width, inputs = _halved(height), _halved(width), outputs
    for stage, (depth, channels) in enumerate(zip(config.depths, config.widths, strict=True), 1):
        where = f"{model} stage {stage}"
        if stage > 1:
            convolution = {"outputs": channels, "activation": None}
            yield where, "conv_norm", (batch, config.widths[stage - 2], height, width), convolution
            height, width = _halved(height), _halved(width)
        hidden: dict[str, Any] = {"hidden": int(channels * config.mlp_ratio)}
        num_vit = config.num_vit if stage == len(config.depths) else 0
        if depth > num_vit:
            for operation in ("pool_mixer", "conv_mlp", "meta4d"):
                yield where, operation, (batch, channels, height, width), hidden if operation != "pool_mixer" else {}
        if num_vit:
            tokens = batch, height * width
            heads = {"num_heads": config.num_heads, "key_dim": config.key_dim, "value_dim": config.value_dim}
            qkv = config.num_heads * (2 * config.key_dim + config.value_dim)
            yield where, "bias_attention", (*tokens, qkv), heads
            yield where, "attention_mixer", (*tokens, channels), heads
            yield where, "linear_mlp", (*tokens, channels), hidden
            yield where, "head", (*tokens, channels), {"classes": 1000}
    yield model, NETWORK, (batch, 3, *size), {"name": model}


def _halved(side: int) -> int:
    return (side + 1) // 2  # by a 3x3 convolution of stride 2 with padding 1


# --- checking ---------------------------------------------------------------------------------------------------------


def verify(checks: Iterable[Check], device: torch.device, *, seed: int = 0, repeats: int = 1) -> Iterator[Outcome]:
    """Run checks one after another on `device`.

    Arguments are drawn on the CPU, each check's from the same seed: it does not matter which others run, or where.
    float32 products are float32's own (no TF32), in the kernels and in eager PyTorch. What the kernels have not written
    is NaN, and shows.

    On a CPU, Triton interprets the kernels, in a process started with TRITON_INTERPRET=1. An error that a check raises
    is its outcome, and the others go on.
    """
    for check in checks:
        reason = why_not_verified(device, check.dtype)
        yield Outcome(check, skipped=reason) if reason else _outcome(check, device, seed, repeats)


def why_not_verified(device: torch.device, dtype: torch.dtype | None = None) -> str | None:
    """Why the kernels cannot be verified on `device`, in `dtype` or at all; None where they can."""
    if reason := why_not_triton(device, dtype, asked_for=True):
        return reason
    from ..kernels.launch import INTERPRETED

    if INTERPRETED and device.type != "cpu":
        return "TRITON_INTERPRET is set: the kernels would be interpreted, and not run on the GPU"
    return None


@dataclass(frozen=True)
class _Network:
    """A randomised network in dtype T and images; its result is what the final norm returns, [B, N, C]."""

    network: EfficientFormer
    images: Tensor

    @torch.no_grad()
    def run(self, backend: str) -> Tensor:
        set_backend(self.network, backend)
        return self.network.forward_features(self.images)

    @torch.no_grad()
    def exact(self) -> Tensor:
        exact = copy.deepcopy(self.network).double()  # of the weights as T rounded them
        set_backend(exact, "eager")
        return exact.forward_features(self.images.double())


def draw(check: Check, device: torch.device, seed: int = 0) -> Case | _Network:
    """What `check` is about, drawn: it runs on any backend, and in float64."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        if check.operation == NETWORK:
            network = create_model(check.options["name"], num_classes=0)
            randomise(network, seed).eval().to(device, check.dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
            return _Network(network, draw_map(check.shape, check.dtype).to(device))
        if check.operation in _MAP_CASES:
            x = draw_map(check.shape, check.dtype)
            return _MAP_CASES[check.operation](x, **check.options).to(device)
        if check.operation in _TOKEN_CASES:
            x = torch.randn(check.shape).to(check.dtype)
            return _TOKEN_CASES[check.operation](x, **check.options).to(device)
        batch, tokens, _ = check.shape
        return bias_attention_case(batch, tokens, check.dtype, **check.options).to(device)


def _outcome(check: Check, device: torch.device, seed: int, repeats: int) -> Outcome:
    from ..kernels.launch import recorded

    ran: tuple[Ran, ...] = ()
    found, differing, raised = None, 0, None
    try:
        subject = draw(check, device, seed)
        with float32_as_such():
            with unwritten_is_nan():
                with recorded() as launches:
                    try:
                        result = subject.run("triton")
                    finally:  # what was launched is known even if it raised
                        ran = _summary(launches)
                launches.clear()  # they hold tensors
                differing = sum(not _same_bits(result, subject.run("triton")) for _ in range(repeats))
            found = accuracy(result, subject.exact(), subject.run("eager"))
    except Exception as error:  # whatever it is, it is this check's, and the others are to go on
        raised = f"{type(error).__name__}: {error}"
    return Outcome(check, found, repeats if found else 0, differing, ran, raised=raised)


def _summary(launches: Sequence[Launch]) -> tuple[Ran, ...]:
    """Equal launches counted, in the order of their first."""
    counted = Counter(
        (launch.kernel.__name__.removesuffix("_kernel"), *launch.configuration.items()) for launch in launches
    )
    return tuple(Ran(kernel, dict(items), times) for (kernel, *items), times in counted.items())


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Equality that tells NaN from NaN and 0 from -0."""
    bits = {2: torch.int16, 4: torch.int32}[one.element_size()]
    return torch.equal(one.view(bits), other.view(bits))
