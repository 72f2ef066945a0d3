"""The table of configurations, which is a file: entries, each for some operations, dtypes, devices and shapes."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from .device import CLASSES, Device, device_class


@dataclass(frozen=True)
class MlpConfig:
    """Fused MLP: rows and hidden channels of a tile. `reload`: the residual is read again instead of kept."""

    block_m: int
    block_h: int
    reload: bool
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class SplitConfig:
    """MLP with its hidden split over programs: rows of a tile, hidden channels of a tile and of a program (`chunk`)."""

    block_m: int
    block_h: int
    chunk: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class LinearConfig:
    """Matrix product: rows, columns (powers of two, side by side) and depth of a tile."""

    block_m: int
    widths: tuple[int, ...]
    block_k: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class AttentionConfig:
    """Attention: queries and keys of a tile. One tile of keys needs no running maximum."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class AttentionBackwardConfig:
    """Gradients of attention: tokens of a tile, as queries and as keys, and parts of the bias' sum over images."""

    block_m: int
    splits: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class GramConfig:
    """Covariance of channels: rows of a step, channels of a tile on both sides, and parts of the rows."""

    block_m: int
    block_c: int
    splits: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class PoolConfig:
    """Passes over a map, sums among them: elements of a tile, of which up to `block_c` are channels."""

    elements: int
    block_c: int
    num_warps: int


@dataclass(frozen=True)
class NormConfig:
    """LayerNorm: elements of a tile, which has whole rows, one at least."""

    elements: int
    num_warps: int


@dataclass(frozen=True)
class HeadConfig:
    """Pooling and linear layer in one: elements of a tile, which has whole tokens, and the classes of a program."""

    elements: int
    block_n: int
    num_warps: int


Config = (
    MlpConfig
    | SplitConfig
    | LinearConfig
    | AttentionConfig
    | AttentionBackwardConfig
    | GramConfig
    | PoolConfig
    | NormConfig
    | HeadConfig
)

# Configuration kinds that an operation accepts. None is the path without fusion: for an MLP two matrix products with
# the hidden activations in memory, for the head pooling and then a product, for the convolution the vendor's library.
OPERATIONS: dict[str, tuple[type[Config] | None, ...]] = {
    "meta4d": (MlpConfig, SplitConfig, None),
    "conv_mlp": (MlpConfig, SplitConfig, None),
    "linear_mlp": (SplitConfig, None),
    "linear": (LinearConfig,),
    "mlp_backward": (LinearConfig,),
    "conv_norm": (LinearConfig, None),
    "bias_attention": (AttentionConfig,),
    "attention_backward": (AttentionBackwardConfig,),
    "pool_mixer": (PoolConfig,),
    "split_sum": (PoolConfig,),
    "channel_sums": (PoolConfig,),
    "gram": (GramConfig,),
    "layer_norm": (NormConfig,),
    "token_mean": (NormConfig,),
    "head": (HeadConfig, None),
}
# The dimensions of an operation's shape. Conditions name them.
DIMENSIONS: dict[str, tuple[str, ...]] = {
    "meta4d": ("channels", "rows"),
    "conv_mlp": ("channels", "rows"),
    "linear_mlp": ("channels", "rows"),
    "linear": ("outputs", "inputs", "rows"),
    "mlp_backward": ("outputs", "inputs", "rows"),
    "conv_norm": ("outputs", "inputs", "rows"),
    "bias_attention": ("tokens", "width"),
    "attention_backward": ("tokens", "width"),
    "pool_mixer": ("channels", "dense", "rows"),
    "split_sum": ("channels", "rows"),
    "channel_sums": ("channels", "rows"),
    "gram": ("channels", "rows"),
    "layer_norm": ("channels", "rows"),
    "token_mean": ("channels", "rows"),
    "head": ("channels", "classes", "rows"),
}
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Entry:
    """One line of a table: for some operations, device classes and dtypes, `use` where all of `where` holds.

    Attributes:
        where: (dimension, relation, number); the relations are "=", "<=", ">=" and "multiple of".
        use: of one of the kinds that `OPERATIONS` allows for these operations.
        gpu: the one card, by name, that it is for; None for all of the device class.
        triton: the first version of Triton that it is for, such as (3, 9); None for all.
        source: where it was read, for messages.
    """

    operations: tuple[str, ...]
    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    where: tuple[tuple[str, str, int], ...]
    use: Config | None
    gpu: str | None = None
    triton: tuple[int, int] | None = None
    source: str = ""

    def applies(self, operation: str, dtype: torch.dtype, device: Device, shape: Mapping[str, int]) -> bool:
        return (
            operation in self.operations
            and dtype in self.dtypes
            and self.gpu in (None, device.name)
            and device_class(device) in self.devices
            and all(_holds(shape[dimension], relation, number) for dimension, relation, number in self.where)
        )

    @property
    def exact(self) -> bool:
        """Whether it is for single sizes, as tuned entries are, all but the number of rows."""
        named = {dimension for dimension, relation, _ in self.where if relation == "="}
        return all(named >= set(DIMENSIONS[operation]) - {"rows"} for operation in self.operations)

    def as_json(self) -> dict[str, Any]:
        """The form that `read_entry` reads."""
        names = {dtype: name for name, dtype in DTYPES.items()}
        where: dict[str, list[str]] = {}
        for dimension, relation, number in self.where:
            where.setdefault(dimension, []).append(f"{relation} {number}")
        found = {
            "operation": list(self.operations),
            "device": list(self.devices),
            "dtype": [names[dtype] for dtype in self.dtypes],
            "where": {dimension: held if len(held) > 1 else held[0] for dimension, held in where.items()},
            "use": None if self.use is None else asdict(self.use),
        }
        if self.gpu is not None:
            found["gpu"] = self.gpu
        if self.triton is not None:
            found["triton"] = f">= {self.triton[0]}.{self.triton[1]}"
        return found


