"""How fast the scripts train, beside their peers: `python -m benchmarks speed`.

Each pair is a training run of the script, eager, one with --compile and one of the peer with the
same hyperparameters. They take turns of a twentieth of their steps, each held while the others have
theirs, so that what else the machine does meanwhile meets all three alike. What counts is the ratio
within a pair, and of the pairs the median.
"""

import contextlib
import datetime
import json
import os
import shutil
import signal
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.live import last_progress
from benchmarks.peers import peer_hash, peer_settings
from benchmarks.results import directory_lock, machine, read_scalars, write_atomically
from benchmarks.runner import THREADS, command_line, environment
from benchmarks.suites import (
    ROOT,
    BenchmarkError,
    Job,
    Task,
    commit_of,
    library_versions,
    script_hash,
)

WARM_UP = 0.25  # share of a run's steps before the clock starts: torch.compile works in there
FILE = "speed.json"
CACHE = "inductor_cache"
TURN = 0.05  # share of its steps that a run does before the next one has its turn
POLL_SECONDS = 0.02
# What this project set out for: our rate over the peer's on one thread, eager and compiled. Of a
# script in its variants, or in one of them.
TARGETS = {
    "ppo": {"eager": 2.0, "compiled": 2.6}, "ppo_continuous": {"eager": 2.2, "compiled": 2.6},
    "a2c": {"eager": 2.0}, "trpo": {"eager": 2.0},
    "trpo (4 x 512)": {"eager": 2.5}, "trpo (8 x 256)": {"eager": 1.8},
}


def steady_rate(run_dir: Path, clock: Callable[[np.ndarray], np.ndarray]) -> tuple[float, float]:
    """Steps per second after the warm-up, where clock turns times of day into seconds of running;
    and the seconds until the curves' first point."""
    steps, sps = read_scalars(run_dir, "charts/SPS")
    if len(steps) < 3:
        raise BenchmarkError(f"{run_dir} has {len(steps)} points of charts/SPS: too short a run")
    seconds = clock(read_scalars(run_dir, "charts/SPS", times=True)[1])
    first = int((steps < WARM_UP * steps[-1]).sum())
    first = min(first, len(steps) - 2)
    rate = (steps[-1] - steps[first]) / (seconds[-1] - seconds[first])
    return float(rate), float(steps[0] / sps[0])


def make_job(task: Task, seed: int, scripts: Path) -> Job:
    path = scripts / f"{task.script}.py"
    if not path.is_file():
        raise BenchmarkError(f"there is no script {path.name} in {scripts}")
    # The evaluation is not timed: one episode is enough of it.
    settings = peer_settings(path, task.flags | {"eval_episodes": 1}) if task.peer else None
    hashed = peer_hash(settings) if settings else script_hash(path)
    versions = library_versions(task)
    return Job(task, seed, path.read_bytes(), hashed, versions, commit_of(path), settings)


class TimedRun:
    """A run in a process of its own, which can be held and let go on."""

    def __init__(self, job: Job, directory: Path, compiled: bool, threads: int,
                 device: str = "cpu", variables: dict[str, str] | None = None):
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        script = directory / f"{job.task.script}.py"
        script.write_bytes(job.source)
        command = [*command_line(job, script, directory / "run"), "--num-threads", str(threads)]
        if not job.task.peer:
            command += ["--eval-episodes", "1"] + ["--compile"] * compiled
        if device != "cpu":
            command += ["--device", device]
        # A cache of its own for each task, beside the runs' directories, which are made anew: the
        # first compiled run is a cold one, the others are warm.
        own = {"TORCHINDUCTOR_CACHE_DIR": str(directory.parent / CACHE)}
        own |= dict.fromkeys(THREADS, str(threads)) | (variables or {})
        with (directory / "stdout.txt").open("wb") as out, (
                directory / "stderr.txt").open("wb") as err:
            # In a session of its own: Ctrl-Z and fg in a terminal must not wake what is held.
            self.process = subprocess.Popen(
                command, env=environment(gpu=device != "cpu") | own, cwd=directory,
                stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True,
            )
        self.job, self.directory, self.usage = job, directory, None
        self.turns: list[tuple[float, float]] = []  # times from and to which it was let run

    def __enter__(self) -> "TimedRun":
        return self

    def __exit__(self, *_: Any) -> None:
        if self.usage is None:  # SIGKILL ends a held process too
            self.process.kill()
            self.process.wait()

    def ended(self) -> bool:
        if self.usage is None:
            number, status, usage = os.wait4(self.process.pid, os.WNOHANG)
            if number:
                self.usage, self.process.returncode = usage, os.waitstatus_to_exitcode(status)
        return self.usage is not None

    def go_on(self, enough: Callable[[Path], bool] | None = None) -> None:
        """Let it run until it ends or enough(directory), then hold it."""
        if self.ended():
            return
        # os.kill, as Popen.send_signal may find that it has ended and keep that to itself.
        os.kill(self.process.pid, signal.SIGCONT)
        start = time.time()
        while not self.ended() and not (enough and enough(self.directory)):
            time.sleep(POLL_SECONDS)
        self.hold(start)

    def hold(self, start: float) -> None:
        """Hold it, if it has not ended, after a turn that began at start, a time of day."""
        if not self.ended():
            os.kill(self.process.pid, signal.SIGSTOP)
        self.turns.append((start, time.time()))

    def active(self, times: np.ndarray) -> np.ndarray:
        """For how many seconds it had run at these times."""
        return np.sum([np.clip(times, start, end) - start for start, end in self.turns], axis=0)

    def peak_mib(self) -> float:
        """Its largest memory; BenchmarkError if it has ended otherwise than by itself."""
        assert self.usage is not None
        if status := self.process.returncode:
            text = (self.directory / "stderr.txt").read_text(errors="replace")
            last = "".join(text.splitlines()[-1:])
            raise BenchmarkError(f"{self.job} ended with status {status}: {last}")
        return self.usage.ru_maxrss / 1024

    def result(self) -> dict[str, float]:
        """Of a run that has ended by itself: steady rate, time to the first point, peak memory."""
        peak = self.peak_mib()
        rate, first = steady_rate(self.directory / "run", self.active)
        return {"sps": rate, "first_point_seconds": first, "peak_mib": peak}


