"""Config files: --config FILE, and what `raysubset config` writes."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raysubset.config.run import Config
from raysubset.config.trees import leaves

_HOW = "give a file that `raysubset config` wrote, or a run's config.json"


def read_config(path: str, default: Config) -> Config:
    """The default with what a YAML or JSON file sets: nested, or by dotted names; or a run's config.json, report.json.

    Raises:
        ValueError: if there is no such file, or it is no config.
    """
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
        tree = _of_yaml(text) if Path(path).suffix.lower() in (".yaml", ".yml") else json.loads(text)
    except OSError as error:
        raise ValueError(f"--config {path}: {error.strerror}; {_HOW}") from error
    except (ValueError, RecursionError) as error:  # bad JSON and bad UTF-8 both are ValueErrors
        kind = "YAML" if path.lower().endswith((".yaml", ".yml")) else "JSON (and not called .yaml)"
        raise ValueError(f"--config {path} is no {kind}: {error}; {_HOW}") from error
    if isinstance(tree, dict) and isinstance(tree.get("config"), dict):
        tree = tree["config"]  # a run's config.json or report.json
    try:
        return Config.from_dict(_merged(default.to_dict(), _nested({} if tree is None else tree)))
    except ValueError as error:
        raise ValueError(f"--config {path}: {error}") from error


def _of_yaml(text: str) -> Any:
    """What YAML says; 1e-3 is a number and None is null, as people mean them.

    Raises:
        ValueError: for what is no YAML, or says something twice.
    """
    import yaml  # only where it is asked for

    class Loader(yaml.SafeLoader):
        """PyYAML's own takes 1e-3 for a text, and the last of two that have one name."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            names = [self.construct_object(key, deep=True) for key, _ in node.value]
            for name in names:
                if names.count(name) > 1:
                    raise ValueError(f"{name} is given twice")
            return super().construct_mapping(node, deep=deep)

    number = re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789"))
    Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile("^None$"), ["N"])
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error


def _nested(tree: Any) -> Any:
    """The tree with dotted names taken apart; what is no object is left for from_dict() to refuse.

    Raises:
        ValueError: for what is given twice.
    """
    if not isinstance(tree, Mapping):
        return tree
    nested: dict[str, Any] = {}
    for name, value in leaves(tree):
        *rooms, leaf = name.split(".")
        node = nested
        for room in rooms:
            node = node.setdefault(room, {})
            if not isinstance(node, dict):
                raise ValueError(f"{name} is given, and {room} as something that has no fields")
        if leaf in node:
            raise ValueError(f"{name} is given twice")
        node[leaf] = value
    return nested


def _merged(tree: dict[str, Any], changes: Any) -> Any:
    """The tree with nested fields replaced; whatever is no object is left for from_dict() to refuse."""
    if not isinstance(changes, dict):
        return changes
    return tree | {
        key: _merged(tree[key], value) if isinstance(tree.get(key), dict) else value for key, value in changes.items()
    }
