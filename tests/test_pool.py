"""The pool's bookkeeping on a Ray that is none: actors that answer at once, die when told to, on so many places."""

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ray.exceptions import ActorDiedError, RaySystemError, RayTaskError

from raysubset import Config
from raysubset.errors import ChangedFile
from raysubset.events import Event, Note, Retry, Start, Waiting
from raysubset.fine_tuning import FineTuningFailed
from raysubset.pulse import Pulse
from raysubset.run_directory import CorruptFile, RunDirectory
from raysubset.run_directory.ledger import Ledger
from raysubset.subset_actors import ActorPool, Backlog, Pack, SubsetFailed, crew, name_of
from raysubset.subset_actors import pool as pool_module
from raysubset.work import Piece, Run
from tests.test_ledger import work

Do = Callable[[Sequence[Piece], int], Any]
"""What becomes of pieces at an attempt: their records; an exception is what ray.get() raises."""


@dataclass(eq=False)
class Actor:
    """An actor, which each method gives a reference for."""

    ray: "Ray"
    number: int
    is_stopped: bool = False

    def __getattr__(self, method: str) -> Any:
        return SimpleNamespace(remote=partial(self.ray.call, self, method))


@dataclass(eq=False)
class Ref:
    """What an actor was asked."""

    actor: Actor
    method: str
    arguments: tuple[Any, ...]
    attempts: tuple[int, ...]


class Ray:
    """Places for so many actors; what they are asked is answered when it is waited for."""

    def __init__(self, num_places: int, do: Do) -> None:
        self.num_places, self.do = num_places, do
        self.asked: list[Actor] = []  # in order
        self.alive: list[Actor] = []
        self.most_up = self.num_waits = 0

    def remote(self, **options: Any) -> Callable[[type], Any]:
        return lambda kind: SimpleNamespace(options=lambda **more: SimpleNamespace(remote=self._start))

    def _start(self, *_: Any) -> Actor:
        self.asked.append(actor := Actor(self, len(self.asked)))
        self.alive.append(actor)
        return actor

    def call(self, actor: Actor, method: str, *arguments: Any, **named: Any) -> Ref:
        actor.is_stopped |= method == "request_stop"
        return Ref(actor, method, arguments, tuple(named.get("attempts", ())))

    def _up(self) -> list[Actor]:
        return self.alive[: self.num_places]

    def wait(self, refs: list[Ref], num_returns: int, timeout: float) -> tuple[list[Ref], list[Ref]]:
        self.num_waits += 1
        self.most_up = max(self.most_up, len(self._up()))
        return [ref for ref in refs if ref.actor in self._up()][:num_returns], []

    def get(self, ref: Ref) -> Any:
        number = ref.actor.number
        if ref.method == "place":
            return {"node": f"n{number}", "ip": f"10.0.0.{number}", "pid": 1, "card_bytes": None}
        if ref.method == "report":
            return Pulse(), {}
        if ref.actor.is_stopped:
            return [None] * len(ref.arguments[0]), []
        result = self.do(ref.arguments[0], ref.attempts[0])
        if isinstance(result, Exception):
            raise result
        return result, []

    def kill(self, actor: Actor) -> None:
        self.alive.remove(actor)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Do], Ray]:
    """Have the pool meet this Ray: a cluster of so many places, and what comes of work there."""

    def install(num_places: int, do: Do) -> Ray:
        ray = Ray(num_places, do)
        for module in (crew, pool_module):
            monkeypatch.setattr(module, "ray", ray)
        for name, value in {
            "num_slots": lambda *_, **__: num_places,
            "refuse_unplaceable": lambda *_, **__: None,
            "workplace": lambda: None,
            "free_resources": lambda *_: "free is nothing",
            "FIRST_BACKOFF_S": 0.01,
            "START_S": 0.0,
        }.items():
            monkeypatch.setattr(crew, name, value)
        monkeypatch.setattr(pool_module, "draining_nodes", set)
        monkeypatch.setattr(pool_module, "put_once", lambda value: [value])
        return ray

    return install


