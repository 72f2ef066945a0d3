"""Checks of the compiled kernels at the work of networks: tasks, and their records."""

from __future__ import annotations

import contextlib
import functools
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from ...accuracy import Accuracy, accuracy
from ...apps.verify import checks, draw
from ...apps.verify_compiled import DEFAULT
from ...apps.verify_report import NETWORK, Check, describe_dtype
from ...kernels.tiling.choose import Question, answer, asked
from ...kernels.tiling.device import TARGETS, Device
from ...testing import Case, float32_as_such, unwritten_is_nan
from ...workload import OPERATIONS
from ..host import stub
from .digest import PACKAGE, digest
from .execution import Execution, executing
from .sampling import Sample, in_turn, sample

KINDS = ("network", "odd", "unaligned", "unordered", "large")
# Operations whose sums run over threads. A wrong shuffle may lose little: in bfloat16 these keep the accuracy rule with
# so many ulp in place of 2.
TIGHT, SUMS = 0.25, ("attention_mixer", "bias_attention", "head", "linear_mlp")


@dataclass(frozen=True)
class Task:
    """A check on a target.

    Attributes:
        check: an operation at a shape and dtype, or a network.
        capability: 90 for sm_90.
        kind: "network" for the work of a published network as it is; "odd" for shapes that no tile divides;
            "unaligned" for tensors at an odd address; "unordered" for programs that add in any order
            (`deterministic=False`); "large" for more than 2^31 elements.
    """

    check: Check
    capability: int
    kind: str = "network"

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for records of the same task."""
        check, target = self.check, f"sm_{self.capability}"
        return _key(check.operation, check.shape, describe_dtype(check.dtype), check.options, target, self.kind)


def _key(operation: str, shape: Sequence[int], dtype: str, options: dict[str, Any], *rest: str) -> tuple[Any, ...]:
    return operation, tuple(shape), dtype, json.dumps(options, sort_keys=True), *rest


@dataclass(frozen=True)
class Record:
    """The outcome of a task; a line of `executed.jsonl`.

    Attributes:
        operation, shape, dtype, options, where, target, kind: the task.
        kernels: of each launch its name, configuration, grid, programs that ran, and faults: of these programs, and of
            the writes of all.
        elements: of the output, that were compared with float64.
        max_error, mean_error, eager_max_error, eager_mean_error, ulp: as `Accuracy` has them.
        ratio: of the largest errors; None where eager has none.
        passes: whether the accuracy rule holds and no fault was found.
        error: that ended the task.
        seconds: it took, compiling included.
        tiles: what the table of configurations was asked, with its answers.
        triton, source: versions of Triton and, as a digest (`source`), of the kernels and their checks.
    """

    operation: str
    shape: tuple[int, ...]
    dtype: str
    options: dict[str, Any]
    where: list[str]
    target: str
    kind: str
    kernels: list[dict[str, Any]]
    elements: int
    max_error: float | None
    mean_error: float | None
    eager_max_error: float | None
    eager_mean_error: float | None
    ulp: float | None
    ratio: float | None
    passes: bool
    error: str | None
    seconds: float
    tiles: list[dict[str, Any]]
    triton: str
    source: str

    @classmethod
    def of(cls, task: Task, **outcome: Any) -> Record:
        """The record of a task by the present kernels and Triton; `outcome` holds the other attributes."""
        check = task.check
        return cls(
            operation=check.operation,
            shape=check.shape,
            dtype=describe_dtype(check.dtype),
            options=check.options,
            where=list(check.where),
            target=f"sm_{task.capability}",
            kind=task.kind,
            triton=triton.__version__,
            source=source(check.operation),
            **outcome,
        )

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal to that of its task."""
        return _key(self.operation, self.shape, self.dtype, self.options, self.target, self.kind)

    @property
    def is_current(self) -> bool:
        """Whether it is about the present kernels, with the tiles that the table has now, and the present Triton."""
        if (self.triton, self.source) != (triton.__version__, source(self.operation)):
            return False
        device = TARGETS[int(self.target.removeprefix("sm_"))]
        asked = [Question(one["operation"], getattr(torch, one["dtype"]), tuple(one["sizes"])) for one in self.tiles]
        return self.tiles == tiles_of(asked, device)

    @property
    def faults(self) -> list[str]:
        return [fault for kernel in self.kernels for fault in kernel["faults"]]


