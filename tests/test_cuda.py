"""The scripts on a GPU: `make test-cuda`, on a machine that has one; skipped where there is none.

What the CPU computes, which the other tests check, is the oracle here: eager, compiled, and with
CUDA graphs, losses and gradients must be its own, up to the order of float32's sums.
"""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import pytest
import torch

import grpo_rloo

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

ROOT = Path(__file__).resolve().parent.parent
SMALL = "--num-envs 2 --num-steps 64 --total-timesteps 1280 --checkpoint-every 640"
FLAGS = {
    "reinforce": "--num-envs 2 --total-timesteps 1000 --checkpoint-every 500",
    "a2c": SMALL, "npg": SMALL, "trpo": SMALL, "ppo": SMALL,
    "ppo_continuous": SMALL.replace("--num-envs 2", "--env-id InvertedPendulum-v5 --num-envs 2"),
    "grpo_rloo": "--total-timesteps 2048 --checkpoint-every 1024 --sft-steps 20 --num-prompts 32",
}
# What mode="reduce-overhead" of torch.compile sets; and no way out, where a graph cannot be had.
GRAPHS = {"TORCHINDUCTOR_CUDAGRAPHS": "1", "TORCHINDUCTOR_CUDAGRAPH_OR_ERROR": "1"}
# Its policy's figures are read after the critic's graphs have overwritten them; PyTorch says so.
REFUSES_GRAPHS = {"reinforce"}
WAYS = {"eager": ([], {}), "compiled": (["--compile"], {}), "graphs": (["--compile"], GRAPHS)}


def run(script: str, *flags: Any, **variables: str) -> str:
    """What a run in a process of its own printed; it must end well."""
    command = [sys.executable, str(ROOT / f"{script}.py"), *map(str, flags)]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("script", FLAGS)
def test_trains_on_a_gpu_and_its_checkpoint_serves_everywhere(script, way, tmp_path):
    """Trained on the GPU; evaluated there and on a CPU; resumed for more steps."""
    more, variables = WAYS[way]
    flags = [*FLAGS[script].split(), "--device", "cuda", *more]
    flags += ["--eval-episodes", "2", "--run-dir", tmp_path]
    if way == "graphs" and script in REFUSES_GRAPHS:
        with pytest.raises(AssertionError, match="overwritten by a subsequent run"):
            run(script, *flags, **variables)
        return
    run(script, *flags, **variables)
    summary = json.loads((tmp_path / "summary.json").read_text())
    checkpoint = tmp_path / "checkpoint.pt"
    weights = torch.load(checkpoint, weights_only=True)["state"][0]
    assert {x.device.type for x in weights.values()} == {"cuda"}
    for device in ("cuda", "cpu"):
        assert "Evaluated" in run(script, "--evaluate", checkpoint, "--device", device)
    again = ["--resume", checkpoint, "--device", "cuda"]
    run(script, *again, "--total-timesteps", 2 * summary["steps"], **variables)
    assert json.loads((tmp_path / "summary.json").read_text())["steps"] > summary["steps"]


def agent_of(script: str, actions: gym.Space) -> tuple[Any, Any, Any]:
    module = importlib.import_module(script)
    observations = gym.spaces.Box(-1, 1, (4,))
    spaces = SimpleNamespace(single_observation_space=observations, single_action_space=actions)
    args = module.Args(hidden_size=64, norm_obs=True)
    torch.manual_seed(0)
    return module, module.Agent(spaces, args), args


def spread_out(agent: torch.nn.Module) -> None:
    """Its parameters far from the initial ones, where actions would be near uniform."""
    with torch.no_grad():
        for p in agent.parameters():
            p.add_(0.1 * torch.randn_like(p))


def losses_and_gradient(function, agent, *arguments) -> torch.Tensor:
    for p in agent.parameters():
        p.grad = None
    loss, metrics = function(agent, *arguments)
    loss.backward()
    grads = [p.grad.flatten() for p in agent.parameters() if p.grad is not None]
    return torch.cat([loss.detach()[None], metrics, *grads]).cpu()


def agree(function, agent, place, *arguments) -> None:
    """The GPU's three ways give what the CPU gives; place moves arguments to a device."""
    expected = losses_and_gradient(function, agent, *place(arguments, "cpu"))
    assert expected.isfinite().all() and expected.abs().max() > 1e-3
    agent.to("cuda")
    compiled = torch.compile(function)
    graphs = torch.compile(function, mode="reduce-overhead")
    for way in (function, compiled, graphs):
        for _ in range(3):  # the graph is recorded at the second call and replayed at the third
            torch.compiler.cudagraph_mark_step_begin()
            found = losses_and_gradient(way, agent, *place(arguments, "cuda"))
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def move(x: Any, device: str) -> Any:
    return torch.utils._pytree.tree_map_only(torch.Tensor, lambda y: y.to(device), x)


