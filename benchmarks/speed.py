"""How fast the scripts train, beside their peers: `python -m benchmarks speed`.

Each pair is one training run of the script, eager, one with --compile and one of the peer with the
same hyperparameters, one after the other, so that what else the machine does meanwhile meets all
three alike. What counts is the ratio within a pair, and of the pairs the median.
"""

import datetime
import json
import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.peers import peer_hash, peer_settings
from benchmarks.results import directory_lock, machine, read_scalars, write_atomically
from benchmarks.runner import THREADS, command_line, environment
from benchmarks.suites import BenchmarkError, Job, Task, commit_of, library_versions, script_hash

WARM_UP = 0.25  # share of a run's steps before the clock starts: torch.compile works in there
FILE = "speed.json"
CACHE = "inductor_cache"
POLL_SECONDS = 0.5


def steady_rate(run_dir: Path) -> tuple[float, float]:
    """Steps per second after the warm-up, and the seconds until the curves' first point."""
    steps, sps = read_scalars(run_dir, "charts/SPS")
    if len(steps) < 3:
        raise BenchmarkError(f"{run_dir} has {len(steps)} points of charts/SPS: too short a run")
    seconds = steps / sps
    first = int((steps < WARM_UP * steps[-1]).sum())
    first = min(first, len(steps) - 2)
    return float((steps[-1] - steps[first]) / (seconds[-1] - seconds[first])), float(seconds[0])


def make_job(task: Task, seed: int, scripts: Path) -> Job:
    path = scripts / f"{task.script}.py"
    if not path.is_file():
        raise BenchmarkError(f"there is no script {path.name} in {scripts}")
    # The evaluation is not timed: one episode is enough of it.
    settings = peer_settings(path, task.flags | {"eval_episodes": 1}) if task.peer else None
    hashed = peer_hash(settings) if settings else script_hash(path)
    versions = library_versions(task)
    return Job(task, seed, path.read_bytes(), hashed, versions, commit_of(path), settings)


def run_once(job: Job, directory: Path, compiled: bool, threads: int = 1,
             enough: Callable[[Path], bool] | None = None) -> dict[str, float]:
    """One run in a process of its own: steady rate, time to the first point, peak memory. It is
    ended early where enough(directory) says so."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    script = directory / f"{job.task.script}.py"
    script.write_bytes(job.source)
    command = [*command_line(job, script, directory / "run"), "--num-threads", str(threads)]
    if not job.task.peer:
        command += ["--eval-episodes", "1"] + ["--compile"] * compiled
    # A cache of its own for each task, beside the runs' directories, which are made anew: the first
    # compiled run is a cold one, the others are warm.
    own = {"TORCHINDUCTOR_CACHE_DIR": str(directory.parent / CACHE)}
    own |= dict.fromkeys(THREADS, str(threads))
    with open(directory / "stdout.txt", "wb") as out, open(directory / "stderr.txt", "wb") as err:
        process = subprocess.Popen(
            command, env=environment() | own, cwd=directory, stdin=subprocess.DEVNULL,
            stdout=out, stderr=err,
        )
        try:
            stopped = False
            while not (ended := os.wait4(process.pid, os.WNOHANG if enough else 0))[0]:
                time.sleep(POLL_SECONDS)
                if enough and not stopped and enough(directory):
                    process.terminate()
                    stopped = True
            _, status, usage = ended
        except BaseException:
            process.kill()
            process.wait()
            raise
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode and not stopped:
        last = (directory / "stderr.txt").read_text(errors="replace").splitlines()[-1:]
        raise BenchmarkError(f"{job} ended with status {process.returncode}: {''.join(last)}")
    rate, first = steady_rate(directory / "run")
    return {"sps": rate, "first_point_seconds": first, "peak_mib": usage.ru_maxrss / 1024}


def facts(task: Task, job: Job, threads: int = 1) -> dict[str, Any]:
    """What a row of timings says of itself: the task, what ran, when and on what."""
    return {
        **{key: asdict(task)[key] for key in ("script", "variant", "env", "steps", "flags")},
        "script_hash": job.script_hash, "commit": job.commit, "versions": job.versions,
        "machine": machine(), "threads": threads,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "load_average": round(os.getloadavg()[0], 1),
    }


def measured(rows: list[dict[str, Any]]) -> str:
    """When and on what rows were measured."""
    machines = sorted({f"{x['machine']['cpu']}, {x['machine']['cores']} cores" for x in rows})
    dates = sorted({row["date"] for row in rows})
    when = f"{dates[0]} to {dates[-1]}" if dates[1:] else dates[0]
    return f"Measured {when} on {'; '.join(machines)}."


def measure(task: Task, pairs: int, threads: int, work: Path, scripts: Path, say: Any):
    """The row of speed.json for a task; seed k in pair k, alike for all."""
    sides = {"eager": task, "compiled": task}
    if task.script in ("ppo", "ppo_continuous", "a2c", "trpo"):
        sides["peer"] = Task(**{**vars(task), "peer": "sb3"})
    shutil.rmtree(work / CACHE, ignore_errors=True)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    jobs = {}
    for pair in range(1, pairs + 1):
        for name, side in sides.items():
            jobs[name] = make_job(side, pair, scripts)
            runs[name].append(run_once(jobs[name], work / name, name == "compiled", threads))
            rates = " ".join(f"{run['sps']:.0f}" for run in runs[name])
            say(f"{task.label} on {task.env}, pair {pair}, {name}: {rates} steps/s")
    job = replace(jobs["eager"], versions=jobs.get("peer", jobs["eager"]).versions)
    return facts(task, job, threads) | {
        "runs": {
            name: [{key: round(x, 2) for key, x in run.items()} for run in each]
            for name, each in runs.items()
        },
    }


def row_key(row: dict[str, Any]) -> tuple[str, str, str, int]:
    return row["script"], row["env"], row["variant"], row["threads"]


def read_rows(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text()) if path.exists() else []


def keep_row(path: Path, row: dict[str, Any]) -> None:
    """Write a row into its file, in place of the one of the same task."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with directory_lock(path.parent, wait=True):
        rows = {row_key(x): x for x in [*read_rows(path), row]}
        text = json.dumps([rows[key] for key in sorted(rows)], indent=1) + "\n"
        write_atomically(path, text)


