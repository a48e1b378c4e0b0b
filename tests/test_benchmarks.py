"""The benchmark harness: its statistics, its results files, and what it does when runs go wrong."""

import importlib
import itertools
import json
import os
import random
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats as scipy_stats
from torch.utils.tensorboard import SummaryWriter

import grpo_rloo
from benchmarks import (
    compare,
    groups,
    limit,
    llm,
    peers,
    plots,
    prose,
    report,
    results,
    runner,
    sampling,
    speed,
    stats,
    step_sizes,
    suites,
)
from benchmarks.__main__ import main
from benchmarks.engine import LocalEngine

ROOT = Path(__file__).resolve().parent.parent

# --- Statistics -----------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8, 10, 11])
def test_iqm_is_the_trimmed_mean(n):
    x = np.random.default_rng(n).normal(size=(3, n))
    expected = [np.mean(sorted(row)[n // 4 : n - n // 4]) for row in x]
    np.testing.assert_allclose(stats.iqm(x), expected)
    np.testing.assert_allclose(stats.iqm(x.T, axis=0), expected)


def test_iqm_closed_form():
    assert stats.iqm(np.array([8.0, 1, 2, 7, 3, 6, 4, 5])) == 4.5  # of 3, 4, 5, 6
    assert stats.iqm(np.array([-1e9, 1, 2, 1e9])) == 1.5


def test_interval_is_that_of_all_resamples():
    """Of 5 seeds there are 5^5 resamples: their percentiles, exactly, and by SciPy's sampling."""
    x = np.array([0.0, 1, 2, 4, 8])
    every = [np.mean(sorted(drawn)[1:4]) for drawn in itertools.product(x, repeat=5)]
    estimate, low, high = stats.iqm_interval([x], resamples=50_000)
    assert estimate == pytest.approx(7 / 3)
    np.testing.assert_allclose([low, high], np.percentile(every, [2.5, 97.5]), atol=0.35)
    middle, *bounds = stats.curve_iqm(np.stack([x, 2 * x], axis=1), resamples=50_000)
    np.testing.assert_allclose(middle, [7 / 3, 14 / 3])
    np.testing.assert_allclose(bounds[1], [high, 2 * high], atol=0.35)


def test_interval_of_two_seeds_is_enumerable():
    """Of two seeds, a quarter of the resamples is (0, 0) and a quarter (1, 1)."""
    assert stats.iqm_interval([np.array([0.0, 1.0])]) == (0.5, 0.0, 1.0)


def test_bootstrap_is_stratified():
    """Seeds are resampled within an environment: constant environments leave nothing to vary."""
    strata = [np.zeros(5), np.ones(5)]
    assert stats.iqm_interval(strata) == (0.5, 0.5, 0.5)
    share, low, high = stats.performance_profile(strata, np.array([-0.5, 0.5, 1.5]))
    assert share.tolist() == low.tolist() == high.tolist() == [1, 0.5, 0]


def test_interval_covers_as_stated():
    """From few normal samples a 95 % interval holds the truth less often than that, and from 5
    less often than from 20: the reason for the coverage note."""
    rng = np.random.default_rng(0)

    def coverage(n):
        bounds = [stats.iqm_interval([rng.normal(size=n)], resamples=300)[1:] for _ in range(400)]
        return np.mean([low <= 0 <= high for low, high in bounds])

    # The note says about 85-90 % for 5; of 400 intervals the share is good to 5 points or so.
    assert 0.80 < coverage(5) < 0.95 and coverage(5) < coverage(20)


def test_coverage_note_below_ten_seeds():
    assert "95 %" in stats.coverage_note(9) and not stats.coverage_note(10)


@pytest.mark.parametrize("n, m", [(1, 1), (5, 5), (7, 4)])
def test_probability_of_improvement_is_mann_whitney(n, m):
    rng = np.random.default_rng(n)
    x, y = rng.integers(0, 5, size=n).astype(float), rng.integers(0, 5, size=m).astype(float)
    expected = scipy_stats.mannwhitneyu(x, y).statistic / (n * m)
    assert stats.probability_of_improvement(x, y) == pytest.approx(expected)
    assert stats.probability_of_improvement(x, x) == pytest.approx(0.5)


def test_paired_interval_resamples_both_sides():
    x, y = np.array([0.0, 1.0]), np.array([0.0, 1.0])
    assert stats.paired_interval(stats.difference_of_iqm, [x], [y]) == (0.0, -1.0, 1.0)
    chance = stats.paired_interval(stats.probability_of_improvement, [x + 5, x - 5], [y, y])
    assert chance == (0.5, 0.5, 0.5)  # sure on one environment, hopeless on the other


def test_a_planted_outlier_moves_the_interval():
    x = np.arange(10.0)
    for seed in range(10):  # whichever seed it is: every one counts
        planted = x.copy()
        planted[seed] = 1000
        assert stats.iqm_interval([planted])[2] > stats.iqm_interval([x])[2] + 10
    curves = np.tile(x[:, None], (1, 3))
    curves[4, 1] = 1000
    _, _, high = stats.curve_iqm(curves)
    assert high[1] > high[0] == high[2]


# --- Suites and hashes ----------------------------------------------------------------------------

SCRIPT = '''"""Docstring."""
RATE = 0.5  # a comment
class Args:
    rate: float = RATE
    """a field's docstring"""
def step(x):
    """What it does."""
    return x + RATE
# === Plumbing: the same in every script ===
def bar(): print("progress")
'''


@pytest.mark.parametrize(
    "old, new, same",
    [
        ("a comment", "another comment", True),
        ('"""Docstring."""', '"""Another."""', True),
        ('"""a field\'s docstring"""', '"""another"""', True),
        ('    """What it does."""\n', "", True),
        ('print("progress")', 'print("no progress")', True),
        ("x + RATE", "(x+RATE)", True),
        ("RATE = 0.5", "RATE = 0.6", False),
        ("x + RATE", "x - RATE", False),
        ("rate: float", "rates: float", False),
    ],
)
def test_hash_is_of_what_is_computed(tmp_path, old, new, same):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    before = suites.script_hash(path)
    assert old in SCRIPT
    path.write_text(SCRIPT.replace(old, new))
    assert (suites.script_hash(path) == before) is same


def test_hash_of_the_real_script(tmp_path):
    """An edited constant of ppo.py is another algorithm, edited plumbing is not."""
    source, copy = (ROOT / "ppo.py").read_text(), tmp_path / "ppo.py"
    assert source.count(suites.BANNER) == 1
    for old, new, same in (
        ("= 2.5e-4", "= 2.6e-4", False),
        ('"""name of the experiment', '"""Name of the experiment', True),
        ("{left:.0f} s left", "{left:.0f} s to go", True),
        ("(self.var + 1e-8).sqrt()", "(self.var + 1e-7).sqrt()", False),
        ("returns[t] = rewards[t] + gamma * running", "returns[t] = rewards[t] + running", False),
        ("import random\n", "import pprint\nimport random\n", True),  # of use to plumbing alone
        ("import signal\n", "", True),
        ("import Categorical\n", "import OneHotCategorical as Categorical\n", False),
    ):
        assert old in source
        copy.write_text(source.replace(old, new))
        assert (suites.script_hash(copy) == suites.script_hash(ROOT / "ppo.py")) is same


@pytest.mark.parametrize("path", sorted(suites.SUITES.glob("*.toml")), ids=lambda p: p.stem)
def test_shipped_suites_load(path):
    suite = suites.load_suite(path.stem)
    assert suite.seeds >= 2
    for task in suite.tasks:
        if task.script == "grpo_rloo":  # a preset, with a + what is changed of it, and a task
            preset, *change = task.variant.split(" + ")
            assert preset in grpo_rloo.PAPERS and hasattr(grpo_rloo, task.env)
            assert bool(change) is bool(task.flags) and grpo_rloo.Args(**task.flags)
            continue
        assert suites.library_versions(task)["gymnasium"]
        assert groups.published(suite.normalise_by, task.env, task.steps), task


def test_job_names_depend_on_all_that_matters():
    job = suites.Job(suites.Task("ppo", "CartPole-v1", 100), 1, b"", "hash", {"torch": "2"}, None)
    others = [
        replace(job, seed=2),
        replace(job, script_hash="other"),
        replace(job, versions={"torch": "3"}),
        replace(job, task=replace(job.task, flags={"gamma": 0.9})),
        replace(job, task=replace(job.task, steps=200)),
        replace(job, task=replace(job.task, peer="sb3")),
    ]
    assert len({j.name for j in [job, *others]}) == len(others) + 1
    assert replace(job, commit="abc", source=b"# comment").name == job.name


# --- Results --------------------------------------------------------------------------------------


def test_grid_holds_means_of_cells():
    steps = np.array([5.0, 10, 11, 30, 1000])  # cells of 10: (0, 10], (10, 20], ...
    curve = results.on_grid(steps, np.array([1.0, 3, 7, 9, 100]), 1000)
    assert curve[:3].tolist() == [2, 7, 9]
    assert curve[99] == 100
    np.testing.assert_allclose(curve[3:99], np.interp(np.arange(3, 99), [2, 99], [9, 100]))
    late = results.on_grid(np.array([25.0]), np.array([4.0]), 1000)
    assert np.isnan(late[:2]).all() and (late[2:] == 4).all()
    assert np.isnan(results.on_grid(np.array([]), np.array([]), 10)).all()


def test_a_resumed_runs_events_are_read_once(tmp_path):
    """What was logged after the last checkpoint is logged again: the later value stands."""
    for values, offset in (({1: 1.0, 2: 2.0, 3: 3.0}, 0), ({3: 30.0, 4: 40.0}, 5)):
        writer = SummaryWriter(str(tmp_path), purge_step=min(values))
        for step, value in values.items():
            writer.add_scalar("charts/SPS", value, step)
        writer.close()
        newest = max(tmp_path.glob("events*"), key=lambda p: p.stat().st_mtime_ns)
        os.utime(newest, (offset, offset))
    steps, values = results.read_scalars(tmp_path, "charts/SPS")
    assert steps.tolist() == [1, 2, 3, 4] and values.tolist() == [1, 2, 30, 40]


def make_record(env="CartPole-v1", script="ppo", seed=1, final=100.0, **more):
    curve = {"return": [None] + [final] * 99, "seconds": [0.1 * k for k in range(1, 101)]}
    return {
        "env": env, "script": script, "variant": "", "seed": seed, "steps": 500_000, "flags": {},
        "script_hash": "h", "versions": {"torch": "2"}, "machine": {"cpu": "x", "cores": 2},
        "date": "2026-01-02", "commit": None, "wall_seconds": 10.0, "sps": 50_000.0,
        "train_return_last100": final, "eval_return_mean": final, "curve": curve, **more,
    }


def test_a_line_search_is_recorded_and_reported(tmp_path):
    writer = SummaryWriter(str(tmp_path / "run"))
    for i, (backtracks, accepted) in enumerate(((0, 1), (3, 1), (0, 1), (10, 0))):
        writer.add_scalar("losses/backtracks", backtracks, i)
        writer.add_scalar("losses/accepted", accepted, i)
    writer.close()
    shares = results.of_line_search(tmp_path / "run")
    assert shares == {"backtracked": 50, "rejected": 25}
    records = [make_record(script="trpo", seed=1, **shares), make_record(script="trpo", seed=2)]
    groups_ = [groups.Group("CartPole-v1", "trpo", records)]
    (line, _) = report.line_searches(groups_)
    assert line.endswith(": trpo on CartPole-v1 50.00 % (25.00 %) of 1 seeds.")
    assert report.line_searches([groups.Group("CartPole-v1", "ppo", [make_record()])]) == []


def test_merging_replaces_a_run_and_keeps_the_others(tmp_path):
    path = tmp_path / "classic.jsonl"
    results.merge_records(path, [make_record(seed=s, final=s) for s in (2, 1, 3)])
    first = path.read_text()
    results.merge_records(path, [])
    assert path.read_text() == first
    new = [make_record(seed=2, final=7.0), make_record(seed=2, flags={"a": 1})]
    results.merge_records(path, new)
    records = results.read_records(path)
    found = {(r["seed"], str(r["flags"])): r["train_return_last100"] for r in records}
    assert found == {(1, "{}"): 1, (2, "{}"): 7, (3, "{}"): 3, (2, "{'a': 1}"): 100}
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    "text, words",
    [
        (None, "wrote no summary"),
        ("", "not valid"),
        ('{"steps": 5', "not valid"),
        ("[]", "not valid"),
        ('{"steps": 5}', "not valid"),
        ('{"steps": NaN, "wall_seconds": 1, "sps": 1, "train_return_last100": 1, '
         '"eval_return_mean": 1}', "no finite steps"),
        ('{"steps": 5, "wall_seconds": 1, "sps": 1, "train_return_last100": null, '
         '"eval_return_mean": 1}', "not valid"),
    ],
)
def test_an_unfit_summary_says_what_is_wrong(tmp_path, text, words):
    if text is not None:
        (tmp_path / "summary.json").write_text(text)
    with pytest.raises(ValueError, match=words):
        results.read_summary(tmp_path)


def test_random_play_of_cartpole_is_the_known_number(tmp_path):
    results.ensure_random(tmp_path, ["CartPole-v1", "CartPole-v1"])
    measured = results.read_random(tmp_path)["CartPole-v1"]
    assert measured["episodes"] == 100 and 18 < measured["mean"] < 27  # about 22


# --- Report and comparison ------------------------------------------------------------------------


@pytest.fixture
def classic(tmp_path):
    """A results directory: PPO and its peer on classic, one seed of the peer missing."""
    rng = np.random.default_rng(0)
    levels = {"CartPole-v1": 450, "Acrobot-v1": -90, "LunarLander-v3": 200}
    records = [
        make_record(env, script, seed, round(float(rng.normal(level, 10)), 2))
        for env, level in levels.items() for script in ("ppo", "sb3-ppo") for seed in range(1, 11)
        if (env, script, seed) != ("Acrobot-v1", "sb3-ppo", 7)
    ]
    results.merge_records(tmp_path / "classic.jsonl", records)
    scale = {env: {"mean": level - 300, "std": 1, "episodes": 100} for env, level in levels.items()}
    (tmp_path / "random.json").write_text(json.dumps(scale))
    (tmp_path / "README.md").write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    return tmp_path


def test_report_is_reproducible_and_knows_when_it_is_stale(classic, capsys):
    arguments = ["report", str(classic), "--readme", str(classic / "README.md")]
    assert main([*arguments, "--check"]) == 1
    assert main(arguments) == 0
    made = {path.name: path.read_bytes() for path in classic.iterdir()}
    assert {"report.md", "report.csv", "classic_curves.png", "classic_aggregate.png"} <= set(made)
    readme = made["README.md"].decode()
    assert readme.startswith("before\n") and readme.endswith("after\n") and "old" not in readme
    assert main([*arguments, "--check"]) == 0
    assert main(arguments) == 0
    assert {path.name: path.read_bytes() for path in classic.iterdir()} == made
    capsys.readouterr()
    # A point of a curve that no table shows: the pictures alone are stale.
    text = (classic / "classic.jsonl").read_text()
    first, _, others = text.partition("\n")
    record = json.loads(first)
    record["curve"]["return"][1] = -7.0
    (classic / "classic.jsonl").write_text(json.dumps(record) + "\n" + others)
    assert main([*arguments, "--check"]) == 1
    said = capsys.readouterr().err
    assert "classic_curves.png is stale" in said and "report.md" not in said
    (classic / "classic.jsonl").write_text(text)
    assert main([*arguments, "--check"]) == 0
    capsys.readouterr()
    results.merge_records(classic / "classic.jsonl", [make_record(seed=3, final=1.0)])
    assert main([*arguments, "--check"]) == 1
    assert "README.md is stale" in capsys.readouterr().err


def test_the_ladder_is_drawn_without_peers_and_variants(tmp_path, monkeypatch):
    records = [
        make_record(env, script, seed, 1000.0, variant=variant)
        for env in ("HalfCheetah-v5", "Hopper-v5") for seed in (1, 2)
        for script, variant in (("trpo", ""), ("trpo", "odd"), ("a2c", ""), ("sb3-trpo", ""))
    ]
    results.merge_records(tmp_path / "mujoco.jsonl", records)
    (tmp_path / "random.json").write_text('{"HalfCheetah-v5": {"mean": -280, "std": 9}}')
    drawn, plot_ladder = [], plots.plot_ladder
    monkeypatch.setattr(plots, "plot_ladder", lambda *x: drawn.append(x) or plot_ladder(*x))
    assert report.report(tmp_path, None, check=False) == 0
    ((rungs, _, path),) = drawn
    assert [(x.env, x.label) for x in rungs] == [("HalfCheetah-v5", x) for x in ("a2c", "trpo")]
    assert path.stat().st_size > 10_000 and report.report(tmp_path, None, check=True) == 0
    path.unlink()
    assert report.report(tmp_path, None, check=True) == 1


def test_the_first_table_ends_with_the_means(classic):
    row = "| [`{0}.py`]({0}.py) | a paper | an update | {1} | {2} |"
    more = [make_record("HalfCheetah-v5", "ppo", seed, x) for seed, x in ((1, 1000.0), (2, 2001.0))]
    results.merge_records(classic / "mujoco.jsonl", more)
    section = f"{report.BEGIN}\n{report.END}"
    rows = [row.format("ppo", 12, "old"), row.format("a2c", "", "[table](#results)"), "| ppo | x |"]
    (classic / "README.md").write_text("\n".join([*rows, section]))
    assert main(["report", str(classic), "--readme", str(classic / "README.md")]) == 0
    finals = [r["train_return_last100"] for r in results.read_results(classic)["classic"]
              if (r["env"], r["script"]) == ("CartPole-v1", "ppo")]
    cell = f"[CartPole {np.mean(finals):.0f}](#classic), [HalfCheetah 1,500](#mujoco)"
    made = (classic / "README.md").read_text().splitlines()
    assert made[:3] == [row.format("ppo", 12, cell), row.format("a2c", "", "-"), "| ppo | x |"]


def test_names_at_the_ends_of_curves_do_not_overlap():
    assert plots.apart([5.0, 1.0, 9.0], 2) == [5, 1, 9]
    assert plots.apart([5.0, 4.5, 5.5], 2) == [6.5, 4.5, 8.5]
    assert plots.apart([3.0, 3.0], 1) == [3, 4] and plots.apart([], 1) == []


def test_report_counts_every_seed_and_names_the_missing(classic, capsys):
    main(["report", str(classic)])
    text = (classic / "report.md").read_text()
    assert "Missing: sb3-ppo on Acrobot-v1, seeds 7" in text
    assert "Missing: sb3-ppo on Acrobot-v1, seeds 7" in capsys.readouterr().out
    # Of the other scripts in the suite there is no result at all.
    missing = [line for line in text.splitlines() if "Missing" in line and "ppo on" in line]
    assert len(missing) == 1
    envs = "CartPole-v1, Acrobot-v1, LunarLander-v3"
    assert text.count("Missing: a2c on") == 1 and f"Missing: a2c on {envs}, seeds 1 to 10" in text
    records = results.read_records(classic / "classic.jsonl")
    records = [r for r in records if (r["env"], r["script"]) == ("CartPole-v1", "ppo")]
    finals = np.array([r["train_return_last100"] for r in records])
    assert f"| 10 | {finals.mean():.1f} ± {np.std(finals, ddof=1):.1f} |" in text
    assert f"{scipy_stats.trim_mean(finals, 0.25):.1f} [" in text
    row = next(line for line in text.splitlines() if line.startswith("| Acrobot-v1 | sb3-ppo"))
    assert "| 9 |" in row and "-86.4 ± 1.3: cleanrl, Acrobot-v1, 500,000 steps, 3 seeds" in row
    assert f"] | {np.mean([r['eval_return_mean'] for r in records]):.1f} | " in text
    assert "- Short of a published figure: " in text
    assert "With 9 seeds a 95 % bootstrap interval covers less" in text


def test_the_caption_speaks_of_the_peers_that_were_run(tmp_path):
    for scripts, dashed, natural in (
        (("ppo",), False, False), (("ppo", "sb3-ppo"), True, False), (("sb3-trpo",), True, True)
    ):
        (tmp_path / "odd.jsonl").unlink(missing_ok=True)
        results.merge_records(tmp_path / "odd.jsonl", [make_record(script=x) for x in scripts])
        assert report.report(tmp_path, None, check=False) == 0
        text = (tmp_path / "report.md").read_text()
        assert ("dashed: Stable-Baselines3" in text) is dashed
        assert ("for TRPO sb3-contrib" in text) is natural


def test_whole_episodes_make_runs_of_different_steps_that_belong_together():
    """Every seed counts, also where none has the steps of another; half the steps do not belong."""
    steps = [500_012, 503_733, 501_970, 504_121, 500_800]
    records = [make_record(seed=s, steps=x) for s, x in enumerate(steps, 1)]
    found, notes = groups.group_records([*records, make_record(seed=6, steps=250_000)], None)
    assert [record["seed"] for record in found[0].records] == [1, 2, 3, 4, 5]
    assert notes == ["ppo on CartPole-v1: seeds 6 left out, of other steps or flags"]


def test_seeds_that_do_not_belong_together_are_named():
    records = [make_record(seed=s) for s in range(1, 9)]
    records += [make_record(seed=9, steps=100), make_record(seed=10, script_hash="other")]
    found, notes = groups.group_records(records, suites.load_suite("classic"))
    assert len(found[0].records) == 9
    assert "ppo on CartPole-v1: seeds 9 left out, of other steps or flags" in notes
    assert "ppo on CartPole-v1: the seeds differ in script_hash" in notes
    assert "Missing: ppo on CartPole-v1, seeds 9" in notes
    assert "Missing: ppo on Acrobot-v1, LunarLander-v3, seeds 1 to 10" in notes


def test_results_of_an_earlier_text_are_named(classic, tmp_path):
    (tmp_path / "ppo.py").write_text("STEPS = 1")
    now = suites.script_hash(tmp_path / "ppo.py")
    records = [make_record(seed=s, script_hash=now) for s in (1, 2, 3)]
    records += [make_record(script="sb3-ppo", seed=1), make_record(script="a2c", seed=1)]
    found, _ = groups.group_records(records, None)
    assert groups.earlier_texts(found, tmp_path) == []  # of peers, and where there is no script
    (tmp_path / "ppo.py").write_text("STEPS = 2")
    records += [make_record(seed=4, script_hash=suites.script_hash(tmp_path / "ppo.py"))]
    found, _ = groups.group_records(records, None)
    note = "Of an earlier text of ppo.py: ppo on CartPole-v1, seeds 1 to 3"
    assert groups.earlier_texts(found, tmp_path) == [note]
    main(["report", str(classic)])  # whose records are of no text that there ever was
    assert "- Of an earlier text of ppo.py: ppo on Acrobot-v1, seeds 1 to 10" in (
        classic / "report.md").read_text()


@pytest.mark.parametrize("numbers, text", [
    ([], ""), ([7], "7"), ([7, 8], "7, 8"), ([1, 2, 3, 5, 7, 8, 10], "1 to 3, 5, 7, 8, 10"),
])
def test_neighbouring_seeds_are_listed_as_a_range(numbers, text):
    assert groups.listed(numbers) == text


def test_normalised_score_is_0_at_random_and_1_at_the_reference():
    random_play = {"CartPole-v1": {"mean": 20.0}}
    finals = {1: 20.0, 2: 490.04, 3: 255.02}
    records = [make_record(seed=s, final=x) for s, x in finals.items()]
    found, _ = groups.group_records(records, None)
    normalised = groups.normalise(found, None, random_play)
    np.testing.assert_allclose(normalised.scores["ppo"][0], [0, 1, 0.5])
    assert "1 is 490.0 (cleanrl" in normalised.notes[0]


def test_published_results_are_the_nearest():
    row = groups.published("ppo", "LunarLander-v3", 1_000_000)
    assert row and (row["environment"], row["mean"]) == ("LunarLander-v2", "242.119")
    row = groups.published("ppo_continuous", "HalfCheetah-v5", 1_000_000)
    assert row and (row["environment"], row["mean"]) == ("HalfCheetah-v4", "1442.64")
    assert groups.published("grpo_rloo", "CartPole-v1", 1000) is None


def test_all_comparable_published_results_are_shown():
    """Those after at most twice the steps; where all took longer, the nearest of them."""
    found = groups.all_published("ppo_continuous", "HalfCheetah-v5", 1_000_000)
    means = ["1442.64", "5783.9", "5819.099"]
    hopper = groups.all_published("trpo", "Hopper-v5", 1_000_000)
    assert [(x["mean"], x["steps"]) for x in hopper] == [
        ("2046.0", "1000000"), ("3618.386", "1000000"), ("2043", ""), ("2466", "")]
    assert report.published_cell(hopper[-2]) == "2043.0 ± 100.0: Engstrom, Hopper-v2, 80 seeds"
    assert report.published_cell(hopper[-1]) == (
        "2466.0 ± 85.0: Engstrom, trpo+ (with details), Hopper-v2, 80 seeds")
    # A million steps are twice 500,000, of which whole iterations of 512 leave 499,712.
    acrobot = groups.all_published("ppo", "Acrobot-v1", 499_712)
    assert [x["mean"] for x in acrobot] == ["-86.36", "-81.28", "-73.506"]
    assert [row["mean"] for row in found] == means
    found = groups.all_published("ppo_continuous", "HalfCheetah-v5", 1_500_000)
    assert [row["mean"] for row in found] == [*means, "7337.4"]
    found = groups.all_published("reinforce", "Walker2d-v5", 1_000_000)
    assert [(row["mean"], row["steps"]) for row in found] == [("412.0", "3000000")]
    assert groups.all_published("grpo_rloo", "CartPole-v1", 1000) == []
    (row,) = report.table_rows("x", [groups.Group("Walker2d-v5", "reinforce", [make_record()])])
    text = report.markdown_table([row])[-1]
    assert text.endswith("| 412.0 ± 52.4: tianshou, Walker2d-v3, 3,000,000 steps, 10 seeds |")
    assert "Published by tianshou: examples/mujoco/README.md, max of mean" in report.sources([row])


def test_what_falls_short_is_named_metric_by_metric():
    """A published test is held against the evaluations, a training return against the returns."""
    def short(final, evaluation, name="ppo_continuous"):
        records = [make_record(final=final - 1, eval_return_mean=evaluation + 1),
                   make_record(final=final + 1, eval_return_mean=evaluation - 1)]
        return groups.short_of_published([groups.Group("HalfCheetah-v5", name, records)])

    assert short(1442.7, 5819.1) == [] and len(short(float("nan"), 6000)) == 1
    far = [groups.Group("Walker2d-v5", "reinforce", [make_record(final=0, eval_return_mean=0)])]
    assert groups.short_of_published(far) == []  # of three times the steps
    moving = [groups.Group("Acrobot-v1", "a2c", [make_record(final=-84, eval_return_mean=-83.3)])]
    assert "(SLM-Lab -84.0)" in groups.short_of_published([replace(moving[0], records=[
        make_record(final=-84.1, eval_return_mean=-83.3)])])[0]
    assert groups.short_of_published(moving) == []
    assert short(1442.5, 5819.1) == [
        "Short of a published figure: ppo_continuous on HalfCheetah-v5 with a return of 1,442.5 "
        "(cleanrl 1,442.6)"]
    assert short(9000, 5000, "sb3-ppo_continuous") == [
        "Short of a published figure: sb3-ppo_continuous on HalfCheetah-v5 evaluated at 5,000.0 "
        "(tianshou 5,783.9, rl-baselines3-zoo 5,819.1)"]
    assert short(9000, 5800) == [
        "Short of a published figure: ppo_continuous on HalfCheetah-v5 evaluated at 5,800.0 "
        "(rl-baselines3-zoo 5,819.1)"]


def test_the_sentences_are_filled_from_the_results(tmp_path):
    records = [make_record(seed=s, final=-1000.4 - 2 * s, eval_return_mean=7.0 + s) for s in (1, 3)]
    suites_ = {"x": groups.group_records(records, None)[0]}
    prose_of = lambda text: prose.fill(text, suites_, tmp_path)
    group = "{x|CartPole-v1|ppo|%s}"
    assert prose_of(group % "return" + " of " + group % "seeds" + " seeds") == "-1,004 of two seeds"
    assert prose_of(group % "least:2" + ", " + group % "greatest:1") == "-1,006.40, -1,002.4"
    assert prose_of(group % "accuracy" + ", " + group % "worst") == "900, 800"
    assert prose_of(group % "evaluation" + "\nand\n\na:\n- as\n  it is\n") == (
        "9 and\n\na:\n- as\n  it is")
    sides = [make_record(script=name, seed=s, final=final)
             for name, final in (("ppo", 10.0), ("a2c", 1234.0)) for s in range(3)]
    suites_ |= {"both": groups.group_records(sides, None)[0]}
    assert prose_of("{both|CartPole-v1|ppo|a2c|difference}") == "1,224 [1,224, 1,224]"
    assert prose_of("{both|CartPole-v1|a2c|ppo|difference}") == "-1,224 [-1,224, -1,224]"
    row = {"script": "a2c", "env": "E", "variant": "v", "threads": 1}
    sides = lambda eager, peer: {"eager": [eager], "compiled": [eager], "peer": [peer]}
    part = {name: 1.0 for name in (*limit.PARTS, *limit.BARE)}
    for name, more in (
        ("speed", {"runs": sides({"sps": 25.0}, {"sps": 10.0})}),
        ("limit", {"rounds": [{"eager": part | {"networks": 1.4}}]}),
        ("threshold", {"runs": sides({"seconds": 4.0}, {"seconds": 5.0})
                       | {"compiled": [{"seconds": None}, {"seconds": None}, {"seconds": 1.0}]}}),
        ("scaling", {"seeds": [{"eager": {"sps": 12345.0}, "sync": 67.0}]}),
        ("cuda", {"runs": {"graphs": {"sps": [6.0, 8.0, 9.0]}, "peer": {"sps": [2.0, 4.0, 1.0]}}}),
    ):
        rows = [row | more, row | more | {"threads": 2}]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    found = prose_of("{speed|a2c|E|v|eager:2} {limit|a2c|E|v|eager} {threshold|a2c|E|v|peer} "
                     "{threshold|a2c|E|v|compiled} {scaling|a2c|E|v|eager} {scaling|a2c|E|v|sync}")
    assert found == "2.50 60 5 never 12,345 67"
    rows = [row | {"machine": {"cpu": cpu}, "runs": sides({"sps": x}, {"sps": 10.0})}
            for cpu, x in (("x", 25.0), ("y", 22.0), ("z", 24.0))]
    (tmp_path / "speed.json").write_text(json.dumps(rows))
    assert prose_of("{speed|a2c|E|v|eager:2} {speed|a2c|E|v|eager}") == "2.20 to 2.50 2"
    other = rows[0] | {"variant": "w", "runs": sides({"sps": 30.0}, {"sps": 10.0})}
    (tmp_path / "speed.json").write_text(json.dumps([*rows, other, other | {"threads": 2}]))
    assert prose_of("{speed|*|E|*|eager:1} {speed|*|*|v|eager:1}") == "2.2 to 3.0 2.2 to 2.5"
    part = {"tokens": 100, "operations": 2000, "seconds": [2.0, 1.0, 4.0]}
    rows = [{"width": 384, "bf16": bf16, "parts": {"eager": part}} for bf16 in (True, False)]
    card = {"rows": rows, "peak": {"bf16": 4000, "f32": 2000}}
    (tmp_path / "tokens.json").write_text(json.dumps([card]))
    assert prose_of("{cuda|a2c|E|v|graphs} {cuda|a2c|E|v|graphs ratio} {tokens|384|bf16|eager} "
                    "{tokens|384|bf16|eager share} {tokens|384|f32|eager share}") == "8 3 50 25 50"
    for wrong in ("{y|CartPole-v1|ppo|return}", "{x|CartPole-v1|a2c|return}", "{x}",
                  "{tokens|64|bf16|eager}", "{cuda|a2c|E|v|eager}", "{speed|a2c|E||eager}",
                  "{speed|*|F|*|eager}", "{speed|a2c|eager}",
                  "{both|CartPole-v1|ppo|npg|difference}", "{speed|a2c|E|v|*|eager}",
                  "{x|CartPole-v1|ppo|mean}", "{speed|a2c|E|v|eager:a}"):
        with pytest.raises(suites.BenchmarkError, match=re.escape(f"no result for {wrong}")):
            prose_of(wrong)


@pytest.mark.parametrize("name", [path.stem for path in sorted(suites.SUITES.glob("*.toml"))])
def test_a_single_run_is_started_with_the_flags_of_its_row(name):
    """What the report prints is read by the script's own parser as the task it stands for."""
    suite, shown = suites.load_suite(name), 0
    for line in report.single_runs(suite)[3:-4]:
        command, _, also = line.partition("  # also ")
        python, script, *flags = shlex.split(command)
        args = importlib.import_module(script.removesuffix(".py")).parse_args(flags)
        field = "task" if script == "grpo_rloo.py" else "env_id"
        for env in (getattr(args, field), *filter(None, also.split(", "))):
            shown += 1
            as_task = {field: env, "total_timesteps": args.total_timesteps}
            assert any(
                (task.env, task.steps, f"{task.script}.py") == (env, args.total_timesteps, script)
                and all(getattr(args, k.replace("-", "_")) == (None if x == "None" else x)
                        for k, x in task.flags.items())
                for task in suite.tasks
            ), as_task
        assert python == "python" and args.seed == 1 and args.run_dir is None
    assert shown == len(suite.tasks)


def test_committed_report_is_that_of_the_results(capsys):
    if not list(results.RESULTS.glob("*.jsonl")):
        pytest.skip("no results are committed yet")
    assert main(["report", "--check"]) == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    "shift, seeds, words",
    [
        (100, 10, "B is better"),
        (-100, 10, "B is worse"),
        (1, 10, "cannot tell from this many seeds, 10 and 10"),
        (100, 9, "cannot tell from this many seeds: 9 and 9"),
        (0, 30, "cannot tell from this many seeds, 30 and 30"),
    ],
)
def test_compare_says_only_what_the_seeds_allow(tmp_path, capsys, shift, seeds, words):
    rng = np.random.default_rng(0)
    for name, mean in (("a", 0), ("b", shift)):
        finals = rng.normal(mean, 10, seeds).tolist()
        records = [make_record(seed=s, final=x) for s, x in enumerate(finals)]
        results.merge_records(tmp_path / name / "classic.jsonl", records)
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b" / "classic.jsonl")]) == 0
    said = capsys.readouterr().out
    assert words in said and "CartPole-v1 ppo: P(B > A) = " in said
    assert ("covers less than 95 %" in said) is (seeds < 10)


def test_compare_needs_both_statistics():
    """Better by a hair in every pair is better; equal returns are not."""
    a = np.arange(10.0)
    assert "better" in compare.verdict(a, a + 100)
    # The probability of improvement is sure, as 8 of 10 gain a little; the IQM may have fallen.
    mostly = np.array([-90.0, -90, -80, -80, 10.1, 10.1, 10.2, 10.2, 10.3, 10.3])
    assert "cannot tell" in compare.verdict(np.linspace(9, 10, 10), mostly)
    assert "cannot tell" in compare.verdict(np.full(10, 500.0), np.full(10, 500.0))


def test_compare_two_algorithms_of_one_file(classic, capsys):
    path = classic / "classic.jsonl"
    assert main(["compare", f"{path}:ppo", f"{path}:sb3-ppo"]) == 0
    said = capsys.readouterr().out
    assert said.count("P(B > A)") == 3 and "Acrobot-v1: " in said
    assert main(["compare", f"{path}:ppo", f"{path}:a2c"]) == 2
    assert "no results of a2c" in capsys.readouterr().err


# --- The peer -------------------------------------------------------------------------------------


class NoFiles:
    """Stands for a run's files and keeps what it is told."""

    def begin(self):
        self.steps, self.returns = [], []

    def iteration(self, step, ended):
        self.steps.append(step)
        self.returns += [episode[0] for episode in ended]


def test_peer_has_the_scripts_hyperparameters():
    flags = {"anneal_clip": True, "num-envs": 2, "num_steps": 64, "norm_obs": True}
    settings = peers.peer_settings(ROOT / "ppo.py", flags)
    run = NoFiles()
    model = peers.train("CartPole-v1", 1, 512, settings, run)
    assert run.steps == [128, 256, 384, 512] and run.returns and min(run.returns) >= 8
    assert (model.n_steps, model.batch_size, model.n_epochs) == (64, 32, 4)
    assert (model.gamma, model.gae_lambda, model.ent_coef) == (0.99, 0.95, 0.01)
    assert model.vf_coef == 0.25  # its loss has no 1/2
    assert model.policy.optimizer.defaults["eps"] == 1e-5
    # SB3 has counted all iterations as done at the last update: ours is at 1/4 of the start then.
    assert model.policy.optimizer.param_groups[0]["lr"] == pytest.approx(2.5e-4 / 4)
    assert model.clip_range(0.75) == pytest.approx(0.2)
    assert model.clip_range_vf(0) == pytest.approx(0.05)
    shapes = [tuple(p.shape) for p in model.policy.mlp_extractor.policy_net.parameters()]
    assert shapes == [(64, 4), (64,), (64, 64), (64,)]
    assert model.get_env().norm_obs and not model.get_env().norm_reward


def test_peer_has_the_gaussian_and_the_normalisation_of_ppo_continuous():
    flags = {"num_steps": 64, "num_minibatches": 4, "update_epochs": 2, "log_std_init": -0.7}
    settings = peers.peer_settings(ROOT / "ppo_continuous.py", flags)
    model = peers.train("Pendulum-v1", 1, 512, settings, NoFiles())
    envs = model.get_env()
    assert envs.norm_obs and envs.norm_reward and envs.clip_obs == envs.clip_reward == 10
    assert envs.num_envs == 8 and model.batch_size == 128
    assert model.policy.log_std.item() == pytest.approx(-0.7, abs=0.1)
    with pytest.raises(suites.BenchmarkError):
        peers.peer_settings(ROOT / "ppo_continuous.py", {"squash": True})


@pytest.mark.parametrize("flags", [{"target_kl": 0.01}, {"kl_coef": 1.0}, {"norm_adv": "batch"},
                                   {"clip_coef": "None"}, {"no_such_flag": 1}])
def test_peer_refuses_what_it_cannot_do(flags):
    with pytest.raises(suites.BenchmarkError):
        peers.peer_settings(ROOT / "ppo.py", flags)


def test_peer_has_the_optimizer_of_a2c():
    settings = peers.peer_settings(ROOT / "a2c.py", {"optimizer": "rmsprop"})
    model = peers.train("CartPole-v1", 1, 80, settings, NoFiles())
    assert (model.n_steps, model.n_envs, model.gae_lambda, model.ent_coef) == (5, 8, 1.0, 0.0)
    optimizer = model.policy.optimizer
    assert type(optimizer).__name__ == "RMSprop" and not model.normalize_advantage
    assert (optimizer.defaults["alpha"], optimizer.defaults["eps"]) == (0.99, 1e-5)
    adam = peers.peer_settings(ROOT / "a2c.py", {"optimizer": "adam"})
    model = peers.train("CartPole-v1", 1, 80, adam, NoFiles())
    assert type(model.policy.optimizer).__name__ == "Adam"
    with pytest.raises(suites.BenchmarkError):
        peers.peer_settings(ROOT / "a2c.py", {"rmsprop_alpha": 0.9})


def test_peer_has_the_step_and_the_critic_of_trpo():
    flags = {"max_kl": 0.02, "cg_iters": 7, "cg_damping": 0.3, "value_epochs": 3, "num_steps": 64}
    flags |= {"num_minibatches": 4, "value_learning_rate": 2e-3, "backtrack_coef": 0.7}
    settings = peers.peer_settings(ROOT / "trpo.py", flags | {"backtrack_iters": 6})
    model = peers.train("CartPole-v1", 1, 512, settings, NoFiles())
    assert (model.target_kl, model.cg_max_steps, model.cg_damping) == (0.02, 7, 0.3)
    assert (model.n_critic_updates, model.batch_size, model.n_envs) == (3, 64, 4)
    assert (model.line_search_shrinking_factor, model.line_search_max_iter) == (0.7, 6)
    # Of two iterations' schedule the last half.
    assert model.policy.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3)
    for flag in ({"fisher": "diagonal"}, {"fisher_fraction": 0.5}, {"step_rule": "fixed"}):
        with pytest.raises(suites.BenchmarkError):
            peers.peer_settings(ROOT / "trpo.py", flag)


