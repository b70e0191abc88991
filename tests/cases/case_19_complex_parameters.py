"""Complex parameters (Fourier layers) lose their imaginary part where the network is built (.to(float32)); torch warns on
stderr, the run goes on with half the parameters. Kind: pytorch/pytorch#95337 #46374."""

from common import *
from raysubset.config import ModelConfig
from raysubset.models import build_model
from raysubset.tasks import Spec

module(
    "net",
    """
class Net(nn.Module):
    def __init__(self, k, s):
        super().__init__(); self.w = nn.Parameter(torch.randn(s[1], s[2]//2+1, dtype=torch.cfloat)); self.f = nn.Linear(s[0]*s[1]*s[2], k)
    def forward(self, x): return self.f(torch.fft.irfft2(torch.fft.rfft2(x) * self.w, s=x.shape[-2:]).flatten(1))
def make(k, s): return Net(k, s)
""",
)
try:
    kind = str(build_model(ModelConfig(name="net:make"), Spec((1, 8, 8), (3,)), seed=0).w.dtype)
    check("a complex parameter stays complex, or is refused", kind == "torch.complex64", kind)
except ValueError:
    check("a complex parameter stays complex, or is refused", True)
