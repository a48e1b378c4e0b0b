"""More environments and wider networks: the harness's table of what they change."""

import json

import pytest

from benchmarks import scaling, speed, suites, threshold
from benchmarks.__main__ import main


def fake_row(num_envs, width, *seconds):
    side = lambda x: {"sps": 100.0 * num_envs, "seconds": x, "steps": x and int(x) * 1000}
    half = lambda x: side(x) | {"seconds": x and x / 2}
    flags = {"num_envs": num_envs} | ({"hidden_size": width} if width else {})
    return {
        "script": "ppo", "env": "CartPole-v1", "steps": 9000, "variant": f"{num_envs} by {width}",
        "flags": flags, "level": 475.0, "date": "2026-01-02", "machine": {"cpu": "X", "cores": 2},
        "script_hash": "of an earlier text",
        "seeds": [
            {"eager": side(x), "compiled": half(x), "sync": 5.0, "vector_entry_point": None}
            for x in seconds
        ],
    }


def test_the_table_goes_from_few_to_many_and_leaves_no_run_out():
    rows = [fake_row(4, 256, 3.0), fake_row(16, 0, None, None, 7.0), fake_row(2, 0, 4.0, 5.0)]
    lines = [x for x in scaling.scaling_section(rows) if x.startswith("| ppo")]
    assert [line.split(" | ")[2] for line in lines] == ["2 by 0", "16 by 0", "4 by 256"]
    assert "| 200 [200, 200] | 200 [200, 200] | 4 [4, 5] | 2 [2, 2] | 4,500 [" in lines[0]
    assert "[4,000, 5,000] | 5 [5" in lines[0]
    assert "| never [7, never] | never [4, never] | never [7,000, never] |" in lines[1]
    assert lines[0].endswith("| - |") and scaling.scaling_section([]) == []


def test_rows_of_an_earlier_text_are_named():
    rows = [fake_row(4, 0, 3.0), fake_row(8, 0, 3.0)]
    assert speed.measured(rows).endswith("Of an earlier text: ppo (4 by 0), ppo (8 by 0).")
    rows[0]["script_hash"] = suites.script_hash(suites.ROOT / "ppo.py")
    assert speed.measured(rows).endswith("X, 2 cores. Of an earlier text: ppo (8 by 0).")
    rows[1]["script"] = "gone"  # of which nothing can be said
    assert speed.measured(rows).endswith("X, 2 cores.")


@pytest.mark.parametrize("mode", scaling.MODES)
def test_environments_alone_are_timed_by_the_step(mode, monkeypatch):
    """A clock that says 4 s: 20,000 steps of 8 environments each 2,500 times are 5,000 a second."""
    clock = iter((10.0, 14.0))
    monkeypatch.setattr(scaling.time, "perf_counter", lambda: next(clock))
    assert scaling.environment_rate("CartPole-v1", 8, mode) == 5000
    assert scaling.environment_rate("Acrobot-v1", 8, "vector_entry_point") is None


def test_scaling_end_to_end(tmp_path, monkeypatch, capsys):
    """Real runs, to a return that random play has; and a level that none reaches."""
    monkeypatch.setattr(threshold, "LEVELS", {"CartPole-v1": 10.0})
    monkeypatch.setattr(scaling, "LEVELS", {"CartPole-v1": 10.0})
    # Without the wait for the compiler: test_speed_end_to_end has that.
    eager = lambda job, directory, _: speed.run_once(job, directory, False)
    monkeypatch.setattr(scaling, "run_once", eager)
    suite = tmp_path / "small.toml"
    suite.write_text(
        'publish = false\n[[task]]\nscript = "ppo"\nenv = "CartPole-v1"\nsteps = 6000\n'
        'variant = "8 environments"\nflags = { num_envs = 8, num_steps = 64 }'
    )
    command = ["scaling", str(suite), "--seeds", "1", "--work", str(tmp_path), "--results"]
    assert main([*command, str(tmp_path / "results")]) == 0
    (row,) = json.loads((tmp_path / "results/scaling.json").read_text())
    (seed,) = row["seeds"]
    for side in scaling.SIDES:
        assert seed[side]["sps"] > 100 and 500 < seed[side]["steps"] <= 6000
        assert seed[side]["seconds"] > 0 and 50 < seed[side]["peak_mib"] < 5000
    assert seed["sync"] > 1000 and seed["vector_entry_point"] > 1000
    text = "\n".join(scaling.scaling_section(scaling.read_scaling(tmp_path / "results")))
    assert scaling.scaling_line(row) in text and "seed 1  | ppo" in capsys.readouterr().out


def test_the_suite_is_measured_as_it_says():
    """One thing at a time: the minibatch is 128 steps everywhere."""
    for task in suites.load_suite("scaling").tasks:
        flags = {"num_steps": 128, "num_minibatches": 4} | task.flags
        batch = flags["num_envs"] * flags["num_steps"]
        assert batch == max(512, 8 * flags["num_envs"]) and batch // flags["num_minibatches"] == 128
        grows = ("hidden_size", "width {}") if "hidden_size" in flags else ("num_envs", "{} env")
        assert task.variant.startswith(grows[1].format(flags[grows[0]]))
