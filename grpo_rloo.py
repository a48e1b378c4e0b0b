"""Policy gradients for language models: GRPO, RLOO and their successors in one file.

A laboratory, not a trainer of large models: a transformer of 0.1 M parameters is taught a little
arithmetic by examples (the warm start), then most of the rest from rewards alone, in minutes.

For each of Q prompts q sample G completions o_1 ... o_G from pi_old, score them r_1 ... r_G, and
ascend ppo.py's clipped objective token by token, with the group in the critic's place:

    ratio_it = pi(o_it | q, o_i,<t) / pi_old(o_it | q, o_i,<t)
    J = sum_it w_it [ min(ratio_it A_i, clip(ratio_it, 1 - low, 1 + high) A_i)
                      - beta KL_it + ent_coef H_it ]         H_it: entropy of pi(. | q, o_i,<t)

The papers are combinations of choices, each a flag. A preset sets them all (below mean and std are
those of the group's G rewards, |o_i| is the number of tokens, B = Q G, L = max_new_tokens):

    preset       --advantage         --ratio       low, high    w_it          KL to the start
    grpo         (r - mean) / std    token         0.2, 0.2     1 / (B |o_i|) 0.04 k3, in the loss
    rloo         r - mean of others  sequence      0.2, 0.2     1 / (B |o_i|) 0.03, in the reward
    dr-grpo      r - mean            token         0.2, 0.2     1 / (B L)     -
    dapo         (r - mean) / std    token         0.2, 0.28    1 / sum |o|   -
    gspo         (r - mean) / std    length-norm   3e-4, 4e-4   1 / (B |o_i|) -
    cispo        (r - mean) / std    token, no min 1.0, 0.28    1 / sum |o|   -
    reinforce++  over the batch      token         0.2, 0.2     1 / sum |o|   0.01, in the reward

grpo arXiv:2402.03300, rloo 2402.14740, dr-grpo 2503.20783, dapo 2503.14476 (with dynamic sampling
and the overlong penalty), gspo 2507.18071, cispo 2506.13585, reinforce++ 2501.03262. With --ratio
sequence the ratio of the whole completion stands at each of its tokens, with length-norm its
|o_i|-th root. cispo's objective is clip(ratio) A log pi, the clip held fixed: no token loses its
gradient. r - mean is (G - 1) / G times rloo's: dividing by std weighs easy and hard prompts up,
1 / |o_i| weighs a token of a long completion down; neither is the gradient of the mean reward.

How far to step: at the first update pi = pi_old, every ratio is 1 and the clip idle; with
--update-epochs 1 --num-minibatches 1 the clip fractions are always 0. policy_loss is then -sum w A
(cispo: -sum w A log pi), for grpo, rloo and gspo 0, as A cancels in a group; its gradient is not.

Deviations: a warm start makes pi_ref, and its Adam goes on; none of these papers has the entropy
bonus; RLOO's has no clip; REINFORCE++ takes its KL off token by token; grpo's 0.2 and cispo's 0.28
are ours, and cispo's paper has dapo's sampling and penalty; "sum" and B are those of a minibatch.
Curves: reward and accuracy rise; zero_std: share of groups with equal rewards. losses are of the
groups learnt from: dynamic sampling leaves easy ones out. entropy near 0 with poor accuracy:
exploration died, as a group that is wrong all alike gives no gradient: raise temperature, ent_coef
or clip_coef_high; accuracy near 0 with a high entropy: lower them. truncated: L is short.

Run: python grpo_rloo.py grpo            All flags: python grpo_rloo.py grpo --help
"""
# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = [
#   "numpy==2.4.6", "tensorboard==2.21.0", "torch==2.13.0", "tqdm==4.70.1", "tyro==1.0.17",
# ]
# ///

import copy
import importlib.util
import io
import json
import math
import os
import random
import re
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

