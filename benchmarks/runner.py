"""A suite's runs: skip the finished, resume the interrupted, retry the killed, name the failed.

Finished is a run whose own files say so, or that has its line in the results file."""

import datetime
import json
import os
import shutil
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.engine import Engine, Handle
from benchmarks.live import Live, last_progress
from benchmarks.results import (
    find_record,
    machine,
    make_record,
    merge_records,
    read_records,
    read_summary,
    write_atomically,
)
from benchmarks.suites import ROOT, Job

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
POLL_SECONDS = 0.1
STOP_SECONDS = 15  # from SIGTERM to SIGKILL when the harness is interrupted


def default_time_limit(steps: int) -> float:
    """Seconds: 10 minutes to start and evaluate, and 100 steps a second, slower than any script."""
    return 600 + steps / 100


@dataclass
class Attempt:
    """A job, the process that works on it, and what has gone wrong so far."""

    job: Job
    directory: Path
    handle: Handle | None = None
    resumed: bool = False
    deadline: float = 0.0
    killed_before: bool = False
    last_error: list[str] = field(default_factory=list)


def command_line(job: Job, script: Path, run_dir: Path) -> list[str]:
    task, names = job.task, ["--env-id", job.task.env, "--seed", str(job.seed)]
    if task.script == "grpo_rloo":
        names[:2] = [task.variant.split()[0], "--task", task.env]
    names += ["--total-timesteps", str(task.steps), "--run-dir", str(run_dir)]
    if task.peer:
        settings = ["--settings", json.dumps(job.peer_settings)]
        return [sys.executable, "-m", "benchmarks.peers", *names, *settings]
    for flag, value in task.flags.items():
        flag = flag.replace("_", "-")
        if isinstance(value, bool):
            names.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            names += [f"--{flag}", str(value)]
    return [sys.executable, str(script), *names]


def environment(gpu: bool = False) -> dict[str, str]:
    """One thread, and unless one is asked for no GPU: the results are of CPUs, the peers' too."""
    gpus = {} if gpu else {"CUDA_VISIBLE_DEVICES": ""}
    return {**os.environ, **dict.fromkeys(THREADS, "1"), **gpus, "PYTHONPATH": str(ROOT)}


