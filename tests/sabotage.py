"""What the fault campaign does to a script, from within its process, and to its checkpoints."""

import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from tests.sync_blocks import SCRIPTS

# Where a run can be hit for certain; every one but the last is passed many times.
PHASES = ("rollout", "update", "checkpoint write", "checkpoint renamed", "summary write")


def watch(phase: str, run_dir: Path, hit: Callable[[int | None], object]) -> None:
    """Call hit whenever the script passes the phase, with the descriptor if it writes a file."""

    def passed(*_) -> None:
        hit(None)

    if phase == "rollout":
        wrap(gym.vector.SyncVectorEnv, "step", before=passed)
        wrap(torch.Tensor, "exponential_", before=passed)  # grpo_rloo's sampling
    elif phase == "update":
        register_optimizer_step_pre_hook(passed)
    elif phase == "checkpoint renamed":
        name = "checkpoint.pt"
        wrap(Path, "replace", after=lambda _, to: hit(None) if Path(to).name == name else None)
    else:
        partial = run_dir / f"{phase.split()[0]}.tmp"

        def look(descriptor: int) -> None:
            if partial.exists() and os.path.samestat(os.fstat(descriptor), partial.stat()):
                hit(descriptor)

        wrap(os, "fsync", before=look)


def wrap(owner: Any, name: str, before: Callable | None = None, after: Callable | None = None):
    function = getattr(owner, name)

    def wrapped(*args, **kwargs):
        if before:
            before(*args)
        result = function(*args, **kwargs)
        if after:
            after(*args)
        return result

    setattr(owner, name, wrapped)


def count(run_dir: Path, tallies: Path) -> None:
    """One byte for each time that a phase is passed, in a file of its own."""
    for phase in PHASES:
        file = (tallies / phase).open("ab", buffering=0)
        watch(phase, run_dir, lambda _, file=file: file.write(b"."))


def strike(phase: str, occurrence: int, act: str, run_dir: Path) -> None:
    """Do act the occurrence-th time (from 1) that the phase is passed."""
    passed = 0

    def hit(descriptor: int | None) -> None:
        nonlocal passed
        passed += 1
        if passed == occurrence:
            if descriptor is not None and act == "SIGKILL":  # in the midst of the file
                os.ftruncate(descriptor, random.randrange(os.fstat(descriptor).st_size))
            ACTS[act](run_dir)

    watch(phase, run_dir, hit)


def send(number: int) -> Callable[[Path], None]:
    return lambda _: os.kill(os.getpid(), number)


def limit_files(size: int) -> None:
    """From now on no file can grow beyond: what a full disk does, without one."""
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, most))


def put_a_file_in_its_place(run_dir: Path) -> None:
    run_dir.rename(run_dir.with_name(f"{run_dir.name}.moved"))
    run_dir.write_text("no directory")


ACTS: dict[str, Callable[[Path], Any]] = {
    "SIGKILL": send(signal.SIGKILL),
    "SIGTERM": send(signal.SIGTERM),
    "SIGINT": send(signal.SIGINT),
    "no room for a checkpoint": lambda run_dir: limit_when_opened(run_dir / "checkpoint.tmp"),
    "no room for events": lambda run_dir: limit_files(
        1 + max(x.stat().st_size for x in run_dir.glob("events.*"))
    ),
    "no room for the summary": lambda run_dir: limit_when_opened(run_dir / "summary.tmp"),
    "directory removed": shutil.rmtree,
    "directory read-only": lambda run_dir: run_dir.chmod(0o500),
    "file in its place": put_a_file_in_its_place,
}


def limit_when_opened(path: Path) -> None:
    wrap(Path, "open", before=lambda opened, *_: limit_files(100) if opened == path else None)


def measure(run_dir: Path, samples: Path) -> None:
    """A line at each update: resident bytes, threads, open files, children. Linux only."""
    file, page = samples.open("w"), os.sysconf("SC_PAGE_SIZE")

    def sample(_: int | None) -> None:
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * page
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        files = len(os.listdir("/proc/self/fd"))
        json.dump([resident, threading.active_count(), files, len(children)], file)
        file.write("\n")
        file.flush()

    watch("update", run_dir, sample)
    watch("summary write", run_dir, sample)


def leak(run_dir: Path, samples: Path) -> None:
    """measure, of a run that does leak: to see that the campaign notices."""
    kept = []
    measure(run_dir, samples)
    watch("update", run_dir, lambda _: kept.append((bytearray(10_000), os.dup(1))))


# --- Damaged checkpoints --------------------------------------------------------------------------


def mutations(
    script: str, good: bytes, marker: Path, rng: random.Random, number: int
) -> Iterator[tuple[str, bytes]]:
    """Kinds and contents of damaged files, at least number of them."""
    cuts = [*range(0, len(good), 1024), len(good) - 1]
    yield from (("truncated", good[:cut]) for cut in cuts)
    for _ in range(max(0, number - len(cuts))):
        flipped = bytearray(good)
        for _ in range(rng.choice([1, 1, 1, 2, 8])):
            flipped[rng.randrange(len(good))] ^= 1 << rng.randrange(8)
        yield "flipped bits", bytes(flipped)
    yield "empty", b""
    yield "no zip", bytes(rng.randrange(256) for _ in range(5000))
    checkpoint = torch.load(io.BytesIO(good), weights_only=True)
    for other in {*SCRIPTS, "sac"} - {script}:
        yield "of another script", saved({**checkpoint, "script": other})
    flags = checkpoint["args"]
    for name in sorted(flags)[::8]:
        yield "of another version", saved({**checkpoint, "args": flags | {f"{name}_2": 0}})
        without = {key: value for key, value in flags.items() if key != name}
        yield "of another version", saved({**checkpoint, "args": without})
    network = checkpoint["state"][0]
    for size in (1, 3, 7):
        others = {key: torch.zeros([*x.shape, size]) for key, x in network.items()}
        state = [others, *checkpoint["state"][1:]]
        yield "of another network", saved({**checkpoint, "state": state})
    for key in ("script", "args", "state"):
        for value in (None, 3, [], {}, [None] * 3, "words", torch.zeros(2)):
            yield "of other content", saved({**checkpoint, key: value})
        yield "of other content", saved({k: x for k, x in checkpoint.items() if k != key})
    bomb = saved({**checkpoint, "extra": Bomb(marker)})
    yield "with code", bomb
    with zipfile.ZipFile(io.BytesIO(bomb)) as file:  # and as a bare pickle, as old torch wrote
        yield "with code", next(file.read(x) for x in file.namelist() if x.endswith("data.pkl"))


class Bomb:
    """Unpickled by what allows code, it makes a file."""

    def __init__(self, marker: Path):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def saved(content: Any) -> bytes:
    torch.save(content, file := io.BytesIO())
    return file.getvalue()


if __name__ == "__main__":  # strike from the shell: python -m tests.sabotage ARGUMENTS SCRIPT ...
    import runpy

    arguments, *sys.argv = sys.argv[1:]
    phase, occurrence, act, directory = json.loads(arguments)
    strike(phase, occurrence, act, Path(directory))
    runpy.run_path(sys.argv[0], run_name="__main__")
