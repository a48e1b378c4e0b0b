"""Results files -> report.md, report.csv, the README's section, and the pictures."""

import csv
import hashlib
import io
import json
import re
import shlex
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import step_sizes
from benchmarks.cuda import cuda_section, read_cuda
from benchmarks.groups import (
    Group,
    Normalised,
    all_published,
    base_script,
    earlier_texts,
    group_records,
    label_order,
    normalise,
    published,
    short_of_published,
)
from benchmarks.limit import limit_section, read_limit
from benchmarks.llm import is_llm, llm_section, plot_llm
from benchmarks.prose import NOTE, TEMPLATE, fill
from benchmarks.results import RESULTS, read_random, read_results, write_atomically
from benchmarks.runner import command_line
from benchmarks.sampling import sampling_section
from benchmarks.scaling import read_scaling, scaling_section
from benchmarks.speed import read_speed, speed_section
from benchmarks.stats import coverage_note, iqm_interval
from benchmarks.suites import ROOT, BenchmarkError, Job, Suite, code_hash, digest, load_suite
from benchmarks.threshold import read_threshold, threshold_section
from benchmarks.tokens import tokens_section

SHOWN = (("classic", "CartPole-v1"), ("mujoco", "HalfCheetah-v5"))  # in the README's first table
LADDER, LADDER_PICTURE = ("mujoco", "HalfCheetah-v5"), "ladder.png"  # at the top of the README
PICTURES = "pictures.json"
# Sections that come first, in this order; the others follow in the alphabet's.
FIRST = ("classic", "mujoco", "lunarlander", "mujoco3m", "llm", "addition", "countdown")
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"


def count(steps: int | str) -> str:
    return f"{int(steps):,}"


COLUMNS = (
    "suite", "environment", "algorithm", "steps", "seeds", "mean", "std", "iqm", "iqm_low",
    "iqm_high", "eval_mean", "wall_seconds", "published", "published_spread", "published_source",
    "published_environment", "published_steps", "published_seeds", "published_metric",
)


def table_rows(suite: str, groups: list[Group]) -> list[dict[str, Any]]:
    rows = []
    for group in groups:
        finals, seeds = group.finals, len(group.records)
        estimate, low, high = iqm_interval([finals])
        values = [suite, group.env, group.label, group.steps, seeds, finals.mean()]
        one = [None, estimate, None, None]  # a single seed says nothing of the spread
        values += [finals.std(ddof=1), estimate, low, high] if seeds > 1 else one
        values.append(np.mean([record["eval_return_mean"] for record in group.records]))
        values.append(np.median([record["wall_seconds"] for record in group.records]))
        reference = published(base_script(group.label), group.env, group.steps) or {}
        names = ("mean", "spread", "source", "environment", "steps", "seeds", "metric")
        values += [reference.get(name, "") for name in names]
        rows.append(dict(zip(COLUMNS, values, strict=True)))
    return rows


def cell(x: float | None, digits: int = 1) -> str:
    return "" if x is None else f"{x:.{digits}f}"


def published_cell(row: dict[str, str]) -> str:
    mean = cell(float(row["mean"])) + (f" ± {cell(float(s))}" if (s := row["spread"]) else "")
    seeds = f", {s} seed{'s' * (s != '1')}" if (s := row["seeds"]) else ""
    steps = f", {count(row['steps'])} steps" if row["steps"] else ""
    which = f", {row['algorithm']}" if "(" in row["algorithm"] else ""  # one of several
    return f"{mean}: {row['source'].split()[0]}{which}, {row['environment']}{steps}{seeds}"


def sources(rows: list[dict[str, Any]]) -> str:
    """Where the published figures of a table are from and what they measure."""
    found = []
    for row in rows:
        script = base_script(row["algorithm"])
        for there in all_published(script, row["environment"], row["steps"]):
            name, *place = there["source"].split(maxsplit=1)
            found.append(f"{name}: {' '.join(place)}, {there['metric']}")
    return f" Published by {'. '.join(dict.fromkeys(found))}." if found else ""


def markdown_table(rows: list[dict[str, Any]]) -> list[str]:
    head = ("Environment", "Algorithm", "Steps", "Seeds", "Return: mean ± std",
            "IQM [95 % interval]", "Evaluation", "Time (s)",
            "Published")
    lines = ["| " + " | ".join(head) + " |", "|---|---|--:|--:|--:|--:|--:|--:|---|"]
    for row in rows:
        spread = f" ± {cell(row['std'])}" if row["std"] is not None else ""
        bounds = f" [{cell(row['iqm_low'])}, {cell(row['iqm_high'])}]" if spread else ""
        script = base_script(row["algorithm"])
        there = map(published_cell, all_published(script, row["environment"], row["steps"]))
        lines.append(
            f"| {row['environment']} | {row['algorithm']} | {count(row['steps'])} | {row['seeds']} "
            f"| {cell(row['mean'])}{spread} | {cell(row['iqm'])}{bounds} "
            f"| {cell(row['eval_mean'])} | {cell(row['wall_seconds'], 0)} "
            f"| {'<br>'.join(there) or '-'} |"
        )
    return lines


