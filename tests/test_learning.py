"""Does it learn? Values that are known, then the thresholds of the real environments."""

import importlib
import json

import numpy as np
import pytest
import torch

from tests.processes import run, start
from tests.test_scripts import toy

CONSTANT = {
    "reinforce": "--bootstrap-truncated --learning-rate 1e-4 --total-timesteps 40000",
    "npg": "--num-steps 32 --total-timesteps 30000",
    "trpo": "--num-steps 32 --total-timesteps 30000",
    "a2c": "--optimizer adam --learning-rate 1e-3 --num-steps 32 --total-timesteps 60000",
    "ppo": "--no-clip-vloss --learning-rate 1e-3 --total-timesteps 40000",
    "ppo_continuous": "--no-clip-vloss --no-norm-reward --learning-rate 1e-3 --num-steps 128 "
    "--total-timesteps 40000",
}


@pytest.mark.parametrize("script", sorted(CONSTANT))
@pytest.mark.parametrize("env", ["Constant", "ConstantLater", "ConstantInPlace"])
def test_a_time_limit_is_not_an_end(env, script, tmp_path):
    """Reward 1 for ever, gamma 0.9, cut every 20 steps: V = 1 / (1 - 0.9) = 10, cut or not.

    ConstantLater starts its episodes where the value is 0.9^10 * 10 = 3.5: whoever bootstraps from
    the observation after the reset instead of the one before it ends far below 10. ConstantInPlace
    does the same with an observation that its reset overwrites.
    """
    module = importlib.import_module(script)
    flags = f"--gamma 0.9 --run-dir {tmp_path} --eval-episodes 1 {CONSTANT[script]}"
    module.main(module.parse_args([*toy(script, env), *flags.split()]))
    args = module.parse_args(["--evaluate", str(tmp_path / "checkpoint.pt")])
    agent = module.Agent(module.make_envs(args), args)
    module.load_checkpoint(args.evaluate, agent)
    assert agent.value(torch.ones(1, 2)).item() == pytest.approx(10, rel=0.05)


def train(tmp_path, script, flags, seeds):
    """The return over the last 100 training episodes of each seed, two runs at a time."""
    dirs = [tmp_path / str(seed) for seed in seeds]
    waiting = list(zip(seeds, dirs))
    running = []
    while waiting or running:
        while waiting and len(running) < 2:
            seed, run_dir = waiting.pop(0)
            flags_of_run = [*flags.split(), "--seed", seed, "--run-dir", run_dir]
            running.append(start(script, *flags_of_run))
        process = running.pop(0)
        _, err = process.communicate()
        assert process.returncode == 0, err
    returns = [json.loads((d / "summary.json").read_text())["train_return_last100"] for d in dirs]
    print(script, flags, returns)
    return returns


@pytest.mark.long
def test_ppo_solves_cartpole_with_every_seed(tmp_path):
    returns = train(tmp_path, "ppo", "", (1, 2, 3))
    assert min(returns) >= 490, returns


@pytest.mark.long
def test_ppo_learns_acrobot(tmp_path):
    returns = train(tmp_path, "ppo", "--env-id Acrobot-v1", (1, 2, 3))
    assert np.mean(returns) >= -90, returns


@pytest.mark.long
@pytest.mark.parametrize(
    "script,least", [("reinforce", 475), ("a2c", 490), ("npg", 490), ("trpo", 490)]
)
def test_the_lower_rungs_learn_cartpole(script, least, tmp_path):
    """The default runs: 500,000 steps of reinforce and a2c, 100,000 of npg and trpo."""
    returns = train(tmp_path, script, "", (1, 2, 3))
    assert np.mean(returns) >= least, returns


@pytest.mark.long
@pytest.mark.parametrize("script", ["a2c", "npg", "trpo"])
def test_the_lower_rungs_learn_acrobot(script, tmp_path):
    flags = "--env-id Acrobot-v1 --total-timesteps 500000"
    returns = train(tmp_path, script, flags, (1, 2, 3))
    assert np.mean(returns) >= -90, returns


SHORT = [("reinforce", 60_000), ("a2c", 120_000), ("trpo", 60_000)]


@pytest.mark.parametrize("script,steps", SHORT)
def test_the_lower_rungs_learn_cartpole_in_the_short_suite(script, steps, tmp_path):
    """Well below what they reach in the end; a policy that learns nothing returns 10 to 25."""
    run(script, "--total-timesteps", steps, "--run-dir", tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["eval_return_mean"] > 300


def test_ppo_learns_cartpole_in_the_short_suite(tmp_path):
    """A fifth of the default run. A policy that learns nothing returns 10 to 25, so that 300 of the
    possible 500 leaves no doubt, and leaves room for the scatter of a run this short."""
    run("ppo", "--total-timesteps", 100_000, "--run-dir", tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["eval_return_mean"] > 300


def test_ppo_continuous_learns_inverted_pendulum_in_the_short_suite(tmp_path):
    """Random play returns 5, 1000 is the most there is; 963 is CleanRL's after 1,000,000 steps."""
    flags = ("--env-id", "InvertedPendulum-v5", "--total-timesteps", 60_000)
    run("ppo_continuous", *flags, "--run-dir", tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["eval_return_mean"] >= 963


@pytest.mark.long
def test_ppo_continuous_learns_pendulum(tmp_path):
    flags = "--env-id Pendulum-v1 --gamma 0.9 --learning-rate 1e-3 --total-timesteps 400000"
    returns = train(tmp_path, "ppo_continuous", flags, (1, 2, 3))
    assert np.mean(returns) >= -200, returns


@pytest.mark.long
def test_ppo_continuous_runs_with_halfcheetah(tmp_path):
    returns = train(tmp_path, "ppo_continuous", "", (1, 2, 3))
    assert np.mean(returns) >= 4000, returns
