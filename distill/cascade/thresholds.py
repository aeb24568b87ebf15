"""Threshold on the uncertainty above which a sample is deferred to the teacher, fitted on n validation samples.

Pure functions over arrays. All guarantees are for new samples from the distribution of the validation samples.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy.stats import beta, binom

from distill.evaluation.selective import bootstrap_interval

GRID = 10
"""Number of sizes of the accepted set that `threshold_for_risk` evaluates."""
SEQUENCE = np.concatenate([[-1.0], np.geomspace(1e-4, 1.0, 200)])
"""Thresholds that `threshold_for_quality` tests, in this order; they do not depend on the samples."""


@dataclass(frozen=True)
class Threshold:
    """The student's answer is accepted if uncertainty <= tau and uncertainty < 1; a negative tau accepts none.

    `coverage` is the accepted share of the n validation samples. For a budget, `calls` is the expected number of
    teacher calls per new sample, and `calls_low` to `calls_high` is the 95% interval of the long-run calls of this
    threshold. For a risk target, the error rate among accepted answers is at most `risk` with probability `confidence`
    over validation sets. For a quality target, the mean quality of the cascade is at least `quality` with probability
    `confidence`; it is `reached` on the validation samples, and `reached_low` to `reached_high` is its 95% interval.
    """

    tau: float
    n: int
    coverage: float
    calls: float | None = None
    calls_low: float | None = None
    calls_high: float | None = None
    risk: float | None = None
    confidence: float | None = None
    quality: float | None = None
    reached: float | None = None
    reached_low: float | None = None
    reached_high: float | None = None


def threshold_for_budget(uncertainty: np.ndarray, calls: np.ndarray, budget: float) -> Threshold:
    """Return the threshold whose expected teacher calls per new sample equal the budget.

    If the threshold is the k-th smallest of n uncertainties, a new sample lies above it with probability (n + 1 - k) /
    (n + 1), for every distribution (Weibull's plotting position; 1 - k / n would be biased). Tau is interpolated
    between these positions, each sample weighted with its calls. Ties are accepted or deferred together: if tau falls
    on a tie, all of it is accepted, so a tie never costs more than the budget and may cost much less; `calls` states
    the actual value. A budget below the cost of one sample, about 1 / n, accepts every answer with uncertainty below 1.
    Answers with uncertainty 1 are always deferred; if they alone cost more than the budget, `calls` exceeds it.

    The interval is that of Clopper and Pearson (Biometrika 26, 1934) for the samples above tau. With one call per
    sample the distribution of the realised rate is a Beta and the interval is exact. If some samples take two calls, a
    Beta with the mean and variance of the calls is used, which is exact only for large n.

    Args:
        uncertainty: [n] of the student, in [0, 1].
        calls: [n] 1 or 2, teacher calls of each sample if it is deferred.
        budget: teacher calls per sample, 0 or more.

    Raises:
        ValueError: no samples, different shapes, or a value out of range.
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
    # the distribution lies between that of the samples above tau and that of one more sample
    one_more = np.append(above, calls.max())
    expected = calls.mean() if tau < 0 else min(budget, one_more.sum() / (n + 1))
    if tau >= 1:
        expected = above.sum() / n
    low = _quantile(0.025, above, n, float(calls.max()))
    high = _quantile(0.975, one_more, n, float(calls.max()))
    if tau < 0:
        low = max(low, 1.0)  # everything is deferred, and each sample takes at least one call
    return Threshold(tau, n, coverage, float(expected), low, high)


def threshold_for_risk(uncertainty: np.ndarray, errors: np.ndarray, risk: float, confidence: float = 0.95) -> Threshold:
    """Return the largest threshold that keeps the student's error rate among accepted answers at or below `risk`.

    The guarantee holds with probability `confidence` over validation sets, for every n and every distribution. Let t be
    the (k + 1)-th smallest uncertainty, for a size k fixed in advance. Given t and the number of samples below it,
    those samples are independent draws from all samples below t. Their errors are therefore binomial, and Clopper and
    Pearson's upper bound on the error rate below t fails with probability at most (1 - confidence) / `GRID`. With
    `GRID` sizes, n / GRID, 2 n / GRID, ..., n, all bounds hold together with probability `confidence` (Bonferroni), so
    the threshold may be selected by them. This is the method of Geifman & El-Yaniv (arXiv 1705.08500) with a fixed grid
    instead of their search. Samples tied with t are not accepted.

    Args:
        uncertainty: [n] of the student, in [0, 1].
        errors: [n] 0 or 1, whether its answer is wrong.
        risk: in (0, 1].
        confidence: in (0, 1).

    Raises:
        ValueError: the samples do not support the target; the message gives the smallest supported one. Or: no samples,
            different shapes, or a value out of range.
    """
    if not 0 < risk <= 1:
        raise ValueError(f"risk is {risk}; it takes a number above 0 and up to 1")
    taus, accepted, bounds = _bounds(uncertainty, errors, confidence)
    supported = np.flatnonzero(bounds <= risk)
    if not len(supported):
        raise ValueError(
            f"{len(uncertainty)} validation samples cannot support a risk of {risk:g} at a confidence of "
            f"{confidence:g}; the smallest that they support is {smallest_risk(uncertainty, errors, confidence):g}"
        )
    largest = supported[-1]
    n = len(uncertainty)
    return Threshold(float(taus[largest]), n, float(accepted[largest] / n), risk=risk, confidence=confidence)


def threshold_for_quality(
    uncertainty: np.ndarray,
    student: np.ndarray,
    teacher: np.ndarray,
    calls: np.ndarray,
    target: float,
    confidence: float = 0.9,
) -> Threshold:
    """Return the cheapest threshold whose cascade has a mean quality of at least `target`.

    The guarantee holds with probability `confidence` over validation sets, for every n and every distribution. The
    thresholds of `SEQUENCE` are tested from the one that defers everything to the one that defers least, each against
    the hypothesis that its mean quality is below the target, and the last one before the first that is not rejected is
    returned. A fixed sequence needs no correction for the number of tests (Learn then Test; Angelopoulos et al., arXiv
    2110.01052). For qualities 0 and 1 the test is the exact binomial one, otherwise that of Hoeffding and Bentkus.

    Args:
        uncertainty: [n] of the student, in [0, 1].
        student: [n] qualities in [0, 1] of the student's answers.
        teacher: [n] qualities in [0, 1] of the final answers on samples that are deferred.
        calls: [n] 1 or 2, teacher calls of each sample if it is deferred.
        target: in (0, 1).
        confidence: in (0, 1).

    Raises:
        ValueError: the samples do not support the target; the message gives the largest that they support. Or: no
            samples, different shapes, or a value out of range.
    """
    for name, value in (("quality", target), ("confidence", confidence)):
        if not 0 < value < 1:
            raise ValueError(f"{name} is {value}; it takes a number above 0 and below 1")
    _, student = _checked(uncertainty, student=student)
    _, teacher = _checked(uncertainty, teacher=teacher)
    uncertainty, calls = _checked(uncertainty, calls=calls)
    if not all(((quality >= 0) & (quality <= 1)).all() for quality in (student, teacher)):
        raise ValueError("qualities must lie between 0 and 1")
    n, tau = len(uncertainty), None

    def qualities(tau: float) -> np.ndarray:
        return np.where(_deferred(uncertainty, tau), teacher, student)

    for candidate in SEQUENCE:
        if _quality_p_value(qualities(candidate), target) > 1 - confidence:
            break
        tau = float(candidate)
    if tau is None:
        raise ValueError(
            f"{n} validation posts cannot support a quality of {target:g} at a confidence of {confidence:g}; "
            f"with the teacher's answers alone, the largest is {largest_quality(teacher, confidence):g}"
        )
    found, deferred = qualities(tau), _deferred(uncertainty, tau)
    low, high = _mean_interval(found)
    return Threshold(
        tau, n, float(1 - deferred.mean()), calls=float(calls[deferred].sum() / n), confidence=confidence,
        quality=target, reached=float(found.mean()), reached_low=low, reached_high=high,
    )  # fmt: skip


def largest_quality(quality: np.ndarray, confidence: float) -> float:
    """The largest mean quality that n samples in [0, 1] support with `confidence`, rounded down to three digits."""
    targets = np.arange(1, 1000) / 1000
    supported = [target for target in targets if _quality_p_value(quality, target) <= 1 - confidence]
    return float(max(supported, default=0.0))


def _deferred(uncertainty: np.ndarray, tau: float) -> np.ndarray:
    deferred: np.ndarray = (uncertainty > tau) | (uncertainty >= 1)
    return deferred


def _quality_p_value(quality: np.ndarray, target: float) -> float:
    """p-value of the hypothesis that the mean of n independent qualities in [0, 1] is below the target."""
    n, total = len(quality), float(quality.sum())
    if np.isin(quality, (0, 1)).all():
        return float(binom.sf(round(total) - 1, n, target))
    risk, allowed = 1 - total / n, 1 - target
    if risk >= allowed:
        return 1.0
    hoeffding = math.exp(-n * _divergence(risk, allowed))  # Hoeffding (1963), theorem 1
    bentkus = math.e * binom.cdf(math.ceil(n * risk), n, allowed)  # Bentkus (2004), Annals of Probability 32
    return float(min(hoeffding, bentkus))


def _divergence(risk: float, allowed: float) -> float:
    """The relative entropy of two Bernoulli distributions in nats."""
    first = risk * math.log(risk / allowed) if risk > 0 else 0.0
    return first + (1 - risk) * math.log((1 - risk) / (1 - allowed))


def _mean_interval(quality: np.ndarray) -> tuple[float, float]:
    """95% interval of the mean: Clopper and Pearson's for 0 and 1, otherwise the bootstrap's."""
    n = len(quality)
    if np.isin(quality, (0, 1)).all():
        right = int(quality.sum())
        low = beta.ppf(0.025, right, n - right + 1) if right else 0.0
        high = beta.ppf(0.975, right + 1, n - right) if right < n else 1.0
        return float(low), float(high)
    low, high = bootstrap_interval(np.mean, quality)
    return float(low), float(high)


def smallest_risk(uncertainty: np.ndarray, errors: np.ndarray, confidence: float = 0.95) -> float:
    """Return the smallest risk that `threshold_for_risk` supports, rounded up to three digits; 1 is no guarantee.

    Arguments and errors are those of `threshold_for_risk`.
    """
    return math.ceil(_bounds(uncertainty, errors, confidence)[2].min() * 1000) / 1000


def _bounds(
    uncertainty: np.ndarray, errors: np.ndarray, confidence: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per size of the grid, ascending: tau, the number of accepted samples, and the upper bound on their error rate."""
    uncertainty, errors = _checked(uncertainty, errors=errors)
    # the others are never accepted; given their number, the remaining samples are still independent
    acceptable = uncertainty < 1
    uncertainty, errors = uncertainty[acceptable], errors[acceptable]
    if not len(errors):
        return np.array([-1.0]), np.array([0]), np.array([1.0])
    if not np.isin(errors, (0, 1)).all():
        raise ValueError("errors must be 0 or 1")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; it takes a number above 0 and below 1")
    n = len(uncertainty)
    order = np.argsort(uncertainty)
    ranked = np.append(uncertainty[order], np.nextafter(1.0, 2.0))  # above all samples, so that all can be accepted
    above = ranked[np.arange(1, GRID + 1) * n // GRID]
    accepted = np.searchsorted(ranked, above)
    wrong = np.append(0, np.cumsum(errors[order]))[accepted]
    # the Beta is undefined if every accepted answer is wrong; the bound is then 1
    bounds = np.where(wrong < accepted, beta.ppf(1 - (1 - confidence) / GRID, wrong + 1, accepted - wrong), 1.0)
    return np.nextafter(above, -1.0), accepted, bounds


def _quantile(q: float, above: np.ndarray, n: int, max_calls: float) -> float:
    """q-quantile of the long-run calls per sample, a Beta on [0, max_calls], given the calls of samples above tau."""
    mean = above.sum() / (n + 1)
    if not 0 < mean < max_calls:
        return float(mean)
    variance = ((above**2).sum() / (n + 1) - mean**2) / (n + 2)
    size = mean * (max_calls - mean) / variance - 1
    return float(max_calls * beta.ppf(q, size * mean / max_calls, size * (1 - mean / max_calls)))


def _checked(uncertainty: np.ndarray, **named: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Validate uncertainty [n] and one other column [n] and return both in float64."""
    (name, other), *_ = named.items()
    uncertainty, other = np.asarray(uncertainty, dtype=np.float64), np.asarray(other, dtype=np.float64)
    if uncertainty.ndim != 1 or uncertainty.shape != other.shape or not len(uncertainty):
        raise ValueError(f"uncertainty {uncertainty.shape} and {name} {other.shape} need one value per sample")
    if not ((uncertainty >= 0) & (uncertainty <= 1)).all():
        raise ValueError("uncertainty must lie between 0 and 1")
    return uncertainty, other
