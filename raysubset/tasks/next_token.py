"""Next-token prediction: the targets are the input sequence shifted by one."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raysubset.config.trees import need
from raysubset.tasks.losses import CrossEntropy
from raysubset.tasks.spec import Spec
from raysubset.tasks.task import LossTask, Rows
from raysubset.tasks.vocabulary import Vocabulary


@dataclass(frozen=True)
class NextToken(LossTask[CrossEntropy]):
    """The task of predicting the token after each token of a window. Stored rows are "tokens", integers [N, T + 1].

    The loss is in nats a token: the mean over an example's T tokens.
    """

    vocabulary: Vocabulary
    window: int  # T
    objective: CrossEntropy = field(default_factory=lambda: CrossEntropy(class_dim=2))

    name = "next_token"
    quality = "bits"
    higher_is_better = False
    loss_name = "cross-entropy, nats a token"

    def __post_init__(self) -> None:
        need(1 <= self.window < 2**20, f"task.window = {self.window} is no number of tokens")

    @property
    def unit(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return "bits a byte" if self.vocabulary.kind == "bytes" else "bits a character"

    def spec(self) -> Spec:
        size = len(self.vocabulary)
        return Spec((self.window,), (self.window, size), size)

    def batch(self, rows: Rows, draws: Tensor | None) -> tuple[Tensor, Tensor]:
        tokens = rows["tokens"].long()
        return tokens[:, :-1], tokens[:, 1:]

    def measure(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return each window's bits a token, share of tokens predicted right, and number of words that end in it."""
        nats = CrossEntropy(class_dim=2).by_example(outputs, targets)
        is_space = torch.isin(targets, torch.tensor(self.vocabulary.spaces, device=targets.device))
        ends = is_space[:, 1:] & ~is_space[:, :-1]
        right = (outputs.argmax(2) == targets).double().mean(1)
        return {"bits": nats.double() / math.log(2), "accuracy": right, "words": ends.sum(1)}

    def values(self, sums: Mapping[str, Any], num: int) -> dict[str, float]:
        """Return bits a token, accuracy, and a word's perplexity: exp of the nats per word that ends, NaN if none does.

        A word that ends with a window's first token is not seen to end there: nats count for one token fewer.
        """
        bits, num_words = sums["bits_sum"] / num, sums["num_words"] or math.nan
        nats_a_word = sums["bits_sum"] * math.log(2) * (self.window - 1) / num_words
        return {
            "bits": bits,
            "accuracy": sums["accuracy_sum"] / num,
            "word_perplexity": math.inf if nats_a_word > 700 else math.exp(nats_a_word),
        }

    def watched(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the share of each window's tokens that were predicted right."""
        return (outputs.argmax(2) == targets).double().mean(1)

    def tabulate(self, outputs: Tensor, targets: Tensor) -> dict[str, np.ndarray]:
        """Return the bits a token of each window, float64."""
        return {"bits": self.measure(outputs, targets)["bits"].numpy()}

    def describe(self) -> dict[str, Any]:
        return {"window": self.window, "vocabulary": self.vocabulary.kind, "num_tokens": len(self.vocabulary)}
