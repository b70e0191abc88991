"""A buffer that is meant to hold -inf (an attention mask) makes every aggregation refuse the minima as diverged: "lower
minimize.learning_rate, or use aggregation.method=select_best", and select_best refuses with the same words. A
conventional run trains the same network well."""

from common import *

module(
    "net",
    """
class Net(nn.Module):
    def __init__(self, k, s):
        super().__init__(); self.e = nn.Linear(s[2], 16); self.a = nn.MultiheadAttention(16, 2, batch_first=True); self.f = nn.Linear(16, k)
        self.register_buffer("mask", torch.full((s[1], s[1]), float("-inf")).triu(1))
    def forward(self, x):
        h = self.e(x[:, 0]); return self.f(self.a(h, h, h, attn_mask=self.mask, need_weights=False)[0][:, -1])
def make(k, s): return Net(k, s)
""",
)
import torch
from raysubset.aggregation import merge
from raysubset.aggregation.streaming import RunningMean

weights, *_ = minima("net:make")
mean = RunningMean()
[mean.add(w) for w in weights]
check(
    "the mean of equal masks is the mask",
    torch.equal(mean.weights()["mask"], weights[0]["mask"]),
    "NaN where it was -inf",
)
check(
    "a mask that no step changed is not taken for divergence",
    torch.equal(merge(weights)["mask"], weights[0]["mask"]),
    "merge() gives another",
)
