"""Read a checkpoint file: its kind by its first bytes, its weights by safe means alone.

Torch files are unpickled with `weights_only=True`. Records that trainers keep beside the weights (NumPy numbers, dates,
paths, settings, loggers) become empty stand-ins: none of their code is imported or called. Files with other objects are
refused.
"""

from __future__ import annotations

import json
import pickle
import pickletools
import re
import struct
import threading
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import safetensors.torch
import torch
from torch import Tensor, nn

from .causes import why_not_plain
from .contents import CheckpointError, Weights, as_mapping, choose, find_weights, no_network, tensors_in

_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"
_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # a pickled number, with which torch's files before 1.6 begin
# First bytes of files that hold no weights, what they are and the way out.
_OTHERS = {
    b"version https://": "a Git LFS pointer, not the weights: run `git lfs pull` in its clone",
    b"\x1f\x8b": "compressed by gzip: unpack it first",
    b"BZh": "compressed by bzip2: unpack it first",
    b"\xfd7zXZ": "compressed by xz: unpack it first",
    b"\x28\xb5\x2f\xfd": "compressed by zstd: unpack it first",
    b"7z\xbc\xaf": "a 7z archive: unpack it first",
    b"Rar!": "a RAR archive: unpack it first",
    b"\x89HDF": "an HDF5 file, of Keras or MATLAB: allowed are torch and safetensors files",
    b"\x93NUMPY": "a NumPy array: allowed are torch and safetensors files",
    b"GGUF": "a GGUF file: allowed are torch and safetensors files",
}
# The records: modules all of whose objects hold data, and single names.
_DATA_MODULES = re.compile(
    r"(numpy|pandas|pathlib|datetime|decimal|fractions|uuid|logging|omegaconf|yacs|ml_collections|mmengine|mmcv)\b"
    r"|torch\.(optim|amp|cuda\.amp|utils\.data|return_types|nn\.modules\.loss)\."
)
_DATA = {
    "_codecs.encode", "argparse.Namespace", "builtins.bool", "builtins.bytearray", "builtins.bytes", "builtins.complex",
    "builtins.dict", "builtins.float", "builtins.frozenset", "builtins.int", "builtins.list", "builtins.object",
    "builtins.range", "builtins.set", "builtins.slice", "builtins.str", "builtins.tuple", "collections.ChainMap",
    "collections.Counter", "collections.OrderedDict", "time.struct_time", "torch.torch_version.TorchVersion",
    "types.SimpleNamespace", "torch.Generator", "torch._C.Generator", "functools.partial", "random.Random",
    "re._compile", "array.array", "array._array_reconstructor", "itertools.count", "collections.UserDict",
    "builtins.Ellipsis",
}  # fmt: skip
_MAPPINGS = re.compile(
    r"collections\.defaultdict$|(addict|box|easydict|munch|yacs|mmengine|mmcv|detectron2|fvcore)\..*(Dict|Box|Munch|Node)$"
    r"|(pytorch_lightning|lightning|lightning_fabric)\..*AttributeDict$"
)


def read_weights(
    source: str | Path | Mapping[str, Any] | nn.Module, which: str | None = None
) -> tuple[Weights, tuple[str, ...]]:
    """The weights of a file or of its content, and the names of others that it holds.

    Args:
        source: a file, a mapping or a module, as `load_checkpoint` takes them.
        which: the name of the weights, see `choose`.

    Raises:
        CheckpointError: where it holds no EfficientFormer's weights, or objects that could run code.
        TypeError: for another source.
        OSError: where the file cannot be read.
    """
    if not isinstance(source, (str, Path, Mapping, nn.Module)):
        raise TypeError(f"source: got {type(source).__name__}, allowed is a path, a state dict or a module")
    where = str(source) if isinstance(source, (str, Path)) else "source"
    content = read_file(Path(source)) if isinstance(source, (str, Path)) else as_mapping(source) or {}
    try:
        found = find_weights(content)
        chosen = choose(found, which) if found else None
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from None
    problem = _why_no_weights(content) if chosen is None else why_not_plain(chosen.state)
    if problem or chosen is None:
        raise CheckpointError(f"{where}: {problem}")
    return chosen, tuple(one.name for one in found if one is not chosen)