def _holds(size: int, relation: str, number: int) -> bool:
    if relation == "=":
        return size == number
    if relation == "<=":
        return size <= number
    if relation == ">=":
        return size >= number
    return size % number == 0


def read_entry(found: Mapping[str, Any], source: str) -> Entry:
    """An entry from JSON, all of it checked.

    Raises:
        ValueError: for a field that is missing, unknown or of no allowed value; it names `source`.
    """

    def allowed(what: str, got: Iterable[Any], known: Iterable[str]) -> tuple[Any, ...]:
        names, known = _listed(got), tuple(known)
        if not names or not set(names) <= set(known):
            raise ValueError(f"{source}: {what}: got {got!r}, allowed are {', '.join(known)}")
        return names

    if not isinstance(found, Mapping):
        raise ValueError(f"{source}: got {found!r}, allowed is an object")
    expected = {"operation", "device", "dtype", "where", "use"}
    if set(found) - {"gpu", "triton"} != expected:
        raise ValueError(f"{source}: got the fields {sorted(found)}, allowed are {sorted(expected)}, gpu and triton")
    operations = allowed("operation", found["operation"], OPERATIONS)
    if not set.intersection(*(set(OPERATIONS[operation]) for operation in operations)):
        raise ValueError(f"{source}: operation: got {operations}, allowed together are those of one kind of tile")
    if not isinstance(found["where"], Mapping):
        raise ValueError(f"{source}: where: got {found['where']!r}, allowed is an object")
    if not isinstance(found.get("gpu"), str | None):
        raise ValueError(f"{source}: gpu: got {found['gpu']!r}, allowed is a name")
    version = re.fullmatch(r">= (\d+)\.(\d+)", str(found.get("triton", ">= 0.0")))
    if version is None:
        raise ValueError(f"{source}: triton: got {found['triton']!r}, allowed is '>= N.M'")
    where: list[tuple[str, str, int]] = []
    for dimension, conditions in found["where"].items():
        for operation in operations:
            allowed("where", [dimension], DIMENSIONS[operation])
        for condition in _listed(conditions):
            parsed = re.fullmatch(r"(?:(=|<=|>=|multiple of) ?)?([0-9]+)", str(condition))
            if parsed is None or (parsed[1] == "multiple of" and int(parsed[2]) == 0):
                raise ValueError(
                    f"{source}: where.{dimension}: got {condition!r}, allowed are '<= N', '>= N', 'multiple of N' and N"
                )
            where.append((dimension, parsed[1] or "=", int(parsed[2])))
    return Entry(
        operations,
        allowed("device", found["device"], CLASSES),
        tuple(DTYPES[name] for name in allowed("dtype", found["dtype"], DTYPES)),
        tuple(where),
        read_config(found["use"], operations, source),
        found.get("gpu"),
        (int(version[1]), int(version[2])) if "triton" in found else None,
        source,
    )