def provenance(groups: list[Group]) -> str:
    """When, on what and with what the results were measured."""
    records = [record for group in groups for record in group.records]
    machines = {
        f"{m['cpu']}, {m['cores']} cores, {m.get('jobs', 1)} runs at a time"
        for m in (record["machine"] for record in records)
    }
    dates, versions = sorted({record["date"] for record in records}), {}
    for record in records:
        for package, version in record["versions"].items():
            versions.setdefault(package, set()).add(version)
    packages = ", ".join(f"{x} {' and '.join(sorted(v))}" for x, v in sorted(versions.items()))
    apart = " Times on different machines, or beside other runs, do not compare."
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return (f"Measured {when} on {'; '.join(sorted(machines))}.{apart * (len(machines) > 1)} "
            f"{packages}.")


def line_searches(groups: list[Group]) -> list[str]:
    """What the line search of trpo did in a suite; empty where it was not recorded."""
    found = []
    for group in groups:
        shares = [(x["backtracked"], x["rejected"]) for x in group.records if "backtracked" in x]
        if shares:
            backtracked, rejected = np.mean(shares, axis=0)
            text = f"{group.label} on {group.env} {backtracked:.2f} % ({rejected:.2f} %)"
            found.append(text + f" of {len(shares)} seeds" * (len(shares) < len(group.records)))
    if not found:
        return []
    return ["Updates whose first step the line search refused (and all of its steps): "
            + "; ".join(found) + ".", ""]


def single_runs(suite: Suite | None) -> list[str]:
    """How to start one run of each row by hand, folded away, in Markdown; environments that share
    their flags share a line."""
    if suite is None:
        return []
    alike: dict[str, list[str]] = {}
    for task in suite.tasks:
        job = Job(task, 1, b"", "", {}, None)
        _, script, *words = command_line(job, Path(f"{task.script}.py"), Path("unused"))
        at = words.index("--run-dir")
        line = shlex.join(["python", script, *words[:at], *words[at + 2 :]])
        alike.setdefault(line.replace(f" {task.env} ", " ENV ", 1), []).append(task.env)
    lines = ["<details><summary>Single runs</summary>", "", "```"]
    for line, envs in alike.items():
        note = f"  # also {', '.join(envs[1:])}" if envs[1:] else ""
        lines.append(line.replace(" ENV ", f" {envs[0]} ", 1) + note)
    return [*lines, "```", "", "</details>", ""]


def suite_section(name: str, groups: list[Group], notes: list[str], scores: Normalised,
                  pictures: str) -> list[str]:
    """Pictures, table and notes of a suite, in Markdown; pictures is their directory."""
    fewest = min(len(group.records) for group in groups)
    labels = sorted({group.label for group in groups}, key=label_order)
    commands = [f"python -m benchmarks run {name}"]
    commands += [f"{commands[0]} --peer sb3"] * any(x.startswith("sb3-") for x in labels)
    dashed = "; dashed: Stable-Baselines3 with the same hyperparameters"
    dashed *= any(label.startswith("sb3-") for label in labels)
    if "sb3-trpo" in labels:
        dashed += (", for TRPO sb3-contrib, whose delta and damping are in truth d times what they "
                   "say where actions have d dimensions (`benchmarks/peers.py`)")
    lines = [
        f"### {name}", "",
        f"![Learning curves of {', '.join(labels)}]({pictures}{name}_curves.png)",
        "",
        "Return of the training episodes against environment steps and against training time: "
        "interquartile mean (IQM) over seeds; band: its 95 % percentile bootstrap interval; thin "
        f"lines: single seeds{dashed}.", "",
    ]
    if scores.scores:
        lines += [
            f"![Normalised scores]({pictures}{name}_aggregate.png)", "",
            f"Normalised scores over {', '.join(scores.envs)}; intervals: 95 % percentile "
            f"bootstrap, stratified by environment. {'; '.join(scores.notes)}.", "",
        ]
    rows = table_rows(name, groups)
    lines += [*markdown_table(rows), ""]
    lines += [
        "Return: mean over the last 100 training episodes of each seed. Evaluation: mean over the "
        "seeds, of 10 episodes each, played without exploration. Time: median over seeds of the "
        f"training time.{sources(rows)} {provenance(groups)}", "",
    ]
    lines += line_searches(groups)
    notes = [*short_of_published(groups), *notes]
    if note := coverage_note(fewest):
        lines += [note, ""]
    lines += [f"- {note}" for note in notes] + [""] * bool(notes)
    return [*lines, "```", *commands, "python -m benchmarks report", "```", ""]


