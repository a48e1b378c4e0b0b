"""The promises of a run under attack: what is killed, damaged, full, mad or mistyped, counted.

    python -m tests.faults                                      everything: hours
    python -m tests.faults --only kills,disk --scripts ppo --kills 5

A part is a function that attacks one script and tallies what it saw; its checks return what is
wrong in words, or nothing. What several calls measured is merged into one file of results.
"""

import argparse
import contextlib
import functools
import importlib
import json
import logging
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from benchmarks.results import RESULTS, machine, write_atomically
from benchmarks.suites import code_hash
from tests import sabotage
from tests.processes import ROOT, Child, start
from tests.survival import (
    checkpoint_of,
    curves,
    differences,
    flattened,
    fresh_modules,
    last_words,
    load,
    names_checkpoint,
    quietly,
    whole,
)
from tests.sync_blocks import LADDER, SCRIPTS

# A second or two of training, some twenty iterations and seven checkpoints.
SMALL = "--hidden-size 16 --norm-obs --norm-reward --total-timesteps 4000 --checkpoint-every 600 "
SMALL += "--eval-episodes 2 "
TINY = {
    "reinforce": SMALL + "--num-envs 4 --bootstrap-truncated",
    "a2c": SMALL + "--num-envs 4 --num-steps 16 --optimizer rmsprop",
    "npg": SMALL + "--num-steps 48",
    "trpo": SMALL + "--num-steps 48",
    "ppo": SMALL + "--num-steps 48 --kl-coef 1 --adaptive-kl 0.01",
    "ppo_continuous": SMALL + "--num-steps 48 --num-envs 4 --env-id InvertedPendulum-v5 "
    "--num-minibatches 4 --update-epochs 4",
    "grpo_rloo": "grpo --sft-steps 5 --num-prompts 4 --group-size 4 --num-minibatches 2 --width 16 "
    "--num-layers 1 --num-heads 2 --total-timesteps 480 --eval-episodes 20 --checkpoint-every 96",
}


class Tally:
    """What was tried and what survived, by name; what failed, in words; and other figures."""

    def __init__(self):
        self.tried, self.survived, self.facts = Counter(), Counter(), Counter()
        self.failed: list[str] = []

    def check(self, name: str, problem: str) -> None:
        self.tried[name] += 1
        self.survived[name] += not problem
        if problem:
            self.failed.append(f"{name}: {problem:.600}")
            print(f"    FAILED {self.failed[-1]}", flush=True)

    def result(self) -> dict[str, Any]:
        counts = {name: [self.survived[name], self.tried[name]] for name in sorted(self.tried)}
        facts = {name: number for name, number in self.facts.items() if number}
        return {"counts": counts, "facts": facts, "failed": self.failed[:20]}


# --- Runs -----------------------------------------------------------------------------------------


@dataclass
class Reference:
    """A run that nothing befell, how long it took, and how often it passed each phase."""

    script: str
    dir: Path
    seconds: float
    passed: dict[str, int]

    @property
    def flags(self) -> list[str]:
        return TINY[self.script].split()


def make_reference(script: str, work: Path) -> Reference:
    run_dir, tallies = work / "reference", work / "tallies"
    tallies.mkdir(parents=True)
    before = functools.partial(sabotage.count, run_dir, tallies)
    flags = [*TINY[script].split(), "--run-dir", str(run_dir)]
    begin = time.monotonic()
    status, err = finish(start(script, *flags, before=before))
    if status:
        raise RuntimeError(f"the reference run of {script} failed: {err}")
    passed = {phase: (tallies / phase).stat().st_size for phase in sabotage.PHASES}
    return Reference(script, run_dir, time.monotonic() - begin, passed)


def finish(child: Child) -> tuple[int | None, str]:
    _, err = child.communicate(timeout=600)
    return child.returncode, err


