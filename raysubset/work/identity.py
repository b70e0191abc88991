"""identify() finds what the names in configs stand for now, and what relative names resolve to."""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict

import pyarrow as pa

from raysubset.config import DATA_NAMES, EMBEDDED_NAMES, Config, DataConfig, Learned, flatten, kind_of, shapes_result
from raysubset.data import FullSet, file_fingerprint, load_full_set
from raysubset.events import Note
from raysubset.fingerprints import Identity
from raysubset.user_code.given import given_fingerprint, is_given
from raysubset.user_code.source_files import code_in_use, source_files
from raysubset.work import weights_fingerprint, weights_name


def identify(configs: Iterable[Config], full_sets: dict[Learned, FullSet], old_identity: Identity | None) -> Identity:
    """Return what the names in these configs stand for. Load the sets that are not read from files into full_sets.

    Args:
        full_sets: sets that are loaded already. Their fingerprints are of what was read, not of the files there now.
        old_identity: an earlier identity. Files whose stamps it has are not digested again.
    """
    data, code, places = {}, {}, {}
    for config in configs:
        name, learned = _data_name(config), config.learned
        if name not in data:
            earlier = known_fingerprint(old_identity, config)
            table = None if learned in full_sets else file_fingerprint(config.data, earlier)
            if table is None:
                if learned not in full_sets:
                    full_sets[learned] = load_full_set(*learned, known=earlier)
                table = full_sets[learned].fingerprint
            data[name] = table
            places |= _data_place(config.data)
        if config.model.weights and (name := weights_name(config.model)) not in data:
            data[name] = weights_fingerprint(config.model)
        for field, reference in config.functions().items():
            if not shapes_result(field):  # a listener, say, changes no result
                continue
            if is_given(reference):
                if field != "data.name":  # data are known by what was read, even in processes without the object
                    code[reference] = given_fingerprint(field, reference)
            elif reference not in code:
                code[reference] = code_in_use(reference)
                places |= _code_place(reference.partition(":")[0])
    return Identity(data, code, places)


def places_notes(identity: Identity) -> list[Note]:
    """Return a note of what relative names stand for: 'photos is /srv/photos, net is /srv/net.py'; else none."""
    places = ", ".join(f"{name} is {place}" for name, place in identity.places.items())
    return [Note(places)] if places else []


def known_fingerprint(old_identity: Identity | None, config: Config) -> pa.Table | None:
    """Return the fingerprint of a config's set in an earlier identity; None if the identity lacks it."""
    return old_identity.data.get(_data_name(config)) if old_identity else None


def _is_of_arrays(config: DataConfig) -> bool:
    return kind_of(config.name) == "function" or config.name in EMBEDDED_NAMES


def _data_name(config: Config) -> str:
    """Return the name of a config's set in an identity. For arrays it depends on how they are read and cut, too."""
    if not _is_of_arrays(config.data):
        return config.data.name
    tree = {"data": asdict(config.data), "task": asdict(config.task)}
    options = {key: value for key, value in flatten(tree).items() if shapes_result(key)}
    return f"{config.data.name} {hashlib.blake2b(json.dumps(options).encode(), digest_size=4).hexdigest()}"


def _data_place(config: DataConfig) -> dict[str, str]:
    """Return the absolute path of a relative path of the data; {} if the path is not relative."""
    if _is_of_arrays(config):
        return {}
    path = config.root if config.name in DATA_NAMES else config.name
    absolute = os.path.abspath(os.path.expanduser(path))
    return {} if "://" in path or os.path.isabs(path) or path.startswith("~") else {path: absolute}


def _code_place(module: str) -> dict[str, str]:
    """Return the path of a user's module; {} if it is not found."""
    stem, files = module.replace(".", "/"), source_files(module)
    paths = [path for name, path in files.items() if name.rpartition(".")[0] in (stem, f"{stem}/__init__")]
    return {module: os.path.abspath(paths[0])} if paths else {}
