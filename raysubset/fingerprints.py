"""What names stand for, as digests of files and arrays: how two such records differ, in words."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Self

import pyarrow as pa

_MOST_NAMED = 3  # files named in one line

_SCHEMA = pa.schema({"file": pa.string(), "size": pa.int64(), "digest": pa.string(), "stamp": pa.string()})


class Entry(NamedTuple):
    """A file, or an array, of which nothing but its digest is kept."""

    file: str  # relative to what the name stands for; or which array it is
    size: int  # bytes
    digest: str
    stamp: str = ""  # while it is the same, the file need not be read again; "": it does


def hasher(data: bytes = b"") -> "hashlib.blake2b":
    """What digests are made with, begun with some bytes."""
    return hashlib.blake2b(data, digest_size=16)


def fingerprint(entries: Iterable[Entry]) -> pa.Table:
    """The entries, each file once, in order of their names."""
    ordered = sorted({entry.file: entry for entry in entries}.values())
    columns = zip(*ordered, strict=True) if ordered else ((), (), (), ())
    return pa.table([pa.array(c, f.type) for c, f in zip(columns, _SCHEMA, strict=True)], schema=_SCHEMA)


def entries(table: pa.Table) -> dict[str, Entry]:
    """The inverse of fingerprint(), by file."""
    return {values[0]: Entry(*values) for values in zip(*(column.to_pylist() for column in table.columns), strict=True)}


def changes(old: pa.Table, new: pa.Table) -> list[str]:
    """What differs between two fingerprints, a file each: 'a.png has other bytes', 'b.png is gone'; stamps aside."""
    before, after = entries(old), entries(new)
    found = []
    for file in sorted(before.keys() | after.keys()):
        was, now = before.get(file), after.get(file)
        if was is None:
            found.append(f"{file} is new")
        elif now is None:
            found.append(f"{file} is gone")
        elif was.size != now.size:
            found.append(f"{file} {was.size:,} → {now.size:,} bytes")
        elif was.digest != now.digest:
            found.append(f"{file} has other bytes")
    return found


def digest(table: pa.Table) -> str:
    """Of a whole fingerprint; stamps aside."""
    text = json.dumps([entry[:3] for entry in entries(table).values()])
    return hasher(text.encode()).hexdigest()


def in_words(found: list[str]) -> str:
    """A few of the changes, and how many more there are."""
    more = f" and {len(found) - _MOST_NAMED:,} more" if len(found) > _MOST_NAMED else ""
    return f"{', '.join(found[:_MOST_NAMED])}{more}"


@dataclass(frozen=True)
class Identity:
    """What the names in a config stand for. Names that only one of two identities has are not compared."""

    data: Mapping[str, pa.Table] = field(default_factory=dict)  # fingerprints by the name of the data
    code: Mapping[str, pa.Table] = field(default_factory=dict)  # by package.module:function
    places: Mapping[str, str] = field(default_factory=dict)  # what relative names were resolved to

    def to_table(self) -> pa.Table:
        """identity.parquet."""
        parts = []
        for kind, tables in (("data", self.data), ("code", self.code)):
            for name, table in tables.items():
                own = pa.table({"kind": [kind] * len(table), "name": [name] * len(table)}, _NAMED)
                parts.append(pa.table([*own.columns, *table.columns], schema=_ALL))
        return pa.concat_tables([_ALL.empty_table(), *parts]).replace_schema_metadata(
            {"places": json.dumps(dict(self.places))}
        )

    @classmethod
    def from_table(cls, table: pa.Table) -> Self:
        """The inverse of to_table()."""
        groups: dict[str, dict[str, list[Entry]]] = {"data": {}, "code": {}}
        for kind, name, *values in zip(*(column.to_pylist() for column in table.columns), strict=True):
            groups[kind].setdefault(name, []).append(Entry(*values))
        tables = {kind: {name: fingerprint(own) for name, own in named.items()} for kind, named in groups.items()}
        return cls(tables["data"], tables["code"], json.loads((table.schema.metadata or {}).get(b"places", b"{}")))

    def joined(self, older: "Identity") -> "Identity":
        """This one, with names that only the older one has."""
        return Identity({**older.data, **self.data}, {**older.code, **self.code}, {**older.places, **self.places})

    def changed(self, old: "Identity") -> list[str]:
        """How this differs from an older one: 'data changed: …', 'code changed: …'."""
        found = []
        for kind, before, after in (("data", old.data, self.data), ("code", old.code, self.code)):
            told = [text for name, table in after.items() if name in before for text in changes(before[name], table)]
            if told:
                found.append(f"{kind} changed: {in_words(list(dict.fromkeys(told)))}")
        return found

    def is_empty(self) -> bool:
        return not (self.data or self.code)


_NAMED = pa.schema({"kind": pa.string(), "name": pa.string()})
_ALL = pa.schema([*_NAMED, *_SCHEMA])