_OFFLINE, _HOST = Path(__file__).parent, Path(stub.__file__).parent
# Definitions behind all checks. Left out: the table, whose answers are in the record; modules of networks, which do not
# matter to an operation; gradients; this digest.
_BEHIND_ALL = (
    *((f"{PACKAGE}.testing", name) for name in ("draw_map", "float32_as_such", "unwritten_is_nan")),
    *((f"{PACKAGE}.accuracy", name) for name in ("Accuracy", "accuracy")),
    (f"{PACKAGE}.bench.offline.proof", "run"),
)
_LEFT_OUT = (
    *((f"{PACKAGE}.bench.offline.proof", name) for name in ("source", "tiles_of")),
    *((f"{PACKAGE}.kernels.tiling.choose", name) for name in ("answer", "overriding")),
    (f"{PACKAGE}.workload", "OPERATIONS"),
    (f"{PACKAGE}.backend", "*"),
    (f"{PACKAGE}.gradients", "*"),
)
_OF_NETWORKS = (
    (f"{PACKAGE}.apps.verify", "NetworkCase"),
    (f"{PACKAGE}.factory", "create_model"),
    (f"{PACKAGE}.testing", "randomise"),
    (f"{PACKAGE}.testing", "Case"),  # it looks all operations up by name
)


@functools.cache
def source(operation: str) -> str:
    """A digest of an operation's kernels, of the machine, and of the code that its results are compared by.

    Comments, docstrings and the table of configurations do not count (see `Record.tiles`), nor does the choice of a
    backend in `effformer.ops`. A network's has all kernels, and all that its modules are made of.
    """
    machine = [
        file
        for folder in (_OFFLINE / "ptx", _HOST)
        for file in sorted(folder.rglob("*"))
        if file.suffix in (".py", ".c")
    ]
    own = [
        definition
        for one in ([operation] if operation != NETWORK else OPERATIONS)
        for definition in (
            (f"{PACKAGE}.kernels.{one}", one), (f"{PACKAGE}.reference", one), (f"{PACKAGE}.testing", f"{one}_case"),
        )
    ]  # fmt: skip
    if operation == NETWORK:
        return digest([*own, *_BEHIND_ALL, (f"{PACKAGE}.factory", "create_model")], machine, _LEFT_OUT)
    return digest([*own, *_BEHIND_ALL], machine, (*_LEFT_OUT, *_OF_NETWORKS))


def tiles_of(questions: Iterable[Question], device: Device) -> list[dict[str, Any]]:
    """The table's answers on a device, as a record holds them."""
    found = []
    for question in dict.fromkeys(questions):
        use = answer(question, device)
        words = {"operation": question.operation, "dtype": describe_dtype(question.dtype), "sizes": [*question.sizes]}
        found.append(words | {"use": None if use is None else json.loads(json.dumps(asdict(use)))})
    return found


# --- tasks ------------------------------------------------------------------------------------------------------------


def tasks(
    models: Sequence[str],
    batches: Sequence[int],
    dtypes: Sequence[torch.dtype],
    capabilities: Sequence[int],
    operations: Iterable[str] = OPERATIONS,
) -> Iterator[Task]:
    """All tasks, each once: dtype by dtype, in each the networks in order, then odd, unaligned and large tensors."""
    seen = set()
    for dtype in dtypes:
        for model in models:
            for batch in batches:
                for check in checks([model], operations, [dtype], batch_size=batch):
                    for capability in capabilities:
                        task = Task(check, capability)
                        if task.key not in seen:
                            seen.add(task.key)
                            yield task
        for kind, shapes in _OTHERS.items():
            for operation, shape, options in shapes:
                if operation in operations:
                    check = Check(operation, shape, dtype, options, (kind,))
                    yield from (Task(check, capability, kind) for capability in capabilities)


