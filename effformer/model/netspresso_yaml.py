"""YAML and mappings as NetsPresso Trainer reads them: by the rules of its library OmegaConf."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import yaml

from ..checks import first_line
from ..config import ConfigError
from ..extras import install

try:  # OmegaConf 2.4 takes it where it is there; it allows more tabs than the loader in Python
    from yaml import CSafeLoader as SafeLoader
except ImportError:
    from yaml import SafeLoader  # type: ignore[assignment]

ABSENT: Any = object()  # stands for a value whose absence was reported already
_MOST_NODES = 100_000  # of a document, each alias counted as the nodes that it stands for


class NotYamlError(ConfigError, yaml.YAMLError):
    """A file that OmegaConf could not read either."""


def load_yaml(path: str | Path) -> Any:
    """Read a file by the rules of OmegaConf's loader.

    They are PyYAML's with these differences: `1e-1` and `1e5` are numbers; dates stay strings; a key that stands twice,
    an alias within its own anchor, and aliases that unfold to very many nodes are refused.

    Raises:
        ConfigError: where the file is not UTF-8 text, is empty, or is not YAML (then a yaml.YAMLError, too).
        OSError: where it cannot be read.

    Source: `get_yaml_loader` in omegaconf/_yaml.py of OmegaConf 2.4.0 (BSD 3-Clause).
    """
    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.load(file, _Loader)
    except UnicodeDecodeError as error:
        raise ConfigError([f"top level: not UTF-8 text ({error})"], str(path)) from error
    except RecursionError as error:
        raise ConfigError(["top level: nested too deeply"], str(path)) from error
    except yaml.YAMLError as error:
        raise NotYamlError([_in_one_line(error)], str(path)) from error
    if content is None:
        raise ConfigError(["top level: the file is empty, allowed is a mapping"], str(path))
    return content


def resolvable(content: Mapping[Any, Any], where: str) -> Mapping[Any, Any]:
    """`content`, or OmegaConf's form of it where it holds interpolations and OmegaConf is installed.

    Raises:
        ConfigError: where an interpolation is malformed.
    """
    if not _interpolates(content):
        return content
    try:
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException
    except ImportError:
        return content  # `step` refuses the interpolations that are needed, and no others
    try:
        return OmegaConf.create(_containers(content), flags={"allow_objects": True})
    except OmegaConfBaseException as error:
        raise ConfigError([f"{error.full_key or 'top level'}: {_reason(error)}"], where) from error


def step(container: Any, key: Any, path: str, problems: list[str]) -> Any:
    """`container[key]`, resolved; `ABSENT` and one more problem where OmegaConf would give no value."""
    try:
        value = container[key]
    except Exception as error:
        if not _is_omegaconfs(error):
            raise
        missing = type(error).__name__ == "MissingMandatoryValue"
        problems.append(f"{path}: {_MISSING if missing else _reason(error)}")
        return ABSENT
    if isinstance(value, str) and value == "???":
        problems.append(f"{path}: {_MISSING}")
        return ABSENT
    if isinstance(value, str) and "${" in value and not _is_omegaconfs(container):
        problems.append(f"{path}: got {value!r}, an interpolation, which needs OmegaConf: {install('netspresso')}")
        return ABSENT
    return value


def plain(value: Any, path: str, problems: list[str]) -> Any:
    """`value` in dicts, lists and scalars, resolved; `ABSENT` stands where `problems` says why."""
    if isinstance(value, Mapping):
        prefix = f"{path}." if path else ""
        keys = list(value)
        return {key: plain(step(value, key, f"{prefix}{key}", problems), f"{prefix}{key}", problems) for key in keys}
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        items = [(index, f"{path}[{index}]") for index in range(len(value))]
        return [plain(step(value, index, name, problems), name, problems) for index, name in items]
    return value


_MISSING = "missing: '???' stands for a value that must be given"


def _interpolates(value: Any) -> bool:
    """Whether a string below holds `${`; OmegaConf's own nodes resolve themselves."""
    if _is_omegaconfs(value):
        return False
    if isinstance(value, Mapping):
        return any(map(_interpolates, value.values()))
    if isinstance(value, str):
        return "${" in value
    return isinstance(value, Sequence) and not isinstance(value, bytes) and any(map(_interpolates, value))


