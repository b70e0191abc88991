"""Streaming the full set to Ray Train's workers by Ray Data: tasks on free CPUs decode the next examples.

examples = full_set.training_batches(device=device, augment=True)
examples = read_by_ray_data(examples, full_set_ref, shard=shard, config=config)

Each worker runs its own pipeline over its stretch of an epoch. Ray Train's own shards (get_dataset_shard) do not serve
here: they deliver blocks on request and do not know the epoch, so that an epoch could neither have an order of its own
seed nor be resumed in the middle. Here an epoch has the same bits whether the worker itself reads it or many tasks do.
And read_parquet yields no row numbers, so that validation rows carved from the same files would be trained on.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import numpy as np
import ray

from raysubset.cluster import OUTSIDE_GROUPS, get_shared, num_slots, object_store_bytes, own_address
from raysubset.config import Config
from raysubset.costs import count_bytes
from raysubset.data import FullSet, StreamedExamples, StreamedSplit, cut_ranges, read_here
from raysubset.errors import counted
from raysubset.training import Shard
from raysubset.work import Minimizer

READER_CPUS = 1  # CPUs of a reading task
PIECE_BYTES = 2**24  # bytes of tensors that one task reads, unless a row group is larger
STORE_BYTES = 2**28  # bytes of the object store that a worker's pipeline may fill


def most_workers(num_cpus: int) -> int:
    """Return the most workers that leave a reading task its CPU, on this cluster with all nodes that it may start."""
    return max(0, (num_slots({"CPU": READER_CPUS}, startable=True) - 1) * READER_CPUS // num_cpus)


def refuse_without_readers(config: Config, stage: str, *, num_workers: int) -> None:
    """Stop before workers take all CPUs, so that none is left for the tasks that read for them.

    Raises:
        ValueError: with the CPUs needed and there, and the way out.
    """
    num_cpus = config.actors.num_cpus
    if num_workers <= most_workers(num_cpus):
        return
    total = num_slots({"CPU": READER_CPUS}, startable=True) * READER_CPUS
    needed = num_workers * num_cpus + READER_CPUS
    raise ValueError(
        f"{counted(num_workers, f'{stage} worker')} of {num_cpus} CPU, and a task that reads the streamed set for "
        f"them, need {needed} CPUs; this cluster can have {total}: use fewer workers (--fine-tuning.num-workers, "
        f"--trunk.num-workers), or on a machine of your own --cluster.num-cpus={needed}, which share its cores"
    )


def minimizer_on(full_set_ref: Sequence[ray.ObjectRef], *, num_gpus: float, shard: Shard) -> Minimizer:
    """Return this process's minimizer on the full set that was put, which it fetches once and counts as moved."""

    @cache
    def load_full_set() -> FullSet:
        full_set: FullSet = get_shared(full_set_ref)
        count_bytes(full_set.num_bytes)
        return full_set

    stream = partial(read_by_ray_data, full_set_ref=full_set_ref, shard=shard)
    return Minimizer(load_full_set, num_gpus=num_gpus, node=own_address(), stream=stream, shard=shard)


def read_by_ray_data(
    examples: StreamedExamples, full_set_ref: Sequence[ray.ObjectRef], *, shard: Shard, config: Config
) -> StreamedExamples:
    """Return the same examples, read by tasks on the cluster. Ray runs tasks that die again.

    The workers' pipelines share the CPUs that the workers leave free. Each pipeline has at least one task at a time.

    Raises:
        TimeoutError: if no task starts within cluster.wait_timeout_s, as other work holds all CPUs.
    """
    answer_ref = _answer.remote(full_set_ref)
    if not ray.wait([answer_ref], timeout=config.cluster.wait_timeout_s)[0]:
        ray.cancel(answer_ref)
        raise TimeoutError(
            f"no CPU came free in {config.cluster.wait_timeout_s:g} s for the tasks that read the streamed set"
        )
    ray.get(answer_ref)
    free = num_slots({"CPU": READER_CPUS}, startable=False) - shard.num * config.actors.num_cpus
    num_bytes = min(STORE_BYTES, int(object_store_bytes() / 2 / shard.num))
    return replace(examples, read=_RayDataReader(full_set_ref, max(1, free // shard.num), num_bytes))


@ray.remote(num_cpus=READER_CPUS, scheduling_strategy=OUTSIDE_GROUPS)
def _answer(full_set_ref: Sequence[ray.ObjectRef]) -> None:
    """Start, and get the process ready for the reading tasks."""
    ray.get(full_set_ref[0])


@dataclass(frozen=True)
class _RayDataReader:
    """A data.Reader that reads an epoch's pieces by tasks, num_tasks at a time, and delivers them in order."""

    full_set_ref: Sequence[ray.ObjectRef]
    num_tasks: int  # at a time
    num_bytes: int  # that it may fill of the object store

    def __call__(self, split: StreamedSplit, windows: Sequence[np.ndarray]) -> Iterator[Mapping[str, np.ndarray]]:
        import ray.data  # takes a second, and pandas: only workers that stream pay for it

        num_examples = PIECE_BYTES // split.num_bytes_per_example
        pieces = [piece for ranges in windows for piece in cut_ranges(ranges, max(1, num_examples))]
        references = {"full_set_ref": self.full_set_ref, "pieces_ref": [ray.put(pieces)]}
        read_piece: Any = _read_piece  # Ray's stubs want a function of one argument
        dataset = ray.data.range(len(pieces), override_num_blocks=len(pieces)).map_batches(
            read_piece, batch_size=1, fn_kwargs=references, num_cpus=READER_CPUS
        )
        options = dataset.context.execution_options
        options.preserve_order = True
        options.resource_limits = ray.data.ExecutionResources.for_limits(
            cpu=self.num_tasks * READER_CPUS, object_store_memory=self.num_bytes
        )
        dataset.context.enable_progress_bars = False
        dataset.context.print_on_execution_start = False
        logging.getLogger("ray.data").setLevel(logging.WARNING)  # it reports the begin and end of each execution
        blocks: Any = dataset.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=1)
        yield from blocks


def _read_piece(
    batch: dict[str, np.ndarray], full_set_ref: Sequence[ray.ObjectRef], pieces_ref: Sequence[ray.ObjectRef]
) -> Iterator[Mapping[str, Any]]:
    """Yield the tensors of the piece whose number is the batch."""
    (number,) = batch["id"]
    yield from read_here(ray.get(full_set_ref[0]).train, [ray.get(pieces_ref[0])[number]])