def part(capabilities: Sequence[int], dtype: torch.dtype = torch.bfloat16) -> list[Task]:
    """A few checks that launch every kernel: L1 of fewer blocks and small images, and operations that it lacks."""
    network = {"name": "efficientformer_l1", "depths": (1, 1, 1, 2)}
    found = [(NETWORK, (1, 3, 64, 64), network), *_PART]
    return [
        Task(Check(operation, shape, dtype, options, ("part",)), capability)
        for capability in capabilities
        for operation, shape, options in found
    ]


_PART: list[tuple[str, tuple[int, ...], dict[str, Any]]] = [
    ("pool_mixer", (1, 48, 14, 14), {}),
    ("head", (1, 49, 448), {"classes": 1000}),
    ("head", (256, 49, 448), {"classes": 1000}),  # in two kernels
]
_HEADS = {"num_heads": 3, "key_dim": 16, "value_dim": 48}
_ODD: list[tuple[str, tuple[int, ...], dict[str, Any]]] = [
    ("pool_mixer", (3, 20, 5, 7), {}),
    ("conv_mlp", (3, 20, 5, 7), {"hidden": 56}),
    ("meta4d", (3, 20, 1, 9), {"hidden": 56}),
    ("meta4d", (5, 300, 3, 3), {"hidden": 900}),
    ("conv_norm", (2, 5, 9, 11), {"outputs": 13, "activation": "relu"}),
    ("conv_norm", (1, 72, 7, 5), {"outputs": 100, "activation": None}),
    ("bias_attention", (2, 23, 3 * (2 * 16 + 48)), _HEADS),
    ("attention_mixer", (2, 23, 72), _HEADS),
    ("linear_mlp", (3, 23, 72), {"hidden": 200}),
    ("head", (3, 23, 72), {"classes": 11}),
]
_MLP = {"hidden": 192}
_ATTENTION = {"num_heads": 8, "key_dim": 32, "value_dim": 128}
_UNALIGNED: list[tuple[str, tuple[int, ...], dict[str, Any]]] = [
    ("pool_mixer", (2, 48, 14, 14), {}),
    ("conv_mlp", (2, 48, 14, 14), _MLP),
    ("meta4d", (2, 48, 14, 14), _MLP),
    ("conv_norm", (2, 48, 14, 14), {"outputs": 96, "activation": None}),
    ("bias_attention", (2, 49, 1536), _ATTENTION),
    ("attention_mixer", (2, 49, 448), _ATTENTION),
    ("linear_mlp", (2, 49, 448), {"hidden": 1792}),
    ("head", (2, 49, 448), {"classes": 1000}),
]
_UNORDERED: list[tuple[str, tuple[int, ...], dict[str, Any]]] = [
    ("conv_mlp", (1, 224, 14, 14), {"hidden": 896}),
    ("meta4d", (1, 448, 7, 7), {"hidden": 1792}),
    ("meta4d", (2, 96, 9, 7), {"hidden": 384}),
]
# More than 2^31 elements; only those that a few programs touch are ever in memory.
_LARGE: list[tuple[str, tuple[int, ...], dict[str, Any]]] = [
    ("pool_mixer", (14_270, 48, 56, 56), {}),
    ("meta4d", (14_270, 48, 56, 56), _MLP),
    ("conv_norm", (7_140, 24, 112, 112), {"outputs": 48, "activation": "relu"}),
]


_OTHERS = {"odd": _ODD, "unaligned": _UNALIGNED, "unordered": _UNORDERED, "large": _LARGE}

# --- doing it ---------------------------------------------------------------------------------------------------------


