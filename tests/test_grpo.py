"""grpo_rloo.py: its objectives by enumeration of a toy language, its network, and its runs."""

import copy
import itertools
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

import grpo_rloo
from benchmarks.results import read_scalars
from grpo_rloo import END, PAD, Args
from tests.processes import run

# --- A toy language: letters a, b and the end token, at most 3 tokens -----------------------------

LETTERS, LONGEST, G = "ab.", 3, 3
COMPLETIONS = [
    text
    for n in range(1, LONGEST + 1)
    for text in map("".join, itertools.product(LETTERS, repeat=n))
    if "." not in text[:-1] and (text[-1] == "." or n == LONGEST)
]
PREFIXES = ["", "a", "b", "aa", "ab", "ba", "bb"]
REWARDS = torch.tensor(
    np.random.default_rng(5).choice([0.0, 0.3, 1.0], len(COMPLETIONS)), dtype=torch.float64
)
MASK = torch.tensor([[t < len(text) for t in range(LONGEST)] for text in COMPLETIONS])


def toy_logits() -> Tensor:
    """theta [prefix, letter], a softmax for each prefix."""
    generator = torch.Generator().manual_seed(3)
    theta = torch.randn(len(PREFIXES), 3, dtype=torch.float64, generator=generator)
    return theta.requires_grad_()


def toy_logprobs(theta: Tensor) -> Tensor:
    """log pi of each token [completion, LONGEST], 0 where there is none."""
    table = theta.log_softmax(-1)
    zero = torch.zeros((), dtype=torch.float64)
    rows = [
        [table[PREFIXES.index(x[:t]), LETTERS.index(x[t])] if t < len(x) else zero
         for t in range(LONGEST)]
        for x in COMPLETIONS
    ]
    return torch.stack([torch.stack(row) for row in rows])


def exact_gradient(theta: Tensor) -> Tensor:
    expected = (toy_logprobs(theta).sum(1).exp() * REWARDS).sum()
    return torch.autograd.grad(expected, theta)[0]


def expected_gradient(theta: Tensor, args: Args, loss_norm: str | None = None) -> Tensor:
    """Of minus the script's loss, over all groups of G completions with their probabilities."""
    logprobs = toy_logprobs(theta)
    groups = torch.tensor(list(itertools.product(range(len(COMPLETIONS)), repeat=G)))
    chances = logprobs.detach().sum(1).exp()[groups].prod(1)
    assert chances.sum().item() == pytest.approx(1)
    advantages = grpo_rloo.group_advantages(REWARDS[groups], args.advantage)
    mask = MASK[groups]
    weights = torch.stack(
        [grpo_rloo.token_weights(x, loss_norm or args.loss_norm, LONGEST) for x in mask]
    )
    weights = weights * chances[:, None, None]
    flat = [x.flatten(0, 1) for x in (logprobs[groups], mask, weights)]
    batch = flat[0], flat[0].detach(), advantages.flatten(), flat[1], flat[2]
    return -torch.autograd.grad(grpo_rloo.policy_loss(*batch, args), theta)[0]


def cosine(a: Tensor, b: Tensor) -> float:
    return torch.cosine_similarity(a.flatten(), b.flatten(), dim=0).item()


def test_the_toy_language_is_a_distribution():
    assert len(COMPLETIONS) == 15
    assert toy_logprobs(toy_logits()).sum(1).exp().sum().item() == pytest.approx(1)


@pytest.mark.parametrize("choices", [
    {"advantage": "rloo", "ratio": "sequence", "loss_norm": "sequence"},
    {"advantage": "none", "ratio": "sequence", "loss_norm": "sequence"},
])
def test_rloo_is_the_exact_policy_gradient(choices):
    theta = toy_logits()
    ours = expected_gradient(theta, Args(**choices))
    torch.testing.assert_close(ours, exact_gradient(theta), rtol=1e-6, atol=1e-8)


def test_the_group_mean_and_a_constant_normaliser_give_g_minus_1_over_g_of_it():
    """Summed over tokens: the constant is 1 / (B L), so that L times it is left."""
    theta = toy_logits()
    for objective in ("clip", "cispo"):
        args = Args(advantage="dr-grpo", loss_norm="constant", objective=objective)
        ours = expected_gradient(theta, args) * LONGEST
        torch.testing.assert_close(ours, exact_gradient(theta) * (G - 1) / G, rtol=1e-6, atol=1e-8)


def test_lengths_and_standard_deviations_turn_the_gradient_away():
    """cos of the angle to the exact gradient, in this language; 1 to rounding for dr-grpo."""
    theta = toy_logits()
    exact = exact_gradient(theta)
    cosines = {}
    for advantage in ("dr-grpo", "grpo"):
        for loss_norm in ("constant", "sequence", "token"):
            args = Args(advantage=advantage, loss_norm=loss_norm)
            cosines[advantage, loss_norm] = cosine(expected_gradient(theta, args), exact)
    assert cosines == pytest.approx(COSINES, abs=2e-4)


COSINES = {
    ("dr-grpo", "constant"): 1.0,
    ("dr-grpo", "sequence"): 0.98684,
    ("dr-grpo", "token"): 0.99879,
    ("grpo", "constant"): 0.99975,
    ("grpo", "sequence"): 0.98581,
    ("grpo", "token"): 0.99848,
}


# --- Advantages, ratios, weights ------------------------------------------------------------------


def test_advantages_are_their_definitions():
    rewards = torch.rand(5, 4, dtype=torch.float64)
    A = {name: grpo_rloo.group_advantages(rewards, name)
         for name in ("grpo", "rloo", "dr-grpo", "reinforce++", "none")}
    for q, i in itertools.product(range(5), range(4)):
        group = rewards[q].tolist()
        others = group[:i] + group[i + 1 :]
        assert A["rloo"][q, i].item() == pytest.approx(group[i] - np.mean(others))
        assert A["rloo"][q, i].item() == pytest.approx(4 / 3 * (group[i] - np.mean(group)))
        assert A["dr-grpo"][q, i].item() == pytest.approx(group[i] - np.mean(group))
        std = np.std(group, ddof=1)
        assert A["grpo"][q, i].item() == pytest.approx((group[i] - np.mean(group)) / (std + 1e-4))
    flat = rewards.flatten().numpy()
    expected = (flat - flat.mean()) / (flat.std(ddof=1) + 1e-4)
    np.testing.assert_allclose(A["reinforce++"].flatten(), expected, rtol=1e-6)
    assert torch.equal(A["none"], rewards)


