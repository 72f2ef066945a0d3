"""Digests of the code that a result comes from: some definitions, and all of the package that these use.

A definition is what a module binds to a name. It uses the names within it: those of its module, imported ones, and
attributes of imported modules; of a module that is passed on, all definitions. Of other packages the imported names
count, not their code. Comments and docstrings do not count, nor do conditions around definitions.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

PACKAGE = __name__.partition(".")[0]

Definition = tuple[str, str]  # the names of a module and of what it defines


def digest(definitions: Iterable[Definition], files: Iterable[Path] = (), stop: Collection[Definition] = ()) -> str:
    """16 hexadecimal digits.

    Args:
        definitions: with all that they use within this package.
        files: count as a whole.
        stop: definitions that are left out, with what only they use; (module, "*") for all of a module.

    Raises:
        LookupError: for a definition that its module does not have.
    """
    found = hashlib.sha256()
    for (module, name), text in sorted(reached(definitions, stop).items()):
        found.update(f"{module}.{name}\n{text}\n".encode())
    for file in files:
        found.update(file.name.encode() + (code_of(file).encode() if file.suffix == ".py" else file.read_bytes()))
    return found.hexdigest()[:16]


def reached(definitions: Iterable[Definition], stop: Collection[Definition] = ()) -> dict[Definition, str]:
    """The syntax of these definitions and of all that they use.

    Raises:
        LookupError: as `digest` does.
    """
    found: dict[Definition, str] = {}
    todo = list(definitions)
    for module, name in todo:
        if name not in _module(module).statements:
            raise LookupError(f"definitions: got {name!r} of {module}, allowed is what the module defines")
    while todo:
        module, name = one = todo.pop()
        if one in found or one in stop or (module, "*") in stop:
            continue
        own = _module(module)
        statements = own.statements[name]
        foreign = sorted({text for statement in statements for text in own.foreign(statement)})
        found[one] = "\n".join([*foreign, *map(_syntax, statements)])
        todo += (used for statement in statements for used in own.uses(statement))
    return found


def code_of(file: Path) -> str:
    """The syntax of a Python file, without its docstrings."""
    return _syntax(ast.parse(file.read_text(encoding="utf-8")))


def _syntax(tree: ast.AST) -> str:
    """Source text: a dump of the tree has other fields from one version of Python to the next."""
    for node in ast.walk(tree):
        match getattr(node, "body", None):
            case [ast.Expr(ast.Constant()), *rest]:
                node.body = rest or [ast.Pass()]  # type: ignore[attr-defined]
    return ast.unparse(tree)


class _Module:
    def __init__(self, name: str) -> None:
        spec = importlib.util.find_spec(name)
        assert spec is not None, name
        assert spec.origin is not None, name
        self.name = name
        self.package = name if spec.submodule_search_locations else name.rpartition(".")[0]
        self.statements: dict[str, list[ast.stmt]] = {}
        self.imported: dict[str, Definition | str] = {}  # a string names a module
        self.others: dict[str, str] = {}  # names imported from other packages: the import
        for statement in _flattened(ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body):
            if isinstance(statement, ast.ImportFrom | ast.Import):
                self.imported |= self._imports(statement)
                self.others |= {
                    (one.asname or one.name).partition(".")[0]: f"{getattr(statement, 'module', '')}: {one.name}"
                    for one in statement.names
                }
            for bound in _bound(statement):
                self.statements.setdefault(bound, []).append(statement)

    def uses(self, statement: ast.stmt) -> Iterator[Definition]:
        """The definitions of this package that a statement uses."""
        known = self.imported
        for node in ast.walk(statement):
            if isinstance(node, ast.ImportFrom | ast.Import):
                known = known | self._imports(node)
        inner = {id(node.value) for node in ast.walk(statement) if isinstance(node, ast.Attribute)}
        own = {node.arg for node in ast.walk(statement) if isinstance(node, ast.arg)}
        for node in ast.walk(statement):
            match node:
                case ast.Name(id=name) if name in self.statements:
                    yield self.name, name
                case ast.Name(id=name) if isinstance(known.get(name), tuple):
                    yield from _defined(*known[name])
                case ast.Name(id=name) if (
                    isinstance(known.get(name), str) and id(node) not in inner and name not in own
                ):
                    module = str(known[name])
                    yield from ((module, every) for every in _module(module).statements)
                case ast.Attribute(value=ast.Name(id=name), attr=attribute) if isinstance(known.get(name), str):
                    yield from _defined(str(known[name]), attribute)

    def foreign(self, statement: ast.stmt) -> Iterator[str]:
        """The imports from other packages that a statement uses."""
        for node in ast.walk(statement):
            if isinstance(node, ast.Name) and node.id in self.others and node.id not in self.imported:
                yield f"{node.id} is {self.others[node.id]}"

    def _imports(self, statement: ast.ImportFrom | ast.Import) -> dict[str, Definition | str]:
        if isinstance(statement, ast.Import):
            return {one.asname: one.name for one in statement.names if one.asname and _is_ours(one.name)}
        source = statement.module or ""
        if statement.level:
            source = importlib.util.resolve_name("." * statement.level + source, self.package)
        if not _is_ours(source):
            return {}
        return {
            one.asname or one.name: f"{source}.{one.name}" if _exists(f"{source}.{one.name}") else (source, one.name)
            for one in statement.names
        }


_module = functools.cache(_Module)


def _defined(module: str, name: str) -> Iterator[Definition]:
    """The definition behind a name, which the module may have imported itself."""
    if name in _module(module).statements:
        yield module, name
    elif isinstance(other := _module(module).imported.get(name), tuple):
        yield from _defined(*other)


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] == PACKAGE


@functools.cache
def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent is a module, not a package
        return False


def _flattened(statements: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements of a module, those under conditions, too."""
    for statement in statements:
        if isinstance(statement, ast.If | ast.Try | ast.With):
            yield from _flattened(child for child in ast.iter_child_nodes(statement) if isinstance(child, ast.stmt))
            for handler in getattr(statement, "handlers", ()):
                yield from _flattened(handler.body)
        else:
            yield statement


def _bound(statement: ast.stmt) -> Iterator[str]:
    """The names that a statement defines, imports left out."""
    match statement:
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            yield name
        case ast.Assign(targets=targets):
            yield from (node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name))
        case ast.AnnAssign(target=ast.Name(id=name)) | ast.AugAssign(target=ast.Name(id=name)):
            yield name
