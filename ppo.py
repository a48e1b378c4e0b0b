"""Proximal Policy Optimization (PPO) for discrete actions.

Schulman et al. 2017, arXiv:1707.06347; equation numbers are that paper's.

Act for T steps in N environments with pi_old, estimate advantages A_t, then take several epochs
of minibatch steps on that one batch, where ratio_t = pi(a_t|s_t) / pi_old(a_t|s_t):

    delta_t = r_t + gamma V(s_{t+1}) - V(s_t)                                            (Eq. 12)
    A_t     = delta_t + (gamma lambda) delta_{t+1} + (gamma lambda)^2 delta_{t+2} + ...  (Eq. 11)
    L_clip  = mean[ min(ratio_t A_t, clip(ratio_t, 1 - eps, 1 + eps) A_t) ]              (Eq. 7)
    L_kl    = mean[ ratio_t A_t - beta KL(pi_old(.|s_t), pi(.|s_t)) ]                    (Eq. 8)
    ascend    L - vf_coef 1/2 mean[(V(s_t) - V_targ_t)^2] + ent_coef mean[entropy]       (Eq. 9)

How far to step: a sample stops pulling once its ratio has left [1 - eps, 1 + eps] on the side that
A_t favours; its gradient is then 0. L is L_clip; `--clip-coef None --kl-coef 1` makes it L_kl, and
`--kl-coef 0.1` alone puts the penalty on top of the clip.

Deviations: actor and critic share no layers (the paper's Atari network does); the KL of Eq. 8 is
estimated from the sampled actions; as in OpenAI Baselines the value loss has a 1/2 and is clipped,
advantages are normalised and the gradient's norm is clipped. Where a time limit ends an episode,
s_{t+1} is the true last observation.

Reading the curves (means over an iteration's updates): clipfrac above 0.2-0.3 or approx_kl above
0.03: too far a step; fewer epochs, a smaller learning rate or eps. entropy starts near ln(actions);
near 0 with a poor return: exploration died; raise ent_coef. explained_variance (1 perfect, 0 no
better than a constant) stuck at 0: try --norm-reward or --no-clip-vloss. grad_norm far above
max_grad_norm: mostly the value loss, which then shrinks the actor's share; try --norm-reward.

Run: python ppo.py                       All flags: python ppo.py --help
"""
# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = [
#   "gymnasium[box2d,classic-control]==1.4.0", "numpy==2.4.6", "tensorboard==2.21.0",
#   "torch==2.13.0", "tqdm==4.70.1", "tyro==1.0.17",
# ]
# ///

import importlib.util
import io
import json
import math
import os
import random
import shlex
import signal
import subprocess
import sys
import threading
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import gymnasium as gym
import numpy as np
import torch
import tyro
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    # --- run ---
    exp_name: str = "ppo"
    """name of the experiment, part of the run directory's name"""
    seed: int = 1
    """seed of everything random, at least 0"""
    run_dir: str | None = None
    """where the files go; by default runs/{env_id}__{exp_name}__{seed}__{time}"""
    resume: str | None = None
    """checkpoint of an interrupted run to continue, on CPU bit for bit"""
    evaluate: str | None = None
    """checkpoint to play, without exploration, instead of training"""
    eval_episodes: int = 10
    """episodes of an evaluation (--evaluate, and after training)"""
    capture_video: bool = False
    """record the evaluation in run_dir/videos (needs moviepy)"""
    checkpoint_every: int | None = None
    """steps between checkpoints, each of which cuts the open episodes; by default 10 % of all"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """of the networks; auto: CUDA, if any, above a hidden_size of 256, as CPUs mostly win below"""
    num_threads: int = 1
    """CPU threads of torch; bits are promised to repeat with 1 alone"""
    compile: bool = False
    """torch.compile the loss (on CUDA the policy too): a slow start, then faster"""
    # --- environment ---
    env_id: str = "CartPole-v1"
    """Gymnasium id; your own is module:Name-v0"""
    env_kwargs: str = "{}"
    """JSON object of keyword arguments for the environment"""
    num_envs: int = 4
    """N, environments stepped side by side"""
    norm_obs: bool = False
    """standardise observations by their running mean and std, clip at +-10"""
    norm_reward: bool = False
    """divide rewards by the running std of the discounted return, clip at +-10"""
    # --- algorithm ---
    total_timesteps: int = 500_000
    """environment steps of the run, rounded down to whole iterations of N T"""
    learning_rate: float = 2.5e-4
    """Adam's step size"""
    anneal_lr: bool = True
    """lower the learning rate linearly to 0"""
    num_steps: int = 128
    """T, steps of each environment in an iteration"""
    gamma: float = 0.99
    """discount factor in [0, 1]"""
    gae_lambda: float = 0.95
    """lambda of Eq. 11 in [0, 1]: 0 trusts the critic, 1 the sampled rewards (Eq. 10)"""
    num_minibatches: int = 4
    """minibatches of an epoch, a divisor of N T"""
    update_epochs: int = 4
    """passes over the batch in an iteration (K in the paper)"""
    recompute_adv: bool = False
    """estimate advantages and returns anew before each epoch, by the critic as it is by then"""
    norm_adv: Literal["minibatch", "batch", "none"] = "minibatch"
    """where advantages are brought to mean 0 and std 1"""
    clip_coef: float | None = 0.2
    """eps of Eq. 7; None turns the clip off"""
    anneal_clip: bool = False
    """lower eps linearly to 0"""
    clip_vloss: bool = True
    """clip the value's change at +-eps too: in units of return, so mind the rewards' scale"""
    ent_coef: float = 0.01
    """weight of the entropy bonus (c2 of Eq. 9)"""
    vf_coef: float = 0.5
    """weight of the value loss; because of the 1/2 in it, twice c1 of Eq. 9"""
    kl_coef: float = 0.0
    """beta of Eq. 8, weight of the KL penalty"""
    adaptive_kl: float | None = None
    """d_targ of section 4, 0.003 to 0.03 in Table 1: beta is halved or doubled to stay near it"""
    target_kl: float | None = None
    """an epoch that leaves the batch's mean KL (k3) above this is the last; nothing is undone"""
    max_grad_norm: float = 0.5
    """longest gradient; a longer one is scaled down to it"""
    hidden_size: int = 64
    """width of the two hidden layers of each network"""


