"""REINFORCE, the Monte Carlo policy gradient.

Williams 1992, Machine Learning 8, 229-256; the theorem: Sutton et al. 1999, NIPS 12.

Play M = N num_episodes episodes with pi, step along a sample of the gradient of the expected
return R, throw the episodes away:

    R = r_0 + gamma r_1 + gamma^2 r_2 + ...,      G_t = r_t + gamma r_{t+1} + ...
    grad E[R] = E[ sum_t grad log pi(a_t|s_t) R ] = E[ sum_t grad log pi(a_t|s_t) gamma^t G_t ]
    g = 1/M sum over episodes and over t of grad log pi(a_t|s_t) (G_t - b_t)

G_t may stand for R, as a_t cannot change what was paid before it. Like most code this then drops
gamma^t: with gamma < 1, E[g] is not the gradient of the discounted return, nor in general of any
function (Nota & Thomas 2020, arXiv:1906.07073); with R (--no-reward-to-go) it is. A baseline b_t
that a_t has no part in keeps E[g] and lowers its variance: the mean R of the other episodes, or a
critic V(s_t) fitted on earlier ones. The sum is divided by M, not by the number of steps: that is
random and depends on the actions, so the mean of the quotient would not be the gradient.

How far to step (--step-rule), at a rate alpha_k that --lr-schedule lowers:

    gradient    alpha g                        as long as g is steep: blind
    adam        alpha m / (sqrt(v) + 1e-5)     each component by its own recent size
    clip-norm   alpha g min(1, L / |g|)        direction kept
    clip-value  alpha clip(g, -L, L)           by component: the direction may turn
    restricted  sqrt(2 eps) g / |g| alpha_k / alpha_0    argmax g.d with 1/2 |d|^2 <= eps: as long
                                               for any g, and alpha_0 drops out

All of them measure the step d in parameters, not in what it does to the policy: that is npg.py.

Time limits: an episode cut by one is treated as if it had ended there: what would have come later
counts 0, or, with --bootstrap-truncated, as V of the last observation.
Deviation: --norm-adv batch subtracts the mean too; to compare baselines take --norm-adv none.
Curves: grad_norm against step_norm |d| is the step rule at work. A return that jumps and collapses:
too long a step. Low entropy (negative for real-valued actions), poor return: exploration died.

Run: python reinforce.py                 All flags: python reinforce.py --help
"""
# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = [
#   "gymnasium[box2d,classic-control,mujoco]==1.4.0", "mujoco==4.0.0", "numpy==2.4.6",
#   "tensorboard==2.21.0", "torch==2.13.0", "tqdm==4.70.1", "tyro==1.0.17",
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
from torch.distributions import Categorical, Independent, Normal
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    # --- run ---
    exp_name: str = "reinforce"
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
    num_envs: int = 8
    """N, environments stepped side by side"""
    norm_obs: bool = False
    """standardise observations by their running mean and std, clip at +-10"""
    norm_reward: bool = False
    """divide rewards by the running std of the discounted return, clip at +-10"""
    # --- algorithm ---
    total_timesteps: int = 500_000
    """environment steps of the run, rounded up to whole iterations"""
    learning_rate: float = 3e-3
    """alpha_0 of the step rules, but for restricted, where step_eps says it all"""
    lr_schedule: Literal["constant", "linear", "robbins-monro"] = "linear"
    """alpha_0; lowered linearly to 0; or alpha_0 / (1 + k/k0) in iteration k"""
    robbins_monro_k0: float = 100.0
    """k0, the iteration by which robbins-monro has halved the rate"""
    num_episodes: int = 1
    """episodes of each environment in an iteration; who is through waits for the others"""
    gamma: float = 0.99
    """discount factor in [0, 1]"""
    reward_to_go: bool = True
    """weigh log pi(a_t|s_t) by the return from t on, not by that of the whole episode"""
    bootstrap_truncated: bool = False
    """count what lies beyond a time limit as the critic's value, not as 0"""
    baseline: Literal["none", "mean", "value"] = "value"
    """nothing, the mean return of the other episodes, or a learned value of the state"""
    norm_adv: Literal["batch", "none"] = "batch"
    """whether advantages are brought to mean 0 and std 1"""
    ent_coef: float = 0.0
    """weight of the entropy bonus, summed over steps and divided by episodes like the rest"""
    step_rule: Literal["gradient", "adam", "clip-norm", "clip-value", "restricted"] = "adam"
    """how far to step, see above"""
    max_grad: float = 0.5
    """L, the longest gradient of clip-norm or the largest component of clip-value"""
    step_eps: float = 1e-3
    """eps of restricted, half the squared length of its steps"""
    value_learning_rate: float = 1e-3
    """Adam's step size for the critic"""
    value_epochs: int = 10
    """passes over the batch to fit the critic, after the policy's step"""
    num_minibatches: int = 4
    """minibatches of such a pass"""
    hidden_size: int = 64
    """width of the two hidden layers of each network"""
    log_std_init: float = -0.5
    """log of the initial std of real-valued actions"""


