"""What to run: suites of tasks, read from TOML, and the identity of each run."""

import ast
import hashlib
import importlib.metadata
import json
import platform
import subprocess
import tomllib
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SUITES = Path(__file__).resolve().parent / "suites"
BANNER = "# === Plumbing"
# What stands below the banner and yet decides what a script computes: its hash sees these too.
COMPUTES = ("RunningStats", "discounted_returns", "flatten_parameters", "seed_everything")


class BenchmarkError(Exception):
    """A wrong input: the command line shows it as one line and exits with status 2."""


@dataclass(frozen=True)
class Task:
    """One script on one environment, to be run with several seeds."""

    script: str
    env: str
    steps: int
    flags: dict[str, Any] = field(default_factory=dict)
    variant: str = ""
    """sets a task with other flags apart from the same script's in tables and pictures; of
    grpo_rloo, whose env is its --task, its first word is the preset"""
    peer: str = ""
    """the library that runs the task in the script's place"""

    @property
    def label(self) -> str:
        name = f"{self.peer}-{self.script}" if self.peer else self.script
        return f"{name} ({self.variant})" if self.variant else name


@dataclass(frozen=True)
class Suite:
    name: str
    tasks: list[Task]
    seeds: int
    normalise_by: str
    """the script whose published result is the 1 of the normalised score, random play the 0"""
    publish: bool
    """whether results belong in benchmarks/results/; if not they stay in the work directory"""


def load_suite(name: str) -> Suite:
    """The suite of this name, or of this .toml file."""
    path = Path(name) if name.endswith(".toml") else SUITES / f"{name}.toml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in SUITES.glob("*.toml")))
        raise BenchmarkError(f"no suite {name}; there are: {known}")
    try:
        table = tomllib.loads(path.read_text())
        tasks = [Task(**task) for task in table["task"]]
        for task in tasks:
            if not isinstance(task.steps, int) or task.steps < 1:
                raise ValueError(f"steps of {task.label} on {task.env} must be a positive integer")
        labels = [(task.label, task.env) for task in tasks]
        if twice := {pair for pair in labels if labels.count(pair) > 1}:
            raise ValueError(f"{' on '.join(twice.pop())} is listed twice: give one a variant")
        seeds, publish = table.get("seeds", 5), table.get("publish", True)
        return Suite(path.stem, tasks, seeds, table.get("normalise_by", "ppo"), publish)
    except (tomllib.TOMLDecodeError, KeyError, TypeError, ValueError) as error:
        raise BenchmarkError(f"{path}: {error}") from None


def select_tasks(suite: Suite, scripts: Path, only: list[str], envs: list[str], peer: str):
    """The suite's tasks that are asked for, and one line on each script that does not exist yet."""
    for kind, asked, known in (
        ("script", only, dict.fromkeys(task.script for task in suite.tasks)),
        ("environment", envs, dict.fromkeys(task.env for task in suite.tasks)),
    ):
        for name in asked:
            if name not in known:
                raise BenchmarkError(
                    f"no {kind} {name} in suite {suite.name}; there are: {', '.join(known)}"
                )
    chosen, absent = [], {}
    for task in suite.tasks:
        if (only and task.script not in only) or (envs and task.env not in envs):
            continue
        if not (scripts / f"{task.script}.py").is_file():
            if only:
                raise BenchmarkError(f"there is no script {task.script}.py in {scripts}")
            absent[task.script] = f"{task.script}: no such script yet, its tasks are skipped"
        else:
            chosen.append(replace(task, peer=peer))
    if not chosen and not absent:
        raise BenchmarkError(f"no task of suite {suite.name} is left by --only and --env")
    return chosen, list(absent.values())