# --- Environment ----------------------------------------------------------------------------------
def make_envs(args: Args) -> gym.vector.VectorEnv:
    """N environments; the step that ends an episode returns the next one's first observation."""
    envs = build_envs(args)
    space = envs.single_action_space
    if not isinstance(space, gym.spaces.Discrete) or space.start != 0:
        supported = "Discrete(n) that starts at 0; for a float Box(n,) use ppo_continuous.py"
        refuse(f"{args.env_id} acts in {space}; supported: {supported}")
    return envs


# --- Networks -------------------------------------------------------------------------------------
def layer_init(layer: nn.Linear, std: float = math.sqrt(2)) -> nn.Linear:
    nn.init.orthogonal_(layer.weight, std)
    nn.init.zeros_(layer.bias)
    return layer


class MLP(nn.Sequential):
    """nn.Sequential that calls its layers' forward: layer(x) would look for hooks too, for as long
    as the arithmetic of such small layers takes. (Hooks of single layers are not called.)"""
    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = layer.forward(x)
        return x


def mlp(inputs: int, hidden: int, outputs: int, output_std: float) -> MLP:
    first, second = layer_init(nn.Linear(inputs, hidden)), layer_init(nn.Linear(hidden, hidden))
    head = layer_init(nn.Linear(hidden, outputs), output_std)
    return MLP(first, nn.Tanh(), second, nn.Tanh(), head)


class Agent(nn.Module):
    """Actor, critic, and the normalisation statistics that belong to them."""
    def __init__(self, envs: gym.vector.VectorEnv, args: Args):
        super().__init__()
        obs_dim, space = envs.single_observation_space.shape[0], envs.single_action_space
        self.norm_obs, self.num_actions = args.norm_obs, int(space.n)
        # The head's small std starts the policy near uniform.
        self.actor = mlp(obs_dim, args.hidden_size, self.num_actions, output_std=0.01)
        self.critic = mlp(obs_dim, args.hidden_size, 1, output_std=1.0)
        self.obs_stats = RunningStats(obs_dim)
        self.return_stats = RunningStats()

    def normalize(self, obs: Tensor) -> Tensor:
        if not self.norm_obs:
            return obs
        return ((obs - self.obs_stats.mean) / self.obs_stats.std).clamp(-10, 10).float()

    def policy(self, obs: Tensor) -> Categorical:
        return Categorical(logits=self.actor(self.normalize(obs)), validate_args=False)

    def value(self, obs: Tensor) -> Tensor:
        return self.critic(self.normalize(obs)).squeeze(-1)

    def draw_noise(self, *batch_shape: int) -> Tensor:
        """Gumbel noise [*batch_shape, actions] for act."""
        noise = torch.empty(*batch_shape, self.num_actions, device=self.obs_stats.mean.device)
        return -noise.exponential_().log()

    def act(self, obs: Tensor, noise: Tensor | float) -> Tensor:
        """argmax(logits + Gumbel noise) is a sample of the softmax; with noise 0 its mode."""
        return (self.actor(self.normalize(obs)) + noise).argmax(-1)


# --- The algorithm --------------------------------------------------------------------------------
def compute_gae(rewards, values, next_values, terminated, dones, gamma, gae_lambda):
    """Generalised advantage estimates (arXiv:1506.02438, Eq. 16), NumPy [T, N] each;
    next_values[t] is the value of what action t led to, before any reset: a termination zeroes it,
    a truncation does not. dones = terminated | truncated: either ends the sum."""
    deltas = rewards + gamma * np.where(terminated, 0.0, next_values) - values
    decay = gamma * gae_lambda * ~dones
    advantages, advantage = np.empty_like(deltas), np.zeros_like(deltas[0])
    for t in reversed(range(len(deltas))):
        advantages[t] = advantage = deltas[t] + decay[t] * advantage
    return advantages


def normalize_advantages(advantages: Tensor) -> Tensor:
    """The same with mean 0 and std 1; a single advantage has no std and stays as it is."""
    if advantages.numel() == 1:
        return advantages
    return (advantages - advantages.mean()) / (advantages.std() + 1e-8)