# --- Environment ----------------------------------------------------------------------------------
class Paused(gym.Wrapper):
    """Plays episodes_left episodes, then stands still, so that no step is played for nothing."""
    episodes_left = math.inf

    def reset(self, **kwargs):
        self.last_obs, info = self.env.reset(**kwargs)
        return self.last_obs, info

    def step(self, action):
        if not self.episodes_left:
            return self.last_obs, 0.0, False, False, {}
        obs, reward, terminated, truncated, info = self.env.step(action)
        self.episodes_left -= terminated or truncated
        return obs, reward, terminated, truncated, info


def make_envs(args: Args) -> gym.vector.VectorEnv:
    """N environments, which clip real-valued actions to their bounds; the step that ends an episode
    returns the next one's first observation."""
    envs = build_envs(args)
    envs.envs = [Paused(env) for env in envs.envs]
    space = envs.single_action_space
    if isinstance(space, gym.spaces.Discrete) and space.start == 0:
        return envs
    if not isinstance(space, gym.spaces.Box) or space.low.ndim != 1 or space.dtype.char not in "fd":
        supported = "Discrete(n) that starts at 0 and float Box(n,)"
        refuse(f"{args.env_id} acts in {space}; supported: {supported}")
    return gym.wrappers.vector.TransformAction(envs, lambda u: u.clip(space.low, space.high))


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
        self.norm_obs, discrete = args.norm_obs, isinstance(space, gym.spaces.Discrete)
        self.num_outputs = int(space.n) if discrete else space.shape[0]
        # Logits, or the mean of a Gaussian whose std does not depend on the state. The head's small
        # std starts the policy near uniform, or its mean near 0.
        self.actor = mlp(obs_dim, args.hidden_size, self.num_outputs, output_std=0.01)
        log_std = torch.full((self.num_outputs,), float(args.log_std_init))
        self.log_std = None if discrete else nn.Parameter(log_std)
        self.critic = mlp(obs_dim, args.hidden_size, 1, output_std=1.0)
        self.obs_stats = RunningStats(obs_dim)
        self.return_stats = RunningStats()

    def normalize(self, obs: Tensor) -> Tensor:
        if not self.norm_obs:
            return obs
        return ((obs - self.obs_stats.mean) / self.obs_stats.std).clamp(-10, 10).float()

    def policy(self, obs: Tensor) -> Categorical | Independent:
        outputs = self.actor(self.normalize(obs))
        if self.log_std is None:
            return Categorical(logits=outputs, validate_args=False)
        gaussian = Normal(outputs, self.log_std.exp(), validate_args=False)
        return Independent(gaussian, 1, validate_args=False)

    def value(self, obs: Tensor) -> Tensor:
        return self.critic(self.normalize(obs)).squeeze(-1)

    def draw_noise(self, *batch_shape: int) -> Tensor:
        """Noise [*batch_shape, outputs] for act: Gumbel for logits, Gaussian for means."""
        noise = torch.empty(*batch_shape, self.num_outputs, device=self.obs_stats.mean.device)
        return -noise.exponential_().log() if self.log_std is None else noise.normal_()

    def act(self, obs: Tensor, noise: Tensor | float) -> Tensor:
        """A sample, with noise 0 the mode; argmax(logits + Gumbel noise) is one of the softmax."""
        outputs = self.actor(self.normalize(obs))
        if self.log_std is None:
            return (outputs + noise).argmax(-1)
        return outputs + self.log_std.exp() * noise


# --- The algorithm --------------------------------------------------------------------------------
def compute_returns(rewards, last_values, dones, gamma):
    """G_t = r_t + gamma G_{t+1}, NumPy [T, N] each; beyond an episode's end lies last_values[t]."""
    returns, following = np.empty_like(rewards), np.zeros_like(rewards[0])
    for t in reversed(range(len(rewards))):
        following = np.where(dones[t], last_values[t], following)
        returns[t] = following = rewards[t] + gamma * following
    return returns


def whole_returns(returns, dones):
    """R at every step of an episode: the G_t of its first step, NumPy [T, N] each."""
    whole = returns.copy()
    for t in range(1, len(returns)):
        whole[t] = np.where(dones[t - 1], returns[t], whole[t - 1])
    return whole


