"""The types of the values in JSON files. They are checked whenever a file is read, as anybody may have written it.

In a shape, a dict gives an object's keys: "name?" may be missing, "*" is any name, and other keys are not checked. "{}"
stands for the name of the task's quality; a record that does not name its task needs no such key. A list has items of
one shape, or of its last shape if they are objects. A tuple's single shape may be null. A range is of counts. Numbers
are finite: others have become null in JSON.
"""

from fnmatch import fnmatchcase
from typing import Any

_NUMBER = int | float
_LOSS = (_NUMBER,)  # null if it was not finite
_COUNT = range(1, 2**63)
_MOST = 1e300


def _all(shape: Any, names: str) -> dict[str, Any]:
    return dict.fromkeys(names.split(), shape)


_METRICS = _all(_LOSS, "loss_sum loss {} {}_error?") | {"num_examples": _COUNT}
_METRICS |= {"accuracy?": _NUMBER, "num_correct?": int}  # of classification
_EPOCH = _all(_NUMBER, "epoch learning_rate") | {"loss": _LOSS, "num_steps": int, "validation?": (_METRICS,)}
_STAGE = _all((_METRICS,), "training validation") | _all(_COUNT, "num_examples? num_workers?")
_STAGE |= {"history": [_EPOCH], "outcome": str, "peak_bytes?": _all(int, "host card?")}
_COST = _all(int, "num_forward? num_backward? num_steps?") | {"device_s?": _NUMBER}
_MINIMUM = _STAGE | _all(int, "subset_id round") | {"start_id": str, "cost": _COST, "num_examples": _COUNT}
_CANDIDATE = {"method": str, "validation": (_METRICS,), "cost": _COST, "error": (str,)}
_AGGREGATION = (
    _all((_METRICS,), "training validation uniform_mean ensemble best_member")
    | _all(_LOSS, "mean_member_loss mean_member_{} barrier")
    | {"method": str, "subset_ids": [int], "coefficients": [_NUMBER], "shared_start": bool, "tried": [dict]}
    | {"of_first": [str], "candidates": [_CANDIDATE], "alignment": (_all(_LOSS, "barrier_before barrier_after"),)}
)
_OF_REPORT = _MINIMUM | {"overdetermination_ratio": _NUMBER}
_ROUND = {"round": int, "aggregation": _AGGREGATION, "minima": [_OF_REPORT], "subsamples?": [_MINIMUM]}
_BASE = _all(str, "record weights seal name?")
_PAID = _all(_NUMBER, "passes critical_path_passes device_s")
_STAGE_PAID = _PAID | {"stage": str, "wall_s": _NUMBER} | _all(int, "num_attempts num_lost")
_COSTS = _PAID | _all(_NUMBER, "lost_passes critical_path_s num_steps num_network_bytes")
_COSTS |= {"lacking?": [str], "stages": [_STAGE_PAID]}
_ENVIRONMENT = {"started_at?": _NUMBER, "packages?": {"*": (str,)}}
_RATIOS = {"full_set": _NUMBER, "subsets": [_NUMBER]}
_SECONDS = _all(_NUMBER, "startup wall num_sessions")
_QUALITY = _all(str, "name unit?") | _all(bool, "higher_is_better? is_share?") | {"margin?": (_NUMBER,)}
_TASK = {"name": str, "loss?": str, "quality": _QUALITY}
_HEAD = _all(str, "name uri") | {"seconds?": _SECONDS, "task?": _TASK}
_DATA = {"name": str} | _all(_COUNT, "num_train num_test")
_MODEL = {"num_parameters": int, "forward_share": _NUMBER}
_SLOT = {"kind": str, "speed": _NUMBER}
_OUTER_STEP = {"outer_learning_rate": _NUMBER, "outer_momentum": (_NUMBER,)}
_CONFIG = {"name": (str,), "model": {"name": str}}

_NOTES = [{"text": str, "is_warning": bool}]

