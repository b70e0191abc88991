"""Read config files: --config FILE, as `raysubset config` writes them."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raysubset.config.run import Config
from raysubset.config.trees import leaves, need

_WAY_OUT = "give a file that `raysubset config` wrote, or a run's config.json"


def read_config(path: str, default: Config) -> Config:
    """Return the default config with the settings of a YAML or JSON file: nested, or by dotted names.

    The file may also be a run's config.json or report.json.

    Raises:
        ValueError: if the file cannot be read, or is not a config.
    """
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
        tree = _of_yaml(text) if Path(path).suffix.lower() in (".yaml", ".yml") else json.loads(text)
    except OSError as error:
        raise ValueError(f"--config {path}: {error.strerror}; {_WAY_OUT}") from error
    except (ValueError, RecursionError) as error:  # bad JSON and bad UTF-8 both are ValueErrors
        kind = "YAML" if path.lower().endswith((".yaml", ".yml")) else "JSON (and not called .yaml)"
        raise ValueError(f"--config {path} is no {kind}: {error}; {_WAY_OUT}") from error
    if isinstance(tree, dict) and isinstance(tree.get("config"), dict):
        tree = tree["config"]  # a run's config.json or report.json
    try:
        return default.with_overrides(_settings({} if tree is None else tree))
    except (ValueError, RecursionError) as error:  # a YAML file may hold itself
        raise ValueError(f"--config {path}: {error}") from error


def _of_yaml(text: str) -> Any:
    """Parse YAML; 1e-3 is a number and None is null, as people mean them.

    Raises:
        ValueError: if the text is not YAML, or gives a name twice.
    """
    import yaml  # loaded only for YAML files

    class Loader(yaml.SafeLoader):
        """PyYAML's own loader reads 1e-3 as text, and keeps the last of two values with one name."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys = (key for key, _ in node.value if not key.tag.endswith(":merge"))  # <<: what it gives may be set anew
            names = [self.construct_object(key, deep=True) for key in keys]
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


def _settings(tree: Any) -> dict[str, Any]:
    """Return the file's settings by their dotted names.

    Raises:
        ValueError: if the tree is no mapping, or a name is given twice.
    """
    need(isinstance(tree, Mapping), f"it should hold settings by their names, not {tree!r:.80}")
    settings: dict[str, Any] = {}
    for name, value in leaves(tree):
        need(name not in settings, f"{name} is given twice")
        settings[name] = value
    return settings
