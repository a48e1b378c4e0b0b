"""The scripts on a GPU: `python -m benchmarks cuda`, on a machine that has one.

Of each task of the suite: a run of the script, eager; one with --compile; one whose compiled parts
are replayed as CUDA graphs besides; and one of the peer with the same hyperparameters: all on the
GPU. They warm up side by side. Then each has its turn of a tenth of its steps, while the others are
held, so that what else the machine does meanwhile meets all alike; a round of turns is a pair. Last
come the scripts on the CPU of the same machine, on one thread, at most as many at once as it has
cores.
"""

import contextlib
import datetime
import itertools
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.results import read_scalars
from benchmarks.speed import (
    POLL_SECONDS,
    TimedRun,
    at_share,
    facts,
    keep_row,
    least_to_greatest,
    make_job,
    measured,
    read_rows,
    row_name,
    spread,
)
from benchmarks.suites import BenchmarkError, Task, load_suite

FILE = "cuda.json"
WARM_UP, TURN = 0.3, 0.1  # shares of a run's steps
ENDS = [round(x, 6) for x in np.arange(WARM_UP, 1.05, TURN).tolist()]  # of warm-up and turns
SIDES = ("eager", "compiled", "graphs", "peer")
GRAPHS = {"TORCHINDUCTOR_CUDAGRAPHS": "1"}  # what mode="reduce-overhead" of torch.compile sets


def gpu_name() -> str:
    """BenchmarkError if there is none."""
    import torch

    if not torch.cuda.is_available():
        raise BenchmarkError("torch finds no CUDA device here")
    return torch.cuda.get_device_name()


def turn_rates(steps: np.ndarray, times: np.ndarray, turns: list[tuple[float, float]],
               active: Callable[[np.ndarray], np.ndarray]) -> list[float | None]:
    """Steps per second of each turn after the first one, the warm-up: from the last point of the
    curves before a turn to the last one in it, and None where it has none. Steps and times of day
    are the points', active turns such times into seconds of running."""
    last = [int(np.searchsorted(times, end, "right")) - 1 for _, end in turns]
    seconds = active(times)
    return [round(float((steps[b] - steps[a]) / (seconds[b] - seconds[a])), 1) if b > a >= 0
            else None for a, b in itertools.pairwise(last)][: len(ENDS) - 1]


def found_in(run: TimedRun) -> dict[str, Any]:
    """What is kept of a side's run, or why there is nothing."""
    try:
        peak = run.peak_mib()
        steps, sps = read_scalars(run.directory / "run", "charts/SPS")
        times = read_scalars(run.directory / "run", "charts/SPS", times=True)[1]
        if not len(steps):
            raise BenchmarkError(f"{run.directory.name} has no points of charts/SPS")
        rates = turn_rates(steps, times, run.turns, run.active)
    except BenchmarkError as error:
        return {"failed": f"{error}"[-200:]}
    first = float(steps[0] / sps[0])
    return {"sps": rates, "first_point_seconds": round(first, 2), "peak_mib": round(peak)}


def warm_up(runs: list[TimedRun]) -> None:
    """Let all run at once, each until its warm-up is done."""
    start, waiting = time.time(), list(runs)
    while waiting:
        for run in list(waiting):
            if run.ended() or at_share(ENDS[0], run.job.task)(run.directory):
                run.hold(start)
                waiting.remove(run)
        time.sleep(POLL_SECONDS)


