"""Listeners as users write them."""

import random

import numpy as np
import torch

heard = []


def hear(step):
    heard.append(step)


def draw(step):
    random.random(), np.random.rand(), torch.rand(3)  # noqa: NPY002


def fail(step):
    if step.step == 5:
        raise ConnectionError("no tracker\nat all")


def of_two(step, more):
    pass


not_callable = 3