_REPORT = (
    _HEAD
    | {"method": str, "config": _CONFIG | {"fine_tuning": {"start": str}, "rounds": _OUTER_STEP}, "advice": _NOTES}
    | {"environment": (_ENVIRONMENT,), "decisions": {"slots?": [_SLOT]}}
    | {"data": _DATA | {"num_validation": int, "notes": _NOTES}, "model": _MODEL | {"name": str}}
    | {"overdetermination_ratio": _RATIOS, "planned_passes": _NUMBER, "test": _METRICS, "validation": _METRICS}
    | {"stages": _all((_STAGE,), "trunk? fine_tuning? conventional?") | {"rounds?": [_ROUND]}, "seconds": _SECONDS}
    | {"traces?": [str]}
    | {"cost": _COSTS}
)

_SPREAD = ({"mean": _NUMBER, "standard_error": _LOSS},)
_SETTING = (
    _all(int, "num_seeds num_pruned num_failed")
    | _all(_LOSS, "num_subsets subset_size overdetermination_ratio")
    | _all(_SPREAD, "validation_loss validation_{} passes critical_path_passes")
    | _all(_SPREAD, "own_loss? own_{}? full_set_loss? full_set_{}? before_loss? before_{}? test_loss? test_{}?")
    | {"overrides": dict}
)
_SWEEP = (
    _HEAD
    | {"space": {"*": list}, "trials": [_all(str, "name state error?") | {"overrides": dict}], "settings": [_SETTING]}
    | {"recommended": (int,), "recommendation": str, "baseline?": (_SETTING,), "cost": _all(_NUMBER, "passes device_s")}
)

_INTERVAL = {"coverage": _NUMBER, "num": int} | _all(_LOSS, "estimate low high")
_MEAN = _PAID | _all(_NUMBER, "num_seeds critical_path_s storage_reads?") | _all(_LOSS, "validation_loss test_{}")
_RUN = {"leg": str, "error": (str,)}
_POINT = {"budget": _NUMBER, "runs": [_RUN], "difference": (_INTERVAL,), "is_non_inferior": (bool,)}
_POINT["mean"] = (_MEAN | {"test_{}_interval": _INTERVAL},)
_SETTINGS = {"learning_rate": _NUMBER, "batch_size": int}
_ARM = _all(str, "key title role") | {"settings": _SETTINGS, "trained?": _SETTINGS, "points": [_POINT]}
_ON_NETWORK = {"arm": str, "wall_s": {"*": _LOSS}, "test_{}": _LOSS} | _all(_NUMBER, "budget num_bytes num_exchanges")
_NETWORK = {"bandwidths": [_NUMBER], "rows": [_ON_NETWORK]} | _all(_NUMBER, "s_per_pass data_parallel_bytes_a_step")
_LEG = _all(str, "kind stage") | {"round": int, "subset": (int,), "num_workers": _COUNT, "inputs": [str]}
_FASTEST = {"arm": str, "seconds": _NUMBER}
_AT_BANDWIDTH = {"gbit_per_s": _NUMBER, "ways": {"*": _FASTEST}, "fastest": [str]}
_REGIME = {"overdetermination_ratio": _RATIOS, "sentence?": str, "by_bandwidth?": [_AT_BANDWIDTH]}
_COMPARISON = (
    _HEAD
    | {"config": _CONFIG | {"minimize": {"batch_size": int}}, "environment": (_ENVIRONMENT,)}
    | {"data": _DATA, "model": _MODEL, "seeds": [int]}
    | {"regime": _REGIME | _all(int, "num_subsets num_parameters num_workers")}
    | {"margin": _NUMBER, "arms": [_ARM], "failed": {"*": str}, "legs": {"*": _LEG}, "network": _NETWORK}
    | {"conventional": _all(_NUMBER, "budget test_{} target_{}")}
    | {"speed_ups": _all({"*": {"interval": _INTERVAL}}, "total critical_path")}
    | {"verdicts": _all(_all(str, "word text") | {"is_smoke_test?": bool}, "total critical_path")}
    | {"tuning": {"tried": [_SETTINGS | {"arm": str, "validation_loss": _LOSS}], "passes": _NUMBER, "at_edge?": [str]}}
)