# --- Speed ----------------------------------------------------------------------------------------


def test_steady_rate_leaves_the_warm_up_out(tmp_path):
    """10 s to compile, then 1,000 steps in each of 9 seconds; the first point is at 1,000 steps."""
    writer = SummaryWriter(str(tmp_path))
    for k in range(1, 11):
        writer.add_scalar("charts/SPS", 1000 * k / (9 + k), 1000 * k, walltime=50.0 + k)
    writer.close()
    rate, first = speed.steady_rate(tmp_path, lambda times: times - 41)
    assert (rate, first) == (pytest.approx(1000), pytest.approx(10))
    # Had it been held from 55.5 to 56.5, it would have needed a second less.
    rate, _ = speed.steady_rate(tmp_path, lambda times: np.where(times < 55.5, times, times - 1))
    assert rate == pytest.approx(7000 / 6)


def test_steady_rate_refuses_a_run_that_is_too_short(tmp_path):
    with pytest.raises(suites.BenchmarkError, match="too short"):
        speed.steady_rate(tmp_path, lambda times: times)


def program_job(program, **task):
    return suites.Job(suites.Task("ppo", "CartPole-v1", 400, **task), 1, program, "", {}, None)


def test_the_clock_of_a_run_stands_while_it_is_held(tmp_path):
    with speed.TimedRun(program_job(b"pass"), tmp_path / "run", False, 1) as run:
        run.turns = [(10.0, 11.0), (20.0, 23.0), (30.0, 31.0)]
        times = np.arange(9.0, 33, 0.25)
        ticks = np.arange(0, 40, 0.001)  # against counting the milliseconds in which it ran
        ran = np.any([(ticks >= start) & (ticks < end) for start, end in run.turns], axis=0)
        counted = [ran[ticks < time].sum() / 1000 for time in times]
        assert np.allclose(run.active(times), counted, atol=0.002)


