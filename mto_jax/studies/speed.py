"""How fast a pre-training method learns, against its baseline: epochs-to-match, RAUC, paired intervals over seeds.

The paper names RAUC and does not publish its definition; both measures are this project's own (docs/method.md).
"""

from collections.abc import Sequence

import numpy as np
from scipy import stats


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


def match_interval(
    budgets: Sequence[float], values: np.ndarray, baseline: np.ndarray, draws: int = 2000
) -> tuple[float, float, float]:
    """Epochs-to-match of the mean curves, and a 95% interval from resampling paired seeds.

    Args:
      values, baseline: final values (seeds, budgets); the target is the baseline's mean at the last budget.

    Returns:
      (estimate, low, high); infinity where the target is not reached.
    """
    rng = np.random.default_rng(0)

    def of(rows):
        return epochs_to_match(budgets, values[rows].mean(0), baseline[rows].mean(0)[-1])

    count = len(values)
    found = np.sort([of(rng.integers(count, size=count)) for _ in range(draws)])
    low, high = found[int(0.025 * draws)], found[int(0.975 * draws) - 1]
    return of(np.arange(count)), float(low), float(high)
