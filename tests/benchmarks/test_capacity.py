"""The capacity model against textbook queues, and against its own simulation."""

import pytest

from benchmarks.queueing import (
    Engine,
    Work,
    engines_needed,
    highest_rate,
    mean_seconds,
    simulate,
    summarise,
)

ONE = Engine(base=0.01, row=0.0, prompt_token=0.0, max_rows=1)
SHARED = Engine(base=0.01, row=0.0, prompt_token=0.0, max_rows=1000)
BOTH = Engine(base=0.01, row=0.001, prompt_token=1e-4, max_rows=16)


def test_one_server() -> None:
    """M/M/1: 1 / (μ - λ)."""
    assert highest_rate(ONE, Work(0, 50)) == pytest.approx(2)
    assert mean_seconds(ONE, Work(0, 50), 1.5) == pytest.approx(1 / (2 - 1.5) + 0.005)


def test_as_many_servers_as_one_likes() -> None:
    """M/G/∞: no request waits."""
    assert mean_seconds(SHARED, Work(0, 50), 20) == pytest.approx(0.5 + 0.005)


def test_reading_holds_up_the_rest() -> None:
    engine = Engine(base=0.01, row=0.0, prompt_token=0.001, max_rows=1)
    work = Work(prompt=100, answer=50, judged=100)
    assert highest_rate(engine, work) == pytest.approx(1 / (0.5 + 0.2))
    # At one request a second a fifth of the time goes to reading: an answer takes 0.5 / 0.8, and so does reading.
    unloaded = mean_seconds(engine, work, 1e-9)
    assert unloaded == pytest.approx(0.5 + 0.2 + 0.005)
    assert mean_seconds(engine, work, 1) == pytest.approx(1 / (1.6 - 1) + 0.25 + 0.005)


def test_beyond_what_it_bears() -> None:
    with pytest.raises(ValueError, match="one engine bears 2 requests a second"):
        mean_seconds(ONE, Work(0, 50), 2)


def test_engines() -> None:
    assert engines_needed(ONE, Work(0, 50), 1, 0.8) == 1
    assert engines_needed(ONE, Work(0, 50), 16, 0.8) == 10
    assert engines_needed(ONE, Work(0, 50), 16.1, 0.8) == 11


@pytest.mark.parametrize("samples", [1, 4])
def test_the_simulation_agrees(samples: int) -> None:
    """Seeded. The tolerance is 6 standard errors of the mean, and 7 % for what the formula leaves out."""
    work = Work(prompt=20, answer=40, samples=samples, judged=100 * (samples > 1))
    rate = 0.7 * highest_rate(BOTH, work)
    mean, error, percentile_95 = summarise(simulate(BOTH, work, rate, 4000, seed=0))
    expected = mean_seconds(BOTH, work, rate)
    assert abs(mean - expected) < 6 * error + 0.07 * expected
    assert percentile_95 > 1.5 * mean


def test_a_simulated_request_alone() -> None:
    """It takes as long as its tokens take: the lengths have the right mean."""
    seconds = simulate(SHARED, Work(0, 50), 0.001, 4000, seed=1)
    mean, error, _ = summarise(seconds)
    assert abs(mean - 0.5) < 6 * error