import numpy as np
import torch
import tyro
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    # --- run ---
    exp_name: str = "grpo_rloo"
    """name of the experiment, part of the run directory's name"""
    seed: int = 1
    """seed of everything random, at least 0"""
    run_dir: str | None = None
    """where the files go; by default runs/{task}__{exp_name}__{seed}__{time}"""
    resume: str | None = None
    """checkpoint of an interrupted run to continue, on CPU bit for bit"""
    evaluate: str | None = None
    """checkpoint to test on held-out prompts, greedily, instead of training"""
    eval_episodes: int = 500
    """most held-out prompts of a test"""
    checkpoint_every: int | None = None
    """completions between checkpoints; by default 10 % of all"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where the network lives; auto takes CUDA where there is one"""
    num_threads: int = 1
    """CPU threads of torch; bits are promised to repeat with 1 alone"""
    compile: bool = False
    """torch.compile the loss: a slow start, then faster"""
    # --- task ---
    task: Literal["addition", "countdown", "sort"] = "addition"
    """27+34= to 61; 3 5 7:22= to 3*5+7; 3142= to 1234"""
    task_file: str | None = None
    """your own task: lines of JSON with "prompt" and "answer", which a completion must equal"""
    max_new_tokens: int | None = None
    """L, longest completion with its end token; by default two more than the longest answer has"""
    # --- algorithm ---
    total_timesteps: int = 307_200
    """completions to sample, rounded down to whole iterations of Q G"""
    sft_steps: int = 1000
    """most minibatches of 64 examples of the supervised warm start"""
    sft_accuracy: float = 0.32
    """greedy accuracy on training prompts that ends the warm start, looked at every 2 steps"""
    sft_learning_rate: float = 1e-3
    """Adam's step size in the warm start"""
    learning_rate: float = 1.2e-3
    """Adam's step size"""
    anneal_lr: bool = True
    """lower the learning rate linearly to 0"""
    num_prompts: int = 64
    """Q, prompts of an iteration"""
    group_size: int = 8
    """G, completions of each prompt, at least 2"""
    temperature: float = 1.0
    """divides the logits, in sampling and in every log-probability"""
    num_minibatches: int = 2
    """minibatches of an epoch, of whole groups"""
    update_epochs: int = 2
    """passes over the completions of an iteration"""
    advantage: Literal["grpo", "rloo", "dr-grpo", "reinforce++", "none"] = "grpo"
    """how A comes from the rewards, see above; none: A = r"""
    ratio: Literal["token", "sequence", "length-norm"] = "token"
    """whose probability the ratio is of"""
    objective: Literal["clip", "cispo"] = "clip"
    """PPO's minimum, or the clipped ratio as a fixed weight"""
    clip_coef: float = 0.2
    """low, the ratio is clipped at 1 - low"""
    clip_coef_high: float = 0.2
    """high, the ratio is clipped at 1 + high"""
    loss_norm: Literal["sequence", "token", "constant"] = "sequence"
    """w: mean over each completion, then over them; over all tokens; or 1 / (B L)"""
    kl_coef: float = 0.0
    """beta, weight of the KL to the warm start; 0 turns it off"""
    kl_in: Literal["loss", "reward"] = "loss"
    """a penalty in J, or taken off each completion's reward (by k1)"""
    kl_estimator: Literal["k1", "k2", "k3", "unbiased"] = "k3"
    """of the KL in the loss; unbiased is ratio k3, whose gradient is the KL's"""
    ent_coef: float = 0.0
    """weight of the entropy bonus, which keeps answers in play that no group has hit on yet"""
    dynamic_sampling: int = 1
    """rounds of sampling in search of groups whose rewards differ; 1 takes what comes"""
    overlong_buffer: int = 0
    """the last tokens before L, over which the reward falls linearly by up to 1"""
    mask_truncated: bool = False
    """let completions that found no end teach nothing"""
    max_grad_norm: float = 1.0
    """longest gradient; a longer one is scaled down to it"""
    width: int = 64
    """of the transformer"""
    num_layers: int = 2
    """of the transformer"""
    num_heads: int = 4
    """of its attention, a divisor of the width"""


# What each preset changes of the defaults above. An explicit flag wins over it.
PAPERS: dict[str, dict[str, Any]] = {
    "grpo": {"kl_coef": 0.04},
    "rloo": {"advantage": "rloo", "ratio": "sequence", "kl_coef": 0.03, "kl_in": "reward"},
    "dr-grpo": {"advantage": "dr-grpo", "loss_norm": "constant"},
    "dapo": {"clip_coef_high": 0.28, "loss_norm": "token", "dynamic_sampling": 3,
             "overlong_buffer": 1},
    "gspo": {"ratio": "length-norm", "clip_coef": 3e-4, "clip_coef_high": 4e-4},
    "cispo": {"objective": "cispo", "clip_coef": 1.0, "clip_coef_high": 0.28, "loss_norm": "token"},
    "reinforce++": {"advantage": "reinforce++", "loss_norm": "token", "kl_coef": 0.01,
                    "kl_in": "reward"},
}


# --- Tasks ----------------------------------------------------------------------------------------
PAD, END, FIRST = 0, 1, 32  # token 2 is the character after FIRST - 1: printable ASCII


def encode(text: str) -> list[int]:
    """Tokens of a text; ValueError for a character outside printable ASCII."""
    if not all(FIRST <= ord(c) < 127 for c in text):
        raise ValueError(f"{text!r} has characters other than printable ASCII")
    return [ord(c) - FIRST + 2 for c in text]


