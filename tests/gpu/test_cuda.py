"""What only a CUDA device shows; skipped where there is none."""

import io
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from raysubset import Config, run
from raysubset.config import DataConfig, MinimizeConfig, ModelConfig
from raysubset.data import load_full_set
from raysubset.models import build_model
from raysubset.tasks import Spec
from raysubset.training import (
    Progress,
    Weights,
    evaluate,
    minimize,
    minimize_packed,
    peak_bytes,
    place,
    try_packing,
    use_device,
)
from tests.test_on_a_card import OF_BATCHES, TASKS
from tests.tiny import cnn, image_examples

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(180),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def minimized(
    recipe: MinimizeConfig, device: torch.device, *, dtype: torch.dtype = torch.float32, **options: Any
) -> Weights:
    full_set = load_full_set(DataConfig())
    model = build_model(ModelConfig(), full_set.spec, seed=0).to(dtype)
    model = place(model, device, channels_last=recipe.channels_last)
    minimize(model, full_set.examples("train", device=device), recipe, seed=1, **options)
    return {key: value.cpu() for key, value in model.state_dict().items()}


def test_a_few_steps_in_float64_agree_with_the_cpu() -> None:
    recipe = MinimizeConfig(epochs=0.5, learning_rate=0.01)
    on_cpu = minimized(recipe, torch.device("cpu"), dtype=torch.float64)
    on_cuda = minimized(recipe, use_device(num_gpus=1, num_threads=1), dtype=torch.float64)
    for key, value in on_cpu.items():
        torch.testing.assert_close(on_cuda[key], value, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", [name for name in TASKS if name != "dropout"])  # whose noise is the device's own
def test_a_few_steps_of_every_task_in_float64_agree_with_the_cpu(name: str) -> None:
    (make, build), recipe, ends = TASKS[name], MinimizeConfig(epochs=1, batch_size=8, optimizer="adam"), []
    for device in (torch.device("cpu"), use_device(num_gpus=1, num_threads=1)):
        model = place(build().double(), device, channels_last=True)
        minimize(model, make().to(device), recipe, seed=1)
        ends.append({key: value.cpu() for key, value in model.state_dict().items()})
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", [kind for kind in OF_BATCHES if kind not in ("averaging", "skipping", "objective")])
def test_no_step_waits_for_the_card(kind: str) -> None:
    device, (make, _), counts = use_device(num_gpus=1, num_threads=1), TASKS["classes"], []
    for size in (10, 10, 5):  # kernels are chosen in the first
        recipe = MinimizeConfig(**{"epochs": 2, "batch_size": size, **OF_BATCHES[kind]})
        model = place(cnn(), device, channels_last=recipe.channels_last)
        of = make().to(device)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                minimize(model, of, recipe, seed=1)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        counts.append(sum("synchronizing" in str(warning.message) for warning in caught))
    assert counts[2] == counts[1]


@pytest.mark.parametrize("precision", ["auto", "float16"])
def test_stopped_and_resumed_gives_the_same_bits(precision: Any) -> None:
    device, recipe = use_device(num_gpus=1, num_threads=1), MinimizeConfig(epochs=2.0, precision=precision)
    file = io.BytesIO()

    def stop(progress: Progress) -> bool:
        if progress.step == 30:
            torch.save(progress.capture(), file)
        return progress.step == 30

    minimized(recipe, device, on_step=stop)
    file.seek(0)
    state = torch.load(file, weights_only=True, map_location="cpu")
    resumed, whole = minimized(recipe, device, state=state), minimized(recipe, device)
    assert all(torch.equal(resumed[key], value) for key, value in whole.items())


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("compiled", [False, True])
def test_mixed_precision_minimizes(compiled: bool, precision: Any) -> None:
    device, recipe = (
        use_device(num_gpus=1, num_threads=1),
        MinimizeConfig(epochs=4.0, precision=precision, compile=compiled),
    )
    full_set = load_full_set(DataConfig())
    model = build_model(ModelConfig(), full_set.spec, seed=0)
    model.load_state_dict(minimized(recipe, device))
    assert evaluate(model, full_set.examples("validation"), recipe).accuracy > 0.8
    assert peak_bytes(device)["card"] > 0


def test_a_few_packed_steps_in_float64_agree_with_one_by_one() -> None:
    device, recipe = use_device(num_gpus=1, num_threads=1), MinimizeConfig(epochs=0.5, learning_rate=0.01)
    full_set = load_full_set(DataConfig())
    examples = full_set.examples("train", device=device)
    models = [
        place(
            build_model(ModelConfig(), full_set.spec, seed=0),
            device,
            channels_last=True,
        )
        for _ in range(3)
    ]
    models = [model.double() for model in models]
    minimize_packed(models, [examples] * 3, recipe, seeds=[1, 2, 1])
    alone = minimized(recipe, device, dtype=torch.float64)
    for model in (models[0], models[2]):
        for key, value in alone.items():
            torch.testing.assert_close(model.state_dict()[key].cpu(), value, rtol=1e-8, atol=1e-10)


@pytest.mark.skipif(
    not torch.cuda.is_available() or "H200" not in torch.cuda.get_device_name(), reason="the goal is for an H200"
)
@pytest.mark.parametrize(("num", "most"), [(8, 1.5), (32, 3.0)])
def test_members_of_the_mnist_cnn_cost_little_more_than_one(num: int, most: float) -> None:
    device = use_device(num_gpus=1, num_threads=1)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (1664, 28, 28, 1), dtype=torch.uint8, generator=generator)
    examples = image_examples(images, torch.arange(1664) % 10, 0.5, 0.5).to(device)
    models = [build_model(ModelConfig(), Spec((1, 28, 28), (10,)), seed=seed) for seed in range(num)]
    models = [place(model, device, channels_last=True) for model in models]
    trial = try_packing(models, [examples] * num, MinimizeConfig())
    assert trial.packed_s <= most * trial.single_s


@pytest.mark.cluster
def test_actors_share_a_card_and_the_driver_needs_none(tmp_path: Path) -> None:
    config = Config(storage_path=str(tmp_path)).with_overrides(
        {"actors.num_gpus": 0.5, "subsets.num": 2, "minimize.epochs": 2.0, "fine_tuning.num_workers": 1}
    )
    report = run(config)
    devices = {work["stage"]: work["device"] for work in _ledger(report.uri)}
    assert devices["subsets"] == devices["fine_tuning"] == torch.cuda.get_device_name()
    assert report.test.accuracy > 0.8


def _ledger(uri: str) -> list[dict[str, Any]]:
    from raysubset.run_directory import RunDirectory
    from raysubset.run_directory.ledger import Ledger

    return [work.to_dict() for work in Ledger(RunDirectory.at(uri)).read()]
