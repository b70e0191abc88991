"""fine_tuning.start=shrink_perturb multiplies frozen parameters (requires_grad False: a pretrained backbone) by 0.5 too: they
can never recover, and nothing says so. parameter_names of the plan holds them. Kind: VectorInstitute/FL4Health#38,
learning-at-home/hivemind#428. Starts a local Ray."""

from common import *
from safetensors.torch import load_file

module(
    "net",
    """
class Net(nn.Module):
    def __init__(self, k, s):
        super().__init__(); g = torch.Generator().manual_seed(7); self.back = nn.Conv2d(s[0], 8, 3, padding=1); self.f = nn.Linear(128, k)
        with torch.no_grad(): self.back.weight.copy_(torch.randn(self.back.weight.shape, generator=g)); self.back.bias.fill_(0.5)
        self.back.requires_grad_(False)
    def forward(self, x): return self.f(F.max_pool2d(F.relu(self.back(x)), 2).flatten(1))
def make(k, s): return Net(k, s)
""",
)
done = run(
    "sp",
    **{
        "model.name": "net:make",
        "fine_tuning.epochs": 0.3,
        "fine_tuning.start": "shrink_perturb",
        "fine_tuning.num_workers": 1,
    },
)
if isinstance(done, Exception):
    check("runs, or refuses frozen parameters", isinstance(done, ValueError), done)
else:
    bias = load_file(f"{DIR}/store/sp/model.safetensors")["back.bias"]
    check("the frozen layer is as it was", bool((bias == 0.5).all()), f"its bias was 0.5 and is {bias[0].item():.3f}")