def decode(tokens: list[int]) -> str:
    """The text before the end token."""
    tokens = tokens[: tokens.index(END)] if END in tokens else tokens
    return "".join(chr(x + FIRST - 2) if x > END else "\ufffd" for x in tokens)


def addition(_: random.Random) -> list[tuple[str, str, Any]]:
    """(prompt, answer, key); what has one key stays on one side of the split, as a+b and b+a."""
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    return [(f"{a}+{b}=", str(a + b), tuple(sorted((a, b)))) for a, b in pairs]


def sort(rng: random.Random) -> list[tuple[str, str, Any]]:
    """2 to 7 digits in order; answers vary in length."""
    texts = {"".join(rng.choices("0123456789", k=rng.randint(2, 7))) for _ in range(20_000)}
    return [(f"{x}=", "".join(sorted(x)), "".join(sorted(x))) for x in sorted(texts)]


def countdown(rng: random.Random) -> list[tuple[str, str, Any]]:
    """Reach a target with two or three numbers, each used once, by +, - and *."""
    found = {}
    for _ in range(40_000):
        numbers = [str(rng.randint(1, 12)) for _ in range(rng.randint(2, 3))]
        answer = numbers[0] + "".join(rng.choice("+-*") + x for x in numbers[1:])
        if 0 <= (target := eval(answer)) < 100:  # of digits and operators that stand just above
            given = " ".join(sorted(numbers))
            found.setdefault(f"{given}:{target}=", (answer, given))
    return [(prompt, *rest) for prompt, rest in sorted(found.items())]


def reward(task: str, prompt: str, answer: str, completion: str) -> float:
    """1 if it is right; in countdown 0.1 for an expression of the right numbers."""
    if task != "countdown":
        return float(completion == answer)
    if not re.fullmatch(r"[1-9]\d*([+*-][1-9]\d*)*", completion):
        return 0.0
    given, target = prompt[:-1].split(":")
    if sorted(re.findall(r"\d+", completion)) != given.split():
        return 0.0
    return 1.0 if eval(completion) == int(target) else 0.1  # it is a sum of products of numbers


def load_problems(args: Args) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(prompt, answer) to train on and, a tenth of the keys, held out; the same in every run."""
    rng = random.Random(0)
    if args.task_file is None:
        problems = {"addition": addition, "countdown": countdown, "sort": sort}[args.task](rng)
    else:
        problems = read_task_file(args.task_file)
    keys = sorted({key for _, _, key in problems})
    rng.shuffle(keys)
    held_out = set(keys[: len(keys) // 10])
    train = [(prompt, answer) for prompt, answer, key in problems if key not in held_out]
    test = [(prompt, answer) for prompt, answer, key in problems if key in held_out]
    if not test:
        refuse(f"{args.task_file or args.task} has {len(keys)} prompts; at least 10 are needed")
    rng.shuffle(test)
    return train, test


def pad_left(prompts: list[str], width: int) -> tuple[Tensor, Tensor]:
    """Tokens [B, width] that all end in one column, and which of them are real."""
    rows = [encode(prompt) for prompt in prompts]
    tokens = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    return tokens, torch.arange(width) >= width - lengths[:, None]


# --- Network --------------------------------------------------------------------------------------
class Block(nn.Module):
    """Attention, then a small network, each added to what comes in (pre-norm)."""
    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor, mask: Tensor, past: tuple[Tensor, Tensor] | None):
        """x [B, T, width], mask [B, 1, T, S]; past holds keys and values of the S - T before."""
        split = self.qkv(self.norm1(x)).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = split.transpose(1, 3).unbind(2)  # each [B, heads, T, width / heads]
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        mixed = scaled_dot_product_attention(q, k, v, mask)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(gelu(self.up(self.norm2(x)))), (k, v)


class Agent(nn.Module):
    """A decoder-only transformer over characters, that says only those that answers are made of:
    an entropy bonus would else favour all the others."""
    def __init__(self, context: int, answers: list[str], args: Args):
        super().__init__()
        vocabulary = 127 - FIRST + 2
        unsaid = torch.ones(vocabulary, dtype=torch.bool)
        unsaid[[END, *encode("".join(answers))]] = False
        self.register_buffer("unsaid", unsaid)
        self.embedding = nn.Embedding(vocabulary, args.width)
        self.position = nn.Embedding(context, args.width)
        blocks = [Block(args.width, args.num_heads) for _ in range(args.num_layers)]
        self.blocks, self.norm = nn.ModuleList(blocks), nn.RMSNorm(args.width)
        self.head = nn.Linear(args.width, vocabulary, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                std = 0.2 if isinstance(module, nn.Embedding) else args.width**-0.5
                nn.init.normal_(module.weight, std=std)

    def forward(self, tokens: Tensor, real: Tensor, past: list | None = None):
        """Logits [B, T, vocabulary] of what follows each of the T tokens, and keys and values of
        all S so far. real [B, S] says which of the S are tokens and not padding: a mask, as no
        token's value could tell, the end token least of all."""
        T, S = tokens.shape[1], real.shape[1]
        positions = (real.cumsum(-1) - 1).clamp(min=0)[:, S - T :]
        order = torch.arange(S, device=tokens.device)
        before, itself = order <= order[S - T :, None], order == order[S - T :, None]
        # Padding attends to itself: a row that sees nothing would be NaN.
        mask = ((before & real[:, None]) | itself)[:, None]
        x, present = self.embedding(tokens) + self.position(positions), []
        for i, block in enumerate(self.blocks):
            x, keys_and_values = block(x, mask, past[i] if past else None)
            present.append(keys_and_values)
        return self.head(self.norm(x)).masked_fill(self.unsaid, -1e9), present  # not -inf: 0 log 0


