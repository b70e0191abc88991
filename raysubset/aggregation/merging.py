"""merge() merges state dicts into one, for anybody who has some. It needs no run, no Ray and no files.

soup = merge([model.state_dict() for model in models])
best = merge(members, "greedy_soup", score=lambda weights: loss_of(weights))
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import NoReturn

import torch
from torch import Tensor, nn

from raysubset.aggregation.methods import combine_in, method_of
from raysubset.aggregation.records import Aggregate, Context, Minimum
from raysubset.config import AggregationConfig, MinimizeConfig
from raysubset.data import Examples
from raysubset.errors import with_article
from raysubset.models import averaged_names, tied_names, trainable_names
from raysubset.tasks import Classification, TensorInputs
from raysubset.training import Metrics, Weights

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def merge(
    members: Sequence[Mapping[str, Tensor]],
    config: AggregationConfig | str = "uniform_soup",
    *,
    start: Mapping[str, Tensor] | None = None,
    sizes: Sequence[int] | None = None,
    losses: Sequence[float] | None = None,
    score: Callable[[Weights], float] | None = None,
    statistics: Sequence[Mapping[str, Weights]] | None = None,
    network: nn.Module | None = None,
    examples: tuple[Tensor, Tensor] | None = None,
    seed: int = 0,
) -> Weights:
    """Merge state dicts by a method's name, or by a config with the method's settings.

    Members count as having one start, except for aligned_soup and select_best. Batch-norm statistics of a mean are
    means of the members' statistics: recompute them on data before use (torch.optim.swa_utils.update_bn).

    Args:
        members: state dicts of one architecture. They are not changed.
        start: the weights that the members started from, for ties and dare.
        sizes: number of examples behind each member, for weighted_soup; by default all equal.
        losses: held-out losses of the members, for select_best, greedy_soup, and weighted_soup by validation_loss; by
            default those that `score` returns.
        score: returns the held-out loss of any weights, for greedy_soup; less is better.
        statistics: of each member, by kind: {"fisher": diagonal by parameter}, {"gram": XᵀX by layer, [groups, K, K]},
            {"subsample": the weights of its minimum on a part of its data}.
        network: of the members' architecture, for aligned_soup. It also tells which tensors are trainable, and which
            are tied; without it, those are that share memory in the first member.
        examples: (inputs [N, …], labels [N]) for aligned_soup, as the network takes them.
        seed: of dare's random draws.

    Returns:
        A state dict on the CPU.

    Raises:
        ValueError: if members differ in keys or shapes, one is not finite, or an argument that the method needs is
            missing.
    """
    config = AggregationConfig(method=config) if isinstance(config, str) else config
    members = members if isinstance(members, Mapping) else list(members)
    if not members:
        raise ValueError("there are no members to merge")
    for number, member in enumerate(members):
        if not isinstance(member, Mapping):
            raise ValueError(f"member {number} is {with_article(member)}: give state dicts, as model.state_dict()")
    for name, values in (("sizes", sizes), ("losses", losses), ("statistics", statistics)):
        if values is not None and len(values) != len(members):
            raise ValueError(f"{name} has {len(values)} entries for {len(members)} members: give one each")
    weights = [{key: value.detach().cpu() for key, value in member.items()} for member in members]
    needs = method_of(config).needs
    if losses is None and score is not None and needs.validation:
        losses = [score(member) for member in weights]
    if losses is None and needs.validation:
        raise ValueError(f"{config.method} needs held-out losses: give losses, or a score of any weights")
    averaged = averaged_names(network) if network is not None else _differing(weights)
    minima = [
        Minimum(
            subset_id=number,
            num_examples=sizes[number] if sizes else 1,
            start_id="given" if needs.shared_start else str(number),
            validation=_metrics(losses[number]) if losses is not None else None,
            load_weights=partial(dict, member),
            load_outputs=_no_outputs,
            load_statistics=partial(_statistics, statistics[number] if statistics else {}),
            averaged=averaged,
        )
        for number, member in enumerate(weights)
    ]

    def measure(candidate: Weights) -> Metrics:
        if score is None:
            raise ValueError(f"{config.method} tries new weights: give score, the held-out loss of any weights")
        return _metrics(score(candidate))

    def align(minima: Sequence[Minimum]) -> Aggregate:
        from raysubset.aggregation.alignment import aligned_soup  # scipy is slow to import, and rarely needed

        if network is None or examples is None:
            raise ValueError("aligned_soup needs network, and examples=(inputs, labels) on which it aligns")
        inputs, labels = examples
        with torch.no_grad():
            num_outputs = network(inputs[:2]).shape[1]
        task = Classification(TensorInputs(tuple(inputs.shape[1:])), tuple(map(str, range(num_outputs))))
        sample = Examples({"inputs": inputs.to(torch.float32), "label": labels}, task)
        return aligned_soup(minima, network, sample, MinimizeConfig(), matching=config.matching, repair=config.repair)

    names = trainable_names(network) if network is not None else _parameters(weights[0])
    context = Context(
        start={key: value.detach().cpu() for key, value in start.items()} if start is not None else None,
        parameter_names=frozenset(names),
        score=measure,
        align=align,
        seed=seed,
        tied=tied_names(members[0] if network is None else network.state_dict(keep_vars=True)),
    )
    return combine_in(context, minima, config).weights


def _metrics(loss: float) -> Metrics:
    return Metrics(float(loss), 1, {}, {})


def _parameters(weights: Weights) -> Collection[str]:
    """Return the keys of the parameters, without a network to tell: all floating ones except running statistics."""
    return [key for key, value in weights.items() if value.is_floating_point() and not key.endswith(_STATISTICS)]


def _differing(members: Sequence[Weights]) -> frozenset[str]:
    """Return the keys in which members differ. Others stay as they are, such as masks of -inf."""
    first, *others = members
    alike = {k for k in first if others and all(k in other and torch.equal(first[k], other[k]) for other in others)}
    return frozenset(first.keys() - alike)


def _statistics(by_kind: Mapping[str, Weights], kind: str) -> Weights:
    if kind not in by_kind:
        raise ValueError(f'the method needs {kind} statistics of each member: give statistics=[{{"{kind}": …}}, …]')
    return by_kind[kind]


def _no_outputs() -> NoReturn:
    raise ValueError("merge() has only weights, and no outputs of members on validation data")
