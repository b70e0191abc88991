"""What is decided from what a cluster has, or says that it can start."""

import pytest

from raysubset.cluster import NodeType, num_gpus_of, resources
from raysubset.config import ActorsConfig
from raysubset.events import Event

CPUS, GPUS = NodeType("alive", {"CPU": 4.0}, 1, 0), NodeType("gpu.spot", {"CPU": 8.0, "GPU": 1.0}, 0, 3)


@pytest.mark.parametrize(
    ("asked", "types", "unknown", "num", "told"),
    [
        (None, [CPUS], False, 0.0, ""),
        (None, [CPUS, GPUS], False, 1.0, ""),
        (None, [CPUS, GPUS], True, 1.0, ""),
        (None, [CPUS], True, 0.0, "--actors.num-gpus=1"),
        (0.0, [CPUS], True, 0.0, ""),
        (0.5, [CPUS], True, 0.5, ""),
    ],
)
def test_actors_ask_for_gpus_where_there_may_be_some_and_the_user_hears_where_that_is_not_known(
    monkeypatch: pytest.MonkeyPatch, asked: float | None, types: list[NodeType], unknown: bool, num: float, told: str
) -> None:
    monkeypatch.setattr(resources, "node_types", lambda: types)
    monkeypatch.setattr(resources, "_may_start_unknown_nodes", lambda: unknown)
    events: list[Event] = []
    assert num_gpus_of(ActorsConfig(num_gpus=asked), events.append) == num
    assert len(events) == bool(told)
    assert all(event.kind == "warning" and told in event.text for event in events)