def estimate_advantages(agent: Agent, obs, next_obs, rewards, terminated, dones, args: Args):
    """Advantages, the critic's targets and its values, tensors [T, N], by the critic as it is."""
    with torch.no_grad():
        values, next_values = (agent.value(x).cpu().numpy() for x in (obs, next_obs))
    outcome = (rewards, values, next_values, terminated, dones)
    advantages = compute_gae(*outcome, args.gamma, args.gae_lambda)
    estimates = (advantages, advantages + values, values)
    advantages, returns, values = (torch.from_numpy(x).float().to(obs.device) for x in estimates)
    if args.norm_adv == "batch":
        advantages = normalize_advantages(advantages)
    return advantages, returns, values


def policy_loss(logprobs, old_logprobs, advantages, clip_coef: float | Tensor | None) -> Tensor:
    """Minus L_clip (Eq. 7), tensors [B] -> scalar; without clip_coef minus L_CPI (Eq. 6)."""
    ratio = (logprobs - old_logprobs).exp()
    if clip_coef is None:
        return -(ratio * advantages).mean()
    # The min keeps the gradient of a ratio that is outside on the wrong side: it can come back.
    clipped_ratio = ratio.clamp(1 - clip_coef, 1 + clip_coef)
    return -torch.min(ratio * advantages, clipped_ratio * advantages).mean()


def value_loss(values, old_values, returns, clip_coef: float | Tensor | None) -> Tensor:
    """Half the mean squared error, tensors [B] -> scalar; with clip_coef each sample's error is at
    least that of its value held within +-clip_coef of the old one."""
    error = (values - returns) ** 2
    if clip_coef is not None:
        clipped_values = old_values + (values - old_values).clamp(-clip_coef, clip_coef)
        error = torch.max(error, (clipped_values - returns) ** 2)
    return 0.5 * error.mean()


def kl_estimates(logprobs: Tensor, old_logprobs: Tensor) -> tuple[Tensor, Tensor]:
    """Estimates k1, k3 [B] of KL(pi_old, pi) from actions of pi_old (joschu.net/blog/kl-approx):
    k1 = -log ratio and k3 = (ratio - 1) - log ratio have the same mean, as E_old[ratio] = 1; k3 is
    >= 0 and varies less near pi_old. Eq. 8 here differentiates k3, without bias at any pi, because
    pi_old drew the actions: E_old[grad ratio] = 0, E_old[-grad log pi] = grad KL(pi_old, pi)."""
    logratio = logprobs - old_logprobs
    return -logratio, logratio.expm1() - logratio


def adapt_kl_coef(kl_coef: float, kl: float, target: float) -> float:
    """The next beta, from the KL that the last update reached (section 4)."""
    return kl_coef / 2 if kl < target / 1.5 else kl_coef * 2 if kl > target * 1.5 else kl_coef


METRICS = ("policy_loss", "value_loss", "entropy", "old_approx_kl", "approx_kl", "clipfrac")

def total_loss(agent: Agent, minibatch, clip_coef, kl_coef, args: Args):
    """Minus Eq. 9, where L is L_clip with the penalty of Eq. 8; and METRICS, as one tensor."""
    obs, actions, old_logprobs, advantages, returns, old_values = minibatch
    if args.norm_adv == "minibatch":
        advantages = normalize_advantages(advantages)
    policy, values = agent.policy(obs), agent.value(obs)
    logprobs, entropy = policy.log_prob(actions), policy.entropy().mean()
    k1, k3 = kl_estimates(logprobs if args.kl_coef else logprobs.detach(), old_logprobs)
    pg_loss = policy_loss(logprobs, old_logprobs, advantages, clip_coef)
    v_loss = value_loss(values, old_values, returns, clip_coef if args.clip_vloss else None)
    loss = pg_loss + kl_coef * k3.mean() - args.ent_coef * entropy + args.vf_coef * v_loss
    largest = math.inf if clip_coef is None else clip_coef
    clipfrac = ((-k1).expm1().abs() > largest).float().mean()
    return loss, torch.stack([pg_loss, v_loss, entropy, k1.mean(), k3.mean(), clipfrac]).detach()