def _containers(value: Any) -> Any:
    """Mappings and sequences as the dicts and lists that OmegaConf takes."""
    if _is_omegaconfs(value):
        return value
    if isinstance(value, Mapping):
        return {key: _containers(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [_containers(item) for item in value]
    return value


def _is_omegaconfs(value: Any) -> bool:
    return any(kind.__module__.partition(".")[0] == "omegaconf" for kind in type(value).__mro__)


def _reason(error: Exception) -> str:
    """OmegaConf's reason; its other lines name the key, as ours does."""
    reason = first_line(error)
    if type(error).__name__ == "InterpolationKeyError":
        reason += " (the trainer merges its files before it resolves: pass the merged configuration)"
    return reason


def _in_one_line(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    if mark is None:
        return "top level: " + " ".join(str(error).split())
    context = getattr(error, "context", None)
    reason = getattr(error, "problem", None) or "not YAML"
    return f"line {mark.line + 1}, column {mark.column + 1}: {reason}" + (f" ({context})" if context else "")


class _Loader(SafeLoader):
    """See `load_yaml`."""

    def construct_document(self, node: yaml.Node) -> Any:
        if _count(node, {}, set()) > _MOST_NODES:
            raise _refusal(f"aliases unfold to more than {_MOST_NODES:,} nodes", node)
        return super().construct_document(node)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Put the keys that a node merges in front of its own, but for those that its own replace.

        That is done again to a node that others merge: then no key may stand twice.
        """
        own: list[tuple[yaml.Node, yaml.Node]] = []
        merged: list[tuple[yaml.Node, yaml.Node]] = []
        seen: set[str] = set()
        for key, value in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                merged += self._merged(value)
                continue
            if key.tag == "tag:yaml.org,2002:value":  # `=`
                key.tag = _STR
            if _is_name(key) and key.value in seen:
                raise _refusal(f"key {key.value!r} stands twice", key)
            if _is_name(key):
                seen.add(key.value)
            own.append((key, value))
        node.value = [(key, value) for key, value in merged if not (_is_name(key) and key.value in seen)] + own

    def _merged(self, node: yaml.Node) -> list[tuple[yaml.Node, yaml.Node]]:
        """The keys of one mapping or several; of equal ones the last counts, which is of the first mapping."""
        nodes = node.value[::-1] if isinstance(node, yaml.SequenceNode) else [node]
        for part in nodes:
            if not isinstance(part, yaml.MappingNode):
                raise _refusal("<< allows a mapping or a list of mappings", part)
            self.flatten_mapping(part)
        return [pair for part in nodes for pair in part.value]


_STR = "tag:yaml.org,2002:str"


def _is_name(key: yaml.Node) -> bool:
    return key.tag == _STR and isinstance(key, yaml.ScalarNode)


def _count(node: yaml.Node, counts: dict[yaml.Node, int], around: set[yaml.Node]) -> int:
    """Nodes below and with `node`, aliases unfolded."""
    if node in around:
        raise _refusal("an alias stands within its own anchor", node)
    if node not in counts:
        around.add(node)
        children = node.value if isinstance(node, yaml.CollectionNode) else ()
        flat = [part for child in children for part in (child if isinstance(child, tuple) else (child,))]
        counts[node] = 1 + sum(_count(child, counts, around) for child in flat)
        around.remove(node)
    return counts[node]


def _refusal(problem: str, node: yaml.Node) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


# --- the loader's rules for scalars, as in OmegaConf ------------------------------------------------------------------

_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"""^(?:
         [-+]?[0-9]+(?:_[0-9]+)*\.[0-9_]*(?:[eE][-+]?[0-9]+)?
        |[-+]?[0-9]+(?:_[0-9]+)*(?:[eE][-+]?[0-9]+)
        |\.[0-9]+(?:_[0-9]+)*(?:[eE][-+][0-9]+)?
        |[-+]?[0-9]+(?:_[0-9]+)*(?::[0-5]?[0-9])+\.[0-9_]*
        |[-+]?\.(?:inf|Inf|INF)
        |\.(?:nan|NaN|NAN))$""",
        re.VERBOSE,
    ),
    list("-+0123456789."),
)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}
# How `OmegaConf.save` writes a path.
_Loader.add_multi_constructor(
    "tag:yaml.org,2002:python/object/apply:pathlib.",
    lambda loader, _, node: PurePath(*loader.construct_sequence(node)),
)
