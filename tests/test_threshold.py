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
    text = 'publish = false\n[[task]]\nscript = "ppo"\nenv = "CartPole-v1"\nsteps = 60000'
    suite.write_text(text)
    began = time.time()
    command = ["threshold", str(suite), "--seeds", "1", "--work", str(tmp_path), "--results"]
    assert main([*command, str(tmp_path / "results")]) == 0
    (row,) = json.loads((tmp_path / "results/threshold.json").read_text())
    assert not list(tmp_path.glob("threshold/*/run/summary.json"))  # each was ended early
    for (run,) in row["runs"].values():
        assert 0 < run["seconds"] < time.time() - began and 1000 < run["steps"] < 60000
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
    assert threshold.learned(15.0)(tmp_path)
    monkeypatch.setattr(threshold, "EPISODES", 10**6)
    assert not threshold.learned(15.0)(tmp_path)


def test_a_look_is_taken_at_new_lines_alone(tmp_path, monkeypatch):
    looks = []
    monkeypatch.setattr(threshold, "reached", lambda *x: looks.append(x) or {"seconds": None})
    enough, log = threshold.learned(100.0), tmp_path / "stdout.txt"
    assert not enough(tmp_path) and not looks  # no line yet
    for step, value in ((10, 50.0), (20, 100.0), (30, 99.0), (40, 120.0)):
        log.write_text(f"{step} steps, 5%, return {value}, 9 steps/s")
        assert not enough(tmp_path) and not enough(tmp_path)
        assert len(looks) == {10: 0, 20: 1, 30: 1, 40: 2}[step]


def test_a_run_that_writes_meanwhile_can_be_looked_at(tmp_path, monkeypatch):
    """Its points of the three looks need not be as many."""
    points = iter([3, 4, 5])

    def read_scalars(run_dir, tag, times=False):
        n = next(points)
        return np.arange(1.0, n + 1) * 1000, np.full(n, 10.0)

    monkeypatch.setattr(threshold, "read_scalars", read_scalars)
    assert threshold.reached(tmp_path, 4.0, 10.0) == {"seconds": 6.0, "steps": 1000}


def test_a_run_that_crashes_is_not_one_that_never_learns(tmp_path):
    script = tmp_path / "ppo.py"
    script.write_text((suites.ROOT / "ppo.py").read_text().replace("def main(args", "def _(args"))
    task = suites.Task("ppo", "CartPole-v1", 6000)
    with pytest.raises(suites.BenchmarkError, match="ended with status 1"):
        threshold.measure(task, 1, tmp_path / "work", tmp_path, lambda _: None)


def test_a_level_must_be_set(tmp_path, capsys):
    suite = tmp_path / "small.toml"
    suite.write_text('[[task]]\nscript = "ppo"\nenv = "Acrobot-v1"\nsteps = 6000')
    assert main(["threshold", str(suite), "--results", str(tmp_path / "results")]) == 2
    assert "no level is set for Acrobot-v1; there are: CartPole-v1" in capsys.readouterr().err
    assert not (tmp_path / "results").exists() and threshold.threshold_section([]) == []
    assert set(threshold.LEVELS) == {t.env for t in suites.load_suite("threshold").tasks}