def normalize_advantages(advantages: Tensor) -> Tensor:
    """The same with mean 0 and std 1; a single advantage has no std and stays as it is."""
    if advantages.numel() == 1:
        return advantages
    return (advantages - advantages.mean()) / (advantages.std() + 1e-8)


def estimate_advantages(agent: Agent, obs, next_obs, rewards, terminated, dones, args: Args):
    """Advantages G_t - b_t, returns G_t and values, tensors [T, N], by the critic as it is."""
    with torch.no_grad():
        values, next_values = (agent.value(x).cpu().numpy() for x in (obs, next_obs))
    last_values = np.where(terminated | (not args.bootstrap_truncated), 0.0, next_values)
    returns = compute_returns(rewards, last_values, dones, args.gamma)
    whole = whole_returns(returns, dones)
    advantages = returns if args.reward_to_go else whole
    if args.baseline == "mean":  # without the own episode: with it g shrinks by (M - 1) / M
        advantages = advantages - (whole[dones].sum() - whole) / (dones.sum() - 1)
    elif args.baseline == "value":
        advantages = advantages - values
    return (torch.from_numpy(x).float().to(obs.device) for x in (advantages, returns, values))


def policy_loss(logprobs: Tensor, advantages: Tensor, num_episodes: int) -> Tensor:
    """Minus the sum of log pi A over all steps, tensors [B], per episode -> scalar; gradient -g."""
    return -(logprobs * advantages).sum() / num_episodes


def value_loss(values: Tensor, returns: Tensor) -> Tensor:
    """Half the mean squared error, tensors [B] -> scalar."""
    return 0.5 * ((values - returns) ** 2).mean()


METRICS = ("policy_loss", "entropy")

def total_loss(agent: Agent, batch, num_episodes: int, args: Args):
    """Minus L, whose gradient is g and that of the entropy bonus; and METRICS, as one tensor."""
    obs, actions, advantages, _ = batch
    policy = agent.policy(obs)
    logprobs, entropy = policy.log_prob(actions), policy.entropy()
    pg_loss = policy_loss(logprobs, advantages, num_episodes)
    loss = pg_loss - args.ent_coef * entropy.sum() / num_episodes
    return loss, torch.stack([pg_loss, entropy.mean()]).detach()


def policy_step(gradient: Tensor, rate: float, decay: float, args: Args) -> Tensor:
    """The change of theta along the gradient [P] of what is ascended; decay = rate / alpha_0."""
    norm = gradient.norm().clamp(min=1e-30)  # a gradient of 0 has no direction: no step
    if args.step_rule == "restricted":
        return decay * math.sqrt(2 * args.step_eps) * gradient / norm
    if args.step_rule == "clip-norm":
        gradient = gradient * (args.max_grad / norm).clamp(max=1)
    elif args.step_rule == "clip-value":
        gradient = gradient.clamp(-args.max_grad, args.max_grad)
    return rate * gradient


def critic_loss(agent: Agent, obs: Tensor, returns: Tensor) -> Tensor:
    return value_loss(agent.value(obs), returns)


def fit_critic(loss_function, agent: Agent, optimizer, grad, obs, returns, args: Args) -> float:
    """Regress V on the returns, tensors [B], by minibatches of Adam; the mean critic_loss. grad is
    the critic's flat gradient."""
    total, updates = torch.zeros((), device=obs.device), 0
    for _ in range(args.value_epochs):
        for index in torch.randperm(len(obs), device=obs.device).chunk(args.num_minibatches):
            loss = loss_function(agent, obs[index], returns[index])
            loss.backward()
            optimizer.step()
            grad.zero_()
            total, updates = total + loss.detach(), updates + 1
    return total.item() / updates