def test_runs_take_turns_and_one_is_held_while_another_goes_on(tmp_path, monkeypatch):
    """Each program notes the time at every step; between the first and the last of one's steps of a
    turn there are none of the other's."""
    program = b"""if True:
        import time
        for step in range(1, 401):
            if step % 20 == 0:
                print(f"{step} steps, {step // 4}%, return 1.0, 1 steps/s", flush=True)
            with open("times.txt", "a") as file:
                print(step, time.time(), file=file)
            time.sleep(0.005)
    """
    clocks = {}

    def steady_rate(run_dir, clock):
        times = np.loadtxt(run_dir.parent / "times.txt")[:, 1]
        clocks[run_dir.parent.name] = times, clock(times)
        return 1.0, 1.0

    monkeypatch.setattr(speed, "steady_rate", steady_rate)
    jobs = {"eager": program_job(program), "compiled": program_job(program)}
    assert set(speed.run_in_turns(jobs, tmp_path, 1)) == set(jobs)
    owner = sorted((time, name) for name, (times, _) in clocks.items() for time in times)
    changes = sum(a[1] != b[1] for a, b in itertools.pairwise(owner))
    assert changes == 2 * 16 - 1  # the warm-up and 15 turns of each
    for times, active in clocks.values():  # held for about as long as it ran: half of the time
        assert 0.3 < (active[-1] - active[150]) / (times[-1] - times[150]) < 0.7


