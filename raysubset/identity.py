"""identify(): what the names in configs stand for now, and where relative ones lie."""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict

import pyarrow as pa

from raysubset.config import DATA_NAMES, EMBEDDED_NAMES, Config, DataConfig, Learned, flatten, shapes_result
from raysubset.data import FullSet, file_fingerprint, kind_of, load_full_set
from raysubset.events import Note
from raysubset.fingerprints import Identity
from raysubset.given_objects import given_fingerprint, is_given
from raysubset.user_code import code_fingerprint, source_files
from raysubset.work import weights_fingerprint


def identify(configs: Iterable[Config], full_sets: dict[Learned, FullSet], known: Identity | None) -> Identity:
    """What the names in these configs stand for. Sets that are not read from files are loaded, and added to full_sets.

    Args:
        full_sets: those that are loaded already: what was read counts, not what lies there now.
        known: an earlier identity, of which files that are as they were are not digested again.
    """
    data, code, places = {}, {}, {}
    for config in configs:
        name, own = _data_name(config), config.learned
        if name not in data:
            earlier = known_fingerprint(known, config)
            found = None if own in full_sets else file_fingerprint(config.data, earlier)
            if found is None:
                if own not in full_sets:
                    full_sets[own] = load_full_set(*own, known=earlier)
                found = full_sets[own].fingerprint
            data[name] = found
            places |= _data_place(config.data)
        if (source := config.model.weights) and f"weights {source}" not in data:
            data[f"weights {source}"] = weights_fingerprint(config.model)
        for field, reference in config.functions().items():
            if not shapes_result(field):  # another listener changes nothing
                continue
            if is_given(reference):
                if field != "data.name":  # known by what was read of it, also where that alone has travelled
                    code[reference] = given_fingerprint(field, reference)
            elif reference not in code:
                code[reference] = code_fingerprint(reference)
                places |= _code_place(reference.partition(":")[0])
    return Identity(data, code, places)


def places_notes(identity: Identity) -> list[Note]:
    """Where relative names lie, in a line: 'photos is /srv/photos, net is /srv/net.py'; none where none is relative."""
    places = ", ".join(f"{name} is {place}" for name, place in identity.places.items())
    return [Note(places)] if places else []


def known_fingerprint(known: Identity | None, config: Config) -> pa.Table | None:
    """What an earlier identity says of a config's set."""
    return known.data.get(_data_name(config)) if known else None


def _is_of_arrays(config: DataConfig) -> bool:
    return kind_of(config.name) == "function" or config.name in EMBEDDED_NAMES


def _data_name(config: Config) -> str:
    """Of a set in an identity: what is made of arrays depends on how they were read and cut, too."""
    if not _is_of_arrays(config.data):
        return config.data.name
    tree = {"data": asdict(config.data), "task": asdict(config.task)}
    options = {key: value for key, value in flatten(tree).items() if shapes_result(key)}
    return f"{config.data.name} {hashlib.blake2b(json.dumps(options).encode(), digest_size=4).hexdigest()}"


def _data_place(config: DataConfig) -> dict[str, str]:
    """Where a relative path of the data lies."""
    if _is_of_arrays(config):
        return {}
    path = config.root if config.name in DATA_NAMES else config.name
    absolute = os.path.abspath(os.path.expanduser(path))
    return {} if "://" in path or os.path.isabs(path) or path.startswith("~") else {path: absolute}


def _code_place(module: str) -> dict[str, str]:
    """Where a user's module lies."""
    stem, files = module.replace(".", "/"), source_files(module)
    found = [path for name, path in files.items() if name.rpartition(".")[0] in (stem, f"{stem}/__init__")]
    return {module: os.path.abspath(found[0])} if found else {}
