"""The scripts end to end on small settings, mostly as a user starts them: as processes."""

import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.optim.optimizer import register_optimizer_step_pre_hook

from tests.processes import ROOT, run, start, wait_for

PENDULUM = "--env-id InvertedPendulum-v5 --num-envs 4 --num-minibatches 4 --update-epochs 4"
TASK = {
    "reinforce": "--num-envs 4",
    "a2c": "--num-envs 4",
    "npg": "",
    "trpo": "",
    "ppo": "",
    "ppo_continuous": PENDULUM,
}
SCRIPTS = sorted(TASK)
EPISODES = {"reinforce"}  # their iterations are whole episodes, the others' T steps
CONTINUOUS = {"ppo_continuous"}
# Iterations of 4 environments x 64 steps wherever T is a flag.
STEPS = {script: "" if script in EPISODES else "--num-steps 64" for script in SCRIPTS}
LENGTH = "--total-timesteps 3000 --eval-episodes 2 --checkpoint-every 600"
SMALL = {script: f"{TASK[script]} {STEPS[script]} {LENGTH}" for script in SCRIPTS}


def toy(script, env):
    """Flags for an environment of tests/envs.py with actions that the script takes."""
    box = ["--env-kwargs", '{"box":[[-1,2]]}'] if script in CONTINUOUS else []
    return [*TASK[script].split(), "--env-id", f"tests.envs:{env}-v0", *box]


def is_whole(script, steps, total):
    """Rounded down to whole iterations of T steps; what counts episodes ends at the first one that
    reaches the total, at most one iteration of CartPole later."""
    if script in EPISODES:
        return total <= steps < total + 4 * 500
    return steps == total // 256 * 256


def final_state(run_dir):
    """What must repeat bit for bit: parameters, statistics, optimiser, counters, recent returns."""
    checkpoint = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    kept = {k: x for k, x in checkpoint.items() if k not in ("args", "seconds")}
    flat, _ = torch.utils._pytree.tree_flatten(kept)
    return [x.numpy().tobytes() if isinstance(x, torch.Tensor) else x for x in flat]


