"""The numerics of the lower rungs: reinforce and a2c against enumeration, definitions, and the
scripts above them."""

import itertools
import math
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch.distributions import Categorical

import a2c
import npg
import ppo
import reinforce
import trpo

BOTH_SPACES: list[Any] = [reinforce, a2c, npg, trpo]


# --- REINFORCE on a task whose every episode can be listed ----------------------------------------

# From state 0, action 1 ends the episode at once; else state 1 follows, where either action leads
# to state 2, which ends it. An episode is the list of its states, actions and rewards.
STATES, ACTIONS, GAMMA = 3, 2, 0.8
PAY = np.array([[0.3, 1.1], [-0.7, 2.0], [1.7, 0.4]])  # [states, actions]


def all_episodes():
    """Every episode as [(state, action, reward), ...]."""
    episodes: list[list[tuple[int, int, float]]] = [[(0, 1, PAY[0, 1])]]
    for a, b in itertools.product(range(ACTIONS), repeat=2):
        episodes.append([(0, 0, PAY[0, 0]), (1, a, PAY[1, a]), (2, b, PAY[2, b])])
    return episodes


def probability(theta, episode):
    """Of an episode under the softmax of theta [states, actions]."""
    logp = torch.log_softmax(theta, -1)
    return torch.stack([logp[s, a] for s, a, _ in episode]).sum().exp()


def exact_gradient(theta, gamma):
    """Of the expected discounted return, by differentiating the sum over all episodes."""
    terms = [
        probability(theta, episode) * sum(gamma**t * r for t, (_, _, r) in enumerate(episode))
        for episode in all_episodes()
    ]
    return torch.autograd.grad(torch.stack(terms).sum(), theta)[0]


def estimate(theta, batch, gamma, values=(0.0, 0.0, 0.0), shift=0.0, **flags):
    """g of reinforce.py for a batch of episodes, one in each environment, in float64."""
    T, N = max(map(len, batch)), len(batch)
    states, actions = np.zeros((2, T, N), int)
    rewards, dones, played = np.zeros((T, N)), np.zeros((T, N), bool), np.zeros((T, N), bool)
    for n, episode in enumerate(batch):
        for t, (state, action, reward) in enumerate(episode):
            states[t, n], actions[t, n], rewards[t, n], played[t, n] = state, action, reward, True
        dones[len(episode) - 1, n] = True
    table = torch.tensor(values)
    agent: Any = SimpleNamespace(
        value=lambda s: table[s], policy=lambda s: Categorical(logits=theta[s])
    )
    args = reinforce.Args(gamma=gamma, norm_adv="none", ent_coef=0.0, **flags)
    t_states = torch.from_numpy(states)
    outcome = t_states, t_states, rewards, dones, dones
    advantages, _, _ = reinforce.estimate_advantages(agent, *outcome, args)
    mask = torch.from_numpy(played)
    logprobs = agent.policy(t_states[mask]).log_prob(torch.from_numpy(actions)[mask])
    loss = reinforce.policy_loss(logprobs, advantages[mask].double() + shift, N)
    return -torch.autograd.grad(loss, theta)[0]


def expected_estimate(theta, num_episodes, gamma, **flags):
    """The mean of g over all batches of num_episodes, weighted by their probabilities."""
    total = torch.zeros_like(theta)
    for batch in itertools.product(all_episodes(), repeat=num_episodes):
        weight = math.prod(probability(theta, episode).item() for episode in batch)
        total += weight * estimate(theta, batch, gamma, **flags)
    return total


@pytest.fixture
def theta():
    return torch.tensor(
        [[0.2, -0.4], [0.7, 0.1], [-0.3, 0.5]], dtype=torch.float64
    ).requires_grad_()


