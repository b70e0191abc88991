"""Digests of the files and arrays that names stand for, and how two records of such digests differ, in words."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Self

import pyarrow as pa

from raysubset.errors import listed

MOST_NAMED = 3  # files named in one line

_SCHEMA = pa.schema({"file": pa.string(), "size": pa.int64(), "digest": pa.string(), "stamp": pa.string()})
_ALL = pa.schema([("kind", pa.string()), ("name", pa.string()), *_SCHEMA])


class Entry(NamedTuple):
    """The digest of a file or an array; its content is not kept."""

    file: str  # path relative to what the name stands for; or which array it is
    size: int  # bytes
    digest: str
    stamp: str = ""  # as long as the stamp is the same, the file is not read again; "": it is


def hasher(data: bytes = b"") -> "hashlib.blake2b":
    """Return the hash object that all digests are made with, updated with `data`."""
    return hashlib.blake2b(data, digest_size=16)


def fingerprint(entries: Iterable[Entry]) -> pa.Table:
    """Return the table of the entries, each file once, in order of their names."""
    ordered = sorted({entry.file: entry for entry in entries}.values())
    return pa.Table.from_pylist([entry._asdict() for entry in ordered], _SCHEMA)


def entries(table: pa.Table) -> dict[str, Entry]:
    """Return the entries of a fingerprint(), by file."""
    return {values[0]: Entry(*values) for values in zip(*(column.to_pylist() for column in table.columns), strict=True)}


def changes(old: pa.Table, new: pa.Table) -> list[str]:
    """Return how two fingerprints differ, a text for each file: 'a.png has other bytes', 'b.png is gone'.

    Stamps are not compared.
    """
    old_entries, new_entries = entries(old), entries(new)
    texts = []
    for file in sorted(old_entries.keys() | new_entries.keys()):
        old_entry, new_entry = old_entries.get(file), new_entries.get(file)
        if old_entry is None:
            texts.append(f"{file} is new")
        elif new_entry is None:
            texts.append(f"{file} is gone")
        elif old_entry.size != new_entry.size:
            texts.append(f"{file} {old_entry.size:,} → {new_entry.size:,} bytes")
        elif old_entry.digest != new_entry.digest:
            texts.append(f"{file} has other bytes")
    return texts


def digest(table: pa.Table) -> str:
    """Return one digest of a whole fingerprint. Stamps do not count."""
    text = json.dumps([entry[:3] for entry in entries(table).values()])
    return hasher(text.encode()).hexdigest()


@dataclass(frozen=True)
class Identity:
    """What the names in a config stand for. Names that only one of two identities has are not compared."""

    data: Mapping[str, pa.Table] = field(default_factory=dict)  # fingerprints by the name of the data
    code: Mapping[str, pa.Table] = field(default_factory=dict)  # by package.module:function
    places: Mapping[str, str] = field(default_factory=dict)  # what relative names were resolved to

    def to_table(self) -> pa.Table:
        """Return the table of identity.parquet."""
        parts = [
            pa.table([pa.repeat(kind, len(table)), pa.repeat(name, len(table)), *table.columns], schema=_ALL)
            for kind, tables in (("data", self.data), ("code", self.code))
            for name, table in tables.items()
        ]
        places = {"places": json.dumps(dict(self.places))}
        return pa.concat_tables([_ALL.empty_table(), *parts]).replace_schema_metadata(places)

    @classmethod
    def from_table(cls, table: pa.Table) -> Self:
        """Return the identity that to_table() wrote."""
        groups: dict[str, dict[str, list[Entry]]] = {"data": {}, "code": {}}
        for kind, name, *values in zip(*(column.to_pylist() for column in table.columns), strict=True):
            groups[kind].setdefault(name, []).append(Entry(*values))
        tables = {kind: {name: fingerprint(group) for name, group in named.items()} for kind, named in groups.items()}
        return cls(tables["data"], tables["code"], json.loads((table.schema.metadata or {}).get(b"places", b"{}")))

    def joined(self, older: "Identity") -> "Identity":
        """Return this identity, with the names that only the older one has."""
        return Identity({**older.data, **self.data}, {**older.code, **self.code}, {**older.places, **self.places})

    def changed(self, old: "Identity") -> list[str]:
        """Return how this identity differs from an older one: 'data changed: …', 'code changed: …'."""
        lines = []
        for kind, old_tables, new_tables in (("data", old.data, self.data), ("code", old.code, self.code)):
            texts = [
                text
                for name, table in new_tables.items()
                if name in old_tables
                for text in changes(old_tables[name], table)
            ]
            if texts:
                lines.append(f"{kind} changed: {listed(list(dict.fromkeys(texts)), most=MOST_NAMED)}")
        return lines

    def is_empty(self) -> bool:
        return not (self.data or self.code)
