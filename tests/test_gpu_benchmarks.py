"""The harness of the GPU's tables, tried out where there is none."""

import itertools
import json
import os
import re
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.tensorboard import SummaryWriter

from benchmarks import cuda, speed, suites, tokens
from benchmarks.__main__ import main
from benchmarks.suites import ROOT


@pytest.mark.parametrize("command", ["cuda", "tokens"])
def test_without_a_gpu_it_says_so(command, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([command, "--results", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "benchmarks: torch finds no CUDA device here\n"
    assert not list(tmp_path.iterdir())


def test_a_turns_rate_is_of_its_own_steps_and_seconds():
    """100 steps a second while it runs, 50 in the last turn; held in between."""
    turns = [(0.0, 3.0), (10.0, 11.0), (20.0, 22.0)]
    times = np.array([1, 2, 3, 10.5, 11, 21, 22])
    steps = np.array([100, 200, 300, 350, 400, 450, 500])
    active = lambda x: np.sum([np.clip(x, a, b) - a for a, b in turns], axis=0)
    assert cuda.turn_rates(steps, times, turns, active) == [100, 50]
    # A turn without a point of its own has no rate; its seconds are the next one's.
    late = np.array([1, 2, 3, 10.5, 10.9, 10.95, 22])
    turns.insert(2, (15.0, 15.0))
    assert cuda.turn_rates(steps, late, turns, active)[1:] == [None, 24.4]  # 50 in 2.05 s


def test_ratios_are_taken_within_rounds():
    runs = {"eager": {"sps": [2, None, 8, 9]}, "peer": {"sps": [1, 5, 2, None]}, "cpu": {}}
    row = {"runs": runs | {"graphs": {"failed": "so"}}}
    assert cuda.ratios(row, "eager") == [2, 4] and cuda.rates(row, "eager") == [2, 8, 9]
    assert cuda.ratios(row, "graphs") == cuda.rates(row, "cpu") == cuda.rates(row, "none") == []


PROGRAM = b"""if True:
    import os, sys, time
    side = os.path.basename(os.getcwd())
    if side == "graphs":
        assert os.environ["TORCHINDUCTOR_CUDAGRAPHS"] == "1" and "--compile" in sys.argv
        sys.exit("no graphs today")
    assert "TORCHINDUCTOR_CUDAGRAPHS" not in os.environ
    assert ("--compile" in sys.argv) == (side == "compiled")
    assert ("--device" in sys.argv) == (side in ("eager", "compiled", "peer"))
    for step in range(20, 401, 20):
        time.sleep(0.03)
        with open("points.txt", "a") as file:
            print(step, time.time(), file=file)
        print(f"{step} steps, {step // 4}%, return 1.0, 1 steps/s", flush=True)
"""


def fake_job(task: suites.Task, seed: int, scripts: Any) -> suites.Job:
    return suites.Job(task, seed, PROGRAM, "h", {"python": "3", "torch": "2"}, "c")


def test_sides_warm_up_together_and_take_turns_and_a_failed_one_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(cuda, "make_job", fake_job)
    # The peer's command line has no script in it: here all are the program.
    monkeypatch.setattr(speed, "command_line", lambda _, script, __: [sys.executable, str(script)])

    def points(run_dir, _, times=False):
        steps, seconds = np.loadtxt(run_dir.parent / "points.txt").T
        return steps, seconds if times else np.full(20, 1000.0)

    monkeypatch.setattr(cuda, "read_scalars", points)
    tasks = [suites.Task("ppo", "CartPole-v1", 400, variant=name) for name in ("a", "b")]
    rows: list[Any] = []
    cuda.measure(tasks, tmp_path / "w", ROOT, "a card", rows.append, device="cuda")
    assert [row["variant"] for row in rows] == ["a", "b"] and rows[0]["gpu"] == "a card"
    for row in rows:
        assert row["runs"]["graphs"]["failed"].endswith("status 1: no graphs today")
        for side in ("eager", "compiled"):
            assert len(row["runs"][side]["sps"]) == 7
            assert len(cuda.rates(row, side)) >= 5  # a step that slips in leaves a turn empty
    for number in "01":  # six steps of each in the warm-up, whatever the others do; then in turns
        times = {side: np.loadtxt(tmp_path / "w" / number / side / "points.txt")[:, 1]
                 for side in ("eager", "compiled", "peer")}
        owner = sorted((x, side) for side, each in times.items() for x in each[8:])
        changes = sum(a[1] != b[1] for a, b in itertools.pairwise(owner))
        assert changes <= 3 * 8  # of up to 36
        assert max(each[0] for each in times.values()) < min(each[-1] for each in times.values())
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    found: dict[str, Any] = {}
    cuda.on_cpus(tasks, tmp_path / "w", ROOT, lambda task, x: found.update({task.variant: x}))
    assert list(found) == ["a", "b"] and {x["at_once"] for x in found.values()} == {1}
    times = [np.loadtxt(tmp_path / "w" / "cpu" / f"ppo-({x})" / "points.txt")[:, 1] for x in "ab"]
    assert times[0][-1] < times[1][0]  # one core, one run
    for each, seconds in zip(found.values(), times):
        rate = 280 / (seconds[-1] - seconds[5])  # from 30 % on
        assert len(each["sps"]) == 7 and np.median(each["sps"]) == pytest.approx(rate, rel=0.5)
    text = "\n".join(cuda.cuda_section(rows))
    assert "- Failed: ppo (a), graphs: " in text and "| failed |" in text
    assert re.search(r"- Missing: a2c on CartPole-v1: width 64; width 256; width 1024", text)


def test_what_the_file_holds_is_not_measured_again(tmp_path, monkeypatch):
    measured: list[str] = []

    def measure(tasks, work, scripts, gpu, keep, device="cuda"):
        for task in tasks:
            measured.append(task.label)
            job = fake_job(task, 1, scripts)
            keep(speed.facts(task, job) | {"gpu": gpu, "runs": {
                side: {"sps": [2.0], "first_point_seconds": 1, "peak_mib": 1}
                for side in cuda.SIDES}})

    monkeypatch.setattr(cuda, "make_job", fake_job)
    monkeypatch.setattr(cuda, "measure", measure)
    monkeypatch.setattr(cuda, "gpu_name", lambda: "a card")
    timed: list[str] = []

    def on_cpus(tasks, work, scripts, keep):
        for task in tasks:
            timed.append(task.label)
            keep(task, {"sps": [1.0]})

    monkeypatch.setattr(cuda, "on_cpus", on_cpus)
    tasks = [suites.Task("ppo", "CartPole-v1", 400, variant=name) for name in ("a", "b")]
    cuda.cuda(tasks[:1], tmp_path, tmp_path, ROOT)
    cuda.cuda(tasks, tmp_path, tmp_path, ROOT)
    cuda.cuda(tasks, tmp_path, tmp_path, ROOT)
    assert measured == timed == ["ppo (a)", "ppo (b)"]
    assert all(row["runs"]["cpu"] == {"sps": [1.0]} for row in cuda.read_cuda(tmp_path))
    monkeypatch.setattr(cuda, "gpu_name", lambda: "another card")
    cuda.cuda(tasks, tmp_path, tmp_path, ROOT)
    assert measured == timed == ["ppo (a)", "ppo (b)"] * 2
    rows = cuda.read_cuda(tmp_path)
    assert len(rows) == 4 and "\n".join(cuda.cuda_section(rows)).count("| ppo (a) |") == 2
    # What failed, or was of other libraries or flags, is measured anew.
    rows[0]["runs"]["graphs"] = {"failed": "no memory"}
    rows[1]["versions"] = {"python": "3", "torch": "1"}
    rows[2]["runs"]["cpu"], rows[3]["flags"] = {"failed": "killed"}, {"hidden_size": 5}
    (tmp_path / cuda.FILE).write_text(json.dumps(rows))
    labels = [f"ppo ({row['variant']})" for row in rows]
    for name in ("a card", "another card"):
        monkeypatch.setattr(cuda, "gpu_name", lambda name=name: name)
        cuda.cuda(tasks, tmp_path, tmp_path, ROOT)
    assert sorted(measured[4:]) == sorted([labels[0], labels[1], labels[3]])
    assert sorted(timed[4:]) == sorted(labels)


SIZES = {"prompts": 16, "prompt": 8, "new": 6}


def test_operations_are_those_that_torch_counts():
    lab = tokens.Laboratory(32, 2, 4, False, "cpu", **SIZES)
    sampling, updating = lab.operations()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        lab.sample()
    assert counter.get_total_flops() == sampling
    minibatch = lab.minibatch()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        lab.update(lab.script.total_loss, minibatch)
    assert counter.get_total_flops() == updating


@pytest.mark.parametrize("bf16", [False, True])
def test_an_update_of_a_larger_network_learns_in_either_precision(bf16):
    """The gradient under autocast is float32's, as near as bfloat16 can be, and changes theta."""
    lab = tokens.Laboratory(32, 2, 4, bf16, "cpu", **SIZES)
    minibatch, before = lab.minibatch(), lab.theta.detach().clone()
    found = []
    for lab.bf16 in (bf16, False):
        with lab.precision():
            loss, _ = lab.script.total_loss(lab.agent, minibatch, lab.args)
        loss.backward()
        found.append(lab.grad.clone())
        lab.grad.zero_()
    assert (found[0] - found[1]).norm() < 0.1 * found[1].norm()
    assert bf16 == bool((found[0] != found[1]).any())
    lab.update(lab.script.total_loss, minibatch)
    assert not torch.equal(lab.theta, before) and not lab.grad.any()


def test_parts_are_measured_once_and_shares_are_of_the_peak(tmp_path, monkeypatch):
    calls: list[Any] = []

    def measure(size, bf16, modes, repeats):
        calls.append((size[0], bf16, *modes))
        part = {"tokens": 1000, "operations": 10**6, "seconds": [0.1] * repeats}
        parts = dict.fromkeys(modes, part)
        return {"width": size[0], "layers": size[1], "heads": 1, "bf16": bf16, "prompts": 8,
                "parameters": 10**7, "prompt": 8, "new": 6, "parts": parts}

    monkeypatch.setattr(tokens, "measure", measure)
    monkeypatch.setattr(tokens, "gpu_name", lambda: "a card")
    monkeypatch.setattr(tokens, "matmul_peak", lambda _, x: 1e8 if x == torch.bfloat16 else 2e7)
    for name in ("max_memory_allocated", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: 2**30)
    tokens.tokens(tmp_path, 2)
    assert len(calls) == len(set(calls)) == 10
    text = "\n".join(tokens.tokens_section(tmp_path))
    assert "| 10 M | bf16 | sampling | 10,000 [10,000, 10,000] | 10.0 [10.0, 10.0] |" in text
    assert "| 10 M | f32 | training, eager | 10,000 [10,000, 10,000] | 50.0 [50.0, 50.0] |" in text
    assert "Missing" not in text
    tokens.tokens(tmp_path, 2)
    assert len(calls) == 10
    (found,) = tokens.read_tokens(tmp_path)
    del found["rows"][0]["parts"]["sample"], found["rows"][0]["parts"]["graphs"]
    (tmp_path / tokens.FILE).write_text(json.dumps([found]))
    text = "\n".join(tokens.tokens_section(tmp_path))
    assert "- Missing: width 384, 6 layers, bf16: sampling; training, graphs" in text
    tokens.tokens(tmp_path, 2)
    assert calls[10:] == [(384, True, "sample"), (384, True, "eager", "compiled", "graphs")]
    # Another card's rows stand beside the first one's; what finds no memory is left out.
    monkeypatch.setattr(tokens, "gpu_name", lambda: "a small card")

    def without_memory(size, bf16, modes, repeats):
        if size[0] > 384:
            raise torch.OutOfMemoryError("out of memory")
        return measure(size, bf16, modes, repeats)

    monkeypatch.setattr(tokens, "measure", without_memory)
    tokens.tokens(tmp_path, 2)
    assert [len(card["rows"]) for card in tokens.read_tokens(tmp_path)] == [4, 2]
    text = "\n".join(tokens.tokens_section(tmp_path))
    assert "on a card," in text and "on a small card," in text
    assert "- Missing: width 1024, 8 layers, f32: sampling; training, eager" in text


def test_curves_without_enough_points_are_no_rate(tmp_path):
    run: Any = SimpleNamespace(directory=tmp_path, turns=[(0.0, 1.0)], peak_mib=lambda: 1)
    writer = SummaryWriter(str(tmp_path / "run"))
    writer.close()
    assert "no points" in cuda.found_in(run)["failed"]


def test_the_digest_of_a_text_is_of_what_it_computes():
    """Not of its words; and of flatten_parameters, which stands below the banner, all the same."""
    source, digest = tokens.SCRIPT.read_text(), tokens.text_digest
    same = source.replace("A laboratory, not", "No laboratory, but").replace("  # ", "  # so: ")
    assert same != source and digest(same) == digest(source)
    for old, new in (("min(ratio * A", "max(ratio * A"), ("zeros_like(theta)", "ones_like(theta)")):
        assert source.count(old) == 1
        assert digest(source.replace(old, new)) != digest(source)
