"""object_fingerprint() digests an object in memory: its code and its tensors. All processes get the same digests.

Python's own pickles do not serve: those of tensors hold addresses, those of classes random numbers or only a name.
"""

import dis
import pickle
import sys
import types
from collections.abc import Collection, Iterator
from typing import Any

import pyarrow as pa

from raysubset.fingerprints import Entry, entries, fingerprint, hasher
from raysubset.user_code.source_files import code_in_use

_NOT_CODE = (
    *("__dict__", "__weakref__", "__module__", "__doc__"),
    *("__firstlineno__", "__static_attributes__", "_abc_impl"),
)


def object_fingerprint(name: str, value: Any) -> pa.Table:
    """Return digests of an object: its code and values, its tensors, and the files of the user's modules that it needs.

    Raises:
        ValueError: if it holds what cannot be pickled, and so cannot be given to other processes either.
    """
    digester = _Digester()
    try:
        digester.dump(value)
    except Exception as error:  # the user's __reduce__() may raise anything
        raise ValueError(
            f"{name} cannot be given to other processes, as it holds what cannot be pickled ({error}): leave locks, "
            "open files and generators out of it, or give a function that creates it"
        ) from error
    digests = [Entry(name, digester.stream.num_bytes, digester.stream.hash.hexdigest())]
    if digester.tensors.num_bytes:
        digests.append(Entry(f"{name}'s tensors", digester.tensors.num_bytes, digester.tensors.hash.hexdigest()))
    for module in sorted(digester.modules):
        digests += entries(code_in_use(f"{module}:")).values()
    return fingerprint(digests)


class _Hash:
    """A file that digests what is written to it."""

    def __init__(self) -> None:
        self.hash, self.num_bytes = hasher(), 0

    def write(self, data: Any) -> None:
        self.hash.update(data)
        self.num_bytes += len(data)


class _Digester(pickle._Pickler):  # the pickler in Python: its memoize() can be overridden
    """Pickles to a digest. Functions and classes that no module has by name are pickled by their code.

    Tensors are pickled by dtype and shape; their values go to a digest of their own.
    """

    memo: dict[int, Any]  # typeshed declares the type of the C pickler's memo

    def __init__(self) -> None:
        self.stream, self.tensors = _Hash(), _Hash()
        self.modules: set[str] = set()  # modules whose functions and classes are pickled by name
        self._met: dict[int, tuple[int, Any]] = {}
        super().__init__(self.stream, protocol=5)

    def memoize(self, obj: Any) -> None:
        if not isinstance(obj, str | bytes):  # whether two equal ones are one object is a matter of chance
            super().memoize(obj)  # pyright: ignore[reportAttributeAccessIssue]

    def reducer_override(self, value: Any) -> Any:
        """Return what is pickled in place of a value; NotImplemented for the value itself."""
        torch = sys.modules.get("torch")
        if torch is not None and isinstance(value, torch.Tensor):
            plain = value.detach().cpu().contiguous()
            self.tensors.write(plain.reshape(-1).view(torch.uint8).numpy() if plain.numel() else b"")
            return _stand_in("tensor", str(plain.dtype), tuple(plain.shape), value.requires_grad)
        match value:
            case types.ModuleType():
                self.modules.add(value.__name__)
                return _stand_in("module", value.__name__)
            case types.CodeType():
                return _stand_in("code", *_parts_of(value))
            case set() | frozenset():
                return _stand_in("set", sorted(map(self._digest_of, value)))
            case types.FunctionType() | type():
                return self._code_of(value)
            case staticmethod() | classmethod():
                return _stand_in(type(value).__name__, value.__func__)
            case property():
                return _stand_in("property", value.fget, value.fset, value.fdel)
            case types.MemberDescriptorType() | types.GetSetDescriptorType():
                return _stand_in("slot", value.__name__)
        return NotImplemented

    def _digest_of(self, value: Any) -> str:
        """Return the digest of an element of a set. The set is sorted by it: its own order is a matter of chance."""
        digester = _Digester()
        digester.memo, digester._met = dict(self.memo), dict(self._met)  # the element may lead back to its container
        digester.dump(value)
        self.modules |= digester.modules
        return digester.stream.hash.hexdigest() + digester.tensors.hash.hexdigest()

    def _code_of(self, value: Any) -> Any:
        if reference := importable(value):
            self.modules.add(reference.partition(":")[0])
            return NotImplemented  # pickled by its name
        if id(value) in self._met:  # a function that calls itself, for example
            return _stand_in("again", self._met[id(value)][0])
        self._met[id(value)] = len(self._met), value
        if isinstance(value, type):
            attributes = {key: each for key, each in sorted(vars(value).items()) if key not in _NOT_CODE}
            return _stand_in("class", value.__name__, value.__bases__, attributes)
        used = {key: value.__globals__[key] for key in sorted({*_globals_of(value.__code__)} & {*value.__globals__})}
        closure = [cell.cell_contents for cell in value.__closure__ or ()]
        names = {name for code in _codes(value.__code__) for name in code.co_names}
        self.modules.update(part for each in (*used.values(), *closure) for part in _submodules(each, names))
        return _stand_in("function", value.__code__, value.__defaults__, value.__kwdefaults__, closure, used)


def importable(value: Any) -> str | None:
    """Return package.module:name of a function or class that other processes can import; None for others."""
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", "")
    if not module or module == "__main__":
        return None
    return f"{module}:{name}" if getattr(sys.modules.get(module), name, None) is value else None


def _stand_in(*parts: Any) -> tuple[type, tuple[Any]]:
    return tuple, (parts,)


def _parts_of(code: types.CodeType) -> tuple[Any, ...]:
    """Return all parts of a code object but its place in the source."""
    counts = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags)
    names = (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
    return code.co_name, code.co_code, code.co_consts, counts, names


def _globals_of(code: types.CodeType) -> Iterator[str]:
    """Yield the names that the code, and the code defined in it, reads from its module."""
    for each in _codes(code):
        yield from (step.argval for step in dis.get_instructions(each) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"))


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """Yield the code, and the code defined in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _submodules(value: Any, names: Collection[str]) -> Iterator[str]:
    """Yield the names of a module's parts that code with these names may use, as in package.part.function()."""
    for name in names if isinstance(value, types.ModuleType) else ():
        part = vars(value).get(name)
        if isinstance(part, types.ModuleType) and part.__name__ == f"{value.__name__}.{name}":
            yield part.__name__
            yield from _submodules(part, names)
