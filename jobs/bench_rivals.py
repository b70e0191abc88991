"""Rounds on MNIST by raysubset, by a hand-written Ray script and by Flower: CPU seconds of all processes, whole.

    python jobs/bench_rivals.py [--repeats 3] [--only ray rounds] [--flower ~/flower/bin/python]

Four subsets of 5,000 examples, four rounds of two epochs each, a mean after each round; then members, mean and test
data are measured. Each way is a whole process with all that it starts, with two CPUs for Ray and one thread an actor:

ray     a plain Ray script: two actors take the subsets in turn, and the driver averages; no resume, record or report
flower  Flower's simulation engine with FedAvg, four clients on two CPUs (skipped without --flower)
rounds  `raysubset run`, whole: checkpoints, ledger, retries, report and page

All train the same network by the same Nesterov steps and measure as many examples (members on their own subset and on
validation data, the mean on validation data and on 10,000 training examples, the test data; 10,000 examples for batch
norm's statistics). Repeats alternate. CPU seconds are compared, as wall times of a shared machine say little.

--flower is the Python of another virtual environment, as Flower asks for versions of Ray of its own: python -m venv
~/flower; ~/flower/bin/pip install 'flwr[simulation]' torch torchvision psutil.

Hardware: 2 cores of a shared virtual machine; torch 2.14, Python 3.11, Ray 2.60 (Flower 1.42: Ray 2.55).
Result:   n = 4 repeats, the first two at loads of 5 to 13, the others alone: CPU seconds, and rounds in ratio to them
          ray     44.9 52.5 56.6 58.5   1.22 1.03 0.97 0.90, median 1.00 (goal 1.10)
          flower  57.7 62.2 70.2 73.9   0.95 0.87 0.78 0.71, median 0.83 (goal 0.85)
          rounds  54.9 54.3 55.1 52.6   of which actors have 36 to 38
          Wall seconds, alone: 39 and 40, 47 and 47, 35 and 34 (raysubset starts Ray while it imports). Validation
          accuracy is 91.7 to 92.3 % by ray and flower, 91.3 % by rounds, whose subsets are redrawn (n = 1).
"""

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
from typing import Any

# pyright: reportMissingImports=false, reportCallIssue=false
# (Flower lies in an environment of its own; the types of ActorPool.map and Module.to are narrower than what they take)
from bench_peers import BATCH_SIZE, DATA_ROOT, EVALUATION_BATCH, PEAK, mnist, network, process_tree

WAYS = ("ray", "flower", "rounds")
NUM_SUBSETS, SIZE, NUM_ROUNDS, EPOCHS, NUM_MEASURED = 4, 5_000, 4, 2, 10_000
NUM_STEPS = NUM_ROUNDS * EPOCHS * math.ceil(SIZE / BATCH_SIZE)


def minimized(model: Any, images: Any, labels: Any, round: int) -> None:
    """Train on a subset for one round's epochs, at the round's part of the cosine."""
    import torch
    import torch.nn.functional as F

    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 5e-4},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(groups, lr=PEAK, momentum=0.9, nesterov=True, fused=True)
    step = round * NUM_STEPS // NUM_ROUNDS
    model.train()
    for _ in range(EPOCHS):
        for indices in torch.randperm(len(images)).split(BATCH_SIZE):
            for group in optimizer.param_groups:
                group["lr"] = PEAK * (1 + math.cos(math.pi * step / NUM_STEPS)) / 2
            loss = F.cross_entropy(model(images[indices]), labels[indices])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1


def accuracy(model: Any, images: Any, labels: Any) -> float:
    import torch

    model.eval()
    with torch.inference_mode():
        batches = zip(images.split(EVALUATION_BATCH), labels.split(EVALUATION_BATCH), strict=True)
        return sum((model(own).argmax(1) == right).sum().item() for own, right in batches) / len(images)


def mean_of(states: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: sum(state[name] for state in states) / len(states) for name in states[0]}


def placed_network() -> Any:
    import torch

    torch.set_num_threads(1)
    return network().to(memory_format=torch.channels_last)


def measured_mean(weights: dict[str, Any], splits: dict[str, tuple[Any, Any]]) -> dict[str, float]:
    """Recompute batch norm's statistics of the mean, and measure it on validation, training and test data."""
    import torch

    model = placed_network()
    model.load_state_dict(weights)
    images, labels = (tensor[:NUM_MEASURED] for tensor in splits["train"])
    model.train()
    with torch.inference_mode():
        for batch in images.split(EVALUATION_BATCH):
            model(batch)
    parts = {"validation": splits["validation"], "train": (images, labels), "test": splits["test"]}
    return {name: accuracy(model, *part) for name, part in parts.items()}


