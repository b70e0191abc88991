"""What members send: errors within the bounds that the formats have, and nothing lost where they have none."""

import pytest
import torch

from raysubset.aggregation import from_differences, to_differences


def weights_and_start() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    start = {
        "weight": torch.randn(64, 32, generator=generator),
        "still": torch.ones(5),
        "tiny": torch.zeros(3),
        "empty": torch.ones(0, 2),
        "half": torch.ones(4, dtype=torch.bfloat16),
        "running_var": torch.full((6,), 1e-3),
        "num_batches": torch.tensor(3),
    }
    weights = {name: value.clone() for name, value in start.items()}
    weights["weight"] += 0.01 * torch.randn(64, 32, generator=generator)
    weights["tiny"] += torch.tensor([1e-42, -1e-42, 0.0])  # subnormal
    weights["half"] += 0.5
    weights["running_var"] *= 7
    weights["num_batches"] += 4
    return weights, start


PARAMETERS = ("weight", "still", "tiny", "empty", "half")


@pytest.mark.parametrize("send", ["bfloat16", "int8"])
def test_what_is_sent_is_off_by_no_more_than_its_format_and_all_but_parameters_by_nothing(send) -> None:
    weights, start = weights_and_start()
    received = from_differences(to_differences(weights, start, PARAMETERS, send), start)
    assert list(received) == list(weights)
    difference, error = weights["weight"] - start["weight"], (received["weight"] - weights["weight"]).abs()
    rounding = 2**-23 * weights["weight"].abs()  # of float32, in the difference and in the sum
    bound = difference.abs() * 2**-8 if send == "bfloat16" else difference.abs().max() / 127 / 2
    assert (error <= 1.001 * bound + rounding).all()
    assert error.max() > 0
    assert (received["tiny"] - weights["tiny"]).abs().max() <= 1e-42
    for name in ("still", "empty", "half", "running_var", "num_batches"):
        assert torch.equal(received[name], weights[name])
        assert received[name].dtype == weights[name].dtype


@pytest.mark.parametrize(("send", "share"), [("bfloat16", 1 / 2), ("int8", 1 / 4)])
def test_sent_parameters_take_their_share_of_the_bytes(send, share) -> None:
    weights, start = weights_and_start()
    packed = to_differences({"weight": weights["weight"]}, start, PARAMETERS, send)
    assert sum(value.nbytes for value in packed.values()) - 4 <= share * weights["weight"].nbytes


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_arrive_as_they_are(bad) -> None:
    weights, start = weights_and_start()
    weights["weight"][3, 3] = bad
    received = from_differences(to_differences(weights, start, PARAMETERS, "int8"), start)
    torch.testing.assert_close(received["weight"], weights["weight"], rtol=0, atol=0, equal_nan=True)