def run(task: Task) -> Record:
    """Execute one task. An error that it raises becomes the record's."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    check, execution = task.check, Execution()
    found = dict.fromkeys(("max_error", "mean_error", "eager_max_error", "eager_mean_error", "ulp", "ratio"))
    passes, elements, failure = False, 0, None
    sampled: Sample | None = None
    questions: list[Question] = []
    try:
        # Filled memory would be all of a large tensor; PyTorch then asks for deterministic algorithms as well.
        fill = unwritten_is_nan if task.kind not in ("large", "unordered") else contextlib.nullcontext
        with float32_as_such(), fill():
            subject, reached = _draw(task)
            device = TARGETS[task.capability]

            def compute() -> Tensor:
                return _run(subject, task)

            if check.operation != NETWORK and check.shape[0] > 1 and task.kind in ("network", "large"):
                sampled = sample(compute, device, whole=task.kind != "large")
                if task.kind == "large":
                    _fill(subject)
            choice = in_turn(sampled.programs) if sampled else None
            with (
                asked() as questions,
                executing(device, reached=reached, options=DEFAULT, choose=choice) as execution,
            ):
                result = compute()
            errors, elements = _errors(subject, result, execution, whole=choice is None)
        found |= {name: getattr(errors, name) for name in found if name != "ratio"}
        found["ratio"] = errors.max_error / errors.eager_max_error if errors.eager_max_error else None
        tight = check.operation in SUMS and check.dtype == torch.bfloat16
        ran = bool(execution.executed) and any(one.outcome.programs for one in execution.executed)
        passes = errors.passes(TIGHT if tight else 2.0) and ran and elements > 0
    except Exception as error:  # of any kind: it is this task's outcome
        failure = f"{type(error).__name__}: {error}"
    wrong_writes = sampled.faults if sampled else [[] for _ in execution.executed]
    kernels = [
        {
            "kernel": one.launch.kernel.__name__,
            "configuration": one.launch.configuration,
            "grid": one.launch.grid,
            "programs": one.outcome.programs,
            "faults": [str(fault) for fault in (*one.outcome.faults, *faults)],
        }
        for one, faults in zip(execution.executed, wrong_writes, strict=False)
    ]
    passes = passes and not any(kernel["faults"] for kernel in kernels)
    return Record.of(
        task,
        kernels=kernels,
        elements=elements,
        **found,
        passes=passes,
        error=failure,
        seconds=round(time.perf_counter() - start, 2),
        tiles=tiles_of(questions, TARGETS[task.capability]),
    )


def _draw(task: Task) -> tuple[Any, list[Tensor]]:
    """The call to run, and the tensors that kernels reach by addresses alone."""
    check = task.check
    if task.kind == "large":
        small = draw(replace(check, shape=(1, *check.shape[1:])), torch.device("cpu"))
        assert isinstance(small, Case)
        batch, channels, height, width = check.shape
        x = torch.empty(batch, height, width, channels, dtype=check.dtype).permute(0, 3, 1, 2)
        return replace(small, arguments=(x, *small.arguments[1:])), []
    subject = draw(check, torch.device("cpu"))
    if not isinstance(subject, Case):
        return subject, subject.tensors
    if task.kind == "unaligned":
        subject = replace(subject, arguments=tuple(map(_moved, subject.arguments)))
    return subject, []


def _run(subject: Any, task: Task) -> Tensor:
    """The kernels' result."""
    if task.kind != "unordered":
        found: Tensor = subject.run("triton")
        return found
    case: Case = replace(subject, options=subject.options | {"deterministic": False})
    return case.run("triton")


def _moved(tensor: Tensor) -> Tensor:
    """The same values one element further into a storage."""
    other = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
    return other.as_strided(tensor.shape, tensor.stride(), 1).copy_(tensor)


def _fill(case: Case) -> None:
    """Draw images at the beginning, in the middle and at the end."""
    x, generator = case.arguments[0], torch.Generator().manual_seed(0)
    batch = len(x)
    for image in {0, 1, batch // 2 - 1, batch // 2, batch // 2 + 1, batch - 2, batch - 1}:
        x[image] = torch.randn(x.shape[1:], generator=generator)


def _errors(subject: Any, result: Tensor, execution: Execution, *, whole: bool) -> tuple[Accuracy, int]:
    """Errors, and the number of elements that were compared: all, or those that the programs wrote."""
    if whole:
        return accuracy(result, subject.exact(), subject.run("eager")), result.numel()
    written = execution.written(result)
    images = written.any(dim=tuple(range(1, written.ndim))).nonzero()[:, 0]
    shown = replace(subject, arguments=(subject.arguments[0][images], *subject.arguments[1:]))
    mask = written[images]
    return accuracy(result[images][mask], shown.exact()[mask], shown.run("eager")[mask]), int(mask.sum())
