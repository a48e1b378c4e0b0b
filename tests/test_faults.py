"""The fault campaign in short; and of each of its checks that it can fail: a promise is broken on
purpose, and the campaign must notice."""

import dataclasses
import importlib
import json
import random
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

from benchmarks import report
from benchmarks.suites import code_hash
from tests import faults, processes, sabotage
from tests.faults import Tally, attempt, make_reference, resume, struck
from tests.processes import ROOT, start
from tests.survival import differences, fresh_modules, last_words, names_checkpoint


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A run of ppo.py that nothing befell; the others here are compared with it."""
    return make_reference("ppo", tmp_path_factory.mktemp("ppo"))


def broken(monkeypatch, directory, text, instead):
    """From here on ppo.py is run with one piece of its text replaced."""
    source = (ROOT / "ppo.py").read_text()
    assert source.count(text) == 1
    (directory / "ppo.py").write_text(source.replace(text, instead))
    monkeypatch.setattr(processes, "ROOT", directory)


# --- Killed, interrupted, without room ------------------------------------------------------------


@pytest.mark.parametrize("phase", sabotage.PHASES)
def test_killed_in_a_phase_and_resumed_nothing_is_lost(phase, reference, tmp_path):
    tally, rng = Tally(), random.Random(phase)
    status, _ = struck(reference, tmp_path / "run", phase, "SIGKILL", rng)
    assert status == -9 and not resume(reference, tmp_path / "run", tally)
    assert tally.facts.total() == 1


def test_a_resumed_run_that_is_another_is_noticed(reference, tmp_path, monkeypatch):
    """Its environments are not seeded anew at a checkpoint."""
    rng = random.Random(3)
    broken(monkeypatch, tmp_path, "envs.reset(seed=env_seeds)", "envs.reset(seed=None)")
    struck(reference, tmp_path / "run", "checkpoint write", "SIGKILL", rng)
    assert "differs" in resume(reference, tmp_path / "run", Tally())


def add_a_point(run_dir):
    writer = SummaryWriter(str(run_dir), filename_suffix=".more")
    writer.add_scalar("losses/entropy", 0.0, 192)
    writer.close()


def change_a_weight(run_dir):
    checkpoint = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    next(iter(checkpoint["state"][0].values())).view(-1)[0] += 1e-6
    torch.save(checkpoint, run_dir / "checkpoint.pt")


def change_a_moment(run_dir):
    checkpoint = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    checkpoint["state"][1]["state"][0]["exp_avg"][0] += 1e-6
    torch.save(checkpoint, run_dir / "checkpoint.pt")


@pytest.mark.parametrize("harm,words", [
    (add_a_point, "the curve losses/entropy differs"),
    (lambda run_dir: next(run_dir.glob("events.*")).unlink(), "differs"),
    (change_a_weight, "state of the checkpoint differs"),
    (change_a_moment, "state of the checkpoint differs"),
    (lambda run_dir: (run_dir / "summary.json").unlink(), "no summary.json"),
    (lambda run_dir: (run_dir / "checkpoint.tmp").touch(), "it left"),
])  # fmt: skip
def test_differences_are_noticed(harm, words, reference, tmp_path):
    shutil.copytree(reference.dir, tmp_path / "run")
    assert not differences(tmp_path / "run", reference.dir)
    harm(tmp_path / "run")
    assert words in differences(tmp_path / "run", reference.dir)


def test_an_interrupt_says_how_to_go_on(reference, tmp_path):
    status, err = struck(reference, tmp_path / "run", "update", "SIGTERM", random.Random(1))
    assert not last_words("ppo", status, err, 143)
    assert not names_checkpoint("ppo", err, tmp_path / "run")


def test_an_interrupt_without_a_word_is_noticed(reference, tmp_path, monkeypatch):
    broken(monkeypatch, tmp_path, "interrupted; {self.next_step()}", "interrupted")
    status, err = struck(reference, tmp_path / "run", "update", "SIGINT", random.Random(1))
    assert last_words("ppo", status, err, 143) and not last_words("ppo", status, err, 130)
    assert "no word on how to resume" in names_checkpoint("ppo", err, tmp_path / "run")


def disk(act, run_dir, phase="rollout", occurrence=300):
    """The disk part's check of one fault, in a forked process."""
    before = faults.functools.partial(sabotage.strike, phase, occurrence, act, run_dir)
    status, err = faults.finish(
        start("ppo", *faults.TINY["ppo"].split(), "--run-dir", run_dir, before=before)
    )
    return last_words("ppo", status, err, 1, "cannot write"), err


