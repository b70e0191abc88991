"""Damage one file of a stopped run at a time, resume it, and see whether it still ends where an undisturbed one does.

    python -m tests.chaos.storage_faults --out /tmp/faults [--slice ledger] [--only WORD]

A case is a copy of a run that was stopped in its second round, with one damage: cut short, emptied, a bit changed,
gone, JSON of other types, pickles that would run code. Good answers: the bits and the passes of the undisturbed run,
with a word about what was made again (of a file that is gone, nothing can be said but where a record names it); or one
line that refuses. Bad: other bits, a traceback, code that ran, silence about damage. One Ray serves all cases.
"""

import argparse
import json
import os
import pickle
import shutil
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from logging import WARNING, Handler, LogRecord, getLogger
from pathlib import Path
from typing import Any

import torch

from raysubset import Config, run
from raysubset.cluster import ray
from raysubset.events import Attempt, Event, Note, Progress, Retry

FLAGS = {
    "subsets.num": 2,
    "minimize.epochs": 30.0,
    "trunk.epochs": 1.0,
    "rounds.num": 2,
    "rounds.outer_momentum": 0.5,
    "fine_tuning.epochs": 0.0,
    "actors.max_num": 1,
    "actors.checkpoint_epochs": 3.0,
}
Damage = Callable[[Path], None]
HARM = "harmed"  # a folder that pickles make if they run


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def flip(path: Path) -> None:
    """One bit of what is near the end, such as a weight."""
    data = bytearray(path.read_bytes())
    data[-300] ^= 0x40
    path.write_bytes(data)


