"""Forwards of a live network without gradients: each of its parts runs as one plan of launches.

Parameters may change in any way between two forwards, hooks may come and modules go. So each forward compares all that
the plan rests on with its former state: the modules' attributes, and their tensors' addresses. The tensors' values are
read on the device (`effformer.kernels.fold`). Where a part is not plain, its modules run, and block by block
`fusion.fusable` chooses.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

from .. import ops
from ..backend import autocast, products_dtype, why_not_triton
from .steps import Source, Step, attention_sides, run_steps
from .wrappers import is_plain_tensor

if TYPE_CHECKING:
    from ..kernels.plan import Plan

_MOST_PLANS = 64  # of a part: one for each form of input, which is batch, sides, strides and dtype
_REBUILDS = 4  # after as many changes from one forward to the next, only a state that stays is planned

# Attributes of a module that are changed in place; of a snapshot they are copies.
_COPIED = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_modules")
_MODES = (
    torch._C._TorchDispatchModeKey.FAKE,
    torch._C._TorchDispatchModeKey.PROXY,
    torch._C._TorchDispatchModeKey.FUNCTIONAL,
)


class Part(Protocol):
    """A part of a network that can be planned."""

    @property
    def owner(self) -> nn.Module:
        """The module with which its plans live and die."""

    def watched(self) -> Iterator[nn.Module]:
        """All modules that it consists of."""

    def settings(self) -> tuple[Any, ...]:
        """Settings of the owner that the plan rests on; each forward compares them."""

    def backends(self) -> set[str]:
        """The backends of its fused operations."""

    def why_unplanned(self) -> str | None:
        """The reason why its steps do not compute the same as all its modules now; None where they do."""

    def input(self, x: Tensor) -> Tensor | None:
        """x as the steps take it; None for another shape than theirs."""

    def steps(self, source: Source) -> Iterator[Step]:
        """Its steps, with arguments from the source."""


class Planned:
    """A module that is a part by itself."""

    backend: str

    @property
    def owner(self) -> nn.Module:
        assert isinstance(self, nn.Module)
        return self

    def watched(self) -> Iterator[nn.Module]:
        return self.owner.modules()

    def settings(self) -> tuple[Any, ...]:
        return ()

    def backends(self) -> set[str]:
        return {self.backend}


class _State:
    """A part's modules and tensors at one time, and the plans that rest on them.

    It holds no module that holds the part (unless an attribute does), so that both are freed when the part is.

    Attributes:
        devices: of the parameters.
        plans: by the form of the input; the reason where that has none.
        forwards: the number of them so far.
    """

    def __init__(self, part: Part, before: _State | None) -> None:
        owner, modules = part.owner, list(part.watched())
        self._modules = [module for module in modules if module is not owner]
        self._classes = [type(module) for module in self._modules]
        self._attributes = [vars(module) for module in modules]
        self._seen = [_snapshot(attributes) for attributes in self._attributes]
        self._tensors, self._settings = self._forms(), part.settings()
        self.backends, self.devices = part.backends(), {tensor.device for tensor in self.tensors()}
        self.plans: dict[Any, Plan | str] = {}
        self.forwards = 0
        self._changes: int = 0 if before is None or before.forwards > 1 else before._changes + 1

    def holds(self, part: Part) -> bool:
        """Whether the part is still in this state."""
        try:
            return (
                part.settings() == self._settings
                and self._attributes == self._seen
                and [type(module) for module in self._modules] == self._classes
                and self._forms() == self._tensors
            )
        except Exception:  # a tensor without memory; an attribute whose comparison is no truth value
            return False

    @property
    def is_stable(self) -> bool:
        """Whether it is worth a plan: not where each forward finds another state."""
        return self._changes < _REBUILDS or self.forwards > 1

    def _forms(self) -> list[Any]:
        """Name, address, dtype, shape, strides and type of each parameter and buffer."""
        return [
            None if one is None else (name, one.data_ptr(), one.dtype, one.shape, one.stride(), type(one))
            for attributes in self._attributes
            for holder in (attributes["_parameters"], attributes["_buffers"])
            for name, one in holder.items()
        ]

    def tensors(self) -> list[Tensor]:
        """The parameters and buffers of now."""
        holders = (attributes[kind] for attributes in self._attributes for kind in ("_parameters", "_buffers"))
        return [tensor for holder in holders for tensor in holder.values() if tensor is not None]


def _snapshot(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes of a module; tensors are looked at by themselves."""
    return {name: dict(value) if name in _COPIED else value for name, value in attributes.items()}


