"""Stage 1 on the cluster: actors that each minimize on a subset, and the pool that gives them work.

    with ActorPool(run, num_gpus=1) as pool:
        for piece, record in pool.run([Pack((piece,)) for piece in pieces], start): ...

An actor does one piece of work after another; the driver owns order, retries and their limit. An actor's output is a
pure function of the piece, so it does not matter which actor does it, when, or at which attempt.
"""

from raysubset.subset_actors.crew import SubsetFailed, memory_warning
from raysubset.subset_actors.minima import minimum_done
from raysubset.subset_actors.packing import packing_decision, packing_note
from raysubset.subset_actors.packs import Backlog, Pack, in_packs, name_of
from raysubset.subset_actors.pool import ActorPool, Outcome
