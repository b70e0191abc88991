"""What a process that actors are forked from imports: all that an actor does, so that none of them has to."""

import gc

import pytest  # noqa: F401

import raysubset.fine_tuning.worker
import raysubset.subset_actors
import raysubset.work  # noqa: F401

gc.freeze()  # what is there for good is looked at in no fork
