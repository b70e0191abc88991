"""A setting that is said to have no effect has none, and a run warns of it."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from raysubset.config import Config
from raysubset.config.minimizing import OPTIMIZERS
from raysubset.planning.idle_settings import idle_settings
from raysubset.training import minimize
from tests.tiny import CROSS_ENTROPY, SQUARED_ERROR, cnn, examples, same_bits, weights

KINDS = (
    {},
    *({"extrapolation.kind": kind} for kind in ("past_local", "isotropic")),
    *({"averaging.kind": kind} for kind in ("pswa", "pwalks", "pswm", "ema", "swa")),
    *({"skipping.kind": kind, "skipping.threshold": 0.3} for kind in ("wus", "wus_lr")),
    {"schedule": "one_cycle"},
)
OTHERS = {
    "momentum": 0.5,
    "weight_decay": 0.3,
    "schedule": "constant",
    "warmup_fraction": 0.4,
    "extrapolation.rate": 0.9,
    "extrapolation.accelerated": True,
    "averaging.period": 0.5,
    "averaging.num_samples": 2,
    "averaging.decay": 0.3,
    "averaging.swa_start": 0.25,
    "averaging.feedback": "evaluate",
    "skipping.window": 2.0,
    "skipping.threshold": 0.5,
    "skipping.epochs": 0.5,
    "skipping.drop": 0.5,
    "skipping.decay": 0.1,
}
USED_IN_VAIN = {  # settings that are used, and change no bit here
    "averaging.feedback",  # of ema and swa it may only say what they do anyway
    "skipping.drop",  # accuracy falls in no freeze
}


def recipes() -> Iterator[tuple[str, dict[str, Any]]]:
    for optimizer in OPTIMIZERS:
        for kind in KINDS:
            is_plain = not kind or optimizer == "sgd" or (optimizer in ("adam", "muon") and "schedule" in kind)
            if is_plain:
                yield optimizer, {f"minimize.{key}": value for key, value in kind.items()}


def minimized(config: Config) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = cnn("none")
    objective = SQUARED_ERROR if config.minimize.optimizer == "levenberg_marquardt" else CROSS_ENTROPY
    minimize(model, examples(24, objective=objective), config.minimize, seed=5)
    return weights(model)


@pytest.mark.parametrize(("optimizer", "kind"), list(recipes()), ids=str)
def test_settings_of_a_recipe_are_idle_if_they_change_no_bit(optimizer: str, kind: dict[str, Any]) -> None:
    rate = {"lbfgs": 1.0, "cg": 1.0, "gauss_newton": 1.0, "levenberg_marquardt": 1.0, "adam": 0.01, "adamw": 0.01}
    base = {
        "trunk.epochs": 0.0,
        "fine_tuning.epochs": 0.0,
        "minimize.epochs": 6.0 if "swa" in kind.values() else 3.0,  # of which it averages the last quarter
        "minimize.batch_size": 4,
        "minimize.patience": 0,
    }
    base |= {"minimize.optimizer": optimizer, "minimize.learning_rate": rate.get(optimizer, 0.05)}
    config = Config().with_overrides(base | kind)
    usual, family = minimized(config), next(iter(kind), "").rpartition(".")[0]
    for name, value in OTHERS.items():
        key = f"minimize.{name}"
        is_of_others = "." in name and (optimizer != "sgd" or (kind and not key.startswith(family)))
        if key in kind or is_of_others:
            continue
        changed = config.with_overrides({key: value})
        is_idle = any(note.text.startswith(f"{key} = ") for note in idle_settings(changed))
        has_effect = not same_bits(minimized(changed), usual)
        assert is_idle is not has_effect or name in USED_IN_VAIN, f"{key}: idle {is_idle}, effect {has_effect}"


@pytest.mark.parametrize(
    ("overrides", "idle"),
    [
        ({}, []),
        ({"aggregation.ties_density": 0.3}, ["aggregation.ties_density"]),
        ({"aggregation.ties_density": 0.3, "aggregation.method": "ties"}, []),
        ({"aggregation.ties_density": 0.3, "aggregation.method": "auto"}, []),
        ({"aggregation.savgm_fraction": 0.3, "aggregation.method": "auto"}, ["aggregation.savgm_fraction"]),
        ({"aggregation.allow_independent": True}, ["aggregation.allow_independent"]),
        ({"trunk.epochs": 0.0, "trunk.schedule": "cosine"}, ["trunk.schedule"]),
        ({"minimize.warmup_fraction": 0.2}, ["minimize.warmup_fraction"]),
        ({"minimize.warmup_fraction": 0.2, "trunk.schedule": "one_cycle"}, []),
        ({"minimize.optimizer": "lbfgs", "trunk.schedule": "cosine"}, ["trunk.schedule"]),
        ({"minimize.gradients": "bfloat16"}, []),  # fine-tuning may have several workers
        ({"minimize.gradients": "bfloat16", "fine_tuning.num_workers": 1}, ["minimize.gradients"]),
        ({"minimize.gradients": "bfloat16", "method": "conventional"}, ["minimize.gradients"]),
        ({"conventional.epochs": 3.0}, ["conventional.epochs"]),
        ({"conventional.epochs": 3.0, "method": "conventional"}, []),
        (
            {"method": "conventional", "conventional.epochs": 3.0, "subsets.num": 2, "minimize.epochs": 2.0},
            ["subsets.num", "minimize.epochs"],
        ),
        ({"method": "conventional", "subsets.num": 2, "minimize.epochs": 2.0}, []),  # they give the budget
        ({"method": "conventional", "minimize.tolerance": 0.1}, ["minimize.tolerance"]),
        ({"rounds.send": "int8"}, ["rounds.send"]),
        ({"rounds.send": "int8", "rounds.num": 2}, []),
        ({"fine_tuning.epochs": 0.0, "fine_tuning.shrink": 0.2}, ["fine_tuning.shrink"]),
        ({"fine_tuning.shrink": 0.2, "fine_tuning.start": "shrink_perturb"}, []),
        ({"fine_tuning.sync_batch_norm": True, "fine_tuning.num_workers": 1}, ["fine_tuning.sync_batch_norm"]),
        ({"fine_tuning.sync_batch_norm": True}, []),  # auto may choose several workers
        ({"tracking.project": "mine", "tracking.group": "pilots"}, ["tracking.project", "tracking.group"]),
        ({"tracking.project": "mine", "tracking.to": "mlflow"}, []),
        ({"fine_tuning.temperature": 3.0}, ["fine_tuning.temperature"]),
        ({"fine_tuning.temperature": 3.0, "fine_tuning.distillation": 0.5}, []),
        (
            {"fine_tuning.temperature": 3.0, "fine_tuning.distillation": 0.5, "task.loss": "squared_error"},
            ["fine_tuning.temperature"],
        ),
        ({"subsets.alpha": 0.1}, ["subsets.alpha"]),
        ({"subsets.alpha": 0.1, "subsets.scheme": "dirichlet"}, []),
    ],
    ids=str,
)
def test_a_run_warns_of_settings_that_its_config_does_not_use(overrides: dict[str, Any], idle: list[str]) -> None:
    notes = idle_settings(Config().with_overrides(overrides))
    assert [note.text.partition(" = ")[0] for note in notes] == idle
    assert all(note.is_warning for note in notes)
