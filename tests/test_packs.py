"""Packs: how pieces are put together, what they are called, and how often they were lost."""

import numpy as np

from raysubset.config import Config
from raysubset.run_directory import RunDirectory
from raysubset.subset_actors import Backlog, Pack, name_of
from raysubset.subset_actors.packs import in_packs
from raysubset.work import AnyPiece, Piece, TrialPiece

CONFIG, DIRECTORY = Config(), RunDirectory("storage", "run")


def pieces(num: int) -> list[Piece]:
    return [Piece(CONFIG, DIRECTORY, "subsets", subset_id=i, indices=np.arange(3)) for i in range(num)]


def test_packs_are_even_in_order_and_no_larger_than_asked() -> None:
    for num, most, sizes in (
        (10, 8, [5, 5]),
        (8, 8, [8]),
        (7, 3, [3, 2, 2]),
        (2, 8, [2]),
        (3, 1, [1, 1, 1]),
        (0, 4, []),
    ):
        packs = in_packs(pieces(num), most)
        assert [len(pack.pieces) for pack in packs] == sizes
        assert [piece for pack in packs for piece in pack.pieces] == pieces(num)


def test_a_pack_names_its_subsets_and_the_entries_of_its_ledger() -> None:
    assert Pack((Piece(CONFIG, DIRECTORY, "trunk"),)).label == "trunk"
    assert Pack(tuple(pieces(2))).label == "subsets 0, 1"
    assert [piece.ledger_key for piece in Pack(tuple(pieces(2))).pieces] == [("subsets", 0, 0), ("subsets", 0, 1)]
    trial = Pack((TrialPiece(tuple(pieces(2))),))
    assert (trial.label, trial.pieces[0].ledger_key) == ("packing trial of 2 subsets", ("measuring", 0, None))


def test_losses_are_counted_by_piece_also_when_a_pack_has_shrunk() -> None:
    whole = Pack(tuple(pieces(3)))
    backlog = Backlog([whole])
    assert backlog.take() is not None
    assert backlog.count_lost(whole) == 1
    rest = Pack(whole.pieces[1:])
    backlog.put_back(rest, in_s=60.0)
    assert backlog.take() is None  # not due yet
    assert len(backlog) == 1
    assert backlog.count_lost(rest) == 2


def test_what_needs_others_is_given_out_when_they_are_done_and_given_up_with_one_that_failed() -> None:
    a, b, c, d, e = pieces(5)
    needs = {name_of(c): [name_of(a), name_of(b)], name_of(d): [name_of(c)]}
    backlog = Backlog([Pack((piece,)) for piece in (a, b, c, d, e)], needs)

    def taken() -> list[AnyPiece]:
        return [due[0].pieces[0] for _ in range(9) if (due := backlog.take())]

    assert taken() == [a, b, e]
    assert backlog.num_later == 2
    backlog.note_done(e)
    backlog.note_done(a)
    assert taken() == []
    backlog.note_done(b)
    assert taken() == [c]
    assert backlog.drop_dependents(e) == []
    assert backlog.drop_dependents(c) == [d]
    assert (len(backlog), backlog.num_later) == (0, 0)
    backlog = Backlog([Pack((piece,)) for piece in (a, b, c, d)], needs)
    assert backlog.drop_dependents(a) == [c, d]
    backlog.note_done(b)  # which c would have needed too
    assert taken() == [a, b]
    backlog.add([Pack((c,)), Pack((d,))], {name_of(c): [name_of(b)], name_of(d): [name_of(b), name_of(a)]})
    assert taken() == [c], "what it needs was done before"