def normal_form(source: str) -> str:
    """Source without comments and docstrings, of what stands below the plumbing banner COMPUTES
    alone, and of the imports those whose names are used in the rest."""
    above, _, below = source.partition(f"\n{BANNER}")
    tree = ast.parse(above)
    tree.body += [x for x in ast.parse("#" + below).body if getattr(x, "name", "") in COMPUTES]
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            # Every bare constant goes: the strings under the fields of Args are docstrings too.
            is_bare = lambda x: isinstance(x, ast.Expr) and isinstance(x.value, ast.Constant)
            node.body = [x for x in node.body if not is_bare(x)] or [ast.Pass()]
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            bound = lambda x: (x.asname or x.name).split(".")[0]
            node.names = [x for x in node.names if bound(x) in used]
    tree.body = [node for node in tree.body if getattr(node, "names", True)]
    return ast.unparse(tree)


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def script_hash(path: Path) -> str:
    """Hash of what a script computes; an edited comment, docstring or progress bar keeps it."""
    try:
        return digest(normal_form(path.read_text()))
    except SyntaxError as error:
        raise BenchmarkError(f"{path}: {error}") from None


def code_hash(path: Path) -> str:
    """Hash of all of a script's code, plumbing and docstrings too, without its comments."""
    return digest(ast.dump(ast.parse(path.read_text())))


def python_version() -> str:
    return ".".join(platform.python_version_tuple()[:2])


def library_versions(task: Task) -> dict[str, str]:
    """Versions of what can change a run's numbers."""
    import gymnasium as gym

    packages = ["torch", "numpy"]
    if task.script != "grpo_rloo":  # whose tasks are its own
        try:
            entry = str(gym.spec(task.env).entry_point)
        except Exception as error:
            raise BenchmarkError(f"Gymnasium has no environment {task.env}: {error}") from None
        packages += ["gymnasium"] + [x for x in ("mujoco", "box2d") if f".{x}" in entry]
    if task.peer:
        packages += ["stable-baselines3"] + ["sb3-contrib"] * (task.script == "trpo")
    try:
        versions = {name: importlib.metadata.version(name) for name in packages}
    except importlib.metadata.PackageNotFoundError as error:
        raise BenchmarkError(
            f"{task.label} on {task.env} needs {error.name}: pip install -r requirements-dev.txt"
        ) from None
    return {"python": python_version(), **versions}


def commit_of(path: Path) -> str | None:
    """The commit checked out around a file, with -dirty if the file is not as committed there;
    other files, such as the results that a campaign writes, do not matter."""
    git = ["git", "-C", str(path.parent)]
    run = lambda *words: subprocess.run([*git, *words], capture_output=True, text=True)
    try:
        head = run("rev-parse", "HEAD")
        changed = run("status", "--porcelain", "--", path.name).stdout.strip()
    except OSError:  # no git
        return None
    return head.stdout.strip() + "-dirty" * bool(changed) if head.returncode == 0 else None


@dataclass(frozen=True)
class Job:
    """One run: a task with a seed, its directory's name and what that depends on."""

    task: Task
    seed: int
    source: bytes
    """the script as it was when the campaign began: an edit meanwhile must not get into it"""
    script_hash: str
    versions: dict[str, str]
    commit: str | None
    peer_settings: dict[str, Any] | None = None

    @property
    def name(self) -> str:
        task = self.task
        key = digest([asdict(task), self.seed, self.script_hash, self.versions])
        text = f"{task.env}__{task.label}__{self.seed}__{key}"
        return "".join(c if c.isalnum() or c in "-_." else "-" for c in text)

    def __str__(self) -> str:
        return f"{self.task.label} {self.task.env} seed {self.seed}"


def make_jobs(tasks: list[Task], seeds: int, scripts: Path) -> list[Job]:
    """All runs, seed by seed, so that a campaign cut short has as many seeds of each task."""
    jobs = []
    for task in tasks:
        path, settings = scripts / f"{task.script}.py", None
        if task.peer:
            from benchmarks.peers import peer_hash, peer_settings

            settings = peer_settings(path, task.flags)
            hashed = peer_hash(settings)
        else:
            hashed = script_hash(path)
        facts = path.read_bytes(), hashed, library_versions(task), commit_of(path), settings
        jobs += [Job(task, seed, *facts) for seed in range(1, seeds + 1)]
    return sorted(jobs, key=lambda job: job.seed)
