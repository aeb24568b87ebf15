"""Which uncertainty sends a sample to the teacher, found on validation data, and what that promises for new samples.

Pure functions over arrays. All promises are for new samples drawn as the n validation samples were.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy.stats import beta

GRID = 10
"""At how many sizes of the accepted set `by_risk` looks."""


@dataclass(frozen=True)
class Threshold:
    """The student's answer stands where uncertainty <= tau, but never where it is 1; a negative tau lets none stand.

    `coverage` is the share of the n validation samples whose answer stands. A budget promises `calls`, the expected
    teacher calls per new sample, and gives the 95% interval of what this one threshold will come to in the long run. A
    risk target promises, with probability `confidence` over validation sets, an error rate of at most `risk` among the
    answers that stand.
    """

    tau: float
    n: int
    coverage: float
    calls: float | None = None
    calls_low: float | None = None
    calls_high: float | None = None
    risk: float | None = None
    confidence: float | None = None


def by_budget(uncertainty: np.ndarray, calls: np.ndarray, budget: float) -> Threshold:
    """The threshold whose expected teacher calls per new sample are the budget.

    With k of n validation samples at or below a threshold that is itself the k-th, a new sample lies above it with
    probability (n + 1 - k) / (n + 1), whatever the distribution (Weibull's plotting position; k / n would be biased).
    Tau is interpolated between these positions, each sample counting with its calls. Equal uncertainties stand or fall
    together: where tau meets a tie, all of it stands, so a tie never costs more than the budget, and may cost much
    less; `calls` says so. A budget below what one sample costs, about 1 / n, lets every answer stand but those of
    uncertainty 1, which never do: where they alone cost more than the budget, `calls` exceeds it.

    The interval is Clopper and Pearson's (Biometrika 26, 1934) for the samples above tau, which for one call each
    holds the exact law of the realised rate, a Beta. Where some samples take two calls, the Beta has the mean and
    variance of their calls instead, which is exact only in the limit of large n.

    Args:
        uncertainty: [n] of the student, in [0, 1].
        calls: [n] 1 or 2, what the teacher would be asked about each sample if it were deferred.
        budget: teacher calls per sample, 0 or more.

    Raises:
        ValueError: no samples, shapes that differ, or a value out of its range.
    """
    uncertainty, calls = _checked(uncertainty, calls=calls)
    if not np.isin(calls, (1, 2)).all():
        raise ValueError("calls must be 1 or 2")
    if not budget >= 0:
        raise ValueError(f"budget is {budget}; it takes 0 or more")
    n = len(uncertainty)
    order = np.argsort(uncertainty)
    costs = np.cumsum(calls[order][::-1]) / (n + 1)  # expected calls with tau at the largest uncertainty, the next, ...
    if budget >= calls.mean():
        tau = -1.0
    elif budget < costs[0]:
        tau = 1.0
    else:
        tau = float(np.interp(budget, costs, uncertainty[order][::-1]))
    above = calls[(uncertainty > tau) | (uncertainty >= 1)]
    coverage = 1 - len(above) / n
    if tau >= 1 and not len(above):
        return Threshold(tau, n, coverage, 0.0, 0.0, 0.0)
    # the law lies between that of the samples above tau and that of one sample more
    one_more = np.append(above, calls.max())
    expected = calls.mean() if tau < 0 else min(budget, one_more.sum() / (n + 1))
    if tau >= 1:
        expected = above.sum() / n
    low = _quantile(0.025, above, n, float(calls.max()))
    high = _quantile(0.975, one_more, n, float(calls.max()))
    if tau < 0:
        low = max(low, 1.0)  # everything is deferred, and each sample takes a call at least
    return Threshold(tau, n, coverage, float(expected), low, high)


def by_risk(uncertainty: np.ndarray, errors: np.ndarray, risk: float, confidence: float = 0.95) -> Threshold:
    """The loosest threshold that keeps the student's error rate among the answers that stand at or below `risk`.

    The guarantee holds with probability `confidence` over validation sets, at every n and for every distribution. For
    a size k fixed beforehand let t be the (k + 1)-th smallest uncertainty. Given t, and how many samples lie below it,
    those are independent draws from all samples below t. So their errors are binomial, and Clopper and Pearson's upper
    bound on the error rate below t fails with probability (1 - confidence) / `GRID` at most. There are `GRID` sizes,
    n / GRID, 2 n / GRID, ..., n, so all bounds hold together with probability `confidence` (Bonferroni), and any
    threshold may be chosen by them; this is Geifman & El-Yaniv (arXiv 1705.08500) with a fixed grid for their search.
    Samples tied with t are left out, whole.

    Args:
        uncertainty: [n] of the student, in [0, 1].
        errors: [n] 0 or 1, whether its answer is wrong.
        risk: in (0, 1].
        confidence: in (0, 1).

    Raises:
        ValueError: these samples cannot support the target; the message names the smallest that they can. Or: no
            samples, shapes that differ, or a value out of its range.
    """
    if not 0 < risk <= 1:
        raise ValueError(f"risk is {risk}; it takes a number above 0 and up to 1")
    taus, accepted, bounds = _bounds(uncertainty, errors, confidence)
    kept = np.flatnonzero(bounds <= risk)
    if not len(kept):
        raise ValueError(
            f"{len(uncertainty)} validation samples cannot support a risk of {risk:g} at a confidence of "
            f"{confidence:g}; the smallest that they support is {smallest_risk(uncertainty, errors, confidence):g}"
        )
    loosest = kept[-1]
    n = len(uncertainty)
    return Threshold(float(taus[loosest]), n, float(accepted[loosest] / n), risk=risk, confidence=confidence)


def smallest_risk(uncertainty: np.ndarray, errors: np.ndarray, confidence: float = 0.95) -> float:
    """The smallest target that `by_risk` supports on these samples, rounded up to three digits; 1 promises nothing.

    Args and errors as for `by_risk`.
    """
    return math.ceil(_bounds(uncertainty, errors, confidence)[2].min() * 1000) / 1000


def _bounds(
    uncertainty: np.ndarray, errors: np.ndarray, confidence: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each size of the grid, ascending: tau, how many samples it accepts, and the upper bound on their risk."""
    uncertainty, errors = _checked(uncertainty, errors=errors)
    kept = uncertainty < 1  # the others never stand; given their number, these are as independent as all were
    uncertainty, errors = uncertainty[kept], errors[kept]
    if not len(errors):
        return np.array([-1.0]), np.array([0]), np.array([1.0])
    if not np.isin(errors, (0, 1)).all():
        raise ValueError("errors must be 0 or 1")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; it takes a number above 0 and below 1")
    n = len(uncertainty)
    order = np.argsort(uncertainty)
    ranked = np.append(uncertainty[order], np.nextafter(1.0, 2.0))  # beyond all samples, so that all can be accepted
    beyond = ranked[np.arange(1, GRID + 1) * n // GRID]
    accepted = np.searchsorted(ranked, beyond)
    wrong = np.append(0, np.cumsum(errors[order]))[accepted]
    # beta is not defined where every accepted answer is wrong; the bound is 1 there
    bounds = np.where(wrong < accepted, beta.ppf(1 - (1 - confidence) / GRID, wrong + 1, accepted - wrong), 1.0)
    return np.nextafter(beyond, -1.0), accepted, bounds


def _quantile(q: float, above: np.ndarray, n: int, most: float) -> float:
    """The q-quantile of the long-run calls per sample, a Beta on [0, most], given what is called for above tau."""
    mean = above.sum() / (n + 1)
    if not 0 < mean < most:
        return float(mean)
    variance = ((above**2).sum() / (n + 1) - mean**2) / (n + 2)
    size = mean * (most - mean) / variance - 1
    return float(most * beta.ppf(q, size * mean / most, size * (1 - mean / most)))


def _checked(uncertainty: np.ndarray, **named: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Uncertainty and one other column [n], in float64."""
    (name, other), *_ = named.items()
    uncertainty, other = np.asarray(uncertainty, dtype=np.float64), np.asarray(other, dtype=np.float64)
    if uncertainty.ndim != 1 or uncertainty.shape != other.shape or not len(uncertainty):
        raise ValueError(f"uncertainty {uncertainty.shape} and {name} {other.shape} need one value for each sample")
    if not ((uncertainty >= 0) & (uncertainty <= 1)).all():
        raise ValueError("uncertainty must lie between 0 and 1")
    return uncertainty, other
