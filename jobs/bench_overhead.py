"""What Ray costs: the CPU seconds of the default run's whole process tree, less those of the same training by itself.

    python jobs/bench_overhead.py [--repeats 3]

Both are whole processes, measured from outside as bench_peers.py does: imports, reading the data, training and the
report included. The run is the default one on digits: a trunk, subset actors, the mean, and fine-tuning by as many
workers as `auto` takes. The bare process does the same steps one after the other on one thread. Repetitions alternate.

Hardware: 2 cores of a shared virtual machine; Ray 2.60, torch 2.14, Python 3.11.
Result:   --repeats 1, load 14 to 20, when Ray's wall times say nothing: run 17.6 CPU s, 11.5 of them beyond bare (6.2).
          `raysubset run` in a terminal, on idle cores, by a cgroup's account of all processes: 13.4 s of wall and 16.1
          CPU s (goals 14 and 18), first output after 0.22 s, longest silence 1.1 s, at the end. The commit before Ray's
          processes came up beside the imports (7da6776) took 18.0 s and 19.8 CPU s (n = 2 alternating pairs).
"""

import argparse
import json
import statistics
import sys
import tempfile
import time

from bench_peers import process_tree

OVERRIDES = {"cluster.num_cpus": 2}
GOAL_S = 18.0  # of the run


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
    """The run and its page; then when each of its events came, in seconds since imports began."""
    started = time.perf_counter()
    from raysubset import Config, run
    from raysubset.events import Event, Note, Progress
    from raysubset.report import write_files

    moments = [("imports", time.perf_counter() - started)]

    def listen(event: Event) -> None:
        if not isinstance(event, Note | Progress):
            moments.append((event.text, time.perf_counter() - started))

    report = run(Config(storage_path=storage_path).with_overrides(OVERRIDES), on_event=listen)
    moments.append(("report", time.perf_counter() - started))
    write_files(report.uri)
    moments.append(("page", time.perf_counter() - started))
    print(json.dumps(moments))


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
    found, moments = [], list[tuple[str, float]]()
    this = [sys.executable, __file__, "--child"]
    for _ in range(arguments.repeats):
        bare_cpu_s, bare_wall_s, _ = process_tree([*this, "bare"])
        with tempfile.TemporaryDirectory() as folder:
            ray_cpu_s, ray_wall_s, text = process_tree([*this, "ray", "--storage-path", folder])
        ray_s, bare_s = sum(ray_cpu_s.values()), sum(bare_cpu_s.values())
        moments = json.loads(next(line for line in text.splitlines() if line.startswith("[[")))
        found.append((ray_s, ray_s - bare_s))
        print(
            f"run {ray_s:5.1f} CPU s ({ray_wall_s:.1f} s)   bare {bare_s:5.1f} CPU s ({bare_wall_s:.1f} s)", flush=True
        )
    print("\nWhen the last run's events came (wall seconds since its imports began, and event):")
    for text, at_s in moments:
        print(f"  {at_s:5.1f}  {text}")
    run_s, more_s = (statistics.median(values) for values in zip(*found, strict=True))
    print(
        f"\nRun: median {run_s:.1f} CPU s of {len(found)} (goal: at most {GOAL_S:g}), {more_s:.1f} of them beyond bare"
    )


if __name__ == "__main__":
    main()
