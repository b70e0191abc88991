"""The training loop over examples on one device, and the measurements around it. Plain torch: no Ray, no files.

result = minimize(model, examples, config.stage("subsets"), seed=7)
metrics = evaluate(model, validation, config.stage("subsets"))
"""

from raysubset.costs import Cost
from raysubset.training.devices import card_bytes, device_name, peak_bytes, place, use_device
from raysubset.training.evaluation import (
    ensemble_positions,
    evaluate,
    evaluate_for_ensemble,
    metrics_of_outputs,
    predict,
    recompute_batch_norm,
)
from raysubset.training.flops import forward_share
from raysubset.training.loop import minimize
from raysubset.training.memory import minimizing_bytes
from raysubset.training.optimizers import learning_rate_at
from raysubset.training.own_listener import Step, listener_of, load_listener
from raysubset.training.own_loop import starts_over
from raysubset.training.own_objective import try_own_objective
from raysubset.training.packed import minimize_packed, why_not_packed
from raysubset.training.packing import PAYS, try_packing
from raysubset.training.profiling import profiled
from raysubset.training.rate_range import RateRange, rate_range
from raysubset.training.records import (
    MEASURES,
    DivergedError,
    EpochRecord,
    LeftOutError,
    Measure,
    Metrics,
    MinimizeResult,
    Progress,
    Weights,
    num_steps_per_epoch,
)
from raysubset.training.shards import Shard
from raysubset.training.statistics import diagonal_fisher, fisher_cost, gram_matrices
from raysubset.training.techniques import Distillation
from raysubset.training.trial import Trial, are_probabilities, least_batch, try_own_steps, try_training
from raysubset.training.watching import ValidationWatch