def read_prompts(agent: Agent, prompts: Tensor, real: Tensor, group_size: int):
    """Read each prompt once for its whole group: logits [B, 1] of the first tokens, keys and values
    of the prompts and real [B, P], B = Q G rows of the Q prompts [Q, P]."""
    logits, past = agent(prompts, real)
    of_group = lambda x: x.repeat_interleave(group_size, 0)
    return of_group(logits[:, -1:]), [tuple(map(of_group, x)) for x in past], of_group(real)


def generate(agent: Agent, prompts: Tensor, real: Tensor, group_size: int, new_tokens: int,
             temperature: float):
    """Completions [B, L] of prompts [Q, P], and which of their tokens there are: all up to the end
    token, with it. Temperature 0 takes the likeliest. Keys and values of the past are kept, so that
    each step costs one token."""
    with torch.inference_mode():
        logits, past, real = read_prompts(agent, prompts, real, group_size)
        completions = torch.full((len(real), new_tokens), PAD, device=prompts.device)
        mask = torch.zeros_like(completions, dtype=torch.bool)
        alive = torch.ones(len(real), dtype=torch.bool, device=prompts.device)
        for t in range(new_tokens):
            scores = logits[:, -1]
            if temperature:  # argmax(logits + Gumbel noise) is a sample of the softmax
                scores = scores / temperature - torch.empty_like(scores).exponential_().log()
            choice = torch.where(alive, scores.argmax(-1), PAD)
            completions[:, t], mask[:, t] = choice, alive
            real = torch.cat([real, alive[:, None]], 1)
            alive = alive & (choice != END)
            if t + 1 == new_tokens or not alive.any():
                break
            logits, past = agent(choice[:, None], real, past)
    return completions.clone(), mask.clone()


def completion_logprobs(agent: Agent, prompts, real, completions, mask, temperature: float):
    """log pi of each token of completions [B, L] of prompts [Q, P], 0 outside the mask, and the
    policy's entropy there."""
    first, past, real = read_prompts(agent, prompts, real, len(completions) // len(prompts))
    others, _ = agent(completions[:, :-1], torch.cat([real, mask[:, :-1]], 1), past)
    logprobs = (torch.cat([first, others], 1) / temperature).log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(-1, completions[..., None]).squeeze(-1) * mask, entropy


# --- The algorithm --------------------------------------------------------------------------------
def group_advantages(rewards: Tensor, advantage: str) -> Tensor:
    """A [Q, G] of rewards [Q, G]; a group of equal rewards gets 0, but for reinforce++ and none."""
    centred, G = rewards - rewards.mean(1, keepdim=True), rewards.shape[1]
    if advantage == "grpo":
        return centred / (rewards.std(1, keepdim=True) + 1e-4)
    if advantage == "rloo":  # r_i less the mean of the others
        return centred * G / (G - 1)
    if advantage == "reinforce++":
        return (rewards - rewards.mean()) / (rewards.std() + 1e-4)
    return centred if advantage == "dr-grpo" else rewards


def token_weights(mask: Tensor, loss_norm: str, longest: int) -> Tensor:
    """w [B, T], 0 outside the mask; made for a whole minibatch, before it is taken apart."""
    if loss_norm == "sequence":
        return mask / mask.sum(1, keepdim=True).clamp(min=1) / len(mask)
    return mask / (mask.sum().clamp(min=1) if loss_norm == "token" else len(mask) * longest)


def importance_ratio(logprobs, old_logprobs, mask, ratio: str) -> Tensor:
    """pi / pi_old [B, L]: of each token, or at each token that of the whole completion."""
    logratio = (logprobs - old_logprobs) * mask
    if ratio == "token":
        return logratio.exp()
    total = logratio.sum(1, keepdim=True)
    if ratio == "length-norm":
        total = total / mask.sum(1, keepdim=True).clamp(min=1)
    return total.exp().expand_as(logratio)


def policy_loss(logprobs, old_logprobs, advantages, mask, weights, args: Args) -> Tensor:
    """Minus J without its KL; tensors [B, L], advantages [B] -> scalar."""
    ratio = importance_ratio(logprobs, old_logprobs, mask, args.ratio)
    clipped_ratio = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef_high)
    A = advantages[:, None]
    if args.objective == "cispo":
        return -(weights * clipped_ratio.detach() * A * logprobs).sum()
    return -(weights * torch.min(ratio * A, clipped_ratio * A)).sum()


