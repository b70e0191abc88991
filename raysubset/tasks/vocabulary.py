"""Texts as numbers of tokens, bytes or characters, and windows of them to learn the next token from."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from raysubset.config import from_tree
from raysubset.events import Note

VocabularyKind = Literal["bytes", "characters"]

SEPARATOR = "\n"  # between documents

_NUM_BYTES = 256
_UNKNOWN_TEXT = "\ufffd"


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a text: its UTF-8 bytes, or the characters of training text and one token for all others."""

    kind: VocabularyKind
    characters: str = ""  # each once, in order of their code points

    def __len__(self) -> int:
        return _NUM_BYTES if self.kind == "bytes" else len(self.characters) + 1

    @property
    def unknown(self) -> int | None:
        """The number of the token that stands for characters training text lacks: the last. Bytes need none."""
        return None if self.kind == "bytes" else len(self.characters)

    @property
    def spaces(self) -> tuple[int, ...]:
        """The tokens that end a word: white space."""
        texts = map(chr, range(128)) if self.kind == "bytes" else self.characters
        return tuple(number for number, text in enumerate(texts) if text.isspace())

    @property
    def dtype(self) -> np.dtype:
        """The smallest that numbers every token: uint8, uint16 or int32."""
        return np.dtype(np.uint8 if len(self) <= 2**8 else np.uint16 if len(self) <= 2**16 else np.int32)

    def encode(self, text: str) -> np.ndarray:
        """The numbers of a text's tokens, [T] of `dtype`."""
        if self.kind == "bytes":
            return np.frombuffer(text.encode(), np.uint8)
        known, found = _code_points(self.characters), _code_points(text)
        places = np.searchsorted(known, found)
        is_known = known[np.minimum(places, len(known) - 1)] == found
        return np.where(is_known, places, len(known)).astype(self.dtype)

    def decode(self, ids: np.ndarray | Sequence[int]) -> str:
        """The text of numbers of tokens. Bytes that are no UTF-8, and unknown characters, become "\ufffd".

        Raises:
            ValueError: for a number that no token has.
        """
        numbers = np.asarray(ids, dtype=np.int64)
        if len(wrong := np.flatnonzero((numbers < 0) | (numbers >= len(self)))):
            raise ValueError(f"token {numbers[wrong[0]]} is outside the vocabulary, 0 to {len(self) - 1}")
        if self.kind == "bytes":
            return numbers.astype(np.uint8).tobytes().decode(errors="replace")
        table = self.characters + _UNKNOWN_TEXT
        return "".join(table[number] for number in numbers)

    @classmethod
    def from_dict(cls, tree: Any) -> "Vocabulary":
        """The inverse of dataclasses.asdict().

        Raises:
            ValueError: for anything that it does not give.
        """
        vocabulary = from_tree(cls, tree, "vocabulary.", noun="field")
        characters = vocabulary.characters
        if (vocabulary.kind == "bytes") == bool(characters) or list(characters) != sorted({*characters}):
            raise ValueError(f"vocabulary.characters does not go with {vocabulary.kind}: each once, in order")
        return vocabulary


def fit_vocabulary(kind: VocabularyKind, texts: Sequence[str]) -> Vocabulary:
    """The vocabulary of training texts.

    Raises:
        ValueError: for texts without a character.
    """
    if not any(texts):
        raise ValueError("the training text is empty: give some")
    if kind == "bytes":
        return Vocabulary(kind)
    return Vocabulary(kind, "".join(sorted({SEPARATOR}.union(*texts))))


def windows_of(
    texts: Sequence[str], vocabulary: Vocabulary, length: int, *, where: str
) -> tuple[np.ndarray, tuple[Note, ...]]:
    """Documents one after another as windows, [N, length + 1] of the vocabulary's dtype, with notes on what is lost.

    Raises:
        ValueError: if they are shorter than one window.
    """
    ids = vocabulary.encode(SEPARATOR.join(texts))
    found, notes = windows(ids, length, where=where), []
    if rest := len(ids) - 1 - len(found) * length:
        notes.append(
            Note(f"{where}: {len(found)} windows of {length} tokens; the last {rest} of {len(ids)} are left out")
        )
    if vocabulary.unknown is not None and (num := int((ids == vocabulary.unknown).sum())):
        example = next(char for text in texts for char in text if char not in vocabulary.characters)
        text = f"{num} of {len(ids)} characters of {where} are not in training text (such as {example!r}): unknown"
        notes.append(Note(text, is_warning=True))
    return found, tuple(notes)


def windows(ids: np.ndarray, length: int, *, where: str = "the text") -> np.ndarray:
    """Consecutive windows, [N, length + 1], each beginning with the last token of the one before.

    So every token but the first is the next token of one window, once; a rest shorter than a window is dropped.

    Raises:
        ValueError: for fewer tokens than one window takes.
    """
    if len(ids) <= length:
        raise ValueError(
            f"{where} has {len(ids)} tokens, and a window takes {length} and the next one: give --data.window "
            f"{max(1, len(ids) - 1)} or less, or more text"
        )
    return np.ascontiguousarray(np.lib.stride_tricks.sliding_window_view(ids, length + 1)[::length])


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), np.uint32)