# --- Training -------------------------------------------------------------------------------------
def main(args: Args) -> None:
    # --- Setup ---
    device = check_args(args)
    N = args.num_envs
    M = N * args.num_episodes  # environments, episodes of an iteration
    if args.baseline == "mean" and M == 1:
        refuse("--baseline mean is that of the other episodes: take two or more")
    if args.bootstrap_truncated and args.baseline != "value":
        refuse("--bootstrap-truncated takes the critic's values: it needs --baseline value")
    to_tensor = lambda x: torch.from_numpy(x).to(device)
    envs = make_envs(args)
    agent = Agent(envs, args).to(device)
    named = agent.named_parameters()
    policy = nn.ParameterList(p for name, p in named if not name.startswith("critic"))
    theta, grad = flatten_parameters(policy)
    phi, phi_grad = flatten_parameters(agent.critic)
    optimizer = torch.optim.Adam([theta], lr=args.learning_rate, eps=1e-5, fused=True)
    critic_optimizer = torch.optim.Adam([phi], lr=args.value_learning_rate, eps=1e-5, fused=True)
    if args.evaluate:
        load_checkpoint(args.evaluate, agent)
        play(args, agent)
        return
    run = Run(args, agent, optimizer, args.total_timesteps)
    if run.extra:
        critic_optimizer.load_state_dict(run.extra["critic"])
    loss_function = torch.compile(total_loss) if args.compile else total_loss
    value_function = torch.compile(critic_loss) if args.compile else critic_loss
    act = torch.compile(agent.act) if args.compile and device.type == "cuda" else agent.act
    current_obs, iteration = np.zeros(0), run.iteration
    while run.step < args.total_timesteps:
        if run.step >= run.next_checkpoint:
            run.save(iteration, critic=critic_optimizer.state_dict())
            # An environment cannot be saved, so every run, resumed or not, starts new ones here.
            env_seeds = seed_everything(args.seed, iteration, N)
            envs.close()
            envs = make_envs(args)
            current_obs, _ = envs.reset(seed=env_seeds)
        decay = 1.0
        if args.lr_schedule == "linear":
            decay = 1 - run.step / args.total_timesteps
        elif args.lr_schedule == "robbins-monro":
            decay = 1 / (1 + iteration / args.robbins_monro_k0)
        learning_rate = args.learning_rate * decay
        optimizer.param_groups[0]["lr"] = learning_rate

        # --- 1. Collect ---
        rollout = []
        for env in envs.unwrapped.envs:
            env.episodes_left = args.num_episodes
        while (played := np.array([env.episodes_left > 0 for env in envs.unwrapped.envs])).any():
            if len(rollout) > args.total_timesteps * args.num_episodes:
                words = f"an episode did not end in {args.total_timesteps} steps"
                refuse(f"{words}; kept: {run.checkpoint}", 1)
            obs = current_obs.astype(np.float32)
            with torch.inference_mode():
                actions = act(to_tensor(obs), agent.draw_noise(N)).cpu().numpy()
            current_obs, rewards, terminated, truncated, infos = envs.step(actions)
            next_obs = current_obs.astype(np.float32)
            if "final_obs" in infos:
                ended = infos["_final_obs"]
                next_obs[ended] = np.stack(infos["final_obs"][ended])
            rollout.append((obs, next_obs, actions, rewards, terminated, truncated, played))
        arrays = map(np.stack, zip(*rollout))  # each [T, N, ...], T what the longest took
        obs, next_obs, actions, rewards, terminated, truncated, played = arrays
        dones = terminated | truncated
        run.count(obs, next_obs, rewards, dones, played)

        # --- 2. Advantages ---
        t_obs, t_next_obs, t_actions = (to_tensor(x) for x in (obs, next_obs, actions))
        scaled_rewards = rewards
        if args.norm_reward:
            sums, _ = discounted_returns(rewards, dones, np.zeros(N), args.gamma)
            agent.return_stats.update(to_tensor(sums[played]))
            scaled_rewards = (rewards / agent.return_stats.std.item()).clip(-10, 10)
        outcome = (t_obs, t_next_obs, scaled_rewards, terminated, dones)
        advantages, returns, old_values = estimate_advantages(agent, *outcome, args)

        # --- 3. Update ---
        mask = to_tensor(played)
        batch = [x[mask] for x in (t_obs, t_actions, advantages, returns)]  # each [B, ...]
        if args.norm_adv == "batch":
            batch[2] = normalize_advantages(batch[2])
        loss, metrics = loss_function(agent, batch, M, args)
        loss.backward()
        grad_norm = grad.norm()
        before = theta.detach().clone()
        if args.step_rule == "adam":
            optimizer.step()
        else:
            theta.data += policy_step(-grad, learning_rate, decay, args)
        step_norm = (theta.detach() - before).norm().item()
        grad.zero_()
        v_loss = 0.0
        if args.baseline == "value":  # only now, as a baseline that knew these returns is biased
            fit = (value_function, agent, critic_optimizer, phi_grad)
            v_loss = fit_critic(*fit, batch[0], batch[3], args)
        if args.norm_obs:  # only now, so that the whole iteration saw one normalisation
            agent.obs_stats.update(batch[0])

        # --- 4. Log ---
        losses: dict[str, float] = dict(zip(METRICS, metrics.tolist()))
        losses |= {"grad_norm": grad_norm.item(), "step_norm": step_norm}
        if args.baseline == "value":
            unexplained = (returns - old_values)[mask].var() / batch[3].var().clamp(min=1e-8)
            losses |= {"value_loss": v_loss, "explained_variance": 1 - unexplained.item()}
        run.log(losses, learning_rate)
        iteration += 1
    run.finish(iteration, critic=critic_optimizer.state_dict())


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
