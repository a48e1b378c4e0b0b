"""The numerics of the scripts against oracles: definitions, closed forms, other libraries."""

import json
import math
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch.distributions import (
    AffineTransform,
    Categorical,
    Normal,
    TanhTransform,
    TransformedDistribution,
    kl_divergence,
)

import a2c
import ppo
import ppo_continuous
import reinforce
from tests.envs import Bounded

GAE_SCRIPTS = [ppo, ppo_continuous]


def random_rollout(rng, T, N, p_terminated=0.1, p_truncated=0.1):
    """Rewards, values, next values, terminated and truncated flags, all independent, [T, N]."""
    rewards, values, next_values = rng.normal(size=(3, T, N))
    terminated, truncated = rng.random((T, N)) < p_terminated, rng.random((T, N)) < p_truncated
    return rewards, values, next_values, terminated, truncated


def gae_by_definition(rewards, values, next_values, terminated, dones, gamma, gae_lambda):
    """A_t as the sum over l of (gamma lambda)^l delta_{t+l}, up to the episode's end."""
    T, N = rewards.shape
    advantages = np.zeros((T, N))
    for n in range(N):
        for t in range(T):
            for k in range(t, T):
                bootstrap = 0.0 if terminated[k, n] else next_values[k, n]
                delta = rewards[k, n] + gamma * bootstrap - values[k, n]
                advantages[t, n] += (gamma * gae_lambda) ** (k - t) * delta
                if dones[k, n]:
                    break
    return advantages


# --- Advantages ---------------------------------------------------------------------------------


@pytest.mark.parametrize("script", GAE_SCRIPTS)
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    T=st.integers(1, 24),
    N=st.integers(1, 4),
    gamma=st.sampled_from([0.0, 0.5, 0.99, 1.0]),
    gae_lambda=st.sampled_from([0.0, 0.7, 0.95, 1.0]),
)
def test_gae_is_its_definition(script, seed, T, N, gamma, gae_lambda):
    rewards, values, next_values, terminated, truncated = random_rollout(
        np.random.default_rng(seed), T, N
    )
    outcome = rewards, values, next_values, terminated, terminated | truncated
    expected = gae_by_definition(*outcome, gamma, gae_lambda)
    advantages = script.compute_gae(*outcome, gamma, gae_lambda)
    np.testing.assert_allclose(advantages, expected, atol=1e-12)


@pytest.mark.parametrize("script", GAE_SCRIPTS)
def test_gae_limits_are_monte_carlo_and_td(script):
    rng, gamma = np.random.default_rng(0), 0.9
    rewards, values, next_values, _, _ = random_rollout(rng, 12, 3)
    terminated = np.zeros((12, 3), bool)
    terminated[[4, 11]] = True
    next_values[:-1] = values[1:]
    outcome = rewards, values, next_values, terminated, terminated
    monte_carlo = np.zeros((12, 3))
    for start, end in ((0, 5), (5, 12)):
        for t in range(start, end):
            discounts = gamma ** np.arange(end - t)
            monte_carlo[t] = (discounts[:, None] * rewards[t:end]).sum(0)
    np.testing.assert_allclose(script.compute_gae(*outcome, gamma, 1.0) + values, monte_carlo)
    td_error = rewards + gamma * next_values * ~terminated - values
    np.testing.assert_allclose(script.compute_gae(*outcome, gamma, 0.0), td_error)


@pytest.mark.parametrize("script", GAE_SCRIPTS)
@pytest.mark.parametrize("terminates_too", [False, True])
def test_a_truncated_rollout_is_two_trajectories(script, terminates_too):
    rng = np.random.default_rng(1)
    rewards, values, next_values, _, _ = random_rollout(rng, 10, 2)
    terminated, dones = np.zeros((2, 10, 2), bool)
    terminated[5], dones[5] = terminates_too, True  # both at once: the termination wins
    outcome = rewards, values, next_values, terminated, dones
    whole = script.compute_gae(*outcome, 0.95, 0.9)
    first = script.compute_gae(*(x[:6] for x in outcome), 0.95, 0.9)
    second = script.compute_gae(*(x[6:] for x in outcome), 0.95, 0.9)
    np.testing.assert_array_equal(whole, np.concatenate([first, second]))
    last = rewards[5] + (0.0 if terminates_too else 0.95 * next_values[5]) - values[5]
    np.testing.assert_allclose(whole[5], last)


