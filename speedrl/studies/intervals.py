"""Means over few seeds, how far to trust them, and in words which differences are more than noise."""

import statistics
from collections.abc import Sequence


def interval(values: Sequence[float], *, level: float = 0.95) -> tuple[float, float | None]:
    """Mean and half the width of its confidence interval; None for one value, of whose spread nothing is known.

    Values must be independent: of seeds, not of pictures of one model. ValueError for no value.
    """
    if not values:
        raise ValueError("there is no value to take the mean of")
    spread = statistics.stdev(values) if len(values) > 1 else None
    return statistics.fmean(values), half_width(spread, len(values), level=level)


def half_width(spread: float | None, count: int, *, level: float = 0.95) -> float | None:
    """Half the width of the interval of the mean of `count` values with this standard deviation (n - 1).

    By Student's t with n - 1 degrees of freedom; None for one value.
    """
    if spread is None or count < 2:
        return None
    from scipy.stats import t  # a second to import, and few need it

    return float(t.ppf((1 + level) / 2, count - 1)) * spread / count**0.5


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


def say(name: str, found: dict, *, digits: int = 3) -> str:
    """A difference of `paired` in words: "R@1 is 0.021 ± 0.015 lower, outside the noise"."""
    difference, width = found["difference"], found["interval"]
    direction = "higher" if difference >= 0 else "lower"
    if width is None:
        return f"{name} is {abs(difference):.{digits}f} {direction}, from one seed, which says nothing of noise"
    if difference == width == 0:
        return f"{name} is the same in every seed"
    size = f"{abs(difference):.{digits}f} ± {width:.{digits}f} {direction}"
    return f"{name} is {size}, {'outside' if found['outside'] else 'within'} the noise"


def caution(differences: Sequence[dict], *, level: float = 0.95, kind: str = "Paired t-intervals") -> str:
    """What to keep in mind where many differences are looked at: how many would be outside by chance."""
    known = [found for found in differences if found["outside"] is not None]
    seeds = sorted({found["seeds"] for found in known})
    if not known:
        return "One seed each: nothing can be said of noise. Give more seeds."
    outside = sum(found["outside"] for found in known)
    return (
        f"{outside} of {len(known)} differences are outside the noise; {len(known) * (1 - level):.1f} would be by "
        f"chance alone if there were none. {kind} at {level:.0%} over {' or '.join(map(str, seeds))} "
        "seeds, not corrected for their number."
    )