def measure(tasks: list[Task], work: Path, scripts: Path, gpu: str, keep: Callable[[Any], None],
            device: str = "cuda") -> None:
    """keep() a row of cuda.json for each of these tasks, which warm up side by side."""
    shutil.rmtree(work, ignore_errors=True)
    with contextlib.ExitStack() as stack:
        rows, sides = [], []
        for number, task in enumerate(tasks):
            ours = make_job(task, 1, scripts)
            peer = make_job(replace(task, peer="sb3"), 1, scripts)
            jobs = {side: peer if side == "peer" else ours for side in SIDES}
            runs = {}
            for side, job in jobs.items():
                # A directory for each task, as what is compiled is kept beside the run's.
                where, compiled = work / str(number) / side, side in ("compiled", "graphs")
                variables = GRAPHS if side == "graphs" else {}
                run = TimedRun(job, where, compiled, 1, device, variables)
                runs[side] = stack.enter_context(run)
            sides.append(runs)
            rows.append(facts(task, replace(ours, versions=peer.versions)) | {"gpu": gpu})
        warm_up([run for runs in sides for run in runs.values()])
        for row, runs in zip(rows, sides):
            for end in ENDS[1:]:
                for run in runs.values():
                    run.go_on(at_share(end, run.job.task))
            for run in runs.values():
                run.go_on()  # to its end: the evaluation, the files
            row["runs"] = {side: found_in(run) for side, run in runs.items()}
            keep(row)


def on_cpus(tasks: list[Task], work: Path, scripts: Path,
            keep: Callable[[Task, dict[str, Any]], None]) -> None:
    """keep() what is found of each task's script on the CPU, as soon as its run has ended."""
    waiting, running = list(tasks), []
    most = min(len(tasks), os.cpu_count() or 1)
    with contextlib.ExitStack() as stack:
        while waiting or running:
            while waiting and len(running) < most:
                task = waiting.pop(0)
                job = make_job(task, 1, scripts)
                run = TimedRun(job, work / "cpu" / task.label.replace(" ", "-"), False, 1)
                running.append((stack.enter_context(run), time.time()))
            for run, start in list(running):
                done, task = len(run.turns), run.job.task
                if run.ended() or (done < len(ENDS) and at_share(ENDS[done], task)(run.directory)):
                    run.turns.append((run.turns[-1][1] if done else start, time.time()))
                if run.ended():
                    running.remove((run, start))
                    date = datetime.datetime.now(datetime.UTC).date().isoformat()
                    keep(task, found_in(run) | {"at_once": most, "date": date})
            time.sleep(POLL_SECONDS)


def cuda(tasks: list[Task], work: Path, results: Path, scripts: Path) -> None:
    """Measure what the results file does not hold of these scripts, libraries and this machine; a
    row is written when it is complete."""
    start, gpu = time.perf_counter(), gpu_name()

    def keep(row: dict[str, Any]) -> None:
        keep_row(results / FILE, row)
        print(f"{time.perf_counter() - start:5.0f} s  {cuda_line(row)}", flush=True)

    def held(task: Task) -> dict[str, Any] | None:
        ours, peer = (make_job(replace(task, peer=x), 1, scripts) for x in ("", "sb3"))
        wanted = facts(task, replace(ours, versions=peer.versions)) | {"gpu": gpu}
        names = ("script", "env", "variant", "steps", "flags", "script_hash", "versions",
                 "machine", "gpu")
        for row in read_cuda(results):
            same = all(row[name] == wanted[name] for name in names)
            if same and not any("failed" in row["runs"][side] for side in SIDES):
                return row
        return None

    for script in dict.fromkeys(task.script for task in tasks):
        group = [task for task in tasks if task.script == script and not held(task)]
        if group:
            measure(group, work / "cuda", scripts, gpu, keep)
    todo = [task for task in tasks
            if (row := held(task)) and "sps" not in row["runs"].get("cpu", {})]

    def keep_cpu(task: Task, found: dict[str, Any]) -> None:
        if row := held(task):
            row["runs"]["cpu"] = found
            keep(row)

    on_cpus(todo, work / "cuda", scripts, keep_cpu)


def missing(rows: list[dict[str, Any]], tasks: list[Task]) -> list[str]:
    """A line for the tasks of each script that have no row, or no rate on the CPU."""
    have = {(row["script"], row["env"], row["variant"]): row["runs"] for row in rows}
    absent: dict[str, list[str]] = {}
    for task in tasks:
        runs = have.get((task.script, task.env, task.variant))
        if runs is None:
            absent.setdefault(f"{task.script} on {task.env}", []).append(task.variant)
        elif "cpu" not in runs:
            absent.setdefault(f"{task.script} on the CPU", []).append(task.variant)
    return [f"- Missing: {where}: {'; '.join(variants)}" for where, variants in absent.items()]