def record(piece: Piece) -> dict[str, Any]:
    return {"subset_id": piece.subset_id}


def all_done(pieces: Sequence[Piece], attempt: int) -> list[dict[str, Any]]:
    return [record(piece) for piece in pieces]


def opened(folder: Path, events: list[Event], **overrides: Any) -> Run:
    config = Config(name="run", storage_path=str(folder)).with_overrides({"actors.max_attempts": 2, **overrides})
    return Run(config, RunDirectory(str(folder), "run"), None, [None], events.append)  # type: ignore[arg-type]


def pieces_of(run: Run, num: int) -> list[Piece]:
    return [Piece(run.config, run.directory, "subsets", subset_id=i, indices=np.arange(3)) for i in range(num)]


def ids(results: Any) -> list[Any]:
    return sorted(piece.subset_id for piece, _ in results)


def test_each_piece_is_done_once_by_no_more_actors_than_have_a_place_and_a_few(tmp_path: Path, fake: Any) -> None:
    ray, run = fake(4, all_done), opened(tmp_path, events := [])
    with ActorPool(run, num_gpus=0.0) as pool:
        packs = [Pack((piece,)) for piece in pieces_of(run, 1000)]
        assert ids(pool.run(packs)) == list(range(1000))
    assert len(ray.asked) == 4 + crew.FEW
    assert ray.most_up == 4
    assert ray.num_waits <= 2 * (1000 / 4 + 2)  # over all at once: what one look costs is shared by all that is done
    assert len([event for event in events if isinstance(event, Start)]) == 1000
    assert ray.alive == []


def test_attempts_go_on_from_the_ledger_which_is_listed_once(tmp_path: Path, fake: Any) -> None:
    attempts: list[int] = []

    def die_twice(pieces: Sequence[Piece], attempt: int) -> Any:
        attempts.append(attempt)
        return ActorDiedError() if attempt < 5 and pieces[0].subset_id == 1 else all_done(pieces, attempt)

    fake(1, die_twice)
    run = opened(tmp_path, [], **{"actors.max_attempts": 3})
    run.ledger.write(work(subset=1, attempt=2, outcome="lost"))
    listings = []
    run.directory.list = lambda *a, **k: listings.append(a) or RunDirectory.list(run.directory, *a, **k)  # type: ignore[method-assign]
    with ActorPool(run, num_gpus=0.0) as pool:
        assert ids(pool.run([Pack((piece,)) for piece in pieces_of(run, 3)])) == [0, 1, 2]
    assert sorted(attempts) == [0, 0, 3, 4, 5]
    assert len(listings) == 1
    assert [w.outcome for w in Ledger(run.directory).read()] == ["lost"] * 3  # the two that died are closed


def test_a_piece_that_is_always_lost_ends_the_run_or_is_yielded_with_its_error(tmp_path: Path, fake: Any) -> None:
    def die(pieces: Sequence[Piece], attempt: int) -> Any:
        return ActorDiedError() if pieces[0].subset_id == 1 else all_done(pieces, attempt)

    fake(2, die)
    run = opened(tmp_path, [])
    packs = [Pack((piece,)) for piece in pieces_of(run, 3)]
    with pytest.raises(SubsetFailed, match="subset 1 was lost 2 times in a row"), ActorPool(run, num_gpus=0.0) as pool:
        list(pool.run(packs))
    with ActorPool(run, num_gpus=0.0) as pool:
        results = {piece.ledger_key[2]: result for piece, result in pool.results(Backlog(packs))}
    assert [subset for subset, result in sorted(results.items()) if isinstance(result, SubsetFailed)] == [1]
    assert len(results) == 3