def test_no_process_is_left_behind(tmp_path):
    """Neither a held one nor one that runs when another goes wrong."""
    job = program_job(b"import time; time.sleep(60)")
    with speed.TimedRun(job, tmp_path / "a", False, 1) as run:
        run.go_on(lambda _: True)
        assert not run.ended() and alive(run.process.pid)
    assert not alive(run.process.pid)
    program = b"import os; open('pid', 'w').write(str(os.getpid())); "
    line = b"print('200 steps, 50%, return 1.0, 1 steps/s', flush=True); "
    jobs = {"eager": program_job(program + line + b"import time; time.sleep(60)"),
            "compiled": program_job(program + b"raise SystemExit('no more')")}
    began = time.monotonic()
    with pytest.raises(suites.BenchmarkError, match="status 1: no more"):
        speed.run_in_turns(jobs, tmp_path, 1)
    assert time.monotonic() - began < 30
    assert not any(alive(int((tmp_path / name / "pid").read_text())) for name in jobs)


def test_ratios_are_taken_within_pairs(monkeypatch, tmp_path):
    """A machine that is slower in the second pair leaves the ratios alone."""
    seeds, rates = [], {"eager": [300, 30], "compiled": [400, 40], "peer": [100, 10]}

    def run_in_turns(jobs, _work, threads):
        assert threads == 3 and set(jobs) == set(rates)
        assert [bool(job.task.peer) for job in jobs.values()] == [False, False, True]
        seeds.append({job.seed for job in jobs.values()})
        return {name: {"sps": rates[name].pop(0), "first_point_seconds": 1, "peak_mib": 100 * i}
                for i, name in enumerate(jobs, 1)}

    monkeypatch.setattr(speed, "run_in_turns", run_in_turns)
    speed.speed([suites.Task("ppo", "CartPole-v1", 1000)], 2, 3, tmp_path, tmp_path, ROOT)
    assert seeds == [{1}, {2}]
    (row,) = speed.read_speed(tmp_path)
    assert speed.ratios(row, "eager") == [3, 3] and speed.ratios(row, "compiled") == [4, 4]
    text = "\n".join(speed.speed_section([row]))
    assert "| ppo | CartPole-v1 | 3 | 2 | 165 [30, 300] | 220 [40, 400] | 55 [10, 100] " in text
    assert "| 3.00 [3.00, 3.00] | 4.00 [4.00, 4.00] | 100, 200, 300 | 1, 1 |" in text
    assert "python -m benchmarks speed threads --threads 3" in text


