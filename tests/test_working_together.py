"""Two workers that do a piece together: real processes and gloo, a Minimizer in each, without Ray."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from raysubset import Config
from raysubset.data import load_full_set
from raysubset.models import build_model
from raysubset.run_directory import RunDirectory, checkpoint_path
from raysubset.run_directory.ledger import Ledger, Work
from raysubset.tasks import Spec
from raysubset.training import Progress, Shard, Weights
from raysubset.work import Minimizer, Piece
from tests.test_shards import in_two_processes
from tests.tiny import same_bits

CONFIG = Config().with_overrides(
    {
        "trunk.epochs": 2.0,  # 42 steps
        "model.norm": "group",
        "actors.checkpoint_epochs": 0.4,  # 8 steps
        "minimize.learning_rate": 0.01,
    }
)
LOCAL = CONFIG.with_overrides({"minimize.extrapolation.kind": "past_local"})  # each worker keeps a gradient of its own
CONFIGS = {"plain": CONFIG, "local": LOCAL, "by the clock": CONFIG.with_overrides({"actors.checkpoint_s": 1e-9})}
CONFIGS["one to validate"] = CONFIG.with_overrides({"data.validation_fraction": 0.0007})
CONFIGS["local by the clock"] = LOCAL.with_overrides({"actors.checkpoint_s": 1e-9})
DEATH = 11  # the step after which both workers die


def trunk(folder: Path, name: str) -> Piece:
    config = CONFIGS[name.removesuffix(" again").removesuffix(" alone")]
    return Piece(config, RunDirectory(str(folder), name), "trunk", by_train=True)


def minimize(piece: Piece, shard: Shard, attempt: int, *, dies: bool = False) -> list[Any]:
    full_set = load_full_set(piece.config.data)
    minimizer = Minimizer(lambda: full_set, num_gpus=0, node="there", shard=shard)

    def die(progress: Progress) -> None:
        if progress.step == DEATH:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        if dies:
            patch.setattr(minimizer, "_listener", lambda piece: die)
        start = build_model(CONFIG.model, full_set.spec, seed=1).state_dict()
        return minimizer.minimize([piece], start, attempts=[attempt], waited_s=0.0)


def work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for name in CONFIGS:
        (record,) = minimize(trunk(folder, name), Shard(rank, 2), 0)
        assert (record is None) == (rank == 1)
        again = trunk(folder, f"{name} again")
        with pytest.raises(KeyboardInterrupt):
            minimize(again, Shard(rank, 2), 0, dies=True)
        if rank == 0:
            state = again.directory.read_checkpoint(checkpoint_path("trunk", 0))
            (folder / f"{name} step").write_text(str(state["position"][1]))
        torch.distributed.barrier()
        minimize(again, Shard(rank, 2), 1)
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("together")
    in_two_processes(work, folder)
    return folder


def ends_and_entries(folder: Path, name: str) -> tuple[Weights, list[Work]]:
    piece = trunk(folder, name)
    return piece.output.weights(), Ledger(piece.directory).read()


def test_workers_may_be_more_than_the_examples_that_they_validate_on(folder):
    record = trunk(folder, "one to validate").record()
    assert record is not None
    for look in record["history"]:
        validation = look["validation"]
        assert (validation["num_examples"], validation["accuracy"]) in ((1, 0.0), (1, 1.0))
    assert record["history"][-1]["validation"]["loss"] == pytest.approx(record["validation"]["loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("name", "step"), [("plain", 8), ("local", 8), ("by the clock", 11), ("local by the clock", 8)]
)
def test_workers_that_died_resume_together_to_the_same_bits(folder, name, step):
    """By the clock, which each reads by itself, they write no states of their own."""
    assert int((folder / f"{name} step").read_text()) == step
    whole, (entry,) = ends_and_entries(folder, name)
    resumed, (dead, done) = ends_and_entries(folder, f"{name} again")
    assert same_bits(whole, resumed)
    assert (dead.outcome, done.outcome, entry.outcome) == ("running", "done", "done")
    assert (done.cost.num_steps, entry.cost.num_steps) == (42 - step, 42)
    assert not [path for path in trunk(folder, f"{name} again").directory.list("trunk") if "checkpoint" in path]


def test_two_workers_do_what_one_does(folder):
    minimize(trunk(folder, "plain alone"), Shard(), 0)
    (one, (by_one,)), (both, (by_both,)) = (ends_and_entries(folder, name) for name in ("plain alone", "plain"))
    for key, value in one.items():
        torch.testing.assert_close(both[key], value, rtol=1e-3, atol=1e-4)
    assert (by_one.num_workers, by_both.num_workers) == (1, 2)
    assert by_one.cost.num_forward == by_both.cost.num_forward
    assert by_one.cost.num_steps == by_both.cost.num_steps == 42
    # the first measures the result alone: training and validation data, without batch norms to renew
    assert (by_one.num_lone_forward, by_both.num_lone_forward) == (0, 1294 + 144)
    records = [trunk(folder, name).record() for name in ("plain alone", "plain")]
    histories = [record["history"] for record in records if record]
    assert [len(history) for history in histories] == [2, 2]
    for mine, theirs in zip(*histories, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
        assert mine["validation"]["num_examples"] == theirs["validation"]["num_examples"]
        assert mine["validation"]["loss"] == pytest.approx(theirs["validation"]["loss"], rel=1e-2)


def of_batch_norm(spec: Spec) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 10))


def test_a_network_of_the_users_is_tried_before_its_batch_norm_is_one_of_all_workers(tmp_path, monkeypatch):
    """As the trial is on the CPU, where torch refuses batch statistics of several workers."""
    monkeypatch.setattr(Minimizer, "_syncs_batch_norm", lambda *_: True)  # as on cards
    config = CONFIG.with_overrides({"model.name": f"{__name__}:of_batch_norm", "model.norm": "batch"})
    piece = Piece(config, RunDirectory(str(tmp_path), "run"), "trunk", by_train=True, num_workers=2)
    full_set = load_full_set(config.data)
    minimizer = Minimizer(lambda: full_set, num_gpus=0, node="there", shard=Shard(0, 2))
    work = Work("trunk", 0, None, 0, "there", "cpu", started_at=0.0)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        with minimizer._at_work([piece]) as device:
            job = minimizer._prepare(piece, None, work, device, 0)
    finally:
        torch.distributed.destroy_process_group()
    assert any(isinstance(module, nn.SyncBatchNorm) for module in job.model.modules())
