"""The numbers of a run: how long its sessions took together."""

from pathlib import Path

import pytest

from raysubset.events import Note
from raysubset.pipeline import session
from raysubset.pipeline.session import Sessions
from raysubset.run_directory import SESSIONS_PATH, Lease, RunDirectory


def test_wall_seconds_are_those_of_all_sessions_also_of_killed_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, now = RunDirectory(str(tmp_path), "run"), 100.0
    monkeypatch.setattr(session.time, "perf_counter", lambda: now)

    killed = Sessions(directory, Lease(directory), began=98.0)
    killed.started_up()
    killed.heartbeat()
    now += Sessions.WRITE_S
    killed.heartbeat()
    now += Sessions.WRITE_S / 2
    killed.heartbeat()  # too soon to be written down, and so lost
    assert directory.read_json(SESSIONS_PATH)["sessions"][0]["wall_s"] == 2 + Sessions.WRITE_S

    with Sessions(directory, Lease(directory), began=now) as last:
        now += 1.0
        last.started_up()
        now += 4.0
    assert last.seconds() == {"startup": 2 + 1, "wall": 2 + Sessions.WRITE_S + 5, "num_sessions": 2}


def test_a_heartbeat_that_cannot_be_written_ends_no_run_and_is_made_up_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, failures = RunDirectory(str(tmp_path), "run"), [OSError("no answer")]

    def write_json(path: str, record: object) -> None:
        if failures:
            raise failures.pop()
        RunDirectory.write_json(directory, path, record)

    monkeypatch.setattr(directory, "write_json", write_json)
    last = Sessions(directory, Lease(directory), began=0.0)
    last.heartbeat()
    assert not failures
    assert not directory.exists(SESSIONS_PATH)
    last.write()
    assert directory.exists(SESSIONS_PATH)


def test_a_driver_whose_lease_is_lost_stops_at_its_next_event_and_leaves_the_sessions_to_the_other(
    tmp_path: Path,
) -> None:
    directory = RunDirectory(str(tmp_path), "run")
    lease, events = Lease(directory), []
    with Sessions(directory, lease, began=0.0) as last:
        tell = last.checked(events.append)
        lease.lost = "another driver has taken over the run"
        for act in (lambda: tell(Note("never told")), last.write):  # the last writing has no event before it
            with pytest.raises(RuntimeError, match="another driver has taken over"):
                act()
    assert not events
    assert not directory.exists(SESSIONS_PATH)