@pytest.mark.parametrize("act", ["no room for events", "directory removed", "file in its place"])
def test_what_cannot_be_written_is_a_line(act, tmp_path):
    problem, err = disk(act, tmp_path / "run")
    assert not problem and not names_checkpoint("ppo", err, tmp_path / "run")


def test_a_traceback_of_a_full_disk_is_noticed(tmp_path, monkeypatch):
    broken(monkeypatch, tmp_path, "sys.excepthook = self.crashed", "pass")
    problem, _ = disk("directory removed", tmp_path / "run")
    assert "its last words are" in problem


# --- Damaged checkpoints --------------------------------------------------------------------------


def damaged(script, checkpoint, work, number):
    """The damage part's figures for a number of files."""
    tally = Tally()
    faults.damage_files(script, checkpoint, tally, work, random.Random(2), number)
    return tally


def test_a_damaged_checkpoint_is_refused(reference, tmp_path):
    tally = damaged("ppo", reference.dir / "checkpoint.pt", tmp_path, 60)
    assert not tally.failed and tally.facts["refused"] > 60


def test_a_damaged_checkpoint_that_is_loaded_is_noticed(reference, tmp_path, monkeypatch):
    def trusting(path, *modules):
        checkpoint = torch.load(path, weights_only=False)
        for module, state in zip(modules, checkpoint["state"]):
            module.load_state_dict(state)
        return checkpoint

    checkpoint = reference.dir / "checkpoint.pt"
    modules = fresh_modules("ppo", str(checkpoint))
    monkeypatch.setattr(faults, "fresh_modules", lambda *_: modules)
    monkeypatch.setattr(importlib.import_module("ppo"), "load_checkpoint", trusting)
    failed = damaged("ppo", checkpoint, tmp_path, 60).failed
    for words in ("other content was loaded", "the code in it ran", "truncated: "):
        assert any(words in line for line in failed), words


# --- Environments, numbers, command lines ---------------------------------------------------------


@pytest.mark.parametrize("env", ["RaisesInStep", "WrongLastShape"])
def test_what_an_environment_did_is_said(env, tmp_path):
    status, words = faults.MAD[env]
    flags = [*faults.TINY["ppo"].split(), *faults.toy("ppo", env), "--run-dir", tmp_path / "run"]
    code, err = faults.finish(start("ppo", *flags))
    assert not faults.mad_end("ppo", code, err, status, words, tmp_path / "run")
    # The same end is noticed where its words, its last line or its status are not those expected.
    end = lambda code, err: faults.mad_end("ppo", code, err, status, words, tmp_path / "run")
    assert "does not say" in end(code, err.replace(words, "something"))
    assert "does not say" in end(code, err[: err.rindex("ppo.py: ")])
    assert "status 0" in end(0, err)


def test_a_parameter_that_is_not_finite_is_noticed(tmp_path, monkeypatch):
    def spoil(self, *args, **kwargs):
        with torch.no_grad():
            next(self.modules[0].parameters()).fill_(np.nan)
        finish(self, *args, **kwargs)

    module = importlib.import_module("ppo")
    finish = module.Run.finish
    flags = [*faults.toy("ppo", "Scaled"), *faults.SHORT.split(), "--run-dir"]
    assert attempt("ppo", [*flags, str(tmp_path / "good")], tmp_path / "good") == ("finished", "")
    monkeypatch.setattr(module.Run, "finish", spoil)
    _, problem = attempt("ppo", [*flags, str(tmp_path / "bad")], tmp_path / "bad")
    assert "not finite" in problem


