"""How far to step? Plain ascent beside steps of a fixed length: `python -m benchmarks step-sizes`.

reinforce.py on CartPole-v1 with --step-rule gradient, theta <- theta + alpha g, at six alphas; then
with --step-rule restricted, theta <- theta + sqrt(2 eps) g/|g|, at six eps, each matched to one
alpha: sqrt(2 eps) is the mean |alpha g| over the first ten points of the plain runs' curves, all
seeds together (a point is one update, or two where episodes are very short).

Stated before the campaign (after three single runs that found the range of the alphas): let R_k be
the mean return of the training episodes in the k-th of 100 equal parts of a run. Its best is the
largest mean over five R_k in a row, its end the mean of the last ten. A run has learned if its best
is at least 100 (random play returns about 24, 500 is the most there is). It has collapsed, and not
recovered, if it has learned and its end is below half of its best, or if, learned or not, its end
is below half of what random play returns.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.engine import LocalEngine
from benchmarks.results import ensure_random, read_random, read_records, read_scalars
from benchmarks.runner import Campaign
from benchmarks.stats import iqm_interval
from benchmarks.suites import BenchmarkError, Job, Task, make_jobs

ENV, STEPS, SEEDS = "CartPole-v1", 200_000, 10
ALPHAS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
FLAGS = {"num_envs": 16, "lr_schedule": "constant", "norm_adv": "none"}
DIRECTORY, FILE, PICTURE = "step_sizes", "step_sizes.jsonl", "step_sizes.png"
LEARNED, FIRST = 100, 10
FATES = ("learned", "collapsed", "collapsed at once", "not learned")  # at once: without learning


def plain_tasks() -> list[Task]:
    flags = FLAGS | {"step_rule": "gradient"}
    return [
        Task("reinforce", ENV, STEPS, flags | {"learning_rate": alpha}, f"plain, alpha {alpha:g}")
        for alpha in ALPHAS
    ]


def restricted_tasks(lengths: list[float]) -> list[Task]:
    flags = FLAGS | {"step_rule": "restricted"}
    return [
        Task("reinforce", ENV, STEPS, flags | {"step_eps": length**2 / 2, "learning_rate": 1.0},
             f"restricted, as alpha {alpha:g}")
        for alpha, length in zip(ALPHAS, lengths, strict=True)
    ]


def first_step_length(run_dirs: list[Path]) -> float:
    """Mean |alpha g| over the first points of all seeds, to four digits."""
    steps = [read_scalars(run_dir, "losses/step_norm")[1][:FIRST] for run_dir in run_dirs]
    return float(f"{np.concatenate(steps).mean():.4g}")


def fate(record: dict[str, Any], random: float) -> str:
    """Of FATES, as defined above; random is random play's return."""
    curve = np.array([np.nan if x is None else x for x in record["curve"]["return"]], float)
    curve = curve[~np.isnan(curve)]
    best, end = np.convolve(curve, np.full(5, 0.2), "valid").max(), curve[-10:].mean()
    if end < random / 2 or (best >= LEARNED and end < best / 2):
        return "collapsed" if best >= LEARNED else "collapsed at once"
    return "learned" if best >= LEARNED else "not learned"


def run(work: Path, results: Path, scripts: Path, parallel: int, seeds: int = SEEDS) -> bool:
    """All runs, the restricted ones after the plain ones; whether each was finished."""
    path = results / DIRECTORY / FILE
    path.parent.mkdir(parents=True, exist_ok=True)

    def campaign(tasks: list[Task]) -> tuple[bool, list[Job]]:
        jobs = make_jobs(tasks, seeds, scripts)
        # The lengths are read from the runs' own files, so that a line does not do.
        runs = Campaign(jobs, work, path, LocalEngine(), parallel, None, lines_count=False)
        return runs.run(), jobs

    ensure_random(results, [ENV])
    complete, jobs = campaign(plain_tasks())
    if not complete:
        return False
    lengths = []
    for task in plain_tasks():
        dirs = [work / job.name / "run" for job in jobs if job.task == task]
        lengths.append(first_step_length(dirs))
    return campaign(restricted_tasks(lengths))[0]


