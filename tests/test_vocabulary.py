"""Texts as tokens and windows: every token is a target once, and comes back as the text it was."""

import json

import numpy as np
import pytest

from raysubset.config import DataConfig
from raysubset.data import load_full_set
from raysubset.tasks import NextToken, task_from_dict, task_to_dict
from raysubset.tasks.vocabulary import Vocabulary, fit_vocabulary, windows, windows_of


def test_bytes_are_those_of_utf_8():
    vocabulary = fit_vocabulary("bytes", ["anything"])
    assert len(vocabulary) == 256
    assert vocabulary.encode("hé").tolist() == [0x68, 0xC3, 0xA9]
    assert vocabulary.decode([0x68, 0xC3, 0xA9]) == "hé"
    assert vocabulary.decode([0x68, 0xC3]) == "h\ufffd"


def test_characters_are_numbered_in_order_and_others_are_unknown():
    vocabulary = fit_vocabulary("characters", ["banana", "c𝛑"])
    assert vocabulary.characters == "\nabcn𝛑"
    assert vocabulary.encode("can𝛑\nZé").tolist() == [3, 1, 4, 5, 0, 6, 6]
    assert vocabulary.unknown == 6
    assert vocabulary.decode(vocabulary.encode("can𝛑Z")) == "can𝛑\ufffd"


def test_tokens_take_as_few_bytes_as_they_can():
    many = "".join(map(chr, range(0x4E00, 0x4E00 + 300)))
    assert Vocabulary("bytes").encode("a").dtype == np.uint8
    assert fit_vocabulary("characters", ["abc"]).encode("a").dtype == np.uint8
    assert fit_vocabulary("characters", [many]).encode(many).dtype == np.uint16


def test_a_vocabulary_read_back_from_json_is_the_same():
    for vocabulary in (Vocabulary("bytes"), fit_vocabulary("characters", ["hé 𝛑"])):
        record = json.loads(json.dumps(task_to_dict(NextToken(vocabulary, 3))))
        assert task_from_dict(record) == NextToken(vocabulary, 3)


@pytest.mark.parametrize(
    "tree",
    [
        {"kind": "words"},
        {"kind": "bytes", "characters": "a"},
        {"kind": "characters", "characters": ""},
        {"kind": "characters", "characters": "ba"},
        {"kind": "characters", "characters": "aab"},
        {"kind": "characters", "characters": ["a", "b"]},
        ["bytes"],
    ],
)
def test_a_strangers_vocabulary_is_refused(tree: object):
    with pytest.raises(ValueError, match="vocabulary"):
        task_from_dict({"task": {"name": "next_token", "vocabulary": tree, "window": 3}})


def test_every_token_but_the_first_is_a_target_once():
    assert windows(np.arange(7), 3).tolist() == [[0, 1, 2, 3], [3, 4, 5, 6]]
    ids = np.arange(100, 200, dtype=np.uint8)
    cut = windows(ids, 7)
    assert cut.dtype == np.uint8
    assert cut[:, 1:].ravel().tolist() == ids[1:99].tolist()
    assert cut[:, :-1].ravel().tolist() == ids[:98].tolist()


def test_what_windows_leave_out_is_said():
    found, (note,) = windows_of(["abcd", "ef"], Vocabulary("bytes"), 4, where="the train split")
    assert found.tolist() == [[*b"abcd\n"]]
    assert str(note) == "the train split: 1 windows of 4 tokens; the last 2 of 7 are left out"
    vocabulary = fit_vocabulary("characters", ["abc"])
    assert windows_of(["abcabc"], vocabulary, 5, where="x")[1] == ()
    _, (note,) = windows_of(["abcxyx"], vocabulary, 5, where="the test split")
    assert str(note) == ("warning: 3 of 6 characters of the test split are not in training text (such as 'x'): unknown")


def test_what_is_too_short_is_refused_with_the_way_out():
    assert windows(np.arange(5), 4).shape == (1, 5)
    with pytest.raises(ValueError, match=r"the text has 5 tokens, .*: give --data.window 4 or less"):
        windows(np.arange(5), 5)
    with pytest.raises(ValueError, match="the training text is empty"):
        fit_vocabulary("bytes", ["", ""])
    with pytest.raises(ValueError, match="token 256 is outside the vocabulary, 0 to 255"):
        Vocabulary("bytes").decode([256])


def test_characters_that_only_a_part_held_out_has_are_told(tmp_path):
    (tmp_path / "text.txt").write_text("abc def " * 400 + "xyz µ " * 100)
    full_set = load_full_set(DataConfig(name=str(tmp_path / "text.txt"), vocabulary="characters", window=16))
    assert full_set.task.vocabulary.characters == " abcdef"
    tokens = full_set.test.arrays()["tokens"][:, 1:]
    num = int((tokens == full_set.task.vocabulary.unknown).sum())
    (warning,) = [str(note) for note in full_set.advice if note.is_warning]
    text = f"{num} of {tokens.size} characters of the test split are in no training window (such as 'x'): unknown"
    assert warning == f"warning: {text}"
    assert num > 300
    told = load_full_set(DataConfig(name=str(tmp_path / "text.txt"), window=16)).advice
    assert not any(note.is_warning for note in told)