def curves(run_dir):
    """Every logged (key, step, value), as TensorBoard reads them, without what a clock decides."""
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    keys = [key for key in events.Tags()["scalars"] if key != "charts/SPS"]
    return {key: [(e.step, e.value) for e in events.Scalars(key)] for key in keys}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One finished run of each script, made when first asked for: (directory, stdout)."""
    runs = {}

    def get(script):
        if script not in runs:
            run_dir = tmp_path_factory.mktemp(script) / "run"
            runs[script] = run_dir, run(script, *SMALL[script].split(), "--run-dir", run_dir)[0]
        return runs[script]

    return get


# --- What a run leaves behind ---------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_every_flag(script):
    out, _ = run(script, "--help")
    for name in vars(importlib.import_module(script).Args()):
        assert f"--{name.replace('_', '-')}" in out


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_leaves_summary_curves_and_checkpoint(script, finished):
    run_dir, out = finished(script)
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["args"]["total_timesteps"] == 3000
    assert is_whole(script, summary["steps"], 3000)
    assert (f"rounded down to {summary['steps']}" in out) == (script not in EPISODES)
    assert summary["sps"] == pytest.approx(summary["steps"] / summary["wall_seconds"])
    assert summary["versions"]["torch"] == torch.__version__
    assert 8 < summary["train_return_last100"] < 500 and 8 <= summary["eval_return_mean"] <= 500
    assert {p.name.split(".")[0] for p in run_dir.iterdir()} == {"summary", "checkpoint", "events"}
    last_lines = out.splitlines()[-5:]
    assert f"return {summary['train_return_last100']:.1f}" in last_lines[0]
    assert str(run_dir) in last_lines[2] and "tensorboard --logdir" in last_lines[3]
    assert f"--evaluate {run_dir}/checkpoint.pt" in last_lines[4]
    logged = curves(run_dir)
    steps = [step for step, _ in logged["losses/policy_loss"]]
    if script not in EPISODES:
        assert steps == list(range(256, summary["steps"] + 1, 256))
    for key in ("policy_loss", "value_loss", "entropy", "explained_variance", "grad_norm"):
        assert [step for step, _ in logged[f"losses/{key}"]] == steps
    for key in ("approx_kl", "old_approx_kl", "clipfrac"):
        assert (f"losses/{key}" in logged) == (script in ("ppo", "ppo_continuous"))
    # CartPole pays 1 per step, InvertedPendulum too, save for the one that ends the episode.
    unpaid = 1 if script in CONTINUOUS else 0
    lengths = {step: length - unpaid for step, length in logged["charts/episodic_length"]}
    assert dict(logged["charts/episodic_return"]) == pytest.approx(lengths, rel=1e-6)
    assert logged["eval/episodic_return"][0][0] == summary["steps"]
    rates = [rate for _, rate in logged["charts/learning_rate"]]
    if script in EPISODES:  # of several iterations each
        assert 1 > rates[0] / 3e-3 > 0.9 and (np.diff(rates) < 0).all() and rates[-1] > 0
    elif script in ("npg", "trpo"):  # |s| / |u|, whatever it takes to reach the KL
        assert min(rates) >= 0 and max(rates) > 0
        assert max(x for _, x in logged["losses/quadratic_kl"]) == pytest.approx(0.01, rel=1e-3)
    else:
        remaining = 1 - np.arange(len(steps)) / len(steps)
        np.testing.assert_allclose(rates, rates[0] * remaining, rtol=1e-6)


@pytest.mark.parametrize("script", SCRIPTS)
def test_same_seed_same_bits_and_another_seed_others(script, finished, tmp_path):
    run_dir, _ = finished(script)
    flags = SMALL[script].split()
    run(script, *flags, "--run-dir", tmp_path / "again")
    run(script, *flags, "--run-dir", tmp_path / "other", "--seed", 2)
    assert final_state(tmp_path / "again") == final_state(run_dir)
    assert curves(tmp_path / "again") == curves(run_dir)
    assert final_state(tmp_path / "other") != final_state(run_dir)


@pytest.mark.parametrize("script", SCRIPTS)
def test_runs_alone_in_an_empty_directory_without_git(script, tmp_path):
    shutil.copy(ROOT / f"{script}.py", tmp_path)
    (tmp_path / "bin").mkdir()  # a PATH with a shell and nothing else
    (tmp_path / "bin" / "sh").symlink_to(shutil.which("sh") or "/bin/sh")
    env = {**os.environ, "PATH": str(tmp_path / "bin")}
    flags = [*SMALL[script].split(), *["--env-id", "HalfCheetah-v5"] * (script in CONTINUOUS)]
    command = [sys.executable, f"{script}.py", *flags]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    # MuJoCo warns of HalfCheetah's file, and would write MUJOCO_LOG.TXT.
    assert done.returncode == 0 and not done.stderr
    left = {p.name for p in tmp_path.iterdir()} - {"__pycache__"}
    assert left == {"bin", f"{script}.py", "runs"}
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(rf"[\w-]+__{script}__1__\d{{8}}-\d{{6}}-\d+", run_dir.name)
    assert json.loads((run_dir / "summary.json").read_text())["commit"] is None


@pytest.mark.parametrize("script", SCRIPTS)
def test_importing_a_script_does_nothing(script, tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {script}; print('imported')"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "imported\n" and not list(tmp_path.iterdir())


# --- Checkpoint, resume, evaluate -----------------------------------------------------------------


def saved(run_dir, what="step"):
    try:
        return torch.load(run_dir / "checkpoint.pt", weights_only=True)[what]
    except FileNotFoundError:
        return -1


RESUMED = {
    "reinforce": "--norm-obs --norm-reward --bootstrap-truncated --total-timesteps 20000",
    "a2c": "--norm-obs --norm-reward --optimizer rmsprop --total-timesteps 20000",
    "npg": "--norm-obs --norm-reward --total-timesteps 20000",
    "trpo": "--norm-obs --norm-reward --total-timesteps 20000",
    "ppo": "--norm-obs --norm-reward --kl-coef 1 --adaptive-kl 0.01 --total-timesteps 20000",
    "ppo_continuous": "--squash --ent-coef 0.01 --total-timesteps 20000",
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_killed_and_resumed_is_bit_identical(script, tmp_path):
    flags = [*SMALL[script].split(), *RESUMED[script].split(), "--checkpoint-every", "8000"]
    run(script, *flags, "--run-dir", tmp_path / "whole")
    killed = tmp_path / "killed"
    process = start(script, *flags, "--run-dir", killed)
    wait_for(lambda: saved(killed) > 2560, process)

    def stopped_with_curves_ahead():
        """Of the checkpoint; looked at while the process stands still, lest it run on meanwhile."""
        process.send_signal(signal.SIGSTOP)
        last_step = max(step for points in curves(killed).values() for step, _ in points)
        if last_step > saved(killed):
            return True
        process.send_signal(signal.SIGCONT)
        return False

    wait_for(stopped_with_curves_ahead, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    at = saved(killed)
    assert at > 2560 and not (killed / "summary.json").exists()
    out, _ = run(script, "--resume", killed / "checkpoint.pt")
    first_line = next(line for line in out.splitlines() if " steps," in line)
    assert int(first_line.split()[0]) > at  # it did not begin again
    assert final_state(killed) == final_state(tmp_path / "whole")
    assert curves(killed) == curves(tmp_path / "whole")
    # A finished run resumed has nothing left to do, and changes nothing.
    before = final_state(killed), curves(killed)
    run(script, "--resume", killed / "checkpoint.pt")
    assert (final_state(killed), curves(killed)) == before


@pytest.mark.parametrize("script", SCRIPTS)
def test_resume_refuses_another_run_but_may_go_on_longer(script, finished, tmp_path):
    copied = tmp_path / "run"
    shutil.copytree(finished(script)[0], copied)
    resume = ("--resume", copied / "checkpoint.pt")
    before = {p.name: p.read_bytes() for p in copied.iterdir()}
    changes = [("--gamma", "0.5"), ("--env-id", "Acrobot-v1"), ("--total-timesteps", "2000")]
    for flags in [*changes, ("--evaluate", copied / "checkpoint.pt")]:
        _, err = run(script, *resume, *flags, status=2)
        assert flags[0].strip("-").replace("-", "_") in err.replace("-", "_")
        assert err.count("\n") == 1
    assert before == {p.name: p.read_bytes() for p in copied.iterdir()}
    run(script, *resume, "--total-timesteps", "4000")
    assert is_whole(script, json.loads((copied / "summary.json").read_text())["steps"], 4000)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("number,status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_says_how_to_go_on(script, number, status, tmp_path):
    run_dir = tmp_path / "run"
    process = start(script, "--run-dir", run_dir, "--checkpoint-every", 1000)
    wait_for(lambda: saved(run_dir) > 2, process)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == status
    assert "Traceback" not in err
    line = err.strip().splitlines()[-1]
    assert line.endswith(f"python {script}.py --resume {run_dir}/checkpoint.pt")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_flag_given_at_its_default_is_not_overlooked(script, tmp_path):
    """Trained with gamma 0.9; --resume --gamma 0.99 must not pass because 0.99 is the default."""
    run_dir = tmp_path / "run"
    run(script, *SMALL[script].split(), "--gamma", 0.9, "--run-dir", run_dir)
    for flag in ("--resume", "--evaluate"):
        _, err = run(script, flag, run_dir / "checkpoint.pt", "--gamma", 0.99, status=2)
        assert "gamma 0.99" in err and "0.9\n" in err


@pytest.mark.parametrize("script", SCRIPTS)
def test_evaluate_plays_the_saved_agent(script, finished):
    run_dir, _ = finished(script)
    before = {p.name: p.read_bytes() for p in run_dir.iterdir()}
    out, _ = run(script, "--evaluate", run_dir / "checkpoint.pt", "--eval-episodes", 2)
    summary = json.loads((run_dir / "summary.json").read_text())
    assert f"return {summary['eval_return_mean']:.1f} +- {summary['eval_return_std']:.1f}" in out
    assert before == {p.name: p.read_bytes() for p in run_dir.iterdir()}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_reloaded_agent_acts_to_the_bit(script, tmp_path):
    """Two fresh processes give the same policy for the same observations, statistics included."""
    length = f"{STEPS[script]} {LENGTH} --norm-obs --norm-reward"
    flags = [*toy(script, "Noisy"), *length.split()]
    run(script, *flags, "--run-dir", tmp_path / "run", env={**os.environ, "PYTHONPATH": str(ROOT)})
    code = f"""
