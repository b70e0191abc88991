"""A network that gives logits in eval mode and a tuple in train mode (GoogLeNet, Inception, DeiT: auxiliary heads) passes
the check of the model, and ends in "AttributeError: 'tuple' object has no attribute 'dtype'" in an actor.
Kind: pytorch/vision#302, NVIDIA/apex#27, huggingface/pytorch-image-models#879."""

from common import *

module(
    "net",
    """
class Net(nn.Module):
    def __init__(self, k, s):
        super().__init__(); self.a = nn.Linear(s[0]*s[1]*s[2], 16); self.f = nn.Linear(16, k); self.x = nn.Linear(16, k)
    def forward(self, x):
        h = F.relu(self.a(x.flatten(1))); return (self.f(h), self.x(h)) if self.training else self.f(h)
def make(k, s): return Net(k, s)
""",
)
try:
    minima("net:make")
    check("tuple in train mode", True)
except ValueError as error:
    check("tuple in train mode is refused in words", "tuple" in str(error), error)
except Exception as error:
    check("tuple in train mode is refused in words", False, repr(error))
