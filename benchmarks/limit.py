"""How near the scripts come to their limit: `python -m benchmarks limit`.

The limit of a script is what its environments need to replay recorded actions, plus what its bare
networks (matrix products and activations; no loss, no optimiser, no copies) need for as many passes
forward and backward, of the same shapes, as the script makes. Both are timed, eager and on one
thread, in one process with the script itself, in turns.
"""

import contextlib
import io
import json
import re
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path
from typing import Any

from benchmarks.runner import command_line, environment
from benchmarks.speed import WARM_UP, facts, keep_row, measured, read_rows, spread
from benchmarks.suites import ROOT, BenchmarkError, Job, Task, commit_of, library_versions
from benchmarks.suites import script_hash as hash_of

FILE = "limit.json"
SECTION = re.compile(r"^(        )# --- (\d\. \w+) ---$", re.MULTILINE)
PARTS = ("1. Collect", "2. Advantages", "3. Update", "4. Log")
AT_LEAST = 0.3  # seconds that a timed stretch of passes is repeated for


def instrument(source: str) -> str:
    """The script with a call of mark() in place of the banners of its training loop."""
    text, banners = SECTION.subn(r'\1mark("\2", run.step)', source)
    text, ends = re.subn(r"^    run\.finish\(", '    mark("end", run.step)\n    run.finish(', text,
                         flags=re.MULTILINE)
    if (banners, ends) != (len(PARTS), 1):
        raise BenchmarkError(f"a script has {banners} banners and {ends} ends of its training loop")
    return text


def load(name: str, path: Path, marks: list[tuple[str, int, float]]) -> Any:
    """The instrumented script as a module; its marks go to the list."""
    module = types.ModuleType(name)
    module.__file__ = str(path)
    vars(module)["mark"] = lambda part, step: marks.append((part, step, time.perf_counter()))
    sys.modules[name] = module
    exec(compile(instrument(path.read_text()), str(path), "exec"), vars(module))
    return module


def per_step(marks: list[tuple[str, int, float]]) -> dict[str, float]:
    """Microseconds per step of each part of the loop, after the warm-up's iterations."""
    starts = [i for i, mark in enumerate(marks) if mark[0] == PARTS[0]]
    first = starts[int(len(starts) * WARM_UP)]
    steps = marks[-1][1] - marks[first][1]
    seconds: dict[str, float] = dict.fromkeys(PARTS, 0.0)
    for (part, _, start), (_, _, end) in zip(marks[first:], marks[first + 1 :]):
        seconds[part] += end - start
    return {part: round(x / steps * 1e6, 3) for part, x in seconds.items()}


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


def time_networks(script: str, args: Any, agent: Any, batch: int, obs_dim: int) -> float:
    """Microseconds per step of an iteration's bare passes."""
    import torch

    work = []
    for name, rows, count, backward in passes(script, args, batch):
        network, x = getattr(agent, name), torch.randn(rows, obs_dim)
        ones, params = torch.ones_like(network(x)), list(network.parameters())
        work.append((network, x, count, params if backward else [], ones))
    rounds, start = 0, time.perf_counter()
    while (seconds := time.perf_counter() - start) < AT_LEAST:
        rounds += 1
        for network, x, count, params, ones in work:
            with torch.set_grad_enabled(bool(params)):
                for _ in range(count):
                    y = network(x)
                    if params:
                        torch.autograd.grad(y, params, ones)
    return round(seconds / rounds / batch * 1e6, 3)


def time_transformer(module: Any, args: Any, agent: Any, P: int, L: int) -> float:
    """Microseconds per completion of grpo_rloo's passes: sampling, then the log-probabilities of
    the old policy and the reference, the updates. Completions as long as the longest answer."""
    import torch

    Q, G = args.num_prompts, args.group_size
    prompts = torch.randint(2, 90, (Q, P))
    real = torch.ones(Q, P, dtype=torch.bool)
    tokens = torch.randint(2, 90, (Q * G, L - 1))
    longer = lambda n, width: torch.ones(n * G, P + width, dtype=torch.bool)

    def read(count: int):
        first, past, _ = module.read_prompts(agent, prompts[:count], real[:count], G)
        others, _ = agent(tokens[: count * G], longer(count, L - 1), past)
        return first, others

    params, part = list(agent.parameters()), Q // args.num_minibatches
    ones = [torch.ones_like(x) for x in read(part)]
    rounds, start = 0, time.perf_counter()
    while (seconds := time.perf_counter() - start) < AT_LEAST:
        rounds += 1
        with torch.inference_mode():
            _, past, _ = module.read_prompts(agent, prompts, real, G)
            for t in range(L - 1):
                _, past = agent(tokens[:, t : t + 1], longer(Q, t + 1), past)
            for _ in range(2):
                read(Q)
        for _ in range(args.update_epochs * args.num_minibatches):
            torch.autograd.grad(read(part), params, ones)
    return round(seconds / rounds / (Q * G) * 1e6, 3)


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


