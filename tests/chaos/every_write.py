"""End a run or a comparison at each of its writes in turn, and see whether the same command ends as an undisturbed one.

    python -m tests.chaos.every_write --out /tmp/writes [--verb compare] [--set rounds.num=1] [--every 5] [--twice]

A write is a file that takes its place in the directory, or is deleted from it. Driver and actors are threads of one
process, which ends at once before its write number n, for each n: as if the machine had gone. A second process does the
same again and must end where the undisturbed one did, by tests.chaos.punish's rules for bits, ledger and passes. With
--twice the second process ends too, at a write that is drawn, and a third completes the work. Processes are forked from
one that has imported all; no Ray is started.
"""

import argparse
import json
import multiprocessing
import os
import random
import shutil
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from raysubset import Config, compare, run
from raysubset.run_directory import RunDirectory, directory
from raysubset.subset_actors import actor as actor_module
from tests import processes
from tests.chaos import punish

ENDED = 77  # the exit code of a process that ended at its write
LIMIT_S = 120.0  # for one process
SHORT = {
    "subsets.num": 2,
    "subsets.size": 200,
    "minimize.epochs": 4.0,
    "trunk.epochs": 2.0,
    "rounds.num": 2,
    "rounds.outer_momentum": 0.5,
    "fine_tuning.epochs": 2.0,
    "fine_tuning.num_workers": 1,
    "actors.max_num": 1,
    "actors.checkpoint_epochs": 1.0,
    "model.width": 4,
}
ARMS = ["B", "D:minimize.learning_rate=0.1", "H:minimize.learning_rate=0.1"]


class Threads(processes.Actor):
    """An actor in threads of the driver's process."""

    def start(self) -> None:
        self.process = SimpleNamespace(pid=os.getpid(), kill=lambda: None, join=lambda: None)
        self.pipe, theirs = multiprocessing.Pipe()
        threading.Thread(target=lambda: processes.serve(self.build(), theirs, lambda: None), daemon=True).start()
        for call in self.calls:
            self._send(call)


class Writes:
    """Counts the writes of this process, and ends it before number `last`."""

    def __init__(self, last: int | None) -> None:
        self.names, self._last, self._lock = list[str](), last, threading.Lock()

    def count(self, name: str) -> None:
        with self._lock:
            if len(self.names) == self._last:
                os._exit(ENDED)
            self.names.append(name)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        replace, delete = os.replace, RunDirectory.delete

        def counted_replace(source: str, target: Any) -> None:
            self.count(f"write {target}")
            replace(source, target)

        def counted_delete(storage: RunDirectory, path: str) -> None:
            self.count(f"delete {path}")
            delete(storage, path)

        monkeypatch.setattr(directory.os, "replace", counted_replace)
        monkeypatch.setattr(RunDirectory, "delete", counted_delete)


def work(folder: Path, verb: str, overrides: dict[str, Any]) -> None:
    """Run or compare below a folder."""
    config = Config(name="run", storage_path=str(folder)).with_overrides(SHORT | overrides)
    if verb == "run":
        run(config, on_event=None)
    else:
        compare(config, seeds=2, budgets=[2.0], arms=ARMS, learning_rates=[0.03, 0.1], on_event=None)


def attempt(folder: Path, verb: str, overrides: dict[str, Any], last: int | None) -> tuple[int, list[str]]:
    """Do the work in a process of its own. Return its exit code and the writes that it made, if it came to its end."""
    folder.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*processes.WARM, __name__])
    process = context.Process(target=_attempt, args=(folder, verb, overrides, last))
    process.start()
    process.join(LIMIT_S)
    if process.exitcode is None:
        process.kill()
        process.join()
        return -1, []
    names = folder / "writes.json"
    return process.exitcode, json.loads(names.read_text()) if process.exitcode == 0 else []


def _attempt(folder: Path, verb: str, overrides: dict[str, Any], last: int | None) -> None:
    with open(folder / "log", "a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    torch.set_num_threads(1)
    writes = Writes(last)
    with pytest.MonkeyPatch.context() as monkeypatch:
        there = processes.install(monkeypatch)
        monkeypatch.setattr(processes, "Actor", Threads)
        monkeypatch.setattr(actor_module, "ray", there)
        monkeypatch.setattr(actor_module.signal, "signal", lambda *_: None)  # the main thread's alone
        writes.install(monkeypatch)
        work(folder, verb, overrides)
    (folder / "writes.json").write_text(json.dumps(writes.names))
    os._exit(0)


def flags_of(verb: str, overrides: dict[str, Any]) -> dict[str, Any]:
    """The work's flags as tests.chaos.punish has them."""
    return {key.replace("_", "-"): value for key, value in (SHORT | overrides).items()} | {"verb": verb}


def problems(reference: Path, folder: Path) -> list[str]:
    """What does not hold of work that was ended and completed."""
    outcome = punish.Outcome("writes")
    punish.check_directory(reference / "run", folder / "run", outcome)
    return outcome.problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--verb", choices=["run", "compare"], default="run")
    parser.add_argument("--set", nargs="+", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--twice", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    overrides = {field: json.loads(value) for field, _, value in (text.partition("=") for text in options.set)}
    draws = random.Random(options.seed)
    punish.FLAGS.update(flags_of(options.verb, overrides))
    shutil.rmtree(options.out, ignore_errors=True)
    code, names = attempt(reference := options.out / "reference", options.verb, overrides, None)
    if code:
        print((reference / "log").read_text()[-2000:])
        return 1
    found, began = Counter[str](), time.monotonic()
    print(f"{len(names)} writes", flush=True)
    for last in range(options.first, len(names), options.every):
        folder = options.out / f"{last:04d}"
        codes = [attempt(folder, options.verb, overrides, last)[0]]
        if options.twice:
            codes.append(attempt(folder, options.verb, overrides, draws.randrange(len(names)))[0])
        codes.append(attempt(folder, options.verb, overrides, None)[0])
        bad = [] if codes[-1] == 0 else [f"ended with {codes}"]
        bad += problems(reference, folder) if not bad else []
        name = names[last].replace(str(reference / "run") + "/", "")
        found["bad" if bad else "good"] += 1
        if bad:
            print(f"{last} {name} {codes}", *bad, sep="\n    ", flush=True)
        else:
            shutil.rmtree(folder)
    print(f"{dict(found)} in {time.monotonic() - began:.0f} s")
    return 1 if found["bad"] else 0


if __name__ == "__main__":
    sys.exit(main())
