"""Copying between the scripts is deliberate; here the copies stay equal and the files small."""

import ast
import io
import re
import sys
import tokenize

import pytest

from tests import sync_blocks
from tests.sync_blocks import LADDER, PLUMBING, ROOT, SCRIPTS, blocks, disagreements, source

# Changed code lines between neighbours, as `sync_blocks.py --diffs` counts them. May only fall.
# The design wished for at most 90 from a2c to ppo. 27 of these 140 are a2c's choice between two
# kinds of action, 18 its RMSprop; PPO's KL penalty, its adaptation and the recomputed advantages
# take 20.
DIFF_BUDGET = {
    ("reinforce", "a2c"): 203,
    ("a2c", "npg"): 157,
    ("npg", "trpo"): 17,
    ("a2c", "ppo"): 140,
    ("ppo", "ppo_continuous"): 40,
}

# Lines above the plumbing's banner, and in all; the design wished for 400 and 560. ppo_continuous
# has a squashed density more than the others, reinforce three baselines and five step rules; what
# the design asks of the plumbing (exact resume, whole files, clear refusals and last words,
# evaluation, video) takes 400 by itself.
MOST_LINES = {name: (405, 812) for name in LADDER} | {"grpo_rloo": (590, 896)}
MOST_LINES["ppo_continuous"] = (420, 827)
MOST_LINES["reinforce"] = (450, 857)
MOST_LINES["npg"] = (478, 885)  # three ways to invert the Fisher matrix
MOST_LINES["trpo"] = (502, 909)


def test_shared_blocks_are_identical():
    assert not disagreements({name: source(name) for name in SCRIPTS})


def test_every_diff_is_within_its_budget():
    assert set(DIFF_BUDGET) == set(sync_blocks.neighbours())
    for (parent, child), budget in DIFF_BUDGET.items():
        assert sync_blocks.changed_lines(source(parent), source(child)) <= budget


def test_the_readme_counts_the_changed_lines():
    readme = (ROOT / "README.md").read_text().splitlines()
    for parent, child in sync_blocks.neighbours():
        row = next(line for line in readme if f"]({child}.py)" in line)
        changed = sync_blocks.changed_lines(source(parent), source(child))
        assert row.split("|")[4].strip() == str(changed)


@pytest.mark.parametrize("name", SCRIPTS)
def test_line_counts_and_share_of_comments(name):
    text = source(name)
    lines = text.splitlines()
    above = next(i for i, line in enumerate(lines) if line.startswith(PLUMBING))
    assert above <= MOST_LINES[name][0] and len(lines) <= MOST_LINES[name][1]
    assert max(len(line) for line in lines) <= 100
    words = {i for i, line in enumerate(lines, 1) if line.lstrip().startswith("#")}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            words |= set(range(node.lineno, (node.end_lineno or 0) + 1))
    written = {i for i, line in enumerate(lines, 1) if line.strip()}
    assert 0.20 <= len(words & written) / len(written) <= 0.35


@pytest.mark.parametrize("name", SCRIPTS)
def test_dependencies_in_the_header_are_those_of_requirements(name):
    """PEP 723: a copied-out file says what it needs, with the project's pins."""
    requirements = (ROOT / "requirements.txt").read_text().splitlines()
    pins = {line.split("==")[0].split("[")[0]: line for line in requirements if "==" in line}
    header = re.search(r"(?m)^# /// script\n((?:#.*\n)+?)# ///$", source(name))
    assert header
    dependencies = re.findall(r'"(.+?)",', header.group(1))
    assert 'requires-python = ">=3.11,<3.14"' in header.group(1) and dependencies
    for dependency in dependencies:
        base, _, version = dependency.partition("==")
        package, _, extras = base.rstrip("]").partition("[")
        assert version == pins[package].partition("==")[2]
        assert set(filter(None, extras.split(","))) <= set(re.split(r"[\[\],]", pins[package]))
    nodes = list(ast.walk(ast.parse(source(name))))
    names = [alias.name for x in nodes if isinstance(x, ast.Import) for alias in x.names]
    names += [x.module or "" for x in nodes if isinstance(x, ast.ImportFrom)]
    modules = {name.split(".")[0] for name in names}
    third_party = modules - set(sys.stdlib_module_names) | {"tensorboard"}  # which torch wraps
    assert third_party <= {d.split("==")[0].split("[")[0] for d in dependencies}
    assert not modules & {*LADDER, "grpo_rloo"}, "a script imports no sibling"


@pytest.mark.parametrize("name", SCRIPTS)
def test_no_identifier_has_an_algorithm_in_its_name(name):
    tokens = tokenize.generate_tokens(io.StringIO(source(name)).readline)
    identifiers = {token.string for token in tokens if token.type == tokenize.NAME}
    algorithms = r"(^|_)(ppo|trpo|npg|a2c|reinforce|grpo|rloo)(_|$)"
    assert not [i for i in identifiers if re.search(algorithms, i, re.I)]


# --- The checks can fail --------------------------------------------------------------------------


def test_a_changed_block_is_noticed_and_fixed(tmp_path, monkeypatch):
    text = source("ppo")
    changed = text.replace("decay = gamma * gae_lambda * ~dones", "decay = gamma * gae_lambda")
    assert changed != text
    same = disagreements({"ppo": text, "a2c": text})
    assert "make_envs may vary but is the same in ppo, a2c" in same
    more = set(disagreements({"ppo": text, "a2c": changed})) - set(same)
    assert more == {"compute_gae differs between ppo, a2c"}
    collect = text.replace("next_obs[t] = current_obs\n", "next_obs[t] = obs[t]\n")
    assert "1. Collect differs between ppo, a2c" in disagreements({"ppo": text, "a2c": collect})
    late = text.replace("def save(self", "def keep(self")
    assert "the plumbing differs between ppo, a2c" in disagreements({"ppo": text, "a2c": late})
    monkeypatch.setattr(sync_blocks, "ROOT", tmp_path)
    monkeypatch.setattr(sync_blocks, "SCRIPTS", ["a2c", "ppo"])
    (tmp_path / "ppo.py").write_text(text)
    (tmp_path / "a2c.py").write_text(changed)
    sync_blocks.fix("compute_gae", "ppo")
    assert (tmp_path / "a2c.py").read_text() == (tmp_path / "ppo.py").read_text() == text


def test_changed_lines_count_code_alone():
    text = source("ppo")
    commented = text.replace("import json\n", "import json  # words\n\n\n# more words\n")
    assert sync_blocks.changed_lines(text, commented) == 0
    edited = text.replace("return 0.5 * error.mean()", "return error.mean()")
    assert sync_blocks.changed_lines(text, edited) == 2
    assert {"1. Collect", "2. Advantages", "3. Update", "4. Log", "Setup"} <= set(blocks(text))
