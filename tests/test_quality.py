"""Quality: what verdicts go by reads in its own unit and direction."""

import math

import pytest

from raysubset.quality import ACCURACY, Quality, metrics_in_words, quality_of

BITS = Quality("bits", higher_is_better=False, unit="bits a token")
RMSE = Quality("rmse", higher_is_better=False, unit="mg/dl")
R2 = Quality("r2")


def test_a_share_is_shown_in_per_cent_and_others_in_their_unit():
    assert [q.show(0.25) for q in (ACCURACY, BITS, RMSE, R2)] == ["25.00%", "0.25 bits a token", "0.25 mg/dl", "0.25"]
    assert [q.number(0.25) for q in (ACCURACY, BITS)] == ["25.00", "0.25"]
    changes = [q.change(-0.25) for q in (ACCURACY, BITS, RMSE, R2)]
    assert changes == ["accuracy -25.00 points", "-0.25 bits a token", "rmse -0.25 mg/dl", "r2 -0.25"]
    assert ACCURACY.show(None) == R2.show(math.nan) == "-"
    assert [quality.number(-0.0, sign="+") for quality in (ACCURACY, BITS)] == ["+0.00", "+0"]  # no -0


@pytest.mark.parametrize(
    ("quality", "label", "heading", "phrase"),
    [
        (ACCURACY, "accuracy, %", "accuracy", "accuracy 50.00%"),
        (BITS, "bits a token", "bits a token", "0.5 bits a token"),  # the unit has the name in it
        (RMSE, "rmse, mg/dl", "rmse, mg/dl", "rmse 0.5 mg/dl"),
        (R2, "r2", "r2", "r2 0.5"),
    ],
)
def test_a_title_and_a_sentence_have_the_name_once(quality: Quality, label: str, heading: str, phrase: str):
    assert (quality.label, quality.heading, quality.phrase(0.5)) == (label, heading, phrase)


def test_more_gain_is_better_whatever_the_direction():
    assert max([1.8, 1.7], key=BITS.gain) == 1.7
    assert max([0.8, 0.7], key=R2.gain) == 0.8


def test_a_record_names_its_quality_and_one_of_before_tasks_is_of_accuracy():
    assert quality_of({"task": {"name": "next_token", "quality": BITS.to_dict()}}) == BITS
    assert quality_of({}) is ACCURACY


def test_metrics_are_told_with_a_loss_that_was_not_finite_and_with_a_loss_that_is_the_quality():
    assert metrics_in_words({"loss": 0.5, "accuracy": 0.75}, ACCURACY) == "loss 0.5000, accuracy 75.00%"
    assert metrics_in_words({"loss": None, "bits": None}, BITS) == "loss not finite, -"
    assert metrics_in_words({"loss": 0.5}, Quality("loss", higher_is_better=False)) == "loss 0.5000"
