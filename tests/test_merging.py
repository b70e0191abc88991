"""merge(): state dicts made one without a run, against torch's own averages and closed forms."""

import pytest
import torch
from torch import nn

from raysubset.aggregation import merge
from raysubset.config import AggregationConfig


def member(seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).state_dict()


MEMBERS = [member(seed) for seed in range(3)]


def test_a_uniform_soup_is_swa_utils_average():
    models = [nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)) for _ in MEMBERS]
    for model, weights in zip(models, MEMBERS, strict=True):
        model.load_state_dict(weights)
    average = torch.optim.swa_utils.AveragedModel(models[0])
    for model in models:
        average.update_parameters(model)
    merged = merge(MEMBERS)
    for key, value in average.module.named_parameters():
        torch.testing.assert_close(merged[key], value.detach(), rtol=1e-6, atol=1e-7)


def test_complex_numbers_are_averaged_and_must_be_finite():
    members = [{"w": torch.tensor([1 + 1j, number])} for number in (2j, 4 + 0j)]
    assert merge(members)["w"].tolist() == [1 + 1j, 2 + 1j]
    with pytest.raises(ValueError, match="subset 1 holds NaN or infinity in w"):
        merge([members[0], {"w": torch.tensor([1 + 1j, complex(0, float("nan"))])}])


class Tied(nn.Module):
    """An embedding whose vectors are the weights of the output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 4), nn.Linear(4, 5)
        self.head.weight = self.embedding.weight


@pytest.mark.parametrize("method", ["dare", "regmean"])
def test_tied_weights_have_the_value_that_a_network_has_of_them_when_it_is_loaded(method):
    torch.manual_seed(1)
    networks, rows = [Tied() for _ in range(3)], torch.randn(3, 9, 5)
    grams = [{"gram": {"head": (x.T @ x).unsqueeze(0)}} for x in rows]
    members, start = [network.state_dict() for network in networks], Tied().state_dict()
    merged = merge(members, method, start=start, statistics=grams)
    assert torch.equal(merged["embedding.weight"], merged["head.weight"])
    apart = [{key: value.clone() for key, value in state.items()} for state in members]  # nothing tells that they are
    two = merge(apart, method, start=start, statistics=grams)
    assert not torch.equal(two["embedding.weight"], two["head.weight"])
    networks[0].load_state_dict(two)
    assert torch.equal(merged["head.weight"], networks[0].head.weight)
    told = merge(apart, method, start=start, statistics=grams, network=networks[1])
    assert all(torch.equal(told[key], value) for key, value in merged.items())


def test_a_weighted_soup_goes_by_sizes():
    merged = merge(MEMBERS[:2], "weighted_soup", sizes=[3, 1])
    expected = 0.75 * MEMBERS[0]["0.weight"] + 0.25 * MEMBERS[1]["0.weight"]
    torch.testing.assert_close(merged["0.weight"], expected)


def test_a_greedy_soup_takes_what_helps_by_the_score_given():
    target = (MEMBERS[0]["0.weight"] + MEMBERS[2]["0.weight"]) / 2

    def score(weights):
        return (weights["0.weight"] - target).square().sum().item()

    merged = merge(MEMBERS, "greedy_soup", score=score)
    torch.testing.assert_close(merged["0.weight"], target)


def test_the_best_is_selected_by_losses():
    assert torch.equal(merge(MEMBERS, "select_best", losses=[0.3, 0.1, 0.2])["2.weight"], MEMBERS[1]["2.weight"])


def test_fisher_of_quadratic_losses_is_their_joint_minimum():
    one, two = ({"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([3.0, -2.0])})
    curvatures = [torch.tensor([1.0, 3.0]), torch.tensor([3.0, 1.0])]
    merged = merge([one, two], "fisher", statistics=[{"fisher": {"w": each}} for each in curvatures])
    shares = [each / each.sum() * 2 for each in curvatures]
    expected = (shares[0] * one["w"] + shares[1] * two["w"]) / (shares[0] + shares[1])
    torch.testing.assert_close(merged["w"], expected, rtol=1e-3, atol=1e-3)


def test_ties_of_equal_task_vectors_is_the_member():
    start = {key: torch.zeros_like(value) for key, value in MEMBERS[0].items()}
    config = AggregationConfig(method="ties", ties_density=1.0)
    merged = merge([MEMBERS[0], MEMBERS[0]], config, start=start)
    torch.testing.assert_close(merged["0.weight"], MEMBERS[0]["0.weight"])


def test_alignment_undoes_a_permutation_of_units():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    order = torch.randperm(8)
    one = {key: value.clone() for key, value in network.state_dict().items()}
    two = {"0.weight": one["0.weight"][order], "0.bias": one["0.bias"][order], "2.bias": one["2.bias"]}
    two["2.weight"] = one["2.weight"][:, order]
    inputs = torch.randn(64, 5)
    merged = merge([one, two], "aligned_soup", network=network, examples=(inputs, torch.arange(64) % 3))
    network.load_state_dict(one)
    expected = network(inputs)
    network.load_state_dict(merged)
    torch.testing.assert_close(network(inputs), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        ("greedy_soup", {"losses": [1.0, 2.0, 3.0]}, "give score"),
        ("select_best", {}, "give losses"),
        ("fisher", {}, "fisher statistics"),
        ("weighted_soup", {"sizes": [1]}, "1 entries for 3 members"),
        ("aligned_soup", {}, "needs network"),
        ("nonsense", {}, "nonsense"),
    ],
)
def test_what_a_method_lacks_is_said(method, options, words):
    with pytest.raises(ValueError, match=words):
        merge(MEMBERS, method, **options)


def test_a_users_method_that_asks_for_outputs_is_told_that_there_are_none(tmp_path, monkeypatch):
    (tmp_path / "asking.py").write_text("def outputs(minima, context):\n    return minima[0].load_outputs()\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"asking:outputs.* merge\(\) has only weights"):
        merge([{"w": torch.zeros(2)}, {"w": torch.ones(2)}], "asking:outputs", start={"w": torch.zeros(2)})


def test_members_may_be_any_iterable_of_state_dicts():
    members = [{"w": torch.zeros(2)}, {"w": torch.ones(2)}]
    assert merge(iter(members))["w"].tolist() == [0.5, 0.5]  # pyright: ignore[reportArgumentType]


def test_networks_in_place_of_their_weights_are_refused_with_what_to_give():
    with pytest.raises(ValueError, match=r"^member 0 is a Linear: give state dicts, as model.state_dict\(\)"):
        merge([nn.Linear(3, 2)])  # pyright: ignore[reportArgumentType]