def summary(results: Path) -> list[dict[str, Any]]:
    """One row for each alpha and rule: step length, final returns, and how many met which fate."""
    path = results / DIRECTORY / FILE
    if not path.exists():
        return []
    rows, records, random = [], read_records(path), read_random(results)[ENV]["mean"]
    groups: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault(record["variant"], []).append(record)
    lengths = {}
    for variant, group in groups.items():
        if variant.startswith("restricted"):
            eps = group[0]["flags"]["step_eps"]
            lengths[variant.removeprefix("restricted, as ")] = math.sqrt(2 * eps)
    for variant, group in groups.items():
        rule, alpha = variant.split(",")[0], variant.rsplit("alpha ", 1)[1]
        fates = [fate(record, random) for record in group]
        finals = np.array([record["train_return_last100"] for record in group])
        rows.append({
            "rule": rule, "alpha": float(alpha), "length": lengths.get(f"alpha {alpha}", math.nan),
            "finals": finals, "seeds": len(group), "record": group[0],
            **{name: fates.count(name) for name in FATES},
        })
    return sorted(rows, key=lambda row: (row["alpha"], row["rule"]))


def section(results: Path, pictures: str) -> list[str]:
    """The table, in Markdown."""
    rows = summary(results)
    if not rows:
        return []
    record = rows[0]["record"]
    lines = [
        "### step-sizes", "",
        f"![Final return and collapse against the length of the step]({pictures}{PICTURE})", "",
        "reinforce.py on CartPole-v1, 200,000 steps, 16 episodes an iteration, raw advantages, a "
        "constant rate. Plain: theta + alpha g. Restricted: theta + sqrt(2 eps) g/|g|, where "
        "sqrt(2 eps) is the mean |alpha g| of the plain runs' first updates. Learned: a mean "
        "return of 100 or more over some 5 % of the run. Collapsed: over the last 10 % below half "
        "of that best, or, learned or not, below half of random play (benchmarks/step_sizes.py, "
        "fixed before the runs).", "",
        "| alpha | sqrt(2 eps) | Rule | Seeds | Final return: IQM [95 % interval] "
        "| Learned and kept it | Learned, then collapsed | Collapsed without learning "
        "| Neither |",
        "|--:|--:|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        estimate, low, high = iqm_interval([row["finals"]])
        lines.append(
            f"| {row['alpha']:g} | {row['length']:.3g} | {row['rule']} | {row['seeds']} "
            f"| {estimate:.1f} [{low:.1f}, {high:.1f}] | "
            + " | ".join(str(row[name]) for name in FATES) + " |"
        )
    cpu = record["machine"]
    lines += [
        "", "Final return: mean over the last 100 training episodes of a seed; interval: 95 % "
        f"percentile bootstrap. Measured {record['date']} on {cpu['cpu']}, {cpu['cores']} cores.",
        "", "```", "python -m benchmarks step-sizes", "python -m benchmarks report", "```", "",
    ]
    return lines


def plot(results: Path) -> None:
    """Final returns and the share of collapsed runs, against the length of the first steps."""
    import matplotlib.pyplot as plt

    from benchmarks.plots import STYLE, save

    rows = summary(results)
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(7.6, 2.9), layout="constrained")
        for rule, color, shift in (("plain", "#D55E00", 0.94), ("restricted", "#0072B2", 1.06)):
            chosen = [row for row in rows if row["rule"] == rule]
            xs = [row["length"] for row in chosen]
            for row in chosen:
                points = np.full(row["seeds"], row["length"] * shift)
                left.plot(points, row["finals"], "o", color=color, markersize=3, alpha=0.35)
            middle = [iqm_interval([row["finals"]])[0] for row in chosen]
            left.plot(xs, middle, color=color, label=rule)
            ends = [row["collapsed"] + row["collapsed at once"] for row in chosen]
            share = [100 * x / row["seeds"] for x, row in zip(ends, chosen)]
            right.plot(xs, share, "o-", color=color, markersize=4, label=rule)
        left.set_ylabel("return of the last 100 episodes")
        right.set_ylabel("runs that collapsed (%)")
        right.set_ylim(-4, 104)
        for axes in (left, right):
            axes.set_xscale("log")
            axes.set_xlabel("length of the first steps, |Δθ|")
        right.legend(title="step (left, line: IQM of the seeds)", loc="upper left")
        save(figure, results / PICTURE)


def main(work: Path, results: Path, scripts: Path, parallel: int, seeds: int) -> int:
    if not (scripts / "reinforce.py").is_file():
        raise BenchmarkError(f"there is no script reinforce.py in {scripts}")
    results = results.resolve()
    complete = run(work.resolve(), results, scripts.resolve(), parallel, seeds)
    for row in summary(results):
        shown = {k: v for k, v in row.items() if k not in ("record", "finals")}
        print(json.dumps(shown | {"mean": round(float(row["finals"].mean()), 1)}))
    return 0 if complete else 1