@pytest.mark.parametrize("advantage", ["grpo", "rloo", "dr-grpo", "reinforce++"])
@pytest.mark.parametrize("value", [0.0, 0.1, 1.0])
def test_equal_rewards_have_no_advantage(advantage, value):
    A = grpo_rloo.group_advantages(torch.full((3, 8), value), advantage)
    assert A.isfinite().all() and A.abs().max() < 1e-3


def test_weights_are_their_definitions():
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]]).bool()
    names = ("sequence", "token", "constant")
    weights = {name: grpo_rloo.token_weights(mask, name, 6) for name in names}
    third = 1 / 9
    torch.testing.assert_close(
        weights["sequence"], torch.tensor([[third] * 3 + [0], [1 / 3, 0, 0, 0], [0] * 4])
    )
    torch.testing.assert_close(weights["token"], mask / 4)
    torch.testing.assert_close(weights["constant"], mask / 18)
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    assert not any(grpo_rloo.token_weights(nothing, name, 3).any() for name in weights)


def test_ratios_are_their_definitions():
    new, old = torch.randn(2, 4, 5, dtype=torch.float64)
    mask = torch.arange(5) < torch.tensor([[5], [3], [1], [0]])
    ratio = lambda name: grpo_rloo.importance_ratio(new, old, mask, name)
    for i, n in enumerate([5, 3, 1, 0]):
        ratios = (new - old)[i, :n].exp()
        torch.testing.assert_close(ratio("token")[i, :n], ratios)
        product = math.prod(ratios.tolist())
        assert ratio("sequence")[i].tolist() == pytest.approx([product] * 5)
        assert ratio("length-norm")[i].tolist() == pytest.approx([product ** (1 / max(n, 1))] * 5)


@pytest.mark.parametrize("objective", ["clip", "cispo"])
@pytest.mark.parametrize("advantage, ratio, flows", [
    (1.0, 1.5, False), (1.0, 0.5, True), (-1.0, 1.5, True), (-1.0, 0.5, False), (1.0, 1.1, True),
])
def test_the_clip_and_its_gradient(objective, advantage, ratio, flows):
    """PPO's minimum stops what went too far its own way; CISPO stops no token, and weighs all."""
    args = Args(objective=objective, clip_coef=0.2, clip_coef_high=0.28)
    logprobs = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    one = torch.ones(1, 1, dtype=torch.bool)
    batch = torch.zeros_like(logprobs), torch.tensor([advantage]).double(), one, one.double()
    loss = grpo_rloo.policy_loss(logprobs, *batch, args)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    clipped = min(max(ratio, 0.8), 1.28)
    if objective == "cispo":
        assert gradient.item() == pytest.approx(-clipped * advantage)
    else:
        assert loss.item() == pytest.approx(-min(ratio * advantage, clipped * advantage))
        assert gradient.item() == pytest.approx(-ratio * advantage if flows else 0.0)


# --- The KL to the reference ----------------------------------------------------------------------


