"""Paths and URIs as pyarrow's file systems see them."""

import os

import pyarrow as pa
from pyarrow import fs


def locate(name: str) -> tuple[fs.FileSystem, str]:
    """The file system of a path or URI, and the path in it.

    Raises:
        ValueError: for a URI that pyarrow cannot open.
    """
    if "://" not in name:
        return fs.LocalFileSystem(), os.path.abspath(os.path.expanduser(name))
    try:
        system, path = fs.FileSystem.from_uri(name)
    except (pa.ArrowInvalid, ImportError) as error:  # some schemes want a package of their own
        raise ValueError(
            f"data.name = {name} is no URI that pyarrow can open: {error}; give a path, s3://… or gs://…"
        ) from error
    return system, path.rstrip("/")
