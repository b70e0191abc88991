"""What runs on a card never mixes its tensors with the CPU's, and no step of a loop waits for it: by a stand-in."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from raysubset.config import (
    AveragingConfig,
    Config,
    ExtrapolationConfig,
    MinimizeConfig,
    ModelConfig,
    SkippingConfig,
)
from raysubset.data import Examples, load_full_set
from raysubset.models import build_model
from raysubset.run_directory import RunDirectory
from raysubset.tasks import (
    CrossEntropy,
    ImageInputs,
    NextToken,
    Regression,
    Segmentation,
    SquaredError,
    TensorInputs,
    Vocabulary,
)
from raysubset.tasks.inputs import _factors
from raysubset.training import diagonal_fisher, evaluate, gram_matrices, minimize, minimize_packed, place
from raysubset.work import AggregatePiece, Minimizer, Piece, TestPiece, leave_aggregate, leave_test
from tests.card import CARD, OnCard, card
from tests.tiny import cnn, examples, noisy_network, same_bits, through_a_file

CPU, OWN_CODE = torch.device("cpu"), str(Path(__file__).parents[1] / "jobs" / "own_code")
_WEIGHTS = CrossEntropy(0.1, class_weights=(1.0, 2.0, 0.5))
_SPARSE = SkippingConfig(kind="wus_lr", window=0.4, threshold=0.9, epochs=0.4)
OF_BATCHES: dict[str, dict[str, Any]] = {
    **{name: {"optimizer": name} for name in ("sgd", "adam", "muon")},
    "bfloat16": {"precision": "bfloat16", "channels_last": False},
    "float16": {"precision": "float16", "clip_norm": 0.1, "accumulation": 2},
    "extrapolation": {"extrapolation": ExtrapolationConfig(kind="filter_scaled", accelerated=True)},
    "averaging": {"averaging": AveragingConfig(kind="pwalks", period=0.2)},
    "ema": {"averaging": AveragingConfig(kind="ema")},
    "skipping": {"skipping": _SPARSE},
    "objective": {"objective": "own_objective:mixup"},
}


def integers(high: int, *shape: int) -> Tensor:
    return torch.randint(high, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def masks() -> Examples:
    images = integers(256, 16, 8, 8, 1)
    task = Segmentation(
        ImageInputs((8, 8, 1), (0.5,), (0.3,), "crop_flip"), ("a", "b"), 7, CrossEntropy(class_dim=1, ignored=7)
    )
    return Examples({"image": images, "mask": images[..., 0] // 128}, task, augment=True)


def numbers() -> Examples:
    inputs = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    task = Regression(TensorInputs((3,)), ("sum", "product"), (0.0, 0.0), (1.0, 1.0), SquaredError())
    return Examples({"inputs": inputs, "target": torch.stack([inputs.sum(1), inputs.prod(1)], 1)}, task)


def tokens() -> Examples:
    return Examples({"tokens": integers(5, 40, 9)}, NextToken(Vocabulary("characters", " abcd"), 8))


TASKS: dict[str, tuple[Callable[[], Examples], Callable[[], nn.Module]]] = {
    "classes": (lambda: examples(augmentation="crop_flip", objective=_WEIGHTS), cnn),
    "dropout": (examples, noisy_network),
    "masks": (masks, lambda: network(masks(), "unet")),
    "numbers": (numbers, lambda: network(numbers(), "mlp")),
    "tokens": (tokens, lambda: network(tokens(), "transformer")),
}


def network(of: Examples, name: str) -> nn.Module:
    return build_model(ModelConfig(name=name, width=4, depth=1), of.task.spec(), seed=0)


def on_both(do: Callable[[torch.device], Any], *, rounded: bool = False) -> dict[str, int]:
    """Do it on the CPU and on the card, with the same bits; return how often lines of the package waited."""
    expected = do(CPU)
    with card() as waits:
        result = on_cpu(do(CARD))
        counts = dict(waits)
    assert any(line.startswith(("data/examples.py", "training/")) for line in counts)  # something was on the card
    if rounded:
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
    else:
        assert same_bits(result, expected)
    return counts


def on_cpu(tree: Any) -> Any:
    return tree_map(lambda x: x.held.clone() if isinstance(x, OnCard) else x, tree)


def minimized(of: Examples, model: nn.Module, recipe: MinimizeConfig, device: torch.device, **options: Any) -> Any:
    model = place(model, device, channels_last=recipe.channels_last)
    result = minimize(model, of.to(device), recipe, seed=1, **options)
    measured = evaluate(model, of.to(device), recipe).to_dict()
    return [dict(model.state_dict()), result.optimizer.get("state"), [epoch.loss for epoch in result.history], measured]


def test_the_stand_in_refuses_what_cuda_refuses() -> None:
    with card() as waits:
        numbers = torch.arange(3.0, device="cuda")
        for wrong in (
            lambda: numbers + torch.ones(3),
            lambda: numbers.index_select(0, torch.arange(2)),
            lambda: torch.stack([numbers, torch.ones(3)]),
            lambda: numbers.normal_(generator=torch.Generator()),
            lambda: torch.randperm(3, generator=torch.Generator(), device="cuda"),
        ):
            with pytest.raises(RuntimeError, match="cuda"):
                wrong()
        with pytest.raises(TypeError, match="numpy"):
            numbers.numpy()
        assert (numbers[torch.arange(2)] * torch.tensor(2.0)).cpu().tolist() == [0.0, 2.0]
        assert not waits  # which counts the package's


@pytest.mark.parametrize("kind", OF_BATCHES)
def test_every_recipe_of_batches_keeps_to_the_card_and_waits_for_it_no_more_with_more_steps(kind, monkeypatch):
    monkeypatch.syspath_prepend(OWN_CODE)

    def do(device: torch.device, size: int) -> Any:
        _factors.cache_clear()  # which are moved to the card once for all that train on these images
        recipe = MinimizeConfig(**{"epochs": 1, "batch_size": size, **OF_BATCHES[kind]})
        return minimized(examples(augmentation="crop_flip", objective=_WEIGHTS), cnn(), recipe, device)

    counts = [on_both(lambda device, size=size: do(device, size)) for size in (10, 5)]
    if kind not in ("averaging", "skipping"):  # which look at the weights or the losses at windows
        assert counts[0] == counts[1]


@pytest.mark.parametrize("name", TASKS)
def test_every_task_keeps_to_the_card_alone_packed_and_measured(name: str) -> None:
    make, build = TASKS[name]
    recipe = MinimizeConfig(epochs=1, batch_size=8, optimizer="adam")

    def placed(device: torch.device) -> nn.Module:
        return place(build(), device, channels_last=True)

    def packed(device: torch.device, size: int) -> Any:
        parts = [make().select(torch.arange(num)).to(device) for num in (8, 16)]
        models = [placed(device) for _ in parts]
        minimize_packed(models, parts, replace(recipe, batch_size=size, clip_norm=1.0), seeds=[1, 2])
        return [dict(model.state_dict()) for model in models]

    on_both(lambda device: minimized(make(), build(), recipe, device))
    if name != "dropout":
        counts = [on_both(lambda device, size=size: packed(device, size), rounded=True) for size in (8, 4)]
        assert counts[0] == counts[1]
    if name in ("classes", "numbers"):
        for statistics in (diagonal_fisher, gram_matrices):
            plain = replace(make(), augment=False)
            on_both(lambda device, of=statistics, on=plain: of(placed(device), on.to(device), recipe)[0], rounded=True)


@pytest.mark.parametrize("optimizer", ["lbfgs", "cg", "levenberg_marquardt"])
def test_whole_subsets_keep_to_the_card_and_are_not_rounded_to_tf32(optimizer: str) -> None:
    recipe, cudnn, seen = MinimizeConfig(optimizer=optimizer, epochs=12), torch.backends.cudnn, set[str]()

    def on_step(_: Any) -> None:
        seen.add(cudnn.conv.fp32_precision + cudnn.rnn.fp32_precision)

    def do(device: torch.device) -> Any:
        seen.clear()
        options: dict[str, Any] = {"validation": numbers().to(device), "on_step": on_step}
        return minimized(numbers(), network(numbers(), "mlp"), recipe, device, **options)

    before = cudnn.conv.fp32_precision + cudnn.rnn.fp32_precision
    on_both(do)
    assert seen == {"ieeeieee"}
    assert cudnn.conv.fp32_precision + cudnn.rnn.fp32_precision == before


@pytest.mark.parametrize("changes", [{}, {"optimizer": "adam", "precision": "float16"}, {"optimizer": "lbfgs"}])
def test_a_checkpoint_resumes_on_the_card_from_the_cpus_memory(changes: dict[str, Any]) -> None:
    recipe = MinimizeConfig(epochs=4, batch_size=10, **changes)

    def do(device: torch.device) -> Any:
        of, states = examples().to(device), []
        model = place(cnn(), device, channels_last=True)
        step = 15 if recipe.optimizer == "lbfgs" else 4
        minimize(
            model, of, recipe, seed=1, on_step=lambda p: states.append(through_a_file(p.capture())) or p.step > step
        )
        assert not any(isinstance(each, OnCard) for each in tree_leaves(states))
        return minimized(examples(), cnn(seed=9), recipe, device, state=states[-1])

    on_both(do)


def test_the_example_of_a_loop_of_ones_own_works_on_a_card(monkeypatch) -> None:
    monkeypatch.syspath_prepend(OWN_CODE)
    recipe = MinimizeConfig(epochs=3, loop="own_loop:by_scipy")
    on_both(lambda device: minimized(examples(), cnn("group"), recipe, device), rounded=True)


@pytest.mark.parametrize("method", ["uniform_soup", "aligned_soup"])
def test_a_rounds_work_has_the_same_results_on_a_card(method: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda *_, **__: None)
    config = Config().with_overrides(
        {
            "data.name": "tests.tiny:few_digits",
            "subsets.num": 2,
            "subsets.size": 60,
            "minimize.epochs": 2.0,
            "minimize.optimizer": "adam",
            "rounds.num": 2,
            "rounds.optimizer_state": "average",
            "aggregation.method": method,
            "fine_tuning.distillation": 0.5,
            "fine_tuning.epochs": 0.1,
        }
    )
    full_set = load_full_set(config.data)
    start = build_model(config.model, full_set.spec, seed=1).state_dict()

    def do(device: torch.device) -> Any:
        num_gpus, run = float(device == CARD), RunDirectory(str(tmp_path), device.type)
        minimizer = Minimizer(lambda: full_set, num_gpus=num_gpus, node="n")
        members = tuple(Piece(config, run, "subsets", subset_id=n, start_id="initial") for n in range(2))
        records = [minimizer.minimize([member], start, attempts=[0], waited_s=0.0)[0] for member in members]
        piece = AggregatePiece(config, run, members, averages_optimizers=True)
        made, record = leave_aggregate(full_set, num_gpus, piece, start, node="n", networks=minimizer.networks)
        teachers = tuple(member.output for member in members)
        tuning = Piece(config, run, "fine_tuning", start=piece.output, teachers=teachers, by_train=True)
        tuned = minimizer.minimize([tuning], None, attempts=[0], waited_s=0.0)
        test = TestPiece(config, piece.output, "test", is_final=True)
        tested = leave_test(full_set, num_gpus, test, made.aggregate.weights, node="n")
        measured = [(each["training"], each["validation"]) for each in cast(Any, (*records, *tuned))]
        return [made.aggregate.weights, measured, record["aggregation"]["validation"], tested["metrics"]]

    on_both(do)
