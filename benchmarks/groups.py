"""Records of a suite -> groups of seeds, what is missing, published results, normalised scores."""

import csv
import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.results import label
from benchmarks.suites import Suite, script_hash

SCRIPTS = ("reinforce", "a2c", "npg", "trpo", "ppo", "ppo_continuous", "grpo_rloo")
REFERENCES = Path(__file__).resolve().parent / "references.csv"
SAME_ALGORITHM = {
    "ppo_continuous": ("ppo_continuous", "ppo", "ppo (all code-level details)"),
    "trpo": ("trpo", "trpo+ (with details)"),
}
# A published result is held against a run of half its steps; a run is cut to whole iterations.
MOST_STEPS = 2 * 1.02


def base_script(name: str) -> str:
    """The script that a label, of a peer or a variant too, belongs to."""
    return re.sub(r"^sb3-| \(.*\)$", "", name)


def label_order(name: str) -> tuple:
    script = base_script(name)
    return SCRIPTS.index(script) if script in SCRIPTS else len(SCRIPTS), name != script, name


@dataclass(frozen=True)
class Group:
    """The seeds of one algorithm on one environment."""

    env: str
    label: str
    records: list[dict[str, Any]]

    @property
    def finals(self) -> np.ndarray:
        return np.array([record["train_return_last100"] for record in self.records])

    @property
    def steps(self) -> int:
        return self.records[0]["steps"]


def group_records(records: list[dict[str, Any]], suite: Suite | None):
    """Groups in the order of the tables, and notes on what does not fit together or is missing."""
    together: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in sorted(records, key=lambda record: record["seed"]):
        together.setdefault((record["env"], label(record)), []).append(record)
    envs = [task.env for task in suite.tasks] if suite else []
    envs = list(dict.fromkeys(envs + sorted(env for env, _ in together)))
    groups, notes = [], []
    for key in sorted(together, key=lambda key: (envs.index(key[0]), label_order(key[1]))):
        found, name = together[key], f"{key[1]} on {key[0]}"
        # Curves of different lengths or flags do not average: the most seeds' are kept. Whole
        # episodes make runs of a little more than the steps that were asked for.
        flags = Counter(str(record["flags"]) for record in found).most_common(1)[0][0]
        alike = [record for record in found if str(record["flags"]) == flags]
        steps = sorted(record["steps"] for record in alike)
        usual = max(steps, key=lambda x: (sum(abs(y / x - 1) < 0.02 for y in steps), x))
        kept = [record for record in alike if abs(record["steps"] / usual - 1) < 0.02]
        if left_out := [record["seed"] for record in found if record not in kept]:
            notes.append(f"{name}: seeds {listed(left_out)} left out, of other steps or flags")
        for what in ("script_hash", "versions"):
            if len({str(record[what]) for record in kept}) > 1:
                notes.append(f"{name}: the seeds differ in {what}")
        groups.append(Group(*key, kept))
    return groups, notes + missing_seeds(groups, suite)


def listed(numbers: list[int]) -> str:
    """1, 2, 3, 5 -> "1 to 3, 5"; of two neighbours both are named."""
    runs: list[list[int]] = []
    for x in numbers:
        if runs and x == runs[-1][-1] + 1:
            runs[-1].append(x)
        else:
            runs.append([x])
    long = lambda run: [f"{run[0]} to {run[-1]}"] if len(run) > 2 else map(str, run)
    return ", ".join(word for run in runs for word in long(run))


def missing_seeds(groups: list[Group], suite: Suite | None) -> list[str]:
    """What the suite's tasks, and those of its peers that were run, lack: a line for the
    environments where an algorithm lacks the same seeds."""
    if not suite:
        return []
    found = {(group.env, group.label): group for group in groups}
    peers = {name for _, name in found if name.startswith("sb3-")}
    lacking: dict[tuple[str, str], list[str]] = {}
    for task in suite.tasks:
        for name in (task.label, f"sb3-{task.label}"):
            if name != task.label and name not in peers:
                continue
            group = found.get((task.env, name))
            have = {record["seed"] for record in group.records} if group else set()
            if missing := sorted(set(range(1, suite.seeds + 1)) - have):
                lacking.setdefault((name, listed(missing)), []).append(task.env)
    return [f"Missing: {name} on {', '.join(envs)}, seeds {seeds}"
            for (name, seeds), envs in lacking.items()]