def kl_estimate(logprobs, old_logprobs, ref_logprobs, estimator: str) -> Tensor:
    """KL(pi, pi_ref) at each token, from one sample. While pi = pi_old all have its mean, k2 near
    pi_ref; the mean gradient of k1 is 0, of k2 and unbiased the KL's, of k3 KL(pi_ref, pi)'s."""
    k1 = logprobs - ref_logprobs
    if estimator in ("k1", "k2"):
        return k1 if estimator == "k1" else 0.5 * k1**2
    k3 = (-k1).expm1() + k1
    return k3 if estimator == "k3" else (logprobs - old_logprobs).exp() * k3


METRICS = ("policy_loss", "kl", "entropy", "old_approx_kl", "approx_kl",
           "clipfrac_low", "clipfrac_high")

def total_loss(agent: Agent, batch, args: Args):
    """Minus J; and METRICS as one tensor: its policy term, then parts of means over all tokens."""
    prompts, real, completions, mask, old_logprobs, ref_logprobs, advantages, weights, share = batch
    sampled = prompts, real, completions, mask
    logprobs, entropy = completion_logprobs(agent, *sampled, args.temperature)
    pg_loss = policy_loss(logprobs, old_logprobs, advantages, mask, weights, args)
    kl = kl_estimate(logprobs, old_logprobs, ref_logprobs, args.kl_estimator)
    loss = pg_loss - args.ent_coef * (weights * entropy).sum()
    if args.kl_coef and args.kl_in == "loss":
        loss = loss + args.kl_coef * (weights * kl).sum()
    with torch.no_grad():  # share [B, L] is 1 / tokens of the minibatch
        ratio = importance_ratio(logprobs, old_logprobs, mask, args.ratio)
        k1 = old_logprobs - logprobs
        k3 = (-k1).expm1() + k1
        low, high = ratio < 1 - args.clip_coef, ratio > 1 + args.clip_coef_high
        means = [(share * x).sum() for x in (kl, entropy, k1, k3, low, high)]
    return loss, torch.stack([pg_loss.detach(), *means])


def warm_start(agent: Agent, optimizer, theta, train, widths, solve, args: Args, device) -> None:
    """Cross-entropy on right answers, the end token included, until solve(problems) says that some
    are right. How soon that is differs between seeds, and RL should start from the same."""
    steps = tqdm(range(args.sft_steps), "Warm start", unit=" steps", disable=None, leave=False)
    draw = lambda n: [train[i] for i in torch.randint(len(train), (n,)).tolist()]
    for step in steps:
        if step % 2 == 0 and solve(draw(1000)) >= args.sft_accuracy:
            break
        examples = draw(64)
        prompts, real = pad_left([prompt for prompt, _ in examples], widths[0])
        rows = [[*encode(answer), END] for _, answer in examples]
        answers = torch.tensor([row + [PAD] * (widths[1] - len(row)) for row in rows])
        lengths = torch.tensor([len(row) for row in rows])
        mask = torch.arange(widths[1]) < lengths[:, None]
        prompts, real, answers, mask = (x.to(device) for x in (prompts, real, answers, mask))
        logprobs, _ = completion_logprobs(agent, prompts, real, answers, mask, 1.0)
        (-logprobs.sum() / mask.sum()).backward()
        nn.utils.clip_grad_norm_(theta, args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)