def time_environments(args: Any, envs: Any, actions: list[Any]) -> float:
    """Microseconds per step of a replay."""
    envs.reset(seed=list(range(args.num_envs)))
    start = time.perf_counter()
    for action in actions:
        envs.step(action)
    return round((time.perf_counter() - start) / len(actions) / args.num_envs * 1e6, 3)


def work(script: str, path: Path, argv: list[str], rounds: int) -> list[dict[str, Any]]:
    """The rounds of one task, in this process."""
    import torch

    marks: list[tuple[str, int, float]] = []
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
        else:
            envs = module.make_envs(args)
            agent = module.Agent(envs, args)
            obs_dim = envs.single_observation_space.shape[0]
            actions = record(module, args, envs, agent, max(500, 4096 // args.num_envs))
        for number in range(rounds):
            row: dict[str, Any] = {"environment": 0.0}
            for side in ("eager", "compiled"):
                torch._dynamo.reset()  # a compiled loss of another run is not this run's
                marks.clear()
                flags = ["--run-dir", f"{directory}/{side}{number}", "--eval-episodes", "1"]
                module.main(parse(*flags, *["--compile"] * (side == "compiled")))
                row[side] = per_step(marks)
            if script == "grpo_rloo":
                row["networks"] = time_transformer(module, args, agent, P, L)
            else:
                iterations = sum(part == PARTS[0] for part, *_ in marks)
                batch = round(marks[-1][1] / iterations)
                row["environment"] = time_environments(args, envs, actions)
                row["networks"] = time_networks(script, args, agent, batch, obs_dim)
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


def shares(row: dict[str, Any], side: str) -> list[float]:
    """The limit over the script's time, in percent, round by round."""
    limits = [x["environment"] + x["networks"] for x in row["rounds"]]
    return [100 * a / sum(x[side].values()) for a, x in zip(limits, row["rounds"], strict=True)]


def limit_line(row: dict[str, Any]) -> str:
    rounds, name = row["rounds"], row["script"] + f" ({row['variant']})" * bool(row["variant"])
    cells = [name, row["env"]]
    cells += [spread([x[part] for x in rounds], 1) for part in ("environment", "networks")]
    for side in ("eager", "compiled"):
        cells += [spread([sum(x[side].values()) for x in rounds], 1), spread(shares(row, side), 0)]
    total = sum(sum(x["eager"].values()) for x in rounds)
    parts = [sum(x["eager"][part] for x in rounds) / total for part in PARTS]
    return f"| {' | '.join([*cells, ', '.join(f'{100 * x:.0f}' for x in parts)])} |"


def limit_section(rows: list[dict[str, Any]]) -> list[str]:
    """The table, in Markdown; empty if nothing was measured."""
    if not rows:
        return []
    return [
        "### limit", "",
        "| Script | Environment | Environment, µs a step | Networks, µs | Eager, µs "
        "| **% of the limit** | Compiled, µs | **% of the limit** "
        "| Eager: % collect, advantages, update, rest |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|", *map(limit_line, rows), "",
        "The limit: the environments replaying recorded actions, plus as many passes of the bare "
        "networks, no loss and no optimiser, as the script makes, at the same batch shapes "
        "(`benchmarks/limit.py`). Microseconds per environment step, of grpo_rloo per completion; "
        f"median [least, greatest] of {min(len(row['rounds']) for row in rows)} rounds, each in "
        "one process on one thread. "
        f"{measured(rows)}",
        "", "```", "python -m benchmarks limit", "python -m benchmarks report", "```", "",
    ]


if __name__ == "__main__":
    script, path, rounds, *argv = sys.argv[1:]
    with contextlib.redirect_stdout(io.StringIO()):
        found = work(script, Path(path), argv, int(rounds))
    print(json.dumps(found))