# --- Training -------------------------------------------------------------------------------------
def main(args: Args) -> None:
    # --- Setup ---
    device = check_args(args)
    T, N = args.num_steps, args.num_envs
    B = T * N  # steps, environments, samples
    num_iterations = args.total_timesteps // B
    if B % args.num_minibatches:
        refuse(f"--num-minibatches {args.num_minibatches} does not divide the batch of {N} x {T}")
    if args.adaptive_kl and not args.kl_coef:
        refuse("--adaptive-kl scales beta, which is 0: start it somewhere, such as --kl-coef 1")
    to_tensor = lambda x: torch.from_numpy(x).to(device)
    envs = make_envs(args)
    agent = Agent(envs, args).to(device)
    theta, grad = flatten_parameters(agent)
    optimizer = torch.optim.Adam([theta], lr=args.learning_rate, eps=1e-5, fused=True)
    if args.evaluate:
        load_checkpoint(args.evaluate, agent)
        play(args, agent)
        return
    run = Run(args, agent, optimizer, num_iterations * B)
    kl_coef = run.extra.get("kl_coef", args.kl_coef)
    loss_function = torch.compile(total_loss) if args.compile else total_loss
    act = torch.compile(agent.act) if args.compile and device.type == "cuda" else agent.act
    obs = np.zeros((T, N, *envs.single_observation_space.shape), np.float32)
    next_obs = np.zeros_like(obs)  # what action t led to, before any reset
    actions = np.zeros((T, N, *envs.single_action_space.shape), envs.single_action_space.dtype)
    rewards, terminated, truncated = (np.zeros((T, N), x) for x in (float, bool, bool))
    current_obs, running_return = obs[0], np.zeros(N)
    for iteration in range(run.iteration, num_iterations):
        if run.step >= run.next_checkpoint:
            run.save(iteration, kl_coef=kl_coef)
            # An environment cannot be saved, so every run, resumed or not, starts new ones here.
            env_seeds = seed_everything(args.seed, iteration, N)
            envs.close()
            envs = make_envs(args)
            (current_obs, _), running_return = envs.reset(seed=env_seeds), np.zeros(N)
        remaining = 1 - iteration / num_iterations
        learning_rate = args.learning_rate * (remaining if args.anneal_lr else 1)
        optimizer.param_groups[0]["lr"] = learning_rate
        # What changes goes in as a tensor: torch.compile freezes a float or compiles once more.
        clip_coef, beta = args.clip_coef, torch.tensor(kl_coef, device=device)
        if clip_coef and args.anneal_clip:
            clip_coef = torch.tensor(clip_coef * remaining, device=device)

        # --- 1. Collect ---
        noise = agent.draw_noise(T, N)
        for t in range(T):
            obs[t] = current_obs
            with torch.inference_mode():
                actions[t] = act(torch.from_numpy(obs[t]).to(device), noise[t]).cpu().numpy()
            current_obs, rewards[t], terminated[t], truncated[t], infos = envs.step(actions[t])
            next_obs[t] = current_obs
            if "final_obs" in infos:
                ended = infos["_final_obs"]
                next_obs[t, ended] = np.stack(infos["final_obs"][ended])
        dones = terminated | truncated
        run.count(obs, next_obs, rewards, dones)

        # --- 2. Advantages ---
        t_obs, t_next_obs, t_actions = (to_tensor(x) for x in (obs, next_obs, actions))
        with torch.no_grad():  # in one pass; parameters and statistics are still those that acted
            old_logprobs = agent.policy(t_obs).log_prob(t_actions)
        scaled_rewards = rewards
        if args.norm_reward:
            sums, running_return = discounted_returns(rewards, dones, running_return, args.gamma)
            agent.return_stats.update(to_tensor(sums).flatten())
            scaled_rewards = (rewards / agent.return_stats.std.item()).clip(-10, 10)
        outcome = (t_obs, t_next_obs, scaled_rewards, terminated, dones)
        advantages, returns, old_values = estimate_advantages(agent, *outcome, args)

        # --- 3. Update ---
        samples = (t_obs, t_actions, old_logprobs, advantages, returns, old_values)
        batch = [x.flatten(0, 1) for x in samples]  # each [B, ...]
        metrics, grad_norms, updates, kl = torch.zeros(len(METRICS), device=device), 0.0, 0, 0.0
        for epoch in range(args.update_epochs):
            if epoch and args.recompute_adv:
                batch[3:5] = (x.flatten() for x in estimate_advantages(agent, *outcome, args)[:2])
            order = torch.randperm(B, device=device)
            for minibatch in zip(*(x[order].chunk(args.num_minibatches) for x in batch)):
                loss, metrics_of_loss = loss_function(agent, minibatch, clip_coef, beta, args)
                loss.backward()
                grad_norms += (grad_norm := grad.norm())
                grad *= (args.max_grad_norm / (grad_norm + 1e-6)).clamp(max=1)
                optimizer.step()
                grad.zero_()
                metrics += metrics_of_loss
                updates += 1
            if args.target_kl or args.adaptive_kl:
                with torch.no_grad():
                    logprobs = agent.policy(t_obs).log_prob(t_actions)
                kl = kl_estimates(logprobs, old_logprobs)[1].mean().item()
                if args.target_kl and kl > args.target_kl:
                    break
        if args.adaptive_kl:
            kl_coef = adapt_kl_coef(kl_coef, kl, args.adaptive_kl)
        if args.norm_obs:  # only now, so that the whole iteration saw one normalisation
            agent.obs_stats.update(batch[0])

        # --- 4. Log ---
        metrics /= updates
        losses: dict[str, float] = dict(zip(METRICS, metrics.tolist()))
        losses |= {"grad_norm": float(grad_norms) / updates, "kl_coef": kl_coef}
        unexplained = (returns - old_values).var() / returns.var().clamp(min=1e-8)
        losses["explained_variance"] = 1 - unexplained.item()
        run.log(losses, learning_rate)
    run.finish(num_iterations, kl_coef=kl_coef)


# === Plumbing: the same in every script; skip it on a first reading ===============================
class RunningStats(nn.Module):
    """Mean, variance and std of all that was seen, float64 buffers, which a saved agent keeps."""

    def __init__(self, *shape: int):
        super().__init__()
        self.mean = nn.Buffer(torch.zeros(shape, dtype=torch.float64))
        self.var = nn.Buffer(torch.ones(shape, dtype=torch.float64))
        self.std = nn.Buffer((self.var + 1e-8).sqrt())  # what never varies is not divided by 0
        self.count = nn.Buffer(torch.zeros((), dtype=torch.float64))

    def update(self, x: Tensor) -> None:
        """Merge a sample x [n, *shape]: variance within the two, plus that between their means."""
        self.count += len(x)
        weight, delta = len(x) / self.count, x.double().mean(0) - self.mean
        within = torch.lerp(self.var, x.double().var(0, correction=0), weight)
        self.var.copy_(within + weight * (1 - weight) * delta**2)
        self.mean += weight * delta
        self.std.copy_((self.var + 1e-8).sqrt())


