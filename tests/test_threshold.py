"""Seconds until a return is reached: the window of episodes, the clock, and runs that fail."""

import json
import time

import numpy as np
import pytest
from torch.utils.tensorboard import SummaryWriter

from benchmarks import speed, suites, threshold
from benchmarks.__main__ import main


@pytest.mark.parametrize("seed", range(20))
def test_the_level_is_of_the_last_100_episodes(seed):
    """Against the list of all episodes, each with its point's mean."""
    rng = np.random.default_rng(seed)
    counts, lengths = rng.integers(1, 60, 30), rng.integers(5, 50, 30).astype(float)
    returns = np.linspace(0, 100, 30) + rng.normal(0, 20, 30)
    level, expected, episodes = rng.uniform(20, 110), None, []
    for i, count in enumerate(counts):
        episodes += [returns[i]] * count
        if expected is None and len(episodes) >= 100 and np.mean(episodes[-100:]) >= level:
            expected = i
    assert threshold.first_at((counts * lengths).cumsum(), returns, lengths, level) == expected


def test_100_episodes_must_have_ended():
    """However good the first ones are."""
    steps, ones = np.arange(1.0, 51) * 10, np.ones(50)
    assert threshold.first_at(steps, 500 * ones, 10 * ones, 475) is None
    assert threshold.first_at(2 * steps, 500 * ones, 10 * ones, 475) == 49


def test_the_clock_starts_with_the_process(tmp_path):
    writer = SummaryWriter(str(tmp_path))
    for i in range(10):
        for name, value in (("return", 100.0 * i), ("length", 10.0)):
            writer.add_scalar(f"charts/episodic_{name}", value, 1000 * (i + 1), walltime=50.0 + i)
    writer.close()
    assert threshold.reached(tmp_path, 42.0, 500) == {"seconds": 13.0, "steps": 6000}
    assert threshold.reached(tmp_path, 42.0, 901) == {"seconds": None, "steps": None}


def test_a_run_that_never_learns_is_not_left_out():
    assert threshold.median([3.0, None, 5.0]) == "5 [3, never]"
    assert threshold.median([None, None, 5.0]) == "never [5, never]"
    assert threshold.median([3.0, 4.0]) == "4 [3, 4]"


def test_threshold_end_to_end(tmp_path, monkeypatch, capsys):
    """A real run of each side, to a return that random play has."""
    monkeypatch.setattr(threshold, "LEVELS", {"CartPole-v1": 10.0})
    # Without the wait for the compiler: test_speed_end_to_end has that.
    eager = lambda job, directory, _, threads: speed.TimedRun(job, directory, False, threads)
    monkeypatch.setattr(threshold, "TimedRun", eager)
    suite = tmp_path / "small.toml"
    suite.write_text('publish = false\n[[task]]\nscript = "ppo"\nenv = "CartPole-v1"\nsteps = 6000')
    began = time.time()
    command = ["threshold", str(suite), "--seeds", "1", "--work", str(tmp_path), "--results"]
    assert main([*command, str(tmp_path / "results")]) == 0
    (row,) = json.loads((tmp_path / "results/threshold.json").read_text())
    for (run,) in row["runs"].values():
        assert 0 < run["seconds"] < time.time() - began and 1000 < run["steps"] <= 6000
    text = "\n".join(threshold.threshold_section(threshold.read_threshold(tmp_path / "results")))
    assert threshold.threshold_line(row) in text and "| 10 | 1 |" in text
    assert "seed 1, peer" in capsys.readouterr().out


def test_a_run_is_ended_when_it_has_learned(tmp_path, monkeypatch):
    """Not by its lines of progress alone, whose return may be of a few episodes."""
    task = suites.Task("ppo", "CartPole-v1", 200_000)
    job = speed.make_job(task, 1, suites.ROOT)
    began = time.time()
    with speed.TimedRun(job, tmp_path / "side", False, 1) as run:
        run.go_on(threshold.learned(15.0))
        assert not run.ended()
    tmp_path /= "side"
    found = threshold.reached(tmp_path / "run", began, 15.0)
    assert found["seconds"] is not None and not (tmp_path / "run/summary.json").exists()
    assert threshold.last_progress(tmp_path / "stdout.txt")[0] < 100_000
    lines = tmp_path / "stdout.txt"
    assert threshold.learned(15.0)(tmp_path) and not threshold.learned(1e4)(tmp_path)
    monkeypatch.setattr(threshold, "EPISODES", 10**6)
    assert not threshold.learned(15.0)(tmp_path)
    lines.write_text("")
    monkeypatch.setattr(threshold, "EPISODES", 100)
    assert not threshold.learned(15.0)(tmp_path)


def test_a_level_must_be_set(tmp_path, capsys):
    suite = tmp_path / "small.toml"
    suite.write_text('[[task]]\nscript = "ppo"\nenv = "Acrobot-v1"\nsteps = 6000')
    assert main(["threshold", str(suite), "--results", str(tmp_path / "results")]) == 2
    assert "no level is set for Acrobot-v1; there are: CartPole-v1" in capsys.readouterr().err
    assert not (tmp_path / "results").exists() and threshold.threshold_section([]) == []
    assert set(threshold.LEVELS) == {t.env for t in suites.load_suite("threshold").tasks}