def _listed(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def read_config(found: Any, operations: Iterable[str], source: str) -> Config | None:
    """An entry's `use` from JSON, for all of these operations.

    Raises:
        ValueError: for a field that is missing, unknown or of no allowed value; it names `source`.
    """
    first, *others = (OPERATIONS[operation] for operation in operations)
    kinds = [kind for kind in first if all(kind in allowed for allowed in others)]
    if found is None and None in kinds:
        return None
    names = {kind: [field.name for field in fields(kind)] for kind in kinds if kind}
    matching = [kind for kind in names if isinstance(found, Mapping) and set(found) == set(names[kind])]
    if not matching:
        allowed = " or ".join([", ".join(of) for of in names.values()] + ["null"] * (None in kinds))
        raise ValueError(f"{source}: use: got {found!r}, allowed are exactly the fields {allowed}")
    kind = matching[0]
    values: dict[str, Any] = {name: _listed(value) if name == "widths" else value for name, value in found.items()}
    for name, value in values.items():
        numbers = _listed(value)
        if name == "reload":
            right, rule = isinstance(value, bool), "true or false"
        elif name == "num_stages":
            right, rule = type(value) is int and 1 <= value <= 8, "1 to 8"
        else:
            # Triton's tiles and warps are powers of two, and matrix products take no tile below 16.
            products = kind not in (PoolConfig, NormConfig, HeadConfig) and name != "splits"
            least, most = (1, 32) if name == "num_warps" else (16 if products else 1, 1 << 16)
            rule = f"powers of two from {least} to {most}"
            right = bool(numbers) and all(
                type(number) is int and least <= number <= most and number & (number - 1) == 0 for number in numbers
            )
        if not right:
            raise ValueError(f"{source}: use.{name}: got {value!r}, allowed: {rule}")
    if kind is SplitConfig and values["block_h"] > values["chunk"]:  # tiles of two programs would overlap
        block_h, chunk = values["block_h"], values["chunk"]
        raise ValueError(f"{source}: use.block_h: got {block_h}, allowed is the chunk of {chunk} at most")
    return kind(**values)


class Table:
    """Entries for this Triton, in the order of precedence.

    Attributes:
        used: those that were an answer, with (device class, dtype).
    """

    def __init__(self, entries: Iterable[Entry]) -> None:
        import triton  # here, since files of entries are read without it, too

        version = tuple(map(int, triton.__version__.split(".")[:2]))
        self.entries = tuple(entry for entry in entries if entry.triton is None or entry.triton <= version)
        self.used: set[tuple[Entry, str, torch.dtype]] = set()
        self.find = functools.lru_cache(maxsize=4096)(self._find)

    def _find(self, operation: str, dtype: torch.dtype, device: Device, *sizes: int) -> Entry:
        shape = dict(zip(DIMENSIONS[operation], sizes, strict=True))
        for entry in self.entries:
            if entry.applies(operation, dtype, device, shape):
                self.used.add((entry, device_class(device), dtype))
                return entry
        raise LookupError(f"no configuration for {operation} of {shape}, {dtype}, on {device} ({device_class(device)})")


def read_table(path: Path) -> list[Entry]:
    """The entries of a table file.

    Raises:
        ValueError: if it holds no list of entries, or a wrong one.
        OSError: if it cannot be read.
    """
    return entries(read_json(path), path)


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: no JSON ({error})") from error


def entries(found: Any, path: Path) -> list[Entry]:
    if not isinstance(found, list):
        raise ValueError(f"{path}: got {type(found).__name__}, allowed is a list of entries")
    return [read_entry(entry, f"{path.name}, entry {index}") for index, entry in enumerate(found, 1)]


def as_text(entries: Iterable[Entry]) -> str:
    """A table file's text: one entry a line."""
    return "[\n" + ",\n".join("  " + json.dumps(entry.as_json()) for entry in entries) + "\n]\n"