@pytest.mark.parametrize("script", GAE_SCRIPTS)
def test_gae_agrees_with_stable_baselines3(script):
    from stable_baselines3.common.buffers import RolloutBuffer

    rng, T, N = np.random.default_rng(2), 50, 3
    rewards, values, _, terminated, _ = random_rollout(rng, T, N)
    last_value = rng.normal(size=N)
    buffer = RolloutBuffer(
        T, gym.spaces.Box(-1, 1, (2,)), gym.spaces.Discrete(2), "cpu", 0.95, 0.99, N
    )
    starts = np.ones(N)
    for t in range(T):
        obs, actions, value = np.zeros((N, 2)), np.zeros((N, 1)), torch.tensor(values[t])
        buffer.add(obs, actions, rewards[t], starts, value, torch.zeros(N))
        starts = terminated[t]
    buffer.compute_returns_and_advantage(torch.tensor(last_value), terminated[-1])
    next_values = np.concatenate([values[1:], last_value[None]])
    ours = script.compute_gae(rewards, values, next_values, terminated, terminated, 0.99, 0.95)
    np.testing.assert_allclose(ours, buffer.advantages, atol=1e-4)  # theirs is float32


@pytest.mark.parametrize("script", GAE_SCRIPTS)
def test_discounted_returns_restart_with_the_episode(script):
    rng, gamma = np.random.default_rng(3), 0.9
    rewards, dones = rng.normal(size=(9, 2)), rng.random((9, 2)) < 0.3
    expected, sums = np.zeros((9, 2)), np.zeros(2)
    for t in range(9):
        for n in range(2):
            start = max((k + 1 for k in range(t) if dones[k, n]), default=0)
            expected[t, n] = sum(gamma ** (t - k) * rewards[k, n] for k in range(start, t + 1))
    np.testing.assert_allclose(script.discounted_returns(rewards, dones, sums, gamma)[0], expected)
    # Cutting the rollout anywhere changes nothing when the running sum is carried over.
    first, sums = script.discounted_returns(rewards[:4], dones[:4], sums, gamma)
    second, _ = script.discounted_returns(rewards[4:], dones[4:], sums, gamma)
    np.testing.assert_allclose(np.concatenate([first, second]), expected)


