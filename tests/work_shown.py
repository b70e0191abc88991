"""Events of work that goes on. They import no torch: a process that shows them to a terminal would wait for it."""

from raysubset.events import Attempt, MinimumDone, Planned, Progress, Step, stage_event


def an_attempt(subset: int | None, stage: str = "subsets", round: int = 0, directory: str = "run") -> Attempt:
    label = stage if subset is None else f"subset {subset}"
    return Attempt(stage, round, subset, 0, "node", "10.0.0.7", 1 + (subset or 0), directory, label)


def progress(subset: int | None, epoch: float, stage: str = "subsets", *, per_s: float = 100.0) -> Progress:
    name = stage if subset is None else f"subset {subset}"
    return Progress(f"{name}: epoch {epoch:.1f}", an_attempt(subset, stage), epoch, 8.0, None, per_s, running_loss=0.25)


def done(subset: int) -> MinimumDone:
    return MinimumDone(f"subset {subset}: loss 0.1", "subsets", {"subset_id": subset, "round": 0})


PLAN = Planned(
    "planned",
    (Step("trunk", 0, 1.0, 1, 1, 1.0), Step("subsets", 0, 8.0, 4, 2, 8.0), Step("fine_tuning", 0, 2.0, 1, 2, 2.0)),
    num_examples=1000,
)
AT_WORK = [PLAN, stage_event("subsets", "4 × 250 examples, 8 epochs each"), *(progress(n, 2.0 + n) for n in range(4))]
