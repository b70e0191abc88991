"""A network function that reads a file of the working directory (torch.load("pretrained.pt")) works in the driver and in the
subset actors, and fails in fine-tuning, when all subsets are done, four times: Ray Train's workers have another working
directory; every trial of a sweep fails likewise. Kind: ray-project/ray#9571 #29787, ultralytics/ultralytics#5022. Starts Ray."""

from common import *
import torch, glob

torch.save(torch.nn.Linear(64, 3).state_dict(), f"{DIR}/pretrained.pt")
module(
    "net",
    """
def make(k, s):
    m = nn.Sequential(nn.Flatten(), nn.Linear(64, k)); m[1].load_state_dict(torch.load("pretrained.pt", weights_only=True)); return m
""",
)
done = run("rel", **{"model.name": "net:make", "fine_tuning.epochs": 0.3, "fine_tuning.num_workers": 1})
check(
    "a file of the working directory, in fine-tuning",
    not isinstance(done, Exception),
    f"{len(glob.glob(f'{DIR}/store/rel/rounds/0000/minima/*/minimum.json'))} minima are done, then: {done}",
)
