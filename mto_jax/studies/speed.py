"""How fast a pre-training method learns, against its baseline: half the epochs, epochs-to-match, RAUC, with intervals.

The paper names RAUC and does not publish its definition; all measures are this project's own (docs/method.md).
"""

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

MARGIN = 0.003  # of an accuracy: what counts as no worse, and as still learning


def epochs_to_match(budgets: Sequence[float], values: Sequence[float], target: float) -> float:
    """The smallest budget at which final values reach `target`, relative to the largest budget.

    Between two budgets the value is taken to be linear in the logarithm of the epochs. Infinity: not reached. A target
    that the smallest budget reaches gives that budget's fraction: read it as "at most".

    Args:
      budgets: epochs, ascending, each of a run with its own full schedule.
      values: final value of each run; NaN where it is missing.
    """
    points = [(np.log(b), v) for b, v in zip(budgets, values, strict=True) if not np.isnan(v)]
    for i, (x, v) in enumerate(points):
        if v >= target:
            if i:
                x0, v0 = points[i - 1]
                x = x0 + (target - v0) / (v - v0) * (x - x0)
            return float(np.exp(x) / budgets[-1])
    return float('inf')


def testable(half: Sequence[float], full: Sequence[float]) -> bool:
    """Whether a baseline still learns: the mean gain from E/2 to E exceeds two standard errors, over paired seeds."""
    gain = np.asarray(full) - np.asarray(half)
    return bool(len(gain) > 1 and gain.mean() > 2 * gain.std(ddof=1) / np.sqrt(len(gain)))


def rauc(epochs: Sequence[float], values: Sequence[float], baseline: Sequence[float], start: float) -> float:
    """Relative area under the curve: the integral of (m - m0) over epochs, divided by the baseline's.

    Args:
      epochs: where both were evaluated, ascending.
      values, baseline: of the method and of its baseline; points where either is NaN are left out of both.
      start: m0, the value of a randomly initialised network.
    """
    e, m, b = (np.asarray(x, float) for x in (epochs, values, baseline))
    there = ~(np.isnan(m) | np.isnan(b))
    if there.sum() < 2:
        return float('nan')
    return float(np.trapezoid(m[there] - start, e[there]) / np.trapezoid(b[there] - start, e[there]))


def paired(values: Sequence[float], baseline: Sequence[float]) -> tuple[float, float]:
    """Mean difference over paired seeds, and the half-width of its 95% t interval (NaN for a single pair)."""
    d = np.asarray(values, float) - np.asarray(baseline, float)
    n = len(d)
    half = stats.t.ppf(0.975, n - 1) * d.std(ddof=1) / np.sqrt(n) if n > 1 else np.nan
    return float(d.mean()), float(half)


def verdict(values: Sequence[float], half: Sequence[float], full: Sequence[float]) -> str:
    """Whether half the epochs suffice, by final values of paired seeds.

    'reproduced': the lower end of the method's 95% interval against the baseline of all epochs is above -0.3 points.
    'not testable': the baseline itself gains at most 0.3 points from the second half. 'partly': the method is ahead of
    the baseline of the same epochs by more than its interval. 'not': none of these. 'diverged': a value is NaN.

    Args:
      values: of the method at E/2.
      half, full: of the baseline at E/2 and at E.
    """
    if np.isnan([*values, *half, *full]).any():
        return 'diverged'
    if np.mean(full) - np.mean(half) <= MARGIN:
        return 'not testable'
    behind, half_width = paired(values, full)
    if behind - half_width > -MARGIN:
        return 'reproduced'
    ahead, half_width = paired(values, half)
    return 'partly' if ahead > half_width else 'not'


def match_interval(budgets: Sequence[float], values: np.ndarray, baseline: np.ndarray) -> tuple[float, float, float]:
    """Epochs-to-match of the mean curve, and where the ends of the 95% t intervals reach the target.

    The intervals are those of the paired differences from the baseline's value at the last budget, one per budget.

    Args:
      values, baseline: final values (seeds, budgets); the target is the baseline's mean at the last budget.

    Returns:
      (estimate, low, high); infinity where the target is not reached, NaN for the ends with a single seed.
    """
    mean, half = np.array([paired(v, baseline[:, -1]) for v in values.T]).T
    if len(values) < 2:
        return epochs_to_match(budgets, mean, 0.0), math.nan, math.nan
    return tuple(epochs_to_match(budgets, mean + shift, 0.0) for shift in (0.0, half, -half))


def rauc_interval(
    epochs: Sequence[float], values: np.ndarray, baseline: np.ndarray, start: float
) -> tuple[float, float, float]:
    """RAUC of the mean curves, and its 95% t interval by the jackknife over paired seeds: (estimate, low, high).

    Args:
      values, baseline: (seeds, epochs).

    Returns:
      NaN for the ends with a single seed.
    """

    def of(seeds):
        return rauc(epochs, values[seeds].mean(0), baseline[seeds].mean(0), start)

    count = len(values)
    everyone = np.arange(count)
    estimate = of(everyone)
    if count < 2:
        return estimate, math.nan, math.nan
    without = np.array([of(np.delete(everyone, i)) for i in everyone])
    half = stats.t.ppf(0.975, count - 1) * np.sqrt((count - 1) * without.var())
    return estimate, float(estimate - half), float(estimate + half)