_PACKING = {"taken": bool, "per_actor": int, "reason?": str, "num_members?": int, "ratio?": _NUMBER}
_DECISIONS = _all(_NUMBER, "num_gpus num_workers? most_workers? alone_s?") | {"packing?": (_PACKING,)}
_DECISIONS |= {"shares?": ([_NUMBER],), "slots?": [_SLOT]}

_LEASE = (
    _all(str, "driver host process_space") | {"pid": int, "process_started": (str,)} | _all(_NUMBER, "since renewed_at")
)

_SHAPES = {
    "*minimum.json": _STAGE,
    "*rounds/*/minimum.json": _MINIMUM,
    "*aggregate.json": {"round": int, "aggregation": _AGGREGATION, "minima?": [_OF_REPORT], "base?": _BASE},
    "*history.json": [_EPOCH],
    "*report.json": _REPORT,
    "*sweep.json": _SWEEP,
    "*comparison.json": _COMPARISON,
    "*test.json": _METRICS,
    "*line.json": [{"share": _NUMBER, "loss": _LOSS, "num_examples": int}],
    "samples.json": [_all(str, "prompt text")],
    "environment.json": _ENVIRONMENT,
    "decisions.json": _DECISIONS,
    "lease.json": _LEASE,
    "sessions.json": {"sessions": [_all(_NUMBER, "started_at startup_s wall_s")]},
    "tracking/*.json": {"run_id?": (str,), "finished?": bool},
}


def refuse_other_values(path: str, record: Any) -> None:
    """Stop if a record does not have the values that files of its name hold. Other files may hold anything.

    Raises:
        ValueError: with the name of the value.
    """
    if record is None:  # None also stands for a missing file
        raise ValueError("it holds nothing but null")
    for pattern, shape in _SHAPES.items():
        if fnmatchcase(path, pattern):
            _check(record, shape, "", _quality_name(record) if "task?" in shape else None)


def _quality_name(record: Any) -> str:
    """Return the name of the quality of a report's task. Records from before tasks existed are all of accuracy."""
    if isinstance(record, dict) and "task" in record:
        _check(record["task"], _TASK, "task", None)
        return record["task"]["quality"]["name"]
    return "accuracy"


def _check(value: Any, shape: Any, name: str, quality: str | None) -> None:
    """Check a value by its shape. `quality` replaces "{}"; if it is None, such keys are not checked."""
    if isinstance(shape, tuple):
        if value is not None:
            _check(value, shape[0], name, quality)
    elif isinstance(shape, dict) and isinstance(value, dict):
        for key, part in shape.items():
            if "{}" in key and quality is None:
                continue
            for key_found in value if key == "*" else [key.rstrip("?").replace("{}", quality or "")]:
                if key_found in value:
                    _check(value[key_found], part, f"{name}.{key_found}", quality)
                elif not key.endswith("?"):
                    raise ValueError(f"{name}.{key_found} is missing".lstrip("."))
    elif isinstance(shape, list) and isinstance(value, list):
        for number, item in enumerate(value):
            _check(item, shape[-1 if isinstance(item, dict) else 0], f"{name}[{number}]", quality)
    else:
        kind = int if isinstance(shape, range) else type(shape) if isinstance(shape, dict | list) else shape
        is_sound = isinstance(value, kind) and (not isinstance(value, int | float) or -_MOST < value < _MOST)
        if not is_sound or (isinstance(shape, range) and value not in shape):
            words = {dict: "an object", list: "a list", str: "a text", bool: "true or false"}.get(kind, "a number")
            words = "1 or more" if isinstance(shape, range) else words
            raise ValueError(f"{name or 'it'} = {repr(value)[:60]} should be {words}".lstrip("."))