class Campaign:
    """Runs jobs, at most `parallel` at a time, and keeps the results file up to date."""

    def __init__(self, jobs: list[Job], work: Path, results: Path, engine: Engine,
                 parallel: int, time_limit: float | None, lines_count: bool = True):
        self.work, self.results, self.engine = work, results, engine
        self.parallel, self.time_limit = parallel, time_limit
        self.records: dict[str, dict[str, Any]] = {}
        self.failures: dict[str, str] = {}
        self.running: list[Attempt] = []
        self.attempts = [Attempt(job, work / job.name) for job in jobs]
        old = read_records(results) if lines_count and results.exists() else []
        for attempt in self.attempts:
            # A run's own files before its line: they may hold more than an older harness kept.
            if not self.collect(attempt) and (record := find_record(old, attempt.job)):
                self.records[attempt.job.name] = record
        self.waiting = [x for x in self.attempts if x.job.name not in self.records]
        self.found = len(self.records)
        self.todo = sum(attempt.job.task.steps for attempt in self.waiting)
        self.live = Live(len(jobs), self.todo)

    def run(self) -> bool:
        """Run what is to be run; whether every job is done."""
        self.publish()
        if self.found:
            self.live.line(f"{self.found} of {len(self.attempts)} runs were finished before")
        try:
            while self.waiting or self.running:
                while self.waiting and len(self.running) < self.parallel:
                    self.begin(self.waiting.pop(0))
                for attempt in list(self.running):
                    self.check(attempt)
                if self.live.due():
                    logs = [(a.job, a.directory / "stdout.txt") for a in self.running]
                    rows = [(str(job), job.task.steps, log) for job, log in logs]
                    self.live.draw(self.header(), rows)
                time.sleep(POLL_SECONDS)
        finally:
            self.stop_all()
        self.live.line(self.header())
        return not self.failures

    def header(self) -> str:
        """Counts, and the time left from the steps that this call has seen done."""
        waiting = {id(attempt) for attempt in self.waiting + self.running}
        done = sum(a.job.task.steps for a in self.attempts if id(a) not in waiting)
        done -= sum(a.job.task.steps for a in self.attempts) - self.todo
        progress = [last_progress(attempt.directory / "stdout.txt") for attempt in self.running]
        done += sum(found[0] for found in progress if found)
        return self.live.header(len(self.records), len(self.failures), len(self.running), done)

    def begin(self, attempt: Attempt) -> None:
        """Start a job, from its checkpoint if it has one, in a clean directory if not."""
        job, directory, run_dir = attempt.job, attempt.directory, attempt.directory / "run"
        directory.mkdir(parents=True, exist_ok=True)
        if not self.engine.end_leftover(directory):
            return self.fail(attempt, "what an earlier harness left running there does not end")
        if self.collect(attempt):  # the leftover had come to its end after all
            return self.publish()
        checkpoint = run_dir / "checkpoint.pt"
        script = directory / f"{job.task.script}.py"
        script.write_bytes(job.source)
        attempt.resumed = checkpoint.exists() and not job.task.peer
        if attempt.resumed:
            command = [sys.executable, str(script), "--resume", str(checkpoint)]
        else:
            shutil.rmtree(run_dir, ignore_errors=True)
            for log in ("stdout.txt", "stderr.txt"):
                (directory / log).unlink(missing_ok=True)
            command = command_line(job, script, run_dir)
        today = datetime.datetime.now(datetime.UTC).date().isoformat()
        facts = {"machine": machine() | {"jobs": self.parallel}, "date": today}
        facts |= {"commit": job.commit, "command": command}
        facts |= {"started": None if attempt.resumed else time.time()}
        write_atomically(directory / "job.json", json.dumps(facts, indent=2) + "\n")
        try:
            attempt.handle = self.engine.submit(command, environment(), directory)
        except OSError as error:
            return self.fail(attempt, f"could not be started: {error}")
        limit = self.time_limit or default_time_limit(job.task.steps)
        attempt.deadline = time.monotonic() + limit
        self.running.append(attempt)
        if not self.live.terminal:
            self.live.line(f"{'resumed' if attempt.resumed else 'started'}  {job}")

    def check(self, attempt: Attempt) -> None:
        """See whether a running job has ended or is to be ended, and what follows."""
        assert attempt.handle
        status = attempt.handle.poll()
        if status is None and time.monotonic() < attempt.deadline:
            return
        if status is None:
            self.kill(attempt)
            self.running.remove(attempt)
            return self.fail(attempt, "ran past its time limit and was killed")
        self.running.remove(attempt)
        if status == 0:
            if self.collect(attempt):
                self.live.line(f"done     {attempt.job}: {self.outcome(attempt)}")
                if not self.live.terminal and (self.waiting or self.running):
                    self.live.line(self.header())
                return self.publish()
            return self.fail(attempt, attempt.last_error[0])
        if status == 2 and attempt.resumed:
            # The checkpoint is damaged or refused: what it would have saved is run again.
            self.live.line(f"again    {attempt.job}: its checkpoint was refused, it starts afresh")
            shutil.rmtree(attempt.directory / "run", ignore_errors=True)
            return self.begin(attempt)
        if status in (-signal.SIGKILL, 128 + signal.SIGKILL):
            if not attempt.killed_before:
                attempt.killed_before = True
                self.live.line(f"again    {attempt.job}: it was killed (SIGKILL; out of memory?)")
                return self.begin(attempt)
            return self.fail(attempt, "was killed twice (SIGKILL; out of memory?)")
        self.fail(attempt, f"ended with status {status}")

    def outcome(self, attempt: Attempt) -> str:
        record = self.records[attempt.job.name]
        return f"return {record['train_return_last100']:.1f}, {record['sps']:.0f} steps/s"

    def collect(self, attempt: Attempt) -> bool:
        """Take in the results of a job if it is finished; if not, remember why."""
        try:
            read_summary(attempt.directory / "run")
            self.records[attempt.job.name] = make_record(attempt.job, attempt.directory)
            return True
        except Exception as error:  # whatever a broken run has left there must harm no other
            attempt.last_error = [str(error)]
            return False

    def publish(self) -> None:
        merge_records(self.results, list(self.records.values()))

    def fail(self, attempt: Attempt, reason: str) -> None:
        """Note a failure and show the end of the run's stderr."""
        self.failures[attempt.job.name] = f"{attempt.job}: {reason}"
        log = attempt.directory / "stderr.txt"
        self.live.line(f"FAILED   {attempt.job}: {reason}; its stderr, {log}:")
        text = log.read_text(errors="replace") if log.exists() else ""
        for line in text.splitlines()[-5:] or ["(empty)"]:
            self.live.line(f"         | {line[:300]}")

    def kill(self, attempt: Attempt) -> None:
        assert attempt.handle
        attempt.handle.stop(signal.SIGKILL)
        while attempt.handle.poll() is None:
            time.sleep(POLL_SECONDS)

    def stop_all(self) -> None:
        """Ask all that still runs to end, and wait for it."""
        for attempt in self.running:
            assert attempt.handle
            attempt.handle.stop(signal.SIGTERM)
        deadline = time.monotonic() + STOP_SECONDS
        for attempt in self.running:
            assert attempt.handle
            while attempt.handle.poll() is None and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)
            if attempt.handle.poll() is None:
                self.kill(attempt)
        self.live.erase()