CHOICES: list[dict[str, Any]] = [
    {"baseline": "none"},
    {"baseline": "none", "reward_to_go": False},
    {"baseline": "mean"},
    {"baseline": "mean", "reward_to_go": False},
    {"baseline": "value", "values": (0.9, -2.0, 1.3)},
    {"baseline": "value", "values": (0.9, -2.0, 1.3), "reward_to_go": False},
]


@pytest.mark.parametrize("flags", CHOICES, ids=str)
def test_the_estimator_is_unbiased(theta, flags):
    """The episodes differ in length: divided by steps instead of episodes it would not be."""
    total = sum(probability(theta, episode).item() for episode in all_episodes())
    assert total == pytest.approx(1)
    exact = exact_gradient(theta, 1.0)
    torch.testing.assert_close(
        expected_estimate(theta, 2, 1.0, **flags), exact, rtol=1e-6, atol=1e-7
    )
    assert exact.abs().max() > 0.1


def test_a_whole_discounted_return_is_unbiased_and_reward_to_go_is_not(theta):
    """What the docstring says of the factor gamma^t that everybody drops."""
    exact = exact_gradient(theta, GAMMA)
    whole = expected_estimate(theta, 1, GAMMA, baseline="none", reward_to_go=False)
    torch.testing.assert_close(whole, exact, rtol=1e-6, atol=1e-7)
    to_go = expected_estimate(theta, 1, GAMMA, baseline="none")
    torch.testing.assert_close(to_go[0], exact[0], rtol=1e-6, atol=1e-7)  # gamma^0
    torch.testing.assert_close(to_go[1] * GAMMA, exact[1], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(to_go[2] * GAMMA**2, exact[2], rtol=1e-6, atol=1e-7)


def test_the_mean_baseline_leaves_the_own_episode_out(theta):
    """With it in, the gradient shrinks by (M - 1) / M, here by a half: the docstring's number."""
    flags: dict[str, Any] = {"baseline": "none", "reward_to_go": False}
    total = torch.zeros_like(theta)
    for batch in itertools.product(all_episodes(), repeat=2):
        weight = math.prod(probability(theta, episode).item() for episode in batch)
        mean = np.mean([sum(r for _, _, r in episode) for episode in batch])
        total += weight * estimate(theta, batch, 1.0, shift=-float(mean), **flags)
    torch.testing.assert_close(total, exact_gradient(theta, 1.0) / 2, rtol=1e-6, atol=1e-7)


def test_baselines_lower_the_variance(theta):
    def variance(**flags):
        batches = itertools.product(all_episodes(), repeat=2)
        exact, total = exact_gradient(theta, 1.0), 0.0
        for batch in batches:
            weight = math.prod(probability(theta, episode).item() for episode in batch)
            total += weight * ((estimate(theta, batch, 1.0, **flags) - exact) ** 2).sum().item()
        return total

    raw = variance(baseline="none", reward_to_go=False)
    assert variance(baseline="none") < raw
    assert variance(baseline="mean", reward_to_go=False) < raw
    assert variance(baseline="mean") < variance(baseline="none")
    logp = torch.log_softmax(theta, -1).exp().detach().numpy()
    v2 = logp[2] @ PAY[2]
    v1 = logp[1] @ PAY[1] + v2
    v0 = logp[0, 1] * PAY[0, 1] + logp[0, 0] * (PAY[0, 0] + v1)
    assert variance(baseline="value", values=(v0, v1, v2)) < variance(baseline="none")


@pytest.mark.parametrize("bootstrap", [False, True])
def test_returns_are_their_definition(bootstrap):
    """Termination ends the sum, truncation too or with gamma^k V of the last observation."""
    rng, (T, N) = np.random.default_rng(0), (15, 3)
    rewards, values = rng.normal(size=(2, T, N))
    terminated, truncated = rng.random((2, T, N)) < 0.15
    truncated[-1] = True
    terminated[-1, 0] = True  # both at once: the termination wins
    dones = terminated | truncated
    next_obs = torch.arange(T * N).view(T, N)
    agent: Any = SimpleNamespace(value=lambda x: torch.from_numpy(values).flatten()[x])
    args = reinforce.Args(gamma=0.9, bootstrap_truncated=bootstrap, baseline="value")
    outcome = next_obs, next_obs, rewards, terminated, dones
    advantages, returns, _ = reinforce.estimate_advantages(agent, *outcome, args)
    args.reward_to_go = False
    whole, _, _ = reinforce.estimate_advantages(agent, *outcome, args)
    for n in range(N):
        start = 0
        for t in range(T):
            end = next(k for k in range(t, T) if dones[k, n])
            expected = sum(0.9 ** (k - t) * rewards[k, n] for k in range(t, end + 1))
            if bootstrap and not terminated[end, n]:
                expected += 0.9 ** (end + 1 - t) * values[end, n]
            assert returns[t, n] == pytest.approx(expected, rel=1e-5, abs=1e-6)
            assert advantages[t, n] == pytest.approx(expected - values[t, n], rel=1e-5, abs=1e-6)
            start = t if t == 0 or dones[t - 1, n] else start
            expected = returns[start, n].item() - values[t, n]
            assert whole[t, n] == pytest.approx(expected, rel=1e-4, abs=1e-5)


# --- How far to step ------------------------------------------------------------------------------


def step_of(rule, gradient, rate=0.1, decay=1.0, **flags):
    return reinforce.policy_step(gradient, rate, decay, reinforce.Args(step_rule=rule, **flags))


def test_step_rules_are_their_formulas():
    g = torch.tensor([3.0, -4.0, 0.0])
    torch.testing.assert_close(step_of("gradient", g), torch.tensor([0.3, -0.4, 0.0]))
    clipped = step_of("clip-norm", g, max_grad=0.5)
    torch.testing.assert_close(clipped, torch.tensor([0.03, -0.04, 0.0]))  # direction kept
    torch.testing.assert_close(step_of("clip-norm", g, max_grad=6.0), 0.1 * g)  # short enough
    turned = step_of("clip-value", g, max_grad=3.5)
    torch.testing.assert_close(turned, torch.tensor([0.3, -0.35, 0.0]))
    restricted = step_of("restricted", g, step_eps=0.02)
    torch.testing.assert_close(restricted, 0.2 * g / 5)
    torch.testing.assert_close(step_of("restricted", g, decay=0.5, step_eps=0.02), 0.1 * g / 5)
    for rule in ("gradient", "clip-norm", "clip-value", "restricted"):
        assert step_of(rule, torch.zeros(3)).tolist() == [0.0] * 3


def test_the_restricted_step_is_as_long_whatever_the_gradient_and_the_best_of_that_length():
    torch.manual_seed(0)
    g = torch.randn(20)
    for scale in (1e-12, 1e-3, 1.0, 1e6):
        step = step_of("restricted", scale * g, step_eps=1e-3)
        assert 0.5 * (step**2).sum() == pytest.approx(1e-3, rel=1e-5)
    others = torch.randn(1000, 20)
    others *= math.sqrt(2e-3) / others.norm(dim=1, keepdim=True)
    assert (others @ g).max() < step @ g


def test_schedules(monkeypatch, tmp_path):
    """alpha_k as logged: constant, falling to 0 with the steps, alpha / (1 + k/k0)."""
    rates: dict[str, list[float]] = {}

    class Recorder(reinforce.Run):
        def log(self, losses, learning_rate):
            rates.setdefault(self.args.lr_schedule, []).append(learning_rate)
            before.append((self.step, self.iteration))
            super().log(losses, learning_rate)

    monkeypatch.setattr(reinforce, "Run", Recorder)
    for name in ("constant", "linear", "robbins-monro"):
        before: list[tuple[int, int]] = [(0, 0)]
        flags = (
            f"--lr-schedule {name} --total-timesteps 2000 --robbins-monro-k0 4 --eval-episodes 1 "
            "--num-envs 2"
        )
        reinforce.main(reinforce.parse_args([*flags.split(), "--run-dir", str(tmp_path / name)]))
        if name == "linear":
            expected = [3e-3 * (1 - step / 2000) for step, _ in before[:-1]]
            assert rates[name] == pytest.approx(expected)
    assert set(rates["constant"]) == {3e-3}
    steps = np.arange(len(rates["robbins-monro"]))
    np.testing.assert_allclose(rates["robbins-monro"], 3e-3 / (1 + steps / 4))
    assert rates["robbins-monro"][4] == pytest.approx(1.5e-3)  # halved at k0
    # Their sum has no bound and that of their squares has one: neither other schedule keeps both.
    K, k0 = len(steps), 4
    kept = {
        name: (np.sum(x) >= 3e-3 * k0 * math.log(1 + len(x) / k0),
               np.sum(np.square(x)) <= 3e-3**2 * (1 + k0))
        for name, x in rates.items()
    }
    assert K > 20 and kept["robbins-monro"] == (True, True)
    assert kept["constant"] == (True, False) and not all(kept["linear"])


# --- Whole episodes -------------------------------------------------------------------------------


class Countdown(gym.Env):
    """Episodes of random length whose every step pays 1; counts the steps of all environments."""

    observation_space = gym.spaces.Box(-1, 99, (1,))
    action_space = gym.spaces.Discrete(2)
    steps = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left = int(self.np_random.integers(1, 30))
        return np.array([self.left], np.float32), {}

    def step(self, action):
        Countdown.steps += 1
        self.left -= 1
        return np.array([self.left], np.float32), 1.0, self.left == 0, False, {}


gym.register("Countdown-v0", "tests.test_ladder:Countdown")


def test_every_environment_plays_as_many_episodes_and_no_step_for_nothing(monkeypatch, tmp_path):
    """The first K to finish would be the short ones."""
    batches = []
    original = reinforce.total_loss
    keep = lambda agent, batch, M, args: (
        batches.append((batch, M)) or original(agent, batch, M, args)
    )
    monkeypatch.setattr(reinforce, "total_loss", keep)
    monkeypatch.setattr(reinforce, "play", lambda *_: np.zeros(1))
    Countdown.steps = 0
    flags = "--env-id Countdown-v0 --num-envs 3 --num-episodes 2 --total-timesteps 3000"
    reinforce.main(reinforce.parse_args([*flags.split(), "--run-dir", str(tmp_path)]))
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert checkpoint["step"] == Countdown.steps == sum(len(batch[0]) for batch, _ in batches)
    assert len(batches) > 20
    for (obs, _, _, returns), M in batches:
        ends = obs.squeeze(1) == 1  # what an episode saw before its last step
        assert M == 6 and ends.sum() == 6
        lengths = obs.squeeze(1)
        torch.testing.assert_close(returns, (1 - 0.99**lengths) / (1 - 0.99), rtol=1e-4, atol=1e-4)
    mean_length = Countdown.steps / (6 * len(batches))
    assert mean_length == pytest.approx(15, abs=1.5)  # uniform on 1 to 29


def test_an_episode_without_end_stops_the_run(tmp_path, capsys):
    gym.register("Endless-v0", "tests.envs:Toy")
    flags = [
        "--env-id",
        "Endless-v0",
        "--total-timesteps",
        "200",
        "--run-dir",
        str(tmp_path / "run"),
    ]
    with pytest.raises(SystemExit) as stopped:
        reinforce.main(reinforce.parse_args(flags))
    assert stopped.value.code == 1
    err = capsys.readouterr().err
    assert "did not end" in err and err.count("\n") == 1


# --- A2C ------------------------------------------------------------------------------------------


def test_tensorflow_rmsprop_is_its_formula_and_begins_gently():
    """In float64; torch's begins with 10 learning rates for every component, however small."""
    rng = np.random.default_rng(0)
    gradients = rng.normal(size=(50, 4)) * [1e-3, 1.0, 1e2, 1.0]
    start = torch.zeros(4, dtype=torch.float64)
    theta = {name: torch.nn.Parameter(start.clone()) for name in ("tf", "torch")}
    args: dict[str, Any] = {"lr": 7e-4, "alpha": 0.99, "eps": 1e-5}
    optimizers: dict[str, Any] = {
        "tf": a2c.TensorFlowRMSprop([theta["tf"]], **args),
        "torch": torch.optim.RMSprop([theta["torch"]], **args),
    }
    expected, v = np.zeros(4), np.ones(4)
    for k, g in enumerate(gradients):
        v = 0.99 * v + 0.01 * g**2
        expected -= 7e-4 * g / np.sqrt(v + 1e-5)
        for name, optimizer in optimizers.items():
            theta[name].grad = torch.from_numpy(g.copy())
            optimizer.step()
        if k == 0:
            first = theta["torch"].detach().numpy()
            np.testing.assert_allclose(first[1:], -7e-3 * np.sign(g[1:]), rtol=2e-3)
            assert abs(theta["tf"][1].item()) < 1e-3
    np.testing.assert_allclose(theta["tf"].detach().numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize(
    "name,kind",
    [("adam", torch.optim.Adam), ("rmsprop", torch.optim.RMSprop), ("rmsprop-tf", None)],
)
def test_the_optimizer_is_the_one_that_was_asked_for(name, kind):
    args = a2c.Args(optimizer=name, learning_rate=0.1, rmsprop_alpha=0.5, optimizer_eps=0.2)
    optimizer = a2c.make_optimizer(torch.nn.Parameter(torch.zeros(2)), args)
    assert type(optimizer) is (kind or a2c.TensorFlowRMSprop)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["eps"], group.get("alpha", 0.5)) == (0.1, 0.2, 0.5)


def spaces(action_space) -> Any:
    observations = gym.spaces.Box(-1, 1, (3,))
    return SimpleNamespace(single_observation_space=observations, single_action_space=action_space)


def test_one_epoch_of_unclipped_ppo_has_the_gradient_of_a2c():
    """One minibatch, raw advantages: at ratio 1 the two losses have the same gradient."""
    torch.manual_seed(0)
    args, args_of_ppo = a2c.Args(ent_coef=0.3, vf_coef=0.7), ppo.Args(ent_coef=0.3, vf_coef=0.7)
    args_of_ppo.norm_adv, args_of_ppo.clip_vloss = "none", False
    agent = a2c.Agent(spaces(gym.spaces.Discrete(4)), args)
    other = ppo.Agent(spaces(gym.spaces.Discrete(4)), args_of_ppo)
    other.load_state_dict(agent.state_dict())
    obs, actions = torch.randn(32, 3), torch.randint(4, (32,))
    advantages, returns = torch.randn(2, 32)
    loss, _ = a2c.total_loss(agent, (obs, actions, advantages, returns), args)
    loss.backward()
    with torch.no_grad():
        old = other.policy(obs).log_prob(actions), other.value(obs)
    batch = obs, actions, old[0], advantages, returns, old[1]
    other_loss, _ = ppo.total_loss(other, batch, None, 0.0, args_of_ppo)
    other_loss.backward()
    for p, q in zip(agent.parameters(), other.parameters()):
        assert p.grad is not None and p.grad.abs().max() > 1e-4
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6)


