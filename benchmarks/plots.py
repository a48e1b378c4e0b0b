"""The pictures: learning curves per environment, and the aggregate over environments."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display needed
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from benchmarks.groups import Group, Normalised, base_script, label_order
from benchmarks.results import grid_steps
from benchmarks.stats import (
    curve_iqm,
    iqm_interval,
    paired_interval,
    performance_profile,
    probability_of_improvement,
)

# Okabe and Ito's colours, told apart by colour-blind readers; one per script in every picture.
COLORS = {
    "reinforce": "#E69F00",
    "a2c": "#56B4E9",
    "npg": "#009E73",
    "trpo": "#CC79A7",
    "ppo": "#0072B2",
    "ppo_continuous": "#D55E00",
    "grpo_rloo": "#000000",
}
VARIANTS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#000000", "#D55E00")
STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "savefig.dpi": 160,
}


def look(name: str, among: Sequence[str] = ()) -> dict[str, Any]:
    """A script's colour; its variants are dotted, its peer is dashed and darker, to be seen where
    the two coincide. Several variants of one script have a colour each, those of several scripts
    their script's and a dash each."""
    script = base_script(name)
    color = to_rgb(COLORS.get(script, "#888888"))
    if name.startswith("sb3-"):
        return {"color": tuple(0.45 * x for x in color), "linestyle": (0, (2.5, 1.2))}
    if name == script:
        return {"color": color, "linestyle": "-"}
    variants = [x for x in among if x != base_script(x) and not x.startswith("sb3-")]
    own = [x for x in variants if base_script(x) == script]
    if len(own) > 1 and own == variants:
        return {"color": to_rgb(VARIANTS[own.index(name) % len(VARIANTS)]), "linestyle": "-"}
    if len(own) > 1:  # beside those of another script: its colour, and a dash for each
        dashes = ("-", (0, (4, 1)), (0, (1, 1)), (0, (4, 1, 1, 1)))
        return {"color": color, "linestyle": dashes[own.index(name) % len(dashes)]}
    return {"color": color, "linestyle": ":"}


def short_count(x: float, _position: Any = None) -> str:
    return f"{x / 1e6:g}M" if x >= 1e6 else f"{x / 1e3:g}k" if x >= 1e3 else f"{x:g}"


def save(figure: Any, path: Path) -> None:
    # Without the library's name and the date the same numbers give the same bytes.
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)


def legend(figure: Any, names: list[str], *others: Line2D) -> None:
    lines = [Line2D([], [], linewidth=1.8, label=name, **look(name, names)) for name in names]
    widest = 0.5 + 0.06 * max(len(str(line.get_label())) for line in [*lines, *others])  # inches
    columns = max(1, min(len(names) + len(others), int(figure.get_figwidth() / widest)))
    figure.legend(handles=[*lines, *others], loc="outside lower center", ncols=columns)


def plot_group(axes: Any, group: Group, x_of: str, style: dict[str, Any]) -> None:
    """IQM, interval and single seeds against steps or seconds."""
    returns = np.array([record["curve"]["return"] for record in group.records], float)
    if x_of == "steps":
        xs = np.tile(grid_steps(group.steps), (len(returns), 1))
    else:
        xs = np.array([record["curve"]["seconds"] for record in group.records], float)
    for x, y in zip(xs, returns):
        axes.plot(x, y, color=style["color"], linewidth=0.5, alpha=0.18)
    whole = np.isfinite(returns).all(0)  # before that some seed has ended no episode yet
    middle, low, high = curve_iqm(returns[:, whole])
    x = np.median(xs, axis=0)[whole]
    if len(returns) > 1:
        axes.fill_between(x, low, high, color=style["color"], alpha=0.2, linewidth=0)
    axes.plot(x, middle, linewidth=1.8, **style)


def plot_curves(groups: list[Group], random: dict[str, Any], path: Path) -> None:
    """A column per environment; above against steps, below against training time."""
    envs = list(dict.fromkeys(group.env for group in groups))
    names = sorted({group.label for group in groups}, key=label_order)
    with plt.rc_context(STYLE):
        size = (max(3.1 * len(envs), 4.5), 5.0)
        figure, grid = plt.subplots(2, len(envs), figsize=size, layout="constrained", squeeze=False)
        for column, env in enumerate(envs):
            for axes, x_of in zip(grid[:, column], ("steps", "seconds")):
                for group in groups:
                    if group.env == env:
                        plot_group(axes, group, x_of, look(group.label, names))
                if env in random:
                    axes.axhline(random[env]["mean"], color="#888888", linewidth=0.8, zorder=1)
                axes.set_xlim(left=0)
                axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
            grid[0, column].set_title(env, fontsize=10)
            grid[0, column].xaxis.set_major_formatter(FuncFormatter(short_count))
            grid[0, column].set_xlabel("environment steps")
            grid[1, column].set_xlabel("training time (s)")
        for axes in grid[:, 0]:
            axes.set_ylabel("return of an episode")
        legend(figure, names, Line2D([], [], color="#888888", linewidth=0.8, label="random play"))
        save(figure, path)