def test_the_tasks_with_more_threads_are_those_with_one():
    speed_, threads = suites.load_suite("speed").tasks, suites.load_suite("threads").tasks
    assert threads and all(task in speed_ for task in threads)


def test_speed_below_its_target_is_named():
    on: dict[str, Any] = {"machine": {"cpu": "Some(R) CPU Processor"}}
    row = on | {"script": "ppo_continuous", "variant": "v", "env": "E", "threads": 1, "runs": {
        "eager": [{"sps": x} for x in (21, 22, 90)], "compiled": [{"sps": 26}] * 3,
        "peer": [{"sps": 10}] * 3}}
    assert speed.short_of_targets([row]) == []
    row["runs"]["eager"][1]["sps"] = 21.9
    assert speed.short_of_targets([row, row | {"threads": 2}]) == [
        "- Short of its target: ppo_continuous (v) on E, eager 2.19 times the peer, not 2.2 "
        "(Some CPU)"]
    row["runs"]["compiled"] = [{"sps": 1}] * 3
    assert "2.2, compiled 0.10 times the peer, not 2.6" in speed.short_of_targets([row])[0]
    del row["runs"]["peer"]
    assert speed.short_of_targets([row]) == []
    row = on | {"script": "trpo", "variant": "4 x 512", "env": "E", "threads": 1, "runs": {
        "eager": [{"sps": 24}], "compiled": [{"sps": 1}], "peer": [{"sps": 10}]}}
    assert speed.short_of_targets([row]) == [
        "- Short of its target: trpo (4 x 512) on E, eager 2.40 times the peer, not 2.5 "
        "(Some CPU)"]
    row["variant"] = "another"
    assert speed.short_of_targets([row]) == []


def test_only_the_first_compiled_run_is_a_cold_one(monkeypatch, tmp_path):
    """The next ones find its cache, although their directories are made anew; all have the
    threads that were asked for."""
    monkeypatch.setattr(speed, "steady_rate", lambda directory, clock: (1.0, 1.0))
    program = b"""if True:
        import os, pathlib, sys
        cache = pathlib.Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
        cache.mkdir(parents=True, exist_ok=True)
        (cache / str(len(list(cache.iterdir())))).touch()
        print(os.environ["OMP_NUM_THREADS"], *sys.argv[-3:], sorted(os.listdir(cache)))
    """
    said = []
    for side in ("eager", "compiled", "compiled"):
        speed.run_once(program_job(program), tmp_path / side, side == "compiled", 2)
        said.append((tmp_path / side / "stdout.txt").read_text().strip())
    assert said == [
        "2 2 --eval-episodes 1 ['0']",
        "2 --eval-episodes 1 --compile ['0', '1']",
        "2 --eval-episodes 1 --compile ['0', '1', '2']",
    ]