def by_ray(root: str) -> dict[str, float]:
    """The script that a user of Ray writes: actors hold the data, the driver averages."""
    os.environ.setdefault("RAY_raylet_start_wait_time_s", "300")
    import ray
    import torch
    from ray.util import ActorPool

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)

    @ray.remote(num_cpus=1)
    class Member:
        def __init__(self, splits: dict[str, tuple[Any, Any]]) -> None:
            self.splits, self.model = splits, placed_network()

        def minimize(self, weights: dict[str, Any], subset: int, round: int) -> tuple[dict[str, Any], list[float]]:
            self.model.load_state_dict(weights)
            part = slice(subset * SIZE, (subset + 1) * SIZE)
            own = tuple(tensor[part] for tensor in self.splits["train"])
            minimized(self.model, *own, round)
            found = []
            if round == NUM_ROUNDS - 1:
                found = [accuracy(self.model, *data) for data in (own, self.splits["validation"])]
            return self.model.state_dict(), found

    torch.manual_seed(0)
    torch.set_num_threads(1)
    splits = mnist(root)
    shared, weights = ray.put(splits), placed_network().state_dict()
    pool = ActorPool([Member.remote(shared) for _ in range(2)])
    for round in range(NUM_ROUNDS):
        start = ray.put(weights)
        work = [(start, subset, round) for subset in range(NUM_SUBSETS)]
        minima = list(pool.map(lambda actor, arguments: actor.minimize.remote(*arguments), work))
        weights = mean_of([state for state, _ in minima])
    found = measured_mean(weights, splits)
    with tempfile.TemporaryDirectory() as storage:
        torch.save(weights, f"{storage}/model.pt")
    ray.shutdown()
    return found


def by_flower(root: str) -> dict[str, float]:
    """FedAvg by Flower's simulation engine, as its quickstart with PyTorch has it."""
    import torch
    from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    client, server, found = ClientApp(), ServerApp(), dict[str, float]()

    @client.train()
    def train(message: Message, context: Context) -> Message:
        splits, subset, model = mnist(root), int(context.node_config["partition-id"]), placed_network()
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        part, round = slice(subset * SIZE, (subset + 1) * SIZE), int(message.content["config"]["server-round"]) - 1
        own = tuple(tensor[part] for tensor in splits["train"])
        minimized(model, *own, round)
        numbers = {"num-examples": SIZE}
        if round == NUM_ROUNDS - 1:
            numbers |= {"own": accuracy(model, *own), "validation": accuracy(model, *splits["validation"])}
        content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": MetricRecord(numbers)})
        return Message(content=content, reply_to=message)

    @server.main()
    def serve(grid: Grid, context: Context) -> None:
        torch.manual_seed(0)
        arrays = ArrayRecord(placed_network().state_dict())
        strategy = FedAvg(fraction_train=1.0, fraction_evaluate=0.0, min_available_nodes=NUM_SUBSETS)
        end = strategy.start(grid=grid, initial_arrays=arrays, num_rounds=NUM_ROUNDS).arrays
        found.update(measured_mean(end.to_torch_state_dict(), mnist(root)))

    resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": {"num_cpus": 2}}
    run_simulation(server, client, num_supernodes=NUM_SUBSETS, backend_config=resources)
    return found


def command_of(way: str, root: str, storage: str, flower: str | None) -> list[str]:
    if way != "rounds":
        return [flower if way == "flower" and flower else sys.executable, __file__, "--child", way, "--root", root]
    settings = {
        "data.name": "mnist",
        "data.root": root,
        "model.name": "cnn",
        "model.width": 8,
        "model.depth": 2,
        "subsets.num": NUM_SUBSETS,
        "subsets.size": SIZE,
        "rounds.num": NUM_ROUNDS,
        "rounds.evaluate-every": NUM_ROUNDS,
        "rounds.optimizer-state": "reset",
        "rounds.outer-momentum": 0,
        "trunk.epochs": 0,
        "minimize.epochs": EPOCHS,
        "minimize.learning-rate": PEAK,
        "fine-tuning.epochs": 0,
        "cluster.num-cpus": 2,
        "storage-path": storage,
    }
    flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    return [sys.executable, "-m", "raysubset", "run", *flags]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--flower", help="the Python of a virtual environment with Flower")
    parser.add_argument("--root", default=str(DATA_ROOT))
    parser.add_argument("--child", choices=WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return print(json.dumps({"ray": by_ray, "flower": by_flower}[arguments.child](arguments.root)))
    ways = [way for way in arguments.only if way != "flower" or arguments.flower]
    if "flower" in arguments.only and not arguments.flower:
        print("flower is left out: give --flower the Python of an environment that has it")
    cpu_s: dict[str, list[float]] = {way: [] for way in ways}
    for repeat in range(arguments.repeats):
        for way in ways if repeat % 2 == 0 else ways[::-1]:
            with tempfile.TemporaryDirectory() as storage:
                command = command_of(way, arguments.root, storage, arguments.flower)
                used, wall_s, text = process_tree(command)
            cpu_s[way].append(sum(used.values()))
            quality = next((line for line in reversed(text.splitlines()) if "est" in line), "")
            print(f"{way:6} {cpu_s[way][-1]:6.1f} CPU s {wall_s:6.1f} s   {quality.strip()[:160]}", flush=True)
            most = sorted(used.items(), key=lambda item: -item[1])[:6]
            print(*(f"         {seconds:6.1f} {name}" for name, seconds in most), sep="\n", flush=True)
    print(f"\nCPU seconds, median of {arguments.repeats}, and the median of each repeat's ratio of rounds to them:")
    for way, seconds in cpu_s.items():
        ratios = [ours / theirs for ours, theirs in zip(cpu_s.get("rounds", seconds), seconds, strict=True)]
        print(f"  {way:6} {statistics.median(seconds):6.1f}   {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