def struck(reference: Reference, run_dir: Path, phase: str, act: str, rng: random.Random) -> Any:
    """Start the run, or what is left of it, and do act in the phase; or, if phase is "any moment",
    send a signal from outside once the run has begun. Returns (status, stderr)."""
    before = None
    if phase in sabotage.PHASES:
        occurrence = rng.randint(1, reference.passed[phase])
        before = functools.partial(sabotage.strike, phase, occurrence, act, run_dir)
    child = start(reference.script, *go_on_flags(reference, run_dir), before=before)
    if before is None:
        # A Ctrl-C before the first checkpoint may find Python's own handler still.
        begun = "events.*" if act == "SIGKILL" else "checkpoint.pt"
        files = len(list(run_dir.glob(begun)))
        while child.poll() is None and len(list(run_dir.glob(begun))) == files:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.8 * reference.seconds))
        with contextlib.suppress(ProcessLookupError):
            child.send_signal(getattr(signal, act))
    return finish(child)


def go_on_flags(reference: Reference, run_dir: Path) -> list[str]:
    """To begin, or to resume; TensorBoard orders the files of a run by the second of their name."""
    seconds = [int(path.name.split(".")[3]) for path in run_dir.glob("events.*")]
    while int(time.time()) <= max(seconds, default=0):
        time.sleep(0.05)
    if (run_dir / "checkpoint.pt").exists():
        return ["--resume", str(run_dir / "checkpoint.pt")]
    return [*reference.flags, "--run-dir", str(run_dir)]


def resume(reference: Reference, run_dir: Path, tally: Tally) -> str:
    """Run to the end from the last checkpoint; count whether that provably was past the start."""
    try:
        checkpoint = checkpoint_of(run_dir)
    except Exception as error:
        return f"the checkpoint that was left cannot be read: {error!s:.100}"
    status, err = finish(start(reference.script, *go_on_flags(reference, run_dir)))
    if status:
        return f"resumed, it ended with status {status}: {err[-400:]}"
    if checkpoint is None:
        tally.facts["begun anew, killed before the first checkpoint"] += 1
    elif checkpoint["iteration"] == 0:
        tally.facts["resumed at iteration 0"] += 1
    else:
        only_new = max(run_dir.glob("events.*"))
        steps = [step for points in curves_of_file(only_new) for step in points]
        if any(step < checkpoint["step"] for step in steps):
            return "resumed, it drew points from before the checkpoint: it began again"
        tally.facts["resumed past iteration 0"] += 1
    return differences(run_dir, reference.dir)


def curves_of_file(path: Path) -> list[list[int]]:
    with tempfile.TemporaryDirectory() as alone:
        (Path(alone) / path.name).symlink_to(path)
        return [[step for step, _ in points] for points in curves(Path(alone)).values()]


# --- The parts ------------------------------------------------------------------------------------


