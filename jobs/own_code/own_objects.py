"""Objects in hand in the place of names, as in a notebook: arrays, a network with its weights, and a class of a task.

Command:    cd jobs/own_code && python own_objects.py
"""

import argparse
import math

import numpy as np
import torch
from torch import nn

from raysubset import Config, load_model, run
from raysubset.tasks import Spec, Task


class Angle(Task):
    quality, unit, higher_is_better, margin = "error", "rad", False, 0.01

    def spec(self):
        return Spec(inputs=(2,), outputs=(1,))

    def batch(self, rows, draws):
        return rows["point"], rows["angle"]

    def loss(self, outputs, targets):
        return (outputs - targets).square().sum()  # over the examples

    def measure(self, outputs, targets):
        return {"error": (outputs - targets).abs().squeeze(1)}  # one number an example


def points(num=2000):
    angle = np.random.default_rng(0).uniform(-1.5, 1.5, (num, 1)).astype(np.float32)
    return {"point": np.concatenate([np.cos(angle), np.sin(angle)], axis=1), "angle": angle}


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    net = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 1))
    report = run(Config(name="own_objects"), data=points(), model=net, task=Angle, on_event=print)
    model = load_model(report.uri, task=Angle)  # in another process likewise
    print(f"an eighth of a turn is {math.pi / 4:.3f}: {model(torch.full((1, 2), 0.5**0.5)).item():.3f}")