# --- Training -------------------------------------------------------------------------------------
def main(args: Args) -> None:
    # --- Setup ---
    device = check_args(args)
    Q, G = args.num_prompts, args.group_size
    B = Q * G  # prompts, completions of each, of an iteration
    total_steps = args.total_timesteps // B * B
    alone = args.advantage in ("none", "reinforce++")  # each completion for itself
    if G < 2 and not alone:
        refuse("--group-size 1 leaves nothing to compare with: take 2 or more")
    if args.dynamic_sampling > 1 and alone:
        refuse(f"--dynamic-sampling drops groups that do teach with --advantage {args.advantage}")
    if args.ratio == "sequence" and args.loss_norm != "sequence":
        refuse("--ratio sequence counts a completion as a whole: --loss-norm sequence")
    if Q % args.num_minibatches:
        refuse(f"--num-minibatches {args.num_minibatches} does not divide the {Q} prompts")
    if args.width % args.num_heads:
        refuse(f"--num-heads {args.num_heads} does not divide --width {args.width}")
    train, test = load_problems(args)
    P = max(len(prompt) for prompt, _ in train + test)
    answers = [answer for _, answer in train + test]
    longest = max(map(len, answers))
    L = args.max_new_tokens or longest + 2
    if longest >= L:
        refuse(f"--max-new-tokens {L} is short of the longest answer, {longest} and the end token")
    if args.overlong_buffer >= L:
        refuse(f"--overlong-buffer {args.overlong_buffer} is not below the {L} tokens there are")
    agent = Agent(P + L, answers, args).to(device)
    reference = copy.deepcopy(agent).requires_grad_(False)
    theta, grad = flatten_parameters(agent)
    optimizer = torch.optim.Adam([theta], lr=args.sft_learning_rate, fused=True)
    task = "file" if args.task_file else args.task
    solve = lambda problems: accuracy(agent, problems, P, L, task, device)
    test = test[: args.eval_episodes]
    if args.evaluate:
        load_checkpoint(args.evaluate, agent)
        print(f"Evaluated:  accuracy {solve(test):.1%} on held-out prompts")
        return
    run = Run(args, (agent, optimizer, reference), total_steps)
    if not args.resume:
        warm_start(agent, optimizer, theta, train, (P, longest + 1), solve, args, device)
        reference.load_state_dict(agent.state_dict())
        run.extra, run.start = {"accuracy_sft": solve(test)}, time.perf_counter()
        print(f"Warm start: accuracy {run.extra['accuracy_sft']:.1%} on held-out prompts")
    loss_function = torch.compile(total_loss) if args.compile else total_loss
    iteration = run.iteration
    while run.step < total_steps:
        if run.step >= run.next_checkpoint:
            run.save(iteration)
        seed_everything(args.seed, iteration, 0)
        remaining = 1 - run.step / total_steps
        learning_rate = args.learning_rate * (remaining if args.anneal_lr else 1)
        optimizer.param_groups[0]["lr"] = learning_rate

        # --- 1. Collect ---
        groups, spare, drawn = [], [], []
        for _ in range(args.dynamic_sampling):
            chosen = [train[i] for i in torch.randint(len(train), (Q,)).tolist()]
            prompts, real = (x.to(device) for x in pad_left([x for x, _ in chosen], P))
            completions, mask = generate(agent, prompts, real, G, L, args.temperature)
            texts = [decode(row) for row in completions.tolist()]
            scored = [reward(task, *chosen[i // G], text) for i, text in enumerate(texts)]
            columns = (prompts, real, completions, mask, torch.tensor(scored, device=device))
            drawn.append(columns[2:])
            for group in zip(*(x.chunk(Q) for x in columns)):
                teaches = args.dynamic_sampling == 1 or group[-1].min() < group[-1].max()
                (groups if teaches else spare).append(group)
            if len(groups) >= Q:
                break
        # Equal rewards teach nothing: they fill up the batch only if nothing better was found.
        groups = [torch.cat(x) for x in zip(*(groups + spare)[:Q])]
        prompts, real, completions, mask, scores = groups
        # Columns that no completion reaches cost time and change nothing.
        used = int(mask.sum(1).max())
        completions, mask = completions[:, :used], mask[:, :used]

        # --- 2. Advantages ---
        with torch.no_grad():
            texts_of = prompts, real, completions, mask
            old_logprobs, _ = completion_logprobs(agent, *texts_of, args.temperature)
            ref_logprobs, _ = completion_logprobs(reference, *texts_of, args.temperature)
        lengths, truncated = mask.sum(1), ~(completions == END).any(1)
        rewards = scores.clone()
        if args.overlong_buffer:  # DAPO's soft penalty
            beyond = lengths - (L - args.overlong_buffer)
            rewards -= (beyond / args.overlong_buffer).clamp(0, 1)
        if args.kl_coef and args.kl_in == "reward":
            rewards -= args.kl_coef * ((old_logprobs - ref_logprobs) * mask).sum(1)
        advantages = group_advantages(rewards.view(Q, G), args.advantage).flatten()
        # DAPO's overlong filtering: what was cut off is neither right nor wrong.
        teaching = mask & ~truncated[:, None] if args.mask_truncated else mask

        # --- 3. Update ---
        batch = (prompts, real, completions, mask, old_logprobs, ref_logprobs, advantages, teaching)
        batch = [x.unflatten(0, (Q, -1)) for x in batch]  # each [Q, 1 or G, ...]
        metrics, grad_norms, updates = torch.zeros(len(METRICS), device=device), 0.0, 0
        for _ in range(args.update_epochs):
            order = torch.randperm(Q, device=device)
            for index in order.chunk(args.num_minibatches):
                *minibatch, taught = (x[index].flatten(0, 1) for x in batch)
                weights = token_weights(taught, args.loss_norm, L)
                share = minibatch[3] / minibatch[3].sum()
                minibatch += [weights, share]
                loss, metrics_of_loss = loss_function(agent, minibatch, args)
                loss.backward()
                metrics += metrics_of_loss
                grad_norms += nn.utils.clip_grad_norm_(theta, args.max_grad_norm)
                optimizer.step()
                grad.zero_()
                updates += 1

        # --- 4. Log ---
        run.step += B * len(drawn)
        iteration += 1
        losses: dict[str, float] = dict(zip(METRICS, (metrics / updates).tolist()))
        losses |= {"grad_norm": float(grad_norms) / updates}
        completions, mask, scores = (torch.cat(x) for x in zip(*drawn))  # not the chosen ones alone
        of_groups = scores.view(-1, G)
        mean = lambda x: x.float().mean().item()
        charts = {
            "reward": mean(scores), "reward_std": scores.std().item(),
            "accuracy": mean(scores == 1), "completion_length": mean(mask.sum(1)),
            "zero_std": mean(of_groups.amin(1) == of_groups.amax(1)),
            "truncated": 1 - mean((completions == END).any(1)), "learning_rate": learning_rate,
        }
        if (wrong := scores < 1).any():
            charts["wrong_length"] = mean(mask[wrong].sum(1))
        run.log(losses, charts, int(mask.sum()))
    run.finish(iteration, solve(test))


# === Plumbing: what every program needs; skip it on a first reading ===============================
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
    """The preset and the flags; beside --resume and --evaluate the checkpoint's stand in for it."""
    argv = sys.argv[1:] if argv is None else argv
    named = bool(argv) and argv[0] in PAPERS
    if argv and not named and argv[0] not in ("-h", "--help"):
        argv = ["grpo", *argv]
    papers = {name: (name, Args(exp_name=name, **choices)) for name, choices in PAPERS.items()}
    args = tyro.extras.overridable_config_cli(papers, args=argv)
    path = args.evaluate if args.resume is None else args.resume
    if path is None:
        return args
    # Parsed once more with the saved values as defaults: what differs then was typed, even where it
    # is this script's own default.
    saved = load_checkpoint(path)["args"] | {"run_dir": str(Path(path).parent)}
    if named and PAPERS[argv[0]] != PAPERS.get(saved["exp_name"]):
        refuse(f"{argv[0]} cannot go with {path}, whose run is {saved['exp_name']}")
    args = tyro.cli(Args, args=argv[1:], default=Args(**saved))
    free = {"resume", "evaluate", "eval_episodes", "device"}
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


def accuracy(agent: Agent, problems: list, P: int, L: int, task: str, device) -> float:
    """Share of problems that the likeliest completion solves."""
    prompts, real = (x.to(device) for x in pad_left([prompt for prompt, _ in problems], P))
    completions, _ = generate(agent, prompts, real, 1, L, 0.0)
    rows = zip(problems, completions.tolist())
    solved = [reward(task, prompt, answer, decode(row)) == 1 for (prompt, answer), row in rows]
    return float(np.mean(solved))


def read_task_file(path: str) -> list[tuple[str, str, str]]:
    """(prompt, answer, key) of each line; a prompt that comes twice stays on one side."""
    problems = []
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        refuse(f"--task-file {path}: {error}")
    for number, line in enumerate(lines, 1):
        try:
            fields = json.loads(line)
            prompt, answer = str(fields["prompt"]), str(fields["answer"])
            if not encode(prompt):
                raise ValueError("the prompt is empty")
            encode(answer)
            problems.append((prompt, answer, prompt))
        except (ValueError, KeyError, TypeError) as error:
            refuse(f"--task-file {path}, line {number}: {error!r:.200}")
    return problems


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

    def __init__(self, args: Args, modules: tuple, total_steps: int):
        # step counts completions, iteration is the next one, rewards are the means of the last
        # iterations, seconds were spent by earlier processes, extra is what the script wants kept.
        self.args, self.modules, self.total_steps = args, modules, total_steps
        self.step, self.iteration, self.extra, self.rewards, seconds = 0, 0, {}, [], 0.0
        stamp = time.strftime("%Y%m%d-%H%M%S") + f"-{os.getpid()}"
        task = Path(args.task_file).stem if args.task_file else args.task
        name = f"{task}__{args.exp_name}__{args.seed}__{stamp}"
        self.dir = Path(args.run_dir or "runs/" + name.replace("/", "-").replace(":", "-"))
        self.checkpoint = self.dir / "checkpoint.pt"
        if args.resume:
            saved = load_checkpoint(args.resume, *self.modules)
            self.step, self.iteration = saved["step"], saved["iteration"]
            self.extra, self.rewards, seconds = saved["extra"], saved["rewards"], saved["seconds"]
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
        self.first_step = self.next_checkpoint = self.next_line = self.step
        self.bar = tqdm(total=total_steps, initial=self.step, unit=" completions", disable=None)
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
        """Save nothing: the last checkpoint is where a resumed run begins."""
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

    def save(self, iteration: int) -> None:
        """Write the state before an iteration, whole or not at all."""
        self.writer.flush()
        state = {
            "script": Args.exp_name,
            "args": vars(self.args) | {"resume": None},
            "state": [module.state_dict() for module in self.modules],
            "step": self.step, "iteration": iteration,
            "rewards": self.rewards,
            "seconds": time.perf_counter() - self.start,
            "extra": self.extra,
        }
        # By way of memory: the end of a torch.save that met a full disk hides why.
        torch.save(state, whole := io.BytesIO())
        write_whole(self.checkpoint, whole.getvalue())
        self.next_checkpoint = (self.step // self.every + 1) * self.every

    def log(self, losses: dict[str, float], charts: dict[str, float], tokens: int) -> None:
        """Write an iteration's scalars to TensorBoard, and the progress to the terminal."""
        seconds = time.perf_counter() - self.start
        scalars = {f"losses/{name}": value for name, value in losses.items()}
        scalars |= {f"charts/{name}": value for name, value in charts.items()}
        for name, value in scalars.items():
            if not math.isfinite(value):
                refuse(f"{name} is {value} at completion {self.step}; kept: {self.checkpoint}", 1)
        self.extra["tokens"] = self.extra.get("tokens", 0) + tokens
        scalars |= {"charts/SPS": self.step / seconds}
        scalars |= {"charts/tokens_per_second": self.extra["tokens"] / seconds}
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, self.step)
        self.rewards = [*self.rewards[-9:], charts["reward"]]
        status = f"reward {np.mean(self.rewards):.3f}, {self.step / seconds:.0f} completions/s"
        self.bar.set_postfix_str(status, refresh=False)
        self.bar.update(self.step - self.bar.n)
        # On a terminal the bar says it all; elsewhere it is silent, and a line per 5 % does.
        if self.bar.disable and self.step >= self.next_line:
            done = min(1, self.step / self.total_steps)
            left = seconds / done - seconds
            done_so_far = f"{self.step:>9} completions, {done:4.0%}"
            print(f"{done_so_far}, {status}, {left:.0f} s left", flush=True)
            self.next_line += self.total_steps / 20

    def has_point(self, tag: str) -> bool:
        """Whether an earlier process, killed on its way to the summary, has written it."""
        files = (EventFileLoader(str(path)).Load() for path in self.dir.glob("events.*"))
        points = (event for file in files for event in file if event.step == self.step)
        return any(value.tag == tag for event in points for value in event.summary.value)

    def finish(self, iteration: int, accuracy: float) -> None:
        """Save, summarise, and say where everything is."""
        self.save(iteration)
        seconds = time.perf_counter() - self.start
        self.bar.close()
        mean, sps = float(np.mean(self.rewards or math.nan)), self.step / seconds
        print(f"Trained:    reward {mean:.3f} in the last iterations, {sps:.0f} completions/s")
        before = f"after the warm start {self.extra['accuracy_sft']:.1%}"
        print(f"Evaluated:  accuracy {accuracy:.1%} on held-out prompts, {before}")
        git, here = "git describe --always --dirty --abbrev=40", Path(__file__).resolve().parent
        commit = subprocess.run(git, shell=True, cwd=here, capture_output=True, text=True).stdout
        summary = {
            "args": vars(self.args),
            "versions": {module.__name__: module.__version__ for module in (torch, np)},
            "commit": commit.strip() or None,
            "steps": self.step, "wall_seconds": seconds, "sps": sps,
            "train_reward": mean, **self.extra, "accuracy": accuracy,
        }
        if self.first_step < self.step or not self.has_point("eval/accuracy"):
            self.writer.add_scalar("eval/accuracy", accuracy, self.step)
        self.writer.close()  # first: beside a summary the curves are whole
        text = json.dumps(summary, indent=2) + "\n"
        write_whole(self.dir / "summary.json", text.encode())
        print(f"Files:      {self.dir}\nCurves:     tensorboard --logdir {self.dir}")
        print(f"To test:    {self.command('--evaluate')}")


if __name__ == "__main__":
    main(parse_args())
