"""The numerics of npg and trpo: explicit matrices in float64, closed forms, sb3-contrib."""

import math
from functools import partial
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Categorical, kl_divergence

import npg
import reinforce
import trpo

SPACES = {"discrete": gym.spaces.Discrete(3), "box": gym.spaces.Box(-1, 1, (2,))}


def make(space: str, script: Any = npg, **flags):
    """A tiny agent in float64 far from its initial weights, its parameters, and a batch."""
    torch.manual_seed(0)
    observations = gym.spaces.Box(-1, 1, (4,))
    spaces: Any = SimpleNamespace(
        single_observation_space=observations, single_action_space=SPACES[space]
    )
    args = script.Args(hidden_size=3, **flags)
    agent = script.Agent(spaces, args).double()
    params = [p for name, p in agent.named_parameters() if not name.startswith("critic")]
    with torch.no_grad():
        for p in params:
            p.normal_(0, 0.6)
    theta, grad = script.flatten_parameters(torch.nn.ParameterList(params))
    obs = torch.randn(40, 4, dtype=torch.float64)
    with torch.no_grad():
        actions = agent.policy(obs).sample()
    return agent, params, theta, grad, obs, actions, args


def kl_hessian(agent, params, obs):
    """F by differentiating mean KL(pi_old, pi) twice, one row after the other."""
    with torch.no_grad():
        old = agent.policy(obs)
    kl = kl_divergence(old, agent.policy(obs)).mean()
    first = npg.flat_gradient(kl, params, create_graph=True)
    return torch.stack([npg.flat_gradient(x, params) for x in first])


@pytest.mark.parametrize("space", SPACES)
def test_fisher_products_are_the_hessian_of_the_kl(space):
    agent, params, theta, _, obs, _, _ = make(space)
    product = npg.fisher_products(agent, params, obs)
    formed = torch.stack([product(x) for x in torch.eye(len(theta), dtype=torch.float64)])
    torch.testing.assert_close(formed, kl_hessian(agent, params, obs), rtol=1e-9, atol=1e-12)
    assert torch.linalg.eigvalsh(formed).min() > -1e-12 and formed.abs().max() > 0.1


def test_fisher_is_the_mean_outer_product_of_the_scores():
    """Summed over all actions with their probabilities, which is what E means in F."""
    agent, params, theta, _, obs, _, _ = make("discrete")
    expected = torch.zeros(len(theta), len(theta), dtype=torch.float64)
    logprobs = torch.log_softmax(agent.actor(obs), -1)
    for i in range(len(obs)):
        for a in range(3):
            score = npg.flat_gradient(logprobs[i, a], params)
            expected += logprobs[i, a].detach().exp() * torch.outer(score, score) / len(obs)
    product = npg.fisher_products(agent, params, obs)
    formed = torch.stack([product(x) for x in torch.eye(len(theta), dtype=torch.float64)])
    torch.testing.assert_close(formed, expected, rtol=1e-9, atol=1e-12)