def test_kl_estimates_against_the_exact_kl_and_its_gradient():
    """By enumeration of one token of 3, on-policy and from another pi_old."""
    chances = [[0.7, 0.2, 0.1], [0.3, 0.3, 0.4], [0.1, 0.4, 0.5]]
    theta, old, ref = torch.tensor(chances, dtype=torch.float64).log()
    theta.requires_grad_()
    exact = lambda p, q: (p.exp() * (p - q)).sum()
    log = lambda x: x.log_softmax(-1)
    (gradient,) = torch.autograd.grad(exact(log(theta), log(ref)), theta)
    (reverse,) = torch.autograd.grad(exact(log(ref), log(theta)), theta)

    def mean(estimator, sampler):
        value = grpo_rloo.kl_estimate(log(theta), log(sampler).detach(), log(ref), estimator)
        mean_value = (log(sampler).exp().detach() * value).sum()
        return mean_value.item(), torch.autograd.grad(mean_value, theta)[0]

    kl = exact(log(theta), log(ref)).item()
    for estimator, expected in (
        ("k1", torch.zeros(3).double()), ("k2", gradient), ("k3", reverse), ("unbiased", gradient)
    ):
        value, slope = mean(estimator, theta.detach())
        torch.testing.assert_close(slope, expected, rtol=1e-9, atol=1e-12)
        if estimator != "k2":
            assert value == pytest.approx(kl)
    # So much is k3's gradient off here: p - ref in place of p (log p/ref - KL).
    assert cosine(reverse, gradient) == pytest.approx(0.9642, abs=1e-4)
    assert (reverse.norm() / gradient.norm()).item() == pytest.approx(0.9851, abs=1e-4)
    value, slope = mean("unbiased", old)
    assert value == pytest.approx(kl)
    torch.testing.assert_close(slope, gradient, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(mean("k3", old)[1], gradient, rtol=0.1)


def test_kl_estimates_over_whole_completions():
    """By enumeration of the toy language. Token by token the values add up to the KL of whole
    completions; the gradients are those of the KL after each prefix, weighed by how likely it is,
    and leave out that prefixes become likelier or less so: by as much as stated here."""
    theta, ref = toy_logits(), toy_logprobs(1.3 * toy_logits().flip(0)).detach()
    logprobs = toy_logprobs(theta)
    chance = logprobs.sum(1).exp()
    exact = (chance * (logprobs - ref).sum(1)).sum()
    (whole,) = torch.autograd.grad(exact, theta, retain_graph=True)
    ours, theirs = theta.log_softmax(-1), (1.3 * toy_logits().flip(0)).log_softmax(-1).detach()
    spoken: dict[str, float] = {}
    for text, p in zip(COMPLETIONS, chance.tolist()):
        for t in range(len(text)):
            spoken[text[:t]] = spoken.get(text[:t], 0.0) + p
    reach = torch.tensor([spoken[prefix] for prefix in PREFIXES], dtype=torch.float64)
    onward, backward = (
        torch.autograd.grad((reach[:, None] * p.exp() * (p - q)).sum(), theta, retain_graph=True)
        for p, q in ((ours, theirs), (theirs, ours))
    )
    (onward,), (backward,) = onward, backward
    for estimator, expected in (
        ("k1", torch.zeros_like(theta)), ("k2", onward), ("k3", backward), ("unbiased", onward)
    ):
        values = grpo_rloo.kl_estimate(logprobs, logprobs.detach(), ref, estimator) * MASK
        mean = (chance.detach() * values.sum(1)).sum()
        (slope,) = torch.autograd.grad(mean, theta, retain_graph=True)
        torch.testing.assert_close(slope, expected, rtol=1e-9, atol=1e-12)
        # k2 is the KL only near the reference, and here the policy is far from it.
        assert mean.item() == pytest.approx(0.9663 if estimator == "k2" else exact.item(), abs=1e-4)
    assert exact.item() == pytest.approx(0.6503, abs=1e-4)
    assert cosine(onward, whole) == pytest.approx(0.9966, abs=1e-4)
    assert cosine(backward, whole) == pytest.approx(0.8972, abs=1e-4)


# --- The network ----------------------------------------------------------------------------------


ANY = "".join(map(chr, range(32, 127)))


def agent_and_prompts(answers: list[str] | None = None, **flags: Any):
    torch.manual_seed(0)
    args = Args(width=32, num_layers=2, num_heads=2, **flags)
    agent = grpo_rloo.Agent(24, answers or [ANY], args)
    with torch.no_grad():
        for p in agent.parameters():
            p.mul_(3)  # far from uniform
    return agent, grpo_rloo.pad_left(["12+3=", "1=", "456+78=", "9+9="] * 8, 9)


@pytest.mark.parametrize("group_size", [1, 3])
def test_sampling_with_the_cache_agrees_with_the_full_forward(group_size):
    agent, (prompts, real) = agent_and_prompts()
    completions, mask = grpo_rloo.generate(agent, prompts, real, group_size, 8, 0.7)
    assert len(completions) == group_size * len(prompts)
    batch = prompts, real, completions, mask
    together, entropy = grpo_rloo.completion_logprobs(agent, *batch, 0.7)
    assert mask.sum(1).min() < mask.sum(1).max() and entropy.isfinite().all()
    for i in range(len(completions)):  # one at a time, without padding or cache
        n, q = int(mask[i].sum()), i // group_size
        tokens = torch.cat([prompts[q][real[q]], completions[i, :n]])[None]
        logits, _ = agent(tokens[:, :-1], torch.ones_like(tokens[:, :-1], dtype=torch.bool))
        alone = (logits[0, int(real[q].sum()) - 1 :] / 0.7).log_softmax(-1)
        alone = alone.gather(-1, completions[i, :n, None]).squeeze(-1)
        torch.testing.assert_close(alone, together[i, :n], rtol=1e-4, atol=1e-5)
        assert (completions[i, n:] == PAD).all()
        assert (completions[i, : n - 1] != END).all() and (n == 8 or completions[i, n - 1] == END)


def test_a_prompt_read_once_for_its_group_has_the_gradient_of_one_read_for_each():
    agent, (prompts, real) = agent_and_prompts()
    agent.double()
    completions, mask = grpo_rloo.generate(agent, prompts, real, 3, 8, 1.0)
    weights, gradients = torch.randn(mask.shape).double(), []
    repeated = prompts.repeat_interleave(3, 0), real.repeat_interleave(3, 0)
    for each in ((prompts, real), repeated):
        logprobs, _ = grpo_rloo.completion_logprobs(agent, *each, completions, mask, 1.0)
        parts = torch.autograd.grad((weights * logprobs).sum(), list(agent.parameters()))
        gradients.append(torch.cat([part.flatten() for part in parts]))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-9, atol=1e-12)


def test_only_characters_of_answers_are_said():
    agent, (prompts, real) = agent_and_prompts(["12", "021"])
    completions, mask = grpo_rloo.generate(agent, prompts, real, 20, 8, 20.0)
    said = {grpo_rloo.decode([token]) for token in completions[mask].tolist() if token != END}
    assert said == set("012") and (completions[mask] == END).any()
    batch = prompts, real, completions, mask
    logprobs, entropy = grpo_rloo.completion_logprobs(agent, *batch, 20.0)
    assert logprobs[mask].min() > -100 and 0 < entropy.max() <= np.log(4) + 1e-5
    slopes = torch.autograd.grad((logprobs + entropy * mask).sum(), list(agent.parameters()))
    assert all(slope.isfinite().all() for slope in slopes)  # no NaN from what is never said


def test_completions_of_one_token():
    agent, (prompts, real) = agent_and_prompts()
    completions, mask = grpo_rloo.generate(agent, prompts, real, 2, 1, 1.0)
    logprobs, _ = grpo_rloo.completion_logprobs(agent, prompts, real, completions, mask, 1.0)
    expected = agent(prompts, real)[0][:, -1].log_softmax(-1).repeat_interleave(2, 0)
    torch.testing.assert_close(logprobs, expected.gather(-1, completions))


