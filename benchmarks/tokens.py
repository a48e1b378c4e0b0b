"""grpo_rloo with networks of 10 to 100 million parameters, on a GPU: `python -m benchmarks tokens`.

The script's own generate and total_loss, in bfloat16 under torch.autocast, the loss eager,
compiled and as CUDA graphs, and in float32, eager. Tokens per second of completions, and what that
comes to of the rate at which the same card multiplies large matrices. The end token is forbidden,
so that every completion has its length.
"""

import ast
import datetime
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cuda import gpu_name
from benchmarks.results import directory_lock, machine, write_atomically
from benchmarks.speed import cpu, least_to_greatest, spread
from benchmarks.suites import ROOT, commit_of, digest, normal_form, python_version

FILE = "tokens.json"
SCRIPT = ROOT / "grpo_rloo.py"
SIZES = ((384, 6, 6), (1024, 8, 16))  # width, layers, heads: 11 and 101 M parameters
PROMPTS, GROUP, PROMPT, NEW, MINIBATCHES = 256, 8, 32, 128, 8
MODES = {"eager": None, "compiled": "default", "graphs": "reduce-overhead"}
NAMES = {"sample": "sampling"} | {mode: f"training, {mode}" for mode in MODES}


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_of(work: Callable[[], Any], device: str) -> float:
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def matmul_peak(device: str, dtype: torch.dtype, size: int = 8192, repeats: int = 20) -> float:
    """Floating-point operations per second of size x size random matrices' product: the median."""
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    for _ in range(3):
        torch.mm(a, b)
    times = [seconds_of(lambda: torch.mm(a, b), device) for _ in range(repeats)]
    return 2 * size**3 / statistics.median(times)


def forward_operations(width: int, layers: int, vocabulary: int, tokens: int, pairs: int) -> int:
    """Floating-point operations of a forward pass over so many tokens, which look at so many pairs
    of themselves and another: of the matrix products alone."""
    return 2 * tokens * (12 * width**2 * layers + width * vocabulary) + 4 * width * layers * pairs


class Laboratory:
    """A network, and what the script does with it: sample a batch, take an update."""

    def __init__(self, width: int, layers: int, heads: int, bf16: bool, device: str,
                 prompts: int = PROMPTS, prompt: int = PROMPT, new: int = NEW):
        import grpo_rloo

        torch.manual_seed(1)
        self.script, self.new, self.device, self.bf16 = grpo_rloo, new, device, bf16
        self.args = grpo_rloo.Args(
            width=width, num_layers=layers, num_heads=heads, num_prompts=prompts,
            group_size=GROUP, max_new_tokens=new, num_minibatches=MINIBATCHES,
        )
        self.agent = grpo_rloo.Agent(prompt + new, ["0123456789"], self.args).to(device)
        self.agent.get_buffer("unsaid")[grpo_rloo.END] = True
        self.theta, self.grad = grpo_rloo.flatten_parameters(self.agent)
        self.optimizer = torch.optim.Adam([self.theta], lr=1e-5, fused=True)
        self.prompts = torch.randint(2, 90, (prompts, prompt), device=device)
        self.real = torch.ones_like(self.prompts, dtype=torch.bool)

    def precision(self) -> torch.autocast:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.bf16)

    def sample(self) -> tuple[Tensor, Tensor]:
        """The completions [B, L] of all prompts, and their mask."""
        with self.precision():
            return self.script.generate(self.agent, self.prompts, self.real, GROUP, self.new, 1.0)

    def operations(self) -> tuple[int, int]:
        """Floating-point operations of sample() and of update() on a minibatch: three forward
        passes' worth."""
        (Q, P), L, args = self.prompts.shape, self.new, self.args
        shape = args.width, args.num_layers, self.agent.head.out_features
        pairs = Q * P**2 + Q * GROUP * sum(P + t for t in range(1, L))
        sampling = forward_operations(*shape, Q * P + Q * GROUP * (L - 1), pairs)
        q = Q // MINIBATCHES
        pairs = q * P**2 + q * GROUP * (L - 1) * (P + L - 1)
        return sampling, 3 * forward_operations(*shape, q * P + q * GROUP * (L - 1), pairs)

    def minibatch(self) -> list[Tensor]:
        """A minibatch of what was sampled, with made-up advantages."""
        count = len(self.prompts) // MINIBATCHES
        self.prompts, self.real = self.prompts[:count], self.real[:count]
        completions, mask = self.sample()
        assert mask.all(), "a completion ended early"
        sampled = self.prompts, self.real, completions, mask
        with torch.no_grad(), self.precision():
            old, _ = self.script.completion_logprobs(self.agent, *sampled, 1.0)
        advantages = torch.randn(len(mask), device=self.device)
        weights = self.script.token_weights(mask, self.args.loss_norm, self.new)
        return [*sampled, old, old, advantages, weights, mask / mask.sum()]

    def update(self, loss_function: Any, minibatch: list[Tensor]) -> None:
        """The script's: the loss, its gradient, clipped, and a step of Adam."""
        with self.precision():
            loss, _ = loss_function(self.agent, minibatch, self.args)
        loss.backward()
        nn.utils.clip_grad_norm_(self.theta, self.args.max_grad_norm)
        self.optimizer.step()
        self.grad.zero_()


