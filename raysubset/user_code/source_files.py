"""The source files behind a package.module:function: its module's, and those of all imports that are not installed."""

import ast
import functools
import os
import site
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa

from raysubset.errors import ChangedFile, listed
from raysubset.fingerprints import MOST_NAMED, Entry, changes, entries, fingerprint, hasher
from raysubset.user_code.given import Given, hold

T = TypeVar("T")

_PLACES = (*map(sysconfig.get_path, ("stdlib", "platstdlib", "purelib", "platlib")), *site.getsitepackages())
_INSTALLED = tuple(f"{os.path.realpath(path)}{os.sep}" for path in (*_PLACES, site.getusersitepackages()))
_PACKAGES = {"site-packages", "dist-packages"}


def code_fingerprint(reference: str) -> pa.Table:
    """Return digests of the source files behind a "package.module:function", by paths relative to the search path.

    The files are found by reading import statements; nothing is imported. A module that is not found is left out.
    """
    files = source_files(reference.partition(":")[0])
    contents = ((name, path.read_bytes()) for name, path in files.items())
    return fingerprint(Entry(name, len(data), hasher(data).hexdigest()) for name, data in contents)


_first_read: dict[str, tuple[str, ModuleSpec | None]] = {}  # by module: its file's digest, and how it was imported


def code_in_use(reference: str) -> pa.Table:
    """Return code_fingerprint() for a driver, which imports a module once, while its actors import it anew.

    Raises:
        ValueError: if a file changed after this process imported it, as may happen in a notebook.
    """
    table = code_fingerprint(reference)
    for name, entry in entries(table).items():
        module = name.partition(".")[0].removesuffix("/__init__").replace("/", ".")
        spec = getattr(sys.modules.get(module), "__spec__", None)  # another one after importlib.reload()
        digest, old_spec = _first_read.get(module, (entry.digest, spec))
        if spec is None or (old_spec is not None and old_spec is not spec):
            digest = entry.digest
        _first_read[module] = digest, spec
        if digest != entry.digest:
            raise ValueError(
                f"{name} changed since this process imported it, and actors would import what it holds now: call "
                f"importlib.reload({module}) and take from it anew what you give, or restart Python"
            )
    return table


def source_files(module: str) -> dict[str, Path]:
    """Return the files of a module and of its direct and indirect imports, without installed and standard modules."""
    search_here()
    files: dict[str, Path] = {}
    folders: dict[str, list[str]] = {"": sys.path}  # folders in which the modules of a package are searched
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name in folders:
            continue
        parent, _, last = name.rpartition(".")
        if parent not in folders:
            waiting += [name, parent]
            continue
        spec = _own_spec(name, folders[parent])
        folders[name] = []
        if spec is None:
            continue
        is_package = spec.submodule_search_locations is not None
        if is_package:  # a namespace package's spec lacks its folders unless its parents are imported
            folders[name] = [path for folder in folders[parent] if os.path.isdir(path := os.path.join(folder, last))]
        if spec.origin and spec.has_location:
            path = Path(spec.origin)
            files[f"{name.replace('.', '/')}{'/__init__' if is_package else ''}{path.suffix}"] = path
            if path.suffix == ".py":
                waiting += _imported(path, package=name if is_package else parent)
    return files


def search_here() -> None:
    """Add the working directory to the search path of modules."""
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)


_in_use = ContextVar[Mapping[str, pa.Table]]("in_use", default={})  # noqa: B039  # nothing is put into it


@contextmanager
def held_code(fingerprints: Mapping[str, pa.Table]) -> Iterator[None]:
    """Have this thread's workplaces refuse other code in the block, by the code_fingerprint() of each reference."""
    token = _in_use.set(fingerprints)
    try:
        yield
    finally:
        _in_use.reset(token)


@dataclass(frozen=True)
class Workplace:
    """The driver's working directory and search path, with which other processes find the user's files and modules."""

    directory: str
    search_path: tuple[str, ...]  # without installed packages
    load_given: Callable[[], Given] | None = None  # loads the objects given in place of names, if there are any
    code: Mapping[str, pa.Table] = field(default_factory=dict)  # what the user's code was when the command began

    @classmethod
    def here(cls) -> "Workplace":
        """Return this process's workplace."""
        here = os.getcwd()
        folders = [os.path.abspath(path) for path in sys.path if not _is_installed(os.path.realpath(path or here))]
        return cls(here, tuple(folders), code=_in_use.get())

    def enter(self) -> None:
        """Change to the directory if this machine has it, search modules as the driver does, and load given objects.

        Raises:
            ChangedFile: if a file of the user's code is another one than when the command began.
        """
        if os.path.isdir(self.directory):
            os.chdir(self.directory)
        sys.path[:] = [*self.search_path, *(path for path in sys.path if path not in self.search_path)]
        for reference, old in self.code.items():
            new, known = code_fingerprint(reference), entries(old)  # this process may see other files besides
            both = fingerprint(entry for file, entry in entries(new).items() if file in known)
            if texts := changes(fingerprint(known[file] for file in entries(both)), both):
                raise ChangedFile(
                    f"{reference} changed while it was in use: {listed(texts, most=MOST_NAMED)}: put the old back, "
                    "and the same command resumes; or add --accept-changed-code if the change does not matter"
                )
        if self.load_given is not None:
            hold(replace(self.load_given(), load=self.load_given))


def at(workplace: Workplace, function: Callable[..., T]) -> Callable[..., T]:
    """Return the function so that another process, when it calls it, enters the workplace first."""

    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> T:
        workplace.enter()
        return function(*arguments, **options)

    return call


def _is_installed(path: str) -> bool:
    return f"{path}{os.sep}".startswith(_INSTALLED)


def _own_spec(name: str, folders: list[str]) -> ModuleSpec | None:
    """Return the spec of a module; None if it is not found, is installed, or is part of Python or this package.

    What lies in another Python's folder of packages is installed as well, wherever the search path has it from.
    """
    top, _, below = name.partition(".")
    if top in sys.stdlib_module_names or top in ("__main__", "raysubset"):
        return None
    for finder in [PathFinder] if below else sys.meta_path:
        # searched by its last name: a search by the whole name of a namespace package would import it
        spec = finder.find_spec(name.rpartition(".")[2], folders if below else None)
        if spec is not None:
            origin = os.path.realpath(spec.origin) if spec.origin and spec.has_location else ""
            return None if origin and (_is_installed(origin) or _PACKAGES & {*Path(origin).parts}) else spec
    return None


def _imported(path: Path, *, package: str) -> Iterator[str]:
    """Yield the names that a source file may import anywhere. `from a import b` yields a.b: b may be a module."""
    with suppress(SyntaxError, ValueError):  # whoever imports the file reports the error
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                parts = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
                base = ".".join([*parts, *([node.module] if node.module else [])])
                if base:
                    yield base
                    yield from (f"{base}.{alias.name}" for alias in node.names if alias.name != "*")
            elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
                called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                name = node.args[0].value
                if called in ("import_module", "__import__") and isinstance(name, str) and not name.startswith("."):
                    yield name
