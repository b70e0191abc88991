"""The strings after config fields: they are the fields' documentation, in --help and in help(MinimizeConfig)."""

import ast
import dataclasses
import functools
import inspect
import typing
from typing import Any

from raysubset.config.trees import range_in_words, ranges_of


def field_docs(cls: type) -> dict[str, str]:
    """Return the documentation of a dataclass's fields by name, in their order, each as one line; "" if there is none.

    The last sentence of a number's documentation is its range.
    """
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            docs |= _docs_of_module(inspect.getsourcefile(base) or "").get(base.__qualname__, {})
    ranges = {name: range_in_words(range) for name, range in ranges_of(cls).items()}
    docs |= {
        name: f"{docs[name]} {words[0].upper()}{words[1:]}."
        for name, words in ranges.items()
        if words and docs.get(name)
    }
    return {field.name: docs.get(field.name, "") for field in dataclasses.fields(cls)}


@functools.cache
def _docs_of_module(path: str) -> dict[str, dict[str, str]]:
    """Read the fields' documentation by class from a module's source; return {} if the source cannot be read."""
    try:
        with open(path, encoding="utf-8") as file:
            tree = ast.parse(file.read())
    except (OSError, SyntaxError):
        return {}
    docs: dict[str, dict[str, str]] = {}
    for node in tree.body:
        if not isinstance(node, ast.ClassDef):
            continue
        class_docs = docs[node.name] = {}
        for field, text in zip(node.body, node.body[1:], strict=False):
            match field, text:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(words))):
                    class_docs[name] = " ".join(words.split())
    return docs


class _WithFields:
    """A class's __doc__ followed by its fields' documentation, which is read from the source when asked for."""

    def __init__(self, doc: str) -> None:
        self._doc = doc

    def __get__(self, instance: Any, owner: type) -> str:
        fields = {field.name: field for field in dataclasses.fields(owner)}
        lines = [self._doc, "", "Fields:"]
        for name, doc in field_docs(owner).items():
            hint = typing.get_type_hints(owner)[name]
            kind = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
            default = fields[name].default
            shown = "" if default is dataclasses.MISSING else f" = {default!r}"
            lines.append(f"    {name}: {kind}{shown}")
            lines += [f"        {doc}"] if doc else []
        return "\n".join(lines)


def show_fields(cls: Any) -> None:
    """Make help() of a config class, and of all classes nested in it, show the fields' documentation."""
    is_made_by_dataclass = (cls.__doc__ or "").startswith(f"{cls.__name__}(")
    cls.__doc__ = _WithFields(f"{cls.__name__} of a run." if is_made_by_dataclass else cls.__doc__ or "")
    for hint in typing.get_type_hints(cls).values():
        if dataclasses.is_dataclass(hint):
            show_fields(hint)