def test_rows_of_other_threads_and_machines_stand_side_by_side(tmp_path):
    row = {"script": "ppo", "env": "CartPole-v1", "variant": ""}
    for threads, cpu, runs in ((1, "x", "a"), (2, "x", "b"), (1, "x", "c"), (1, "y", "d")):
        of_one = {"threads": threads, "machine": {"cpu": cpu}, "runs": runs}
        speed.keep_row(tmp_path / "speed.json", row | of_one)
    assert [x["runs"] for x in speed.read_speed(tmp_path)] == ["c", "d", "b"]


def test_speed_end_to_end(tmp_path, capsys):
    suite = tmp_path / "tiny.toml"
    suite.write_text('[[task]]\nscript = "npg"\nenv = "CartPole-v1"\nsteps = 4096\n')
    command = ["speed", str(suite), "--pairs", "1", "--work", str(tmp_path), "--results"]
    assert main([*command, str(tmp_path / "results")]) == 0
    (row,) = speed.read_speed(tmp_path / "results")
    assert set(row["runs"]) == {"eager", "compiled"} and row["threads"] == 1
    for (run,) in row["runs"].values():
        assert run["sps"] > 100 and 50 < run["peak_mib"] < 5000
    assert "npg | CartPole-v1 | 1 | 1 |" in "\n".join(speed.speed_section([row]))
    suite.write_text('[[task]]\nscript = "ppo"\nenv = "CartPole-v1"\nsteps = 1\n')
    assert main([*command, str(tmp_path / "results")]) == 2
    assert "less than one iteration" in capsys.readouterr().err


# --- grpo_rloo's suites ---------------------------------------------------------------------------


def make_llm_record(method, seed, accuracy, wrong_length):
    curves = {name: [0.5] * 100 for name in ("return", "accuracy", "kl", "length")}
    curves |= {"entropy": [1.0] * 90 + [0.25] * 10, "wrong_length": [wrong_length] * 100}
    record = make_record("sort", "grpo_rloo", seed, 0.9, variant=method)
    curve = curves | {"seconds": record["curve"]["seconds"]}
    return record | {"eval_return_mean": accuracy, "accuracy_sft": 0.25, "curve": curve}


def test_a_suite_of_methods_has_its_own_table(tmp_path):
    """Accuracy of the last network, entropy of the last tenth, and no return of an episode."""
    records = [make_llm_record("dapo", seed, 0.9 + seed / 100, None) for seed in (1, 2)]
    records += [make_llm_record("grpo", seed, 0.8, 4.0) for seed in (1, 2)]
    for record, seconds in zip(records, (None, None, 70.6, 12.0), strict=True):  # None: resumed
        record["process_seconds"] = seconds
    results.merge_records(tmp_path / "methods.jsonl", records)
    assert report.report(tmp_path, None, check=False) == 0
    text = (tmp_path / "report.md").read_text()
    start = "| sort | grpo | 500,000 | 2 | 25.0 (25.0 to 25.0) | 80.0 (80.0 to 80.0) | 80.0 "
    assert start + "[80.0, 80.0] | 0.250 | 4.00 | 10 | 71 |" in text
    assert "| 91.5 (91.0 to 92.0) | 91.5 [91.0, 92.0] | 0.250 | - |" in text
    assert "episode" not in text and (tmp_path / "methods_curves.png").stat().st_size > 10_000
    assert report.report(tmp_path, None, check=True) == 0
    picture = tmp_path / "methods_curves.png"
    whole = picture.read_bytes()
    picture.write_bytes(whole[:-1])
    assert report.report(tmp_path, None, check=True) == 1
    picture.write_bytes(whole)
    assert report.report(tmp_path, None, check=True) == 0
    picture.unlink()
    assert report.report(tmp_path, None, check=True) == 1


def test_a_pipe_that_is_closed_gets_no_traceback(classic):
    """Neither from a print, which writes at once if unbuffered, nor from the flush at the end."""
    words = ["compare", f"{classic}/classic.jsonl:ppo", f"{classic}/classic.jsonl:sb3-ppo"]
    for unbuffered in ("", "1"):
        reader, writer = os.pipe()
        os.close(reader)
        command = [sys.executable, "-m", "benchmarks", *words]
        more = {"env": os.environ | {"PYTHONUNBUFFERED": unbuffered}, "cwd": ROOT, "text": True}
        ended = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, **more)
        os.close(writer)
        assert (ended.returncode, ended.stderr) == (1, ""), words


def test_methods_are_compared_seed_by_seed():
    """Seed 3, which one side alone has, does not count; nor does a length that was never logged."""
    accuracies = {"grpo": (0.5, 0.9, 0.1), "rloo": (0.6, 0.96), "dapo": (0.4, 0.8)}
    records = [
        make_llm_record(method, seed, accuracy, None if (method, seed) == ("rloo", 1) else length)
        for (method, row), length in zip(accuracies.items(), (4.0, 5.0, None), strict=True)
        for seed, accuracy in enumerate(row, 1)
    ]
    found, _ = groups.group_records(records, None)
    table = {line.split(" | ")[1]: line for line in llm.difference_table(found) if "sort" in line}
    none, same = "+0.000 [+0.000, +0.000]", "+1.00 [+1.00, +1.00]"
    assert set(table) == {"rloo", "dapo"}
    assert table["rloo"] == f"| sort | rloo | +8.0 [+6.0, +10.0] | {none} | {none} | {same} |"
    constant = "-10.0 [-10.0, -10.0]"
    assert table["dapo"] == f"| sort | dapo | {constant} | {none} | {none} | - |"
    assert llm.difference_table([x for x in found if x.label == "grpo_rloo (grpo)"]) == []
    assert llm.difference_table([x for x in found if x.label == "grpo_rloo (rloo)"]) == []


def test_methods_run_end_to_end(tmp_path, capsys):
    suite = tmp_path / "tiny.toml"
    suite.write_text(
        'seeds = 1\npublish = false\n[[task]]\nscript = "grpo_rloo"\nvariant = "rloo + colder"\n'
        'env = "sort"\nsteps = 256\n'
        "flags = {num_prompts = 16, width = 16, sft_steps = 2, num_minibatches = 1, "
        "temperature = 0.9}\n"
    )
    began = time.monotonic()
    assert main(["run", str(suite), "--work", str(tmp_path), "--jobs", "1"]) == 0
    (record,) = results.read_records(tmp_path / "results" / "tiny.jsonl")
    (run_dir,) = tmp_path.glob("sort__grpo_rloo*/run")
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["args"]["advantage"] == "rloo" and summary["args"]["task"] == "sort"
    assert record["eval_return_mean"] == pytest.approx(summary["accuracy"], rel=1e-5)
    assert record["train_return_last100"] == pytest.approx(summary["train_reward"], rel=1e-5)
    steps, entropy = results.read_scalars(run_dir, "losses/entropy")
    assert list(steps) == [128, 256]
    assert record["curve"]["entropy"][49] == pytest.approx(entropy[0], rel=1e-4)
    assert record["curve"]["entropy"][99] == pytest.approx(entropy[1], rel=1e-4)
    assert "gymnasium" not in record["versions"] and summary["args"]["temperature"] == 0.9
    assert summary["wall_seconds"] < record["process_seconds"] < time.monotonic() - began


def test_sampling_is_measured_in_pairs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sampling, "LENGTHS", (3, 5))
    monkeypatch.setattr(sampling, "BATCH", 2)
    assert main(["sampling", "--results", str(tmp_path), "--pairs", "2"]) == 0
    rows = json.loads((tmp_path / "sampling.json").read_text())["rows"]
    assert [(row["new_tokens"], len(row["cache"]), len(row["full"])) for row in rows] == [
        (3, 2, 2), (5, 2, 2),
    ]
    text = "\n".join(sampling.sampling_section(tmp_path))
    ratio = statistics.median(a / b for a, b in zip(rows[1]["cache"], rows[1]["full"]))
    assert f"| {ratio:.1f} [" in text and not sampling.sampling_section(tmp_path / "none")


def test_sampling_that_differs_is_no_measurement(monkeypatch):
    monkeypatch.setattr(sampling, "LENGTHS", (4,))
    real = sampling.full_forward
    monkeypatch.setattr(sampling, "full_forward", lambda *args: real(*args) + 1)
    with pytest.raises(RuntimeError, match="differ"):
        sampling.measure(1)


# --- Step sizes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "parts, expected",
    [
        ([(20, 100)], "not learned"),
        ([(20, 50), (400, 3), (20, 47)], "learned not long enough"),
        ([(20, 30), (400, 30), (210, 40)], "learned"),
        ([(20, 30), (400, 30), (190, 40)], "collapsed"),
        ([(20, 10), (11, 90)], "collapsed at once"),  # below half of random play
        ([(20, 10), (13, 90)], "not learned"),
        ([(20, 30), (400, 30), (10, 30), (400, 10)], "learned"),  # it has recovered
        ([(None, 5), (20, 30), (400, 30), (10, 35)], "collapsed"),  # no episode had ended at first
    ],
)
def test_the_fate_of_a_run_is_as_defined(parts, expected):
    """Best: the largest mean over 5 points in a row; end: the mean over the last 10."""
    curve = [value for value, count in parts for _ in range(count)]
    if expected == "learned not long enough":  # 3 of 5 points at 400 are a mean of 248
        assert step_sizes.fate({"curve": {"return": curve}}, 24) == "collapsed"
        curve = [60 if value == 400 else value for value in curve]
        expected = "not learned"
    assert len(curve) == 100
    assert step_sizes.fate({"curve": {"return": curve}}, 24) == expected