SPACES = {"discrete": gym.spaces.Discrete(3), "box": gym.spaces.Box(-1, 1, (2,))}


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("script", ["reinforce", "a2c", "ppo", "ppo_continuous"])
def test_losses_and_gradients_are_the_cpus(script, space):
    if (script, space) in (("ppo", "box"), ("ppo_continuous", "discrete")):
        pytest.skip("which the script does not take")
    module, agent, args = agent_of(script, SPACES[space])
    spread_out(agent)
    obs = torch.randn(128, 4)
    with torch.no_grad():
        actions = agent.act(obs, agent.draw_noise(128))
        old = agent.policy(obs).log_prob(actions) + 0.3 * torch.randn(128)
    advantages, returns, values = torch.randn(3, 128)
    if script == "reinforce":
        arguments: tuple = ((obs, actions, advantages, returns), 8, args)
    elif script == "a2c":
        arguments = ((obs, actions, advantages, returns), args)
    else:
        beta = torch.tensor(0.5)
        arguments = ((obs, actions, old, advantages, returns, values), 0.2, beta, args)
    agree(module.total_loss, agent, move, *arguments)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("script", ["npg", "trpo"])
def test_natural_directions_are_the_cpus(script, space):
    module, agent, args = agent_of(script, SPACES[space])
    spread_out(agent)
    obs, found = torch.randn(256, 4), []
    with torch.no_grad():
        actions = agent.act(obs, agent.draw_noise(256))
    count = sum(p.numel() for name, p in agent.named_parameters() if "critic" not in name)
    gradient = 0.1 * torch.randn(count)
    for device in ("cpu", "cuda"):
        agent.to(device)
        params = [p for name, p in agent.named_parameters() if not name.startswith("critic")]
        batch = (x.to(device) for x in (gradient, obs, actions))
        u, fisher_u = module.natural_direction(agent, params, *batch, args)
        found.append((u.cpu(), fisher_u.cpu()))
    for cpu, cuda in zip(*found):  # ten steps of conjugate gradient magnify what sums differ by
        assert (cpu - cuda).norm() < 1e-2 * cpu.norm()


@pytest.mark.parametrize("preset", ["grpo", "rloo", "gspo", "cispo"])
def test_losses_and_gradients_of_completions_are_the_cpus(preset):
    args = grpo_rloo.Args(width=32, num_layers=2, num_heads=2, **grpo_rloo.PAPERS[preset])
    torch.manual_seed(0)
    agent = grpo_rloo.Agent(24, ["0123456789"], args)
    prompts, real = grpo_rloo.pad_left(["12+3=", "1=", "456+78=", "9+9="] * 8, 9)
    sampled = prompts, real, *grpo_rloo.generate(agent, prompts, real, 2, 8, 1.0)
    with torch.no_grad():
        old, _ = grpo_rloo.completion_logprobs(agent, *sampled, 1.0)
    mask, noise = sampled[3], torch.randn(2, *old.shape)
    weights, share = grpo_rloo.token_weights(mask, args.loss_norm, 8), mask / mask.sum()
    references = (old + 0.1 * noise[0]) * mask, (old + 0.1 * noise[1]) * mask
    batch = [*sampled, *references, torch.randn(64), weights, share]
    agree(grpo_rloo.total_loss, agent, move, batch, args)


def test_greedy_completions_are_those_that_the_cpu_finds_likeliest():
    args = grpo_rloo.Args(width=32, num_layers=2, num_heads=2)
    torch.manual_seed(0)
    agent = grpo_rloo.Agent(24, ["0123456789"], args).to("cuda")
    prompts, real = (x.to("cuda") for x in grpo_rloo.pad_left(["12+3=", "1=", "456+78="], 9))
    sampled = grpo_rloo.generate(agent, prompts, real, 2, 8, 0.0)
    completions, mask = (x.cpu() for x in sampled)
    tokens, real = (x.cpu().repeat_interleave(2, 0) for x in (prompts, real))
    with torch.no_grad():
        seen = torch.cat([tokens, completions], 1), torch.cat([real, mask], 1)
        logits, _ = agent.to("cpu")(*seen)
    likeliest = logits[:, tokens.shape[1] - 1 : -1].argmax(-1)
    assert mask.any() and torch.equal(likeliest[mask], completions[mask])
