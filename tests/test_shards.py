"""Two workers that share every batch end where one worker does: real processes, gloo, DistributedDataParallel."""

import multiprocessing
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from raysubset.config import AveragingConfig, ExtrapolationConfig, MinimizeConfig, SkippingConfig, derive_seed
from raysubset.data import even_sizes
from raysubset.training import LeftOutError, Shard, minimize
from tests.tiny import cnn, examples, same_bits, stop_at, through_a_file, weights

RECIPE = MinimizeConfig(epochs=2, batch_size=8, learning_rate=0.05, channels_last=False)
NUM = 37  # batches of 8, 8, 7, 7 and 7: the workers' shares differ in size
STOP = 7  # in the middle of the second epoch
TIMEOUT_S = 120.0


def network() -> nn.Module:
    """Without batch-norm, which would normalise each worker's part by itself."""
    return cnn("none").to(torch.float64)


class Experts(nn.Module):
    """A mixture of experts: one that every example passes, one of some examples, one of hardly any, one of none."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 3)
        self.experts = nn.ModuleList(nn.Linear(64, 64) for _ in range(3))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = images.flatten(1)
        for expert, least in zip(self.experts, (-9.0, 0.0, 9.0), strict=True):
            chosen = features.mean(1) > least
            if chosen.any():
                features = torch.where(chosen[:, None], features + 0.1 * expert(features), features)
        return self.head(features)


def experts() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Experts().to(torch.float64)


LOCAL = replace(
    RECIPE,
    schedule="constant",
    weight_decay=0.1,
    extrapolation=ExtrapolationConfig(kind="past_local", accelerated=True),
)
SKIPPING = replace(RECIPE, epochs=4, skipping=SkippingConfig(kind="wus", threshold=0.9, window=0.4, epochs=0.6))
VARIATIONS = {
    "local": LOCAL,
    "global": replace(LOCAL, extrapolation=ExtrapolationConfig(kind="past_global")),
    "noise": replace(LOCAL, extrapolation=ExtrapolationConfig(kind="isotropic")),
    "skipping": SKIPPING,
    "together": replace(
        LOCAL, skipping=SKIPPING.skipping, averaging=AveragingConfig(kind="pswa", period=0.4), epoch_fraction=0.8
    ),
}


IN_PARTS = replace(RECIPE, accumulation=3, clip_norm=0.5)
MUON = replace(RECIPE, optimizer="muon")
OBJECTIVE = replace(RECIPE, objective="tests.own_objectives:by_parts")
ROUNDED = {"parallel": RECIPE, "averaged": VARIATIONS["global"], "in parts": replace(RECIPE, accumulation=3)}
SCALED = {  # the first is exchanged while it goes backward; the second overflows at first, and is averaged afterwards
    "parallel": replace(RECIPE, precision="float16"),
    "averaged": replace(RECIPE, precision="float16", objective="tests.own_objectives:loud", clip_norm=1.0),
}
LEAVING_OUT = {"parallel": replace(RECIPE, weight_decay=0.1), "averaged": VARIATIONS["global"]}


def ends_at(model: nn.Module, shard: Shard, recipe: MinimizeConfig = RECIPE, **options) -> dict:
    result = minimize(model, examples(NUM, augmentation="crop_flip"), recipe, seed=4, shard=shard, **options)
    return {
        "weights": weights(model),
        "losses": [record.loss for record in result.history],
        "num_forward": result.cost.num_forward,
        "num_backward": result.cost.num_backward,
        "num_steps": result.cost.num_steps,
    }


def means_of_one_step(shard: Shard) -> dict[str, list[torch.Tensor]]:
    """The workers' mean gradient of one backward pass: exchanged while it goes on, and after it."""
    images = torch.randn(6, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(shard.rank))
    found, device = {}, torch.device("cpu")
    for as_bfloat16 in (False, True):
        model = network()
        parallel = shard.data_parallel(model, device, as_bfloat16=as_bfloat16)  # which averages as long as it lives
        parallel(images).square().sum().backward()
        found[f"parallel {as_bfloat16}"] = [p.grad for p in model.parameters()]
        alone = network()
        alone(images).square().sum().backward()
        found["own"] = [p.grad.clone() for p in alone.parameters() if p.grad is not None]
        shard.average_gradients(alone.parameters(), as_bfloat16=as_bfloat16)
        found[f"averaged {as_bfloat16}"] = [p.grad for p in alone.parameters()]
    return found


