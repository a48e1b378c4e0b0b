"""Two result sets -> per environment: better, worse, or cannot tell from this many seeds."""

from pathlib import Path

import numpy as np

from benchmarks.results import label, read_results
from benchmarks.stats import (
    coverage_note,
    difference_of_iqm,
    paired_interval,
    probability_of_improvement,
)
from benchmarks.suites import BenchmarkError

ENOUGH_SEEDS = 10


def read_side(side: str) -> dict[tuple[str, str], dict[int, float]]:
    """(environment, label) -> seed -> final return, of FILE, DIRECTORY or FILE:LABEL."""
    path, wanted = Path(side), ""
    if not path.exists():
        name, _, wanted = side.rpartition(":")
        path = Path(name)
        if not name or not path.exists():
            raise BenchmarkError(f"no results in {side}: there is no such file")
    scores: dict[tuple[str, str], dict[int, float]] = {}
    for records in read_results(path).values():
        for record in records:
            if wanted in ("", label(record)):
                # With one label wanted, its name does not have to be the other side's.
                key = record["env"], "" if wanted else label(record)
                seeds = scores.setdefault(key, {})
                if record["seed"] in seeds:
                    raise BenchmarkError(
                        f"{path} has seed {record['seed']} of {label(record)} on {record['env']} "
                        "more than once, with other flags: compare needs one set of flags"
                    )
                seeds[record["seed"]] = record["train_return_last100"]
    if not scores:
        raise BenchmarkError(f"no results of {wanted} in {path}")
    return scores


def verdict(a: np.ndarray, b: np.ndarray) -> str:
    """What B's returns say against A's: numbers, and a plain sentence."""
    chance, low, high = paired_interval(probability_of_improvement, [b], [a])
    gain, gain_low, gain_high = paired_interval(difference_of_iqm, [b], [a])
    seeds = min(len(a), len(b))
    if seeds < ENOUGH_SEEDS:
        words = f"cannot tell from this many seeds: {len(a)} and {len(b)}, it takes {ENOUGH_SEEDS}"
    elif low > 0.5 and gain_low > 0:
        words = "B is better"
    elif high < 0.5 and gain_high < 0:
        words = "B is worse"
    else:
        words = f"cannot tell from this many seeds, {len(a)} and {len(b)}: it may be no change"
    return (
        f"P(B > A) = {chance:.2f} [{low:.2f}, {high:.2f}], "
        f"IQM(B) - IQM(A) = {gain:.4g} [{gain_low:.4g}, {gain_high:.4g}]: {words}"
    )


def compare(a_side: str, b_side: str) -> str:
    a, b = read_side(a_side), read_side(b_side)
    if all(name for _, name in a) != all(name for _, name in b):
        raise BenchmarkError("give both sides a LABEL, or neither")
    common = [key for key in a if key in b]
    if not common:
        raise BenchmarkError("A and B share no environment and algorithm; FILE:LABEL takes one")
    lines = [
        f"A: {a_side}\nB: {b_side}",
        "Return over the last 100 training episodes; 95 % percentile bootstrap over seeds.",
    ]
    for key in common:
        x, y = (np.array(list(side[key].values())) for side in (a, b))
        lines.append(f"{' '.join(key).strip()}: {verdict(x, y)}")
    for name, side, other in (("A", a, b), ("B", b, a)):
        lines += [f"only in {name}: {' '.join(key).strip()}" for key in side if key not in other]
    fewest = min(len(side[key]) for side in (a, b) for key in common)
    return "\n".join([*lines, *filter(None, [coverage_note(fewest)])])
