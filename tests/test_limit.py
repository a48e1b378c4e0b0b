"""The limit that speed is held against: does it time what the scripts do?"""

import importlib
import json
from collections import Counter
from pathlib import Path

import pytest

from benchmarks import limit
from benchmarks.__main__ import main
from benchmarks.speed import cpu
from benchmarks.suites import BenchmarkError

ROOT = Path(__file__).resolve().parent.parent


def test_the_limit_replaces_the_banners_and_nothing_else():
    """Under its banners the training loop is the script's own, line by line."""
    for path in sorted(ROOT.glob("*.py")):
        before, after = path.read_text().splitlines(), limit.instrument(path.read_text())
        added = [line for line in after.splitlines() if line not in before]
        assert [line.strip().split("(")[0] for line in added] == ["mark"] * 5, path
        assert len(after.splitlines()) == len(before) + 1
    with pytest.raises(BenchmarkError, match="0 banners"):
        limit.instrument("def main():\n    run.finish(1)\n")


def test_the_parts_of_an_iteration_are_clocked_after_the_warm_up(monkeypatch):
    """By a clock that the loop moves on, the bare work too, which is part of no part."""
    now, work = [0.0], {"environment": 0.5, "networks": 1.5}

    def bare(steps):
        assert steps == 100
        now[0] += 1000 * sum(work.values())  # it takes long: not of the script's own time
        return tuple(work.values())

    def cold_and_warm(steps):
        times.append(steps)
        return tuple(len(times) % 2 * 9 + x for x in bare(steps))

    times = []
    monkeypatch.setattr(limit.time, "perf_counter", lambda: now[0])
    marks = limit.Marks()
    marks.work = cold_and_warm
    for iteration in range(8):
        for seconds, part in zip((4, 1, 3, 2), limit.PARTS, strict=True):
            marks(part, 100 * iteration + 100 * (part > limit.PARTS[0]))
            now[0] += seconds * (100 if iteration < 2 else 1)  # it compiles
    marks("end", 800)
    expected = dict(zip(limit.PARTS, (40e3, 10e3, 30e3, 20e3), strict=True))
    expected |= {"environment": 5e3, "networks": 15e3}
    assert marks.per_step() == pytest.approx(expected)


@pytest.mark.parametrize("script, flags", [
    ("a2c", ""), ("ppo", "--update-epochs 3"), ("npg", ""), ("trpo", "--value-epochs 3"),
    ("ppo_continuous", "--env-id Pendulum-v1 --num-minibatches 2"),
    ("ppo_continuous", "--env-id Pendulum-v1 --num-minibatches 2 --no-recompute-adv"),
])
def test_the_limit_counts_the_passes_that_a_script_makes(script, flags, tmp_path, monkeypatch):
    """Forward calls of each network by number of rows, counted in a run of one iteration."""
    module = importlib.import_module(script)
    argv = f"--num-envs 4 --num-steps 32 --total-timesteps 128 {flags} --eval-episodes 1"
    args = module.parse_args([*argv.split(), "--run-dir", str(tmp_path / "run")])
    made: Counter[tuple[str, int]] = Counter()
    real = module.mlp

    def counting(*sizes, **kwargs):
        network = real(*sizes, **kwargs)
        name = "critic" if kwargs["output_std"] == 1.0 else "actor"
        network.register_forward_hook(lambda _, x, y: made.update([(name, y[..., 0].numel())]))
        return network

    monkeypatch.setattr(module, "mlp", counting)
    module.main(args)
    expected: Counter[tuple[str, int]] = Counter()
    for name, rows, count, _ in limit.passes(script, args, 128):
        expected[name, rows] += count
    del made["actor", 1]  # the evaluation
    if script in ("npg", "trpo"):  # F's products are no calls of the network
        del made["actor", 128], expected["actor", 128]
    assert made == expected


@pytest.mark.parametrize("script, env", [("a2c", "CartPole-v1"), ("grpo_rloo", "sort")])
def test_limit_measures_in_rounds(script, env, tmp_path, capsys):
    """The command line, on a suite of one small task: the table holds what the file holds."""
    steps = 200 if script == "a2c" else 32
    flags = "" if script == "a2c" else (
        "{ num_prompts = 4, group_size = 2, width = 8, sft_steps = 1, eval_episodes = 2 }")
    suite = tmp_path / "small.toml"
    suite.write_text(f'publish = false\n[[task]]\nscript = "{script}"\nenv = "{env}"\n'
                     f"steps = {steps}\n" + f"flags = {flags}\n" * bool(flags)
                     + 'variant = "grpo"\n')
    assert main(["limit", str(suite), "--rounds", "2", "--results", str(tmp_path)]) == 0
    (row,) = json.loads((tmp_path / "limit.json").read_text())
    assert len(row["rounds"]) == 2 and row["script"] == script
    for measured in row["rounds"]:
        assert set(measured) == {"eager", "compiled"}
        for side in measured.values():
            assert set(side) == {*limit.PARTS, *limit.BARE} and side["networks"] > 0
            assert (side["environment"] > 0) == (script == "a2c")
            assert all(side[part] > 0 for part in limit.PARTS)
    first = dict(row["rounds"][0]["eager"])
    bare = first.pop("environment") + first.pop("networks")
    share = 100 * bare / sum(first.values())
    assert limit.shares(row, "eager")[0] == pytest.approx(share)
    eager, compiled = ([sum(x[side][part] for x in row["rounds"]) for part in limit.PARTS]
                       for side in ("eager", "compiled"))
    percent = lambda parts: ", ".join(f"{100 * x / sum(parts):.0f}" for x in parts)
    profiles = f" | {percent(eager)} | {percent(compiled)} | "
    assert limit.limit_line(row).endswith(profiles + f"{cpu(row)} |")
    table = "\n".join(limit.limit_section(limit.read_limit(tmp_path)))
    assert limit.limit_line(row) in table and limit.limit_line(row) in capsys.readouterr().out
    assert limit.limit_section([]) == []


def test_a_share_below_its_target_is_named():
    bare = lambda share: {"environment": 0.0, "networks": share / 25}
    part = dict.fromkeys(limit.PARTS, 1.0)
    def row(eager, compiled):
        rounds = [{"eager": part | bare(x), "compiled": part | bare(compiled)}
                  for x in (1, eager, 99)]
        return {"script": "a2c", "variant": "v", "env": "E", "rounds": rounds,
                "machine": {"cpu": "Some(R) CPU Processor"}}
    assert limit.short_of_targets([row(40, 50)]) == []
    assert limit.short_of_targets([row(39, 50), row(40, 49)]) == [
        "- Short of its target: a2c (v) on E, eager 39.0 % of the limit, not 40 (Some CPU)",
        "- Short of its target: a2c (v) on E, compiled 49.0 % of the limit, not 50 (Some CPU)"]
