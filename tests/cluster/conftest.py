"""What all tests that start Ray share."""

import pytest


@pytest.fixture(autouse=True)
def no_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a pool in this process try lost work again at once, where it would wait for seconds."""
    from raysubset.subset_actors import crew

    monkeypatch.setattr(crew, "FIRST_BACKOFF_S", 0.05)