def measure(size: tuple[int, int, int], bf16: bool, modes: list[str], repeats: int,
            device: str = "cuda", **sizes: int) -> dict[str, Any]:
    """A row of tokens.json, of sampling or of an update's modes in turn: the seconds, call by call,
    and each call's tokens and operations."""
    torch._dynamo.reset()
    lab, parts = Laboratory(*size, bf16, device, **sizes), {}
    row: dict[str, Any] = {
        "width": size[0], "layers": size[1], "heads": size[2], "bf16": bf16,
        "parameters": lab.theta.numel(), "prompts": len(lab.prompts),
        "prompt": lab.prompts.shape[1], "new": lab.new, "parts": parts,
    }
    sampling, updating = lab.operations()
    if modes == ["sample"]:
        lab.sample()  # to warm up
        tokens, operations = len(lab.prompts) * GROUP * lab.new, sampling
        times = {"sample": [seconds_of(lab.sample, device) for _ in range(repeats)]}
    else:
        minibatch, ways = lab.minibatch(), {}
        tokens, operations = int(minibatch[3].sum()), updating
        for mode in modes:
            loss = lab.script.total_loss
            ways[mode] = torch.compile(loss, mode=MODES[mode]) if MODES[mode] else loss
        times = {mode: [] for mode in modes}
        for number in range(3 + repeats):  # the first three compile, record and replay
            for mode, loss in ways.items():
                took = seconds_of(lambda loss=loss: lab.update(loss, minibatch), device)
                times[mode] += [took] * (number >= 3)
    for part, seconds in times.items():
        parts[part] = {"tokens": tokens, "operations": operations,
                       "seconds": [round(x, 6) for x in seconds]}
    return row


def todo() -> list[tuple[tuple[int, int, int], bool, list[str]]]:
    """What is to be measured, what takes longest to compile last."""
    found = []
    for bf16 in (True, False):
        found += [(size, bf16, modes) for size in SIZES for modes in (["sample"], ["eager"])]
    return found + [(size, True, list(MODES)) for size in SIZES]


def text_digest(source: str) -> str:
    """Of what a script computes, like script_hash, but the same whatever Python reads it: the tree
    of its normal form, without the empty fields that some versions add."""
    def plain(node: Any) -> Any:
        if isinstance(node, list):
            return [plain(x) for x in node]
        if not isinstance(node, ast.AST):
            return repr(node)
        fields = {name: plain(x) for name, x in ast.iter_fields(node) if x not in (None, [])}
        return [type(node).__name__, fields]

    return digest(plain(ast.parse(normal_form(source))))


def key(row: dict[str, Any]) -> tuple[int, bool]:
    return row["width"], row["bf16"]


def tokens(results: Path, repeats: int) -> None:
    """Measure what the results file does not hold of this script, torch and machine; it is written
    anew after each part."""
    same = {"gpu": gpu_name(), "torch": torch.__version__, "machine": machine(),
            "python": python_version(), "text": text_digest(SCRIPT.read_text())}
    cards = read_tokens(results)
    found = [x for x in cards if {name: x[name] for name in same} == same]
    if not found:
        peaks = {"bf16": torch.bfloat16, "f32": torch.float32}
        peak = {name: round(matmul_peak("cuda", x)) for name, x in peaks.items()}
        found = [same | {"commit": commit_of(SCRIPT), "peak": peak, "rows": []}]
        cards.append(found[0])
    measured = found[0]
    rows = {key(row): row for row in measured["rows"]}
    results.mkdir(parents=True, exist_ok=True)
    for size, bf16, modes in todo():
        row = rows.get((size[0], bf16), {"parts": {}})
        if all("seconds" in row["parts"].get(mode, {}) for mode in modes):
            continue
        torch.cuda.reset_peak_memory_stats()
        try:
            found = measure(size, bf16, modes, repeats)
        except torch.OutOfMemoryError as error:
            print(f"width {size[0]}, {', '.join(modes)}: {error!s:.80}", flush=True)
            continue
        most = max(row.get("peak_gib", 0), round(torch.cuda.max_memory_allocated() / 2**30, 1))
        date = datetime.datetime.now(datetime.UTC).date().isoformat()
        parts = row["parts"] | found["parts"]
        rows[key(found)] = found | {"peak_gib": most, "date": date, "parts": parts}
        measured["rows"] = list(rows.values())
        print(*tokens_lines(found, measured["peak"]), sep="\n", flush=True)
        with directory_lock(results, wait=True):
            write_atomically(results / FILE, json.dumps(cards, indent=1) + "\n")


