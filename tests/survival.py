"""What a run left behind, and whether it is what it should be: each check says in words what is
wrong, or nothing."""

import contextlib
import copy
import importlib
import io
import json
import shlex
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.results import read_scalars

CLOCK = ("charts/SPS", "charts/tokens_per_second", "wall_seconds", "sps", "tokens_per_second")


def checkpoint_of(run_dir: Path) -> dict[str, Any] | None:
    path = run_dir / "checkpoint.pt"
    return torch.load(path, weights_only=True) if path.exists() else None


def flattened(value: Any) -> list[Any]:
    flat, structure = torch.utils._pytree.tree_flatten(value)
    content = [x.numpy().tobytes() if isinstance(x, torch.Tensor) else repr(x) for x in flat]
    return [*content, str(structure)]


def curves(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """Every point as TensorBoard shows it: one that was drawn twice is there twice."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    keys = sorted(set(events.Tags()["scalars"]) - set(CLOCK))
    return {key: [(e.step, e.value) for e in events.Scalars(key)] for key in keys}


def differences(run_dir: Path, reference: Path) -> str:
    """What of a run is not, to the bit, as in the one that nothing befell."""
    for path in (run_dir, reference):
        if not (path / "summary.json").exists():
            return f"{path.name} has no summary.json"
    names = {x.name for x in run_dir.iterdir() if not x.name.startswith("events.")}
    if names != {"checkpoint.pt", "summary.json"}:
        return f"it left {', '.join(sorted(names))}"
    ours, theirs = (checkpoint_of(path) or {} for path in (run_dir, reference))
    for key in theirs.keys() - {"args", "seconds"}:
        if flattened(ours[key]) != flattened(theirs[key]):
            return f"{key} of the checkpoint differs"
    both = run_dir / "summary.json", reference / "summary.json"
    ours, theirs = (json.loads(path.read_text()) for path in both)
    for key in theirs.keys() - {"args", *CLOCK}:
        if ours.get(key) != theirs[key]:
            return f"{key} of the summary is {ours.get(key)}, not {theirs[key]}"
    ours, theirs = curves(run_dir), curves(reference)
    for key in theirs.keys() | ours.keys():
        if ours.get(key) != theirs.get(key):
            return f"the curve {key} differs"
        both = [np.array(read_scalars(path, key)) for path in (run_dir, reference)]
        if not np.array_equal(*both, equal_nan=True):
            return f"the curve {key} differs as the harness reads it"
    return ""


def load(script: str, path: Path) -> str:
    """What keeps the script from loading a checkpoint into fresh modules."""
    with quietly() as said:
        try:
            module = importlib.import_module(script)
            module.load_checkpoint(str(path), *fresh_modules(script, str(path)))
        except SystemExit:
            return f"the checkpoint does not load: {said.getvalue()}"
    return ""


def fresh_modules(script: str, path: str) -> list[Any]:
    """Network and optimiser of a checkpoint's run, as they are before it is loaded."""
    module = importlib.import_module(script)
    args = module.parse_args(["--evaluate", path])
    if script == "grpo_rloo":
        train, test = module.load_problems(args)
        longest = [max(len(x[k]) for x in train + test) for k in (0, 1)]
        context = longest[0] + (args.max_new_tokens or longest[1] + 2)
        agent = module.Agent(context, [answer for _, answer in train + test], args)
        theta, _ = module.flatten_parameters(agent)
        return [agent, torch.optim.Adam([theta]), copy.deepcopy(agent)]
    agent = module.Agent(module.make_envs(args), args)
    named = [p for name, p in agent.named_parameters() if not name.startswith("critic")]
    parts = {"reinforce": torch.nn.ParameterList(named), "npg": agent.critic, "trpo": agent.critic}
    theta, _ = module.flatten_parameters(parts.get(script, agent))
    make = getattr(module, "make_optimizer", lambda theta, _: torch.optim.Adam([theta]))
    return [agent, make(theta, args)]


def last_words(script: str, status: int | None, err: str, expected: int, words: str = "") -> str:
    """What is wrong with how a run ended: its status, its last line, or more than that line."""
    lines = err.strip().splitlines()
    if status != expected:
        return f"status {status}, not {expected}: {err[-400:]}"
    if not lines or not lines[-1].startswith(f"{script}.py: ") or words not in lines[-1]:
        return f"its last words are {lines[-1:]}"
    if len(lines) > 1:
        return f"it said more than a line: {err[-400:]}"
    return ""


def names_checkpoint(script: str, err: str, run_dir: Path) -> str:
    """Whether the last line tells how to go on from the checkpoint, if there is one."""
    line, path = err.strip().splitlines()[-1], run_dir / "checkpoint.pt"
    if path.exists():
        good = line.endswith(shlex.join(["python", f"{script}.py", "--resume", str(path)]))
        return load(script, path) if good else f"no word on how to resume: {line}"
    return "" if "no checkpoint to go on from" in line else f"there is no checkpoint, but: {line}"


def whole(run_dir: Path) -> str:
    """What is missing in the files of a finished run."""
    names = {x.name for x in run_dir.iterdir() if not x.name.startswith("events.")}
    if names - {"videos"} != {"checkpoint.pt", "summary.json"}:
        return f"it left {', '.join(sorted(names))}"
    summary = json.loads((run_dir / "summary.json").read_text())
    if not {"args", "versions", "steps", "wall_seconds"} <= summary.keys():
        return "summary.json is not whole"
    state = (checkpoint_of(run_dir) or {})["state"][0]
    return "" if all(x.isfinite().all() for x in state.values()) else "a parameter is not finite"


@contextlib.contextmanager
def quietly() -> Iterator[io.StringIO]:
    """Keep what is said on stderr, drop stdout, and put back what a script sets in its process."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    hooks, paths, said = (sys.excepthook, threading.excepthook), [*sys.path], io.StringIO()
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(said),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")  # Gymnasium's, of what it then refuses
            yield said
    finally:
        for number, handler in zip(numbers, before):
            signal.signal(number, handler)
        (sys.excepthook, threading.excepthook), sys.path[:] = hooks, paths
        torch.set_num_threads(1)
