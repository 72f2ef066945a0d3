"""The launches of a whole part of a network, planned once for an input of one form and then repeated.

Triton's own launch takes 15 µs on the host, and a plan's 2 (`make host`): it holds the compiled kernels with their
arguments. It lays all intermediate results into one piece of memory. Those that are not needed at the same time share a
place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .fold import Parameters
from .launch import INTERPRETED, OUTPUTS, Launch, compiled, described, observed, run
from .tiling.device import device_of, stand_in

_PLACE = 256  # bytes, of which places in memory are multiples
# The calls of compiled kernels are not Triton's public interface: newer versions launch by their own.
_CALLS_DIRECTLY = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 10)
_INPUT, _WORKSPACE, _RESULTS = 0, 1, 2  # bases that pointers count from; parameters follow the results


class NotPlannableError(Exception):
    """Raised for a function that does more than launch kernels; the message is the reason."""


@dataclass(frozen=True)
class _Place:
    """A tensor like `like`, that many bytes after the first element of a base."""

    base: int
    offset: int
    like: Tensor

    def tensor(self, base: Tensor) -> Tensor:
        if base.dtype != self.like.dtype:  # the workspace
            base = base.view(self.like.dtype)
        start = base.storage_offset() + self.offset // base.element_size()
        return base.as_strided(self.like.shape, self.like.stride(), start)


@dataclass(frozen=True)
class _Planned:
    launch: Launch
    places: Mapping[str, _Place]  # of the arguments that are tensors

    def on(self, bases: Sequence[Tensor]) -> Launch:
        """The launch, with tensors for its places."""
        tensors = {name: place.tensor(bases[place.base]) for name, place in self.places.items()}
        return replace(self.launch, arguments={**self.launch.arguments, **tensors})

    def call(self, addresses: Mapping[int, int]) -> _Call:
        """The call of its compiled kernel, given the addresses of the bases that stay."""
        names = self.launch.kernel.arg_names
        values = {**self.launch.arguments, **self.launch.constants}
        pointers = []
        for name, place in self.places.items():
            if place.base in addresses:
                values[name] = addresses[place.base] + place.offset
            else:
                pointers.append((names.index(name), place.base, place.offset))
        found = [values[name] for name in names]
        return _Call([one.data_ptr() if isinstance(one, Tensor) else one for one in found], pointers)


class _Call(NamedTuple):
    """Arguments in a kernel's order; those at some places are pointers: (place, base, offset)."""

    values: list[Any]
    pointers: list[tuple[int, int, int]]

    def bound(self, addresses: Sequence[int]) -> list[Any]:
        values = self.values.copy()
        for place, base, offset in self.pointers:
            values[place] = addresses[base] + offset
        return values


class Plan:
    """The launches of `forward`, for inputs of x's shape, strides, dtype, device and alignment.

    Args:
        forward: from an input to one result or several, by operators (`register.IMPLEMENTATIONS`) and views alone. It
            is called once, with a tensor on the meta device.
        x: an input.
        parameters: of `forward`; its arguments beside the input come from there.
        tensors: the tensors that `parameters` was made for. Their addresses, shapes and strides must stay; the plan
            does not keep them.

    Raises:
        NotPlannableError: where `forward` does more, or returns its input.
    """

    def __init__(
        self,
        forward: Callable[[Tensor], Tensor | list[Tensor]],
        x: Tensor,
        parameters: Parameters,
        tensors: Sequence[Tensor],
    ) -> None:
        twin = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
        with torch.no_grad(), stand_in(device_of(x.device)), described() as launches:
            returned = forward(twin)
        self._single = isinstance(returned, Tensor)
        self._results = [returned] if isinstance(returned, Tensor) else returned
        bases = {_storage(twin): _INPUT}
        bases |= {_storage(result): _RESULTS + index for index, result in enumerate(self._results)}
        bases |= {_storage(kept): _RESULTS + len(self._results) + place for kept, place in parameters.kept}
        offsets, self._bytes = _arranged(_lifetimes(launches, parameters.folded, self._results, bases))
        folded = {id(folded): offsets[_storage(folded)] for folded in parameters.folded}
        fold = parameters.launch(folded, self._bytes, x.device)
        self._table = parameters.addresses

        def planned(launch: Launch) -> _Planned:
            places = {}
            for name, tensor in launch.arguments.items():
                if not isinstance(tensor, Tensor) or tensor is self._table:
                    continue
                storage, offset = _storage(tensor), int(tensor.storage_offset()) * tensor.element_size()
                base = bases.get(storage, _WORKSPACE)
                # The fold's pointers are the workspace itself.
                places[name] = _Place(base, offset + (offsets.get(storage, 0) if base == _WORKSPACE else 0), tensor)
            return _Planned(launch, places)

        self._launches = [planned(launch) for launch in ([] if fold is None else [fold]) + launches if launch.grid]
        stay = {_RESULTS + len(self._results) + place: tensor.data_ptr() for place, tensor in enumerate(tensors)}
        self._calls = [planned.call(stay) for planned in self._launches]
        self._stream: int | None = None
        self._compiled: list[tuple[Any, ...]] | None = None
        self._bound: tuple[tuple[int, ...], list[tuple[Any, ...]]] = (), []

    @property
    def ready(self) -> bool:
        """Whether a call compiles nothing."""
        return INTERPRETED or self._compiled is not None

    @property
    def kernels(self) -> list[str]:
        """Names of the kernels that a call launches, in order."""
        return [planned.launch.kernel.__name__ for planned in self._launches]

    def new_results(self, device: torch.device) -> list[Tensor]:
        """Memory for the results of a call."""
        return [
            torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=device) for like in self._results
        ]

    def __call__(
        self, x: Tensor, tensors: Callable[[], Sequence[Tensor]], results: list[Tensor] | None = None
    ) -> Tensor | list[Tensor]:
        """The results for x, in `results` where given (`new_results`).

        `tensors` returns the parameters, which are asked for where addresses do not suffice.
        """
        if x.is_cuda and x.device.index != torch.cuda.current_device():
            with torch.cuda.device(x.device):
                return self(x, tensors, results)
        workspace = torch.empty(self._bytes, dtype=torch.uint8, device=x.device)
        results = self.new_results(x.device) if results is None else results
        if INTERPRETED or not _CALLS_DIRECTLY or observed() or _hooked():
            run(*self._tensors_of(x, workspace, results, tensors()))
        else:
            self._launch(x, workspace, results, tensors)
        return results[0] if self._single else results

    def _tensors_of(
        self, x: Tensor, workspace: Tensor, results: list[Tensor], tensors: Sequence[Tensor]
    ) -> list[Launch]:
        bases = [x, workspace, *results, *tensors]
        return [planned.on(bases) for planned in self._launches]

    def _launch(
        self, x: Tensor, workspace: Tensor, results: list[Tensor], tensors: Callable[[], Sequence[Tensor]]
    ) -> None:
        """Call the compiled kernels."""
        if self._compiled is None:
            kernels = compiled(self._tensors_of(x, workspace, results, tensors()))
            self._compiled = [
                (kernel.run, planned.launch.grid, kernel.function, kernel.packed_metadata)
                for kernel, planned in zip(kernels, self._launches, strict=True)
            ]
        addresses = (x.data_ptr(), workspace.data_ptr(), *(result.data_ptr() for result in results))
        known, bound = self._bound
        if known != addresses:
            bound = [(*kernel, call.bound(addresses)) for kernel, call in zip(self._compiled, self._calls, strict=True)]
            self._bound = addresses, bound  # at once, for other threads
        driver = triton.runtime.driver.active
        stream = driver.get_current_stream(driver.get_current_device())
        self._keep_table(x, stream)
        for launch, grid, function, metadata, values in bound:
            launch(grid, 1, 1, stream, function, metadata, None, None, None, *values)

    def _keep_table(self, x: Tensor, stream: int) -> None:
        """Let the table's memory wait for streams and graphs that read it."""
        if self._table is None or not x.is_cuda:
            return
        if torch.cuda.is_current_stream_capturing():
            _captured[id(self._table)] = self._table
        elif stream != self._stream:
            self._table.record_stream(torch.cuda.current_stream())
            self._stream = stream


