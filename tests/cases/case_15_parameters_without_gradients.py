"""Parameters that a step does not use. (1) With SGD, the default, one whose first gradient comes later than others' ends
the run: "TypeError: expected Tensor as element 2 in argument 2, but got NoneType" (torch's fused SGD, which is asked for;
adam is fine): LayerDrop, mixtures of experts. (2) One that is never used ends fine-tuning on two workers after all
subsets are done, four times over: "Expected to have finished reduction …". Kind: pytorch/pytorch#57473,
open-mmlab/mmdetection#2377, LibreYOLO#771. The second part starts a local Ray."""

from common import *

module(
    "net",
    """
class Drop(nn.Module):
    def __init__(self, k, s):
        super().__init__(); self.a = nn.Linear(s[0]*s[1]*s[2], 16); self.b = nn.ModuleList(nn.Linear(16, 16) for _ in range(3)); self.f = nn.Linear(16, k)
    def forward(self, x):
        h = F.relu(self.a(x.flatten(1)))
        for b in self.b:
            if not self.training or torch.rand(()) > 0.4: h = h + F.relu(b(h))
        return self.f(h)
def drop(k, s): return Drop(k, s)
class Unused(nn.Module):
    def __init__(self, k, s):
        super().__init__(); self.f = nn.Linear(s[0]*s[1]*s[2], k); self.never = nn.Linear(4, 4)
    def forward(self, x): return self.f(x.flatten(1))
def unused(k, s): return Unused(k, s)
""",
)
for optimizer in ("adam", "sgd"):
    try:
        minima("net:drop", optimizer=optimizer)
        check(f"layers that are left out at random, {optimizer}", True)
    except Exception as error:
        check(f"layers that are left out at random, {optimizer}", False, repr(error))
done = run("unused", **{"model.name": "net:unused", "fine_tuning.epochs": 0.3, "fine_tuning.num_workers": 2})
check("a layer that is never used, two workers", not isinstance(done, Exception), str(done)[:160])