def _why_not(tensors: Sequence[Tensor]) -> str | None:
    """The reason why a plan cannot take the parameters from their addresses; None where it can."""
    for tensor in tensors:
        if not is_plain_tensor(tensor) or tensor.is_meta or tensor.is_neg():
            return f"a parameter is a {type(tensor).__name__} on {tensor.device}, {tensor.layout}, or a negated view"
    return None


_states: weakref.WeakKeyDictionary[nn.Module, _State] = weakref.WeakKeyDictionary()
_lock = threading.RLock()


def run(part: Part, x: Tensor) -> Tensor | None:
    """The part's result for x by a plan; None where its modules have to compute it."""
    if torch.compiler.is_compiling():
        return None
    found = decide(part, x)
    if isinstance(found, str):
        return None
    result = found.plan(found.x, found.state.tensors)
    assert isinstance(result, Tensor)
    return result


class Decision(NamedTuple):
    """A plan, the input as it takes it, and the state that it rests on."""

    plan: Plan
    x: Tensor
    state: _State


def decide(part: Part, x: Tensor) -> Decision | str:
    """The plan for x, made if need be; or the reason why the part's modules have to compute."""
    if reason := _why_not_called(part, x):
        return reason
    state = _states.get(part.owner)
    if state is None or not state.holds(part):
        found = _new_state(part, x.device, state)
        if isinstance(found, str):
            return found
        state = found
    state.forwards += 1
    if not state.is_stable:
        return "its parameters or modules change at each forward"
    if state.devices != {x.device}:
        return "its input and its parameters are on different devices"
    given = part.input(x.resolve_neg() if x.is_neg() else x)
    if given is None or 0 in given.shape:
        return "its input has another shape than its steps take"
    dtype = products_dtype(given)
    form, capturing = form_of(given, dtype), given.is_cuda and torch.cuda.is_current_stream_capturing()
    if form not in state.plans and not capturing:
        with _lock:
            if form not in state.plans:  # another thread made it
                add_bounded(state.plans, form, _new_plan(part, state, given, dtype), _MOST_PLANS)
    plan = state.plans.get(form)
    if plan is None or (capturing and not isinstance(plan, str) and not plan.ready):
        # Copying the table of addresses, and loading kernels, would end the capture.
        return "a graph is captured, and no forward of this form came before"
    return plan if isinstance(plan, str) else Decision(plan, given, state)


def add_bounded(entries: dict[Any, Any], key: Any, value: Any, most: int) -> None:
    """Add an entry, and drop the oldest beyond `most`."""
    entries[key] = value
    while len(entries) > most:
        del entries[next(iter(entries))]


def _is_plain_call(x: Tensor) -> bool:
    """Whether tracers, transformations, fake, proxy and functional modes, and hooks for all modules are absent."""
    return (
        type(x) is Tensor
        and forward_ad._current_level < 0
        and torch._C._get_tracing_state() is None
        and torch._C._functorch.peek_interpreter_stack() is None
        and all(torch._C._get_dispatch_mode(mode) is None for mode in _MODES)
        and torch._ops._len_torch_dispatch_stack_pre_dispatch() == 0
        and not _has_any_global_hook()
    )


def _why_not_called(part: Part, x: Tensor) -> str | None:
    """The reason, of the call, the backend or a gradient, that rules a plan out before modules are compared."""
    if not _is_plain_call(x):
        return "a tracer, a transformation or hooks for all modules need the modules"
    backends = part.backends()
    if "eager" in backends:
        return "backend='eager'"
    if x.device.type != "cuda" and "triton" not in backends and (reason := why_not_triton(x.device)):
        return reason
    if torch.is_grad_enabled() and (
        x.requires_grad
        or any(
            tensor is not None and tensor.requires_grad
            for module in part.watched()
            for tensor in (*module._parameters.values(), *module._buffers.values())
        )
    ):
        return "a gradient is needed"
    return "it is a replica of DataParallel" if vars(part.owner).get("_is_replica") else None


