"""A run's directory -> one line of results/{suite}.jsonl; and reading those lines again."""

import contextlib
import fcntl
import importlib.util
import json
import math
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.suites import BenchmarkError, Job, Task

RESULTS = Path(__file__).resolve().parent / "results"
GRID = 100  # points of a stored curve
LLM_CURVES = {
    "accuracy": "charts/accuracy", "entropy": "losses/entropy", "kl": "losses/kl",
    "length": "charts/completion_length", "wrong_length": "charts/wrong_length",
}
NUMBERS = ("steps", "wall_seconds", "sps", "train_return_last100", "eval_return_mean")


def machine() -> dict[str, Any]:
    """What wall-clock times depend on, and nothing that names the machine."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return {"cpu": cpu, "cores": os.cpu_count(), "system": platform.system()}


def read_summary(run_dir: Path) -> dict[str, Any]:
    """summary.json of a finished run; ValueError, in words, if it is missing or not whole."""
    try:
        summary = json.loads((run_dir / "summary.json").read_text())
        if "train_reward" in summary:  # grpo_rloo: rewards of completions, held-out accuracy
            summary["train_return_last100"] = summary["train_reward"]
            summary["eval_return_mean"] = summary["accuracy"]
        missing = [name for name in NUMBERS if not math.isfinite(summary[name])]
    except FileNotFoundError:
        raise ValueError("wrote no summary.json") from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"summary.json is not valid: {error!r:.100}") from None
    if missing:
        raise ValueError(f"summary.json has no finite {', '.join(missing)}")
    return summary


def read_scalars(run_dir: Path, tag: str, times: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values, or times of writing, of a TensorBoard scalar. A resumed run has repeated
    what it had logged after its last checkpoint: the later value of a step stands."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.util.tensor_util import make_ndarray

    values = {}
    for path in sorted(run_dir.glob("events.out.tfevents.*"), key=lambda p: (p.stat().st_mtime, p)):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value if event.HasField("summary") else ():
                if value.tag == tag and value.HasField("tensor"):
                    number = float(make_ndarray(value.tensor).item())
                    values[event.step] = event.wall_time if times else number
    steps = np.array(sorted(values), float)
    return steps, np.array([values[step] for step in steps])


def grid_steps(steps: int) -> np.ndarray:
    """Where a stored curve has its points: the ends of GRID equal cells."""
    return steps * np.arange(1, GRID + 1) / GRID


def on_grid(steps: np.ndarray, values: np.ndarray, total: int) -> np.ndarray:
    """Mean of the values in each cell (g[k-1], g[k]]; an empty cell is interpolated, the cells
    before the first value are NaN, those after the last repeat it."""
    cells = np.searchsorted(grid_steps(total), steps)
    inside = cells < GRID
    cells, values = cells[inside], values[inside]
    counts, sums = np.bincount(cells, minlength=GRID), np.bincount(cells, values, GRID)
    full = np.flatnonzero(counts)
    if not len(full):
        return np.full(GRID, np.nan)
    return np.interp(np.arange(GRID), full, sums[full] / counts[full], left=np.nan)


def rounded(x: float, digits: int = 6) -> float | None:
    """Few digits keep the committed files small."""
    return float(f"{x:.{digits}g}") if math.isfinite(x) else None


def make_record(job: Job, directory: Path) -> dict[str, Any]:
    """The line of a finished run; ValueError if its files do not hold what they should."""
    run_dir, task = directory / "run", job.task
    summary, started = read_summary(run_dir), json.loads((directory / "job.json").read_text())
    total = int(summary["steps"])
    llm = task.script == "grpo_rloo"
    name = "charts/reward" if llm else "charts/episodic_return"
    return_curve = on_grid(*read_scalars(run_dir, name), total)
    sps_steps, sps = read_scalars(run_dir, "charts/SPS")
    if not len(sps) or np.isnan(return_curve).all():
        raise ValueError(f"the TensorBoard events hold no {name} or charts/SPS")
    seconds = np.interp(grid_steps(total), sps_steps, sps_steps / sps)
    curves = {"return": return_curve}
    for key, tag in LLM_CURVES.items() if llm else ():
        curves[key] = on_grid(*read_scalars(run_dir, tag), total)
    return {
        "env": task.env,
        "script": f"{task.peer}-{task.script}" if task.peer else task.script,
        "variant": task.variant,
        "seed": job.seed,
        "steps": total,
        "flags": task.flags,
        "script_hash": job.script_hash,
        "versions": job.versions,
        "machine": started["machine"],
        "date": started["date"],
        "commit": started["commit"],
        **{name: rounded(summary[name]) for name in NUMBERS if name != "steps"},
        **(of_llm(summary, started.get("started"), run_dir) if llm else {}),
        **(of_line_search(run_dir) if (task.script, task.peer) == ("trpo", "") else {}),
        "curve": {
            **{key: [rounded(x, 5) for x in curve] for key, curve in curves.items()},
            "seconds": [rounded(x, 4) for x in seconds],
        },
    }


def of_llm(summary: dict[str, Any], started: float | None, run_dir: Path) -> dict[str, Any]:
    """What a run of grpo_rloo has besides: the accuracy of its warm start, and the seconds from the
    start of the process to the summary, None if it was resumed."""
    seconds = (run_dir / "summary.json").stat().st_mtime - started if started else math.nan
    facts = {"accuracy_sft": summary["accuracy_sft"], "process_seconds": seconds}
    return {name: rounded(x) for name, x in facts.items()}


def of_line_search(run_dir: Path) -> dict[str, Any]:
    """Percent of trpo's updates whose first step was not accepted, and of those with no step."""
    _, backtracks = read_scalars(run_dir, "losses/backtracks")
    _, accepted = read_scalars(run_dir, "losses/accepted")
    shares = {"backtracked": backtracks > 0, "rejected": accepted == 0}
    return {name: rounded(100 * float(x.mean())) for name, x in shares.items() if len(x)}


