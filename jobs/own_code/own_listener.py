"""A listener of your own in actors and Ray Train workers: a tracker, here a file with a line an epoch.

Command:    cd jobs/own_code && raysubset run --actors.on-step own_listener:track
Result:     test accuracy 97.8 ± 0.8 % (n = 1, two CPU cores), and 35 lines: 1 of the trunk, 8 of each subset, 2 of
            fine-tuning
"""

from pathlib import Path

FILE = Path("~/raysubset_steps.csv").expanduser()  # on the node where the step was made


def track(step):
    if step.epoch_ended and step.rank == 0:
        with FILE.open("a") as file:
            print(step.run, step.stage, step.subset, step.epoch, step.loss, step.cost.num_backward, sep=",", file=file)