def test_reinforce_with_a_value_baseline_is_a2c_with_lambda_1_on_complete_episodes():
    """Up to the factor steps / episodes, as a2c takes the mean over steps."""
    torch.manual_seed(0)
    args = reinforce.Args(norm_adv="none", gamma=0.9)
    args_of_a2c = a2c.Args(gae_lambda=1.0, gamma=0.9, vf_coef=0.0, ent_coef=0.0)
    agent = reinforce.Agent(spaces(gym.spaces.Discrete(4)), args)
    observations = torch.randn(13, 2, 3)
    obs, next_obs = observations[:-1], observations[1:]
    terminated = np.zeros((12, 2), bool)
    terminated[[4, 11], 0] = terminated[[2, 7, 11], 1] = True  # 5 episodes of 3 to 7 steps
    outcome = obs, next_obs, np.random.default_rng(0).normal(size=(12, 2)), terminated, terminated
    actions = torch.randint(4, (24,))
    gradients, of_a2c = [], args_of_a2c
    for script, script_args, rest in ((reinforce, args, (5, args)), (a2c, of_a2c, (of_a2c,))):
        advantages, returns, _ = script.estimate_advantages(agent, *outcome, script_args)
        batch = obs.flatten(0, 1), actions, advantages.flatten(), returns.flatten()
        loss, _ = script.total_loss(agent, batch, *rest)
        gradients.append(torch.autograd.grad(loss, list(agent.actor.parameters())))
    for ours, theirs in zip(*gradients):
        torch.testing.assert_close(ours, theirs * 24 / 5, rtol=1e-4, atol=1e-5)


