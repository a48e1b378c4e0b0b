"""How near the scripts come to their limit: `python -m benchmarks limit`.

The limit of a script is what its environments need to replay recorded actions, plus what its bare
networks (matrix products and activations; no loss, no optimiser, no copies) need for as many passes
forward and backward, of the same shapes, as the script makes. Both are timed, eager and on one
thread, in one process with the script itself: after each of its iterations, as many steps and
passes as that took, so that what else the machine does meanwhile meets all alike.
"""

import contextlib
import io
import itertools
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.runner import command_line, environment
from benchmarks.speed import (
    WARM_UP,
    cpu,
    facts,
    keep_row,
    least_to_greatest,
    measured,
    read_rows,
    row_name,
    spread,
)
from benchmarks.suites import ROOT, BenchmarkError, Job, Task, commit_of, library_versions
from benchmarks.suites import script_hash as hash_of

FILE = "limit.json"
SECTION = re.compile(r"^(        )# --- (\d\. \w+) ---$", re.MULTILINE)
PARTS = ("1. Collect", "2. Advantages", "3. Update", "4. Log")
BARE = ("environment", "networks")
TARGETS = {"eager": 40, "compiled": 50}  # what this project set out for, in percent


def instrument(source: str) -> str:
    """The script with a call of mark() in place of the banners of its training loop."""
    text, banners = SECTION.subn(r'\1mark("\2", run.step)', source)
    text, ends = re.subn(r"^    run\.finish\(", '    mark("end", run.step)\n    run.finish(', text,
                         flags=re.MULTILINE)
    if (banners, ends) != (len(PARTS), 1):
        raise BenchmarkError(f"a script has {banners} banners and {ends} ends of its training loop")
    return text


class Marks:
    """When the parts of a script's loop began and ended, and what the bare work of each iteration,
    done between two of them, took."""

    def __init__(self):
        self.parts: list[tuple[str, int, float, float]] = []
        self.bare: list[tuple[int, float, float]] = []
        self.work: Callable[[int], tuple[float, float]] | None = None
        """does the bare work of an iteration of some steps; seconds in the environments and in the
        networks"""

    def __call__(self, part: str, step: int) -> None:
        ended = time.perf_counter()
        if part == PARTS[0]:
            steps = [at for name, at, *_ in self.parts if name == part][-1:]
            if self.work and steps:
                count = step - steps[0]
                # Twice: the first time warms the caches for it. (Cold, as the script finds them
                # itself, it takes some half as long again at a2c's small batches: a laxer limit.)
                self.work(count)
                self.bare.append((count, *self.work(count)))
        self.parts.append((part, step, ended, time.perf_counter()))

    def per_step(self) -> dict[str, float]:
        """Microseconds per step of each part of the loop and of the bare work, after the warm-up's
        iterations."""
        starts = [i for i, mark in enumerate(self.parts) if mark[0] == PARTS[0]]
        warm = int(len(starts) * WARM_UP)
        rest = self.parts[starts[warm] :]
        seconds: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        for (part, _, _, start), (_, _, end, _) in itertools.pairwise(rest):
            seconds[part] += end - start
        steps = rest[-1][1] - rest[0][1]
        found = {part: x / steps for part, x in seconds.items()}
        if self.bare:
            counts, *bare = np.sum(self.bare[warm:], axis=0)
            found |= {name: x / counts for name, x in zip(BARE, bare)}
        return {name: round(x * 1e6, 3) for name, x in found.items()}


def load(name: str, path: Path, marks: Marks) -> Any:
    """The instrumented script as a module."""
    module = types.ModuleType(name)
    module.__file__ = str(path)
    vars(module)["mark"] = marks
    sys.modules[name] = module
    exec(compile(instrument(path.read_text()), str(path), "exec"), vars(module))
    return module


