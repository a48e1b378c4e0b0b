"""The sentences on the results: prose.md, whose figures are fields, filled from the results files.

(Figures that are not measured here, such as published ones, and those of the llm table's
differences, are plain text there.) A field stands in braces, its words apart by bars, and gives a
whole number or, with :2 at its end, one of two decimals:

    {mujoco|Hopper-v5|trpo|return}    mean over the seeds; also: evaluation, least and greatest
                                      return, seeds (their number in words), and of grpo_rloo
                                      accuracy and, of a single seed, worst (both in percent)
    {mujoco|Hopper-v5|trpo|npg|difference}    the second's IQM less the first's, with its interval:
                                      1,084 [-268, 2,114], as compare says it
    {speed|ppo_continuous|HalfCheetah-v5|1 x 2048|eager:2}    median ratio to the peer; or compiled
    {limit|a2c|CartPole-v1||compiled} median share of the limit, in percent; or eager
    {threshold|ppo|CartPole-v1||eager}    median seconds; or compiled, peer
    {scaling|ppo|CartPole-v1|4 environments|eager}    median steps per second; or compiled, or sync,
                                      of the environments alone
    {cuda|ppo|CartPole-v1|width 64|eager}    median steps per second; or compiled, graphs, peer,
                                      cpu; with " ratio" median ratio to the peer
    {tokens|384|bf16|eager}           median tokens per second; or sample, compiled, graphs; with
                                      " share" of the card's peak, in percent

What was timed on several machines, or has a * for its script, environment or variant, gives the
least and the greatest of the medians: 2.05 to 2.21.
"""

import math
import re
import statistics
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import cuda, limit, scaling, speed, threshold, tokens
from benchmarks.groups import Group
from benchmarks.stats import difference_of_iqm, paired_interval
from benchmarks.suites import BenchmarkError

TEMPLATE = Path(__file__).resolve().parent / "prose.md"
WORDS = ["no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
NOTE = "<!-- benchmarks/prose.md, with its figures filled in by python -m benchmarks report -->"


def of_group(group: Group, what: str) -> float | str:
    if what == "seeds":
        return WORDS[n] if (n := len(group.records)) < len(WORDS) else str(n)
    evaluations = np.array([record["eval_return_mean"] for record in group.records])
    if what in ("accuracy", "worst"):
        return 100 * float(evaluations.mean() if what == "accuracy" else evaluations.min())
    return {"return": group.finals.mean(), "evaluation": evaluations.mean(),
            "least": group.finals.min(), "greatest": group.finals.max()}[what]


def of_row(kind: str, row: dict[str, Any], side: str) -> float:
    if kind == "speed":
        return statistics.median(speed.ratios(row, side))
    if kind == "limit":
        return statistics.median(limit.shares(row, side))
    if kind == "threshold":  # a run that never got there took longer than any that did
        seconds = [run["seconds"] for run in row["runs"][side]]
        return statistics.median(math.inf if x is None else x for x in seconds)
    if kind == "cuda":
        side, _, ratio = side.partition(" ")
        return statistics.median((cuda.ratios if ratio else cuda.rates)(row, side))
    found = [seed[side] for seed in row["seeds"]]
    return statistics.median([x if side == "sync" else x["sps"] for x in found])


READERS: dict[str, Callable[[Path], list[dict[str, Any]]]] = {
    "speed": speed.read_speed, "limit": limit.read_limit, "threshold": threshold.read_threshold,
    "scaling": scaling.read_scaling, "cuda": cuda.read_cuda,
}


def lookup(words: list[str], suites: dict[str, list[Group]],
           results: Path) -> float | str | tuple[float, float]:
    """A figure, words, or the least and the greatest figure of several rows."""
    kind, *names, what = words
    if kind in READERS:
        found = [of_row(kind, row, what) for row in READERS[kind](results)
                 if (key := speed.row_key(row))[3] == 1
                 and all(name in (x, "*") for x, name in zip(key[:3], names, strict=True))]
        return found[0] if len(found) == 1 else (min(found), max(found))
    if kind == "tokens":
        width, precision = names
        part, _, share = what.partition(" ")
        rates, shares = tokens.rates_and_shares(results, int(width), precision == "bf16", part)
        return statistics.median(shares if share else rates)
    if what == "difference":
        sides = [next(x.finals for x in suites[kind] if (x.env, x.label) == (names[0], name))
                 for name in names[1:]]
        gain, low, high = paired_interval(difference_of_iqm, sides[1:], sides[:1])
        return f"{gain:,.0f} [{low:,.0f}, {high:,.0f}]"
    env, label = names
    (group,) = [group for group in suites[kind] if (group.env, group.label) == (env, label)]
    return of_group(group, what)


def fill(template: str, suites: dict[str, list[Group]], results: Path) -> str:
    """The template with its fields replaced; one that names no result is an error."""
    def value(field: re.Match) -> str:
        words, _, digits = field[1].partition(":")
        try:
            found = lookup(words.split("|"), suites, results)
            if isinstance(found, str):
                return found
            both = found if isinstance(found, tuple) else (found,)
            texts = ["never" if x == math.inf else f"{x:,.{int(digits or 0)}f}" for x in both]
            return " to ".join(dict.fromkeys(texts))
        except (KeyError, StopIteration, TypeError, ValueError) as error:
            raise BenchmarkError(f"{TEMPLATE.name}: no result for {field[0]}: {error!r}") from None

    return wrapped(re.sub(r"\{([^{}]+)\}", value, template))


def wrapped(text: str) -> str:
    """The same with the lines of its plain paragraphs filled up again: a block with a line that
    begins as a heading, a table or a list does stays as it is."""
    plain = lambda x: not re.search(r"^([#|>]|```|- |\d+\. )", x, re.MULTILINE)
    fill_up = lambda x: textwrap.fill(x, 110, break_long_words=False, break_on_hyphens=False)
    return "\n\n".join(fill_up(x) if plain(x) else x for x in text.strip().split("\n\n"))
