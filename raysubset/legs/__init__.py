"""Legs: pieces of work that know what they need, each named by all that its result depends on and done once.

    legs = list(Drawing(config, "legs", sizes).legs())      # the method, drawn once; inputs come first
    runner = LegRunner(run, num_gpus=0)
    runner.run(legs[-1:])           # and all that it needs
    legs[-1].output.weights(), legs[-1].validation(), runner.failed

Runs, a comparison's arms, a sweep's trunks and plans are drawn by the same Drawing; equal legs are one piece of work.
"""

from raysubset.legs.drawing import FRESH, Drawing
from raysubset.legs.leg import Leg, Start, StartKind, closure, critical_path
from raysubset.legs.runner import LegRunner
