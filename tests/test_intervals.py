"""`intervals.py` against the definitions: binomial sums, the equation behind Wilson's interval, all resamplings."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest

from multicoco.evaluation.intervals import mcnemar, mean_interval, paired_bootstrap, wilson_interval


# --- Wilson ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 7, 100, 12345])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_wilson_bounds_are_the_rates_that_lie_just_196_deviations_away(share, count):
    """The definition: all p whose standard score (rate - p) / sqrt(p (1 - p) / n) is at most 1.96 in size."""
    rate = round(share * count) / count
    low, high = wilson_interval(rate, count)
    assert 0 <= low <= rate <= high <= 1
    for bound in (low, high):
        if 0 < bound < 1:
            assert abs(rate - bound) == pytest.approx(1.96 * math.sqrt(bound * (1 - bound) / count), rel=1e-9)
    assert (low == 0) == (rate == 0)
    assert (high == 1) == (rate == 1)


def test_wilson_interval_of_a_known_case():
    """9 of 10: 0.5958 to 0.9821 by Newcombe's method 3 (1998)."""
    low, high = wilson_interval(0.9, 10)
    assert (round(low, 4), round(high, 4)) == (0.5958, 0.9821)


def test_wilson_interval_turns_over_with_the_rate():
    low, high = wilson_interval(0.3, 40)
    assert wilson_interval(0.7, 40) == pytest.approx((1 - high, 1 - low))


def test_wilson_interval_covers_the_truth_about_as_often_as_it_says():
    """The exact probability, by the binomial distribution, that the interval of 50 samples holds a true rate."""
    for truth in (0.1, 0.3, 0.5, 0.8):
        covered = sum(
            math.comb(50, right) * truth**right * (1 - truth) ** (50 - right)
            for right in range(51)
            if wilson_interval(right / 50, 50)[0] <= truth <= wilson_interval(right / 50, 50)[1]
        )
        assert 0.93 <= covered <= 0.98


# --- McNemar -----------------------------------------------------------------------------------------------------


def brute_mcnemar(only_first, only_second):
    """The share of all ways to deal out the discordant samples that are at least as uneven, counted one by one."""
    count = only_first + only_second
    seen = abs(only_first - only_second)
    ways = itertools.product((0, 1), repeat=count)
    return Fraction(sum(abs(count - 2 * sum(way)) >= seen for way in ways), 2**count)


def outcomes(only_first, only_second, both=3, neither=2):
    first = [True] * only_first + [False] * only_second + [True] * both + [False] * neither
    second = [False] * only_first + [True] * only_second + [True] * both + [False] * neither
    return first, second


@pytest.mark.parametrize("only_first", range(6))
@pytest.mark.parametrize("only_second", range(6))
def test_mcnemar_equals_counting_all_ways(only_first, only_second):
    expected = float(brute_mcnemar(only_first, only_second))
    assert mcnemar(*outcomes(only_first, only_second)) == pytest.approx(expected, rel=1e-12)


def test_mcnemar_reads_only_the_samples_that_differ_and_no_order():
    first, second = outcomes(7, 2)
    order = np.random.default_rng(0).permutation(len(first))
    shuffled = mcnemar([first[place] for place in order], [second[place] for place in order])
    assert shuffled == mcnemar(*outcomes(7, 2, both=90, neither=0)) == mcnemar(*outcomes(2, 7))


def test_mcnemar_of_many_samples_is_no_rounding_error():
    """0.5**1100 is 0 in floating point; the exact sum by integers is not."""
    only_first, only_second = 500, 600
    tail = sum(math.comb(1100, k) for k in range(only_first + 1))
    expected = float(Fraction(2 * tail, 2**1100))
    assert mcnemar(*outcomes(only_first, only_second)) == pytest.approx(expected, rel=1e-9)
    assert 0.001 < expected < 0.01


# --- bootstrap ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second"),
    [([1, 1, 0, 1, 0], [0, 1, 0, 0, 1]), ([1 / 3, 1, 0, 2 / 3, 1], [0, 1 / 3, 1, 0, 2 / 3])],
    ids=["right or wrong", "shares"],
)
@pytest.mark.parametrize("level", [0.95, 0.8])
def test_bootstrap_equals_all_resamplings(first, second, level):
    """All 5**5 ways to draw five pairs again, each as likely, give the exact distribution of the difference."""
    differences = np.subtract(first, second)
    means = np.sort([np.mean(differences[list(way)]) for way in itertools.product(range(5), repeat=5)])
    low, high = paired_bootstrap(first, second, level, draws=200_000)
    for bound, share in ((low, (1 - level) / 2), (high, (1 + level) / 2)):
        # The quantile of the draws lies between two of the exact distribution a hair to either side.
        least, most = np.quantile(means, (share - 0.003, share + 0.003))
        assert least - 1e-9 <= bound <= most + 1e-9
    assert low < np.mean(differences) < high


def test_bootstrap_keeps_pairs_together():
    """Two that always differ by the same have no spread, however much each of them has."""
    first = np.random.default_rng(0).random(50)
    low, high = paired_bootstrap(first, first - 0.25)
    assert (low, high) == pytest.approx((0.25, 0.25))


def test_bootstrap_of_many_samples_is_the_normal_interval():
    generator = np.random.default_rng(1)
    first, second = generator.random(4000) < 0.7, generator.random(4000) < 0.6
    differences = first.astype(float) - second
    half = 1.96 * differences.std() / math.sqrt(4000)
    low, high = paired_bootstrap(first, second)
    assert low == pytest.approx(differences.mean() - half, abs=0.002)
    assert high == pytest.approx(differences.mean() + half, abs=0.002)


def test_bootstrap_turns_over_and_repeats_with_its_seed():
    first, second = [1, 1, 0, 1, 0, 0, 1, 1], [0, 1, 0, 0, 1, 0, 1, 0]
    low, high = paired_bootstrap(first, second)
    assert paired_bootstrap(first, second) == (low, high)
    assert paired_bootstrap(second, first) == pytest.approx((-high, -low), abs=1 / 8)
    assert paired_bootstrap(first, first) == (0.0, 0.0)


# --- errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [mcnemar, paired_bootstrap], ids=["mcnemar", "paired_bootstrap"])
@pytest.mark.parametrize(("first", "second"), [([True], [True, False]), ([], [])], ids=["lengths", "empty"])
def test_samples_that_are_no_pairs_are_refused(function, first, second):
    with pytest.raises(ValueError, match=f"`first` has {len(first)} samples and `second` {len(second)}"):
        function(first, second)


# --- the mean of several seeds -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "quantile"), [(2, 12.7062), (3, 4.3027), (4, 3.1824), (10, 2.2622), (101, 1.9840)], ids=str
)
def test_mean_interval_has_students_quantiles(count, quantile):
    """Quantiles at 0.975 as tables of Student's distribution print them."""
    values = np.random.default_rng(count).normal(size=count)
    low, high = mean_interval(values)
    error = values.std(ddof=1) / math.sqrt(count)
    assert (low + high) / 2 == pytest.approx(values.mean())
    assert (high - low) / 2 == pytest.approx(quantile * error, rel=2e-5)


def test_mean_interval_holds_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    held = [low <= 3 <= high for low, high in (mean_interval(rng.normal(3, 2, size=3), 0.8) for _ in range(600))]
    assert np.mean(held) == pytest.approx(0.8, abs=0.05)


def test_one_value_has_no_interval():
    with pytest.raises(ValueError, match="`values` has 1 entries"):
        mean_interval([0.5])
