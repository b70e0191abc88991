"""What Ray costs: the wall time of `raysubset run` on digits, less that of the same training in one bare process.

    python jobs/bench_overhead.py [--repeats 3]

Both are whole processes, timed from outside: imports, reading the data, training and the report included. The run is
the main job with two subsets: a trunk, two subset actors, the mean, and fine-tuning by a real Ray Train group of two
workers. The bare process does the same steps one after the other on one thread. Repetitions alternate; the machine may
be shared, so look at the spread of the differences.

Hardware: 2 cores of a shared virtual machine, load 1 to 2; Ray 2.60, torch 2.15, Python 3.11. Wall time: 1.5 min.
Result:   19.2 s (18.6 to 20.5, n = 3; the goal is 25): 2 s for imports, 7 s to start Ray and share the data, 1 s for
          the first actor, 10 s for Ray Train's processes to come up, 1.5 s for them to end.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time

OVERRIDES = {"subsets.num": 2, "fine_tuning.num_workers": 2, "cluster.num_cpus": 2}
GOAL_S = 25.0


def bare() -> None:
    """The same training without Ray: what minimize() and the aggregation do for a run, in their order."""
    import torch

    from raysubset import Config
    from raysubset.aggregation import RunningMean
    from raysubset.data import load_full_set
    from raysubset.models import build_model
    from raysubset.subsets import split_into_subsets
    from raysubset.training import evaluate, minimize, recompute_batch_norm, use_device

    use_device(num_gpus=0, num_threads=1)
    config = Config().with_overrides(OVERRIDES)
    data = load_full_set(*config.learned)
    num_classes = len(data.task.class_names)
    model = build_model(config.model, data.spec, seed=0)
    model = model.to(memory_format=torch.channels_last)
    minimize(model, data.examples("train", augment=True), config.stage("trunk"), seed=0)
    trunk = {key: value.clone() for key, value in model.state_dict().items()}
    mean = RunningMean()
    for subset in split_into_subsets(data.strata, config.subsets, 0, num_classes=num_classes):
        model.load_state_dict(trunk)
        minimize(model, data.examples("train", subset.indices, augment=True), config.stage("subsets"), seed=subset.id)
        mean.add(model.state_dict())
    model.load_state_dict(mean.weights())
    recompute_batch_norm(model, data.examples("train"), config.minimize)
    minimize(model, data.examples("train", augment=True), config.stage("fine_tuning"), seed=0)
    print(evaluate(model, data.examples("test"), config.minimize).accuracy)


def with_ray(storage_path: str) -> None:
    """The run, telling on stderr when each of its events came."""
    started = time.perf_counter()
    from raysubset import Config, run
    from raysubset.events import Event, Note, Progress

    moments = [("imports", time.perf_counter() - started)]

    def listen(event: Event) -> None:
        if not isinstance(event, Note | Progress):
            moments.append((event.text, time.perf_counter() - started))

    run(Config(storage_path=storage_path).with_overrides(OVERRIDES), on_event=listen)
    moments.append(("report", time.perf_counter() - started))
    json.dump(moments, sys.stderr)


def timed(*arguments: str) -> tuple[float, str]:
    started = time.perf_counter()
    done = subprocess.run([sys.executable, __file__, *arguments], check=True, capture_output=True, text=True)
    return time.perf_counter() - started, done.stderr


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--child", choices=["bare", "ray"], help=argparse.SUPPRESS)
    parser.add_argument("--storage-path", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child == "bare":
        return bare()
    if arguments.child == "ray":
        return with_ray(arguments.storage_path)
    differences = []
    moments: list[tuple[str, float]] = []
    for _ in range(arguments.repeats):
        bare_s, _ = timed("--child", "bare")
        with tempfile.TemporaryDirectory() as folder:
            ray_s, told = timed("--child", "ray", "--storage-path", folder)
        moments = json.loads(told[told.index("[[") :].splitlines()[0])
        differences.append(ray_s - bare_s)
        print(f"raysubset run {ray_s:5.1f} s   bare {bare_s:5.1f} s   difference {differences[-1]:5.1f} s", flush=True)
    print("\nWhere the last run's time went (seconds since its process began to import, and event):")
    for text, at_s in moments:
        print(f"  {at_s:5.1f}  {text}")
    median = statistics.median(differences)
    print(f"\nOverhead: median {median:.1f} s of {len(differences)} (goal: at most {GOAL_S:g} s)")


if __name__ == "__main__":
    main()
