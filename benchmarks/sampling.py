"""Is the KV cache of grpo_rloo.py worth its lines? `python -m benchmarks sampling`.

The script's own generate, which keeps keys and values, beside the same greedy sampling by a full
forward of everything so far for each token; interleaved pairs, one thread. Both must write the same
tokens. The random network's end token is given no chance, so that every completion has its length.
"""

import datetime
import json
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.results import directory_lock, machine, write_atomically

FILE = "sampling.json"
PROMPT, BATCH, LENGTHS = 8, 64, (16, 64, 128)


def full_forward(agent: Any, prompts: Tensor, real: Tensor, new_tokens: int) -> Tensor:
    """Greedy completions [B, L] without a cache."""
    tokens = prompts
    with torch.inference_mode():
        for _ in range(new_tokens):
            choice = agent(tokens, real)[0][:, -1].argmax(-1)
            tokens = torch.cat([tokens, choice[:, None]], 1)
            real = torch.ones_like(tokens, dtype=torch.bool)
    return tokens[:, prompts.shape[1] :].clone()


def measure(pairs: int) -> list[dict[str, Any]]:
    """A row per length: tokens per second of both ways, pair by pair."""
    import grpo_rloo

    torch.set_num_threads(1)
    torch.manual_seed(1)
    rows = []
    for length in LENGTHS:
        agent = grpo_rloo.Agent(PROMPT + length, ["0123456789"], grpo_rloo.Args())
        with torch.no_grad():  # its logit is 0, and some other token's is above
            agent.head.weight[grpo_rloo.END] = 0
        prompts = torch.randint(2, 90, (BATCH, PROMPT))
        real = torch.ones_like(prompts, dtype=torch.bool)
        ways = {
            "cache": partial(grpo_rloo.generate, agent, prompts, real, 1, length, 0.0),
            "full": partial(full_forward, agent, prompts, real, length),
        }
        written = [ways["cache"]()[0], ways["full"]()]  # warms up, too
        if not torch.equal(*written) or (written[0] == grpo_rloo.END).any():
            raise RuntimeError(f"the two ways of sampling differ at {length} tokens")
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(pairs):
            for name, way in ways.items():
                start = time.perf_counter()
                way()
                rates[name].append(round(BATCH * length / (time.perf_counter() - start), 1))
        rows.append({"new_tokens": length, "batch": BATCH, "prompt": PROMPT, **rates})
        print(sampling_line(rows[-1]), flush=True)
    return rows


def sampling(results: Path, pairs: int) -> None:
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    measured = {"machine": machine(), "date": date, "threads": 1, "rows": measure(pairs)}
    results.mkdir(parents=True, exist_ok=True)
    with directory_lock(results, wait=True):
        write_atomically(results / FILE, json.dumps(measured, indent=1) + "\n")


def spread(values: list[float], digits: int) -> str:
    middle = f"{statistics.median(values):,.{digits}f}"
    return f"{middle} [{min(values):,.{digits}f}, {max(values):,.{digits}f}]"


def sampling_line(row: dict[str, Any]) -> str:
    ratios = [a / b for a, b in zip(row["cache"], row["full"], strict=True)]
    cells = [row["new_tokens"], spread(row["cache"], 0), spread(row["full"], 0), spread(ratios, 1)]
    return f"| {' | '.join(map(str, cells))} |"


def sampling_section(results: Path) -> list[str]:
    """The table, in Markdown; empty if nothing was measured."""
    if not (results / FILE).exists():
        return []
    measured = json.loads((results / FILE).read_text())
    rows, cpu = measured["rows"], measured["machine"]
    return [
        "### sampling", "",
        "| New tokens | Tokens/s with the cache | by full forwards | **ratio** |",
        "|--:|--:|--:|--:|",
        *map(sampling_line, rows),
        "", f"grpo_rloo.py's default network, {rows[0]['batch']} prompts of {rows[0]['prompt']} "
        f"tokens, greedy. Median [least, greatest] of {len(rows[0]['cache'])} interleaved pairs, "
        f"one thread. Measured {measured['date']} on {cpu['cpu']}, {cpu['cores']} cores.", "",
        "```", "python -m benchmarks sampling", "python -m benchmarks report", "```", "",
    ]
