"""Results of grpo_rloo.py -> table and picture: what its methods make of the same completions."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.groups import Group
from benchmarks.results import grid_steps
from benchmarks.stats import coverage_note, curve_iqm, iqm_interval, mean_interval

PANELS = (
    ("return", "reward of a completion"),
    ("entropy", "entropy of a token"),
    ("wrong_length", "tokens of wrong completions"),
)

BASE = "grpo"  # the preset that the others are compared with


def is_llm(groups: list[Group]) -> bool:
    return all(group.records[0]["script"] == "grpo_rloo" for group in groups)


def percent(values: np.ndarray) -> str:
    return f"{100 * values.mean():.1f} ({100 * values.min():.1f} to {100 * values.max():.1f})"


def length(values: np.ndarray) -> str:
    """Mean over the seeds that made any mistakes; where one made none its last stand."""
    return f"{np.nanmean(values):.2f}" if np.isfinite(values).any() else "-"


def longest(group: Group) -> str:
    """Most seconds of a whole process, of the runs that were not interrupted."""
    seconds = [x for record in group.records if (x := record.get("process_seconds"))]
    return f"{max(seconds):.0f}" if seconds else "-"


def accuracies(group: Group, name: str) -> np.ndarray:
    return np.array([record[name] for record in group.records])


def last(group: Group, curve: str) -> np.ndarray:
    """A curve's last tenth, mean of each seed; NaN where nothing was logged there."""
    rows = np.array([record["curve"][curve] for record in group.records], float)
    return rows[:, -rows.shape[1] // 10 :].mean(1)


def difference(group: Group, base: Group, values_of: Callable[[Group], np.ndarray],
               digits: int) -> str:
    """Mean over the seeds that both have of group's value less base's, and its interval."""
    values = [dict(zip((record["seed"] for record in x.records), values_of(x)))
              for x in (group, base)]
    both = [values[0][seed] - values[1][seed] for seed in values[0] if seed in values[1]]
    pairs = np.array([x for x in both if np.isfinite(x)])
    if not len(pairs):
        return "-"
    mean, low, high = mean_interval(pairs)
    return f"{mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def difference_table(groups: list[Group]) -> list[str]:
    """What each method has more than BASE on the same task, seed by seed."""
    bases = {group.env: group for group in groups if group.records[0]["variant"] == BASE}
    others = [group for group in groups if group is not bases.get(group.env, group)]
    if not others:
        return []
    columns: list[tuple[Callable[[Group], np.ndarray], int]] = [
        (lambda group: 100 * accuracies(group, "eval_return_mean"), 1),
        (lambda group: last(group, "return"), 3),
        (lambda group: last(group, "entropy"), 3),
        (lambda group: last(group, "wrong_length"), 2),
    ]
    lines = [
        f"More than `{BASE}` (the mean, over the seeds that both have, of the differences seed by "
        "seed, which share their warm start; its 95 % percentile bootstrap interval):", "",
        "| Task | Method | Accuracy, points | Reward at the end | Entropy at the end | "
        "Tokens of a wrong completion |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for group in others:
        cells = [difference(group, bases[group.env], *column) for column in columns]
        name = group.records[0]["variant"]
        lines.append(f"| {group.env} | {name} | {' | '.join(cells)} |")
    return [*lines, ""]


def llm_section(name: str, groups: list[Group], notes: list[str], origin: str,
                pictures: str) -> list[str]:
    """Picture, table and notes of a suite of grpo_rloo's, in Markdown."""
    lines = [
        f"### {name}", "",
        f"![Reward, entropy and length against completions]({pictures}{name}_curves.png)", "",
        "Against completions sampled: interquartile mean over seeds; band: its 95 % percentile "
        "bootstrap interval.", "",
        "| Task | Method | Completions | Seeds | Accuracy after the warm start, % | Accuracy, % "
        "| IQM [95 % interval] | Entropy at the end | Tokens of a wrong completion | Time (s) "
        "| Longest, whole (s) |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for group in groups:
        finals = accuracies(group, "eval_return_mean")
        middle, low, high = (100 * x for x in iqm_interval([finals]))
        seconds = np.median([record["wall_seconds"] for record in group.records])
        lines.append(
            f"| {group.env} | {group.records[0]['variant']} | {group.steps:,} | {len(finals)} "
            f"| {percent(accuracies(group, 'accuracy_sft'))} | {percent(finals)} "
            f"| {middle:.1f} [{low:.1f}, {high:.1f}] | {last(group, 'entropy').mean():.3f} "
            f"| {length(last(group, 'wrong_length'))} | {seconds:.0f} | {longest(group)} |"
        )
    lines += [
        "", "Accuracy: greedy, on held-out prompts; mean (least to greatest) over the seeds. End: "
        "the last tenth of the run. Entropy: of the groups learnt from, of which dapo leaves out "
        "those with equal rewards. Wrong completions: of whichever prompts a method still gets "
        "wrong. Time: median over seeds, warm start excluded; longest, whole: of the seeds' whole "
        "processes. " + origin, "",
        *difference_table(groups),
    ]
    if note := coverage_note(min(len(group.records) for group in groups)):
        lines += [note, ""]
    lines += [f"- {note}" for note in notes] + [""] * bool(notes)
    return [*lines, "```", f"python -m benchmarks run {name}", "python -m benchmarks report", "```",
            ""]


def plot_llm(groups: list[Group], path: Path) -> None:
    """A column per quantity, a row per task."""
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter

    from benchmarks.plots import STYLE, VARIANTS, save, short_count

    tasks = list(dict.fromkeys(group.env for group in groups))
    methods = list(dict.fromkeys(str(group.records[0]["variant"]) for group in groups))
    # A preset with a change has the preset's colour, dashed.
    presets = list(dict.fromkeys(name.split()[0] for name in methods))
    colors = dict(zip(presets, VARIANTS))
    dashes = itertools.cycle(((0, (4, 1)), (0, (1, 1)), (0, (4, 1, 1, 1))))
    look = {
        name: {"color": colors[name.split()[0]],
               "linestyle": "-" if name in presets else next(dashes)}
        for name in methods
    }
    with plt.rc_context(STYLE):
        size = (3.2 * len(PANELS), 2.5 * len(tasks) + 0.5)
        figure, grid = plt.subplots(len(tasks), len(PANELS), figsize=size, layout="constrained",
                                    squeeze=False)
        for group in groups:
            method, row = group.records[0]["variant"], tasks.index(group.env)
            for axes, (key, title) in zip(grid[row], PANELS):
                curves = np.array([record["curve"][key] for record in group.records], float)
                whole = np.isfinite(curves).all(0)
                middle, low, high = curve_iqm(curves[:, whole])
                x = grid_steps(group.steps)[whole]
                if len(curves) > 1:
                    axes.fill_between(x, low, high, color=look[method]["color"], alpha=0.2,
                                      linewidth=0)
                axes.plot(x, middle, linewidth=1.5, **look[method])
                axes.set_title(f"{group.env}: {title}" if len(tasks) > 1 else title, fontsize=10)
                axes.xaxis.set_major_formatter(FuncFormatter(short_count))
                axes.set_xlim(left=0)
        for axes in grid[-1]:
            axes.set_xlabel("completions")
        handles: Any = [Line2D([], [], label=name, **look[name]) for name in methods]
        figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 5))
        save(figure, path)