def test_step_sizes_end_to_end(tmp_path, monkeypatch, capsys):
    """Two alphas, two seeds, a few updates: the restricted steps get the plain ones' length."""
    monkeypatch.setattr(step_sizes, "ALPHAS", (1e-4, 1e-3))
    monkeypatch.setattr(step_sizes, "STEPS", 6000)
    paths = ["--work", str(tmp_path / "work"), "--results", str(tmp_path)]
    assert main(["step-sizes", "--seeds", "2", *paths]) == 0
    rows = step_sizes.summary(tmp_path)
    assert [(r["alpha"], r["rule"], r["seeds"]) for r in rows] == [
        (1e-4, "plain", 2), (1e-4, "restricted", 2), (1e-3, "plain", 2), (1e-3, "restricted", 2)
    ]
    lengths = {}
    for job in (tmp_path / "work").iterdir():
        flags = json.loads((job / "job.json").read_text())["command"]
        _, norms = results.read_scalars(job / "run", "losses/step_norm")
        lengths.setdefault(flags[flags.index("--step-rule") + 1], []).append(norms[:10])
    for plain, restricted in zip((1e-4, 1e-3), (rows[1], rows[3]), strict=True):
        same = [x for x in lengths["restricted"] if np.allclose(x, restricted["length"], rtol=1e-3)]
        assert len(same) == 2, plain
    every = np.concatenate(lengths["gradient"]).mean() * 2  # both alphas have as many points
    assert rows[0]["length"] + rows[2]["length"] == pytest.approx(every, rel=0.2)
    step_sizes.plot(tmp_path)
    text = "\n".join(step_sizes.section(tmp_path, ""))
    assert (tmp_path / step_sizes.PICTURE).exists() and "| 0.0001 | " in text
    assert capsys.readouterr().out.count('"rule"') == 4
    shutil.rmtree(tmp_path / "work")  # as in a fresh clone: a line has not the steps' lengths
    assert main(["step-sizes", "--seeds", "2", *paths]) == 0
    again = step_sizes.summary(tmp_path)
    assert [(r["seeds"], r["length"]) for r in again] == [(2, r["length"]) for r in rows]


# --- Running: scripts that do what they should not ------------------------------------------------

FAKE_SCRIPT = '''
import json, os, shutil, signal, sys, time
from pathlib import Path

argv = sys.argv[1:]
resumed = argv[0] == "--resume"
if resumed:
    run_dir = Path(argv[1]).parent
    if Path(argv[1]).read_text() == "damaged":
        sys.exit(2)
    args = json.loads(Path(argv[1]).read_text())
else:
    args = dict(zip(argv[::2], argv[1::2]))
    run_dir = Path(args["--run-dir"])
mode, steps = args.get("--mode", "good"), int(args["--total-timesteps"])
assert os.environ["OMP_NUM_THREADS"] == "1"
assert not (run_dir / "checkpoint.pt").exists() or resumed, "refused: the directory holds a run"
run_dir.mkdir(parents=True, exist_ok=True)
before = list(run_dir.parent.glob("attempt*"))
(run_dir.parent / f"attempt{len(before)}").write_text("resumed" if resumed else "afresh")
shutil.copy(EVENTS, run_dir / "events.out.tfevents.1.host.1.0")
print(f"{steps // 2:>9} steps,  50%, return 7.5, 1000 steps/s, 1 s left", flush=True)
if mode == "crash":
    sys.exit("went wrong: the last words of a script")
if mode == "noise":
    os.write(1, bytes(range(256)) * 100)
    os.write(2, bytes(range(256)) * 100)
    (run_dir / "summary.json").write_bytes(bytes(range(256)))
    sys.exit(0)
if mode == "truncated":
    (run_dir / "summary.json").write_text('{"steps": 100, "wall_se')
    sys.exit(0)
if mode == "no-events":
    (run_dir / "events.out.tfevents.1.host.1.0").write_bytes(bytes(range(256)))
if mode in ("killed-once", "damaged") and not before or mode == "killed-always":
    saved = "damaged" if mode == "damaged" else json.dumps(args)
    (run_dir / "checkpoint.pt").write_text(saved)
    os.kill(os.getpid(), signal.SIGKILL)
if mode == "hang":
    (run_dir / "checkpoint.pt").write_text(json.dumps(args))
    time.sleep(100)
summary = dict(steps=steps, wall_seconds=1.0, sps=steps, train_return_last100=7.5,
               eval_return_mean=8.5)
(run_dir / "summary.json").write_text(json.dumps(summary))
'''


@pytest.fixture
def fake(tmp_path):
    """A folder with fake scripts, and a function that writes a suite of their modes."""
    writer = SummaryWriter(str(tmp_path / "events"))
    for step in range(10, 101, 10):
        writer.add_scalar("charts/episodic_return", step / 10, step)
        writer.add_scalar("charts/SPS", 100.0, step)
    writer.close()
    (events,) = (tmp_path / "events").glob("events*")
    (tmp_path / "fake.py").write_text(FAKE_SCRIPT.replace("EVENTS", repr(str(events))))
    # Random play is known, so that it is not measured in each test.
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "random.json").write_text('{"CartPole-v1": {"mean": 22}}')

    class Fake:
        path, work = tmp_path, tmp_path / "work"

        def suite(self, *modes, seeds=1):
            task = '[[task]]\nscript = "fake"\nenv = "CartPole-v1"\nsteps = 100\n'
            tasks = [f'{task}variant = "{m}"\nflags = {{ mode = "{m}" }}\n' for m in modes]
            (tmp_path / "odd.toml").write_text(f"seeds = {seeds}\n" + "".join(tasks))

        def command(self, *more):
            line = ["run", str(tmp_path / "odd.toml"), "--scripts", str(tmp_path), "--jobs", "4"]
            line += ["--work", str(self.work), "--results", str(tmp_path / "results"), *more]
            return [sys.executable, "-m", "benchmarks", *line]

        def start(self, *more):
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            return subprocess.Popen(self.command(*more), cwd=ROOT, **pipes)

        def run(self, *more):
            return subprocess.run(self.command(*more), cwd=ROOT, capture_output=True, text=True)

        def records(self):
            path = tmp_path / "results" / "odd.jsonl"
            return {(r["variant"], r["seed"]): r for r in results.read_records(path)}

        def attempts(self, mode):
            files = sorted(self.work.glob(f"*{mode}*/attempt*"))
            return [file.read_text() for file in files]

        def wait_for_attempt(self, mode):
            return wait_for(lambda: self.attempts(mode))

    return Fake()


