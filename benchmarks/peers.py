"""The same task with Stable-Baselines3, its hyperparameters taken from the script's Args.

It writes a run directory as the scripts do (TensorBoard keys, progress lines, summary.json), so the
harness treats it the same way, except that an interrupted peer starts again. What stays different:

- SB3's clipped value loss is the error of the clipped value, not the larger of the two errors, and
  its gradient is therefore 0 outside the clip.
- VecNormalize moves the observation statistics at every step, the scripts at every iteration.
- ppo_continuous estimates its advantages anew before each epoch (recompute_adv), SB3 never does.
- the scripts end the open episodes at every checkpoint, SB3 never does.
- A2C: SB3 has torch's RMSprop where a2c.py's default is TensorFlow's.
- TRPO: the critic's Adam has SB3's eps, 1e-8 for 1e-5; the line search measures KL(pi, pi_old), the
  script KL(pi_old, pi); conjugate gradient starts at random and ends by an absolute residual. And
  of real-valued actions it takes the mean KL over their d dimensions where the KL is the sum: its
  delta and its damping are in truth d times what it is given (the suite choices_trpo has trpo so).
"""

import argparse
import importlib.util
import inspect
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.suites import BenchmarkError, digest, normal_form


def script_args(script: Path, flags: dict[str, Any]) -> Any:
    """The script's Args with its defaults, and the task's flags over them."""
    spec = importlib.util.spec_from_file_location(f"peer_of_{script.stem}", script)
    assert spec and spec.loader
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    # TOML has no None: a suite writes it as the command line does.
    flags = {name.replace("-", "_"): None if x == "None" else x for name, x in flags.items()}
    try:
        return module.Args(**flags)
    except TypeError as error:
        raise BenchmarkError(f"{script.name}: {error}") from None


def peer_settings(script: Path, flags: dict[str, Any]) -> dict[str, Any]:
    """What the peer is given, as plain values; flags without a counterpart are refused, except for
    the differences that the module's docstring lists."""
    args = script_args(script, flags)
    has = lambda name: getattr(args, name, None)
    for name in ("kl_coef", "adaptive_kl", "target_kl", "compile", "squash"):
        if has(name):
            raise BenchmarkError(f"--peer sb3 has no counterpart of {script.stem}'s {name}")
    kwargs = {"n_steps": args.num_steps, "gamma": args.gamma, "gae_lambda": args.gae_lambda}
    settings = {
        "kwargs": kwargs,
        "learning_rate": args.learning_rate,
        "anneal_lr": bool(has("anneal_lr")),
        "num_envs": args.num_envs,
        "env_kwargs": json.loads(args.env_kwargs),
        "norm_obs": args.norm_obs,
        "norm_reward": args.norm_reward,
        "hidden_size": args.hidden_size,
        "eval_episodes": args.eval_episodes,
    }
    if has("log_std_init") is not None:
        settings["log_std_init"] = args.log_std_init
    if script.stem in ("ppo", "ppo_continuous", "a2c"):
        kwargs["ent_coef"] = args.ent_coef
        kwargs["max_grad_norm"] = args.max_grad_norm
        kwargs["vf_coef"] = args.vf_coef / 2  # SB3's value loss has no 1/2
    if script.stem in ("ppo", "ppo_continuous"):
        if args.norm_adv == "batch" or args.clip_coef is None:
            raise BenchmarkError("--peer sb3 cannot normalise per batch, nor go without a clip")
        kwargs["batch_size"] = args.num_envs * args.num_steps // args.num_minibatches
        kwargs["n_epochs"] = args.update_epochs
        kwargs["normalize_advantage"] = args.norm_adv == "minibatch"
        clips = {"clip_range": args.clip_coef}
        clips |= {"clip_range_vf": args.clip_coef} if args.clip_vloss else {}
        return settings | {"algorithm": "PPO", "clips": clips, "anneal_clip": args.anneal_clip}
    if script.stem == "a2c":
        if (args.rmsprop_alpha, args.optimizer_eps) != (0.99, 1e-5):
            raise BenchmarkError("--peer sb3 has 0.99 and 1e-5 for rmsprop_alpha and optimizer_eps")
        kwargs["use_rms_prop"] = args.optimizer != "adam"
        kwargs["normalize_advantage"] = args.norm_adv != "none"
        return settings | {"algorithm": "A2C"}
    if script.stem == "trpo":
        if (args.step_rule, args.fisher, args.fisher_fraction) != ("kl", "cg", 1.0):
            raise BenchmarkError("--peer sb3 has the KL step by conjugate gradient alone")
        kwargs |= {"target_kl": args.max_kl, "cg_max_steps": args.cg_iters}
        kwargs |= {"cg_damping": args.cg_damping, "n_critic_updates": args.value_epochs}
        kwargs["batch_size"] = args.num_envs * args.num_steps // args.num_minibatches
        kwargs["line_search_shrinking_factor"] = args.backtrack_coef
        kwargs["line_search_max_iter"] = args.backtrack_iters
        kwargs["normalize_advantage"] = args.norm_adv != "none"
        return settings | {"algorithm": "TRPO", "learning_rate": args.value_learning_rate}
    raise BenchmarkError(f"--peer sb3 has no counterpart of {script.stem}.py")


