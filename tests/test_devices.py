"""What a process sets of its C library's memory: glibc's thresholds, where nobody else has, and nothing elsewhere. And
when it gives a card's memory back."""

import ctypes
import sys
import weakref
from typing import Any
from unittest import mock

import pytest
import torch

from raysubset.subset_actors.actor import SubsetActor, _Damages
from raysubset.training import devices

TRIM, MMAP = -1, -3


def calls(monkeypatch, *, most: int = 2**26, **environment: str) -> list[tuple[int, int]]:
    """mallopt()'s, of a glibc that takes mmap thresholds up to `most`."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    library = mock.Mock()
    library.mallopt.side_effect = lambda option, value: option == TRIM or value <= most
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    devices._keep_freed_memory.__wrapped__()
    return [call.args for call in library.mallopt.call_args_list]


def test_glibc_keeps_what_is_freed_and_an_older_one_by_the_threshold_it_takes(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    assert calls(monkeypatch) == [(MMAP, 2**26), (TRIM, 2**27)]
    assert calls(monkeypatch, most=2**25) == [(MMAP, 2**26), (MMAP, 2**25), (TRIM, 2**27)]
    assert (TRIM, 2**27) not in calls(monkeypatch, most=0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MALLOC_TRIM_THRESHOLD_", "65536"),
        ("MALLOC_MMAP_THRESHOLD_", "65536"),
        ("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=65536"),
    ],
)
def test_what_the_environment_sets_stays(monkeypatch, name, value):
    monkeypatch.setattr(sys, "platform", "linux")
    assert calls(monkeypatch, **{name: value}) == []


@pytest.mark.parametrize("library", [OSError("no such file"), object()])
def test_other_c_libraries_are_left_as_they_are(monkeypatch, library):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", mock.Mock(side_effect=[library]))
    devices._keep_freed_memory.__wrapped__()
    monkeypatch.setattr(sys, "platform", "darwin")
    assert calls(monkeypatch) == []


def test_a_cards_memory_is_given_back_when_nothing_refers_to_it_any_more(monkeypatch):
    """Whatever the work was: minimizations, an aggregate, a test."""
    seen: list[Any] = []

    class Actor(SubsetActor):
        def __init__(self) -> None:
            self._damages = _Damages()

        def _do(self, *_: Any) -> list[Any]:
            seen.append(weakref.ref(tensor := torch.zeros(3)))
            return [len(tensor)]

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: seen.append(seen[0]()))
    assert Actor().do([], None, attempts=[], waited_s=0.0)[0] == [3]
    assert seen[1:] == [None]