def read_file(path: Path) -> Mapping[Any, Any]:
    """The content of a safetensors or torch file, whatever its suffix, or of the index of several.

    Raises:
        CheckpointError: for other and damaged files, naming the kind and the way out.
        OSError: where it cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(512)
    if path.name.endswith(".index.json"):
        return _read_shards(path)
    content = _read_safetensors(path) if _is_safetensors(head, path) else _read_torch(path, head)
    if (found := as_mapping(content)) is None:
        kind = _StandIn.describe(content)
        raise CheckpointError(f"{path}: got a {kind}, allowed is a state dict, or a mapping with one")
    return found


def _read_shards(path: Path) -> dict[str, Any]:
    """The content of all files that an index of Hugging Face's libraries names, which lie beside it."""
    try:
        names = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path} is not an index of a checkpoint in several files") from error
    if strange := [name for name in names if Path(name).name != name]:
        raise CheckpointError(f"{path}: got the file {strange[0]!r}, allowed are files beside the index")
    return {key: value for name in names for key, value in read_file(path.with_name(name)).items()}


def _why_no_weights(content: Mapping[Any, Any]) -> str:
    """The reason why a file's content holds no EfficientFormer, and the way out."""
    if not content:
        return "got an empty mapping, allowed is a state dict with at least one key"
    tensors = dict(tensors_in(content))
    if tensors:
        return why_not_plain(tensors) or no_network(tensors)
    some = ", ".join(f"{key!r} ({_StandIn.describe(value)})" for key, value in list(content.items())[:5])
    return f"it holds no tensors, allowed is a state dict, bare or below an entry: got {some}"


# --- safetensors ------------------------------------------------------------------------------------------------------


def _is_safetensors(head: bytes, path: Path) -> bool:
    """Whether it begins with the length of a JSON header, and the header."""
    length = struct.unpack("<Q", head[:8])[0] if len(head) > 8 else 0
    return head[8:9] == b"{" and length < 2**27 and path.stat().st_size >= length + 8


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            content = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path} is a damaged or cut-off safetensors file ({error})") from error
    # `safetensors.torch.save_model` writes a tensor of several names once, and its other names here.
    shared = {name: content[kept] for name, kept in metadata.items() if kept in content and name not in content}
    return {**content, **shared}


# --- torch ------------------------------------------------------------------------------------------------------------