def read_speed(results: Path) -> list[dict[str, Any]]:
    return read_rows(results / FILE)


def speed(tasks: list[Task], pairs: int, threads: int, work: Path, results: Path,
          scripts: Path) -> None:
    """Measure task by task; each one's row is written when it is complete."""
    start = time.perf_counter()
    say = lambda line: print(f"{time.perf_counter() - start:5.0f} s  {line}", flush=True)
    results.mkdir(parents=True, exist_ok=True)
    for task in tasks:
        row = measure(task, pairs, threads, work / "speed", scripts, say)
        keep_row(results / FILE, row)


def ratios(row: dict[str, Any], name: str) -> list[float]:
    """Our rate over the peer's, pair by pair."""
    pairs = zip(row["runs"][name], row["runs"]["peer"], strict=True)
    return [ours["sps"] / peer["sps"] for ours, peer in pairs]


def spread(values: list[float], digits: int) -> str:
    return (
        f"{statistics.median(values):,.{digits}f} "
        f"[{min(values):,.{digits}f}, {max(values):,.{digits}f}]"
    )


def speed_line(row: dict[str, Any]) -> str:
    runs, name = row["runs"], row["script"] + f" ({row['variant']})" * bool(row["variant"])
    rates = {side: spread([run["sps"] for run in each], 0) for side, each in runs.items()}
    peak = {side: f"{max(run['peak_mib'] for run in each):.0f}" for side, each in runs.items()}
    cold, *warm = [run["first_point_seconds"] for run in runs["compiled"]]
    cells = [name, row["env"], row["threads"], len(runs["eager"])]
    cells += [rates["eager"], rates["compiled"]]
    if "peer" in runs:
        cells += [rates["peer"], *(spread(ratios(row, x), 2) for x in ("eager", "compiled"))]
        cells += [f"{peak['eager']}, {peak['peer']}"]
    else:
        cells += ["-", "-", "-", peak["eager"]]
    cells += [f"{cold:.0f}, {statistics.median(warm):.0f}" if warm else f"{cold:.0f}, -"]
    return f"| {' | '.join(map(str, cells))} |"


def speed_section(rows: list[dict[str, Any]]) -> list[str]:
    """The table of ratios, in Markdown."""
    lines = [
        "### speed", "",
        "| Script | Environment | Threads | Pairs | Steps/s | with `--compile` | SB3's steps/s "
        "| **ratio** | **compiled** | Peak MiB: ours, SB3 "
        "| First point, compiled: cold, warm (s) |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    lines += [speed_line(row) for row in rows]
    more = sorted({row["threads"] for row in rows} - {1})
    lines += [
        "",
        "Median [least, greatest] over the pairs: a pair is a run of the script, one with "
        "`--compile` and one of Stable-Baselines3 (sb3-contrib for TRPO) with the same "
        "hyperparameters, one after the other; a ratio is taken within its pair. "
        f"Clocked are whole iterations after the first {WARM_UP:.0%} of the steps, of grpo_rloo "
        "completions. "
        f"{measured(rows)}",
        "", "```", "python -m benchmarks speed",
        *(f"python -m benchmarks speed --threads {n}" for n in more),
        "python -m benchmarks report", "```", "",
    ]
    return lines
