"""Helpers of the cases: tiny images, tables, and the product's own functions called in this process (no Ray unless said).

PYTHONPATH=<checkout>:<this folder> python NN_name.py      prints a line a check: "ok" or "FAULT", and why.
"""

import io, os, sys, shutil, tempfile, warnings, subprocess
import numpy as np
import pyarrow as pa, pyarrow.parquet as pq
from PIL import Image

warnings.simplefilter("ignore")
sys.path.insert(0, os.getcwd())
RNG = np.random.default_rng(0)
DIR = tempfile.mkdtemp(prefix="case")
os.chdir(DIR)
sys.path.insert(0, DIR)  # modules written by cases lie here


def pixels(h=8, w=8, c=3):
    return RNG.integers(0, 256, (h, w, c) if c > 1 else (h, w), dtype=np.uint8)


def encoded(image, form="PNG", **options):
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, format=form, **options)
    return buffer.getvalue()


def put(path, data=None):
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path, "wb") as file:
        file.write(encoded(pixels()) if data is None else data)


def table(num=40, classes=2, names=None, **more):
    labels = [i % classes for i in range(num)]
    return pa.table(
        {
            "image": [encoded(pixels()) for _ in range(num)],
            "label": [names[i] for i in labels] if names else labels,
            **more,
        }
    )


def load(name, **options):
    """The full set, or the ValueError that refuses it."""
    from raysubset.config import DataConfig
    from raysubset.data import load_full_set

    try:
        return load_full_set(DataConfig(name=str(name), **options))
    except ValueError as error:
        return error


def size(full_set):
    return len(full_set.train) + len(full_set.validation) + len(full_set.test)


def told(full_set, *words):
    return any(all(w.lower() in note.lower() for w in words) for note in full_set.notes)


def check(label, fine, seen=""):
    print(f"{'ok   ' if fine else 'FAULT'} {label}" + ("" if fine else f": {seen}"), flush=True)


def learnable(num=240, classes=3, seed=0, side=8):
    """A data set that a linear network learns: a bright band for each class."""
    rng = np.random.default_rng(seed)
    y = np.arange(num) % classes
    x = rng.integers(0, 120, (num, side, side), dtype=np.uint8)
    for i, c in enumerate(y):
        x[i, :, c * 2 : c * 2 + 3] += 90
    return x, y


def module(name, text):
    with open(f"{DIR}/{name}.py", "w") as file:
        file.write("import torch\nfrom torch import nn\nimport torch.nn.functional as F\n" + text)
    sys.modules.pop(name, None)


def data_module():
    module(
        "own_data",
        f"import sys; sys.path.insert(0, {os.path.dirname(os.path.abspath(__file__))!r})\ndef data():\n    from common import learnable\n    return learnable()\n",
    )
    x, y = learnable()
    np.savez(f"{DIR}/own.npz", x=x, y=y)
    module(
        "own_data", f"import numpy as np\ndef data():\n    f = np.load({DIR + '/own.npz'!r}); return f['x'], f['y']\n"
    )
    return "own_data:data"


def minima(model, *, num=2, optimizer="sgd", epochs=3.0, layout=True, **recipe):
    """Minimize on `num` parts in this process, as actors do: (weights, config, full set, network of the first)."""
    import torch
    from raysubset.config import MinimizeConfig, ModelConfig
    from raysubset.models import build_model
    from raysubset.training import minimize, place

    torch.set_num_threads(1)
    full_set, config = (
        load(data_module()),
        MinimizeConfig(batch_size=16, epochs=epochs, optimizer=optimizer, channels_last=layout, **recipe),
    )
    weights = []
    for part in range(num):
        network = build_model(ModelConfig(name=model), full_set.spec, seed=5)
        network = place(network, torch.device("cpu"), channels_last=layout)
        minimize(network, full_set.examples("train", np.arange(part, len(full_set.train), num)), config, seed=part)
        weights.append({k: v.detach().clone() for k, v in network.state_dict().items()})
    return weights, config, full_set, network


def aggregate(model, weights, config, full_set):
    """Their plain mean, with statistics refreshed, as a round's aggregate."""
    import torch
    from raysubset.aggregation.scorer import Scorer
    from raysubset.aggregation.streaming import RunningMean
    from raysubset.config import ModelConfig
    from raysubset.models import build_model

    mean = RunningMean()
    for one in weights:
        mean.add(one)
    network = build_model(ModelConfig(name=model), full_set.spec, seed=0)
    scorer = Scorer(
        network, calibration=full_set.examples("train"), validation=full_set.examples("validation"), minimize=config
    )
    return scorer.refreshed(mean.weights()), network


def run(name, **over):
    """A run on Ray in this process: the report, or the exception."""
    import ray
    from raysubset import Config, run as run_

    if not ray.is_initialized():
        ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="error", num_cpus=2)
    base = {
        "data.name": data_module(),
        "minimize.epochs": 1.0,
        "trunk.epochs": 0.0,
        "fine_tuning.epochs": 0.0,
        "minimize.batch_size": 16,
    }
    try:
        return run_(Config(storage_path=f"{DIR}/store", name=name).with_overrides(base | over), fresh=True)
    except Exception as error:
        return error


def cli(*arguments, **environment):
    return subprocess.run(
        ["raysubset", *arguments],
        capture_output=True,
        text=True,
        errors="replace",
        env=os.environ | environment,
        timeout=400,
    )
