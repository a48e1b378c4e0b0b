"""The numerics of npg and trpo against explicit matrices in float64."""

import math
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import pytest
import torch
from torch.distributions import Categorical, kl_divergence

import npg
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
