"""Means over few seeds, and how far to trust them and their differences."""

import math
import statistics
from collections.abc import Sequence


def interval(values: Sequence[float], *, level: float = 0.95) -> tuple[float, float | None]:
    """Mean and half the width of its confidence interval; None for one value, of whose spread nothing is known.

    By Student's t. Values must be independent: of seeds, not of pictures of one model. ValueError for no value.
    """
    if not values:
        raise ValueError("there is no value to take the mean of")
    mean, count = statistics.fmean(values), len(values)
    if count < 2:
        return mean, None
    return mean, t_quantile(level, count - 1) * statistics.stdev(values) / count**0.5


def t_quantile(level: float, freedom: int) -> float:
    """The t that |Student's t| of so many degrees of freedom stays below with probability `level`, by bisection."""

    def inside(angle: float) -> float:  # P(|T| < sqrt(freedom) tan(angle)), a finite sum for whole degrees
        odd, total, square = freedom % 2, 0.0, math.cos(angle) ** 2
        term = math.cos(angle) if odd else 1.0
        for k in range(2 + odd, freedom + 1, 2):
            total += term
            term *= square * (k - 1) / k
        return (angle + math.sin(angle) * total) * 2 / math.pi if odd else math.sin(angle) * total

    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle) < level else (low, middle)
    return freedom**0.5 * math.tan(low)


def paired(values: dict[int, float], baseline: dict[int, float], *, level: float = 0.95) -> dict:
    """How much `values` differ from `baseline`, each by seed: over the seeds that both have.

    The paired t-interval: runs of one seed see the same prompts and start from the same noise, and what a seed does to
    both cancels. -> difference (mean), interval (half its width, None for one seed), seeds (their number), outside
    (whether 0 lies outside the interval; None where that cannot be known). ValueError without a common seed.
    """
    both = sorted(values.keys() & baseline.keys())
    mean, width = interval([values[seed] - baseline[seed] for seed in both], level=level)
    outside = None if width is None else abs(mean) > width
    return {"difference": mean, "interval": width, "seeds": len(both), "outside": outside}


def caution(differences: Sequence[dict], *, level: float = 0.95) -> str:
    """What to keep in mind where many differences are looked at: how many would be outside by chance."""
    known = [found for found in differences if found["outside"] is not None]
    seeds = sorted({found["seeds"] for found in known})
    if not known:
        return "One seed each: nothing can be said of noise. Give more seeds."
    outside = sum(found["outside"] for found in known)
    return (
        f"{outside} of {len(known)} differences are outside the noise; {len(known) * (1 - level):.1f} would be by "
        f"chance alone if there were none. Paired t-intervals at {level:.0%} over {' or '.join(map(str, seeds))} "
        "seeds, not corrected for their number."
    )
