"""Networks over tokens: an LSTM and a causal Transformer, with outputs for each token or for the whole text."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raysubset.tasks import Spec

_MOST_HEADS = 4


class _Head(nn.Module):
    """Turns features [N, T, width] of causal layers into outputs: [N, T, V] of all tokens, or [N, M] of the last one.

    If V is the size of the vocabulary, weights are tied (Press and Wolf 2017, arXiv:1608.05859): the head uses the
    embedding's, which the caller passes, and its own bias. Else it is a linear layer.
    """

    def __init__(self, spec: Spec, width: int) -> None:
        super().__init__()
        self.of_last = len(spec.outputs) == 1
        self.linear = self.bias = None
        if spec.outputs[1:] == (spec.num_values,):
            self.bias = nn.Parameter(torch.zeros(spec.outputs[-1]))
        else:
            self.linear = nn.Linear(width, spec.outputs[-1])

    def forward(self, features: Tensor, embedding: nn.Embedding) -> Tensor:
        if self.linear is not None:
            return self.linear(features[:, -1] if self.of_last else features)
        return F.linear(features, embedding.weight, self.bias)


def _embedding(num: int, width: int) -> nn.Embedding:
    """Build an embedding of vectors whose length is about one, so that tied outputs start small."""
    embedding = nn.Embedding(num, width)
    nn.init.normal_(embedding.weight, std=width**-0.5)
    return embedding


class LSTM(nn.Module):
    """An embedding, `depth` layers of `width` LSTM units (Hochreiter and Schmidhuber 1997), and a tied head.

    torch cannot run it with stacked weights, so several of them are not packed on a card.
    """

    def __init__(self, spec: Spec, width: int, depth: int) -> None:
        super().__init__()
        assert isinstance(spec.num_values, int)
        self.embedding = _embedding(spec.num_values, width)
        self.lstm = nn.LSTM(width, width, depth, batch_first=True)
        self.head = _Head(spec, width)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.lstm(self.embedding(tokens))[0], self.embedding)


class Transformer(nn.Module):
    """A causal Transformer: learned positions, `depth` pre-norm blocks, a last norm and a tied head; no dropout.

    Initial weights of residual layers are divided by the root of their number, as in GPT-2.
    """

    def __init__(self, spec: Spec, width: int, depth: int) -> None:
        super().__init__()
        assert isinstance(spec.num_values, int)
        self.embedding = _embedding(spec.num_values, width)
        self.positions = _embedding(spec.inputs[0], width)
        self.blocks = nn.Sequential(*(_Block(width) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = _Head(spec, width)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if name.endswith(("project.weight", "down.weight")):
                    parameter /= math.sqrt(2 * depth)

    def forward(self, tokens: Tensor) -> Tensor:
        features = self.embedding(tokens) + self.positions.weight[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(features)), self.embedding)


class _Block(nn.Module):
    """Causal attention, and a perceptron of four times the width, each beside a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_heads = math.gcd(_MOST_HEADS, width)
        self.norm0, self.norm1 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attend = nn.Linear(width, 3 * width, bias=False)  # a bias of keys would change nothing
        self.project = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, features: Tensor) -> Tensor:
        heads = self.attend(self.norm0(features)).unflatten(-1, (3, self.num_heads, -1))  # [N, T, 3, heads, width]
        query, key, value = heads.transpose(1, 3).unbind(2)  # each [N, heads, T, width]
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        features = features + self.project(attended.transpose(1, 2).flatten(2))
        return features + self.down(F.gelu(self.up(self.norm1(features))))