def passes(script: str, args: Any, batch: int) -> list[tuple[str, int, int, bool]]:
    """(network, rows, how often, whether backward too) of an iteration over batch steps."""
    N = args.num_envs
    acting, judging = ("actor", N, batch // N, False), ("critic", batch, 2, False)
    if script == "a2c":
        return [acting, judging, ("actor", batch, 1, True), ("critic", batch, 1, True)]
    if script in ("ppo", "ppo_continuous"):
        estimates, count = args.update_epochs if args.recompute_adv else 1, args.num_minibatches
        each = batch // count, args.update_epochs * count, True
        judged = [judging] * estimates
        return [acting, ("actor", batch, 1, False), *judged, ("actor", *each), ("critic", *each)]
    fit = batch // args.num_minibatches, args.value_epochs * args.num_minibatches, True
    if script == "reinforce":
        return [acting, judging, ("actor", batch, 1, True), ("critic", *fit)]
    # The gradient, the graph of F's products, and the products: of conjugate gradient and F u. Such
    # a product takes one pass forward (J v) and one backward. Then the old and the new policy.
    return [acting, judging, ("actor", batch, args.cg_iters + 3, True), ("actor", batch, 2, False),
            ("critic", *fit)]


def bare_networks(script: str, args: Any, agent: Any, obs_dim: int) -> Callable[[int], float]:
    """Makes an iteration's passes over a batch of some steps and returns their seconds."""
    import torch

    own = torch.Generator().manual_seed(1)  # the script's random numbers stay the script's

    def work(batch: int) -> float:
        todo = []
        for name, rows, count, backward in passes(script, args, batch):
            network, x = getattr(agent, name), torch.randn(rows, obs_dim, generator=own)
            params = list(network.parameters()) if backward else []
            outputs = 1 if name == "critic" else agent.actor[-1].out_features
            todo.append((network, x, count, params, torch.ones(rows, outputs)))
        start = time.perf_counter()
        for network, x, count, params, ones in todo:
            with torch.set_grad_enabled(bool(params)):
                for _ in range(count):
                    y = network(x)
                    if params:
                        torch.autograd.grad(y, params, ones)
        return time.perf_counter() - start

    return work


def bare_transformer(module: Any, args: Any, agent: Any, P: int, L: int) -> Callable[[int], float]:
    """The same of grpo_rloo: sampling, then the log-probabilities of the old policy and the
    reference, the updates. Completions are as long as the longest answer."""
    import torch

    Q, G, own = args.num_prompts, args.group_size, torch.Generator().manual_seed(1)
    prompts = torch.randint(2, 90, (Q, P), generator=own)
    real = torch.ones(Q, P, dtype=torch.bool)
    tokens = torch.randint(2, 90, (Q * G, L - 1), generator=own)
    longer = lambda n, width: torch.ones(n * G, P + width, dtype=torch.bool)

    def read(count: int):
        first, past, _ = module.read_prompts(agent, prompts[:count], real[:count], G)
        others, _ = agent(tokens[: count * G], longer(count, L - 1), past)
        return first, others

    params, part = list(agent.parameters()), Q // args.num_minibatches
    ones = [torch.ones_like(x) for x in read(part)]

    def work(_: int) -> float:
        start = time.perf_counter()
        with torch.inference_mode():
            _, past, _ = module.read_prompts(agent, prompts, real, G)
            for t in range(L - 1):
                _, past = agent(tokens[:, t : t + 1], longer(Q, t + 1), past)
            for _ in range(2):
                read(Q)
        for _ in range(args.update_epochs * args.num_minibatches):
            torch.autograd.grad(read(part), params, ones)
        return time.perf_counter() - start

    return work


def record(module: Any, args: Any, envs: Any, agent: Any, steps: int) -> list[Any]:
    """Actions of the untrained policy, one array per vector step."""
    import torch

    (obs, _), actions = envs.reset(seed=list(range(args.num_envs))), []
    with torch.inference_mode():
        for _ in range(steps):
            noise = agent.draw_noise(args.num_envs)
            actions.append(agent.act(torch.from_numpy(obs.astype("float32")), noise).numpy())
            obs = envs.step(actions[-1])[0]
    return actions


def bare_environments(args: Any, envs: Any, actions: list[Any]) -> Callable[[int], float]:
    """Replays some steps of the recorded actions, over and over, and returns their seconds."""
    envs.reset(seed=list(range(args.num_envs)))
    recorded = itertools.cycle(actions)

    def work(steps: int) -> float:
        start = time.perf_counter()
        for _ in range(steps // args.num_envs):
            envs.step(next(recorded))
        return time.perf_counter() - start

    return work


def work(script: str, path: Path, argv: list[str], rounds: int) -> list[dict[str, Any]]:
    """The rounds of one task, in this process."""
    import torch

    marks = Marks()
    module = load(script, path, marks)
    with tempfile.TemporaryDirectory() as directory:
        parse = lambda *more: module.parse_args([*argv, *more])
        args, found = parse(), []
        module.check_args(args)
        if script == "grpo_rloo":
            train, test = module.load_problems(args)
            P = max(len(prompt) for prompt, _ in train + test)
            answers = [answer for _, answer in train + test]
            L = max(map(len, answers)) + 1  # of a right answer, with its end token
            agent = module.Agent(P + L, answers, args)
            environments = lambda steps: 0.0
            networks = bare_transformer(module, args, agent, P, L)
        else:
            envs = module.make_envs(args)
            agent = module.Agent(envs, args)
            actions = record(module, args, envs, agent, max(500, 4096 // args.num_envs))
            environments = bare_environments(args, envs, actions)
            obs_dim = envs.single_observation_space.shape[0]
            networks = bare_networks(script, args, agent, obs_dim)
        for number in range(rounds):
            row: dict[str, Any] = {}
            for side in ("eager", "compiled"):
                torch._dynamo.reset()  # a compiled loss of another run is not this run's
                marks.parts, marks.bare = [], []
                marks.work = lambda steps: (environments(steps), networks(steps))
                flags = ["--run-dir", f"{directory}/{side}{number}", "--eval-episodes", "1"]
                module.main(parse(*flags, *["--compile"] * (side == "compiled")))
                row[side] = marks.per_step()
            found.append(row)
    return found


def measure(task: Task, rounds: int, scripts: Path) -> dict[str, Any]:
    """A row of limit.json: the rounds, timed by a process of its own."""
    path = (scripts / f"{task.script}.py").resolve()
    job = Job(task, 1, b"", hash_of(path), library_versions(task), commit_of(path))
    _, _, *argv = command_line(job, path, Path("unused"))
    at = argv.index("--run-dir")
    del argv[at : at + 2]
    command = [sys.executable, "-m", "benchmarks.limit", task.script, str(path), str(rounds), *argv]
    done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise BenchmarkError(f"{job} ended with {done.returncode}: {done.stderr[-300:]}")
    return facts(task, job) | {"rounds": json.loads(done.stdout.splitlines()[-1])}


def read_limit(results: Path) -> list[dict[str, Any]]:
    return read_rows(results / FILE)


def limit(tasks: list[Task], rounds: int, results: Path, scripts: Path) -> None:
    """Measure task by task; each one's row is written when it is complete."""
    for task in tasks:
        row = measure(task, rounds, scripts)
        print(limit_line(row), flush=True)
        keep_row(results / FILE, row)


def total(found: dict[str, float]) -> float:
    """Microseconds per step of a script's loop."""
    return sum(found[part] for part in PARTS)


def shares(row: dict[str, Any], side: str) -> list[float]:
    """The limit over the script's time, in percent, round by round."""
    found = [x[side] for x in row["rounds"]]
    return [100 * (x["environment"] + x["networks"]) / total(x) for x in found]


def short_of_targets(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each row whose median share of the limit is below a target."""
    lines = []
    for row in rows:
        found = {side: round(statistics.median(shares(row, side)), 1) for side in TARGETS}
        short = [f"{side} {found[side]:.1f} % of the limit, not {wanted}"
                 for side, wanted in TARGETS.items() if found[side] < wanted]
        if short:
            name = f"{row_name(row)} on {row['env']}"
            lines.append(f"- Short of its target: {name}, {', '.join(short)} ({cpu(row)})")
    return lines


def limit_line(row: dict[str, Any]) -> str:
    rounds, name = row["rounds"], row_name(row)
    eager = [x["eager"] for x in rounds]
    cells = [name, row["env"], *(spread([x[part] for x in eager], 1) for part in BARE)]
    profiles = []
    for side in ("eager", "compiled"):
        cells += [spread([total(x[side]) for x in rounds], 1), spread(shares(row, side), 0)]
        whole = sum(total(x[side]) for x in rounds)
        parts = [sum(x[side][part] for x in rounds) / whole for part in PARTS]
        profiles.append(", ".join(f"{100 * x:.0f}" for x in parts))
    return f"| {' | '.join([*cells, *profiles, cpu(row)])} |"


def limit_section(rows: list[dict[str, Any]]) -> list[str]:
    """The table, in Markdown; empty if nothing was measured."""
    if not rows:
        return []
    rounds = least_to_greatest(len(row["rounds"]) for row in rows)
    return [
        "### limit", "",
        "| Script | Environment | Environment, µs a step | Networks, µs | Eager, µs "
        "| **% of the limit** | Compiled, µs | **% of the limit** "
        "| Eager: % collect, advantages, update, rest | Compiled | CPU |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|---|", *map(limit_line, rows), "",
        "The limit: the environments replaying recorded actions, plus as many passes of the bare "
        "networks, no loss and no optimiser, as the script makes, at the same batch shapes "
        "(`benchmarks/limit.py`), done after each of its iterations, twice, and clocked the second "
        "time, in warm caches. Microseconds per environment step, of grpo_rloo per completion; the "
        "first two columns are of the eager run, a share is of its own run; "
        f"median [least, greatest] of {rounds} rounds, each in "
        "one process on one thread. "
        f"{measured(rows)}",
        "", *(short := short_of_targets(rows)), *[""] * bool(short),
        "```", "python -m benchmarks limit", "python -m benchmarks report", "```", "",
    ]


if __name__ == "__main__":
    script, path, rounds, *argv = sys.argv[1:]
    with contextlib.redirect_stdout(io.StringIO()):
        found = work(script, Path(path), argv, int(rounds))
    print(json.dumps(found))