def kills(script: str, tally: Tally, work: Path, rng: random.Random, args: Any) -> None:
    """SIGKILL at random moments, and in every phase a tenth as often; then again while resuming."""
    reference = make_reference(script, work)
    wanted = list(sabotage.PHASES) * max(1, args.kills // 10) + ["any moment"] * args.kills
    for k in range(3 * len(wanted)):
        if not wanted:
            break
        run_dir, deaths = work / f"killed{k}", 0
        for _ in range(rng.choice([1, 1, 2])):
            status, _ = struck(reference, run_dir, wanted[0], "SIGKILL", rng)
            deaths += status == -signal.SIGKILL
        tally.facts["kills"] += deaths
        if deaths:
            tally.check(wanted.pop(0), resume(reference, run_dir, tally))
        else:  # it had ended before: the machine is less busy than it was
            reference.seconds *= 0.8
    tally.facts["moments that no kill hit"] += len(wanted)


def signals(script: str, tally: Tally, work: Path, rng: random.Random, args: Any) -> None:
    """Ctrl-C and SIGTERM: how it says good-bye, and that nothing is lost by it."""
    reference = make_reference(script, work)
    for k, phase in enumerate(["any moment", *sabotage.PHASES] * max(1, args.kills // 15)):
        for act, expected in (("SIGTERM", 143), ("SIGINT", 130)):
            run_dir = work / f"{act}{k}"
            status, err = struck(reference, run_dir, phase, act, rng)
            if status == 0 and phase == "any moment":
                tally.facts["ended before the signal"] += 1
                continue
            problem = last_words(script, status, err, expected)
            problem = problem or names_checkpoint(script, err, run_dir)
            if not problem and list(run_dir.glob("*.tmp")):
                problem = "it left a temporary file"
            tally.check(act, problem or resume(reference, run_dir, tally))


def disk(script: str, tally: Tally, work: Path, rng: random.Random, args: Any) -> None:
    """No room, no directory, no right to write: a line, and the last good checkpoint goes on."""
    reference = make_reference(script, work)
    middle = reference.passed["rollout"] * 2 // 3
    faults = {
        "no room for a checkpoint": ("checkpoint renamed", 3),
        "no room for events": ("rollout", middle),
        "no room for the summary": ("checkpoint renamed", reference.passed["checkpoint renamed"]),
        "directory removed": ("rollout", middle),
        "file in its place": ("rollout", middle),
    }
    if os.geteuid():  # nothing is read-only to root
        faults["directory read-only"] = ("rollout", middle)
    for act, (phase, occurrence) in faults.items():
        run_dir = work / act.replace(" ", "-")
        arguments = json.dumps([phase, occurrence, act, str(run_dir)])
        # A process of its own, which ends as a user's does: threads and all.
        command = [sys.executable, "-m", "tests.sabotage", arguments, ROOT / f"{script}.py"]
        command += [*reference.flags, "--run-dir", run_dir]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
        problem = last_words(script, done.returncode, done.stderr, 1, "cannot write")
        problem = problem or names_checkpoint(script, done.stderr, run_dir)
        moved = run_dir.with_name(f"{run_dir.name}.moved")
        if moved.exists():
            run_dir.unlink()
            moved.rename(run_dir)
        if run_dir.exists():
            run_dir.chmod(0o700)
            if not problem and list(run_dir.glob("*.tmp")):
                problem = "it left a temporary file"
            problem = problem or resume(reference, run_dir, tally)
        tally.check(act, problem)


def damage(script: str, tally: Tally, work: Path, rng: random.Random, args: Any) -> None:
    """Checkpoints that are not: none may be loaded but with what was saved, none may run code."""
    checkpoint = make_reference(script, work).dir / "checkpoint.pt"
    damage_files(script, checkpoint, tally, work, rng, args.mutations)


def damage_files(
    script: str, checkpoint: Path, tally: Tally, work: Path, rng: random.Random, number: int
) -> None:
    marker, path, good = work / "code-ran", work / "checkpoint.pt", checkpoint.read_bytes()
    modules = fresh_modules(script, str(checkpoint))
    expected = loaded(script, checkpoint, modules)
    for name, content in sabotage.mutations(script, good, marker, rng, number):
        path.write_bytes(content)
        problem = refused_or_same(script, path, modules, expected, tally)
        if marker.exists():
            problem = "the code in it ran"
            marker.rmdir()
        tally.check(name, problem)


def loaded(script: str, path: Path, modules: list[Any]) -> list[Any]:
    content = importlib.import_module(script).load_checkpoint(str(path), *modules)
    return flattened([content, [module.state_dict() for module in modules]])


def refused_or_same(script: str, path: Path, modules: list, expected: list, tally: Tally) -> str:
    """Status 2 and one line; or, where the damage was to nothing, all that was saved."""
    with quietly() as said:
        try:
            content = loaded(script, path, modules)
        except SystemExit as ended:
            tally.facts["refused"] += 1
            code = ended.code if isinstance(ended.code, int) else None
            return last_words(script, code, said.getvalue(), 2, str(path))
        except BaseException as error:
            return f"{error!r}"
    tally.facts["loaded, as it was saved"] += 1
    return "" if content == expected and not said.getvalue() else "other content was loaded"


def toy(script: str, env: str, **kwargs: Any) -> list[str]:
    """Flags for an environment of tests/envs.py with actions that the script takes."""
    kwargs |= {"box": kwargs.get("box", [[-1, 2]])} if script == "ppo_continuous" else {}
    return ["--env-id", f"tests.envs:{env}-v0", "--env-kwargs", json.dumps(kwargs)]


# Environment -> status, and what the run must say: in its last line, or before it in a traceback.
MAD = {
    "RaisesInStep": (1, "RuntimeError: the arm fell off"),
    "RaisesInReset": (1, "RuntimeError: the arm is missing"),
    "NanObservation": (1, "not finite at step"),
    "InfObservation": (1, "not finite at step"),
    "NanReward": (1, "not finite at step"),
    "NoReward": (1, "not finite at step"),
    "WrongShape": (1, "shape"),
    "WrongLastShape": (1, "the last observation has shape (1,), not (2,)"),
    "WrongDtype": (1, "Cannot cast array data"),
    "EndsAtOnce": (0, ""),
    "NeverEnds": (0, ""),
}


def environments(script: str, tally: Tally, work: Path, rng: random.Random, args: Any) -> None:
    """What a user's environment may do, and what the run says of it."""
    for env, (expected, words) in MAD.items():
        if env == "NeverEnds" and script == "reinforce":
            expected, words = 1, "an episode did not end in 4000 steps"
        run_dir = work / env
        flags = [*TINY[script].split(), *toy(script, env), "--run-dir", run_dir]
        status, err = finish(start(script, *flags, "--eval-episodes", 1))
        tally.check(env, mad_end(script, status, err, expected, words, run_dir))


def mad_end(script: str, status: Any, err: str, expected: int, words: str, run_dir: Path) -> str:
    if status != expected:
        return f"status {status}, not {expected}: {err[-400:]}"
    if status == 0:
        return load(script, run_dir / "checkpoint.pt") or whole(run_dir)
    last = err.strip().splitlines()[-1]
    if words not in err or not last.startswith(f"{script}.py: ") or "checkpoint.pt" not in last:
        return f"it does not say what happened: {err[-400:]}"
    if words in last and "Traceback" in err:
        return f"a line would have done: {err[-400:]}"
    return load(script, run_dir / "checkpoint.pt")


SHORT = "--hidden-size 8 --total-timesteps 1024 --eval-episodes 1 --num-steps 8 --num-minibatches 4"
ONES = "--num-envs 1 --num-steps 8 --num-minibatches 8"
EXTREMES = {
    "rewards of 1e8": ("Scaled", {"scale": 1e8}, ""),
    "rewards of 1e-8": ("Scaled", {"scale": 1e-8}, ""),
    "rewards of 1e8, normalised": ("Scaled", {"scale": 1e8}, "--norm-reward --norm-obs"),
    "rewards of 1e-8, normalised": ("Scaled", {"scale": 1e-8}, "--norm-reward --norm-obs"),
    "constant rewards": ("Toy", {}, "--norm-reward"),
    "a constant dimension": ("HalfConstant", {}, "--norm-obs"),
    "episodes of one step": ("EndsAtOnce", {}, ""),
    "minibatches of one": ("Scaled", {"scale": 1}, ONES),
    "one environment": ("Scaled", {"scale": 1}, "--num-envs 1"),
    "1 action dimension": ("Scaled", {"scale": 1, "box": [[-1, 1]]}, ""),
    "100 action dimensions": ("Scaled", {"scale": 1, "box": [[-1, 1]] * 100}, ""),
}


def numbers(script: str, tally: Tally, work: Path, rng: random.Random, args: Any) -> None:
    """Finite parameters to the end, or a line that says why not."""
    module = importlib.import_module(script)
    for name, (env, kwargs, more) in EXTREMES.items():
        if script == "ppo" and "box" in kwargs:
            continue  # it takes no real-valued actions
        words = f"{SHORT} {more}".split()
        pairs = [(flag, words[i + 1 : i + 2]) for i, flag in enumerate(words) if flag[:2] == "--"]
        flags = toy(script, env, **kwargs)
        for flag, following in pairs:
            if hasattr(module.Args(), flag[2:].replace("-", "_")):
                flags += [flag, *(x for x in following if x[:2] != "--")]
        run_dir = work / name.replace(" ", "-")
        how, problem = attempt(script, [*flags, "--run-dir", str(run_dir)], run_dir)
        if how == "refused":
            problem = "it was refused"
        tally.facts[how] += 1
        tally.check(name, problem)


def attempt(script: str, flags: list[str], run_dir: Path) -> tuple[str, str]:
    """Run in this process: how it ended, and what is wrong with that."""
    module = importlib.import_module(script)
    args, status = None, cast(Any, 0)
    with quietly() as said:
        try:
            args = module.parse_args(flags)
            module.main(args)
        except SystemExit as ended:
            if ended.code in (130, 143):  # the script took the signal that was for the campaign
                raise KeyboardInterrupt from None
            status = ended.code
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            return "crashed", f"{error!r} in {where.name}; typed: {shlex.join(flags)}"
    run_dir = Path(args.run_dir) if args and args.run_dir else run_dir  # main has named it
    problem = ended_well(script, status, said.getvalue(), run_dir)
    ends: dict[Any, str] = {0: "finished", 1: "stopped, with a reason", 2: "refused"}
    how = ends.get(status, "crashed")
    return how, f"{problem}; typed: {shlex.join(flags)}" if problem else ""


def ended_well(script: str, status: Any, said: str, run_dir: Path) -> str:
    """A whole run; or a line with status 2, or tyro's own words, and nothing written; or a run that
    stopped, as its numbers were not finite, with a line and its last good checkpoint."""
    if status == 0:
        return whole(run_dir)
    if status == 1:
        words = re.search(r"(is (nan|-?inf) at|not finite at|did not end in)", said)
        problem = "" if words else f"it stopped with {said[-300:]!r}"
        return problem or last_words(script, 1, said, 1) or load(script, run_dir / "checkpoint.pt")
    if status == 2 and "For full helptext" in said and "Traceback" not in said:
        return ""  # tyro's own
    return last_words(script, status, said, 2)


def flags(script: str, tally: Tally, work: Path, rng: random.Random, args: Any) -> None:
    """A property of command lines: a run or a refusal, whatever is typed."""
    from tests.command_lines import command_lines, ignored

    (work / "here").mkdir(parents=True)
    at_first = os.getcwd()
    os.chdir(work / "here")
    try:
        for line in command_lines(script, args.cases, rng.randrange(2**32)):
            run_dir = work / "here" / "run"
            how, problem = attempt(script, line.argv, run_dir)
            left = sorted(x.name for x in Path.cwd().iterdir())
            if how == "refused" and left:
                problem = problem or f"refused, but it left {left}; typed: {line.argv}"
            if how == "finished":
                problem = problem or ignored(line, left)
            tally.facts[how] += 1
            tally.check("command lines", problem)
            subprocess.run(["rm", "-rf", *left], check=True)
    finally:
        os.chdir(at_first)


def determinism(script: str, tally: Tally, work: Path, rng: random.Random, args: Any) -> None:
    """Twice from the shell."""
    for name in ("once", "twice"):
        command = [sys.executable, f"{script}.py", *TINY[script].split(), "--run-dir", work / name]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
        if done.returncode:
            tally.check("same bits", done.stderr[-400:])
            return
    tally.check("same bits", differences(work / "twice", work / "once"))


# Two thousand iterations of one update each.
LONG = {name: "--hidden-size 8 --eval-episodes 1 " for name in LADDER}
LONG["reinforce"] += "--env-id tests.envs:Short-v0 --num-envs 2 --baseline none --total-timesteps "
LONG["a2c"] += "--num-envs 2 --num-steps 4 --total-timesteps "
LONG["npg"] += "--num-envs 2 --num-steps 8 --value-epochs 1 --num-minibatches 1 --total-timesteps "
LONG["trpo"] = LONG["npg"]
LONG["ppo"] += "--num-envs 2 --num-steps 4 --update-epochs 1 --num-minibatches 1 --total-timesteps "
LONG["ppo_continuous"] = "--env-id InvertedPendulum-v5 " + LONG["ppo"]
LONG["grpo_rloo"] = "grpo --sft-steps 0 --num-prompts 2 --group-size 2 --num-minibatches 1 "
LONG["grpo_rloo"] += "--update-epochs 1 --width 8 --num-layers 1 --num-heads 1 --eval-episodes 5 "
LONG["grpo_rloo"] += "--total-timesteps "
PER_ITERATION = {"reinforce": 10, "npg": 16, "trpo": 16, "grpo_rloo": 4}
LEAK = 1000  # bytes an iteration: the pages of the allocators come and go


def leaks(script: str, tally: Tally, work: Path, rng: random.Random, args: Any) -> None:
    work.mkdir(parents=True)
    run_dir, samples = work / "run", work / "samples"
    line = f"{LONG[script]} {args.iterations * PER_ITERATION.get(script, 8)} --run-dir {run_dir}"
    hook = functools.partial(sabotage.measure, run_dir, samples)
    status, err = finish(start(script, *line.split(), before=hook))
    slope, problem = leaked(samples, args.iterations) if status == 0 else (0.0, err[-400:])
    tally.facts["bytes per iteration"] = round(slope)
    tally.check("no growth", problem)


def leaked(samples: Path, iterations: int) -> tuple[float, str]:
    """Slope of the resident memory over the second half; and what there is more of at the end."""
    rows = np.array([json.loads(line) for line in samples.read_text().splitlines()])
    if len(rows) < iterations:
        return 0.0, f"there were {len(rows)} updates, not {iterations}"
    half = rows[len(rows) // 2 :, 0]
    slope = float(np.polyfit(np.arange(len(half)), half, 1)[0])
    if slope > LEAK:
        return slope, f"memory grows by {slope:.0f} bytes an iteration"
    early, late = rows[len(rows) // 10, 1:].tolist(), rows[-2, 1:].tolist()
    names = ("threads", "open files", "child processes")
    more = [f"{b} {name}, not {a}" for name, a, b in zip(names, early, late) if a != b]
    return slope, "; ".join(more)


# --- The campaign ---------------------------------------------------------------------------------

PARTS: dict[str, Callable[[str, Tally, Path, random.Random, Any], None]] = {
    "kills": kills, "signals": signals, "disk": disk, "damage": damage,
    "environments": environments, "numbers": numbers, "flags": flags,
    "determinism": determinism, "leaks": leaks,
}
OF_ENVIRONMENTS = ("environments", "numbers")  # grpo_rloo has none
WORDS = {
    "kills": "SIGKILL, then resumed: as if nothing had been",
    "signals": "Ctrl-C and SIGTERM: said how to go on, resumed the same",
    "disk": "disk full, directory gone: said so, resumed the same",
    "damage": "damaged checkpoints: refused, or as they were saved",
    "environments": "environments that raise, lie or never end: said what",
    "numbers": "extremes of rewards, shapes and sizes: finite to the end",
    "flags": "command lines: a run, or a refusal that leaves nothing",
    "determinism": "twice from the shell: the same bits",
    "leaks": "2,000 iterations: no more memory, files, threads",
}


def attack(part: str, script: str, work: Path, args: Any) -> dict[str, Any]:
    tally, begin = Tally(), time.monotonic()
    PARTS[part](script, tally, work, random.Random(f"{part} {script} {args.seed}"), args)
    text, seconds = code_hash(ROOT / f"{script}.py"), round(time.monotonic() - begin)
    return {**tally.result(), "text": text, "seconds": seconds}


def parse(argv: list[str] | None = None) -> Any:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default=",".join(PARTS), help="parts, by commas")
    parser.add_argument("--scripts", default=",".join(SCRIPTS), help="scripts, by commas")
    parser.add_argument("--kills", type=int, default=30, help="at random moments, of each script")
    parser.add_argument("--mutations", type=int, default=1000, help="damaged files of each script")
    parser.add_argument("--cases", type=int, default=500, help="command lines of each script")
    parser.add_argument("--iterations", type=int, default=2000, help="of the search for leaks")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / "faults.json")
    args = parser.parse_args(argv)
    for name, known in (("only", PARTS), ("scripts", SCRIPTS)):
        chosen = getattr(args, name).split(",")
        if unknown := set(chosen) - set(known):
            parser.error(f"--{name}: there is no {', '.join(sorted(unknown))}")
        setattr(args, name, chosen)
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it tells of every restart
    results: Any = json.loads(args.out.read_text()) if args.out.exists() else {"parts": {}}
    failed = 0
    for part in args.only:
        for script in args.scripts:
            if part in OF_ENVIRONMENTS and script == "grpo_rloo":
                continue
            with tempfile.TemporaryDirectory() as work:
                entry = attack(part, script, Path(work) / part, args)
            survived, tried = np.sum([*entry["counts"].values()] or [[0, 0]], axis=0)
            words = ", ".join(f"{count} {name}" for name, count in entry["facts"].items())
            print(f"{part} {script}: {survived} of {tried}; {words}", flush=True)
            failed += tried - survived
            results |= {"date": time.strftime("%Y-%m-%d"), "machine": machine(), "what": WORDS}
            results["parts"].setdefault(part, {})[script] = entry
            write_atomically(args.out, json.dumps(results, indent=1) + "\n")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
