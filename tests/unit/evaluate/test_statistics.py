"""Intervals of a difference on the same rows: exact where scores are 0 or 1, and never narrower than they may be."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from phlora.evaluate import statistics
from phlora.evaluate.statistics import (
    MIN_ROWS,
    exact_interval,
    mcnemar_p_value,
    paired_bootstrap,
    paired_interval,
)

OUTCOMES = [(b, c, n) for n in (1, 2, 5, 10) for b in range(n + 1) for c in range(n + 1 - b)]


class TestExactInterval:
    @pytest.mark.parametrize("num_rows", [1, 2, 3, 5, 8, 12])
    def test_it_covers_every_true_difference_at_least_as_often_as_it_says(self, num_rows: int) -> None:
        """By enumeration: over all outcomes, at a grid of true shares of improved and worsened rows."""
        shares = np.linspace(0, 1, 13)
        for up in shares:
            for down in shares[shares <= 1 - up + 1e-12]:
                covered = 0.0
                for improved in range(num_rows + 1):
                    for worsened in range(num_rows + 1 - improved):
                        counts = [improved, worsened, num_rows - improved - worsened]
                        interval = exact_interval(improved, worsened, num_rows)
                        if interval.low <= up - down + 1e-9 and up - down - 1e-9 <= interval.high:
                            same = max(0.0, 1 - up - down)
                            covered += stats.multinomial.pmf(counts, num_rows, [up, down, same])
                assert covered >= 0.95 - 1e-9, (up, down)

    @pytest.mark.parametrize(("improved", "worsened", "num_rows"), OUTCOMES)
    def test_it_is_never_narrow_and_always_around_what_was_seen(
        self, improved: int, worsened: int, num_rows: int
    ) -> None:
        interval = exact_interval(improved, worsened, num_rows)
        assert -1 <= interval.low <= (improved - worsened) / num_rows <= interval.high <= 1
        # Clopper and Pearson's bound of the share of all rows that do what no seen row did.
        assert interval.high - interval.low >= 1 - 0.025 ** (1 / num_rows) - 1e-6

    def test_two_rows_that_turned_right_say_next_to_nothing(self) -> None:
        interval = exact_interval(2, 0, 2)
        assert interval.low < 0 and interval.high == 1 and interval.p_value == 0.5

    def test_it_mirrors(self) -> None:
        one, other = exact_interval(7, 2, 30), exact_interval(2, 7, 30)
        assert (one.low, one.high) == (-other.high, -other.low)

    def test_the_score_interval_is_the_published_one(self) -> None:
        """Fagerland, Lydersen and Laake, Stat. Med. 33, 2014: airway hyper-responsiveness, 1 and 7 of 21."""
        low = statistics._score_lower_limit(1, 7, 21, 0.025)
        high = -statistics._score_lower_limit(7, 1, 21, 0.025)
        assert (low, high) == pytest.approx((-0.517, -0.026), abs=5e-4)

    def test_above_the_exact_sizes_it_goes_on_without_a_jump(self) -> None:
        exact, score = exact_interval(20, 5, 100), exact_interval(20, 5, 101)
        assert (exact.method, score.method) == ("exact", "score")
        assert (score.low, score.high) == pytest.approx((exact.low, exact.high), abs=0.015)

    def test_the_mcnemar_test_is_the_sign_test_of_the_changed_rows(self) -> None:
        assert mcnemar_p_value(6, 0) == pytest.approx(2 * 0.5**6)
        assert mcnemar_p_value(3, 3) == mcnemar_p_value(0, 0) == 1.0
        tail = sum(math.comb(9, k) for k in (0, 1, 2)) / 2**9
        assert mcnemar_p_value(7, 2) == mcnemar_p_value(2, 7) == pytest.approx(2 * tail)


class TestPairedInterval:
    def test_scores_of_0_and_1_get_the_exact_one(self) -> None:
        interval = paired_interval([0, 0, 1.0, 1], [1, 1, 0.0, 1])
        assert interval == exact_interval(2, 1, 4)

    def test_other_scores_of_few_rows_get_none(self) -> None:
        few = [0.1 * index for index in range(MIN_ROWS - 1)]
        assert paired_interval(few, [value**2 for value in few]) is None
        assert paired_interval([2.0], [1.0], is_share=False) is None

    def test_other_scores_of_more_rows_get_a_bootstrap(self) -> None:
        base = [0.05 * index for index in range(MIN_ROWS)]
        interval = paired_interval(base, [value**2 for value in base])
        assert interval and interval.method == "bootstrap" and interval.num_rows == MIN_ROWS

    def test_rows_that_all_change_alike_have_no_width_zero(self) -> None:
        interval = paired_interval([0.25] * 40, [0.5] * 40)
        assert interval and interval.method == "bound"
        assert interval.low < 0.25 - 0.08 and interval.high > 0.25 + 0.06
        assert paired_interval([2.0] * 40, [1.0] * 40, is_share=False) is None

    def test_the_bootstrap_of_few_rows_covers_what_it_says(self) -> None:
        """Differences of a normal distribution, ten rows: the plain percentile bootstrap covers 90 %."""
        generator = np.random.default_rng(0)
        covered = 0
        for seed in range(400):
            differences = generator.normal(size=MIN_ROWS)
            interval = paired_interval([0.0] * MIN_ROWS, list(differences), is_share=False, seed=seed)
            covered += interval is not None and interval.low <= 0 <= interval.high
        assert covered / 400 >= 0.93


class TestPairedBootstrap:
    def test_interval_of_a_known_distribution(self) -> None:
        generator = np.random.default_rng(3)
        base = generator.normal(size=400)
        tuned = base + generator.normal(loc=0.5, scale=1.0, size=400)
        interval = paired_bootstrap(base, tuned)
        assert interval.mean_difference == pytest.approx(np.mean(tuned - base))
        # The normal approximation of the same interval.
        half = 1.96 * np.std(tuned - base, ddof=1) / 20
        assert interval.low == pytest.approx(interval.mean_difference - half, abs=0.02)
        assert interval.high == pytest.approx(interval.mean_difference + half, abs=0.02)
        assert interval.low > 0

    def test_pairing_removes_what_rows_have_in_common(self) -> None:
        base = np.arange(50.0) * 100
        interval = paired_bootstrap(base, base + 1)
        assert (interval.mean_difference, interval.low, interval.high) == (1, 1, 1)

    def test_same_seed_same_interval(self) -> None:
        base, tuned = [0, 0, 1, 0, 1, 0], [1, 0, 1, 1, 0, 1]
        assert paired_bootstrap(base, tuned, seed=5) == paired_bootstrap(base, tuned, seed=5)
        interval = paired_bootstrap(base, tuned)
        assert interval.low <= 0 <= interval.high

    def test_drawing_in_blocks_changes_nothing_but_memory(self, monkeypatch) -> None:
        base, tuned = [0.0, 1.0, 0.0, 0.5], [1.0, 0.5, 0.25, 1.0]
        whole = paired_bootstrap(base, tuned, num_resamples=50)
        monkeypatch.setattr("phlora.evaluate.statistics._MAX_DRAWN", 12)
        assert paired_bootstrap(base, tuned, num_resamples=50) == whole

    def test_weights_make_a_weighted_mean(self) -> None:
        interval = paired_bootstrap([0, 0], [1, 4], weights=[3, 1])
        assert interval.mean_difference == pytest.approx(7 / 4)

    @pytest.mark.parametrize(("base", "tuned"), [([], []), ([1.0], [1.0, 2.0])])
    def test_scores_that_are_no_pairs(self, base, tuned) -> None:
        with pytest.raises(ValueError, match="paired"):
            paired_bootstrap(base, tuned)
