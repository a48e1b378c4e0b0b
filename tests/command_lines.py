"""Command lines for the fault campaign: flags of every field of a script's Args, sane and not."""

import dataclasses
import importlib
import json
import typing
from pathlib import Path
from typing import Any, Literal

import hypothesis
from hypothesis import strategies as st

# Small enough to run in a tenth of a second.
BASE = {
    "total_timesteps": "64", "eval_episodes": "1", "num_envs": "2", "num_steps": "8",
    "hidden_size": "8", "num_minibatches": "2", "update_epochs": "1", "value_epochs": "1",
    "env_id": "tests.envs:Short-v0", "sft_steps": "2", "num_prompts": "2", "group_size": "2",
    "width": "8", "num_layers": "1", "num_heads": "1",
}
WORDS = st.sampled_from(["", "two words", "-1", "--", "a/b", "../up", "é", "x" * 300, "[", "\n"])
TEXTS = {
    "exp_name": st.one_of(WORDS, st.text(st.characters(codec="ascii", exclude_characters="\0"))),
    "run_dir": st.sampled_from(["new", "new/below", "", ".", "/proc/run", "/dev/null", "x" * 300]),
    "resume": st.sampled_from(["", ".", "nowhere.pt", "/dev/null", "checkpoint.pt", "None"]),
    "evaluate": st.sampled_from(["", ".", "nowhere.pt", "/dev/null", "checkpoint.pt", "None"]),
    "task_file": st.sampled_from(["", ".", "nowhere", "/dev/null", "None"]),
    "env_id": st.sampled_from([
        "CartPole-v1", "Pendulum-v1", "CartPole", "CartPole-v9", "", ":", "a:b:c", "os:X-v0",
        "tests.envs:Noisy-v0", "tests.envs:Image-v0", "tests.envs:Bounded-v0", "../x", "x" * 300,
    ]),
    "env_kwargs": st.sampled_from([
        "{}", "", "null", "[]", "3", "{", '{"x":1}', '{"box":[[-1,1]]}', '{"render_mode":"mad"}',
        '{"max_episode_steps":5}', '{"": 1}', '[["box",[[0,1]]]]', '{"id":"x"}', '"words"',
    ]),
}
# Neither so large that a run of that size would be no fault but never end.
SANE_INTS, MAD_INTS = st.integers(1, 8), [0, -1, -(2**63), 2**31, 2**63, 10**30]
GARBAGE = st.sampled_from(["", "x", "1e3", "0x10", "1_000", "nan", "None", "1.5", "--seed", "½"])
FLOATS = st.one_of(st.floats(0, 1), st.floats(), st.sampled_from([0.0, 1e-30, 1e30, 1e300]))
COSTLY = ("compile", "capture_video")  # seconds each, and tested by themselves


@dataclasses.dataclass
class Line:
    argv: list[str]
    given: dict[str, str]  # field -> the value typed


def value(name: str, kind: Any) -> st.SearchStrategy[str]:
    kinds = typing.get_args(kind) if typing.get_origin(kind) is not Literal else (kind,)
    kind = next((x for x in kinds if x is not type(None)), kind)
    if name in TEXTS:
        return TEXTS[name]
    if typing.get_origin(kind) is Literal:
        return st.one_of(st.sampled_from(typing.get_args(kind)), GARBAGE)
    if kind is int:
        return st.one_of(SANE_INTS.map(str), st.sampled_from(MAD_INTS).map(str), GARBAGE)
    return st.one_of(FLOATS.map(repr), GARBAGE)


def command_lines(script: str, number: int, seed: int) -> list[Line]:
    """Of one to three fields each; every field about as often."""
    fields = {x.name: x.type for x in dataclasses.fields(importlib.import_module(script).Args)}
    lines: list[Line] = []

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=number, database=None, deadline=None, phases=[hypothesis.Phase.generate],
        suppress_health_check=[hypothesis.HealthCheck.too_slow],
    )
    @hypothesis.given(st.data())
    def collect(data: st.DataObject) -> None:
        names = st.lists(st.sampled_from(list(fields)), min_size=1, max_size=3, unique=True)
        chosen, given = data.draw(names), {}
        argv = [f"--{name.replace('_', '-')}={x}" for name, x in BASE.items() if name in fields]
        argv += ["--run-dir=run"] * ("run_dir" not in chosen)
        if script == "ppo_continuous":
            argv += ['--env-kwargs={"box":[[-1,2]]}']
        for name in chosen:
            flag = name.replace("_", "-")
            if fields[name] is bool:
                off = name in COSTLY or data.draw(st.booleans())
                argv.append(f"--no-{flag}" if off else f"--{flag}")
                given[name] = str(not off)
            else:
                given[name] = data.draw(value(name, fields[name]))
                argv.append(f"--{flag}={given[name]}")
        lines.append(Line(argv, given))

    collect()
    return lines


def ignored(line: Line, left: list[str]) -> str:
    """What was typed and is not among the arguments of the finished run."""
    (path,) = [x for name in left for x in Path(name).rglob("summary.json")] or [None]
    if path is None:
        return ""
    args = json.loads(path.read_text())["args"]
    for name, typed in line.given.items():
        got = args[name]
        same = typed == str(got) or (isinstance(got, int | float) and float(typed) == got)
        if not same and name != "run_dir":
            return f"{name} {typed!r} became {got!r}; typed: {line.argv}"
    return ""
