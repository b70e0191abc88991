"""The unit vectors of spectral_norm are buffers, and are averaged like weights: shorter ones, so that the aggregate's
effective weights exceed the norm of 1 that the layer promises; deeper networks multiply that. After eight epochs of
subsets: norm 4.0 in one layer. Kind: NCAR/miles-credit#394."""

from common import *
import torch

module(
    "net",
    """
from torch.nn.utils.parametrizations import spectral_norm as sn
def make(k, s): return nn.Sequential(nn.Flatten(), sn(nn.Linear(s[0]*s[1]*s[2], 32)), nn.ReLU(), sn(nn.Linear(32, 16)), nn.ReLU(), sn(nn.Linear(16, 16)), nn.ReLU(), nn.Linear(16, k))
""",
)
weights, config, full_set, _ = minima("net:make", num=4, epochs=12.0)
left, network = aggregate("net:make", weights, config, full_set)
network.load_state_dict(left)
network.eval()
norms = [torch.linalg.matrix_norm(network[i].weight.detach(), 2).item() for i in (1, 3, 5)]
members = [left[f"{i}.parametrizations.weight.0._u"].norm().item() for i in (1, 3, 5)]
check(
    "the aggregate's u are unit vectors, and its weights of norm about 1",
    all(0.98 < u < 1.02 for u in members),
    f"lengths of u {[round(u, 3) for u in members]}, norms of the effective weights {[round(n, 2) for n in norms]}",
)