def faults_section(results: Path) -> list[str]:
    """What the runs survived, in Markdown; empty if no campaign was run."""
    if not (path := results / "faults.json").exists():
        return []
    measured = json.loads(path.read_text())
    lines = [
        "### faults", "",
        "| Attack and promise | Scripts | Tried | Kept | Of these |", "|---|--:|--:|--:|---|",
    ]
    for part in [name for name in measured["what"] if name in measured["parts"]]:
        entries = measured["parts"][part].values()
        counts = [pair for entry in entries for pair in entry["counts"].values()]
        kept, tried = np.sum(counts, axis=0)
        names = dict.fromkeys(name for entry in entries for name in entry["facts"])
        tries: Counter[str] = Counter()
        for entry in entries:
            tries.update({name: pair[1] for name, pair in entry["counts"].items()})
        facts = [f"{name}: {count(n)}" for name, n in tries.items() if 1 < len(tries) < 8]
        for name in names:
            numbers = [entry["facts"].get(name, 0) for entry in entries]
            most = name.startswith("bytes")  # a rate: no sum
            facts.append(f"{name}: {'at most ' * most}{count((max if most else sum)(numbers))}")
        lines.append(
            f"| {measured['what'][part]} | {len(entries)} | {count(tried)} | {count(kept)} "
            f"| {'; '.join(facts)} |"
        )
    cpu = measured["machine"]
    stale = sorted({
        script for entries in measured["parts"].values() for script, entry in entries.items()
        if (path := ROOT / f"{script}.py").exists()
        and entry.get("text") != code_hash(path)
    }, key=label_order)
    earlier = f" Scripts that have changed since: {', '.join(stale)}."
    return [
        *lines, "", f"Measured {measured['date']} on {cpu['cpu']}, {cpu['cores']} cores."
        + earlier * bool(stale), "",
        "```", "python -m tests.faults", "python -m benchmarks report", "```", "",
    ]


def ladder(suites: list[tuple[str, list[Group], Normalised]]) -> list[Group]:
    """The scripts on the environment that the README shows first, without peers and variants."""
    found = [group for name, groups, _ in suites if name == LADDER[0] for group in groups]
    return [x for x in found if x.env == LADDER[1] and x.label == base_script(x.label)]


def results_in_short(script: str, suites: dict[str, list[Group]]) -> str:
    """The last cell of a script's row in the README's first table: its means, where it has any."""
    cells = []
    for suite, env in SHOWN:
        for group in suites.get(suite, []):
            if (group.env, group.label) == (env, script):
                mean = f"{env.split('-')[0]} {group.finals.mean():,.0f}"
                cells.append(f"[{mean}](#{suite})")
    for group in suites.get("addition", []) if script == "grpo_rloo" else []:
        if group.records[0]["variant"] == "grpo":
            mean = np.mean([record["eval_return_mean"] for record in group.records])
            cells.append(f"[addition {100 * mean:.1f} %](#addition)")
    return ", ".join(cells) or "-"


def fill_table(text: str, suites: dict[str, list[Group]]) -> str:
    """The README with the results of each script at the end of its row in the first table."""
    row = re.compile(r"^(\| \[`(\w+)\.py`\].* \| )[^|]*( \|)$", re.MULTILINE)
    return row.sub(lambda found: found[1] + results_in_short(found[2], suites) + found[3], text)


def replace_section(text: str, section: str) -> str:
    before, rest = text.split(BEGIN, 1)
    return f"{before}{BEGIN}\n{section}{END}{rest.split(END, 1)[1]}"


def shown_by(results: Path, random: dict[str, Any],
             suites: list[tuple[str, list[Group], Normalised]],
             llms: list[tuple[str, list[Group]]]) -> dict[str, str]:
    """Each picture's file name, and a digest of the results that it shows."""
    plain = lambda groups: [[group.env, group.label, group.records] for group in groups]
    shown: dict[str, Any] = {f"{name}_curves.png": plain(groups) for name, groups in llms}
    for name, groups, scores in suites:
        shown[f"{name}_curves.png"] = [plain(groups), random]
        if scores.scores:
            of_env = {label: [x.tolist() for x in each] for label, each in scores.scores.items()}
            shown[f"{name}_aggregate.png"] = of_env
    if rungs := ladder(suites):
        shown[LADDER_PICTURE] = [plain(rungs), random]
    if rows := step_sizes.summary(results):
        shown[step_sizes.PICTURE] = [row | {"finals": row["finals"].tolist()} for row in rows]
    return {name: digest(value) for name, value in shown.items()}


