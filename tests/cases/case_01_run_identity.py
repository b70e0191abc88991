"""Two projects, each with a data.parquet and a net.py of its own, run by the same command: the second is given the first's
report, exit 0 (the run's name and config hold relative names only). Likewise after editing net.py, or the data file.
Kind seen in: aether-lang-dev/aether#1886, rust-lang/cargo#16642, ray-project/ray#35812, TensorAuto/OpenTau#502."""

from common import *
import json

for folder, num, classes in (("a", 240, 3), ("b", 400, 4)):
    os.makedirs(folder)
    x, y = learnable(num, classes)
    pq.write_table(pa.table({"image": [encoded(i) for i in x], "label": y}), f"{folder}/data.parquet")
    open(f"{folder}/net.py", "w").write(
        f"from torch import nn\ndef make(k, s): return nn.Sequential(nn.Flatten(), nn.Linear(s[0]*s[1]*s[2], {classes}), nn.ReLU(), nn.Linear({classes}, k))\n"
    )
flags = "run --storage-path ../store --data.name data.parquet --model.name net:make --minimize.epochs 1 --trunk.epochs 0 --fine-tuning.epochs 0".split()


def go(folder):
    done = subprocess.run(["raysubset", *flags], cwd=folder, capture_output=True, text=True, timeout=400)
    reports = [
        json.load(open(f"store/{d}/report.json"))
        for d in os.listdir("store")
        if os.path.exists(f"store/{d}/report.json")
    ]
    return done, [(r["data"]["num_classes"], r["model"]["num_parameters"]) for r in reports]


done, had = go("a")
check("project a runs", done.returncode == 0 and had == [(3, 64 * 3 + 3 + 3 * 3 + 3)], had)
done, had = go("b")
check(
    "project b is not given a's report",
    done.returncode != 0 or any(k == 4 for k, _ in had),
    f"exit {done.returncode}, reports in the store (classes, parameters) {had}; said: {done.stderr.strip().splitlines()[-1][-90:]}",
)
open("a/net.py", "a").write("def make(k, s): return nn.Sequential(nn.Flatten(), nn.Linear(s[0]*s[1]*s[2], k))\n")
done, had = go("a")
check(
    "an edited network is not answered with the old report, unless that is said in the output",
    done.returncode != 0 or any(p == 64 * 3 + 3 for _, p in had) or "changed" in done.stderr,
    f"exit {done.returncode}, {had}",
)