def peer_hash(settings: dict[str, Any]) -> str:
    """Of what is passed to the peer and of the code that runs it, not of the script."""
    return digest([settings, normal_form(inspect.getsource(train))])


def train(env_id: str, seed: int, total_steps: int, settings: dict[str, Any], run: Any) -> Any:
    """Train a peer and return it; run.iteration(step, episode returns and lengths) logs."""
    import gymnasium
    import sb3_contrib
    import stable_baselines3
    import torch
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecNormalize

    class Log(BaseCallback):
        """Log after each update, as the scripts do; SB3 calls back at the next rollout's start."""

        def __init__(self):
            super().__init__()
            self.ended: list[dict[str, Any]] = []

        def _on_step(self) -> bool:
            infos = self.locals["infos"]
            self.ended += [info["episode"] for info in infos if "episode" in info]
            return True

        def _on_rollout_start(self) -> None:
            if self.num_timesteps:
                run.iteration(self.num_timesteps, [(e["r"], e["l"]) for e in self.ended])
                self.ended = []

        def _on_training_end(self) -> None:
            self._on_rollout_start()

    kwargs, num_envs = dict(settings["kwargs"]), settings["num_envs"]
    iterations = total_steps // (kwargs["n_steps"] * num_envs)

    def schedule(value: float, anneal: bool) -> Any:
        # SB3 counts an iteration as done before its update: its schedule would begin one late and
        # spend the last update at 0.
        return (lambda remaining: value * (remaining + 1 / iterations)) if anneal else value

    kwargs["learning_rate"] = schedule(settings["learning_rate"], settings["anneal_lr"])
    for name, clip in settings.get("clips", {}).items():
        kwargs[name] = schedule(clip, settings["anneal_clip"])
    networks = [settings["hidden_size"]] * 2
    policy_kwargs = {"net_arch": networks, "activation_fn": torch.nn.Tanh}
    if "log_std_init" in settings:
        policy_kwargs["log_std_init"] = settings["log_std_init"]
    if settings["algorithm"] != "TRPO":
        policy_kwargs |= {"optimizer_kwargs": {"eps": 1e-5}}
    # Not by its id: then SB3 asks for pictures, and LunarLander, say, simulates its exhaust too.
    make = lambda **kwargs: gymnasium.make(env_id, **kwargs)
    envs = make_vec_env(make, num_envs, env_kwargs=settings["env_kwargs"])
    if settings["norm_obs"] or settings["norm_reward"]:
        norms = {"norm_obs": settings["norm_obs"], "norm_reward": settings["norm_reward"]}
        envs = VecNormalize(envs, **norms, clip_obs=10, clip_reward=10, gamma=kwargs["gamma"])
    library = sb3_contrib if settings["algorithm"] == "TRPO" else stable_baselines3
    algorithm = getattr(library, settings["algorithm"])
    model = algorithm(
        "MlpPolicy", envs, seed=seed, device="cpu", policy_kwargs=policy_kwargs, **kwargs
    )
    run.begin()
    return model.learn(total_steps, callback=Log())


