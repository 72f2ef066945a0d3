"""Verification of the kernels on this machine: the work of `effformer verify`.

`checks` lists the fused operations at the shapes that they have in a network, and whole networks. `verify` runs them on
the kernels, one after another, and compares each result with float64 by the rule of `effformer.accuracy.Accuracy`.
Where the kernels cannot run, a check is skipped with the reason; eager PyTorch never takes their place.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..accuracy import accuracy
from ..backend import TRITON_DTYPES
from ..checks import check_choice, check_count
from ..config import preset
from ..factory import create_model
from ..model.network import EfficientFormer, set_backend
from ..ops import why_not_triton
from ..testing import Case, draw_case, draw_map, float32_as_such, randomise, unwritten_is_nan
from ..workload import OPERATIONS, network_work
from .verify_report import NETWORK, Check, Outcome, Ran

if TYPE_CHECKING:
    from ..kernels.launch import Launch

CHECKED = (*OPERATIONS, NETWORK)


# --- what there is to check -------------------------------------------------------------------------------------------


def checks(
    models: Iterable[str] = ("efficientformer_l1",),
    operations: Iterable[str] = CHECKED,
    dtypes: Iterable[torch.dtype] = TRITON_DTYPES,
    *,
    size: tuple[int, int] = (224, 224),
    batch_size: int = 2,
) -> list[Check]:
    """Every operation in every dtype, once at each shape that it has in these networks, and the networks themselves.

    Args:
        models: names of published networks.
        operations: of `CHECKED`.
        dtypes: of `effformer.backend.TRITON_DTYPES`.
        size: height and width of the images, 1 or more.
        batch_size: of the images, 1 or more.

    Raises:
        ValueError: for an unknown model or operation, or a batch size or side below 1.
    """
    check_count("batch_size", batch_size, least=1)
    operations, dtypes = tuple(dict.fromkeys(operations)), tuple(dict.fromkeys(dtypes))
    for operation in operations:
        check_choice("operations", operation, CHECKED)
    found: dict[tuple[Any, ...], list[str]] = {}
    for model in dict.fromkeys(models):
        for work in network_work(preset(model), batch_size, size):
            found.setdefault((work.operation, work.shape, *work.options.items()), []).append(f"{model} {work.where}")
        found[NETWORK, (batch_size, 3, *size), ("name", model)] = [model]
    ordered = sorted(found, key=lambda key: CHECKED.index(key[0]))
    return [
        Check(operation, shape, dtype, dict(options), tuple(found[operation, shape, *options]))
        for operation, shape, *options in ordered
        for dtype in dtypes
        if operation in operations
    ]


# --- checking ---------------------------------------------------------------------------------------------------------


def verify(checks: Iterable[Check], device: torch.device, *, seed: int = 0, repeats: int = 1) -> Iterator[Outcome]:
    """Run checks one after another on `device`.

    Each check draws its arguments on the CPU from the same seed, so they depend neither on the device nor on other
    checks. TF32 is off in the kernels and in eager PyTorch. Output that the kernels have not written is NaN.

    On a CPU, Triton interprets the kernels, in a process started with TRITON_INTERPRET=1. An error that a check raises
    becomes its outcome, and the others go on.
    """
    for check in checks:
        reason = why_not_verified(device, check.dtype)
        yield Outcome(check, skipped=reason) if reason else _outcome(check, device, seed, repeats)


def why_not_verified(device: torch.device, dtype: torch.dtype | None = None) -> str | None:
    """The reason why the kernels cannot be verified on `device`, in `dtype` or at all; None where they can."""
    if reason := why_not_triton(device, dtype, asked_for=True):
        return reason
    from ..kernels.launch import INTERPRETED

    if INTERPRETED and device.type != "cpu":
        return "TRITON_INTERPRET is set: the kernels would be interpreted, and not run on the GPU"
    return None


@dataclass(frozen=True)
class NetworkCase:
    """A network with random weights in dtype T, and images; the result is that of the final norm, [B, N, C]."""

    network: EfficientFormer
    images: Tensor

    @torch.no_grad()
    def run(self, backend: str) -> Tensor:
        set_backend(self.network, backend)
        return self.network.forward_features(self.images)

    @property
    def tensors(self) -> list[Tensor]:
        """Parameters and buffers, which kernels may reach by their addresses."""
        return [*self.network.parameters(), *self.network.buffers()]

    @torch.no_grad()
    def exact(self) -> Tensor:
        exact = copy.deepcopy(self.network).double()  # of the weights as T rounded them
        set_backend(exact, "eager")
        return exact.forward_features(self.images.double())


def draw(check: Check, device: torch.device, seed: int = 0) -> Case | NetworkCase:
    """The operation or network of `check` with random arguments: it runs on any backend, and in float64."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        if check.operation != NETWORK:
            return draw_case(check.operation, check.shape, check.dtype, **check.options).to(device)
        network = create_model(**check.options, num_classes=0)
        randomise(network, seed).eval().to(device, check.dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
        return NetworkCase(network, draw_map(check.shape, check.dtype).to(device))


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
                    finally:  # the launches are known even after an error
                        ran = summary(launches)
                launches.clear()  # they hold tensors
                differing = sum(not _same_bits(result, subject.run("triton")) for _ in range(repeats))
            found = accuracy(result, subject.exact(), subject.run("eager"))
    except Exception as error:  # of any kind: it is this check's outcome, and the others go on
        raised = f"{type(error).__name__}: {error}"
    return Outcome(check, found, repeats if found else 0, differing, ran, raised=raised)


def summary(launches: Sequence[Launch]) -> tuple[Ran, ...]:
    """Equal launches counted, in the order of their first."""
    counted = Counter(
        (launch.kernel.__name__.removesuffix("_kernel"), *launch.configuration.items()) for launch in launches
    )
    return tuple(Ran(kernel, dict(items), times) for (kernel, *items), times in counted.items())


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether all bits are equal: NaN may equal NaN, and 0 differs from -0."""
    bits = {2: torch.int16, 4: torch.int32}[one.element_size()]
    return torch.equal(one.view(bits), other.view(bits))
