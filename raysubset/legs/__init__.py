"""Legs are pieces of work that know their inputs. Each is named by all that its result depends on, and done once.

    legs = list(Drawing(config, "legs", sizes).legs())      # the whole method; inputs come first
    with LegRunner(run, num_gpus=0) as runner:
        runner.run(legs[-1:])           # the last leg and all its inputs
    legs[-1].output.weights(), legs[-1].validation(), runner.failed

The same Drawing draws runs, the arms of comparisons, the trunks of sweeps, and plans. Equal legs are done once.
"""

from raysubset.legs.drawing import FRESH, Drawing
from raysubset.legs.leg import Leg, Start, StartKind, closure, critical_path
from raysubset.legs.runner import LegRunner, needs_of