def test_fisher_of_a_gaussian_is_its_closed_form():
    """Mean of J^T diag(1 / std^2) J for the mean, 2 for each log std, and no cross terms."""
    agent, params, theta, _, obs, _, _ = make("box")
    assert params[0] is agent.log_std  # the first two of theta
    expected = torch.zeros(len(theta), len(theta), dtype=torch.float64)
    expected[:2, :2] = 2 * torch.eye(2)
    means = agent.actor(obs)
    for i in range(len(obs)):
        jacobian = torch.stack([npg.flat_gradient(means[i, k], params[1:]) for k in range(2)])
        weights = (-2 * agent.log_std.detach()).exp().diag()
        expected[2:, 2:] += jacobian.T @ weights @ jacobian / len(obs)
    product = npg.fisher_products(agent, params, obs)
    formed = torch.stack([product(x) for x in torch.eye(len(theta), dtype=torch.float64)])
    torch.testing.assert_close(formed, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("space", SPACES)
def test_fisher_diagonal_is_the_mean_square_and_not_the_squared_mean(space):
    agent, params, _, _, obs, actions, _ = make(space)
    logprobs = agent.policy(obs).log_prob(actions)
    scores = torch.stack([npg.flat_gradient(x, params) for x in logprobs])
    diagonal = npg.fisher_diagonal(agent, params, obs, actions)
    torch.testing.assert_close(diagonal, (scores**2).mean(0))
    assert (diagonal - scores.mean(0) ** 2).max() > 0.01


def test_conjugate_gradient_solves_and_stops():
    torch.manual_seed(1)
    root = torch.randn(12, 12, dtype=torch.float64)
    matrix = root @ root.T + 0.1 * torch.eye(12, dtype=torch.float64)
    b, calls = torch.randn(12, dtype=torch.float64), []
    matvec = lambda v: calls.append(1) or matrix @ v
    x = npg.conjugate_gradient(matvec, b, 100, 1e-10)
    torch.testing.assert_close(x, torch.linalg.solve(matrix, b), rtol=1e-6, atol=1e-8)
    assert len(calls) < 60
    needed = len(calls)
    calls.clear()
    loose = npg.conjugate_gradient(matvec, b, 100, 0.5)
    assert (matrix @ loose - b).norm() <= 0.5 * b.norm() and len(calls) < needed
    one = npg.conjugate_gradient(matvec, b, 1, 0.0)
    torch.testing.assert_close(one, (b @ b) / (b @ matrix @ b) * b)
    assert npg.conjugate_gradient(lambda v: -v, b, 10, 0.0).tolist() == [0.0] * 12
    assert npg.conjugate_gradient(lambda v: v * math.nan, b, 10, 0.0).tolist() == [0.0] * 12
    assert npg.conjugate_gradient(matvec, 0 * b, 10, 1e-6).tolist() == [0.0] * 12


@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 12))
@settings(max_examples=50, deadline=None)
def test_conjugate_gradient_is_exact_after_n_steps(seed, n):
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, dtype=torch.float64, generator=generator)
    root, b = draw(n, n), draw(n)
    matrix = root @ root.T / n + torch.eye(n, dtype=torch.float64)
    x = npg.conjugate_gradient(lambda v: matrix @ v, b, n, 0.0)
    torch.testing.assert_close(x, torch.linalg.solve(matrix, b), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("fisher", ["cg", "explicit", "diagonal"])
def test_the_direction_solves_the_damped_system(space, fisher):
    flags: dict[str, Any] = {"fisher": fisher, "cg_iters": 300, "cg_residual_tol": 1e-9}
    agent, params, theta, _, obs, actions, args = make(space, cg_damping=0.01, **flags)
    gradient = torch.randn(len(theta), dtype=torch.float64)
    damping = 0.01 * torch.eye(len(theta), dtype=torch.float64)
    matrix = kl_hessian(agent, params, obs) + damping
    if fisher == "diagonal":
        matrix = npg.fisher_diagonal(agent, params, obs, actions).diag() + damping
    u, fisher_u = npg.natural_direction(agent, params, gradient, obs, actions, args)
    torch.testing.assert_close(u, torch.linalg.solve(matrix, gradient), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(fisher_u, matrix @ u, rtol=1e-6, atol=1e-7)


def test_a_gradient_that_is_no_use_gives_no_direction():
    agent, params, theta, _, obs, actions, args = make("discrete")
    for gradient in (torch.zeros_like(theta), torch.full_like(theta, math.nan)):
        u, fisher_u = npg.natural_direction(agent, params, gradient.detach(), obs, actions, args)
        assert not u.any() and not fisher_u.any()


@pytest.mark.parametrize("space", SPACES)
def test_the_steps_kl_is_at_most_delta_and_tends_to_it_with_the_damping(space):
    """The model has s^T (F + damping) s / 2 = delta; a short step really has s^T F s / 2."""
    fractions = []
    for damping in (0.1, 1e-3):
        agent, params, theta, _, obs, actions, args = make(space, cg_iters=300, cg_damping=damping)
        with torch.no_grad():
            old = agent.policy(obs)
        weights = torch.randn(len(obs), dtype=torch.float64)
        loss = (agent.policy(obs).log_prob(actions) * weights).mean()
        gradient = npg.flat_gradient(loss, params)
        u, fisher_u = npg.natural_direction(agent, params, gradient, obs, actions, args)
        fractions.append(((u @ kl_hessian(agent, params, obs) @ u) / (u @ fisher_u)).item())
        theta.data += math.sqrt(2e-8 / (u @ fisher_u)) * u
        kl = kl_divergence(old, agent.policy(obs)).mean().item()
        assert kl / 1e-8 == pytest.approx(fractions[-1], rel=0.02)
    assert fractions[0] < fractions[1] < 1 and fractions[1] > 0.8


@pytest.mark.parametrize("fraction,count", [(0.5, 20), (0.7, 28), (0.01, 1)])
def test_the_fisher_matrix_is_estimated_on_the_fraction_asked_for(monkeypatch, fraction, count):
    agent, params, theta, _, obs, actions, args = make("discrete", fisher_fraction=fraction)
    seen, products = [], npg.fisher_products
    monkeypatch.setattr(npg, "fisher_products", lambda *x: seen.append(x[2]) or products(*x))
    for _ in range(2):
        npg.natural_direction(agent, params, torch.ones_like(theta).detach(), obs, actions, args)
    assert [len(x) for x in seen] == [count, count]
    rows = [{tuple(row) for row in x.tolist()} for x in seen]
    assert all(len(x) == count and x <= {tuple(row) for row in obs.tolist()} for x in rows)
    assert count == 1 or rows[0] != rows[1]  # drawn anew


# --- What the natural gradient is for -------------------------------------------------------------


def bandit(scales=(1.0, 1.0)):
    """A Gaussian over (x, y) whose mean is scales times its two parameters; no observation."""
    torch.manual_seed(0)

    class Mean(torch.nn.Module):
        def __init__(self):
            super().__init__()
            start = torch.tensor([2.0, 1.0], dtype=torch.float64)
            self.scales = torch.tensor(scales, dtype=torch.float64)
            self.bias = torch.nn.Parameter(start / self.scales)

        def forward(self, obs):
            return (self.scales * self.bias).expand(len(obs), 2)

    agent, *_ = make("box")
    agent.actor = Mean()
    agent.log_std = torch.nn.Parameter(torch.tensor([math.log(10) / 2, 0.0]).double())
    obs = torch.zeros(100_000, 4, dtype=torch.float64)
    with torch.no_grad():
        u = agent.policy(obs).sample()
    advantages = -((u[:, 0] + 1) ** 2) - 10 * u[:, 1] ** 2
    return agent, obs, u, advantages - advantages.mean()


def gradient_of(agent, params, obs, actions, advantages):
    with torch.no_grad():
        old = agent.policy(obs)
    loss, _ = npg.loss_and_kl(agent, old, obs, actions, advantages)
    return old, -npg.flat_gradient(loss, params)


def test_the_diagonal_is_exact_where_f_is_diagonal():
    """Of a Gaussian F is diagonal: 1 / sigma^2 for the means, 2 for the log stds."""
    agent, obs, u, advantages = bandit()
    params = [agent.actor.bias, agent.log_std]
    closed = torch.tensor([0.1, 1.0, 2.0, 2.0], dtype=torch.float64)
    diagonal = npg.fisher_diagonal(agent, params, obs, u)
    torch.testing.assert_close(diagonal, closed, rtol=0.03, atol=0.0)
    _, gradient = gradient_of(agent, params, obs, u, advantages)
    args = npg.Args(fisher="diagonal", cg_damping=0.0)
    direction, fisher_u = npg.natural_direction(agent, params, gradient, obs, u, args)
    torch.testing.assert_close(direction, gradient / closed, rtol=0.03, atol=0.0)
    torch.testing.assert_close(fisher_u, gradient)


def test_the_natural_gradient_of_a_bandit_points_straight_at_the_optimum():
    """Reward -(x + 1)^2 - 10 y^2, mean at (2, 1), variances (10, 1): u = (-60, -20) points from
    there to (-1, 0), as the variances undo the curvatures; g = (-6, -20) does not."""
    agent, obs, actions, advantages = bandit()
    params = [agent.actor.bias]
    _, gradient = gradient_of(agent, params, obs, actions, advantages)
    agent.log_std.requires_grad_(False)
    args = npg.Args(cg_damping=0.0)
    u, _ = npg.natural_direction(agent, params, gradient, obs, actions, args)
    to_optimum = torch.tensor([-3.0, -1.0], dtype=torch.float64)
    cosine = lambda v: torch.cosine_similarity(v, to_optimum, dim=0).item()
    assert cosine(u) > 0.999 and cosine(gradient) < 0.65
    torch.testing.assert_close(u, 20 * to_optimum, rtol=0.05, atol=0)


@pytest.mark.parametrize("rule", ["natural", "plain"])
def test_only_the_natural_step_is_free_of_the_parameters_scale(rule):
    """The same policy written with parameters 7 times and a third of the size."""
    means = []
    for scales in ((1.0, 1.0), (7.0, 1 / 3)):
        agent, obs, actions, advantages = bandit(scales)
        params = [agent.actor.bias]
        _, step = gradient_of(agent, params, obs, actions, advantages)
        if rule == "natural":
            args = npg.Args(cg_damping=0.0, fisher="explicit")
            u, fisher_u = npg.natural_direction(agent, params, step, obs, actions, args)
            step = (0.02 / (u @ fisher_u)).sqrt() * u
        agent.actor.bias.data += step
        means.append(agent.actor(obs[:1])[0].detach())
    same = torch.allclose(*means, rtol=1e-9)
    assert same is (rule == "natural")


@pytest.mark.parametrize("max_kl", [1e-4, 0.01])
def test_with_the_identity_for_f_the_kl_step_is_reinforces_restricted_one(monkeypatch, max_kl):
    agent, params, theta, _, obs, actions, args = make("discrete", cg_damping=1.0)
    monkeypatch.setattr(npg, "fisher_products", lambda *_: torch.zeros_like)
    gradient = torch.randn(len(theta), dtype=torch.float64)
    u, fisher_u = npg.natural_direction(agent, params, gradient, obs, actions, args)
    step = math.sqrt(2 * max_kl / (u @ fisher_u)) * u
    theirs = reinforce.Args(step_rule="restricted", step_eps=max_kl)
    torch.testing.assert_close(step, reinforce.policy_step(gradient, 1.0, 1.0, theirs))


# --- TRPO's line search ---------------------------------------------------------------------------


def search(outcomes, **flags):
    """line_search where evaluate_policy gives these (loss, KL) one after the other."""
    theta = torch.nn.Parameter(torch.tensor([1.0, -0.1]))
    steps, waiting = [], list(outcomes)

    def evaluate_policy():
        steps.append((theta.detach() - torch.tensor([1.0, -0.1])).tolist())
        return waiting.pop(0)

    args = trpo.Args(max_kl=0.01, backtrack_coef=0.5, **flags)
    step = torch.tensor([0.8, 0.0])
    return *trpo.line_search(theta, step, evaluate_policy, 1.0, args), theta, steps


def test_line_search_takes_the_first_step_that_improves_within_the_trust_region():
    shrunk, backtracks, theta, steps = search([(0.9, 0.02), (1.1, 0.001), (0.9, 0.01), (0.0, 0.0)])
    assert (shrunk, backtracks) == (0.25, 2) and len(steps) == 3
    assert [s[0] for s in steps] == pytest.approx([0.8, 0.4, 0.2])
    assert theta[0].item() == pytest.approx(1.2)


def test_line_search_that_fails_restores_theta_to_the_bit():
    bad = [(1.0, 0.0), (math.nan, 0.0), (0.5, math.nan), (0.5, 0.0100001)]
    shrunk, backtracks, theta, _ = search(bad, backtrack_iters=4)
    assert (shrunk, backtracks) == (0.0, 4)
    assert torch.equal(theta, torch.tensor([1.0, -0.1]))


def test_every_accepted_step_is_within_delta(monkeypatch, tmp_path):
    """On CartPole, with a delta that the quadratic model overshoots; the first step is NPG's."""
    logged = []
    monkeypatch.setattr(trpo.Run, "log", lambda self, losses, _: logged.append(losses))
    flags = "--max-kl 0.2 --cg-damping 1e-3 --num-steps 32 --total-timesteps 6000 --eval-episodes 1"
    trpo.main(trpo.parse_args([*flags.split(), "--run-dir", str(tmp_path)]))
    assert all(x["kl"] <= 0.2 + 1e-6 for x in logged)
    assert all(x["improvement"] > 0 for x in logged if x["accepted"])
    assert any(x["backtracks"] > 0 for x in logged) and any(x["accepted"] for x in logged)
    for x in logged:
        if x["accepted"]:
            quadratic = 0.2 * 0.64 ** x["backtracks"]
            assert x["quadratic_kl"] == pytest.approx(quadratic, rel=1e-3)


def trpo_step(agent, params, theta, obs, actions, advantages, args):
    """What trpo.main does between the advantages and the critic."""
    old, gradient = gradient_of(agent, params, obs, actions, advantages)
    u, fisher_u = trpo.natural_direction(agent, params, gradient, obs, actions, args)
    curvature = (u @ fisher_u).item()
    scale = math.sqrt(2 * args.max_kl / curvature) if curvature else 0.0
    with torch.no_grad():
        evaluate = partial(trpo.loss_and_kl, agent, old, obs, actions, advantages)
        before, _ = evaluate()
        shrunk, backtracks = trpo.line_search(theta, scale * u, evaluate, before, args)
        after, kl = evaluate()
    return shrunk, backtracks, before, after, kl


def test_accepted_steps_keep_their_promises_and_rejected_ones_leave_no_trace():
    """Random networks, batches, deltas and dampings; both outcomes must have been met."""
    met = {"first": 0, "later": 0, "rejected": 0}

    @given(
        seed=st.integers(0, 2**32 - 1), space=st.sampled_from(sorted(SPACES)),
        log_delta=st.floats(-5, 2), damping=st.sampled_from([0.0, 1e-4, 0.1]),
        tries=st.integers(1, 10), equal=st.booleans(),
    )
    @settings(max_examples=150, deadline=None, derandomize=True)
    def check(seed, space, log_delta, damping, tries, equal):
        flags = {"max_kl": 10**log_delta, "cg_damping": damping, "backtrack_iters": tries}
        agent, params, theta, _, obs, actions, args = make(space, trpo, **flags)
        generator = torch.Generator().manual_seed(seed)
        theta.data.copy_(torch.randn(len(theta), generator=generator).double())
        advantages = torch.randn(len(obs), generator=generator).double()
        if equal:
            obs = obs[:1].expand_as(obs)
        start = theta.detach().clone()
        outcome = trpo_step(agent, params, theta, obs, actions, advantages, args)
        shrunk, backtracks, before, after, kl = outcome
        if shrunk:
            met["later" if backtracks else "first"] += 1
            assert kl <= args.max_kl and after < before and not torch.equal(theta, start)
        else:
            met["rejected"] += 1
            assert torch.equal(theta, start) and after == before and kl == 0
    check()
    assert min(met.values()) >= 5, met


@pytest.mark.parametrize("script", [npg, trpo])
@pytest.mark.parametrize("space", SPACES)
def test_nothing_to_gain_is_no_step(space, script):
    """Advantages of 0; and, with no damping, observations that are all 0 for a network whose
    weights then do not matter: F is singular, and still nothing is NaN."""
    agent, params, theta, _, obs, actions, args = make(space, script, cg_damping=0.0)
    start = theta.detach().clone()
    zero = torch.zeros(len(obs), dtype=torch.float64)
    if script is trpo:
        shrunk, *_ = trpo_step(agent, params, theta, obs, actions, zero, args)
        assert shrunk == 0 and torch.equal(theta, start)
    _, gradient = gradient_of(agent, params, obs, actions, zero)
    u, fisher_u = script.natural_direction(agent, params, gradient, obs, actions, args)
    assert not gradient.any() and not u.any() and not fisher_u.any()
    advantages = torch.randn(len(obs), dtype=torch.float64)
    _, gradient = gradient_of(agent, params, 0 * obs, actions, advantages)
    u, fisher_u = script.natural_direction(agent, params, gradient, 0 * obs, actions, args)
    assert u.isfinite().all() and fisher_u.isfinite().all() and u @ fisher_u >= 0


def one_update(monkeypatch, script, run_dir, *flags):
    """Of a real run: theta before and after, what natural_direction got and gave, the losses."""
    seen, natural_direction = [], script.natural_direction

    def spy(agent, params, gradient, *rest):
        theta = torch.cat([p.detach().flatten() for p in params])
        given = natural_direction(agent, params, gradient, *rest)
        seen.append((params, theta, gradient.clone(), *(x.clone() for x in given)))
        return given

    monkeypatch.setattr(script, "natural_direction", spy)
    text = "--num-envs 2 --num-steps 64 --total-timesteps 128 --hidden-size 8 --eval-episodes 1"
    script.main(script.parse_args([*text.split(), *flags, "--run-dir", str(run_dir)]))
    ((params, theta, gradient, u, fisher_u),) = seen
    after = torch.cat([p.detach().flatten() for p in params])
    names = ("update_skipped", "step_norm", "cg_residual", "expected_improvement", "improvement",
             "grad_norm", "quadratic_kl", "value_loss", *["improvement_ratio"] * (script is trpo))
    losses = {name: logged(run_dir, f"losses/{name}")[0] for name in names}
    return theta, after, gradient, u, fisher_u, losses


@pytest.mark.parametrize("script", [npg, trpo])
@pytest.mark.parametrize("fisher", ["cg", "explicit", "diagonal"])
@pytest.mark.parametrize("curvature", [-1.0, 0.0, math.inf, math.nan])
def test_a_curvature_of_no_use_skips_the_update(script, fisher, curvature, monkeypatch, tmp_path):
    """Counted and logged, the policy as it was to the bit; the critic learns all the same."""
    monkeypatch.setattr(script, "fisher_products", lambda *_: lambda v: curvature * v)
    diagonal = lambda agent, params, *_: torch.full((sum(p.numel() for p in params),), curvature)
    monkeypatch.setattr(script, "fisher_diagonal", diagonal)
    flags = ("--fisher", fisher, "--cg-damping", "0")
    before, after, gradient, *_, losses = one_update(monkeypatch, script, tmp_path, *flags)
    assert losses["update_skipped"] == 1 and torch.equal(before, after) and gradient.any()
    assert losses["step_norm"] == losses["quadratic_kl"] == losses["improvement"] == 0
    assert losses["value_loss"] > 0


@pytest.mark.parametrize("script", [npg, trpo])
def test_without_advantages_the_update_is_skipped(script, monkeypatch, tmp_path):
    class Free(gym.Env):
        """Pays nothing, so that a critic that says 0 is right."""

        observation_space = gym.spaces.Box(-1, 1, (2,))
        action_space = gym.spaces.Discrete(2)

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            return self.observation_space.sample(), {}

        def step(self, action):
            return self.observation_space.sample(), 0.0, False, False, {}

    monkeypatch.setitem(gym.registry, "Free-v0", gym.envs.registration.EnvSpec(
        "Free-v0", entry_point=Free, max_episode_steps=16))
    monkeypatch.setattr(script.Agent, "value", lambda self, obs: torch.zeros(obs.shape[:-1]))
    flags = ("--env-id", "Free-v0", "--norm-adv", "none")
    before, after, gradient, *_, losses = one_update(monkeypatch, script, tmp_path, *flags)
    assert not gradient.any() and torch.equal(before, after) and losses["update_skipped"] == 1


@pytest.mark.parametrize("script", [npg, trpo])
@pytest.mark.parametrize("rule", ["kl", "fixed"])
def test_the_step_and_what_is_logged_of_it(rule, script, monkeypatch, tmp_path):
    """theta + scale u, by the rule; and the logs by their definitions."""
    losses_of, loss_and_kl = [], script.loss_and_kl
    record = lambda *x: losses_of.append(loss_and_kl(*x)) or losses_of[-1]
    monkeypatch.setattr(script, "loss_and_kl", record)
    flags = ("--step-rule", rule, "--learning-rate", "0.02", "--no-anneal-lr", "--cg-iters", "1")
    before, after, g, u, fisher_u, logs = one_update(monkeypatch, script, tmp_path, *flags)
    scale = 0.02 if rule == "fixed" else math.sqrt(2 * 0.01 / (u @ fisher_u))
    torch.testing.assert_close(after - before, scale * u, rtol=1e-3, atol=1e-6)
    gain = (losses_of[0][0] - losses_of[-1][0]).item()
    expected = {
        "update_skipped": 0.0, "step_norm": scale * u.norm(), "grad_norm": g.norm(),
        "cg_residual": (fisher_u - g).norm() / g.norm(),
        "expected_improvement": scale * g @ u, "improvement": gain,
        "quadratic_kl": scale**2 * (u @ fisher_u) / 2,
    }
    expected |= {"improvement_ratio": gain / (scale * g @ u)} if script is trpo else {}
    assert {name: logs[name] for name in expected} == pytest.approx(
        {name: float(x) for name, x in expected.items()}, rel=1e-4
    )
    assert logs["cg_residual"] > 1e-3 and 0.5 < gain / expected["expected_improvement"] < 1.5


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
def test_an_accepted_first_step_of_trpo_is_that_of_npg_to_the_bit(env, tmp_path):
    states = []
    for script in (npg, trpo):
        flags = f"--env-id {env} --num-envs 2 --num-steps 64 --total-timesteps 128"
        flags += f" --eval-episodes 1 --run-dir {tmp_path / script.__name__}"
        script.main(script.parse_args(flags.split()))
        states.append(torch.load(tmp_path / script.__name__ / "checkpoint.pt")["state"][0])
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert states[0].keys() == states[1].keys()
    (quadratic,) = logged(tmp_path / "trpo", "losses/quadratic_kl")
    assert quadratic == pytest.approx(0.01, rel=1e-4)  # a step was taken, and in its full length


def logged(run_dir, tag):
    from benchmarks.results import read_scalars

    return read_scalars(run_dir, tag)[1].tolist()


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1", "Hopper-v5"])
def test_one_update_is_that_of_sb3_contrib(env, monkeypatch):
    """On its rollout, with its weights. Its choices that would differ, and how they are kept out:
    conjugate gradient starts from noise (here from 0) and ends by an absolute residual (both take
    all their iterations); the line search measures KL(pi, pi_old), the reverse of the paper's (the
    full step is accepted by both). At pi_old the two KLs have the same Hessian, so F is the same;
    but its KL of real-valued actions is the mean over their d dimensions, not the sum, which makes
    of its delta and damping d times as much (here they are divided by d).
    """
    import sb3_contrib
    from sb3_contrib.common import utils
    from stable_baselines3.common.env_util import make_vec_env

    envs = make_vec_env(env, 2, seed=1)
    d = math.prod(envs.action_space.shape or (1,))
    networks = {"net_arch": [8, 8], "activation_fn": torch.nn.Tanh, "log_std_init": -0.5}
    options: Any = {"n_steps": 64, "batch_size": 32, "cg_max_steps": 5}
    options |= {"target_kl": 0.01 / d, "cg_damping": 0.1 / d}
    options |= {"seed": 1, "device": "cpu", "policy_kwargs": networks}
    model = sb3_contrib.TRPO("MlpPolicy", envs, **options)
    train, updates = model.train, []
    monkeypatch.setattr(model, "train", lambda: None)
    model.learn(128)

    agent = trpo.Agent(
        SimpleNamespace(  # type: ignore[arg-type]
            single_observation_space=envs.observation_space, single_action_space=envs.action_space
        ),
        args := trpo.Args(hidden_size=8, cg_iters=5, cg_residual_tol=0.0),
    )
    weights = lambda: [*model.policy.mlp_extractor.policy_net.parameters(),
                       *model.policy.action_net.parameters()]
    for ours, theirs in zip(agent.actor.parameters(), weights(), strict=True):
        ours.data.copy_(theirs)
    if agent.log_std is not None:
        agent.log_std.data.copy_(model.policy.log_std)
    params = [p for name, p in agent.named_parameters() if not name.startswith("critic")]
    theta, _ = trpo.flatten_parameters(torch.nn.ParameterList(params))
    start = theta.detach().clone()
    data = next(iter(model.rollout_buffer.get(batch_size=None)))
    actions = data.actions.long().flatten() if agent.log_std is None else data.actions
    advantages = trpo.normalize_advantages(data.advantages)
    batch = data.observations.float(), actions, advantages  # Hopper's are doubles
    shrunk, *_ = trpo_step(agent, params, theta, *batch, args)
    assert shrunk == 1

    monkeypatch.setattr(vars(utils)["th"], "randn_like", torch.zeros_like)
    updates = [p.detach().clone() for p in weights()]
    train()
    assert model.logger.name_to_value["train/is_line_search_success"] == 1
    steps = [new.detach() - old for new, old in zip(weights(), updates, strict=True)]
    if agent.log_std is not None:
        steps.insert(0, model.policy.log_std.detach() - start[: len(agent.log_std)])
    theirs = torch.cat([x.flatten() for x in steps])
    ours = theta.detach() - start
    assert (ours - theirs).norm() < 1e-3 * theirs.norm() and theirs.norm() > 0.01


def test_policy_loss_at_the_old_policy_has_the_policy_gradient():
    logits = torch.randn(9, 3, dtype=torch.float64, requires_grad=True)
    actions, advantages = torch.randint(3, (9,)), torch.randn(9, dtype=torch.float64)
    logprobs = Categorical(logits=logits).log_prob(actions)
    loss = npg.policy_loss(logprobs, logprobs.detach(), advantages)
    plain = -(logprobs * advantages).mean()
    (a,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (b,) = torch.autograd.grad(plain, logits)
    torch.testing.assert_close(a, b)
    assert loss.item() == pytest.approx(-advantages.mean().item())