def run_once(job: Job, directory: Path, compiled: bool, threads: int = 1) -> dict[str, float]:
    """One run, without a break."""
    with TimedRun(job, directory, compiled, threads) as run:
        run.go_on()
        return run.result()


def at_share(share: float, task: Task) -> Callable[[Path], bool]:
    """Whether the run in a directory has done this share of its steps, by its lines of progress."""
    def enough(directory: Path) -> bool:
        line = last_progress(directory / "stdout.txt")
        return line is not None and line[0] >= share * task.steps

    return enough


def run_in_turns(jobs: dict[str, Job], work: Path, threads: int) -> dict[str, dict[str, float]]:
    """One run of each job: first the warm-ups one after the other, then all in turns."""
    with contextlib.ExitStack() as stack:
        runs = {}
        for name, job in jobs.items():
            run = TimedRun(job, work / name, name == "compiled", threads)
            runs[name] = stack.enter_context(run)
            run.go_on(at_share(WARM_UP, job.task))
        for share in np.arange(WARM_UP, 1, TURN)[1:]:
            for run in runs.values():
                if run.ended():
                    run.result()  # which raises, if it went wrong
                run.go_on(at_share(share, run.job.task))
        for run in runs.values():
            run.go_on()
        return {name: run.result() for name, run in runs.items()}


def facts(task: Task, job: Job, threads: int = 1) -> dict[str, Any]:
    """What a row of timings says of itself: the task, what ran, when and on what."""
    return {
        **{key: asdict(task)[key] for key in ("script", "variant", "env", "steps", "flags")},
        "script_hash": job.script_hash, "commit": job.commit, "versions": job.versions,
        "machine": machine(), "threads": threads,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "load_average": round(os.getloadavg()[0], 1),
    }


def row_name(row: dict[str, Any]) -> str:
    return row["script"] + f" ({row['variant']})" * bool(row["variant"])


def cpu(row: dict[str, Any]) -> str:
    """The processor's name as a cell of a table."""
    return row["machine"]["cpu"].replace("(R)", "").removesuffix(" Processor")


def least_to_greatest(values: Iterable[Any]) -> str:
    """3, 5, 5 -> "3 to 5", and 5, 5 -> "5"."""
    ordered = sorted(values)
    return " to ".join(dict.fromkeys((f"{ordered[0]}", f"{ordered[-1]}")))


def measured(rows: list[dict[str, Any]]) -> str:
    """When and on what rows were measured, and which of an earlier text of their script."""
    machines = sorted({f"{x['machine']['cpu']}, {x['machine']['cores']} cores" for x in rows})
    when = least_to_greatest(row["date"] for row in rows)
    scripts = {name: ROOT / f"{name}.py" for name in {row["script"] for row in rows}}
    current = {name: script_hash(path) for name, path in scripts.items() if path.is_file()}
    stale = sorted({row_name(row) for row in rows
                    if row["script_hash"] != current.get(row["script"], row["script_hash"])})
    earlier = f" Of an earlier text: {', '.join(stale)}." if stale else ""
    return f"Measured {when} on {'; '.join(machines)}.{earlier}"