def work(rank: int, folder: Path) -> None:
    warnings.simplefilter("error", FutureWarning)  # of what torch takes out one day
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    shard, states = Shard(rank, 2), []
    stop = stop_at(STOP, states)
    whole = ends_at(network(), shard)
    ends_at(network(), shard, on_step=stop)
    everyones = [states[0]]
    torch.distributed.broadcast_object_list(everyones, src=0)  # a job's checkpoint is the first worker's
    resumed = ends_at(network(), shard, state=everyones[0])
    found: dict[str, dict] = {"whole": whole, "resumed": resumed}
    for name, recipe in VARIATIONS.items():
        found[name] = ends_at(network(), shard, recipe)
        states.clear()
        ends_at(network(), shard, recipe, on_step=stop)
        everyones = [states[0]]
        torch.distributed.broadcast_object_list(everyones, src=0)
        state = everyones[0] | {"own": states[0]["own"]}  # each worker's own besides
        found[f"{name} resumed"] = ends_at(network(), shard, recipe, state=state)
        found[f"{name} state"] = everyones[0]
    for name, recipe in LEAVING_OUT.items():
        found[f"experts {name}"] = ends_at(experts(), replace(shard, leaves_out=True), recipe)
    found["muon"] = ends_at(network(), shard, MUON)
    found["objective"] = ends_at(network(), shard, OBJECTIVE)
    found["in parts"] = ends_at(network(), shard, IN_PARTS)
    found["rounded"] = {
        name: ends_at(network(), shard, replace(recipe, gradients="bfloat16")) for name, recipe in ROUNDED.items()
    }
    found["scaled"] = {name: ends_at(network().float(), shard, recipe) for name, recipe in SCALED.items()}
    found["means"] = means_of_one_step(shard)
    torch.save(found, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def in_two_processes(function: Callable[[int, Path], None], folder: Path) -> None:
    """Call the function with 0 and 1, each in a process of its own."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(["tests.warm"])
    processes = torch.multiprocessing.start_processes(
        function, (folder,), nprocs=2, join=False, start_method="forkserver"
    )
    assert processes is not None
    deadline = time.monotonic() + TIMEOUT_S
    try:
        while not processes.join(timeout=1.0):
            assert time.monotonic() < deadline, "the workers hang"
    finally:
        for process in processes.processes:
            process.kill()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    in_two_processes(work, folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", LEAVING_OUT)
def test_parameters_that_some_workers_or_all_leave_out_of_a_step_move_as_in_one_process(ranks, name):
    one = ends_at(experts(), Shard(), LEAVING_OUT[name])["weights"]
    for rank in ranks:
        for key, value in rank[f"experts {name}"]["weights"].items():
            torch.testing.assert_close(value, one[key])
    untouched = experts().state_dict()
    moved = {key for key, value in one.items() if not torch.equal(value, untouched[key])}
    assert moved == {key for key in one if not key.startswith("experts.2.")}


def test_a_parameter_left_out_unannounced_is_told_before_others_wait_for_it():
    model = experts()
    model(torch.zeros(2, 1, 8, 8, dtype=torch.float64)).sum().backward()
    Shard().check_gradients(model.parameters())
    Shard(0, 2, leaves_out=True).check_gradients(model.parameters())
    with pytest.raises(LeftOutError):
        Shard(0, 2).check_gradients(model.parameters())


def test_two_shards_of_every_batch_equal_one(ranks):
    one = ends_at(network(), Shard())
    for rank in ranks:
        for name, value in one["weights"].items():
            torch.testing.assert_close(rank["whole"]["weights"][name], value, rtol=0, atol=1e-12)
        assert rank["whole"]["losses"] == pytest.approx(one["losses"], rel=1e-12)
        assert (rank["whole"]["num_forward"], rank["whole"]["num_steps"]) == (2 * NUM, 10)
    assert (one["num_forward"], one["num_steps"]) == (2 * NUM, 10)


def test_shards_that_pass_their_shares_in_parts_clip_the_gradient_of_the_whole_batch(ranks):
    one, clipped = (ends_at(network(), Shard(), recipe) for recipe in (IN_PARTS, replace(IN_PARTS, accumulation=1)))
    assert not torch.allclose(one["weights"]["head.weight"], ends_at(network(), Shard())["weights"]["head.weight"])
    for found in (*(rank["in parts"] for rank in ranks), clipped):
        for name, value in one["weights"].items():
            torch.testing.assert_close(found["weights"][name], value, rtol=0, atol=1e-12)
        assert found["losses"] == pytest.approx(one["losses"], rel=1e-12)
        assert (found["num_forward"], found["num_backward"], found["num_steps"]) == (2 * NUM, 2 * NUM, 10)
    assert same_bits(ranks[0]["in parts"], ranks[1]["in parts"])


def test_two_shards_step_by_muon_as_one_does(ranks):
    one = ends_at(network(), Shard(), MUON)
    for rank in ranks:
        for name, value in one["weights"].items():
            torch.testing.assert_close(rank["muon"]["weights"][name], value, rtol=0, atol=1e-9)


def test_shards_average_the_gradients_of_an_objective_that_calls_parts_of_the_network(ranks):
    one = ends_at(network(), Shard())
    for rank in ranks:
        for name, value in one["weights"].items():
            torch.testing.assert_close(rank["objective"]["weights"][name], value, rtol=0, atol=1e-12)
    assert same_bits(ranks[0]["objective"], ranks[1]["objective"])


@pytest.mark.parametrize("how", ["parallel", "averaged"])
def test_the_mean_of_gradients_in_bfloat16_is_that_of_the_rounded_ones(ranks, how):
    for mine, other, mean in zip(
        *(rank["means"]["own"] for rank in ranks), ranks[0]["means"][f"{how} True"], strict=True
    ):
        rounded = ((mine.bfloat16() / 2) + (other.bfloat16() / 2)).double()
        torch.testing.assert_close(mean, rounded, rtol=0, atol=0)
        assert not torch.equal(mean, (mine + other) / 2)
    for exact, (mine, other) in zip(
        ranks[0]["means"][f"{how} False"], zip(*(rank["means"]["own"] for rank in ranks), strict=True), strict=True
    ):
        torch.testing.assert_close(exact, (mine + other) / 2, rtol=0, atol=1e-12)


def test_two_shards_that_exchange_bfloat16_end_near_one_and_at_the_same_bits(ranks):
    for name, recipe in ROUNDED.items():
        one, other = (rank["rounded"][name] for rank in ranks)
        assert same_bits(one, other)
        exact = ends_at(network(), Shard(), recipe)
        assert one["losses"] == pytest.approx(exact["losses"], rel=1e-2)
        assert one["losses"] != exact["losses"]
        assert same_bits(ends_at(network(), Shard(), replace(recipe, gradients="bfloat16")), exact)


def test_shards_that_scale_their_losses_leave_out_the_same_steps_as_one_another(ranks):
    """Not as one process: a worker's part of a batch weighs more in its own gradient, which overflows earlier."""
    assert same_bits(ranks[0]["scaled"], ranks[1]["scaled"])
    assert all(torch.isfinite(value).all() for value in ranks[0]["scaled"]["averaged"]["weights"].values())
    one = ends_at(network().float(), Shard(), SCALED["parallel"])
    for key, value in one["weights"].items():
        torch.testing.assert_close(ranks[0]["scaled"]["parallel"]["weights"][key], value, rtol=0, atol=2e-3)


def test_the_shards_hold_the_same_bits(ranks):
    for name in ("whole", "resumed", *VARIATIONS, *(f"{name} resumed" for name in VARIATIONS)):
        assert same_bits(ranks[0][name], ranks[1][name]), name


def test_two_shards_resumed_within_an_epoch_end_at_the_same_weights(ranks):
    assert same_bits(ranks[0]["resumed"]["weights"], ranks[0]["whole"]["weights"])
    assert ranks[0]["resumed"]["num_steps"] == 10 - STOP
    assert ranks[0]["resumed"]["losses"][0] == ranks[0]["whole"]["losses"][0]


@pytest.mark.parametrize("name", VARIATIONS)
def test_a_variation_resumed_from_each_workers_own_state_ends_at_the_same_bits(ranks, name):
    for rank in ranks:
        assert same_bits(rank[f"{name} resumed"]["weights"], rank[name]["weights"])
        assert rank[f"{name} resumed"]["losses"][2:] == rank[name]["losses"][2:]  # the second was interrupted


def two_workers_by_hand(recipe: MinimizeConfig) -> dict[str, torch.Tensor]:
    """Extrapolation along each worker's own last gradient, accelerated, written out with both workers in turn."""
    model = network()
    weights = [p.detach().clone() for p in model.parameters()]
    velocity = [torch.zeros_like(w) for w in weights]
    last = [[torch.zeros_like(w) for w in weights] for _ in range(2)]
    data, sizes = examples(NUM, augmentation="crop_flip"), even_sizes(NUM, 5)
    rate, share, momentum = recipe.peak_learning_rate(), recipe.extrapolation.rate, recipe.momentum
    for epoch in range(2):
        options = {
            "order_seed": derive_seed(4, "order", epoch),
            "augmentation_seed": derive_seed(4, "augmentation", epoch),
            "batch_sizes": sizes,
            "num_workers": 2,
            "channels_last": False,
            "dtype": torch.float64,
        }
        parts = [data.epoch(rank=rank, **options) for rank in range(2)]
        for size, *batches in zip(sizes, *parts, strict=True):
            for rank, (images, labels) in enumerate(batches):
                halves = [
                    w - rate * momentum * v - share * rate * g
                    for w, v, g in zip(weights, velocity, last[rank], strict=True)
                ]
                for p, half in zip(model.parameters(), halves, strict=True):
                    p.data = half
                loss = torch.nn.functional.cross_entropy(model(images), labels, reduction="sum") * 2 / size
                gradients = torch.autograd.grad(loss, list(model.parameters()))
                decays = [recipe.weight_decay if p.ndim > 1 else 0.0 for p in weights]
                last[rank] = [g + d * h for g, d, h in zip(gradients, decays, halves, strict=True)]
            means = [(a + b) / 2 for a, b in zip(*last, strict=True)]
            velocity = [momentum * v + g for v, g in zip(velocity, means, strict=True)]
            weights = [w - rate * v for w, v in zip(weights, velocity, strict=True)]
    return dict(zip((name for name, _ in model.named_parameters()), weights, strict=True))


def test_local_extrapolation_remembers_each_workers_gradient_from_before_the_exchange(ranks):
    for name, value in two_workers_by_hand(LOCAL).items():
        torch.testing.assert_close(ranks[0]["local"]["weights"][name], value, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["global", "skipping"])
def test_what_all_workers_decide_alike_equals_one_worker(ranks, name):
    one = ends_at(network(), Shard(), VARIATIONS[name])
    for key, value in one["weights"].items():
        torch.testing.assert_close(ranks[0][name]["weights"][key], value, rtol=0, atol=1e-12)
    costs = ("num_forward", "num_backward", "num_steps")
    assert [ranks[0][name][cost] for cost in costs] == [one[cost] for cost in costs]
    assert (one["num_backward"] < one["num_forward"]) == (name == "skipping")


def test_another_number_of_workers_begins_without_last_gradients(ranks):
    state = ranks[0]["local state"]
    zeros = {i: torch.zeros_like(g) for i, g in state["own"]["extrapolation"]["gradients"].items()}
    without = state | {"own": {"extrapolation": {"gradients": zeros}}, "num_shards": 1}
    ours, expected = (ends_at(network(), Shard(), LOCAL, state=through_a_file(s))["weights"] for s in (state, without))
    assert same_bits(ours, expected)
