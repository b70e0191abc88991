"""Errors in a line: their kind, their first words, and the line of the user's code that they passed."""

from pathlib import Path

import pytest
import torch
from ray import cloudpickle
from ray.exceptions import ActorDiedError, OutOfMemoryError, RayTaskError

from raysubset.data import Examples
from raysubset.errors import counted, note_place, one_line, place_of, with_article
from raysubset.user_code.functions import in_a_line
from tests.tiny import examples


class Draws(list):
    """Indices that raise in this file, a frame below those of the package."""

    def __index__(self) -> int:
        raise KeyError("no such example")


def passed_through_user_code() -> Exception:
    with pytest.raises(KeyError) as told:
        Draws().__index__()
    return told.value


def test_a_line_ends_with_the_innermost_place_that_is_the_users():
    error = passed_through_user_code()
    place = place_of(error)
    assert place.startswith(f"see {Path(__file__).name}, line ")
    assert place.endswith(", in __index__")
    assert one_line(error) == f"KeyError: 'no such example'; {place}"


def test_what_passed_none_of_the_users_lines_has_no_place():
    with pytest.raises(TypeError) as told:
        Examples.select(examples(), None)  # pyright: ignore[reportArgumentType]
    error = told.value
    error.__traceback__ = error.__traceback__ and error.__traceback__.tb_next  # without this test's own line
    assert "; see" not in one_line(error)


def test_the_place_goes_with_an_error_to_another_process_and_is_told_once():
    error = passed_through_user_code()
    expected = one_line(error)
    note_place(error)
    there = cloudpickle.loads(cloudpickle.dumps(RayTaskError("do", "…", error)))  # pyright: ignore[reportPrivateImportUsage]
    assert there.cause.__traceback__ is None
    assert one_line(there) == expected
    assert one_line(ValueError(f"data.name = 'net:load' raised {expected}")).count("see ") == 1


def test_of_an_actor_that_could_not_be_made_what_was_raised_is_told():
    raised = RayTaskError(
        "Net.__init__", "Traceback (most recent call last):\nImportError: no net", ImportError("no net")
    )
    assert one_line(ActorDiedError(raised)) == "ActorDiedError: ImportError: no net"


def test_a_full_card_is_told_with_the_way_out_also_where_a_users_function_fills_it():
    needed = "CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has a total capacity of 79 GiB of which 1 GiB is free."
    advice = " Including non-PyTorch memory, this process has 78 GiB memory in use. Of the allocated memory 77 GiB is"
    with pytest.raises(torch.OutOfMemoryError) as told, in_a_line("minimize.objective", "losses:mixup"):
        raise torch.OutOfMemoryError(needed + advice)
    line = one_line(RayTaskError("do", "…", cloudpickle.loads(cloudpickle.dumps(told.value))))  # pyright: ignore[reportPrivateImportUsage]
    assert line.startswith(f"OutOfMemoryError: {needed}; the card is full: give a smaller minimize.batch_size, ")
    assert "card" not in one_line(OutOfMemoryError("the node ran low on memory"))  # Ray's, of the host


def test_numbers_and_types_are_put_in_words():
    assert [counted(n, "epoch") for n in (0, 1, 2, 1.0, 0.5, 12.7312)] == [
        *("0 epochs", "1 epoch", "2 epochs", "1 epoch", "0.5 epochs", "12.73 epochs")
    ]
    assert [with_article(value) for value in (3, {}, None)] == ["an int", "a dict", "a NoneType"]
