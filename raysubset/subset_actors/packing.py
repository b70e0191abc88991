"""Decides whether subsets.per_actor is used: once, by a trial on the first actor's device."""

import math
from collections.abc import Sequence
from typing import Any

from raysubset.models import build_model
from raysubset.subset_actors.packs import Pack, in_packs
from raysubset.subset_actors.pool import ActorPool
from raysubset.training import PAYS, why_not_packed
from raysubset.work import Piece, Run, TrialPiece


def packing_decision(run: Run, pool: ActorPool, pieces: Sequence[Piece]) -> dict[str, Any]:
    """Return the record of a decision for the run directory, which a run resumed elsewhere keeps.

    Written there by hand before a run's first round, {"packing": {"per_actor": K, "taken": true}} in decisions.json
    forces packing, and false forbids it.

    Returns:
        per_actor, taken, reason (of a refusal), ratio (a packed step's time as a share of as many single steps'),
        single_s and packed_s (seconds a step), num_members and device (of the trial).

    Raises:
        SubsetFailed, ValueError, TimeoutError: as ActorPool.run().
    """
    per_actor, recipe = run.config.subsets.per_actor, run.config.stage("subsets")
    model = build_model(run.config.model, run.full_set.spec)
    first_pieces = pieces[: len(in_packs(pieces, per_actor)[0].pieces)]
    reason = "there is one subset" if len(first_pieces) == 1 else why_not_packed(model, recipe)
    if reason is not None:
        return {"per_actor": per_actor, "taken": False, "reason": reason}
    trial_pack = Pack((TrialPiece(tuple(first_pieces)),))
    ((_, trial),) = pool.run([trial_pack], keep=math.inf)  # its actor stays for the work
    if (refusal := trial.pop("refused", None)) is not None:
        return {"per_actor": per_actor, "taken": False, "reason": refusal, **trial}
    fields = {key: trial[key] for key in ("ratio", "single_s", "packed_s", "num_members", "device")}
    return {"per_actor": per_actor, "taken": trial["pays"], **fields}


def packing_note(decision: dict[str, Any]) -> str:
    """Say in a line what was decided and why."""
    choice = f"{decision['per_actor']} subsets at once on an actor" if decision["taken"] else "subsets one by one"
    if "reason" in decision:
        return f"packing: {choice}, since {decision['reason']}"
    if "ratio" not in decision:
        return f"packing: {choice}, as decisions.json says"
    return (
        f"packing: {choice}; a step of {decision['num_members']} takes {decision['ratio']:.2f} of the time of as many "
        f"single steps on {decision['device']}, and below {PAYS:g} it is taken"
    )