def test_ray_train_jobs_follow_all_that_actors_can_do_with_the_cluster_to_themselves_and_one_that_fails_ends_no_other(
    tmp_path: Path, fake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[Any] = []

    def do(pieces: Sequence[Piece], attempt: int) -> Any:
        order.append(pieces[0].subset_id)
        return all_done(pieces, attempt)

    def train(run: Run, job: Piece, *, num_gpus: float) -> dict[str, Any]:
        assert ray.alive == []
        order.append(job.stage)
        if job.stage == "conventional":
            raise FineTuningFailed("no worker comes up")
        return {"stage": job.stage}

    ray, run = fake(2, do), opened(tmp_path, [])
    monkeypatch.setattr(pool_module, "fine_tune", train)
    first, of_trunk, of_other = pieces_of(run, 3)
    trunk, other, last = (
        Piece(run.config, run.directory, stage, by_train=True, num_workers=2)
        for stage in ("trunk", "conventional", "fine_tuning")
    )
    needs = {trunk: [first], of_trunk: [trunk], of_other: [other], last: [of_trunk]}
    packs = [Pack((piece,)) for piece in (last, of_other, of_trunk, other, trunk, first)]
    names = {name_of(piece): [name_of(each) for each in needed] for piece, needed in needs.items()}
    with ActorPool(run, num_gpus=0.0) as pool:
        results = {name_of(piece): result for piece, result in pool.results(Backlog(packs, names))}
    assert order == [0, "conventional", "trunk", 1, "fine_tuning"]
    assert results.pop(name_of(trunk)) == {"stage": "trunk"}
    failed = {name for name, result in results.items() if isinstance(result, FineTuningFailed)}
    assert failed == {name_of(other), name_of(of_other)}
    assert len(results) == 5


def test_a_damaged_start_of_a_ray_train_job_is_no_failure_of_the_job(
    tmp_path: Path, fake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(run: Run, job: Piece, *, num_gpus: float) -> None:
        raise CorruptFile("trunk/weights.safetensors", "it is damaged")

    fake(1, all_done)
    run = opened(tmp_path, [])
    monkeypatch.setattr(pool_module, "fine_tune", train)
    job = Piece(run.config, run.directory, "fine_tuning", by_train=True, num_workers=2)
    with ActorPool(run, num_gpus=0.0) as pool, pytest.raises(CorruptFile):
        list(pool.results(Backlog([Pack((job,))])))


def test_a_file_of_the_users_that_was_replaced_ends_all_work(
    tmp_path: Path, fake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = ChangedFile("start.pt has other bytes")

    def train(run: Run, job: Piece, *, num_gpus: float) -> None:
        raise changed

    fake(1, lambda pieces, attempt: RayTaskError("do", "Traceback", changed))
    run = opened(tmp_path, [])
    monkeypatch.setattr(pool_module, "fine_tune", train)
    for piece in (pieces_of(run, 1)[0], Piece(run.config, run.directory, "fine_tuning", by_train=True, num_workers=2)):
        with ActorPool(run, num_gpus=0.0) as pool, pytest.raises(ChangedFile, match="other bytes"):
            list(pool.results(Backlog([Pack((piece,))])))


def test_what_a_result_made_due_starts_before_the_caller_has_taken_the_result(tmp_path: Path, fake: Any) -> None:
    fake(1, all_done)
    run = opened(tmp_path, events := [])
    first, second = pieces_of(run, 2)
    backlog = Backlog([Pack((first,)), Pack((second,))], {name_of(second): [name_of(first)]})
    with ActorPool(run, num_gpus=0.0) as pool:
        started = [
            (piece.ledger_key[2], [event.attempt.subset for event in events if isinstance(event, Start)])
            for piece, _ in pool.results(backlog)
        ]
    assert started == [(0, [0, 1]), (1, [0, 1])]


def test_a_pack_is_put_back_without_the_members_that_left_a_minimum(tmp_path: Path, fake: Any) -> None:
    given: list[list[Any]] = []

    def die_after_one(pieces: Sequence[Piece], attempt: int) -> Any:
        given.append([piece.subset_id for piece in pieces])
        if len(given) > 1:
            return all_done(pieces, attempt)
        pieces[0].directory.write_json(pieces[0].output.record_path, MINIMUM | record(pieces[0]))
        return ActorDiedError()

    fake(1, die_after_one)
    run = opened(tmp_path, events := [])
    with ActorPool(run, num_gpus=0.0) as pool:
        assert ids(pool.run([Pack(tuple(pieces_of(run, 3)))])) == [0, 1, 2]
    assert given == [[0, 1, 2], [1, 2]]
    (retry,) = [event.text for event in events if isinstance(event, Retry)]
    assert retry.startswith("subsets 1, 2 was lost on node")


def test_pieces_leave_a_node_that_drains_which_is_no_attempt(
    tmp_path: Path, fake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray: Ray = fake(1, all_done)
    monkeypatch.setattr(pool_module, "POLL_S", 0.0)
    run = opened(tmp_path, events := [], **{"actors.max_attempts": 1})
    monkeypatch.setattr(pool_module, "draining_nodes", lambda: {"n0" for e in events if isinstance(e, Start)})
    real = ray.wait

    def wait(refs: list[Ref], num_returns: int, timeout: float) -> Any:
        ready, _ = real(refs, num_returns, timeout)  # work on the first actor takes until it is stopped
        return [ref for ref in ready if ref.method == "place" or ref.actor.number or ref.actor.is_stopped], []

    ray.wait = wait  # type: ignore[method-assign]
    with ActorPool(run, num_gpus=0.0) as pool:
        assert ids(pool.run([Pack((piece,)) for piece in pieces_of(run, 2)])) == [0, 1]
    assert [event.text for event in events if isinstance(event, Retry)] == [
        "node 10.0.0.0 will go: subset 0 is to leave it",
        "subset 0 left node 10.0.0.0 with a checkpoint written",
    ]


def test_an_actor_that_stands_still_is_told_of_and_killed_and_its_piece_goes_on_elsewhere(
    tmp_path: Path, fake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray: Ray = fake(1, all_done)
    monkeypatch.setattr(pool_module, "POLL_S", 0.005)
    killed = list[tuple[str, int]]()
    monkeypatch.setattr(pool_module, "kill_processes", killed.extend)  # as Ray kills no process that was stopped
    real = ray.wait

    def wait(refs: list[Ref], num_returns: int, timeout: float) -> Any:
        ready, _ = real(refs, num_returns, timeout)  # the first actor answers nothing once it is at work
        return [ref for ref in ready if ref.method == "place" or ref.actor.number], []

    ray.wait = wait  # type: ignore[method-assign]
    run = opened(tmp_path, events := [], **{"actors.stall_s": 0.02})
    with ActorPool(run, num_gpus=0.0) as pool:
        assert ids(pool.run([Pack((piece,)) for piece in pieces_of(run, 1)])) == [0]
    warning = next(event.text for event in events if isinstance(event, Note))
    told = r"subset 0 on node 10\.0\.0\.0 stands still: no step for \d+ s; it is killed in 0 s unless"
    assert re.match(told, warning)
    (retry,) = [event.text for event in events if isinstance(event, Retry)]
    assert "TimeoutError: no step for" in retry
    assert killed == [("n0", 1)]
    assert [work.outcome for work in Ledger(run.directory).read()] == ["lost"]
    assert len(ray.asked) == 2


def test_an_actor_that_cannot_report_ends_nothing(tmp_path: Path, fake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where its card fails: its second thread may find out before the first."""
    ray: Ray = fake(1, all_done)
    monkeypatch.setattr(pool_module, "POLL_S", 0.0)
    run, reports, real_wait, real_get = opened(tmp_path, []), list[Ref](), ray.wait, ray.get

    def get(ref: Ref) -> Any:
        if ref.method == "report":
            reports.append(ref)
            raise RayTaskError("report", "a traceback", RuntimeError("out of memory")).as_instanceof_cause()
        return real_get(ref)

    def wait(refs: list[Ref], num_returns: int, timeout: float) -> Any:
        ready, _ = real_wait(refs, num_returns, timeout)  # work takes until three reports have come
        return [ref for ref in ready if ref.method in ("place", "report") or len(reports) > 2], []

    ray.get, ray.wait = get, wait  # type: ignore[method-assign]
    with ActorPool(run, num_gpus=0.0) as pool:
        assert ids(pool.run([Pack((piece,)) for piece in pieces_of(run, 2)])) == [0, 1]


def test_work_is_given_out_when_what_it_needs_is_done(tmp_path: Path, fake: Any) -> None:
    order: list[Any] = []

    def note(pieces: Sequence[Piece], attempt: int) -> Any:
        order.append(pieces[0].subset_id)
        return all_done(pieces, attempt)

    fake(4, note)
    run = opened(tmp_path, [])
    pieces = pieces_of(run, 3)
    needs = {name_of(pieces[0]): [name_of(pieces[2])], name_of(pieces[2]): [name_of(pieces[1])]}
    with ActorPool(run, num_gpus=0.0) as pool:
        list(pool.results(Backlog([Pack((piece,)) for piece in pieces], needs)))
    assert order == [1, 2, 0]


def test_actors_that_fail_together_as_they_start_count_once_and_the_cause_is_told(tmp_path: Path, fake: Any) -> None:
    ray: Ray = fake(2, all_done)
    real, run = ray.get, opened(tmp_path, [])

    def get(ref: Ref) -> Any:
        if ref.method == "place":
            raise RaySystemError("ImportError: no module of that name on this node")
        return real(ref)

    ray.get = get  # type: ignore[method-assign]
    packs = [Pack((piece,)) for piece in pieces_of(run, 2)]
    told = "actors do not come up: .*no module of that name on this node"
    with pytest.raises(SubsetFailed, match=told), ActorPool(run, num_gpus=0.0) as pool:
        list(pool.run(packs))
    assert len(ray.asked) == 4  # two, of which one counts; two more, of which the first is one too many
    assert ray.alive == []


def test_waiting_without_any_actor_is_told_and_ends(tmp_path: Path, fake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = fake(0, all_done)
    monkeypatch.setattr(crew, "WAIT_NOTICE_S", 0.0)
    monkeypatch.setattr(pool_module, "POLL_S", 0.0)
    monkeypatch.setattr(crew, "time", SimpleNamespace(monotonic=partial(next, itertools.count())))  # a second a look
    run = opened(tmp_path, events := [], **{"cluster.wait_timeout_s": 50.0})
    packs = [Pack((piece,)) for piece in pieces_of(run, 3)]
    told = r"3 actors of 1 CPU each wait to start, or for a place, .*cluster.wait_timeout_s"
    with pytest.raises(TimeoutError, match=told), ActorPool(run, num_gpus=0.0) as pool:
        list(pool.run(packs))
    assert events[1].text.startswith(
        "3 actors of 1 CPU each wait to start, or for a place; work not begun: 3, actors up: 0"
    )
    assert ray.alive == []


def test_what_reports_no_steps_says_how_far_its_measurement_is(
    tmp_path: Path, fake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = fake(1, all_done)
    monkeypatch.setattr(pool_module, "POLL_S", 0.0)
    real_wait, real_get, reports = ray.wait, ray.get, list[Ref]()

    def wait(refs: list[Ref], num_returns: int, timeout: float) -> tuple[list[Ref], list[Ref]]:
        return real_wait([ref for ref in refs if ref.method != "do" or reports], num_returns, timeout)

    def get(ref: Ref) -> Any:
        if ref.method != "report":
            return real_get(ref)
        reports.append(ref)
        return Pulse(3, 0.1, (40, 337)), {}

    monkeypatch.setattr(ray, "wait", wait)
    monkeypatch.setattr(ray, "get", get)
    run = opened(tmp_path, events := [])
    with ActorPool(run, num_gpus=0.0) as pool:
        list(pool.run([Pack((piece,)) for piece in pieces_of(run, 1)]))
    assert "subset 0 is measured; 40 of 337 examples" in [event.text for event in events if isinstance(event, Waiting)]


MINIMUM = {
    "num_examples": 3,
    "start_id": "initial",
    "outcome": "epochs",
    "training": None,
    "validation": None,
    "statistics": [],
    "files": {},
    "cost": {"num_forward": 3, "num_backward": 3, "num_steps": 1, "device_s": 0.1},
    "history": [],
    "round": 0,
    "attempt": 0,
}