def apart(heights: list[float], least: float) -> list[float]:
    """The heights, in their order, moved up so that neighbours are at least that far apart."""
    moved: dict[int, float] = {}
    for i in sorted(range(len(heights)), key=lambda i: heights[i]):
        moved[i] = max([heights[i], *(y + least for y in moved.values())])
    return [moved[i] for i in range(len(heights))]


def plot_ladder(groups: list[Group], random: dict[str, Any], path: Path) -> None:
    """The scripts on one environment, each curve with its name at its end."""
    env, bottom = groups[0].env, "random play"
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7.5, 3.8), layout="constrained")
        ends, styles = [], {}
        for group in groups:
            styles[f"{group.label}, {len(group.records)} seeds"] = look(group.label)
            plot_group(axes, group, "steps", look(group.label))
            ends.append(float(np.asarray(axes.lines[-1].get_ydata())[-1]))
        if env in random:
            styles[bottom] = {"color": "#888888", "linestyle": "-"}
            axes.axhline(random[env]["mean"], color="#888888", linewidth=0.8, zorder=1)
            ends.append(random[env]["mean"])
        low, high = axes.get_ylim()
        for (name, style), y in zip(styles.items(), apart(ends, 0.06 * (high - low))):
            axes.annotate(name, (1, y), xycoords=axes.get_yaxis_transform(), xytext=(4, 0),
                          textcoords="offset points", va="center", color=style["color"])
        axes.set_xlim(0, max(group.steps for group in groups))
        axes.xaxis.set_major_formatter(FuncFormatter(short_count))
        axes.set_xlabel("environment steps")
        axes.set_ylabel("return of an episode")
        axes.set_title(env, fontsize=10)
        save(figure, path)


def pairs(names: list[str]) -> list[tuple[str, str]]:
    """Each algorithm against the one before it on the list of scripts, and against its peer."""
    ours = [name for name in names if name == base_script(name)]
    steps = [(after, before) for before, after in itertools.pairwise(ours)]
    others = [(base_script(name), name) for name in names if name != base_script(name)]
    return steps + [pair for pair in others if pair[0] in ours]


def plot_aggregate(normalised: Normalised, path: Path) -> None:
    """IQM of the normalised scores, performance profile, probabilities of improvement."""
    scores, names = normalised.scores, list(normalised.scores)
    chances = pairs(names)
    with plt.rc_context(STYLE):
        ratios = [1, 1.25] + [1] * bool(chances)
        figure, panels = plt.subplots(
            1, len(ratios), figsize=(3.4 * len(ratios), 2.9), layout="constrained",
            width_ratios=ratios,
        )
        top = panels[0]
        for row, name in enumerate(names):
            middle, low, high = iqm_interval(scores[name])
            interval_bar(top, row, middle, low, high, look(name, names))
        top.set_yticks(range(len(names)), names)
        top.set_ylim(len(names) - 0.4, -0.6)
        top.set_xlabel("normalised score, IQM")

        lowest = min(x.min() for strata in scores.values() for x in strata)
        highest = max(x.max() for strata in scores.values() for x in strata)
        margin = 0.05 * (highest - lowest) + 0.01
        thresholds = np.linspace(lowest - margin, highest + margin, 201)
        for name in names:
            share, low, high = performance_profile(scores[name], thresholds)
            style = look(name, names)
            panels[1].plot(thresholds, share, linewidth=1.8, **style)
            panels[1].fill_between(thresholds, low, high, color=style["color"], alpha=0.15,
                                   linewidth=0)
        panels[1].set_xlabel(r"normalised score $\tau$")
        panels[1].set_ylabel(r"share of runs above $\tau$")
        panels[1].set_ylim(-0.02, 1.02)

        if chances:
            for row, (x, y) in enumerate(chances):
                chance = paired_interval(probability_of_improvement, scores[x], scores[y])
                interval_bar(panels[2], row, *chance, look(x, names))
            panels[2].axvline(0.5, color="#888888", linewidth=0.8, zorder=1)
            panels[2].set_yticks(range(len(chances)), [f"{x}\nover {y}" for x, y in chances])
            panels[2].set_ylim(len(chances) - 0.4, -0.6)
            panels[2].set_xlim(0, 1)
            panels[2].set_xlabel("probability of improvement")
        legend(figure, names)
        save(figure, path)


def interval_bar(axes: Any, row: int, middle: float, low: float, high: float, style: dict) -> None:
    axes.barh(row, high - low, left=low, height=0.5, color=style["color"], alpha=0.3)
    axes.plot([middle, middle], [row - 0.25, row + 0.25], linewidth=1.8, **style)
    axes.grid(axis="y", visible=False)
    axes.use_sticky_edges = False