@pytest.mark.parametrize("script", GAE_SCRIPTS)
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=6),
    offset=st.sampled_from([0.0, 1e4]),
)
def test_running_stats_are_those_of_all_the_data(script, seed, sizes, offset):
    rng = np.random.default_rng(seed)
    samples = [rng.normal(offset, 3.0, size=(n, 2)) for n in sizes]
    running = script.RunningStats(2)
    for sample in samples:
        running.update(torch.from_numpy(sample))
    data = np.concatenate(samples)
    np.testing.assert_allclose(running.mean, data.mean(0), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(running.var, data.var(0), rtol=1e-6, atol=1e-9)
    assert running.count == len(data)


@pytest.mark.parametrize("script", [ppo, reinforce])
@pytest.mark.parametrize("seed", range(20))
def test_episodes_are_counted_as_one_by_one(script, seed):
    """Returns and lengths over three rollouts, against a walk through each environment's steps."""
    rng = np.random.default_rng(seed)
    run, N, T = object.__new__(script.Run), int(rng.integers(1, 5)), int(rng.integers(1, 30))
    run.step, run.returns, run.ended, run.checkpoint = 0, [], [], None
    run.open_episodes = np.zeros((2, N))
    totals, expected, steps = np.zeros((2, N)), [], 0
    for _ in range(3):
        rewards, dones = rng.normal(size=(T, N)), rng.random((T, N)) < rng.choice([0.02, 0.3])
        played = rng.random((T, N)) < 0.8
        run.count(np.zeros((T, N, 1)), np.zeros((T, N, 1)), rewards, dones, played)
        steps += played.sum()
        for t in range(T):
            totals += rewards[t], played[t]
            for i in np.flatnonzero(dones[t]):
                expected.append(totals[:, i].tolist())
                totals[:, i] = 0
    assert len(run.ended) == len(expected) and run.step == steps
    if expected:
        np.testing.assert_allclose(run.ended, expected, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(run.returns, np.array(expected)[-100:, 0], atol=1e-12)
    np.testing.assert_allclose(run.open_episodes, totals, atol=1e-12)


@pytest.mark.parametrize("script", GAE_SCRIPTS)
def test_advantages_are_normalised_and_a_single_one_survives(script):
    advantages = torch.tensor([1.0, 2.0, 4.0])
    normalised = script.normalize_advantages(advantages)
    expected = (np.array([1, 2, 4]) - 7 / 3) / np.std([1, 2, 4], ddof=1)
    np.testing.assert_allclose(normalised, expected, rtol=1e-5)
    assert script.normalize_advantages(torch.tensor([3.0])).tolist() == [3.0]
    assert script.normalize_advantages(torch.ones(4)).tolist() == [0.0] * 4


@pytest.mark.parametrize("script", GAE_SCRIPTS)
@pytest.mark.parametrize("norm_adv", ["minibatch", "batch"])
def test_estimated_advantages_and_returns_are_those_of_the_critic(script, norm_adv):
    rng, T, N = np.random.default_rng(4), 7, 3
    rewards, _, _, terminated, truncated = random_rollout(rng, T, N)
    obs, next_obs = torch.randn(2, T, N, 3)
    agent = SimpleNamespace(value=lambda x: x.sum(-1))
    args = script.Args(norm_adv=norm_adv, gamma=0.9, gae_lambda=0.8)
    outcome = obs, next_obs, rewards, terminated, terminated | truncated
    advantages, returns, old_values = script.estimate_advantages(agent, *outcome, args)
    values, next_values = obs.sum(-1).numpy(), next_obs.sum(-1).numpy()
    np.testing.assert_array_equal(old_values, values)
    expected = gae_by_definition(rewards, values, next_values, *outcome[3:], 0.9, 0.8)
    np.testing.assert_allclose(returns, expected + values, rtol=1e-5, atol=1e-5)
    if norm_adv == "batch":
        expected = (expected - expected.mean()) / expected.std(ddof=1)
    np.testing.assert_allclose(advantages, expected, rtol=1e-5, atol=1e-5)


# --- PPO's objectives -----------------------------------------------------------------------------

# The six cases of sign and side, eps = 0.2: ratio -> (objective, its derivative in the ratio).
CLIPPED = {
    +1.0: {0.5: (0.5, 1), 0.8: (0.8, 1), 1.0: (1.0, 1), 1.1: (1.1, 1), 1.2: (1.2, None)}
    | {1.5: (1.2, 0), 2.0: (1.2, 0)},
    -1.0: {0.5: (-0.8, 0), 0.7: (-0.8, 0), 0.8: (-0.8, None), 1.0: (-1.0, -1), 1.2: (-1.2, -1)}
    | {1.5: (-1.5, -1), 2.0: (-2.0, -1)},
}


@pytest.mark.parametrize(
    "advantage,ratio,objective,gradient",
    [(a, r, o, g) for a, cases in CLIPPED.items() for r, (o, g) in cases.items()],
)
def test_clipped_objective_and_its_gradient(advantage, ratio, objective, gradient):
    logprob = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    old, adv = torch.zeros(1, dtype=torch.float64), torch.tensor([advantage], dtype=torch.float64)
    loss = ppo.policy_loss(logprob, old, adv, 0.2)
    assert loss.item() == pytest.approx(-objective, abs=1e-12)
    loss.backward()
    if gradient is not None:  # at the kink itself either one-sided derivative is right
        assert logprob.grad is not None
        in_ratio = -logprob.grad.item() / ratio  # d ratio / d logprob = ratio
        assert in_ratio == pytest.approx(gradient, abs=1e-12)


def test_unclipped_objective_is_the_importance_weighted_mean():
    rng = torch.Generator().manual_seed(0)
    logprobs, old, adv = torch.randn(3, 7, generator=rng, dtype=torch.float64)
    expected = -np.mean(np.exp((logprobs - old).numpy()) * adv.numpy())
    assert ppo.policy_loss(logprobs, old, adv, None).item() == pytest.approx(expected)
    assert ppo.policy_loss(logprobs, old, adv, 1e9).item() == pytest.approx(expected)


def test_everything_the_losses_see_is_flat():
    """[B] against [B, 1] would silently become [B, B]: log-probs and values come out as [B]."""
    agent, _ = small_agent()
    obs, actions = torch.randn(5, 3), torch.zeros(5, dtype=torch.int64)
    assert agent.policy(obs).log_prob(actions).shape == agent.value(obs).shape == (5,)
    assert agent.policy(obs).entropy().shape == agent.act(obs, 0.0).shape == (5,)


def test_value_loss_and_its_clip():
    values = torch.tensor([1.0, 1.0, 3.0, -2.0], requires_grad=True)
    old, returns = torch.zeros(4), torch.tensor([2.0, 0.5, 0.0, -5.0])
    assert ppo.value_loss(values, old, returns, None).item() == pytest.approx(
        0.5 * np.mean([1.0, 0.25, 9.0, 9.0])
    )
    # Held within +-0.5 of 0 the values are 0.5, 0.5, 0.5, -0.5; the larger error counts.
    loss = ppo.value_loss(values, old, returns, 0.5)
    assert loss.item() == pytest.approx(0.5 * np.mean([2.25, 0.25, 9.0, 20.25]))
    loss.backward()
    # The first and the last have moved by more than 0.5 towards their return: no gradient.
    assert values.grad is not None
    np.testing.assert_allclose(values.grad, [0.0, 0.125, 0.75, 0.0], atol=1e-7)


def test_kl_estimators_approach_the_exact_kl():
    rng = torch.Generator().manual_seed(0)
    old_logits, logits = torch.randn(2, 6, generator=rng, dtype=torch.float64) * 0.5
    pi_old, pi = Categorical(logits=old_logits), Categorical(logits=logits)
    torch.manual_seed(0)
    actions = pi_old.sample((200_000,))
    k1, k3 = ppo.kl_estimates(pi.log_prob(actions), pi_old.log_prob(actions))
    exact = kl_divergence(pi_old, pi).item()
    for k in (k1, k3):
        assert abs(k.mean().item() - exact) < 4 * k.std().item() / math.sqrt(len(k))
    assert k3.min() >= 0 and k1.min() < 0
    assert k3.std() < k1.std()


def test_kl_penalty_gradient_is_unbiased():
    """Enumerated over all actions, E_old[grad k1] = E_old[grad k3] = grad KL(pi_old, pi)."""
    rng = torch.Generator().manual_seed(1)
    old_logits = torch.randn(5, generator=rng, dtype=torch.float64)
    logits = torch.randn(5, generator=rng, dtype=torch.float64).requires_grad_()
    pi_old, pi = Categorical(logits=old_logits), Categorical(logits=logits)
    actions = torch.arange(5)
    k1, k3 = ppo.kl_estimates(pi.log_prob(actions), pi_old.log_prob(actions))
    (exact,) = torch.autograd.grad(kl_divergence(pi_old, pi), logits, retain_graph=True)
    for k in (k1, k3):
        (gradient,) = torch.autograd.grad((pi_old.probs * k).sum(), logits, retain_graph=True)
        torch.testing.assert_close(gradient, exact)
    assert exact.abs().max() > 0.01


def test_adaptive_kl_coefficient():
    for kl, factor in ((0.0, 0.5), (0.0066, 0.5), (0.0067, 1), (0.0149, 1), (0.0151, 2), (9.0, 2)):
        assert ppo.adapt_kl_coef(3.0, kl, 0.01) == 3.0 * factor


# --- The agent ------------------------------------------------------------------------------------


def spaces(action_space) -> Any:
    """What an Agent asks of its environments: observations in R^3, and these actions."""
    obs_space = gym.spaces.Box(-1, 1, (3,))
    return SimpleNamespace(single_observation_space=obs_space, single_action_space=action_space)


def small_agent(**flags):
    args = ppo.Args(hidden_size=8, **flags)
    torch.manual_seed(0)
    return ppo.Agent(spaces(gym.spaces.Discrete(4)), args), args


def test_act_samples_the_softmax():
    agent, _ = small_agent()
    with torch.no_grad():
        next(agent.actor[-1].parameters()).mul_(300)  # far from uniform
        obs = torch.randn(1, 3)
        actions = agent.act(obs, agent.draw_noise(100_000))
        probs = agent.policy(obs).probs[0]
    assert probs.max() > 0.4
    counts = np.bincount(actions.numpy(), minlength=4)
    expected = probs.double().numpy() / probs.double().sum().item() * 100_000
    assert stats.chisquare(counts, expected).pvalue > 1e-3
    assert agent.act(obs, 0.0) == probs.argmax()


def test_normalisation_lives_in_the_state_dict_and_clips():
    agent, _ = small_agent(norm_obs=True)
    data = torch.randn(1000, 3) * torch.tensor([1.0, 10.0, 1e-3]) + 5
    agent.obs_stats.update(data)
    other, _ = small_agent(norm_obs=True)
    other.load_state_dict(agent.state_dict())
    torch.testing.assert_close(other.policy(data).logits, agent.policy(data).logits, rtol=0, atol=0)
    normalised = agent.normalize(data)
    torch.testing.assert_close(normalised[:, :2].mean(0), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(normalised[:, :2].std(0), torch.ones(2), atol=1e-3, rtol=0)
    assert agent.normalize(torch.full((1, 3), 1e9)).tolist() == [[10.0] * 3]


def test_orthogonal_initialisation_and_its_gains():
    agent, _ = small_agent()
    for network, head_gain in ((agent.actor, 0.01), (agent.critic, 1.0)):
        for layer, gain in zip(
            (m for m in network if isinstance(m, torch.nn.Linear)), (2**0.5, 2**0.5, head_gain)
        ):
            weight = layer.weight.detach()
            small = weight @ weight.T if len(weight) < weight.shape[1] else weight.T @ weight
            torch.testing.assert_close(small, gain**2 * torch.eye(len(small)), atol=1e-5, rtol=1e-5)
            assert not layer.bias.any()


def test_flat_parameters_train_as_separate_ones_do():
    """The scripts' clip and Adam on the vector equal torch's on the list; the modules follow it."""
    flat_agent, _ = small_agent()
    agent, _ = small_agent()
    theta, grad = ppo.flatten_parameters(flat_agent)
    assert theta.numel() == sum(p.numel() for p in agent.parameters())
    flat_adam = torch.optim.Adam([theta], lr=1e-2, eps=1e-5, fused=True)
    adam = torch.optim.Adam(agent.parameters(), lr=1e-2, eps=1e-5)
    for _ in range(3):
        obs, actions = torch.randn(16, 3), torch.randint(4, (16,))
        for a in (flat_agent, agent):
            (a.policy(obs).log_prob(actions).mean() + a.value(obs).square().mean()).backward()
        grad *= (0.05 / (grad.norm() + 1e-6)).clamp(max=1)
        torch.nn.utils.clip_grad_norm_(agent.parameters(), 0.05)
        flat_adam.step()
        adam.step()
        grad.zero_()
        adam.zero_grad()
    for p, q in zip(flat_agent.parameters(), agent.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    assert set(flat_agent.state_dict()) == set(agent.state_dict())


def test_total_loss_has_the_signs_of_equation_9():
    agent, args = small_agent(norm_adv="none", clip_vloss=False, ent_coef=0.3, vf_coef=0.7)
    obs, actions = torch.randn(6, 3), torch.randint(4, (6,))
    old_logprobs = (agent.policy(obs).log_prob(actions) + 0.4 * torch.randn(6)).detach()
    old_values, adv, returns = torch.randn(3, 6)
    batch = obs, actions, old_logprobs, adv, returns, old_values
    loss, metrics = ppo.total_loss(agent, batch, 0.2, 0.5, args)
    logits = agent.actor(obs).detach().double().numpy()
    logpi = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    logratio = logpi[np.arange(6), actions] - old_logprobs.double().numpy()
    ratio, a = np.exp(logratio), adv.double().numpy()
    surrogate = np.minimum(ratio * a, np.clip(ratio, 0.8, 1.2) * a).mean()
    entropy = -(np.exp(logpi) * logpi).sum(1).mean()
    error = 0.5 * ((agent.value(obs).detach() - returns).double().numpy() ** 2).mean()
    k3 = (ratio - 1 - logratio).mean()
    expected = -(surrogate - 0.5 * k3 - 0.7 * error + 0.3 * entropy)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    clipfrac = (np.abs(ratio - 1) > 0.2).mean()
    assert 0 < clipfrac < 1
    np.testing.assert_allclose(
        metrics, [-surrogate, error, entropy, -logratio.mean(), k3, clipfrac], rtol=1e-4
    )


# --- The Gaussian policy --------------------------------------------------------------------------


def gaussian_agent(low, high, **flags) -> Any:
    """An agent of ppo_continuous for these bounds, with weights far from the initial ones."""
    args = ppo_continuous.Args(hidden_size=8, norm_obs=False, **flags)
    space = gym.spaces.Box(np.array(low, np.float32), np.array(high, np.float32))
    torch.manual_seed(0)
    agent: Any = ppo_continuous.Agent(spaces(space), args)
    with torch.no_grad():
        agent.actor[-1].weight.mul_(100)
        agent.log_std.copy_(torch.linspace(-1.0, 0.5, len(low)))
    return agent


def test_gaussian_log_prob_and_entropy_are_those_of_scipy():
    agent = gaussian_agent([-1, -1, 0], [1, 2, np.inf])
    obs, u = torch.randn(6, 3), 2 * torch.randn(6, 3)
    policy = agent.policy(obs)
    gaussian = stats.norm(agent.actor(obs).detach().double(), agent.log_std.detach().double().exp())
    np.testing.assert_allclose(policy.log_prob(u).detach(), gaussian.logpdf(u).sum(1), rtol=1e-5)
    np.testing.assert_allclose(policy.entropy().detach(), gaussian.entropy().sum(1), rtol=1e-5)
    assert policy.log_prob(u).shape == policy.entropy().shape == agent.value(obs).shape == (6,)


def test_act_draws_from_the_policy():
    """Its samples have the policy's mean and std in each dimension, and are normal."""
    agent = gaussian_agent([-1, -1], [1, 2])
    with torch.no_grad():
        obs = torch.randn(1, 3)
        u = agent.act(obs, agent.draw_noise(50_000)).numpy()
        mean, std = agent.actor(obs)[0].numpy(), agent.log_std.exp().numpy()
    for k in range(2):
        assert stats.kstest((u[:, k] - mean[k]) / std[k], "norm").pvalue > 1e-3
    assert abs(np.corrcoef(u.T)[0, 1]) < 0.02
    np.testing.assert_array_equal(agent.act(obs, 0.0).detach()[0], mean)


def test_the_initial_std_is_the_flag():
    args = ppo_continuous.Args(log_std_init=-1.5)
    agent = ppo_continuous.Agent(spaces(gym.spaces.Box(-1, 1, (2,))), args)
    with torch.no_grad():
        u = agent.act(torch.zeros(1, 3), agent.draw_noise(20_000))
    np.testing.assert_allclose(u.std(0), math.exp(-1.5), rtol=0.03)


def squashed_agent(dtype=torch.float64) -> Any:
    return gaussian_agent([-0.5, 0.0], [3.0, 0.1], squash=True).to(dtype)


def test_squashed_log_prob_is_the_change_of_variables():
    """Against torch's transforms where a = low + scale (1 + tanh u) can still be inverted."""
    agent = squashed_agent()
    obs, u = torch.randn(50, 3).double(), 2 * torch.randn(50, 2).double()
    low, high = torch.tensor([-0.5, 0.0]).double(), torch.tensor([3.0, 0.1]).double()
    scale = (high - low) / 2
    transforms = [TanhTransform(), AffineTransform(low + scale, scale)]
    density = TransformedDistribution(Normal(agent.actor(obs), agent.log_std.exp()), transforms)
    a = low + scale * (1 + torch.tanh(u))
    torch.testing.assert_close(
        agent.policy(obs).log_prob(u), density.log_prob(a).sum(-1), rtol=1e-6, atol=1e-6
    )


def test_squashed_density_integrates_to_one_and_its_entropy_is_the_integral():
    agent = gaussian_agent([-0.5], [3.0], squash=True)
    agent = agent.double()
    obs = torch.randn(1, 3).double()
    a = np.linspace(-0.5, 3.0, 400_001)[1:-1]
    u = torch.from_numpy(np.arctanh((a + 0.5) / 1.75 - 1))[:, None]
    with torch.no_grad():
        logp = agent.policy(obs).log_prob(u).numpy()
        samples = agent.policy(obs.expand(400_000, 3)).entropy()
    density, width = np.exp(logp), a[1] - a[0]
    assert density.sum() * width == pytest.approx(1, abs=1e-4)
    entropy = -(density * logp).sum() * width
    error = samples.std().item() / math.sqrt(len(samples))
    assert abs(samples.mean().item() - entropy) < 4 * error < 0.02


def test_squashed_entropy_has_the_gradient_of_the_entropy():
    """By the mean and by the std, against differences of the integral."""
    agent = gaussian_agent([-0.5], [3.0], squash=True)
    agent = agent.double()
    a = np.linspace(-0.5, 3.0, 100_001)[1:-1]
    u = torch.from_numpy(np.arctanh((a + 0.5) / 1.75 - 1))[:, None]
    obs, bias = torch.zeros(1, 3).double(), agent.actor[-1].bias

    def integral():
        logp = agent.policy(obs).log_prob(u).detach().numpy()
        return -(np.exp(logp) * logp).sum() * (a[1] - a[0])

    torch.manual_seed(1)
    bias.data += 0.7
    agent.policy(obs.expand(400_000, 3)).entropy().mean().backward()
    for parameter in (bias, agent.log_std):
        ends = []
        for step in (-1e-3, 2e-3):
            parameter.data += step
            ends.append(integral())
        parameter.data -= 1e-3
        assert parameter.grad is not None
        assert parameter.grad.item() == pytest.approx((ends[1] - ends[0]) / 2e-3, abs=0.02)


def test_squashed_log_prob_is_stable_at_the_bounds():
    """tanh(20) is 1 in float32, where log(1 - tanh^2) is -inf and its gradient NaN."""
    agent = squashed_agent(torch.float32)
    obs = torch.randn(1, 3)
    u = torch.tensor([[0.0, 0.0], [20.0, -20.0], [-300.0, 300.0], [1e4, 1e-20]], requires_grad=True)
    logprobs = agent.policy(obs).log_prob(u)
    mean, std = agent.actor(obs).detach().double().numpy(), agent.log_std.exp().detach().numpy()
    exact = u.detach().double().numpy()
    # log(1 - tanh^2) = -2 log cosh, and log cosh(u) = |u| + log1p(exp(-2 |u|)) - log 2
    logcosh = np.abs(exact) + np.log1p(np.exp(-2 * np.abs(exact))) - math.log(2)
    slope = np.log(np.array([1.75, 0.05])) - 2 * logcosh
    expected = (stats.norm.logpdf(exact, mean, std) - slope).sum(1)
    np.testing.assert_allclose(logprobs.detach(), expected, rtol=1e-4)
    logprobs.sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in (u, agent.log_std))


def test_the_squash_cancels_in_the_ratio():
    """With the same u the Jacobian is in both log-probs: squashed or not, ratios are the same."""
    squashed = squashed_agent()
    plain = gaussian_agent([-0.5, 0.0], [3.0, 0.1])
    plain = plain.double()
    obs, u = torch.randn(20, 3).double(), torch.randn(20, 2).double()
    ratios = []
    for agent in (squashed, plain):
        old = agent.policy(obs).log_prob(u).detach()
        agent.log_std.data += 0.3
        ratios.append(agent.policy(obs).log_prob(u) - old)
    torch.testing.assert_close(*ratios)
    assert ratios[0].abs().max() > 0.1


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    "box,squash",
    [
        ([(-1, 1), (-1, 1)], False),
        ([(-0.1, 3), (2, 2.5)], False),
        ([(0, math.inf), (-math.inf, 1)], False),
        ([(-math.inf, math.inf), (-3e38, 3e38)], False),
        ([(-1, 1), (-1, 1)], True),
        ([(-0.1, 3), (2, 2.5)], True),
        ([(-1e4, 1e-4), (0.1, 0.1 + 1e-6)], True),
    ],
)
@settings(max_examples=40, deadline=None)
@given(u=st.lists(st.floats(width=32, allow_nan=False), min_size=2, max_size=2))
def test_whatever_u_the_action_is_within_its_bounds(box, squash, dtype, u):
    """Clipped: u itself inside, the bound outside. Squashed: as the formula has it."""
    kwargs = json.dumps({"box": box, "dtype": dtype})
    flags = {"env_id": "tests.envs:Bounded-v0", "num_envs": 1, "env_kwargs": kwargs}
    envs = ppo_continuous.make_envs(ppo_continuous.Args(squash=squash, **flags))
    envs.reset(seed=1)
    Bounded.taken.clear()
    envs.step(np.array([u], np.float32))
    envs.close()
    (action,) = Bounded.taken  # which asserts its bounds
    low, high = np.array(box).T
    squashed = low + (high - low) / 2 * (1 + np.tanh(u)) if squash else np.clip(u, low, high)
    atol = 1e-6 * np.abs(box).max() if squash else 0.0  # of float32, where a sum ends near 0
    np.testing.assert_allclose(action, squashed, rtol=1e-5, atol=atol)


# --- Another library's updates --------------------------------------------------------------------


def twins(module: Any, model: Any, envs: Any, args: Any) -> tuple[Any, list, list]:
    """An agent with the weights of an SB3 model, and the parameters of both, one by one."""
    spaces: Any = SimpleNamespace(
        single_observation_space=envs.observation_space, single_action_space=envs.action_space
    )
    agent = module.Agent(spaces, args)
    layers = model.policy.mlp_extractor
    theirs = [*layers.policy_net.parameters(), *model.policy.action_net.parameters(),
              *layers.value_net.parameters(), *model.policy.value_net.parameters()]
    ours = [*agent.actor.parameters(), *agent.critic.parameters()]
    if getattr(agent, "log_std", None) is not None:
        theirs, ours = [*theirs, model.policy.log_std], [*ours, agent.log_std]
    for a, b in zip(ours, theirs, strict=True):
        a.data.copy_(b)
    return agent, ours, theirs


@pytest.mark.parametrize("env", ["CartPole-v1", "Hopper-v5"])
@pytest.mark.parametrize("optimizer", ["rmsprop", "adam"])
def test_updates_of_a2c_are_those_of_stable_baselines3(env, optimizer, monkeypatch):
    """Twenty in a row, on its rollouts, from its first weights; all of them clip the gradient."""
    from stable_baselines3 import A2C
    from stable_baselines3.common.env_util import make_vec_env

    envs = make_vec_env(env, 4, seed=1)
    networks = {"net_arch": [8, 8], "activation_fn": torch.nn.Tanh, "log_std_init": -0.5}
    networks |= {"optimizer_kwargs": {"eps": 1e-5}}
    options: Any = {"gae_lambda": 0.95, "use_rms_prop": optimizer == "rmsprop", "ent_coef": 0.5}
    options |= {"vf_coef": 0.25, "seed": 1, "device": "cpu", "policy_kwargs": networks}
    model = A2C("MlpPolicy", envs, **options)
    args = a2c.Args(hidden_size=8, optimizer=optimizer, ent_coef=0.5, vf_coef=0.5)  # type: ignore
    agent, ours, theirs = twins(a2c, model, envs, args)
    theta, grad = a2c.flatten_parameters(agent)
    ours_steps, their_step, norms = a2c.make_optimizer(theta, args), model.train, []

    def both():
        data = next(iter(model.rollout_buffer.get(batch_size=None)))
        actions = data.actions.long().flatten() if agent.log_std is None else data.actions
        batch = data.observations.float(), actions, data.advantages, data.returns
        a2c.total_loss(agent, batch, args)[0].backward()
        norms.append(grad.norm().item())
        grad.mul_(args.max_grad_norm / grad.norm())
        ours_steps.step()
        grad.zero_()
        their_step()
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a.data, b.data, rtol=1e-4, atol=1e-5)

    monkeypatch.setattr(model, "train", both)
    model.learn(20 * 4 * 5)
    assert len(norms) == 20 and min(norms) > args.max_grad_norm


@pytest.mark.parametrize("module,env", [(ppo, "CartPole-v1"), (ppo_continuous, "Hopper-v5")])
def test_updates_of_ppo_are_those_of_stable_baselines3(module, env, monkeypatch):
    """Four iterations of four epochs of four minibatches on its rollouts, from its first weights,
    with advantages estimated once; ratios and gradients are clipped on the way."""
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_vec_env

    envs = make_vec_env(env, 4, seed=1)
    networks = {"net_arch": [8, 8], "activation_fn": torch.nn.Tanh, "log_std_init": -0.5}
    networks |= {"optimizer_kwargs": {"eps": 1e-5}}
    options: Any = {"n_steps": 64, "batch_size": 64, "n_epochs": 4, "learning_rate": 0.01}
    options |= {"ent_coef": 0.1, "vf_coef": 0.25, "seed": 1, "device": "cpu"}
    model = PPO("MlpPolicy", envs, **options, policy_kwargs=networks)
    args = module.Args(hidden_size=8, ent_coef=0.1, vf_coef=0.5, clip_vloss=False)
    assert args.norm_adv == "minibatch" and args.clip_coef == 0.2
    agent, ours, theirs = twins(module, model, envs, args)
    theta, grad = module.flatten_parameters(agent)
    optimizer = torch.optim.Adam([theta], lr=0.01, eps=1e-5)
    draw, their_step, norms, clipped = model.rollout_buffer.get, model.train, [], []

    def both():
        taken = []
        recording = lambda size: (taken.append(data) or data for data in draw(size))
        monkeypatch.setattr(model.rollout_buffer, "get", recording)
        their_step()
        for data in taken:
            actions = data.actions.long().flatten() if module is ppo else data.actions
            batch = (data.observations.float(), actions, data.old_log_prob, data.advantages,
                     data.returns, data.old_values)
            loss, metrics = module.total_loss(agent, batch, 0.2, torch.tensor(0.0), args)
            loss.backward()
            norms.append(grad.norm().item())
            grad.mul_(min(1, args.max_grad_norm / (norms[-1] + 1e-6)))
            optimizer.step()
            grad.zero_()
            clipped.append(dict(zip(module.METRICS, metrics.tolist()))["clipfrac"])
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a.data, b.data, rtol=1e-3, atol=1e-4)

    monkeypatch.setattr(model, "train", both)
    model.learn(4 * 4 * 64)
    assert len(norms) == 64 and max(norms) > args.max_grad_norm and max(clipped) > 0.05