def test_left_and_right_padding_agree():
    agent, (prompts, real) = agent_and_prompts()
    logits, _ = agent(prompts, real)
    lengths = real.sum(1)
    right = torch.stack([torch.cat([p[r], p[~r]]) for p, r in zip(prompts, real)])
    right_real = torch.arange(9) < lengths[:, None]
    others, _ = agent(right, right_real)
    for i, n in enumerate(lengths.tolist()):
        torch.testing.assert_close(logits[i, 9 - n :], others[i, :n], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("temperature", [0.7, 1.5])
def test_samples_follow_the_softmax_at_the_temperature(temperature):
    agent, _ = agent_and_prompts()
    prompts, real = grpo_rloo.pad_left(["1+1="] * 20_000, 4)
    torch.manual_seed(1)
    completions, _ = grpo_rloo.generate(agent, prompts, real, 1, 1, temperature)
    logits, _ = agent(prompts[:1], real[:1])
    chances = (logits[0, -1].double() / temperature).softmax(-1).detach().numpy()
    counts = np.bincount(completions[:, 0], minlength=len(chances))
    often = chances * 20_000 >= 5
    seen = np.append(counts[often], counts[~often].sum())
    expected = np.append(chances[often], chances[~often].sum()) * 20_000
    assert stats.chisquare(seen, expected).pvalue > 1e-3


def test_greedy_takes_the_likeliest():
    agent, (prompts, real) = agent_and_prompts()
    completions, _ = grpo_rloo.generate(agent, prompts, real, 1, 1, 0.0)
    logits, _ = agent(prompts, real)
    assert torch.equal(completions[:, 0], logits[:, -1].argmax(-1))


@pytest.mark.parametrize("group_size", [1, 3])
def test_every_greedy_token_is_that_of_the_full_forward(group_size):
    """Several tokens in, from the cache, behind padding: token by token from the whole text."""
    agent, (prompts, real) = agent_and_prompts()
    completions, mask = grpo_rloo.generate(agent, prompts, real, group_size, 8, 0.0)
    assert mask.sum(1).max() == 8 and len(completions.unique(dim=0)) > 2
    for i, completion in enumerate(completions):
        tokens = prompts[i // group_size][real[i // group_size]].tolist()
        for token in completion[mask[i]].tolist():
            batch = torch.tensor([tokens])
            logits, _ = agent(batch, torch.ones_like(batch, dtype=torch.bool))
            assert token == logits[0, -1].argmax().item()
            tokens.append(token)
        assert tokens[-1] == END or mask[i].all()


def test_whole_samples_follow_their_chances_at_the_temperature():
    """Of up to 3 tokens among a, b and the end: how often each of the 15 texts is said."""
    agent, _ = agent_and_prompts(["ab"])
    n, temperature = 30_000, 4.0
    prompts, real = grpo_rloo.pad_left(["7=", "12+3="], 6)
    torch.manual_seed(2)
    completions, mask = grpo_rloo.generate(agent, prompts, real, n, 3, temperature)
    for q in range(2):
        said = [tuple(row[m].tolist()) for row, m in zip(completions, mask)][q * n : (q + 1) * n]
        letters, start = [END, *grpo_rloo.encode("ab")], prompts[q][real[q]].tolist()
        texts = [x for k in (1, 2, 3) for x in itertools.product(letters, repeat=k)
                 if END not in x[:-1] and (x[-1] == END or k == 3)]
        chances = []
        for text in texts:
            batch = torch.tensor([[*start, *text]])
            logits, _ = agent(batch, torch.ones_like(batch, dtype=torch.bool))
            table = (logits[0, len(start) - 1 : -1].double() / temperature).log_softmax(-1)
            chances.append(table.gather(-1, torch.tensor(text)[:, None]).sum().exp().item())
        assert len(texts) == 15 and sum(chances) == pytest.approx(1)
        counts = np.array([said.count(text) for text in texts])
        often = np.array(chances) * n >= 5
        assert often.sum() > 8 and sum(counts) == n
        seen = np.append(counts[often], counts[~often].sum())
        expected = np.append(np.array(chances)[often], np.array(chances)[~often].sum()) * n
        keep = expected > 0
        assert stats.chisquare(seen[keep], expected[keep], sum_check=False).pvalue > 1e-3


def make_batch(args: Args):
    """A minibatch as main has it, but in float64, whose ratios are not 1."""
    agent, (prompts, real) = agent_and_prompts()
    agent.double()
    completions, mask = grpo_rloo.generate(agent, prompts, real, 1, 8, 1.0)
    with torch.no_grad():
        old, _ = grpo_rloo.completion_logprobs(agent, prompts, real, completions, mask, 1.0)
    torch.manual_seed(3)
    old, ref = old + 0.2 * torch.randn_like(old), old + 0.2 * torch.randn_like(old)
    weights = grpo_rloo.token_weights(mask.double(), args.loss_norm, 8)
    share, advantages = mask.double() / mask.sum(), torch.randn(32).double()
    return agent, [prompts, real, completions, mask, old, ref, advantages, weights, share]


def gradient(agent, parts, args):
    agent.zero_grad()
    losses = []
    for part in parts:
        loss, metrics = grpo_rloo.total_loss(agent, part, args)
        loss.backward()
        losses.append(torch.cat([loss.detach()[None], metrics]))
    return sum(losses), torch.cat([p.grad.flatten() for p in agent.parameters()])


CHOICES = [
    {"kl_coef": 0.1}, {"loss_norm": "token", "kl_coef": 0.1, "kl_estimator": "unbiased"},
    {"loss_norm": "constant", "objective": "cispo"}, {"ratio": "sequence"},
    {"ratio": "length-norm", "clip_coef": 0.01},
]


@pytest.mark.parametrize("choices", CHOICES, ids=str)
def test_loss_and_gradient_do_not_depend_on_splits_padding_or_order(choices):
    args = Args(**choices)
    agent, batch = make_batch(args)
    loss, grad = gradient(agent, [batch], args)
    assert grad.norm() > 1e-3
    shuffled = torch.randperm(32)
    padded = [*batch]
    padded[0], padded[1] = (torch.nn.functional.pad(x, (4, 0)) for x in batch[:2])  # prompts
    for k in (2, 3, 4, 5, 7, 8):  # completions
        padded[k] = torch.nn.functional.pad(batch[k], (0, 3))
    for parts in (
        list(zip(*(x.chunk(4) for x in batch))), [[x[shuffled] for x in batch]], [padded]
    ):
        other_loss, other_grad = gradient(agent, parts, args)
        torch.testing.assert_close(other_loss, loss, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(other_grad, grad, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("choices", CHOICES, ids=str)
def test_masked_tokens_have_no_gradient_and_the_end_token_has(choices):
    args = Args(**choices)
    _, batch = make_batch(args)
    mask, old, ref, advantages, weights = (batch[k] for k in (3, 4, 5, 6, 7))
    logprobs = (old + 0.1).requires_grad_()
    loss = grpo_rloo.policy_loss(logprobs, old, advantages, mask, weights, args)
    loss = loss + (weights * grpo_rloo.kl_estimate(logprobs, old, ref, args.kl_estimator)).sum()
    (slope,) = torch.autograd.grad(loss, logprobs)
    assert not slope[~mask].any()
    ends = (batch[2] == END) & mask
    assert ends.any() and slope[ends].all()


@pytest.mark.parametrize("choices", CHOICES, ids=str)
def test_the_entropy_bonus_is_the_weighted_entropy_of_what_follows_each_prefix(choices):
    agent, batch = make_batch(Args(**choices))
    prompts, real, completions, mask, *_, weights, _ = batch
    both = (gradient(agent, [batch], Args(ent_coef=c, **choices)) for c in (0, 0.5))
    losses, gradients = zip(*both)
    bonus = torch.zeros((), dtype=torch.float64)
    for i in range(len(completions)):  # one at a time, without padding or cache
        n = int(mask[i].sum())
        tokens = torch.cat([prompts[i][real[i]], completions[i, : n - 1]])[None]
        logits, _ = agent(tokens, torch.ones_like(tokens, dtype=torch.bool))
        hot = logits[0, -n:] / Args().temperature
        entropies = torch.distributions.Categorical(logits=hot).entropy()
        bonus = bonus + (weights[i, :n] * entropies).sum()
    slopes = torch.autograd.grad(bonus, list(agent.parameters()))
    expected = torch.cat([x.flatten() for x in slopes])
    assert bonus > 0.1 and expected.norm() > 1e-3
    torch.testing.assert_close((losses[0] - losses[1])[0], 0.5 * bonus.detach())
    torch.testing.assert_close(losses[0][1:], losses[1][1:])  # the metrics are those without it
    torch.testing.assert_close(gradients[0] - gradients[1], 0.5 * expected, rtol=1e-7, atol=1e-10)


# --- Another library ------------------------------------------------------------------------------

GOLDEN = json.loads((Path(__file__).parent / "golden" / "trl.json").read_text())
SAME_AS_TRL: dict[str, dict[str, Any]] = {
    "grpo": grpo_rloo.PAPERS["grpo"],
    "dr_grpo": grpo_rloo.PAPERS["dr-grpo"],
    "dapo": grpo_rloo.PAPERS["dapo"],
    "gspo": grpo_rloo.PAPERS["gspo"],
    "unbiased_kl": grpo_rloo.PAPERS["grpo"] | {"kl_estimator": "unbiased"},
    "rloo": grpo_rloo.PAPERS["rloo"],
}


def test_every_recorded_case_of_trl_is_compared():
    assert GOLDEN["trl"] == "1.16.0" and GOLDEN["cases"].keys() == SAME_AS_TRL.keys()


@pytest.mark.parametrize("name", SAME_AS_TRL)
def test_advantages_are_those_of_trl(name):
    """tests/golden/make_trl.py ran TRL's own trainer: what it made of the rewards."""
    case, args = GOLDEN["cases"][name], Args(**SAME_AS_TRL[name])
    rewards = torch.tensor(case["rewards"])
    if args.kl_in == "reward":
        old, ref = (torch.tensor(x) for x in case["forwards"])
        kl = ((old - ref) * torch.tensor(case["mask"])).sum(1)
        assert kl.abs().mean() > 0.1, "the reference differs from the policy"
        rewards = rewards - args.kl_coef * kl
    advantages = grpo_rloo.group_advantages(rewards.view(-1, GOLDEN["group"]), args.advantage)
    expected = torch.tensor(case["advantages"])
    assert expected.std() > 0.3
    torch.testing.assert_close(advantages.flatten(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SAME_AS_TRL)
def test_loss_and_gradient_are_those_of_trl(name, monkeypatch):
    """On what TRL's loss function was given at two updates; in the second the clip is at work."""
    case, args = GOLDEN["cases"][name], Args(**SAME_AS_TRL[name])
    agent, _ = agent_and_prompts()  # is not asked
    for number, update in enumerate(case["updates"]):
        mask = torch.tensor(update["completion_mask"]).bool()
        logprobs = (torch.tensor(update["logps"]) * mask).requires_grad_()
        zeros = torch.zeros_like(logprobs)
        if name == "rloo":  # which keeps the sum over the completion alone
            old = torch.zeros_like(logprobs)
            old[:, 0] = torch.tensor(update["old_logps"])
        else:
            old = torch.tensor(update["old_per_token_logps"]) * mask
        ref = torch.tensor(update["ref_per_token_logps"]) * mask if name in KL_IN_LOSS else zeros
        weights = grpo_rloo.token_weights(mask, args.loss_norm, GOLDEN["longest"])
        given = logprobs, zeros
        monkeypatch.setattr(grpo_rloo, "completion_logprobs", lambda *_, given=given: given)
        batch = (None, None, None, mask, old, ref, torch.tensor(update["advantages"]), weights)
        loss, _ = grpo_rloo.total_loss(agent, (*batch, mask / mask.sum()), args)
        (gradient,) = torch.autograd.grad(loss, logprobs)
        expected = torch.tensor(update["gradient"])
        assert loss.item() == pytest.approx(update["loss"], rel=1e-4, abs=1e-6)
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)
        still = (expected == 0) & mask & (batch[6][:, None] != 0)
        assert expected.abs().max() > 1e-3 and (number == 0 or name in KL_IN_LOSS or still.any())


KL_IN_LOSS = ("grpo", "unbiased_kl")  # where no token is without gradient, clipped or not


# --- Tasks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["addition", "countdown", "sort"])
def test_right_answers_are_rewarded_and_prompts_are_disjoint(task):
    train, test = grpo_rloo.load_problems(Args(task=task))
    assert len(test) >= 100 and not {p for p, _ in train} & {p for p, _ in test}
    for prompt, answer in train[::50] + test[::50]:
        assert grpo_rloo.reward(task, prompt, answer, answer) == 1
        assert grpo_rloo.reward(task, prompt, answer, answer + "1") < 1
        assert grpo_rloo.decode([*grpo_rloo.encode(answer), END, PAD]) == answer
    if task == "addition":
        sums = [{tuple(sorted(p[:-1].split("+"))) for p, _ in side} for side in (train, test)]
        assert not sums[0] & sums[1]
        assert all(sum(map(int, p[:-1].split("+"))) == int(a) for p, a in train)
    if task == "sort":
        assert len({len(a) for _, a in test}) > 3
        assert all("".join(sorted(p[:-1])) == a for p, a in train)


@pytest.mark.parametrize("completion, expected", [
    ("3*5+7", 1), ("7+5*3", 1), ("3+5+7", 0.1), ("3*5+7+0", 0), ("3*5", 0), ("22", 0), ("", 0),
    ("3*5+7 ", 0), ("(3*5)+7", 0), ("3*5+07", 0), ("3**5+7", 0), ("__import__", 0), ("3*5+7*1", 0),
])
def test_countdown_pays_for_the_right_value_by_the_right_numbers(completion, expected):
    assert grpo_rloo.reward("countdown", "3 5 7:22=", "3*5+7", completion) == expected


# --- Runs -----------------------------------------------------------------------------------------

TINY = "--sft-steps 5 --num-prompts 4 --group-size 4 --num-minibatches 2 --width 16 "
TINY += "--num-layers 1 --num-heads 2 "
TINY += "--total-timesteps 100 --eval-episodes 20 --checkpoint-every 32"


def saved(run_dir):
    checkpoint = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    kept = {k: x for k, x in checkpoint.items() if k not in ("args", "seconds")}
    flat, _ = torch.utils._pytree.tree_flatten(kept)
    return [x.numpy().tobytes() if isinstance(x, torch.Tensor) else x for x in flat]


@pytest.mark.parametrize("paper", list(grpo_rloo.PAPERS))
def test_every_preset_runs_and_an_explicit_flag_wins(paper, tmp_path):
    flags = [paper, *TINY.split(), "--kl-coef", "0.5", "--run-dir", str(tmp_path)]
    args = grpo_rloo.parse_args(flags)
    assert (args.exp_name, args.kl_coef) == (paper, 0.5)
    for name, value in grpo_rloo.PAPERS[paper].items():
        assert name == "kl_coef" or getattr(args, name) == value
    grpo_rloo.main(args)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert 0 <= summary["accuracy_sft"] <= 1 and 0 <= summary["accuracy"] <= 1
    assert summary["steps"] >= 96


def test_runs_alone_in_an_empty_directory(tmp_path):
    shutil.copy(grpo_rloo.__file__, tmp_path)
    command = [sys.executable, "grpo_rloo.py", "dapo", *TINY.split(), "--task", "sort"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert {p.name for p in tmp_path.iterdir()} - {"__pycache__"} == {"grpo_rloo.py", "runs"}
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert run_dir.name.startswith("sort__dapo__1__")
    again = [*command[:2], "--evaluate", f"runs/{run_dir.name}/checkpoint.pt"]
    done = subprocess.run(again, cwd=tmp_path, capture_output=True, text=True, check=True)
    accuracy = json.loads((run_dir / "summary.json").read_text())["accuracy"]
    assert done.stdout == f"Evaluated:  accuracy {accuracy:.1%} on held-out prompts\n"


def test_the_warm_start_ends_at_its_accuracy(tmp_path, monkeypatch):
    """It looks every 2 minibatches, at training prompts, and stops at the first look that is good
    enough; what is reported is the held-out accuracy."""
    answers, asked, steps = iter([0.1, 0.2, 0.31, 0.32, 0.8, 0.9]), [], []

    def looks(agent, problems, *_):
        asked.append(set(problems))
        return next(answers)

    monkeypatch.setattr(grpo_rloo, "accuracy", looks)
    real = grpo_rloo.completion_logprobs
    monkeypatch.setattr(grpo_rloo, "completion_logprobs", lambda *a: steps.append(0) or real(*a))
    flags = [*TINY.split(), "--sft-steps", "100", "--run-dir", str(tmp_path)]
    args = grpo_rloo.parse_args(["grpo", *flags, "--total-timesteps", "16"])
    grpo_rloo.main(args)
    # 6 minibatches, then of the one iteration the old policy, the reference and 2 x 2 updates
    assert len(steps) == 6 + 2 + 4
    train, test = map(set, grpo_rloo.load_problems(args))
    assert all(problems <= train for problems in asked[:4]) and asked[4] <= test
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["accuracy_sft"], summary["accuracy"]) == (0.8, 0.9)


def watch(monkeypatch, reward):
    """Calls of total_loss (the policy of that moment, the minibatch) and of reward, in order."""
    updates, scored, loss_function = [], [], grpo_rloo.total_loss

    def spy(agent, batch, args):
        updates.append((copy.deepcopy(agent), [x.clone() for x in batch]))
        return loss_function(agent, batch, args)

    def score(task, prompt, answer, completion):
        scored.append((prompt, completion, reward(prompt, completion)))
        return scored[-1][-1]

    monkeypatch.setattr(grpo_rloo, "total_loss", spy)
    monkeypatch.setattr(grpo_rloo, "reward", score)
    monkeypatch.setattr(grpo_rloo, "accuracy", lambda *_: 0.0)  # asks for rewards too
    return updates, scored


def alone(agent, prompt, completion, temperature):
    """log pi of each token of one completion, without padding or cache."""
    tokens = torch.cat([prompt, completion])[None]
    logits, _ = agent(tokens[:, :-1], torch.ones_like(tokens[:, :-1], dtype=torch.bool))
    table = (logits[0, len(prompt) - 1 :] / temperature).log_softmax(-1)
    return table.gather(-1, completion[:, None]).squeeze(-1).detach()


@pytest.mark.parametrize("masked", [True, False])
def test_what_an_update_is_given(masked, tmp_path, monkeypatch):
    """In the second iteration, when the policy is not the reference any more: old and reference
    log-probabilities at the temperature, each completion's advantage from its group's rewards less
    the overlong penalty and the KL, and the weights, all made anew, one completion at a time."""
    digits = lambda text: sum(int(x) for x in text if x.isdigit())
    score = lambda prompt, text: (digits(prompt) + 2 * digits(text)) % 5 / 4
    updates, _ = watch(monkeypatch, score)
    generate, heats = grpo_rloo.generate, []
    monkeypatch.setattr(grpo_rloo, "generate", lambda *x: heats.append(x[-1]) or generate(*x))
    flags = f"rloo {TINY} --total-timesteps 32 --temperature 0.7 --overlong-buffer 2 --kl-coef 0.5"
    flags += f" --learning-rate 0.01 --sft-steps 0 --{'' if masked else 'no-'}mask-truncated"
    grpo_rloo.main(grpo_rloo.parse_args([*flags.split(), "--run-dir", str(tmp_path)]))
    assert heats == [0.7, 0.7] and len(updates) == 8  # 2 iterations of 2 epochs of 2 minibatches
    reference, policy, groups, cut, kls = updates[0][0], updates[4][0], 0, 0, []
    for _, batch in updates[4:6]:  # the second iteration's first epoch
        prompts, real, completions, mask, old, ref, advantages, weights, share = batch
        assert len(prompts) == 2 and len(completions) == 8
        torch.testing.assert_close(share, mask / mask.sum())
        for q, (prompt, there) in enumerate(zip(prompts, real)):
            prompt, rewards = prompt[there], []
            for i in range(4 * q, 4 * q + 4):
                n, text = int(mask[i].sum()), completions[i][mask[i]]
                ours, theirs = (alone(x, prompt, text, 0.7) for x in (policy, reference))
                torch.testing.assert_close(old[i, :n], ours, rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(ref[i, :n], theirs, rtol=1e-4, atol=1e-5)
                kls.append((ours - theirs).sum().item())
                penalty = max(0, n - 3) / 2  # L is 5: two more than 199 has digits
                spoken = grpo_rloo.decode(text.tolist())
                shown = grpo_rloo.decode(prompt.tolist())
                rewards.append(score(shown, spoken) - penalty - 0.5 * kls[-1])
                whole = text[-1].item() == END
                cut += not whole
                expected = torch.where(mask[i], (whole or not masked) / n / 8, 0.0)
                torch.testing.assert_close(weights[i], expected)
            for i, reward in enumerate(rewards):
                others = (sum(rewards) - reward) / 3
                given = advantages[4 * q + i].item()
                assert given == pytest.approx(reward - others, rel=1e-3, abs=1e-4)
            groups += len(set(rewards)) > 1
    assert groups >= 3 and 0 < cut < 16 and max(map(abs, kls)) > 0.05


def test_dynamic_sampling_takes_the_groups_that_differ_first(tmp_path, monkeypatch):
    """Against the rewards in the order in which they were given: which groups are learnt from, how
    many rounds there are, and what is logged of all that was drawn."""
    teaches = lambda prompt: sum(map(int, prompt[:2])) % 3 == 0
    updates, scored = watch(monkeypatch, lambda prompt, text: teaches(prompt) * len(text) / 4.0)
    flags = f"dapo {TINY} --total-timesteps 400 --num-minibatches 1 --update-epochs 1"
    grpo_rloo.main(grpo_rloo.parse_args([*flags.split(), "--run-dir", str(tmp_path)]))
    logged = {
        name: read_scalars(tmp_path, f"charts/{name}")[1].tolist()
        for name in ("reward", "reward_std", "accuracy", "zero_std")
    }
    steps, seen = [], set()
    for number, (_, batch) in enumerate(updates):
        found, spare, rewards = [], [], []
        rounds = 0
        while rounds < 3 and len(found) < 4:
            rounds += 1
            for _ in range(4):
                group, scored = scored[:4], scored[4:]
                values = [x[-1] for x in group]
                rewards += values
                texts = group[0][0], *(x[1] for x in group)
                (found if len(set(values)) > 1 else spare).append(texts)
        seen.add((rounds, len(found) < 4))
        steps.append(16 * rounds)
        expected = (found + spare)[:4]
        prompts, real, completions, *_ = batch
        taken = []
        for q in range(4):
            texts = [grpo_rloo.decode(x) for x in completions[4 * q : 4 * q + 4].tolist()]
            taken.append((grpo_rloo.decode(prompts[q][real[q]].tolist()), *texts))
        assert sorted(taken) == sorted(expected)
        values = np.array(rewards)
        groups = values.reshape(-1, 4)
        of_groups = (groups.min(1) == groups.max(1)).mean()
        assert logged["reward"][number] == pytest.approx(values.mean(), abs=1e-6)
        assert logged["reward_std"][number] == pytest.approx(values.std(ddof=1), abs=1e-6)
        assert logged["accuracy"][number] == pytest.approx((values == 1).mean(), abs=1e-6)
        assert logged["zero_std"][number] == pytest.approx(of_groups)
    assert not scored and {(2, False), (3, False), (3, True)} <= seen
    assert read_scalars(tmp_path, "charts/reward")[0].tolist() == np.cumsum(steps).tolist()


@pytest.mark.parametrize("paper", grpo_rloo.PAPERS)
def test_first_update_has_ratio_1_and_later_ones_do_not(paper, tmp_path, monkeypatch):
    """The docstring's answer to why the loss is 0 at first and the clip idle."""
    seen = []
    loss_function = grpo_rloo.total_loss

    def spy(agent, batch, args):
        loss, metrics = loss_function(agent, batch, args)
        prompts, real, completions, mask, old, _, A, weights, share = batch
        tokens = mask.sum().item()  # L is 5: two digits more than 199 has
        if paper == "dr-grpo":
            assert weights.sum().item() == pytest.approx(tokens / (len(mask) * 5))
        assert share.sum().item() == pytest.approx(1)
        sampled = prompts, real, completions, mask
        new, _ = grpo_rloo.completion_logprobs(agent, *sampled, args.temperature)
        ratio = ((new - old) * mask).exp()
        told = new if paper == "cispo" else 1
        of_ones = -(weights * A[:, None] * told).sum().item()
        seen.append(((ratio - 1).abs().max().item(), of_ones, *metrics.tolist()))
        return loss, metrics

    monkeypatch.setattr(grpo_rloo, "total_loss", spy)
    monkeypatch.setattr(grpo_rloo, "reward", lambda *texts: float(len(texts[-1]) % 2))
    flags = f"{paper} {TINY} --total-timesteps 16 --num-minibatches 1 --update-epochs 2"
    flags += f" --learning-rate 1e-2 --temperature 0.7 --run-dir {tmp_path}"
    grpo_rloo.main(grpo_rloo.parse_args(flags.split()))
    (first, of_ones, loss, *_, low, high), (second, ones_again, after, *_, low2, high2) = seen
    assert first < 1e-5 and loss == pytest.approx(of_ones, abs=1e-6) and low == high == 0
    assert paper not in ("grpo", "rloo", "gspo") or abs(loss) < 1e-6
    assert second > 1e-3 and abs(after - ones_again) > 1e-5 and low2 + high2 > 0


class Killed(Exception):
    pass


@pytest.mark.parametrize("at", [48, 80])
def test_killed_and_resumed_is_bit_identical(at, tmp_path, monkeypatch):
    """Checkpoints are at 0, 32, 64 and 96 completions; the run dies in between."""
    # Any reward will do that a policy of five examples can get.
    monkeypatch.setattr(grpo_rloo, "reward", lambda *texts: float(len(texts[-1]) % 2))
    flags = ["grpo", *TINY.split(), "--run-dir"]
    grpo_rloo.main(grpo_rloo.parse_args([*flags, str(tmp_path / "whole")]))
    log = grpo_rloo.Run.log

    def dies(self, *scalars):
        if self.step >= at:
            raise Killed
        log(self, *scalars)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(grpo_rloo.Run, "log", dies)
        grpo_rloo.main(grpo_rloo.parse_args([*flags, str(tmp_path / "cut")]))
    checkpoint = tmp_path / "cut" / "checkpoint.pt"
    assert torch.load(checkpoint, weights_only=True)["step"] == at // 32 * 32
    grpo_rloo.main(grpo_rloo.parse_args(["--resume", str(checkpoint)]))
    assert saved(tmp_path / "cut") == saved(tmp_path / "whole")
    kept = [read_scalars(tmp_path / name, "losses/grad_norm") for name in ("cut", "whole")]
    for ours, theirs in zip(*kept):
        assert ours.tolist() == theirs.tolist()
    assert len(kept[0][0]) == 6 and kept[0][1].any()


def test_evaluation_repeats_and_keeps_the_runs_flags(tmp_path):
    out, _ = run("grpo_rloo", "rloo", *TINY.split(), "--run-dir", tmp_path / "run")
    accuracy = json.loads((tmp_path / "run" / "summary.json").read_text())["accuracy"]
    again, _ = run("grpo_rloo", "--evaluate", tmp_path / "run" / "checkpoint.pt")
    assert f"accuracy {accuracy:.1%}" in again and f"accuracy {accuracy:.1%}" in out


@pytest.mark.parametrize("flags, words", [
    ("--group-size 1", "--group-size 1"),
    ("--ratio sequence --loss-norm token", "--loss-norm sequence"),
    ("--ratio sequence --loss-norm constant", "--loss-norm sequence"),
    ("--advantage reinforce++ --dynamic-sampling 2", "--dynamic-sampling drops groups"),
    ("--num-minibatches 3", "does not divide the 4 prompts"),
    ("--num-heads 3", "--num-heads 3 does not divide"),
    ("--max-new-tokens 3", "--max-new-tokens 3 is short"),
    ("--overlong-buffer 9", "--overlong-buffer 9"),
    ("--task-file nowhere.jsonl", "nowhere.jsonl"),
    ("--num-threads 0", "--num-threads must be above 0"),
    ("--temperature 0", "--temperature must be above 0"),
    ("--kl-coef -1", "--kl-coef must be at least 0"),
    ("--ent-coef -1", "--ent-coef must be at least 0"),
    ("--sft-steps -1", "--sft-steps must be at least 0"),
    (f"--sft-steps {10**30}", "--sft-steps must be below"),
    ("--total-timesteps 3", "less than one iteration"),
])
def test_bad_input_is_one_clear_line(flags, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        text = ["grpo", *TINY.split(), "--run-dir", str(tmp_path / "run"), *flags.split()]
        grpo_rloo.main(grpo_rloo.parse_args(text))
    said = capsys.readouterr().err
    assert ended.value.code == 2 and words in said and said.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("lines, words", [
    (['{"prompt": "a", "answer": "b"}', "{"], "line 2"),
    (['{"prompt": "a"}'], "line 1"),
    (['{"prompt": "a", "answer": "\u00e9"}'], "line 1"),
    (['{"prompt": "", "answer": "b"}'], "line 1"),
    (['["a", "b"]'], "line 1"),
    ([], "at least 10 are needed"),
])
def test_a_bad_task_file_is_refused_with_its_line(lines, words, tmp_path, capsys):
    path = tmp_path / "task.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(SystemExit) as ended:
        grpo_rloo.load_problems(Args(task_file=str(path)))
    said = capsys.readouterr().err
    assert ended.value.code == 2 and words in said and said.count("\n") == 1


def test_auto_takes_cuda_where_there_is_one(monkeypatch):
    for there, device in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert grpo_rloo.check_args(Args()).type == device


def test_padding_is_no_answer():
    """A question mark may be one; what stands for padding may not."""
    assert grpo_rloo.decode([PAD]) != "?" and grpo_rloo.reward("file", "x", "?", "?") == 1


def test_dynamic_sampling_counts_all_that_it_draws(tmp_path, monkeypatch):
    """Rewards that never differ: every iteration draws its three rounds, and pays for them."""
    monkeypatch.setattr(grpo_rloo, "reward", lambda *_: 0.0)
    flags = f"dapo {TINY} --run-dir {tmp_path}"
    grpo_rloo.main(grpo_rloo.parse_args(flags.split()))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["steps"] == 96  # two iterations of 3 x 16
    steps, shares = read_scalars(tmp_path, "charts/zero_std")
    assert steps.tolist() == [48, 96] and shares.tolist() == [1, 1]


def test_a_single_completion_may_be_compared_with_the_batch(tmp_path):
    flags = f"reinforce++ {TINY} --group-size 1 --num-prompts 16 --run-dir {tmp_path}"
    grpo_rloo.main(grpo_rloo.parse_args(flags.split()))
    assert (tmp_path / "summary.json").exists()


def test_a_task_file_is_learnt(tmp_path):
    """Rewards alone teach most of what a short warm start has not."""
    path, flags = tmp_path / "echo.jsonl", [*TINY.split(), "--width", "32", "--sft-steps", "60"]
    lines = [{"prompt": f"{i}?", "answer": str(i % 10)} for i in range(100)]
    path.write_text("\n".join(map(json.dumps, lines)))
    flags += ["--num-prompts", "16", "--total-timesteps", "3200", "--sft-accuracy", "0.5"]
    run("grpo_rloo", "grpo", *flags, "--task-file", path, "--run-dir", tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    _, rewards = read_scalars(tmp_path / "run", "charts/reward")
    assert summary["steps"] == 3200 and summary["accuracy_sft"] <= 0.5
    assert rewards[:5].mean() < 0.6 and rewards[-5:].mean() > 0.85