def discounted_returns(rewards, dones, running, gamma):
    """Discounted sums of rewards since the episode's start, [T, N], whose std scales the rewards,
    and where they stand at the end, [N]; running [N] is where the last rollout left them."""
    returns = np.empty_like(rewards)
    for t in range(len(rewards)):
        returns[t] = rewards[t] + gamma * running
        # The step that ends an episode still belongs to it; the next one starts from 0.
        running = np.where(dones[t], 0.0, returns[t])
    return returns, running


def flatten_parameters(agent: nn.Module) -> tuple[nn.Parameter, Tensor]:
    """Make all parameters views of one vector theta and their gradients views of another, so that
    to clip, step and zero is one operation each. zero_grad(set_to_none=True) would undo it."""
    params = list(agent.parameters())
    theta = nn.Parameter(nn.utils.parameters_to_vector(params).detach())
    theta.grad = grad = torch.zeros_like(theta)
    nn.utils.vector_to_parameters(theta, params)
    for p, p_grad in zip(params, grad.split([p.numel() for p in params])):
        p.grad = p_grad.view_as(p)
    return theta, grad


def refuse(message: str, status: int = 2) -> NoReturn:
    """End with one line on stderr; status 2 for wrong input, 1 for a run that went wrong."""
    print(f"{Path(__file__).name}: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)


def parse_args(argv: list[str] | None = None) -> Args:
    """The flags; beside --resume and --evaluate the checkpoint's stand in for the defaults."""
    sys.path.append(str(Path.cwd()))  # where --env-id module:Name-v0 may find its module
    args = tyro.cli(Args, args=argv)
    path = args.evaluate if args.resume is None else args.resume
    if path is None:
        return args
    # Parsed once more with the saved values as defaults: what differs then was typed, even where it
    # is this script's own default.
    saved = load_checkpoint(path)["args"] | {"run_dir": str(Path(path).parent)}
    saved["capture_video"] &= args.resume is not None
    args = tyro.cli(Args, args=argv, default=Args(**saved))
    free = {"resume", "evaluate", "eval_episodes", "capture_video", "device"}
    free |= {"seed", "num_threads"} if args.resume is None else {"total_timesteps"}
    for name, value in vars(args).items():
        if value != saved[name] and name not in free:
            refuse(f"{name} {value} cannot go with {path}, whose run has {name} {saved[name]}")
    if args.resume is not None and (args.evaluate or Path(path).name != "checkpoint.pt"):
        refuse("--resume takes the checkpoint.pt of a run, and no --evaluate")
    if args.resume is not None and args.total_timesteps < saved["total_timesteps"]:
        refuse(f"--total-timesteps can only be raised, from {saved['total_timesteps']}")
    if args.total_timesteps > saved["total_timesteps"]:
        print("More steps: schedules now end later, so this is no longer the run that it was.")
    return args


def check_args(args: Args) -> torch.device:
    """Refuse what is out of range, in every script what it has; seed the initial weights."""
    counts = "total_timesteps num_envs num_steps num_episodes num_minibatches update_epochs"
    counts += " value_epochs cg_iters backtrack_iters hidden_size num_prompts group_size width"
    counts += " num_layers num_heads dynamic_sampling max_new_tokens"
    reals = "learning_rate clip_coef max_grad_norm target_kl adaptive_kl checkpoint_every"
    reals += " optimizer_eps robbins_monro_k0 max_grad step_eps value_learning_rate max_kl"
    reals += " sft_learning_rate temperature clip_coef_high"
    zeros = "seed ent_coef vf_coef kl_coef cg_damping sft_steps overlong_buffer"
    # A script lacks some of these flags, and one that is None is switched off.
    for words, holds, names in (
        ("above 0", lambda x: 0 < x < math.inf, f"{counts} {reals} num_threads eval_episodes"),
        ("at least 0", lambda x: 0 <= x < math.inf, zeros),
        ("at most 1e30", lambda x: x <= 1e30, f"{reals} {zeros}"),  # float32 ends at 3e38
        ("below 2**31", lambda x: x < 2**31, f"{counts} seed eval_episodes sft_steps"),
        (f"at most {os.cpu_count()} here", lambda x: x <= (os.cpu_count() or 1), "num_threads"),
        ("in [0, 1]", lambda x: 0 <= x <= 1, "gamma gae_lambda rmsprop_alpha sft_accuracy"),
        ("in (0, 1]", lambda x: 0 < x <= 1, "fisher_fraction"),
        ("in (0, 1)", lambda x: 0 < x < 1, "backtrack_coef cg_residual_tol"),
        ("in [-10, 2]", lambda x: -10 <= x <= 2, "log_std_init"),
    ):
        for name in names.split():
            if (value := getattr(args, name, None)) is not None and not holds(value):
                refuse(f"--{name.replace('_', '-')} must be {words}, not {value}")
    if getattr(args, "capture_video", False) and not importlib.util.find_spec("moviepy"):
        refuse("--capture-video needs moviepy: pip install moviepy")
    cuda, wide = torch.cuda.is_available(), getattr(args, "hidden_size", math.inf) > 256
    if args.device == "cuda" and not cuda:
        refuse("--device cuda, but torch finds no CUDA device here: use --device cpu")
    torch.set_num_threads(args.num_threads)
    torch.manual_seed(args.seed)
    return torch.device({"auto": "cuda" if cuda and wide else "cpu"}.get(args.device, args.device))


class Environments(gym.vector.SyncVectorEnv):
    """Keeps of the infos an episode's last observation alone, copied lest the reset change it."""

    def _add_info(self, vector_infos: dict, env_info: dict, env_num: int) -> dict:
        if "final_info" in env_info:
            last, shape = np.array(env_info["final_obs"]), self.single_observation_space.shape
            if last.shape != shape:  # which would be broadcast; the others NumPy refuses
                raise ValueError(f"the last observation has shape {last.shape}, not {shape}")
            vector_infos = super()._add_info(vector_infos, {"final_obs": last}, env_num)
        return vector_infos


def build_envs(args: Args) -> Environments:
    """num_envs environments in this process, of any action space and of flat observations."""
    if args.capture_video and sys.platform == "linux" and not os.environ.get("DISPLAY"):
        os.environ["MUJOCO_GL"] = os.environ.get("MUJOCO_GL") or "egl"  # draws without a screen
    # SAME_STEP: the step that ends an episode returns the first observation of the next one, and
    # the last of its own, from which a truncation bootstraps, in infos["final_obs"].
    try:
        if importlib.util.find_spec("mujoco"):
            # No MUJOCO_LOG.TXT where one works. len, as Ctrl-C in a Python function would abort.
            importlib.import_module("mujoco").set_mju_user_warning(len)
        kwargs, mode = {**json.loads(args.env_kwargs)}, gym.vector.AutoresetMode.SAME_STEP
        kwargs |= {"render_mode": "rgb_array"} if args.capture_video else {}
        make = lambda: gym.make(args.env_id, **kwargs)
        envs = Environments([make] * args.num_envs, copy=False, autoreset_mode=mode)
        if args.capture_video:
            envs.reset()
            envs.envs[0].render()
    except Exception as error:
        hint = " (MuJoCo draws by MUJOCO_GL=egl, osmesa or, on a screen, glfw)" * args.capture_video
        refuse(f"cannot make {args.env_id} with --env-kwargs {args.env_kwargs}: {error}{hint}")
    space = envs.single_observation_space
    if not isinstance(space, gym.spaces.Box) or len(space.shape) != 1:
        refuse(f"{args.env_id} observes {space}; supported are flat vectors, Box of shape (n,)")
    if args.capture_video and "rgb_array" not in envs.metadata.get("render_modes", ()):
        refuse(f"--capture-video: {args.env_id} cannot render to rgb_array")
    return envs


def seed_everything(seed: int, iteration: int, num_seeds: int) -> Any:
    """Seed from (seed, iteration) alone: no random state needs saving. Returns seeds to give on."""
    # Environment i of seed s must not get s + i, as it would by default: runs of s + 1 had it too.
    seeds = np.random.SeedSequence((seed, iteration)).generate_state(3 + num_seeds).tolist()
    random.seed(seeds[0])
    np.random.seed(seeds[1])
    torch.manual_seed(seeds[2])
    return seeds[3:]


def load_checkpoint(path: str, *modules: Any) -> dict[str, Any]:
    """Read a checkpoint of this script, if it is whole, and load its state into the modules."""
    try:
        with zipfile.ZipFile(path) as file:  # torch.load does not look at the checksums
            if file.testzip():
                raise ValueError("a checksum is wrong")
        # A pickle can run any code; weights_only lets nothing but plain data through.
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        script, flags = checkpoint["script"], set(checkpoint["args"])
    except Exception as error:
        refuse(f"{path} is missing, damaged or no checkpoint: {error!s:.200}")
    if script != Args.exp_name or flags != set(vars(Args())):  # the default name is the script's
        refuse(f"{path} is of {script}.py, or of another version than this {Args.exp_name}.py")
    try:
        for module, state in zip(modules, checkpoint["state"][: len(modules)], strict=True):
            module.load_state_dict(state)
    except Exception as error:
        refuse(f"{path} holds other networks than those of this script and environment: {error}")
    return checkpoint


def play(args: Args, agent: Any) -> np.ndarray:
    """Print and return the returns of eval_episodes episodes without exploration noise."""
    one_env: dict[str, Any] = vars(args) | {"num_envs": 1}
    envs = make_envs(Args(**one_env))
    if args.capture_video:
        wanted = lambda episode: episode < args.eval_episodes
        record = gym.wrappers.RecordVideo(envs.unwrapped.envs[0], f"{args.run_dir}/videos", wanted)
        envs.unwrapped.envs = [record]
    obs, _ = envs.reset(seed=seed_everything(args.seed, 2**32, 1))
    returns, device = np.zeros(args.eval_episodes), next(agent.parameters()).device
    for i in range(args.eval_episodes):
        for _ in range(100_000):  # an episode that never ends is cut here
            with torch.inference_mode():
                actions = agent.act(torch.as_tensor(obs, dtype=torch.float32, device=device), 0.0)
            obs, rewards, terminated, truncated, _ = envs.step(actions.cpu().numpy())
            returns[i] += rewards[0]
            if terminated[0] or truncated[0]:
                break
    envs.close()
    mean, std = returns.mean(), returns.std()
    print(f"Evaluated:  return {mean:.1f} +- {std:.1f} over {len(returns)} episodes")
    return returns


def write_whole(path: Path, data: bytes) -> None:
    """Write a file whole or not at all: who reads it sees the old one or the new one."""
    partial = path.with_suffix(".tmp")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            # On the disk before the new name is: after a power cut a whole file stands under it.
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


class Run:
    """The files of a run, its progress and its end; nothing of the algorithm."""

    def __init__(self, args: Args, agent: Any, optimizer: Any, total_steps: int):
        # step counts what is done, iteration is the next one, returns are of the last 100 episodes,
        # seconds were spent by earlier processes, and extra is what the script wants kept.
        self.args, self.modules, self.total_steps = args, (agent, optimizer), total_steps
        self.step, self.iteration, self.extra, self.returns, seconds = 0, 0, {}, [], 0.0
        self.pending, self.ended = [], []  # losses and episodes since the last point of the curves
        stamp = time.strftime("%Y%m%d-%H%M%S") + f"-{os.getpid()}"
        name = f"{args.env_id}__{args.exp_name}__{args.seed}__{stamp}"
        self.dir = Path(args.run_dir or "runs/" + name.replace("/", "-").replace(":", "-"))
        self.checkpoint = self.dir / "checkpoint.pt"
        if args.resume:
            saved = load_checkpoint(args.resume, *self.modules)
            self.step, self.iteration = saved["step"], saved["iteration"]
            self.extra, self.returns, seconds = saved["extra"], saved["returns"], saved["seconds"]
        elif total_steps < 1:
            refuse(f"--total-timesteps {args.total_timesteps} is less than one iteration")
        if total_steps != args.total_timesteps:
            print(f"--total-timesteps {args.total_timesteps} is rounded down to {total_steps}")
        try:
            if self.checkpoint.exists() and not args.resume:
                refuse(f"{self.dir} already holds a run; --resume {self.checkpoint} continues it")
            self.dir.mkdir(parents=True, exist_ok=True)
            # What its thread cannot write is raised at the next event; not a word from the thread.
            quiet = lambda x: issubclass(x.exc_type, OSError) or threading.__excepthook__(x)
            threading.excepthook = quiet
            # Curves that an interrupted run drew beyond its checkpoint are drawn again: drop them.
            self.writer = SummaryWriter(str(self.dir), purge_step=self.step + 1)
        except OSError as error:
            refuse(f"cannot write to --run-dir {self.dir}: {error}")
        args.run_dir = str(self.dir)
        self.every = args.checkpoint_every or args.total_timesteps / 10
        self.first_step = self.next_checkpoint = self.next_line = self.last_point = self.step
        self.bar = tqdm(total=total_steps, initial=self.step, unit=" steps", disable=None)
        self.start = time.perf_counter() - seconds
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.interrupted)
        sys.excepthook = self.crashed

    def command(self, flag: str) -> str:
        """How to call this script on the last checkpoint, ready to paste."""
        return shlex.join(["python", os.path.relpath(__file__), flag, str(self.checkpoint)])

    def next_step(self) -> str:
        """What is left to do when a run ends early."""
        if not os.path.exists(self.checkpoint):
            return "there is no checkpoint to go on from"
        return f"to go on: {self.command('--resume')}"

    def interrupted(self, number: int, _frame: Any) -> NoReturn:
        """Save nothing, as a checkpoint cuts episodes where the unbroken run has none."""
        for again in (signal.SIGINT, signal.SIGTERM):
            signal.signal(again, signal.SIG_IGN)
        self.bar.close()
        refuse(f"interrupted; {self.next_step()}", 128 + number)

    def crashed(self, kind: type, error: BaseException, trace: Any) -> NoReturn:
        """What an exception ends with: a line if a file could not be written, else its traceback
        first, which is for whose environment or change it is."""
        self.bar.close()
        place = ""
        while trace:  # to the innermost of this file's functions
            frame, trace = trace.tb_frame, trace.tb_next
            place = frame.f_code.co_name if frame.f_globals is globals() else place
        if isinstance(error, OSError) and place in ("write_whole", *vars(Run)):
            refuse(f"cannot write: {error}; {self.next_step()}", 1)
        sys.__excepthook__(kind, error, error.__traceback__)
        refuse(f"{kind.__name__} in the iteration after step {self.step}; {self.next_step()}", 1)

    def save(self, iteration: int, **extra: Any) -> None:
        """Write the state before an iteration, whole or not at all; extra is the script's own."""
        self.write_point()
        self.writer.flush()
        state = {
            "script": Args.exp_name,
            "args": vars(self.args) | {"resume": None},
            "state": [module.state_dict() for module in self.modules],
            "step": self.step, "iteration": iteration,
            "returns": self.returns,
            "seconds": time.perf_counter() - self.start,
            "extra": extra,
        }
        # By way of memory: the end of a torch.save that met a full disk hides why.
        torch.save(state, whole := io.BytesIO())
        write_whole(self.checkpoint, whole.getvalue())
        self.next_checkpoint = (self.step // self.every + 1) * self.every
        self.open_episodes = np.zeros((2, self.args.num_envs))  # return and length so far

    def count(self, obs, next_obs, rewards, dones, played: Any = True) -> None:
        """Count the steps of a rollout [T, N] and the episodes that ended; stop at NaN and inf.

        played [T, N] marks the steps that there were, where environments wait for one another.
        """
        played = np.broadcast_to(played, rewards.shape)
        finite = np.isfinite(rewards) & np.isfinite(obs).all(-1) & np.isfinite(next_obs).all(-1)
        if not finite.all():
            step = self.step + (np.argmin(finite.all(1)) + 1) * len(rewards[0])
            refuse(f"reward or observation not finite at step {step}; kept: {self.checkpoint}", 1)
        # From one step that ends an episode to the next, as the others need no look.
        ended, start = [], 0
        for t in np.flatnonzero(dones.any(1)):
            self.open_episodes += rewards[start : t + 1].sum(0), played[start : t + 1].sum(0)
            ended += self.open_episodes[:, dones[t]].T.tolist()
            self.open_episodes[:, dones[t]] = 0
            start = t + 1
        self.open_episodes += rewards[start:].sum(0), played[start:].sum(0)
        self.ended += ended
        self.returns = (self.returns + [episode[0] for episode in ended])[-100:]
        self.step += int(played.sum())

    def log(self, losses: dict[str, float], learning_rate: float) -> None:
        """Keep an iteration's losses; every 250 steps write a point and show the progress.

        A point costs as much as a small update, and an iteration may be of 40 steps.
        """
        if math.isnan(losses.get("explained_variance", 0)):  # one sample has no variance
            del losses["explained_variance"]  # (were the values NaN, value_loss would say so)
        scalars = {f"losses/{name}": value for name, value in losses.items()}
        for name, value in scalars.items():
            if not math.isfinite(value):
                refuse(f"{name} is {value} at step {self.step}; kept: {self.checkpoint}", 1)
        self.pending.append(scalars | {"charts/learning_rate": learning_rate})
        if self.step - self.last_point >= 250:
            self.write_point()

    def write_point(self) -> None:
        """Write means over what is pending to TensorBoard, and the progress to the terminal."""
        if not self.pending:
            return
        seconds = time.perf_counter() - self.start
        scalars = {name: np.mean([x[name] for x in self.pending]) for name in self.pending[0]}
        scalars |= {"charts/SPS": self.step / seconds}
        if self.ended:
            means = np.mean(self.ended, axis=0)
            scalars |= {"charts/episodic_return": means[0], "charts/episodic_length": means[1]}
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, self.step)
        self.pending, self.ended, self.last_point = [], [], self.step
        mean = np.mean(self.returns) if self.returns else math.nan
        status = f"return {mean:.1f}, {self.step / seconds:.0f} steps/s"
        self.bar.set_postfix_str(status, refresh=False)
        self.bar.update(self.step - self.bar.n)
        # On a terminal the bar says it all; elsewhere it is silent, and a line per 5 % does.
        if self.bar.disable and self.step >= self.next_line:
            done = min(1, self.step / self.total_steps)
            left = seconds / done - seconds
            print(f"{self.step:>9} steps, {done:4.0%}, {status}, {left:.0f} s left", flush=True)
            self.next_line += self.total_steps / 20

    def has_point(self, tag: str) -> bool:
        """Whether an earlier process, killed on its way to the summary, has written it."""
        files = (EventFileLoader(str(path)).Load() for path in self.dir.glob("events.*"))
        points = (event for file in files for event in file if event.step == self.step)
        return any(value.tag == tag for event in points for value in event.summary.value)

    def finish(self, iteration: int, **extra: Any) -> None:
        """Save, evaluate, summarise, and say where everything is."""
        self.save(iteration, **extra)
        seconds = time.perf_counter() - self.start
        self.bar.close()
        mean, sps = np.mean(self.returns or math.nan), self.step / seconds
        words = f"{mean:.1f} over the last {len(self.returns)} episodes, {sps:.0f} steps/s"
        print(f"Trained:    return {words}")
        evaluated = play(self.args, self.modules[0])
        git, here = "git describe --always --dirty --abbrev=40", Path(__file__).resolve().parent
        commit = subprocess.run(git, shell=True, cwd=here, capture_output=True, text=True).stdout
        summary = {
            "args": vars(self.args),
            "versions": {module.__name__: module.__version__ for module in (torch, np, gym)},
            "commit": commit.strip() or None,
            "steps": self.step, "wall_seconds": seconds, "sps": sps,
            "train_return_last100": float(mean) if self.returns else None,
            "eval_return_mean": evaluated.mean(),
            "eval_return_std": evaluated.std(),
        }
        if self.first_step < self.step or not self.has_point("eval/episodic_return"):
            self.writer.add_scalar("eval/episodic_return", evaluated.mean(), self.step)
        self.writer.close()  # first: beside a summary the curves are whole
        text = json.dumps(summary, indent=2) + "\n"
        write_whole(self.dir / "summary.json", text.encode())
        print(f"Files:      {self.dir}\nCurves:     tensorboard --logdir {self.dir}")
        print(f"To watch:   {self.command('--evaluate')} --capture-video  (pip install moviepy)")


if __name__ == "__main__":
    main(parse_args())
