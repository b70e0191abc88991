"""The most common classifier of tutorials, `x.view(x.size(0), -1)` after convolutions, passes the check of the model and
fails in the first actor: channels-last is the default, the message does not say so, nor that --no-minimize.channels-last
cures it. Kind: sergeywong/cp-vton#30, shionhonda/viton-gan#12, pytorch/pytorch#113437."""

from common import *

module(
    "net",
    """
class Net(nn.Module):
    def __init__(self, k, s):
        super().__init__(); self.c = nn.Conv2d(s[0], 6, 3, padding=1); self.f = nn.Linear(96, k)
    def forward(self, x):
        x = F.max_pool2d(F.relu(self.c(x)), 2); return self.f(x.view(x.size(0), -1))
def make(k, s): return Net(k, s)
""",
)
try:
    minima("net:make")
    check("a network that flattens by view() trains by default", True)
except RuntimeError as error:
    check(
        "a network that flattens by view() trains by default, or is told of channels_last",
        "channels" in str(error),
        error,
    )
minima("net:make", layout=False)
check("… and does in the other layout", True)
