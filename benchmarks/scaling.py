"""What more environments and wider networks change: `python -m benchmarks scaling`.

Of each task of the suite, seed by seed and in turns: steps per second, eager and with --compile,
and how long until it has learned. Beside them what the environments alone manage, stepped one after
the other as the scripts do, and all at once by Gymnasium's vectorised environment if it has one.
"""

import time
from pathlib import Path
from typing import Any

from benchmarks.speed import facts, keep_row, make_job, measured, read_rows, run_once, spread
from benchmarks.suites import BenchmarkError, Task
from benchmarks.threshold import LEVELS, median, reached

FILE = "scaling.json"
SIDES = ("eager", "compiled")
MODES = ("sync", "vector_entry_point")  # Gymnasium's names
ALONE = 20_000  # steps that the environments are timed over


def environment_rate(env: str, num_envs: int, mode: str) -> float | None:
    """Steps per second of environments alone, random actions; None if Gymnasium lacks the mode."""
    import gymnasium as gym

    if mode == "vector_entry_point" and gym.spec(env).vector_entry_point is None:
        return None
    envs = gym.make_vec(env, num_envs, vectorization_mode=mode)
    envs.action_space.seed(1)
    actions = [envs.action_space.sample() for _ in range(max(20, ALONE // num_envs))]
    envs.reset(seed=1)
    start = time.perf_counter()
    for action in actions:
        envs.step(action)
    seconds = time.perf_counter() - start
    envs.close()
    return round(len(actions) * num_envs / seconds, 1)


def scaling(tasks: list[Task], seeds: int, work: Path, results: Path, scripts: Path) -> None:
    """Measure seed by seed; a task's row is written after each of its seeds."""
    for task in tasks:
        if task.env not in LEVELS:
            raise BenchmarkError(f"no level is set for {task.env}; there are: {', '.join(LEVELS)}")
        if "num_envs" not in task.flags:
            raise BenchmarkError(f"{task.label} on {task.env} does not say its num_envs")
    start, runs = time.perf_counter(), {task.label: [] for task in tasks}
    for seed in range(1, seeds + 1):
        for task in tasks:
            job, level = make_job(task, seed, scripts), LEVELS[task.env]
            found: dict[str, Any] = {}
            for side in SIDES:
                began, directory = time.time(), work / "scaling" / side
                rates = run_once(job, directory, side == "compiled")
                learned = reached(directory / "run", began, level)
                found[side] = {key: round(x, 2) for key, x in rates.items()} | learned
            for mode in MODES:
                found[mode] = environment_rate(task.env, task.flags["num_envs"], mode)
            runs[task.label].append(found)
            row = facts(task, job) | {"level": level, "seeds": runs[task.label]}
            keep_row(results / FILE, row)
            seconds = time.perf_counter() - start
            print(f"{seconds:5.0f} s  seed {seed}  {scaling_line(row)}", flush=True)


def read_scaling(results: Path) -> list[dict[str, Any]]:
    return read_rows(results / FILE)


def scaling_line(row: dict[str, Any]) -> str:
    seeds, cells = row["seeds"], [row["script"], row["env"], row["variant"]]
    cells += [spread([seed[side]["sps"] for seed in seeds], 0) for side in SIDES]
    for side, key in (("eager", "seconds"), ("compiled", "seconds"), ("eager", "steps")):
        cells.append(median([seed[side][key] for seed in seeds]))
    for mode in MODES:
        rates = [seed[mode] for seed in seeds]
        cells.append("-" if None in rates else spread(rates, 0))
    return f"| {' | '.join(cells)} |"


def scaling_section(rows: list[dict[str, Any]]) -> list[str]:
    """The table, in Markdown; empty if nothing was measured."""
    if not rows:
        return []
    # Environments before widths, each from few to many.
    order = lambda row: (row["flags"].get("hidden_size", 0), row["flags"]["num_envs"])
    seeds = min(len(row["seeds"]) for row in rows)
    return [
        "### scaling", "",
        "| Script | Environment | What grows | Steps/s | with `--compile` | Seconds to the level "
        "| with `--compile` | Steps to it | Environments alone, steps/s | vectorised, steps/s |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|--:|",
        *map(scaling_line, sorted(rows, key=order)), "",
        f"Median [least, greatest] of {seeds} seeds, on one thread. "
        f"The level: a mean return of {rows[0]['level']:g} over the last 100 training episodes; "
        f"never: not within {rows[0]['steps']:,} steps. The last columns: the environments without "
        "an agent, stepped one after the other, as the scripts do, and all at once, by Gymnasium's "
        f"vectorised CartPole. {measured(rows)}",
        "", "```", f"python -m benchmarks scaling --seeds {seeds}",
        "python -m benchmarks report", "```", "",
    ]