def _read_torch(path: Path, head: bytes) -> Any:
    if problem := _why_no_torch_file(path, head):
        raise CheckpointError(f"{path} is {problem}")
    names = _pickled_names(path, head)
    strangers = sorted(name for name in names if not _is_data(name) and not _OF_TENSORS.match(name))
    if strangers:
        raise _unsafe(path, strangers)
    try:
        # Opened here: of a path, torch.load would look at the suffix.
        with _allowing({name: _stand_in(name) for name in names if _is_data(name)}), path.open("rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except pickle.UnpicklingError as error:
        if "Unsupported operand" in str(error):  # of a newer pickle protocol
            problem = "is a torch file of a pickle protocol above 2, or damaged: save it without pickle_protocol"
            raise CheckpointError(f"{path} {problem}, or load it yourself. {_WAY_OUT}") from error
        raise CheckpointError(
            f"{path} is not a torch file that can be read safely, or it is damaged. {_WAY_OUT}"
        ) from error
    except Exception as error:  # a damaged file may raise anything
        raise CheckpointError(f"{path} is a damaged or cut-off torch file: copy or download it again") from error


_lock = threading.Lock()


@contextmanager
def _allowing(stand_ins: Mapping[str, type]) -> Iterator[None]:
    """Let torch.load put these in place of the objects of these names, and of no others.

    torch keeps one list for the whole process. What the caller allowed there would be called with our stand-ins.
    """
    allowed: list[Any] = [(stand_in, name) for name, stand_in in stand_ins.items()]
    with _lock:
        before = torch.serialization.get_safe_globals()
        torch.serialization.clear_safe_globals()
        try:
            with torch.serialization.safe_globals(allowed):
                yield
        finally:
            torch.serialization.add_safe_globals(before)


_WAY_OUT = "If you trust its author, load it yourself: load_checkpoint(model, torch.load(path, weights_only=False))"


def _unsafe(path: Path, names: list[str]) -> CheckpointError:
    named = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    return CheckpointError(
        f"{path} is not a torch file of weights alone: it holds pickled objects ({named}), whose code could do harm: "
        f"it is not read. {_WAY_OUT}"
    )


def _why_no_torch_file(path: Path, head: bytes) -> str | None:
    """The kind of a file that torch cannot have written, or that holds more than weights, and the way out."""
    if not head:
        return "empty (0 bytes): copy or download it again"
    text = _text(head)
    for start, kind in _OTHERS.items():
        if text.startswith(start):
            return kind
    if not head.strip(b"\0"):
        return "full of zeros, as an interrupted download leaves it: download it again"
    if text.startswith(b"<"):
        return "an HTML or XML page, not the weights, perhaps of a log-in or an error: download it again"
    if text.startswith((b"{", b"[{")):
        shards = b'"weight_map"' in path.read_bytes()
        index = "the index of a checkpoint in several files: give it a name that ends in .index.json"
        return index if shards else "JSON, not a file of weights"
    if head[257:262] == b"ustar":
        return "a tar archive: unpack it first"
    if head.startswith(_ZIP):
        return _why_other_archive(path)
    if _MAGIC in head[:32]:
        return None
    if head.startswith(_PICKLE):
        return (
            "a damaged torch file, or a pickle that torch.save did not write. If you trust its author, load it "
            "yourself: load_checkpoint(model, pickle.load(open(path, 'rb')))"
        )
    if head[8:9] == b"{" and head[5:8] == bytes(3):
        return "a cut-off safetensors file: copy or download it again"
    said = text.partition(b"\n")[0][:64].decode("utf-8", "replace").strip()
    if said.isprintable() and "\ufffd" not in said:
        return f"not a torch or safetensors file, but text ({said!r}): download it again"
    return "not a torch or safetensors file, or a damaged one: copy or download it again"


def _text(head: bytes) -> bytes:
    """The beginning of a file without byte order mark and blanks, UTF-16 as ASCII."""
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        head = head[2:].replace(b"\0", b"")
    return head.removeprefix(b"\xef\xbb\xbf").lstrip(b" \t\r\n")


def _why_other_archive(path: Path) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile:
        return "a damaged or cut-off torch file: copy or download it again"
    if any(name.endswith("constants.pkl") for name in names):
        return "a TorchScript archive: give torch.jit.load(path).state_dict() to load_checkpoint"
    if any(name.endswith("archive_format") for name in names):
        return "an exported program of torch.export: give torch.export.load(path).state_dict to load_checkpoint"
    if any(name.endswith(".npy") for name in names):
        return "an archive of NumPy arrays: allowed are torch and safetensors files"
    if not any(name.endswith("data.pkl") for name in names):
        return "a zip archive, but not of torch: unpack it first"
    return None


def _pickled_names(path: Path, head: bytes) -> set[str]:
    """The names of all classes and functions that a torch file's pickles refer to, found without unpickling."""
    try:
        if head.startswith(_ZIP):
            with zipfile.ZipFile(path) as archive:
                inner = next(name for name in archive.namelist() if name.endswith("data.pkl"))
                with archive.open(inner) as file:
                    return set(_names(file))
        with path.open("rb") as file:  # magic number, protocol, machine, content; then the numbers
            return {name for _ in range(4) for name in _names(file)}
    except Exception as error:  # a damaged pickle may raise anything
        raise CheckpointError(
            f"{path} is a damaged or cut-off torch file, or none: copy or download it again"
        ) from error


def _names(file: IO[bytes]) -> Iterator[str]:
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name == "GLOBAL":  # protocols 0 to 3; torch reads no others safely
            module, _, name = str(argument).partition(" ")
            yield f"{_PYTHON3.get(module, module)}.{_RENAMED.get(name, name)}"


# Of these, torch.load knows which are safe.
_OF_TENSORS = re.compile(
    r"torch\.((_utils|_tensor|storage|serialization|nn\.parameter|sparse|cuda|cuda\.sparse)\.)?\w+$"
)

# As torch spells names of Python 2, which pickles of protocol 2 hold.
_PYTHON3 = {"__builtin__": "builtins", "copy_reg": "copyreg"}
_RENAMED = {"xrange": "range", "unicode": "str"}


def _is_data(name: str) -> bool:
    return name in _DATA or bool(_DATA_MODULES.match(name) or _MAPPINGS.match(name)) or name == "collections.deque"


class _StandIn:
    """Stands in place of a record beside the weights. It accepts every call of a pickle, and stays empty."""

    def __new__(cls, *_: Any) -> Any:
        return super().__new__(cls)

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...

    @staticmethod
    def describe(value: object) -> str:
        return "record" if isinstance(value, _StandIn) else type(value).__name__


class _MappingStandIn:
    """In place of a kind of dict: the unpickler fills no other mappings than plain and ordered ones."""

    def __new__(cls, *_: Any) -> Any:
        return OrderedDict()


class _ListStandIn:
    def __new__(cls, *_: Any) -> Any:
        return []


def _stand_in(name: str) -> type:
    if _MAPPINGS.match(name):
        return _MappingStandIn
    return _ListStandIn if name == "collections.deque" else _StandIn