class PeerRun:
    """The files and progress lines of a script's run."""

    def __init__(self, directory: Path, total_steps: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer, self.total_steps = SummaryWriter(str(directory)), total_steps
        self.returns, self.next_line, self.step, self.seconds = [], 0.0, 0, 0.0

    def begin(self) -> None:
        self.start = time.perf_counter()

    def iteration(self, step: int, ended: list[tuple[float, int]]) -> None:
        import numpy as np

        self.step, self.seconds = step, time.perf_counter() - self.start
        self.returns = (self.returns + [episode[0] for episode in ended])[-100:]
        self.writer.add_scalar("charts/SPS", step / self.seconds, step)
        if ended:
            mean_return, mean_length = np.mean(ended, axis=0)
            self.writer.add_scalar("charts/episodic_return", mean_return, step)
            self.writer.add_scalar("charts/episodic_length", mean_length, step)
        if step >= self.next_line:
            mean = np.mean(self.returns) if self.returns else np.nan
            done, sps = step / self.total_steps, step / self.seconds
            print(f"{step:>9} steps, {done:4.0%}, return {mean:.1f}, {sps:.0f} steps/s", flush=True)
            self.next_line += self.total_steps / 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--env-id", required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--total-timesteps", type=int, required=True)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--settings", type=json.loads, required=True, help="peer_settings, JSON")
    parser.add_argument("--num-threads", type=int, default=1, help="CPU threads of torch")
    parser.add_argument("--device", default="cpu", help="where the networks live")
    args = parser.parse_args()

    import numpy as np
    import sb3_contrib
    import stable_baselines3
    import torch
    from stable_baselines3.common.evaluation import evaluate_policy
    from stable_baselines3.common.vec_env import VecNormalize

    torch.set_num_threads(args.num_threads)
    settings = args.settings
    batch = settings["kwargs"]["n_steps"] * settings["num_envs"]
    total_steps = args.total_timesteps // batch * batch
    if args.device != "cpu":
        # Put in here, as train's text is part of the identity of every result that there is.
        library = sb3_contrib if settings["algorithm"] == "TRPO" else stable_baselines3
        on_cpu = getattr(library, settings["algorithm"])
        elsewhere = lambda *words, **more: on_cpu(*words, **more | {"device": args.device})
        setattr(library, settings["algorithm"], elsewhere)
    args.run_dir.mkdir(parents=True, exist_ok=True)
    run = PeerRun(args.run_dir, total_steps)
    model = train(args.env_id, args.seed, total_steps, settings, run)

    envs = model.get_env()
    if isinstance(envs, VecNormalize):
        envs.training = envs.norm_reward = False
    evaluated = evaluate_policy(model, envs, settings["eval_episodes"], return_episode_rewards=True)
    run.writer.add_scalar("eval/episodic_return", np.mean(evaluated[0]), run.step)
    run.writer.close()
    summary = {
        "args": {"env_id": args.env_id, "seed": args.seed, **settings},
        "steps": run.step,
        "wall_seconds": run.seconds,
        "sps": run.step / run.seconds,
        "train_return_last100": float(np.mean(run.returns)) if run.returns else None,
        "eval_return_mean": float(np.mean(evaluated[0])),
        "eval_return_std": float(np.std(evaluated[0])),
    }
    (args.run_dir / "summary.tmp").write_text(json.dumps(summary, indent=2) + "\n")
    os.replace(args.run_dir / "summary.tmp", args.run_dir / "summary.json")


if __name__ == "__main__":
    main()