def typed(script, number, work):
    tally = Tally()
    faults.flags(script, tally, work, random.Random(4), SimpleNamespace(cases=number))
    return tally


@pytest.mark.parametrize("script", ["ppo", "grpo_rloo"])
def test_command_lines_run_or_are_refused(script, tmp_path):
    tally = typed(script, 10, tmp_path)
    assert not tally.failed and tally.facts["finished"] and tally.facts["refused"]


def test_command_lines_that_crash_or_are_ignored_are_noticed(tmp_path, monkeypatch):
    module = importlib.import_module("ppo")
    parse_args = module.parse_args
    forgetful = lambda argv: dataclasses.replace(parse_args(argv), learning_rate=0.125, seed=77)
    with monkeypatch.context() as patch:
        patch.setattr(module, "parse_args", forgetful)
        assert any("became" in line for line in typed("ppo", 30, tmp_path / "ignored").failed)
    monkeypatch.setattr(module, "check_args", lambda args: 1 / 0)
    failed = typed("ppo", 5, tmp_path / "crash").failed
    assert any("ZeroDivisionError" in line for line in failed)
    monkeypatch.setattr(module, "check_args", lambda args: (tmp_path / "x").touch() or exit(2))
    assert any("last words" in line for line in typed("ppo", 5, tmp_path / "silent").failed)


# --- Leaks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("hook,words", [(sabotage.measure, ""), (sabotage.leak, "memory grows")])
def test_a_leak_is_noticed(hook, words, tmp_path):
    before = faults.functools.partial(hook, tmp_path / "run", tmp_path / "samples")
    line = f"{faults.LONG['a2c']} 2400 --run-dir {tmp_path / 'run'}"
    status, err = faults.finish(start("a2c", *line.split(), before=before))
    assert status == 0, err
    _, problem = faults.leaked(tmp_path / "samples", 300)
    assert problem.startswith(words) and bool(problem) == bool(words)


def test_open_files_and_processes_are_noticed(tmp_path):
    rows = [[10**8, 2, 9 + i // 100, 0] for i in range(1000)]
    (tmp_path / "samples").write_text("\n".join(map(json.dumps, rows)))
    assert "18 open files, not 10" in faults.leaked(tmp_path / "samples", 1000)[1]


# --- The campaign ---------------------------------------------------------------------------------


def test_the_table_counts_what_survived(tmp_path):
    killed = {"counts": {"rollout": [4, 5]}, "facts": {"kills": 6}}
    kills = {"ppo": killed, "a2c": killed}
    once = {"x": [1, 1]}
    leaks = {name: {"counts": once, "facts": {"bytes": n}} for name, n in (("ppo", 7), ("a2c", 9))}
    parts = {"kills": kills, "leaks": leaks}
    results = {"parts": parts, "what": faults.WORDS, "date": "", "machine": {"cpu": "", "cores": 2}}
    (tmp_path / "faults.json").write_text(json.dumps(results))
    lines = report.faults_section(tmp_path)
    assert lines[4].endswith("| 2 | 10 | 8 | kills: 12 |")
    assert lines[5].endswith("| 2 | 2 | 2 | bytes: at most 9 |")
    assert not report.faults_section(tmp_path / "elsewhere")
    for name, entry in kills.items():  # that each ran with a text of its own
        parts["kills"][name] = entry | {"text": code_hash(faults.ROOT / f"{name}.py")}
    parts["leaks"]["ppo"]["text"] = parts["kills"]["ppo"]["text"]
    parts["leaks"]["a2c"]["text"] = "another"
    (tmp_path / "faults.json").write_text(json.dumps(results))
    assert "changed since: a2c." in "\n".join(report.faults_section(tmp_path))


@pytest.mark.long
def test_the_campaign(tmp_path):
    assert faults.main(["--out", str(tmp_path / "faults.json")]) == 0  # one to two hours
