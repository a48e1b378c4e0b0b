"""How long until it has learned: `python -m benchmarks threshold`.

Seconds from the start of the process (imports, compilation and all) until the mean return of the
last 100 training episodes is at a level, of the script eager, with --compile, and of its peer with
the same hyperparameters; seed by seed, one after the other. A run that never gets there counts as
such: it is never left out. One that does is ended at its next line of progress.
"""

import math
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.live import last_progress
from benchmarks.results import read_scalars
from benchmarks.speed import (
    CACHE,
    TimedRun,
    cpu,
    facts,
    keep_row,
    make_job,
    measured,
    read_rows,
    row_name,
)
from benchmarks.suites import BenchmarkError, Task

FILE = "threshold.json"
LEVELS = {"CartPole-v1": 475.0, "HalfCheetah-v5": 1500.0}
EPISODES = 100


def first_at(steps: np.ndarray, returns: np.ndarray, lengths: np.ndarray, level: float):
    """Index of the first point at which the mean of the last 100 episodes is at the level, or None.
    A point is the mean return and length of the episodes that ended since the one before; how many
    those were is the steps in between over their length, as the curves do not say it."""
    counts = np.diff(steps, prepend=0) / lengths
    for i in range(len(steps)):
        left, total = float(EPISODES), 0.0
        for j in range(i, -1, -1):
            taken = min(left, counts[j])
            total, left = total + taken * returns[j], left - taken
            if left <= 0:
                break
        if left <= 0 and total / EPISODES >= level:
            return i
    return None


def reached(run_dir: Path, started: float, level: float) -> dict[str, float | None]:
    """Seconds since started, a time.time(), and steps until the level; None if it never was."""
    steps, returns = read_scalars(run_dir, "charts/episodic_return")
    _, lengths = read_scalars(run_dir, "charts/episodic_length")
    _, times = read_scalars(run_dir, "charts/episodic_return", times=True)
    # A run that goes on may have written a point after the first or the second look.
    whole = min(len(steps), len(lengths), len(times))
    steps, returns, lengths = steps[:whole], returns[:whole], lengths[:whole]
    if (i := first_at(steps, returns, lengths, level)) is None:
        return {"seconds": None, "steps": None}
    return {"seconds": round(times[i] - started, 2), "steps": int(steps[i])}


def learned(level: float) -> Callable[[Path], bool]:
    """Whether the run in a directory has got there, which its events say; they are read when its
    last line of progress is a new one with such a return, which is seldom, as a look costs time."""
    looked_at = None

    def enough(directory: Path) -> bool:
        nonlocal looked_at
        line = last_progress(directory / "stdout.txt")
        if line is None or line == looked_at or not float(line[1]) >= level:
            return False
        looked_at = line
        return reached(directory / "run", 0.0, level)["seconds"] is not None

    return enough


def measure(task: Task, seeds: int, work: Path, scripts: Path, say: Any) -> dict[str, Any]:
    """The row of threshold.json for a task."""
    level = LEVELS[task.env]
    sides = {"eager": task, "compiled": task, "peer": Task(**{**vars(task), "peer": "sb3"})}
    runs: dict[str, list[dict[str, float | None]]] = {name: [] for name in sides}
    jobs = {}
    shutil.rmtree(work / CACHE, ignore_errors=True)
    for seed in range(1, seeds + 1):
        for name, side in sides.items():
            jobs[name], started = make_job(side, seed, scripts), time.time()
            with TimedRun(jobs[name], work / name, name == "compiled", 1) as run:
                run.go_on(learned(level))
                if run.ended():
                    run.result()  # which raises, if it went wrong
            runs[name].append(reached(work / name / "run", started, level))
            say(f"{task.label} on {task.env}, seed {seed}, {name}: {runs[name][-1]['seconds']} s")
    job = replace(jobs["eager"], versions=jobs["peer"].versions)
    return facts(task, job) | {"level": level, "runs": runs}


def read_threshold(results: Path) -> list[dict[str, Any]]:
    return read_rows(results / FILE)


def threshold(tasks: list[Task], seeds: int, work: Path, results: Path, scripts: Path) -> None:
    """Measure task by task; each one's row is written when it is complete."""
    if unknown := [task.env for task in tasks if task.env not in LEVELS]:
        raise BenchmarkError(f"no level is set for {unknown[0]}; there are: {', '.join(LEVELS)}")
    start = time.perf_counter()
    say = lambda line: print(f"{time.perf_counter() - start:5.0f} s  {line}", flush=True)
    for task in tasks:
        row = measure(task, seeds, work / "threshold", scripts, say)
        keep_row(results / FILE, row)


def median(values: list[float | None]) -> str:
    """Median [least, greatest]; a run that did not get there took longer than any that did."""
    numbers = sorted(math.inf if x is None else x for x in values)
    middle, say = statistics.median(numbers), lambda x: f"{x:,.0f}" if x < math.inf else "never"
    return f"{say(middle)} [{say(numbers[0])}, {say(numbers[-1])}]"


def threshold_line(row: dict[str, Any]) -> str:
    runs, name = row["runs"], row_name(row)
    cells = [name, row["env"], f"{row['level']:g}", len(runs["eager"])]
    cells += [median([run["seconds"] for run in each]) for each in runs.values()]
    cells += [median([run["steps"] for run in runs[side]]) for side in ("eager", "peer")]
    cells += [cpu(row)]
    return f"| {' | '.join(map(str, cells))} |"


def threshold_section(rows: list[dict[str, Any]]) -> list[str]:
    """The table, in Markdown; empty if nothing was measured."""
    if not rows:
        return []
    return [
        "### threshold", "",
        "| Script | Environment | Return | Seeds | Seconds | with `--compile` | SB3's seconds "
        "| Steps | SB3's steps | CPU |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|---|", *map(threshold_line, rows), "",
        "From the start of the process until the mean return of the last 100 training episodes is "
        "at the level: median [least, greatest] over the seeds; never: not within the run's steps. "
        "Stable-Baselines3 with the same hyperparameters, runs one after the other, on one thread. "
        f"{measured(rows)}",
        "", "```", "python -m benchmarks threshold", "python -m benchmarks report", "```", "",
    ]