def earlier_texts(groups: list[Group], scripts: Path) -> list[str]:
    """A line for the seeds that another text of their script gave than the one that is there now;
    they stay in the tables. Of peers nothing is said: their text is a library's."""
    notes = []
    for group in groups:
        path = scripts / f"{base_script(group.label)}.py"
        if group.label.startswith("sb3-") or not path.is_file():
            continue
        now = script_hash(path)
        if old := [record["seed"] for record in group.records if record["script_hash"] != now]:
            notes.append(f"Of an earlier text of {path.name}: {group.label} on {group.env}, "
                         f"seeds {listed(sorted(old))}")
    return notes


def read_references() -> list[dict[str, str]]:
    with open(REFERENCES, newline="") as file:
        return list(csv.DictReader(file))


def all_published(script: str, env: str, steps: int) -> list[dict[str, str]]:
    """The published results of the same algorithm and environment, of any version, after at most
    twice the steps or without saying how many; the nearest if there are none. The nearest number of
    steps comes first, then a training return, then the same version."""
    base = lambda name: re.sub(r"-v\d+$", "", name)
    algorithms = SAME_ALGORITHM.get(script, (script,))

    def distance(row: dict[str, str]) -> tuple:
        far = abs(math.log(int(row["steps"]) / steps)) if row["steps"] else math.inf
        return round(far, 1), "training" not in row["metric"], row["environment"] != env

    rows = [
        row for row in read_references()
        if row["algorithm"] in algorithms and base(row["environment"]) == base(env)
    ]
    rows.sort(key=distance)
    return [row for row in rows if int(row["steps"] or 0) <= MOST_STEPS * steps] or rows[:1]


def published(script: str, env: str, steps: int) -> dict[str, str] | None:
    """The first of all_published, with which scores are normalised."""
    return next(iter(all_published(script, env, steps)), None)


def short_of_published(groups: list[Group]) -> list[str]:
    """A line for each algorithm whose mean is below a published one: the mean evaluation where a
    test or an evaluation was published, else the mean training return."""
    found: dict[str, dict[str, list[str]]] = {}
    for group in groups:
        evaluation = float(np.mean([record["eval_return_mean"] for record in group.records]))
        for row in all_published(base_script(group.label), group.env, group.steps):
            theirs, tested = float(row["mean"]), re.search("test|evaluation", row["metric"])
            ours = evaluation if tested else float(group.finals.mean())
            comparable = int(row["steps"] or 0) <= MOST_STEPS * group.steps
            if comparable and not round(ours, 1) >= round(theirs, 1):  # nor is NaN
                how = "evaluated at" if tested else "with a return of"
                words = f"{group.env} {how} {ours:,.1f}"
                who = f"{row['source'].split()[0]} {theirs:,.1f}"
                found.setdefault(group.label, {}).setdefault(words, []).append(who)
    return [f"Short of a published figure: {name} on " +
            "; ".join(f"{words} ({', '.join(whose)})" for words, whose in tasks.items())
            for name, tasks in found.items()]


@dataclass(frozen=True)
class Normalised:
    """Scores for which random play is 0 and a published result 1, of algorithms run everywhere."""

    envs: list[str]
    scores: dict[str, list[np.ndarray]]
    notes: list[str]


def normalise(groups: list[Group], suite: Suite | None, random: dict[str, Any]) -> Normalised:
    by = suite.normalise_by if suite else "ppo"
    scales, notes = {}, []
    for env in dict.fromkeys(group.env for group in groups):
        steps = max(group.steps for group in groups if group.env == env)
        reference = published(by, env, steps)
        if not reference or env not in random:
            notes.append(f"{env} has no normalised score: no published {by} or no random play")
            continue
        scales[env] = random[env]["mean"], float(reference["mean"])
        notes.append(f"{env}: 0 is {scales[env][0]:.1f}, 1 is {scales[env][1]:.1f} "
                     f"({reference['source']}, {reference['environment']})")
    scores: dict[str, list[np.ndarray]] = {}
    for name in sorted({group.label for group in groups}, key=label_order):
        finals = {group.env: group.finals for group in groups if group.label == name}
        if missing := [env for env in scales if env not in finals]:
            notes.append(f"{name} is left out, with no results on {', '.join(missing)}")
        elif scales:
            pairs = scales.items()
            scores[name] = [(finals[env] - low) / (high - low) for env, (low, high) in pairs]
    return Normalised(list(scales), scores, notes)