def wait_for(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def alive(pid):
    """Whether a process runs; one that has ended but that nobody waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")")[-1].split()[0] != "Z"
    except OSError:
        return False


def test_a_run_that_goes_wrong_is_reported_and_harms_no_other(fake):
    fake.suite("good", "crash", "hang", "noise", "truncated", "no-events", "killed-always")
    ended = fake.run("--time-limit", "3")
    assert ended.returncode == 1
    assert set(fake.records()) == {("good", 1)}
    missing = {line for line in ended.stderr.splitlines() if line.startswith("missing: ")}
    assert len(missing) == 6
    for mode, words in {
        "crash": "ended with status 1",
        "hang": "ran past its time limit",
        "noise": "summary.json is not valid",
        "truncated": "summary.json is not valid",
        "no-events": "hold no charts/",
        "killed-always": "was killed twice",
    }.items():
        line = next(line for line in missing if f"({mode})" in line)
        assert words in line
    assert "| went wrong: the last words of a script" in ended.stdout
    assert fake.attempts("killed-always") == ["afresh", "resumed"]
    assert len(fake.attempts("crash")) == 1
    # A second call tries the failed again and the finished not.
    assert fake.run("--time-limit", "3").returncode == 1
    assert len(fake.attempts("good")) == 1 and len(fake.attempts("crash")) == 2
    assert fake.attempts("hang") == ["afresh", "resumed"]


def test_killed_once_is_resumed_and_a_damaged_checkpoint_starts_afresh(fake):
    fake.suite("killed-once", "damaged")
    ended = fake.run()
    assert ended.returncode == 0, ended.stderr
    assert fake.attempts("killed-once") == ["afresh", "resumed"]
    assert fake.attempts("damaged") == ["afresh", "afresh"]
    assert set(fake.records()) == {("killed-once", 1), ("damaged", 1)}


def test_finished_runs_are_skipped_and_changed_algorithms_run_again(fake):
    fake.suite("good", seeds=2)
    assert fake.run("--seeds", "1").returncode == 0 and len(fake.attempts("good")) == 1
    assert fake.run().returncode == 0 and len(fake.attempts("good")) == 2
    before = (fake.path / "results" / "odd.jsonl").read_bytes()
    assert "2 of 2 runs were finished before" in fake.run().stdout
    script = fake.path / "fake.py"
    script.write_text("# a comment\n" + script.read_text())
    assert fake.run().returncode == 0 and len(fake.attempts("good")) == 2
    assert (fake.path / "results" / "odd.jsonl").read_bytes() == before
    script.write_text("CHANGED = 1\n" + script.read_text())
    assert fake.run().returncode == 0 and len(fake.attempts("good")) == 4
    assert len(fake.records()) == 2
    record = fake.records()["good", 1]
    assert record["curve"]["return"][9:30:10] == [1, 2, 3]
    assert record["curve"]["seconds"][99] == 1 and record["train_return_last100"] == 7.5


def test_a_line_of_the_results_counts_as_a_finished_run(fake):
    fake.suite("good", seeds=2)
    path = fake.path / "results" / "odd.jsonl"
    assert fake.run("--seeds", "1").returncode == 0
    shutil.rmtree(fake.work)  # as in a fresh clone
    ended = fake.run()
    assert ended.returncode == 0 and "1 of 2 runs were finished before" in ended.stdout
    assert len(fake.attempts("good")) == 1 and set(fake.records()) == {("good", 1), ("good", 2)}
    for key, value in {  # whatever differs, it is another run
        "script_hash": "another", "versions": {}, "steps": 50, "seed": 3, "flags": {},
    }.items():
        shutil.rmtree(fake.work)
        records = [record | {key: value} for record in fake.records().values()]
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        assert fake.run().returncode == 0 and len(fake.attempts("good")) == 2, key
        path.write_text("".join(
            json.dumps(record) + "\n" for record in fake.records().values()
            if record["seed"] < 3 and record["flags"]
        ))


def test_only_a_line_of_the_same_run_counts():
    task = suites.Task("ppo", "CartPole-v1", 500_000, {"gamma": 0.9}, "a")
    job = suites.Job(task, 1, b"", "h", {"torch": "2"}, None)
    record = make_record(variant="a", flags={"gamma": 0.9}, steps=499_712)
    assert results.find_record([record], job) == record
    for other in (
        {"env": "Acrobot-v1"}, {"script": "a2c"}, {"script": "sb3-ppo"}, {"variant": ""},
        {"flags": {}}, {"seed": 2}, {"script_hash": "i"}, {"versions": {}}, {"steps": 480_000},
    ):
        assert results.find_record([record | other], job) is None, other
    peer = replace(job, task=replace(task, peer="sb3"))
    assert results.find_record([record], peer) is None
    assert results.find_record([record | {"script": "sb3-ppo"}], peer)


def test_a_runs_own_files_come_before_its_line(fake):
    fake.suite("good")
    assert fake.run().returncode == 0
    path = fake.path / "results" / "odd.jsonl"
    record = fake.records()["good", 1] | {"train_return_last100": 1.0}
    path.write_text(json.dumps(record) + "\n")
    assert fake.run().returncode == 0 and len(fake.attempts("good")) == 1
    assert fake.records()["good", 1]["train_return_last100"] == 7.5


def test_an_edit_during_a_campaign_does_not_get_into_it(fake):
    fake.suite("good", seeds=3)
    job, *_ = suites.make_jobs(suites.load_suite(str(fake.path / "odd.toml")).tasks, 1, fake.path)
    (fake.path / "fake.py").write_text("raise SystemExit(1)")
    arguments = [job], fake.work, fake.path / "results" / "odd.jsonl", LocalEngine(), 1, None
    assert runner.Campaign(*arguments).run()


def test_ctrl_c_stops_the_runs_and_says_how_to_go_on(fake):
    fake.suite("hang")
    harness = fake.start()
    fake.wait_for_attempt("hang")
    pid = int(next(fake.work.glob("*/pid")).read_text())
    harness.send_signal(signal.SIGINT)
    _, said = harness.communicate(timeout=20)
    assert harness.returncode == 130 and not alive(pid)
    assert said.startswith("benchmarks: interrupted; to go on: python -m benchmarks run")
    assert said.count("\n") == 1


def test_two_harnesses_on_one_directory(fake):
    fake.suite("hang", "good")
    first = fake.start("--time-limit", "4")
    fake.wait_for_attempt("hang")
    second = fake.run()
    assert second.returncode == 2 and second.stderr.count("\n") == 1
    assert "another harness is running in" in second.stderr
    first.communicate(timeout=20)
    assert set(fake.records()) == {("good", 1)} and len(fake.attempts("good")) == 1


def test_what_a_killed_harness_left_running_is_ended(fake):
    """Two processes in one run directory would spoil it."""
    fake.suite("hang")
    harness = fake.start()
    fake.wait_for_attempt("hang")
    wait_for(lambda: list(fake.work.glob("*/run/checkpoint.pt")))
    pid = int(next(fake.work.glob("*/pid")).read_text())
    harness.kill()
    harness.communicate()
    assert alive(pid)
    second = fake.run("--time-limit", "1")
    assert not alive(pid)
    assert second.returncode == 1 and fake.attempts("hang") == ["afresh", "resumed"]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["run", "clasic"], "no suite clasic; there are: addition, choices, "),
        (["run", "classic", "--only", "pppo"], "no script pppo in suite classic; there are: "),
        (["run", "classic", "--env", "CartPole-v9"], "no environment CartPole-v9 in suite classic"),
        (["run", "smoke", "--scripts", "tests", "--only", "ppo"], "there is no script ppo.py in"),
        (["run", "smoke", "--jobs", "0"], "argument --jobs: 0 is not above 0"),
        (["run", "smoke", "--seeds", "x"], "argument --seeds: invalid int value: 'x'"),
        (["run", "smoke", "--engine", "cloud"], "invalid choice: 'cloud'"),
        (["walk"], "invalid choice: 'walk'"),
        ([], "required: command"),
        (["report", "/no/such/directory"], "no results"),
        (["report", "pyproject.toml"], "not a directory"),
        (["compare", "nowhere", "nothing.jsonl"], "no results in nowhere"),
        (["random", "CartPole-v9"], "CartPole-v9"),
        (["speed", "nothing"], "no suite nothing"),
        (["speed", "--only", "dqn"], "no script dqn in suite speed"),
        (["speed", "--pairs", "0"], "argument --pairs: 0 is not above 0"),
        (["scaling", "--seeds", "0"], "argument --seeds: 0 is not above 0"),
        (["scaling", "quick"], "npg on CartPole-v1 does not say its num_envs"),
    ],
)
def test_wrong_input_is_one_clear_line(arguments, words, capsys):
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1 and said.startswith("benchmarks: ")


@pytest.mark.parametrize(
    "text, words",
    [
        ("[[task", "odd.toml"),
        ("seeds = 1", "odd.toml: 'task'"),
        ('[[task]]\nscript = "fake"\nenv = "NoSuch-v0"\nsteps = 1', "no environment NoSuch-v0"),
        ('[[task]]\nscript = "fake"\nenv = "CartPole-v1"\nsteps = "many"', "positive integer"),
        ('[[task]]\nscript = "fake"\nenv = "CartPole-v1"\nsteps = 1\nsed = 1', "sed"),
        ('[[task]]\nscript = "fake"\nenv = "CartPole-v1"\nsteps = 1\n' * 2, "listed twice"),
    ],
)
def test_a_wrong_suite_is_one_clear_line(fake, text, words, capsys):
    (fake.path / "odd.toml").write_text(text)
    assert main(fake.command()[3:]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1


def test_a_script_that_does_not_exist_yet_is_skipped(fake, capsys):
    fake.suite("good")
    tasks = '[[task]]\nscript = "later"\nenv = "CartPole-v1"\nsteps = 1\n'
    with open(fake.path / "odd.toml", "a") as file:
        file.write(tasks)
    ended = fake.run()
    assert ended.returncode == 0 and "later: no such script yet" in ended.stdout
    assert set(fake.records()) == {("good", 1)}


# --- Running: the real script ---------------------------------------------------------------------


def lasting(path):
    """What of a results file does not depend on when and how fast it was measured."""
    records = results.read_records(path)
    for record in records:
        for name in ("date", "wall_seconds", "sps", "machine", "commit"):
            del record[name]
        del record["curve"]["seconds"]
    return records


def smoke_command(work):
    return [sys.executable, "-m", "benchmarks", "run", "smoke", "--work", str(work)]


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The smoke suite, run end to end once."""
    work = tmp_path_factory.mktemp("smoke")
    ended = subprocess.run(smoke_command(work), cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return work


def test_smoke_suite_end_to_end(smoke, tmp_path):
    copy = tmp_path / "results"
    shutil.copytree(smoke / "results", copy)
    records = results.read_records(copy / "smoke.jsonl")
    assert [r["seed"] for r in records] == [1, 2]
    for record in records:
        assert record["train_return_last100"] > 35  # random play: 22
        returns, times = record["curve"]["return"], record["curve"]["seconds"]
        assert len(returns) == len(times) == results.GRID and returns[0] is None
        assert times == sorted(times)
        assert times[-1] == pytest.approx(record["wall_seconds"], rel=0.2)
        assert np.mean(returns[-20:]) == pytest.approx(record["train_return_last100"], rel=0.3)
        assert set(record["versions"]) == {"python", "torch", "numpy", "gymnasium"}
    assert main(["report", str(copy)]) == 0
    assert "| CartPole-v1 | ppo | 16,384 | 2 |" in (copy / "report.md").read_text()


def test_killed_harness_gives_the_same_results(smoke, tmp_path):
    """SIGKILL to the harness, first when a run has a checkpoint, then at random moments; its runs
    go on as orphans or were in the middle."""
    moments = [random.uniform(0.5, 5) for _ in range(2)]
    quiet = {"cwd": ROOT, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    for moment in (0, *moments):
        harness = subprocess.Popen(smoke_command(tmp_path), **quiet)
        if not moment:
            wait_for(lambda: list(tmp_path.glob("*/run/checkpoint.pt")))
        time.sleep(moment)
        harness.kill()
        harness.wait()
    assert subprocess.run(smoke_command(tmp_path), **quiet).returncode == 0
    commands = [json.loads(p.read_text())["command"] for p in tmp_path.glob("*/job.json")]
    assert any("--resume" in command for command in commands), moments
    expected = lasting(smoke / "results" / "smoke.jsonl")
    expected = [record for record in expected if record["script"] == "ppo"]
    assert lasting(tmp_path / "results" / "smoke.jsonl") == expected, moments


def test_peer_runs_end_to_end(smoke):
    """Into the same results file, which then holds both."""
    work = smoke
    command = [*smoke_command(work), "--peer", "sb3", "--seeds", "1"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    records = results.read_records(work / "results" / "smoke.jsonl")
    assert [(r["script"], r["seed"]) for r in records] == [("ppo", 1), ("ppo", 2), ("sb3-ppo", 1)]
    ours, _, peer = records
    assert set(ours) == set(peer) and peer["train_return_last100"] > 35
    assert peer["versions"]["stable-baselines3"]
    lines = next(work.glob("*sb3-ppo*/stdout.txt")).read_text()
    assert runner.last_progress(next(work.glob("*sb3-ppo*/stdout.txt"))), lines
