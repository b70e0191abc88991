"""A script that calls run() at its top level and names its own function as the model is run again by every actor that
imports it, and ends in "… is being written by process …; wait for it, or choose another --name". Kind: conductor-oss/python-sdk#489,
NVIDIA/CompileIQ#46."""

from common import *

open("train.py", "w").write(f"""from torch import nn
from raysubset import Config, run
def net(k, s): return nn.Sequential(nn.Flatten(), nn.Linear(s[0]*s[1]*s[2], k))
run(Config(storage_path={DIR + "/store"!r}, name="n").with_overrides({{"model.name": "train:net", "minimize.epochs": 1.0, "trunk.epochs": 0.0, "fine_tuning.epochs": 0.0}}))
""")
done = subprocess.run([sys.executable, "train.py"], capture_output=True, text=True, timeout=400)
check(
    "it runs, or the message speaks of the main guard",
    done.returncode == 0 or "__main__" in done.stderr.strip().splitlines()[-1],
    done.stderr.strip().splitlines()[-1][:170],
)