def _new_state(part: Part, device: torch.device, before: _State | None) -> _State | str:
    """The part's state of now, kept for later forwards; or the reason why there can be no plan."""
    if reason := part.why_unplanned() or why_not_triton(device, asked_for="triton" in part.backends()):
        return reason  # not kept: hooks may hold the part
    state = _State(part, before)
    if reason := _why_not(state.tensors()):
        return reason
    with _lock:
        _states[part.owner] = state
    return state


def form_of(x: Tensor, dtype: torch.dtype) -> tuple[Any, ...]:
    """A plan's key: inputs of one form, with products in `dtype`, have the same launches."""
    from ..kernels.launch import tf32_allowed
    from ..kernels.tiling.choose import overriding

    form = x.shape, x.stride(), x.dtype, x.data_ptr() % 16 == 0, dtype, autocast(x.device.type), overriding()
    if dtype != torch.float32:
        return form
    return *form, *tf32_allowed()


def _new_plan(part: Part, state: _State, x: Tensor, dtype: torch.dtype) -> Plan | str:
    """A plan for inputs like x, with products in `dtype`; the reason where there is none."""
    from ..kernels.fold import NotFoldableError, Parameters
    from ..kernels.operators import call
    from ..kernels.plan import NotPlannableError, Plan

    tensors = state.tensors()
    matrices = {tensor.dtype for tensor in tensors if tensor.ndim > 1 and tensor.is_floating_point()}
    if not (autocast(x.device.type) or matrices <= {x.dtype}):
        return "its input and its parameters differ in dtype"
    parameters = Parameters(tensors, dtype)
    try:
        steps = list(part.steps(parameters))
        _check_arguments(steps, x)
        for activation in {one.options.get("activation") or "relu" for one in steps}:
            for used in {x.dtype, dtype}:
                if reason := why_not_triton(x.device, used, activation, "triton" in state.backends):
                    return reason
        biases = []
        for one, (height, width) in attention_sides(steps, *_sides(x)):
            assert one.table is not None
            if one.resize["resize"] != "table" and {height, width} != {one.resize["resolution"]}:
                return f"its attention bias is resized by {one.resize['resize']!r}"
            biases.append(parameters.expand_bias(one.table, height, width, one.resize["resolution"], **one.head_sizes))
        return Plan(lambda x: run_steps(steps, x, biases, call, prepared=True), x, parameters, tensors)
    except (NotPlannableError, NotFoldableError, TypeError, ValueError, LookupError, RuntimeError) as error:
        return str(error)  # of wrong shapes and dtypes, too: the modules give their own


def _sides(x: Tensor) -> tuple[int, int]:
    """Of a map, or of tokens as a map of one line."""
    return (x.shape[2], x.shape[3]) if x.ndim == 4 else (1, x.shape[1])


def _check_arguments(steps: Sequence[Step], x: Tensor) -> None:
    """Raise the error of `effformer.ops`, or of PyTorch, for arguments that do not fit each other."""

    def call(operation: str, x: Tensor, tensors: Sequence[Tensor], options: Mapping[str, Any]) -> Tensor:
        weight = next((tensor for tensor in tensors if tensor.ndim in (2, 4)), x)
        known = {name: value for name, value in options.items() if name != "prepared"}
        result: Tensor = getattr(ops, operation)(x.to(weight.dtype), *tensors, **known, backend="eager")
        return result

    twin = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
    biases = []
    for one, (height, width) in attention_sides(steps, *_sides(x)):
        assert one.table is not None
        shape = one.table.shape[0], height * width, height * width
        biases.append(torch.empty(shape, dtype=torch.float32, device="meta"))
    with torch.no_grad():
        run_steps(steps, twin, biases, call, prepared=False)