_captured: dict[int, Tensor] = {}  # tables that a user's graph may read for as long as the process lives


def _hooked() -> bool:
    """Whether a profiler asked Triton to call it at each launch."""
    knobs = triton.knobs.runtime
    return any(getattr(hook, "calls", hook) for hook in (knobs.launch_enter_hook, knobs.launch_exit_hook))


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _lifetimes(
    launches: Sequence[Launch], folded: Sequence[Tensor], results: Sequence[Tensor], bases: Mapping[int, int]
) -> dict[int, tuple[int, int, int]]:
    """(bytes, first launch, last launch) of each storage between the launches; that of the fold is number 0.

    Raises:
        NotPlannableError: where a launch reads something that none wrote.
    """
    lives = {_storage(tensor): (_bytes(tensor), 0, 0) for tensor in folded}
    written = set(lives)
    for number, launch in enumerate(launches, 1):
        if launch.constants.get("ATOMIC"):
            raise NotPlannableError("programs add to memory that was cleared")
        for name, tensor in launch.arguments.items():
            if not isinstance(tensor, Tensor):
                continue
            storage = _storage(tensor)
            base = bases.get(storage, _WORKSPACE)
            of_result = _RESULTS <= base < _RESULTS + len(results)
            if name == OUTPUTS[0]:
                if base != _WORKSPACE and not of_result:
                    raise NotPlannableError("a launch writes to its input or to a parameter")
                written.add(storage)
            elif (base == _WORKSPACE or of_result) and storage not in written:
                raise NotPlannableError(f"{name} of {launch.kernel.__name__} is computed outside the kernels")
            if base == _WORKSPACE:
                size, first, _ = lives.get(storage, (_bytes(tensor), number, number))
                lives[storage] = size, first, number
    for result in results:
        whole = result.storage_offset() == 0 and _bytes(result) == result.numel() * result.element_size()
        if _storage(result) not in written or not whole:
            raise NotPlannableError("a result is not what a launch wrote, as a whole")
    return lives


def _bytes(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()


def _arranged(lives: Mapping[int, tuple[int, int, int]]) -> tuple[dict[int, int], int]:
    """An offset for each storage, and the bytes of all. What lives at the same time does not overlap."""
    offsets: dict[int, int] = {}
    taken: list[tuple[int, int, int, int]] = []  # start, end, first and last launch
    for storage, (size, first, last) in sorted(lives.items(), key=lambda item: -item[1][0]):
        start = 0
        for other_start, other_end, other_first, other_last in sorted(taken):
            if other_first <= last and first <= other_last:
                if start + size <= other_start:
                    break
                start = max(start, other_end)
        offsets[storage] = start
        taken.append((start, start + -(-size // _PLACE) * _PLACE, first, last))
    return offsets, max((end for _, end, _, _ in taken), default=0)