def drawn(results: Path, shown: dict[str, str]) -> dict[str, list[str]]:
    """What PICTURES should hold: of each picture there is, what it shows and its bytes' hash."""
    files = {name: results / name for name in shown}
    hashes = {name: hashlib.sha256(path.read_bytes()).hexdigest()[:12]
              for name, path in files.items() if path.exists()}
    return {name: [shown[name], found] for name, found in sorted(hashes.items())}


def draw(results: Path, random: dict[str, Any], suites: list[tuple[str, list[Group], Normalised]],
         llms: list[tuple[str, list[Group]]]) -> None:
    """All pictures, and PICTURES, which says what they show."""
    from benchmarks.plots import plot_aggregate, plot_curves, plot_ladder

    for name, groups in llms:
        plot_llm(groups, results / f"{name}_curves.png")
    for name, groups, scores in suites:
        plot_curves(groups, random, results / f"{name}_curves.png")
        if scores.scores:
            plot_aggregate(scores, results / f"{name}_aggregate.png")
    if rungs := ladder(suites):
        plot_ladder(rungs, random, results / LADDER_PICTURE)
    if step_sizes.summary(results):
        step_sizes.plot(results)
    now = drawn(results, shown_by(results, random, suites, llms))
    write_atomically(results / PICTURES, json.dumps(now, indent=1) + "\n")


def report(results: Path, readme: Path | None, check: bool) -> int:
    """Write everything that is made from the results; with check, compare the texts instead, and of
    the pictures whether they were drawn from these results. Status 1 if something is stale."""
    if not results.is_dir():
        raise BenchmarkError(f"no results: {results} is not a directory of results files")
    if readme is None and results.resolve() == RESULTS:
        readme = ROOT / "README.md"
    sections: dict[str, list[str]] = {"": [], "benchmarks/results/": []}
    rows, random, todo, llms = [], read_random(results), [], []
    rank = {name: i for i, name in enumerate(FIRST)}
    found = sorted(read_results(results).items(), key=lambda x: (rank.get(x[0], len(rank)), x[0]))
    for name, records in found:
        try:
            suite = load_suite(name)
        except BenchmarkError:
            suite = None  # results of a suite outside this repository: nothing is expected
        groups, notes = group_records(records, suite)
        notes += earlier_texts(groups, ROOT)
        if is_llm(groups):
            llms.append((name, groups))
            for pictures, lines in sections.items():
                lines += llm_section(name, groups, notes, provenance(groups), pictures)
                lines += single_runs(suite)
            continue
        scores = normalise(groups, suite, random)
        rows += table_rows(name, groups)
        todo.append((name, groups, scores))
        for pictures, lines in sections.items():
            lines += suite_section(name, groups, notes, scores, pictures) + single_runs(suite)
        if not check:
            print("\n".join(notes), end="\n" * bool(notes))
    for pictures, lines in sections.items():
        lines += step_sizes.section(results, pictures)
        lines += sampling_section(results)
        lines += faults_section(results)
    if timed := read_speed(results):
        for lines in sections.values():
            lines += speed_section(timed)
    for lines in sections.values():
        lines += limit_section(read_limit(results))
        lines += threshold_section(read_threshold(results))
        lines += scaling_section(read_scaling(results))
        lines += cuda_section(read_cuda(results))
        lines += tokens_section(results)
    table = io.StringIO()
    writer = csv.DictWriter(table, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
    texts = {
        results / "report.md": "# Results\n\n" + "\n".join(sections[""]),
        results / "report.csv": table.getvalue(),
    }
    if not check:
        for path, text in texts.items():  # now, as the README may want results that are not there
            write_atomically(path, text)
            print(f"wrote {path}")
        draw(results, random, todo, llms)
    if readme:
        text = readme.read_text() if readme.exists() else ""
        if BEGIN not in text or END not in text:
            raise BenchmarkError(f"{readme} has no {BEGIN} and {END} for the results to go between")
        groups_of = {name: groups for name, groups, *_ in todo + llms}
        lines = ["", *sections["benchmarks/results/"]]
        if results.resolve() == RESULTS:
            prose = fill(TEMPLATE.read_text(), groups_of, results)
            lines = [NOTE, "", *prose.splitlines(), "", "### The tables", *lines]
        section = "\n".join(lines)
        texts[readme] = replace_section(fill_table(text, groups_of), section)
    if check:
        stale = [p for p, text in texts.items() if not p.exists() or p.read_text() != text]
        shown, path = shown_by(results, random, todo, llms), results / PICTURES
        written = json.loads(path.read_text()) if path.exists() else {}
        now = drawn(results, shown)
        stale += [results / name for name in shown if written.get(name) != now.get(name, "")]
        for path in stale:
            print(f"{path} is stale: python -m benchmarks report", file=sys.stderr)
        return 1 if stale else 0
    if readme:
        write_atomically(readme, texts[readme])
        print(f"wrote {readme}")
    return 0
