"""Legs: pieces of work that know what they need, each named by all that its result depends on and done once.

    runner = LegRunner(run, num_gpus=0)
    runner.run([leg])               # and all that it needs
    leg.output.weights(), leg.validation(), runner.failed

A comparison's arms and a sweep's trunks are drawn as legs; equal ones are one piece of work.
"""

from raysubset.legs.leg import Leg, Start, StartKind, closure, critical_path
from raysubset.legs.runner import LegRunner

__all__ = ["Leg", "Start", "StartKind", "LegRunner", "closure", "critical_path"]