def read_cuda(results: Path) -> list[dict[str, Any]]:
    return read_rows(results / FILE)


def rates(row: dict[str, Any], side: str) -> list[float]:
    """Steps per second of the turns that have a rate; empty if there was no run or it failed."""
    return [x for x in row["runs"].get(side, {}).get("sps", []) if x]


def ratios(row: dict[str, Any], side: str) -> list[float]:
    """A side's rate over the peer's, round by round; empty if either failed."""
    pairs = zip(*(row["runs"][x].get("sps", []) for x in (side, "peer")))
    return [ours / peer for ours, peer in pairs if ours and peer]


def cuda_line(row: dict[str, Any]) -> str:
    runs, cells = row["runs"], [row_name(row), row["env"]]
    cells += [spread(each, 0) if (each := rates(row, x)) else "failed" if x in runs else "-"
              for x in (*SIDES, "cpu")]
    cells += [spread(each, 2) if (each := ratios(row, side)) else "-" for side in SIDES[:-1]]
    cells += [", ".join(f"{runs[side].get('peak_mib', '-')}" for side in SIDES)]
    firsts = (runs[side].get("first_point_seconds") for side in SIDES[:-1])
    cells += [", ".join("-" if x is None else f"{x:.0f}" for x in firsts)]
    return f"| {' | '.join(map(str, cells))} |"


def cuda_section(rows: list[dict[str, Any]]) -> list[str]:
    """A table for each card, in Markdown; empty if nothing was measured."""
    if not rows:
        return []
    tasks = load_suite("cuda").tasks
    order = {(task.script, task.variant): i for i, task in enumerate(tasks)}
    rows = sorted(rows, key=lambda row: order.get((row["script"], row["variant"]), len(order)))
    lines = ["### cuda", ""]
    for gpu in dict.fromkeys(row["gpu"] for row in rows):
        lines += card_table([row for row in rows if row["gpu"] == gpu], tasks)
    return [*lines, "```", "python -m benchmarks cuda", "python -m benchmarks report", "```", ""]


def card_table(rows: list[dict[str, Any]], tasks: list[Task]) -> list[str]:
    torches = ", ".join(sorted({row["versions"]["torch"] for row in rows}))
    lines = [f"- Failed: {row_name(row)}, {side}: {run['failed']}" for row in rows
             for side, run in row["runs"].items() if "failed" in run]
    lines += missing(rows, tasks)
    beside = [run["at_once"] for row in rows if "at_once" in (run := row["runs"].get("cpu", {}))]
    counts = [len(each) for row in rows for x in (*SIDES, "cpu") if (each := rates(row, x))]
    turns = least_to_greatest(counts or [0])
    on_cpu = (f"On the CPU: the script, eager, on one thread, at most {max(beside)} runs at once. "
              if beside else "")
    return [
        "| Script | Environment | Eager, steps/s | with `--compile` | with CUDA graphs | SB3's "
        "| on the CPU | **ratio** | **compiled** | **graphs** "
        "| Peak MiB of the host: eager, compiled, graphs, SB3 "
        "| First point: eager, compiled, graphs (s) |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
        *map(cuda_line, rows), "",
        f"On {rows[0]['gpu']}, torch {torches}; width: of the two hidden layers of each network. "
        "One run of each kind, in turns of a tenth of its steps, or of an update where that is "
        f"longer: median [least, greatest] over {turns} turns, after {WARM_UP:.0%} to warm up. SB3 "
        "(sb3-contrib for TRPO) has the same hyperparameters, on the GPU too; a ratio is to its "
        "turn of the same round. CUDA graphs: `TORCHINDUCTOR_CUDAGRAPHS=1` beside `--compile`, "
        "which is what `torch.compile`'s "
        f"mode reduce-overhead sets. {on_cpu}The first points are of runs that all started at "
        f"once, with nothing compiled before. {measured(rows)}", "",
        *lines, *[""] * bool(lines),
    ]
