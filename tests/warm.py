"""What a process that actors are forked from imports: all that an actor does, so that none of them has to."""

import pytest  # noqa: F401
import torch

import raysubset.fine_tuning.worker
import raysubset.subset_actors
import raysubset.work  # noqa: F401

torch.optim.SGD([torch.zeros(1)])  # imports much more