import torch, {script} as s
torch.set_num_threads(1)
args = s.parse_args(["--evaluate", {str(tmp_path / "run" / "checkpoint.pt")!r}])
agent = s.Agent(s.make_envs(args), args)
s.load_checkpoint(args.evaluate, agent)
torch.manual_seed(5)
obs = torch.randn(64, 2) * torch.tensor([1.0, 50.0])
outputs = agent.actor(agent.normalize(obs)).detach()  # logits or means
print(outputs.numpy().tobytes().hex(), agent.return_stats.var.item())
print(agent.obs_stats.std.tolist())
"""
    command = [sys.executable, "-c", code]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    outputs = {subprocess.check_output(command, cwd=tmp_path, env=env, text=True) for _ in range(2)}
    assert len(outputs) == 1
    std = json.loads(outputs.pop().splitlines()[-1])
    np.testing.assert_allclose(std, [1, 50], rtol=0.1)


@pytest.mark.parametrize("script", SCRIPTS)
def test_video(script, finished, tmp_path):
    pytest.importorskip("moviepy")
    shutil.copytree(finished(script)[0], tmp_path / "run")
    flags = ("--evaluate", tmp_path / "run" / "checkpoint.pt", "--capture-video")
    env = {**os.environ, "SDL_VIDEODRIVER": "dummy"}
    process = start(script, *flags, "--eval-episodes", 1, env=env)
    _, err = process.communicate()
    if process.returncode == 2:  # MuJoCo draws by EGL or OSMesa, which a machine may lack
        assert script in CONTINUOUS and "MUJOCO_GL" in err and err.count("\n") == 1
        return
    assert process.returncode == 0, err
    assert [p.suffix for p in (tmp_path / "run" / "videos").iterdir()] == [".mp4"]


# --- Flags that change the update -----------------------------------------------------------------

REAL = "--env-id tests.envs:Bounded-v0 --env-kwargs "
FLAGS = {
    "reinforce": (
        "--step-rule gradient --learning-rate 1e-3 --lr-schedule constant",
        "--step-rule clip-norm --lr-schedule robbins-monro --robbins-monro-k0 2",
        "--step-rule clip-value --baseline mean --norm-adv none",
        "--step-rule restricted --baseline none --no-reward-to-go",
        "--bootstrap-truncated --ent-coef 0.01 --norm-obs --norm-reward",
        "--num-envs 1 --num-episodes 2 --env-id Acrobot-v1 --gamma 1",
        REAL + '{"box":[[-0.1,3],[0,Infinity]]}',
        "--env-id InvertedPendulum-v5 --norm-obs --norm-reward",
    ),
    "npg": (
        "--step-rule fixed --learning-rate 0.01",
        "--fisher explicit --hidden-size 8",
        "--fisher diagonal --fisher-fraction 0.25",
        "--cg-iters 1 --cg-damping 0 --no-anneal-lr --norm-adv none",
        REAL + '{"box":[[-0.1,3],[0,Infinity]]} --norm-obs --norm-reward',
    ),
    "trpo": (
        "--backtrack-iters 1 --max-kl 1",
        "--env-id Acrobot-v1",
        "--env-id InvertedPendulum-v5 --norm-obs --norm-reward",
    ),
    "a2c": (
        "--optimizer rmsprop --norm-adv batch --ent-coef 0.01",
        "--optimizer adam --no-anneal-lr --gae-lambda 0.95",
        "--num-envs 1 --num-steps 1 --norm-adv batch",  # a batch of one
        "--env-id Acrobot-v1 --hidden-size 8 --gamma 1 --gae-lambda 0",
        REAL + '{"box":[[-0.1,3],[0,Infinity]]} --norm-obs --norm-reward',
        "--env-id InvertedPendulum-v5 --norm-obs --norm-reward --log-std-init -1",
    ),
    "ppo": (
        "--clip-coef None --kl-coef 1",
        "--clip-coef None --no-clip-vloss",
        "--kl-coef 0.1 --adaptive-kl 0.01",
        "--target-kl 0.01 --anneal-clip --no-anneal-lr",
        "--norm-adv batch --no-clip-vloss --recompute-adv",
        "--norm-adv none --norm-obs --norm-reward",
        "--num-envs 1 --num-steps 8 --num-minibatches 8",  # minibatches of one
        "--env-id Acrobot-v1 --hidden-size 8 --gamma 1 --gae-lambda 0",
        '--env-kwargs {"sutton_barto_reward":true}',
    ),
    "ppo_continuous": (
        "--squash --ent-coef 0.01",
        "--clip-coef None --kl-coef 0.1 --adaptive-kl 10",
        "--no-norm-obs --no-norm-reward --log-std-init -1 --clip-vloss --no-recompute-adv",
        "--env-id MountainCarContinuous-v0 --num-envs 1 --num-steps 8 --num-minibatches 8",
        '--env-id tests.envs:Bounded-v0 --env-kwargs {"box":[[-0.1,3],[0,Infinity]]}',
        '--env-id tests.envs:Bounded-v0 --env-kwargs {"box":[[-Infinity,Infinity],[-3e38,3e38]]}',
        '--env-id tests.envs:Bounded-v0 --env-kwargs {"box":[[-1,9]],"dtype":"float64"} --squash',
        '--env-id tests.envs:Bounded-v0 --env-kwargs {"box":[[5,9],[0,1e-5]]} --squash',
    ),
}


@pytest.mark.parametrize("script,flags", [(s, f) for s, all_ in FLAGS.items() for f in all_])
def test_every_choice_runs_and_stays_finite(script, flags, tmp_path):
    module = importlib.import_module(script)
    small = f"{TASK[script]} {STEPS[script]} --total-timesteps 1024 --eval-episodes 1 {flags}"
    module.main(module.parse_args([*small.split(), "--run-dir", str(tmp_path)]))
    state, _ = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["state"]
    assert all(x.isfinite().all() for x in state.values())
    logged = curves(tmp_path)
    if script in ("ppo", "ppo_continuous") and "--adaptive-kl" not in flags:
        beta = float(flags.split("--kl-coef ")[1].split()[0]) if "--kl-coef" in flags else 0
        assert all(x == pytest.approx(beta) for _, x in logged["losses/kl_coef"])
    if "--adaptive-kl" in flags:
        betas = [beta for _, beta in logged["losses/kl_coef"]]
        assert betas == pytest.approx([0.1 / 2 ** (i + 1) for i in range(4)])  # far below target


@pytest.fixture
def steps_taken():
    """Of every optimiser's step from here on: how many parameters, and the gradient's norm."""
    taken = []

    def note(optimizer, _args, _kwargs):
        (flat,) = optimizer.param_groups[0]["params"]
        taken.append((flat.numel(), flat.grad.norm().item()))

    handle = register_optimizer_step_pre_hook(note)
    yield taken
    handle.remove()


@pytest.mark.parametrize("script", ["a2c", "ppo", "ppo_continuous"])
def test_the_gradient_that_is_followed_is_clipped_and_its_norm_was_logged(
        script, steps_taken, tmp_path):
    module = importlib.import_module(script)
    small = f"{TASK[script]} {STEPS[script]} --total-timesteps 1024 --eval-episodes 1".split()
    logged = {}
    for longest in ("1e-3", "1e9"):
        run_dir = tmp_path / longest
        args = module.parse_args([*small, "--max-grad-norm", longest, "--run-dir", str(run_dir)])
        module.main(args)
        logged[longest] = [norm for _, norm in curves(run_dir)["losses/grad_norm"]]
        norms = np.array([norm for _, norm in steps_taken]).reshape(len(logged[longest]), -1)
        if longest == "1e-3":  # never reached from below: all are scaled, to this
            np.testing.assert_allclose(norms, 1e-3, rtol=1e-2)
        else:  # nothing is scaled, up neither: what was logged is what was followed
            np.testing.assert_allclose(norms.mean(1), logged[longest], rtol=1e-4)
        steps_taken.clear()
    assert min(logged["1e-3"]) > 1e-2
    if script == "a2c":  # the first gradient is the same in both
        assert logged["1e-3"][0] == pytest.approx(logged["1e9"][0], rel=1e-5)


@pytest.mark.parametrize("script", ["reinforce", "npg", "trpo"])
def test_the_critic_steps_along_one_minibatchs_gradient(script, steps_taken, tmp_path):
    """Of a critic that hardly moves, each epoch on the whole batch finds the same gradient; were it
    not set back to 0, it would grow by that."""
    module = importlib.import_module(script)
    small = f"{TASK[script]} {STEPS[script]} --total-timesteps 1024 --eval-episodes 1"
    small += " --value-learning-rate 1e-12 --num-minibatches 1 --value-epochs 4"
    module.main(module.parse_args([*small.split(), "--run-dir", str(tmp_path)]))
    critic = 4 * 64 + 64 + 64 * 64 + 64 + 64 + 1
    norms = np.array([norm for count, norm in steps_taken if count == critic]).reshape(-1, 4)
    assert len(norms) > 0 and norms.min() > 0
    np.testing.assert_allclose(norms, norms[:, :1].repeat(4, 1), rtol=1e-3)


@pytest.mark.parametrize("target,epochs", [("1e-12", 1), ("1e6", 4)])
def test_target_kl_skips_the_epochs_that_are_left(target, epochs, monkeypatch, tmp_path):
    import ppo

    steps = []
    adam_step = torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: steps.append(adam_step(self)))
    flags = f"--total-timesteps 1536 --eval-episodes 1 --target-kl {target} --run-dir {tmp_path}"
    ppo.main(ppo.parse_args(flags.split()))
    assert len(steps) == 3 * epochs * 4  # iterations, epochs, minibatches


@pytest.mark.parametrize("script", ["ppo", "ppo_continuous"])
@pytest.mark.parametrize("flag,times", [("--recompute-adv", 4), ("--no-recompute-adv", 1)])
def test_advantages_are_those_of_the_critic_before_each_epoch(
    script, flag, times, monkeypatch, tmp_path
):
    """What the loss is given in an epoch is what the critic of that moment says."""
    module = importlib.import_module(script)
    estimate, total_loss = module.estimate_advantages, module.total_loss
    estimates, given = [], []

    def record(agent, obs, *rest):
        advantages, returns, values = estimate(agent, obs, *rest)
        estimates.append(returns.flatten().sort().values)
        if len(estimates) > 1:
            assert not torch.equal(estimates[-1], estimates[-2])
        return advantages, returns, values

    def collect(agent, minibatch, *rest):
        given.append(minibatch[4])
        return total_loss(agent, minibatch, *rest)

    monkeypatch.setattr(module, "estimate_advantages", record)
    monkeypatch.setattr(module, "total_loss", collect)
    flags = f"{TASK[script]} --num-steps 64 --total-timesteps 256 --eval-episodes 1 {flag}"
    module.main(module.parse_args([*flags.split(), "--run-dir", str(tmp_path)]))
    assert len(estimates) == times and len(given) == 16
    for epoch in range(4):
        seen = torch.cat(given[4 * epoch : 4 * epoch + 4]).sort().values
        assert torch.equal(seen, estimates[epoch if times > 1 else 0])


def test_logged_losses_are_means_over_all_minibatches(monkeypatch, tmp_path):
    """Of every epoch too, not those of the last minibatch: recorded here call by call."""
    import ppo

    seen = []

    def pretend_to_compile(function):
        def record(*args):
            loss, metrics = function(*args)
            seen.append(metrics.tolist())
            return loss, metrics

        return record

    monkeypatch.setattr(torch, "compile", pretend_to_compile)
    ppo.main(ppo.parse_args([*SMALL["ppo"].split(), "--compile", "--run-dir", str(tmp_path)]))
    means = np.array(seen).reshape(11, 16, len(ppo.METRICS)).mean(1)
    logged = curves(tmp_path)
    for k, name in enumerate(ppo.METRICS):
        values = [value for _, value in logged[f"losses/{name}"]]
        np.testing.assert_allclose(values, means[:, k], rtol=1e-4, atol=1e-7)


def test_an_annealed_clip_is_a_tensor_that_falls_to_zero(monkeypatch, tmp_path):
    """Inductor can freeze the value of a Python float in clamp: eps would stay where it was."""
    import ppo

    seen = []

    def pretend_to_compile(function):
        def record(agent, minibatch, clip_coef, *rest):
            seen.append(clip_coef)
            return function(agent, minibatch, clip_coef, *rest)

        return record

    monkeypatch.setattr(torch, "compile", pretend_to_compile)
    flags = [*SMALL["ppo"].split(), "--anneal-clip", "--compile", "--run-dir", str(tmp_path)]
    ppo.main(ppo.parse_args(flags))
    assert all(isinstance(eps, torch.Tensor) for eps in seen)
    per_iteration = np.array([eps.item() for eps in seen]).reshape(11, 16)
    expected = 0.2 * (1 - np.arange(11) / 11)
    np.testing.assert_allclose(per_iteration, expected[:, None].repeat(16, 1), rtol=1e-6)


@pytest.mark.long
def test_compiled_loss_equals_the_eager_one(monkeypatch):
    """Values and gradients, as eps and beta change from call to call."""
    import ppo
    from tests.test_math import small_agent

    agent, args = small_agent(norm_adv="none")
    _, grad = ppo.flatten_parameters(agent)
    obs, actions = torch.randn(128, 3), torch.randint(4, (128,))
    old_logprobs = (agent.policy(obs).log_prob(actions) + 0.3 * torch.randn(128)).detach()
    batch = obs, actions, old_logprobs, *torch.randn(3, 128)
    compiled, losses = torch.compile(ppo.total_loss), []
    for eps, beta in ((0.2, 1.0), (0.15, 2.0), (0.1, 4.0), (0.02, 8.0)):
        for function in (ppo.total_loss, compiled):
            loss, metrics = function(agent, batch, torch.tensor(eps), beta, args)
            grad.zero_()
            loss.backward()
            losses.append(torch.cat([loss.detach().view(1), metrics, grad]))
        torch.testing.assert_close(losses[-1], losses[-2], rtol=1e-4, atol=1e-5)
    assert (losses[0] - losses[-1]).abs().max() > 0.1


# --- Bad input: one clear line, exit status 2, nothing written ------------------------------------

BAD_FLAGS = [
    ("--env-id CartPol-v1", "CartPole"),
    ("--env-id CartPole-v9", "v1"),
    ("--env-id nomodule:X-v0", "nomodule"),
    ("--env-kwargs {not-json}", "env-kwargs"),
    ("--env-kwargs []", "not a mapping"),
    ('--env-kwargs {"gravity_":1}', "gravity_"),
    ("--env-id tests.envs:Image-v0", "flat"),
    ("--env-id tests.envs:Dictionary-v0", "flat"),
    ("--env-id tests.envs:ManyActions-v0", "Discrete(n)"),
    ("--env-id tests.envs:StartsAtOne-v0", "starts at 0"),
    ("--env-id tests.envs:Continuous-v0", "use ppo_continuous.py"),
    ("--num-minibatches 3", "divide"),
    ("--num-envs 0", "above 0"),
    ("--num-steps -1", "above 0"),
    ("--total-timesteps 0", "above 0"),
    ("--total-timesteps 100", "one iteration"),
    ("--update-epochs 0", "above 0"),
    ("--hidden-size 0", "above 0"),
    ("--num-threads 0", "above 0"),
    ("--eval-episodes 0", "above 0"),
    ("--checkpoint-every 0", "above 0"),
    ("--learning-rate 0", "above 0"),
    ("--learning-rate nan", "above 0"),
    ("--learning-rate inf", "above 0"),
    ("--clip-coef 0", "above 0"),
    ("--clip-coef -0.1", "above 0"),
    ("--max-grad-norm 0", "above 0"),
    ("--target-kl 0", "above 0"),
    ("--ent-coef -1", "at least 0"),
    ("--vf-coef -1", "at least 0"),
    ("--kl-coef -1", "at least 0"),
    ("--seed -1", "at least 0"),
    ("--gamma 1.1", "[0, 1]"),
    ("--gamma nan", "[0, 1]"),
    ("--gae-lambda -0.1", "[0, 1]"),
    ("--adaptive-kl 0.01", "--kl-coef"),
    ("--seed 99999999999999999999999", "2**31"),
    ("--num-threads 99999999999", "at most"),
    ("--eval-episodes 1000000000000", "2**31"),
    ("--resume=", "no checkpoint"),
    ("--evaluate=", "no checkpoint"),
    ("--resume nowhere.pt", "nowhere.pt"),
    ("--evaluate nowhere.pt", "nowhere.pt"),
]


def refused(script, flags, monkeypatch, tmp_path, capsys):
    """Run in this process in an empty directory; returns the one line that it ended with."""
    module = importlib.import_module(script)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as stopped:
        module.main(module.parse_args(flags))
    assert stopped.value.code == 2
    assert sorted(tmp_path.rglob("*")) == before
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith(f"{script}.py: ")
    return err


BOUNDED = "--env-id tests.envs:Bounded-v0 --env-kwargs "
BAD_FLAGS_CONTINUOUS = [
    ("--env-id CartPole-v1", "use ppo.py"),
    ("--env-id tests.envs:ManyActions-v0", "Box(n,)"),
    ("--env-id tests.envs:Matrix-v0", "Box(n,)"),
    ("--env-id tests.envs:Integers-v0", "Box(n,)"),
    (BOUNDED + '{"box":[[-1,1]],"dtype":"float16"}', "float Box(n,)"),
    ("--env-id tests.envs:Image-v0", "flat"),
    (BOUNDED + '{"box":[[-1,1],[0,Infinity]]} --squash', "finite bounds"),
    (BOUNDED + '{"box":[[-1,1],[-Infinity,0]]} --squash', "finite bounds"),
    (BOUNDED + '{"box":[[-1,1],[2,2]]} --squash', "finite bounds"),
    ("--log-std-init nan", "[-10, 2]"),
    ("--log-std-init 2.1", "[-10, 2]"),
    ("--num-minibatches 3", "divide"),
]


BOTH = "Discrete(n) that starts at 0 and float Box(n,)"
BAD_FLAGS_BOTH = [
    ("--env-id tests.envs:ManyActions-v0", BOTH),
    ("--env-id tests.envs:StartsAtOne-v0", BOTH),
    ("--env-id tests.envs:Matrix-v0", BOTH),
    ("--env-id tests.envs:Integers-v0", BOTH),
    ("--env-id tests.envs:Image-v0", "flat"),
    ("--log-std-init 2.1", "[-10, 2]"),
    ("--learning-rate 0", "above 0"),
]
BAD_FLAGS_OF = {
    "reinforce": [
        *BAD_FLAGS_BOTH,
        ("--baseline mean --num-envs 1", "take two or more"),
        ("--baseline none --bootstrap-truncated", "--baseline value"),
        ("--num-episodes 0", "above 0"),
        ("--robbins-monro-k0 0", "above 0"),
        ("--max-grad 0", "above 0"),
        ("--step-eps -1", "above 0"),
        ("--value-epochs 0", "above 0"),
        ("--value-learning-rate nan", "above 0"),
    ],
    "npg": [
        *BAD_FLAGS_BOTH,
        ("--fisher explicit", "at most 1000 parameters"),
        ("--fisher-fraction 0", "(0, 1]"),
        ("--max-kl 0", "above 0"),
        ("--cg-damping -1", "at least 0"),
        ("--cg-iters 0", "above 0"),
    ],
    "trpo": [("--backtrack-coef 1", "(0, 1)"), ("--backtrack-iters 0", "above 0")],
    "a2c": [
        *BAD_FLAGS_BOTH,
        ("--rmsprop-alpha 1.5", "[0, 1]"),
        ("--optimizer-eps 0", "above 0"),
        ("--total-timesteps 39", "one iteration"),
    ],
}


BAD_FLAGS_OF_EACH = [(s, *x) for s, xs in BAD_FLAGS_OF.items() for x in xs]


@pytest.mark.parametrize("script,flags,words", BAD_FLAGS_OF_EACH)
def test_refuses(script, flags, words, monkeypatch, tmp_path, capsys):
    assert words in refused(script, flags.split(), monkeypatch, tmp_path, capsys)


@pytest.mark.parametrize("flags,words", BAD_FLAGS)
def test_ppo_refuses(flags, words, monkeypatch, tmp_path, capsys):
    assert words in refused("ppo", flags.split(), monkeypatch, tmp_path, capsys)


@pytest.mark.parametrize("flags,words", BAD_FLAGS_CONTINUOUS)
def test_ppo_continuous_refuses(flags, words, monkeypatch, tmp_path, capsys):
    assert words in refused("ppo_continuous", flags.split(), monkeypatch, tmp_path, capsys)


def test_without_mujoco_it_says_how_to_install_it(tmp_path):
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
sys.modules["mujoco"] = None  # import mujoco now fails as if it were not there
import ppo_continuous
ppo_continuous.main(ppo_continuous.parse_args([]))
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and not list(tmp_path.iterdir())
    assert done.stderr.count("\n") == 1 and 'pip install "gymnasium[mujoco]"' in done.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_cuda_absent_and_moviepy_missing(script, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "cpu" in refused(script, ["--device", "cuda"], monkeypatch, tmp_path, capsys)
    monkeypatch.setitem(sys.modules, "moviepy", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "moviepy" in refused(script, ["--capture-video"], monkeypatch, tmp_path, capsys)


@pytest.mark.parametrize("script", SCRIPTS)
def test_auto_takes_cuda_for_wide_networks_alone(script, monkeypatch):
    module = importlib.import_module(script)
    taken = lambda **flags: module.check_args(module.Args(**flags)).type
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for width, device in ((64, "cpu"), (256, "cpu"), (257, "cuda"), (1024, "cuda")):
        assert taken(hidden_size=width) == device
        assert taken(hidden_size=width, device="cuda") == "cuda"
        assert taken(hidden_size=width, device="cpu") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert taken(hidden_size=1024) == "cpu"


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_directory_that_cannot_be(script, finished, monkeypatch, tmp_path, capsys):
    run_dir, _ = finished(script)
    flags = ["--run-dir", str(run_dir)]
    assert "already holds a run" in refused(script, flags, monkeypatch, tmp_path, capsys)
    (tmp_path / "file").write_text("mine")
    for path in ("file", "file/below", "/proc/run"):
        line = refused(script, ["--run-dir", path], monkeypatch, tmp_path, capsys)
        assert "cannot write" in line and path in line
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("script", SCRIPTS)
def test_checkpoints_that_are_not(script, finished, monkeypatch, tmp_path, capsys):
    good = (finished(script)[0] / "checkpoint.pt").read_bytes()
    checkpoint = torch.load(finished(script)[0] / "checkpoint.pt", weights_only=True)
    names = ("empty", "text", "half", "flip", "other", "script", "version", "network", "bomb")
    files = {name: tmp_path / name / "checkpoint.pt" for name in names}
    for path in files.values():
        path.parent.mkdir()
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 1
    files["empty"].write_bytes(b"")
    files["text"].write_bytes(b"hello")
    files["half"].write_bytes(good[: len(good) // 2])
    files["flip"].write_bytes(flipped)
    torch.save({"weights": torch.zeros(3)}, files["other"])
    torch.save({**checkpoint, "script": "sac"}, files["script"])
    torch.save({**checkpoint, "args": {"gamma": 0.9}}, files["version"])
    state = [{k: torch.zeros(3) for k in checkpoint["state"][0]}, checkpoint["state"][1]]
    torch.save({**checkpoint, "state": state}, files["network"])

    class Bomb:
        def __reduce__(self):
            return Path.touch, (tmp_path / "exploded",)

    torch.save({**checkpoint, "extra": Bomb()}, files["bomb"])
    words = {"script": "sac", "version": "version", "network": "networks"}
    for flag in ("--resume", "--evaluate"):
        for name, path in files.items():
            line = refused(script, [flag, str(path)], monkeypatch, tmp_path, capsys)
            assert str(path) in line and words.get(name, "damaged") in line
    shutil.copy(finished(script)[0] / "checkpoint.pt", tmp_path / "renamed.pt")
    line = refused(script, ["--resume", "renamed.pt"], monkeypatch, tmp_path, capsys)
    assert "checkpoint.pt" in line


@pytest.mark.parametrize("script", SCRIPTS)
def test_tyro_refuses_an_unknown_flag_with_status_2(script, tmp_path):
    _, err = run(script, "--gama", 0.9, status=2, cwd=tmp_path)
    assert "--gama" in err and "Traceback" not in err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("env,step", [("NanObservation", 41 * 4), ("NanReward", 41 * 4)])
def test_data_that_is_not_finite_stops_the_run(script, env, step, tmp_path):
    flags = [*toy(script, env), "--run-dir", tmp_path / "run", *STEPS[script].split()]
    env_vars = {**os.environ, "PYTHONPATH": str(ROOT)}
    _, err = run(script, *flags, status=1, env=env_vars)
    (line,) = err.strip().splitlines()
    assert f"not finite at step {step}" in line and "checkpoint.pt" in line
    assert saved(tmp_path / "run") == 0
