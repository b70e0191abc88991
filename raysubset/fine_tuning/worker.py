"""A Ray Train worker: a Minimizer that does its share of each batch. Rank 0 writes ledger, history and result."""

from typing import Any

import ray.train
import torch

from raysubset.cluster import get_shared, own_address, published
from raysubset.costs import count_bytes
from raysubset.errors import CorruptFile, one_line
from raysubset.fine_tuning.job import Job, pulse_key
from raysubset.fine_tuning.streaming import minimizer_on
from raysubset.run_directory import left_out_path
from raysubset.run_directory.ledger import Ledger
from raysubset.training import DivergedError, LeftOutError, Shard
from raysubset.work import Minimizer


def train_loop(settings: dict[str, Any]) -> str | None:
    """Run one worker. All do the job's piece as an actor would, from the newest checkpoint in the run directory.

    They report nothing to Ray Train: its own checkpoints would be a second kind, in which damage is found elsewhere.
    If the driver asks the first worker to stop, it writes a checkpoint and returns, and the others wait to be ended.

    Returns:
        Why the loss diverged, if it did. It is not raised, because Ray Train would try again and diverge in the same
        way.

    Raises:
        MistakeError: for an error of the worker's own work, which would recur; errors of connections, storage and
            devices pass through.
        LeftOutError: if a step left out parameters; the run records it, and the next attempt allows it.
        CorruptFile: if a teacher's weights are damaged; the driver has them made again.
    """
    context, job = ray.train.get_context(), settings["job"]
    shard = Shard(context.get_world_rank(), context.get_world_size())
    job.workplace.enter()
    minimizer = minimizer_on(job.full_set_ref, num_gpus=job.num_gpus, shard=shard)
    try:
        with published(pulse_key(settings["pulses"], shard.rank), minimizer.reports, minimizer.request_stop):
            _train(job, minimizer, shard.rank)
    except DivergedError as error:  # all workers raise it at the same step, because they share losses and weights
        return one_line(error)
    except LeftOutError:
        job.piece.directory.write_json(left_out_path(job.piece.stage), {"leaves_out": True})
        raise
    except Exception as error:
        if isinstance(error, CorruptFile) or _may_pass(error):
            raise
        place_text = f"worker {shard.rank} of {shard.num} on node {own_address()}"
        raise MistakeError(f"{place_text}: {one_line(error)}", isinstance(error, ValueError)) from error
    return None


class MistakeError(Exception):
    """An error of a worker's own work: its place and cause in a line, and whether it was a ValueError."""

    def __init__(self, text: str, is_value_error: bool) -> None:
        super().__init__(text, is_value_error)
        self.text, self.is_value_error = text, is_value_error


def _may_pass(error: Exception) -> bool:
    """Return True if the error came from storage, a device, Ray, or another worker that was lost, not from the work."""
    if isinstance(error, OSError | torch.AcceleratorError | torch.distributed.DistError):
        return True
    words = str(error).lower()  # gloo's and NCCL's errors are plain RuntimeErrors
    is_of_connection = isinstance(error, RuntimeError) and any(word in words for word in _WORDS_OF_CONNECTIONS)
    return is_of_connection or type(error).__module__.startswith("ray.")


_WORDS_OF_CONNECTIONS = ("gloo", "nccl", "connection", "socket", "timed out", "timeout", "peer")


def _train(job: Job, minimizer: Minimizer, rank: int) -> None:
    if job.piece.record() is not None:  # of a group that Ray Train started again, as a node died at its very end
        return
    minimizer.load_full_set()
    start = get_shared(job.start_ref)
    count_bytes(sum(tensor.nbytes for tensor in start.values()))
    attempt = 0  # which no other worker than the first uses
    if rank == 0:
        ledger = Ledger(job.piece.directory)
        ledger.close_lost()  # nothing else runs during a Ray Train stage: an open entry is of a dead group
        attempt = ledger.next_attempt(job.piece.stage, 0)
    minimizer.minimize([job.piece], start, attempts=[attempt], waited_s=0.0)