def flip_mid(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x40
    path.write_bytes(data)


def gone(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


class _Harm:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (HARM,)


def evil(path: Path) -> None:
    path.write_bytes(pickle.dumps(_Harm()))


def evil_zip(path: Path) -> None:
    torch.save({"position": [99, 99], "x": _Harm()}, path)


def _named(name: str) -> Callable[[Damage], Damage]:
    def rename(damage: Damage) -> Damage:
        damage.__name__ = name
        return damage

    return rename


def text(value: str) -> Damage:
    return _named(f"text {value[:30]}")(lambda path: path.write_text(value) and None)


def put(key: str, value: Any) -> Damage:
    """Another value in a record, without the digest that would tell."""

    @_named(f"{key}={value}")
    def damage(path: Path) -> None:
        record = json.loads(path.read_text()) | {key: value}
        record.pop("digest", None)
        path.write_text(json.dumps(record))

    return damage


def drop(key: str) -> Damage:
    @_named(f"without {key}")
    def damage(path: Path) -> None:
        record = json.loads(path.read_text())
        path.write_text(json.dumps({k: v for k, v in record.items() if k not in (key, "digest")}))

    return damage


MINIMA = "rounds/0001/minima"
SLICES: dict[str, list[tuple[str, tuple[Damage, ...]]]] = {
    "json": [
        ("config.json", (half, empty, text("[]"), text("null"), drop("config"), put("config", {}), put("format", "x"))),
        ("decisions.json", (half, empty, text("{}"), text("[]"), put("num_gpus", "x"))),
        ("sessions.json", (half, text("{}"), text("[{}]"), text('"x"'))),
        ("environment.json", (half, text("[]"))),
        ("trunk/minimum.json", (half, gone, text("{}"), text("null"))),
        ("rounds/0000/aggregate.json", (half, gone, text("{}"), text("[]"))),
        (f"{MINIMA}/0000/minimum.json", (half, gone, text("{}"), text("[]"), drop("validation"))),
        (f"{MINIMA}/0000/minimum.json", (put("subset_id", "../../../x"), put("num_examples", -1))),
        (f"{MINIMA}/0000/minimum.json", (put("files", {"../../x": "1 bytes"}))),
    ],
    "ledger": [
        ("ledger/subsets-0001-0001-*.json", (half, empty, text("{}"), text("[]"), drop("cost"))),
        ("ledger/subsets-0001-0001-*.json", (put("foo", 1), put("started_at", "x"), put("outcome", "foo"))),
        ("ledger/subsets-0000-0000-*.json", (half, gone)),
        ("ledger", (gone,)),
    ],
    "lease": [("lease.json", (text("{"), text("{}"), text("[]"), text("null")))],
    "safetensors": [
        ("trunk/weights.safetensors", (half, empty, gone, flip, zeros)),
        ("rounds/0000/aggregate.safetensors", (half, gone, flip)),
        ("rounds/0000/momentum.safetensors", (half, gone, flip)),
        (f"{MINIMA}/0000/weights.safetensors", (half, gone, flip, evil)),
        (f"{MINIMA}/0000/outputs.safetensors", (half, gone, flip)),
    ],
    "checkpoint": [
        ("rounds/0000/minima/0001/optimizer.pt", (half, gone, evil, evil_zip, flip)),
        (f"{MINIMA}/0001/checkpoint-*.pt", (half, gone, empty, evil, evil_zip, flip_mid)),
    ],
    "parquet": [
        ("identity.parquet", (half, empty, gone, flip_mid)),
        ("rounds/0000/subsets.parquet", (half, gone)),
        ("rounds/0001/subsets.parquet", (half, empty, gone, flip_mid)),
        ("rounds", (gone,)),
    ],
}


class _Stop(KeyboardInterrupt):
    pass


def _stop_in_the_second_round(event: Event) -> None:
    match event:
        case Progress(attempt=Attempt(round=1, subset=1), epoch=epoch) if epoch > 9:
            raise _Stop


def is_warning(event: Event) -> bool:
    return isinstance(event, Retry) or (isinstance(event, Note) and event.is_warning)


@contextmanager
def _warnings(words: list[str]) -> Iterator[Callable[[Event], None]]:
    """What is logged as a warning meanwhile, and what the listener that it gives is told as one."""

    class Keeper(Handler):
        def emit(self, record: LogRecord) -> None:
            words.append(record.getMessage())

    keeper = Keeper(WARNING)
    getLogger().addHandler(keeper)
    try:
        yield lambda event: words.append(event.text) if is_warning(event) else None
    finally:
        getLogger().removeHandler(keeper)


def _tried(config: Config, reference: Path, *, may_be_silent: bool) -> tuple[str, str]:
    """(kind of answer, what was said) when the damaged run is resumed."""
    words: list[str] = []
    try:
        with _warnings(words) as listen:
            report = run(config, on_event=listen)
    except (ValueError, OSError, RuntimeError) as error:
        kind = "refused" if isinstance(error, ValueError) else "failed"
        lines = str(error).strip().splitlines()
        return (kind if len(lines) == 1 else f"{kind} in {len(lines)} LINES"), f"{type(error).__name__}: {lines[:1]}"
    except (Exception, SystemExit) as error:
        return "TRACEBACK", f"{type(error).__name__}: {error} at {traceback.extract_tb(error.__traceback__)[-1]}"
    first, again = (Path(place, "run", "model.safetensors").read_bytes() for place in (reference, config.storage_path))
    if first != again:
        return "OTHER BITS", str(words)
    words += [f"lacking {path}" for path in report.record["cost"].get("lacking", ())]
    silent = "" if words or may_be_silent else " in SILENCE"
    return f"recovered{silent}", f"{report.passes:.2f} passes; {words[:2]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="of an earlier call: its first runs are used again")
    parser.add_argument("--slice", choices=SLICES, action="append", help="kind of files; default: all")
    parser.add_argument("--only", default="", help="of the cases, those with this word")
    options = parser.parse_args()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    os.chdir(out)
    reference, stopped, place = out / "reference", out / "stopped", out / "case"

    def config(storage_path: Path) -> Config:
        return Config(name="run", storage_path=str(storage_path)).with_overrides(FLAGS)

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    print(f"undisturbed: {run(config(reference)).passes:.2f} passes", flush=True)
    if not stopped.exists():
        with suppress(_Stop):
            run(config(stopped), on_event=_stop_in_the_second_round)
            sys.exit("it was not stopped")
    answers: Counter[str] = Counter()
    for pattern, damages in [case for name in options.slice or SLICES for case in SLICES[name]]:
        for damage in damages:
            if options.only not in (label := f"{pattern} {damage.__name__}"):
                continue
            began = time.monotonic()
            shutil.rmtree(place, ignore_errors=True)
            shutil.copytree(stopped, place)
            damage(max((place / "run").glob(pattern), default=place / "run" / pattern))
            is_named = pattern.startswith("ledger") or pattern.endswith((".safetensors", "optimizer.pt"))
            answer, said = _tried(config(place), reference, may_be_silent=damage is gone and not is_named)
            if Path(HARM).exists():
                Path(HARM).rmdir()
                answer += " CODE RAN"
            answers[answer] += 1
            print(f"{answer:20} {label}: {said[:420]}, {time.monotonic() - began:.0f} s", flush=True)
    print(dict(answers))
    ray.shutdown()
    sys.exit(any(any(word.isupper() for word in answer.split()) for answer in answers))


if __name__ == "__main__":
    main()