def measure(task: Task, pairs: int, threads: int, work: Path, scripts: Path, say: Any):
    """The row of speed.json for a task; seed k in pair k, alike for all."""
    sides = {"eager": task, "compiled": task}
    if task.script in ("ppo", "ppo_continuous", "a2c", "trpo"):
        sides["peer"] = Task(**{**vars(task), "peer": "sb3"})
    shutil.rmtree(work / CACHE, ignore_errors=True)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    jobs = {}
    for pair in range(1, pairs + 1):
        jobs = {name: make_job(side, pair, scripts) for name, side in sides.items()}
        for name, found in run_in_turns(jobs, work, threads).items():
            runs[name].append(found)
        rates = {name: " ".join(f"{x['sps']:.0f}" for x in each) for name, each in runs.items()}
        words = ", ".join(f"{name} {text}" for name, text in rates.items())
        say(f"{task.label} on {task.env}, {pair} pairs, steps/s: {words}")
    job = replace(jobs["eager"], versions=jobs.get("peer", jobs["eager"]).versions)
    return facts(task, job, threads) | {
        "runs": {
            name: [{key: round(x, 2) for key, x in run.items()} for run in each]
            for name, each in runs.items()
        },
    }


def row_key(row: dict[str, Any]) -> tuple[str, str, str, int, str, str]:
    """What is measured and on what: rows of different processors stand side by side."""
    where = row.get("gpu", ""), row.get("machine", {}).get("cpu", "")
    return row["script"], row["env"], row["variant"], row["threads"], *where


def read_rows(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text()) if path.exists() else []


def keep_row(path: Path, row: dict[str, Any]) -> None:
    """Write a row into its file, in place of the one of the same task and machine."""
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
    runs, name = row["runs"], row_name(row)
    rates = {side: spread([run["sps"] for run in each], 0) for side, each in runs.items()}
    peak = {side: f"{max(run['peak_mib'] for run in each):.0f}" for side, each in runs.items()}
    cold, *warm = [run["first_point_seconds"] for run in runs["compiled"]]
    cells = [name, row["env"], row["threads"], len(runs["eager"])]
    cells += [rates["eager"], rates["compiled"]]
    if "peer" in runs:
        cells += [rates["peer"], *(spread(ratios(row, x), 2) for x in ("eager", "compiled"))]
    else:
        cells += ["-", "-", "-"]
    cells += [", ".join(peak.values())]
    cells += [f"{cold:.0f}, {statistics.median(warm):.0f}" if warm else f"{cold:.0f}, -"]
    cells += [cpu(row)]
    return f"| {' | '.join(map(str, cells))} |"


def short_of_targets(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each row whose median ratio is below a target."""
    lines = []
    for row in rows:
        if "peer" not in row["runs"] or row["threads"] > 1:
            continue
        sides = ("eager", "compiled")
        found = {side: round(statistics.median(ratios(row, side)), 2) for side in sides}
        name = row_name(row)
        wanted = TARGETS.get(name, TARGETS.get(row["script"], {}))
        short = [f"{side} {found[side]:.2f} times the peer, not {least}"
                 for side, least in wanted.items() if found[side] < least]
        if short:
            lines.append(f"- Short of its target: {name} on {row['env']}, {', '.join(short)} "
                         f"({cpu(row)})")
    return lines


def speed_section(rows: list[dict[str, Any]]) -> list[str]:
    """The table of ratios, in Markdown."""
    lines = [
        "### speed", "",
        "| Script | Environment | Threads | Pairs | Steps/s | with `--compile` | SB3's steps/s "
        "| **ratio** | **compiled** | Peak MiB: eager, compiled, SB3 "
        "| First point, compiled: cold, warm (s) | CPU |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|---|",
    ]
    lines += [speed_line(row) for row in rows]
    more = sorted({row["threads"] for row in rows} - {1})
    lines += [
        "",
        "Median [least, greatest] over the pairs: a pair is a run of the script, one with "
        "`--compile` and one of Stable-Baselines3 (sb3-contrib for TRPO) with the same "
        f"hyperparameters, in turns of {TURN:.0%} of their steps; a ratio is taken within its "
        "pair. "
        f"Clocked are whole iterations after the first {WARM_UP:.0%} of the steps, of grpo_rloo "
        "completions. "
        f"{measured(rows)}",
        "", *(short := short_of_targets(rows)), *[""] * bool(short), "```",
        "python -m benchmarks speed",
        *(f"python -m benchmarks speed threads --threads {n}" for n in more),
        "python -m benchmarks report", "```", "",
    ]
    return lines
