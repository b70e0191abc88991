"""Encodes texts as token numbers, of bytes or characters, and cuts them into windows for next-token prediction."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from raysubset.config.trees import need
from raysubset.events import Note

VocabularyKind = Literal["bytes", "characters"]

SEPARATOR = "\n"  # between documents

_NUM_BYTES = 256
_UNKNOWN_TEXT = "\ufffd"


@dataclass(frozen=True)
class Vocabulary:
    """A set of tokens: the bytes of UTF-8, or the characters of training text and one token for all others."""

    kind: VocabularyKind
    characters: str = ""  # each once, sorted by code point

    def __post_init__(self) -> None:
        fits = (self.kind == "bytes") != bool(self.characters) and [*self.characters] == sorted({*self.characters})
        need(fits, f"vocabulary.characters does not go with {self.kind}: each once, in order")

    def __len__(self) -> int:
        return _NUM_BYTES if self.kind == "bytes" else len(self.characters) + 1

    @property
    def unknown(self) -> int | None:
        """The token for characters that training text does not have: the last number. None for bytes."""
        return None if self.kind == "bytes" else len(self.characters)

    @property
    def spaces(self) -> tuple[int, ...]:
        """The tokens of white space, which end a word."""
        texts = map(chr, range(128)) if self.kind == "bytes" else self.characters
        return tuple(number for number, text in enumerate(texts) if text.isspace())

    @property
    def dtype(self) -> np.dtype:
        """The smallest of uint8, uint16 and int32 that holds every token number."""
        return np.dtype(np.uint8 if len(self) <= 2**8 else np.uint16 if len(self) <= 2**16 else np.int32)

    def encode(self, text: str) -> np.ndarray:
        """Return the numbers of a text's tokens, [T] of `dtype`."""
        if self.kind == "bytes":
            return np.frombuffer(text.encode(), np.uint8)
        numbers = {character: number for number, character in enumerate(self.characters)}
        return np.fromiter((numbers.get(each, len(numbers)) for each in text), self.dtype, len(text))

    def decode(self, ids: np.ndarray | Sequence[int]) -> str:
        """Return the text of token numbers. Bytes that are not UTF-8, and unknown characters, become "\ufffd".

        Raises:
            ValueError: for a number outside the vocabulary.
        """
        numbers = np.asarray(ids, dtype=np.int64)
        if len(wrong := np.flatnonzero((numbers < 0) | (numbers >= len(self)))):
            raise ValueError(f"token {numbers[wrong[0]]} is outside the vocabulary, 0 to {len(self) - 1}")
        if self.kind == "bytes":
            return numbers.astype(np.uint8).tobytes().decode(errors="replace")
        table = self.characters + _UNKNOWN_TEXT
        return "".join(table[number] for number in numbers)


def fit_vocabulary(kind: VocabularyKind, texts: Sequence[str]) -> Vocabulary:
    """Return the vocabulary of training texts.

    Raises:
        ValueError: if the texts have no characters.
    """
    if not any(texts):
        raise ValueError("the training text is empty: give some")
    if kind == "bytes":
        return Vocabulary(kind)
    return Vocabulary(kind, "".join(sorted({SEPARATOR}.union(*texts))))


def windows_of(
    texts: Sequence[str], vocabulary: Vocabulary, length: int, *, where: str
) -> tuple[np.ndarray, tuple[Note, ...]]:
    """Join documents and cut them into windows, [N, length + 1] of the vocabulary's dtype.

    Returns:
        The windows, and notes on tokens that are left out and on unknown characters.

    Raises:
        ValueError: if the documents are together shorter than one window.
    """
    ids = vocabulary.encode(SEPARATOR.join(texts))
    rows, notes = windows(ids, length, where=where), []
    if num_left_out := len(ids) - 1 - len(rows) * length:
        text = f"{where}: {len(rows)} windows of {length} tokens; the last {num_left_out} of {len(ids)} are left out"
        notes.append(Note(text))
    if vocabulary.unknown is not None and (num := int((ids == vocabulary.unknown).sum())):
        example = next(char for text in texts for char in text if char not in vocabulary.characters)
        text = f"{num} of {len(ids)} characters of {where} are not in training text (such as {example!r}): unknown"
        notes.append(Note(text, is_warning=True))
    return rows, tuple(notes)


def windows(ids: np.ndarray, length: int, *, where: str = "the text") -> np.ndarray:
    """Cut tokens into consecutive windows, [N, length + 1], which overlap by one token.

    So every token except the first is predicted once. Tokens at the end that do not fill a window are dropped.

    Raises:
        ValueError: for fewer tokens than one window takes.
    """
    if len(ids) <= length:
        raise ValueError(
            f"{where} has {len(ids)} tokens, and a window takes {length} and the next one: give --data.window "
            f"{max(1, len(ids) - 1)} or less, or more text"
        )
    return np.ascontiguousarray(np.lib.stride_tricks.sliding_window_view(ids, length + 1)[::length])