def test_a2c_total_loss_has_the_signs_of_its_docstring():
    torch.manual_seed(1)
    args = a2c.Args(ent_coef=0.3, vf_coef=0.7, hidden_size=8)
    agent = a2c.Agent(spaces(gym.spaces.Discrete(4)), args)
    obs, actions = torch.randn(6, 3), torch.randint(4, (6,))
    advantages, returns = torch.randn(2, 6)
    loss, metrics = a2c.total_loss(agent, (obs, actions, advantages, returns), args)
    logits = agent.actor(obs).detach().double().numpy()
    logpi = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    ascended = (logpi[np.arange(6), actions] * advantages.double().numpy()).mean()
    entropy = -(np.exp(logpi) * logpi).sum(1).mean()
    error = 0.5 * ((agent.value(obs).detach() - returns).double().numpy() ** 2).mean()
    assert loss.item() == pytest.approx(-(ascended - 0.7 * error + 0.3 * entropy), rel=1e-5)
    np.testing.assert_allclose(metrics, [-ascended, error, entropy], rtol=1e-4)


@pytest.mark.parametrize("script", BOTH_SPACES)
def test_one_agent_for_both_kinds_of_action(script):
    """Noise in act gives the policy's distribution, no noise its mode; the std is the flag's."""
    torch.manual_seed(2)
    discrete = script.Agent(spaces(gym.spaces.Discrete(3)), script.Args(hidden_size=8))
    torch.nn.init.normal_(discrete.actor[-1].weight)
    obs = torch.randn(1, 3)
    assert discrete.log_std is None and isinstance(discrete.policy(obs), Categorical)
    actions = discrete.act(obs.expand(40_000, 3), discrete.draw_noise(40_000))
    frequencies = torch.bincount(actions, minlength=3) / 40_000
    torch.testing.assert_close(frequencies, discrete.policy(obs).probs[0], atol=0.012, rtol=0)
    assert discrete.act(obs, 0.0) == discrete.policy(obs).probs.argmax()
    box = gym.spaces.Box(-1, 1, (2,))
    gaussian = script.Agent(spaces(box), script.Args(hidden_size=8, log_std_init=-1.0))
    actions = gaussian.act(obs.expand(40_000, 3), gaussian.draw_noise(40_000))
    torch.testing.assert_close(actions.mean(0), gaussian.act(obs, 0.0)[0], atol=0.01, rtol=0)
    torch.testing.assert_close(actions.std(0), torch.full((2,), math.exp(-1)), atol=0.01, rtol=0)
    policy = gaussian.policy(obs)
    assert policy.log_prob(actions[:5]).shape == (5,) and policy.entropy().shape == (1,)
    expected = 2 * (0.5 * math.log(2 * math.pi * math.e) - 1)
    assert policy.entropy().item() == pytest.approx(expected, rel=1e-5)