def label(record: dict[str, Any]) -> str:
    return Task(record["script"], "", 1, variant=record["variant"]).label


def record_key(record: dict[str, Any]) -> tuple:
    flags = json.dumps(record["flags"], sort_keys=True)
    return record["env"], record["script"], record["variant"], flags, record["seed"]


def find_record(records: list[dict[str, Any]], job: Job) -> dict[str, Any] | None:
    """The line of this job, if there is one of the same code, versions, flags and length."""
    task = job.task
    script = f"{task.peer}-{task.script}" if task.peer else task.script
    facts = {"env": task.env, "script": script, "variant": task.variant, "seed": job.seed}
    facts |= {"flags": task.flags, "script_hash": job.script_hash, "versions": job.versions}
    for record in records:
        # Whole iterations or episodes: a run is a little shorter or longer than it was to be.
        same_length = math.isclose(record["steps"], task.steps, rel_tol=0.01)
        if same_length and all(record[name] == value for name, value in facts.items()):
            return record
    return None


@contextlib.contextmanager
def directory_lock(directory: Path, wait: bool) -> Iterator[None]:
    """Hold a directory against other harnesses; BlockingIOError if it is held and wait is off."""
    directory.mkdir(parents=True, exist_ok=True)
    handle = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(handle)


def write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def merge_records(path: Path, records: list[dict[str, Any]]) -> None:
    """Put lines into a results file, in the place of those of the same run; the others stay."""
    with directory_lock(path.parent, wait=True):
        old = read_records(path) if path.exists() else []
        merged = {record_key(record): record for record in old + records}
        lines = [json.dumps(merged[key], separators=(",", ":")) for key in sorted(merged)]
        text = "".join(line + "\n" for line in lines)
        if not path.exists() or path.read_text() != text:
            write_atomically(path, text)


def read_records(path: Path) -> list[dict[str, Any]]:
    try:
        records = [json.loads(line) for line in path.read_text().splitlines()]
        for record in records:
            _ = record_key(record), record["curve"]["return"], record["train_return_last100"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BenchmarkError(f"{path} is no results file: {error!r:.120}") from None
    return records


def read_results(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Suite name -> records, of one results file or of a directory of them."""
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not files:
        raise BenchmarkError(f"no results in {path}: `python -m benchmarks run` writes them")
    return {file.stem: read_records(file) for file in files}


def measure_random(env_id: str, episodes: int = 100) -> dict[str, Any]:
    """Return of uniformly random actions, the 0 of the normalised score."""
    import gymnasium as gym

    if importlib.util.find_spec("mujoco"):  # no MUJOCO_LOG.TXT here; len as in the scripts
        importlib.import_module("mujoco").set_mju_user_warning(len)
    try:
        env = gym.make(env_id)
    except Exception as error:
        raise BenchmarkError(f"cannot make {env_id}: {error}") from None
    env.action_space.seed(0)
    returns = []
    for episode in range(episodes):
        env.reset(seed=episode)
        total, done = 0.0, False
        while not done:
            _, reward, terminated, truncated, _ = env.step(env.action_space.sample())
            total, done = total + float(reward), terminated or truncated
        returns.append(total)
    env.close()
    mean, std = rounded(np.mean(returns).item()), rounded(np.std(returns, ddof=1).item())
    return {"mean": mean, "std": std, "episodes": episodes}


def read_random(results: Path) -> dict[str, dict[str, Any]]:
    path = results / "random.json"
    return json.loads(path.read_text()) if path.exists() else {}


def ensure_random(results: Path, envs: list[str]) -> None:
    """Measure random play where results/random.json does not have it yet."""
    missing = [env for env in dict.fromkeys(envs) if env not in read_random(results)]
    measured = {env: measure_random(env) for env in missing}
    with directory_lock(results, wait=True):
        known = read_random(results) | measured
        if measured:
            text = json.dumps(known, indent=2, sort_keys=True)
            write_atomically(results / "random.json", text + "\n")