def read_tokens(results: Path) -> list[dict[str, Any]]:
    """What was measured, card by card."""
    return json.loads((results / FILE).read_text()) if (results / FILE).exists() else []


def missing(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each network and precision of which a part was not measured."""
    have, absent = {key(row): row["parts"] for row in rows}, {}
    for size, bf16, modes in todo():
        names = absent.setdefault((size, "bf16" if bf16 else "f32"), {})
        names |= {NAMES[x]: None for x in modes if x not in have.get((size[0], bf16), {})}
    return [f"- Missing: width {width}, {layers} layers, {precision}: {'; '.join(names)}"
            for ((width, layers, _), precision), names in absent.items() if names]


def of_peak(row: dict[str, Any], part: str, peaks: dict[str, Any]) -> tuple[list, list]:
    """Tokens per second of a part, call by call, and what that is of the card's peak, in %."""
    found = row["parts"][part]
    rates = [found["tokens"] / x for x in found["seconds"]]
    each = found["operations"] / found["tokens"]
    return rates, [100 * x * each / peaks["bf16" if row["bf16"] else "f32"] for x in rates]


def rates_and_shares(results: Path, width: int, bf16: bool, part: str) -> tuple[list, list]:
    """of_peak() of a row of the last card in the results file; KeyError if it is not there."""
    rows = {key(row): (row, card) for card in read_tokens(results) for row in card["rows"]}
    row, card = rows[width, bf16]
    return of_peak(row, part, card["peak"])


def tokens_lines(row: dict[str, Any], peaks: dict[str, Any]) -> list[str]:
    """A line per part: sampling, then the update's three ways."""
    precision, lines = "bf16" if row["bf16"] else "f32", []
    for part in row["parts"]:
        rates, shares = of_peak(row, part, peaks)
        cells = [f"{row['parameters'] / 1e6:.0f} M", precision, NAMES[part]]
        cells += [spread(rates, 0), spread(shares, 1)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def tokens_section(results: Path) -> list[str]:
    """A table for each card, in Markdown; empty if nothing was measured."""
    cards, lines = read_tokens(results), ["### tokens", ""]
    for found in cards:
        lines += card_table(found)
    command = ["```", "python -m benchmarks tokens", "python -m benchmarks report", "```", ""]
    return [*lines, *command] if cards else []


def card_table(found: dict[str, Any]) -> list[str]:
    rows, peaks, lines = found["rows"], found["peak"], missing(found["rows"])
    batch, when = rows[0]["prompts"] * GROUP, least_to_greatest(row["date"] for row in rows)
    calls = min(len(part["seconds"]) for row in rows for part in row["parts"].values())
    stale = found["text"] != text_digest(SCRIPT.read_text())
    earlier = " The script's text has changed since." * stale
    return [
        "| Parameters | Precision | Part | Tokens/s | % of the card's peak |",
        "|--:|---|---|--:|--:|",
        *(line for row in rows for line in tokens_lines(row, peaks)), "",
        f"grpo_rloo.py's network, larger, on {found['gpu']}, torch {found['torch']}; bf16: under "
        f"torch.autocast. Sampling: {batch:,} completions of {rows[0]['new']} tokens for "
        f"{rows[0]['prompts']} prompts of {rows[0]['prompt']}; training: an update (loss, "
        f"gradient, clip, Adam) on {batch // MINIBATCHES:,} of them; tokens are those of "
        "completions. The peak is what the card does on the product of two random matrices of "
        f"8192 rows: {peaks['bf16'] / 1e12:.0f} TFLOP/s in bf16, {peaks['f32'] / 1e12:.0f} in "
        "f32; the operations counted are those of the matrix products, attention's too. Median "
        f"[least, greatest] of {calls} calls. Most memory: "
        f"{max(row['peak_gib'] for row in rows)} GiB. Measured {when} beside "
        f"{cpu(found)}.{earlier}", "",
        *lines, *[""] * bool(lines),
    ]
