"""The blocks that the scripts share, and how far neighbours are apart.

    python tests/sync_blocks.py                             what differs
    python tests/sync_blocks.py --fix NAME --from ppo.py    copy NAME from its owner to the others
    python tests/sync_blocks.py --diffs                     changed code lines between neighbours

A block is a top-level function or class, or a section of main() under a `# --- ` banner, which is
named by its banner, such as "1. Collect".
"""

import argparse
import ast
import difflib
import io
import re
import sys
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LADDER = ["reinforce", "a2c", "npg", "trpo", "ppo", "ppo_continuous"]  # grpo_rloo stands apart
# What a script is read against: PPO's text comes from A2C's, its idea from TRPO's.
PARENT = {"a2c": "reinforce", "npg": "a2c", "trpo": "npg", "ppo": "a2c", "ppo_continuous": "ppo"}
SCRIPTS = [name for name in [*LADDER, "grpo_rloo"] if (ROOT / f"{name}.py").exists()]
SECTION = re.compile(r"^    (?:    )?# --- (.+?) ---$")
PLUMBING = "# === Plumbing"

# Blocks that vary on purpose, each with the reason and the groups within which it does not.
PPO = {"ppo", "ppo_continuous"}
BOTH_SPACES = {"reinforce", "a2c", "npg", "trpo"}
KL_STEPS = {"npg", "trpo"}
ROLLOUTS = {"a2c", "npg", "trpo", *PPO}
VARY: dict[str, tuple[str, list[set[str]]]] = {
    "Args": ("every algorithm has its own hyperparameters", []),
    "Agent": ("the policy's head depends on the action space", [BOTH_SPACES]),
    "make_envs": ("each script says which action spaces it takes", [BOTH_SPACES - {"reinforce"}]),
    "estimate_advantages": ("Monte Carlo returns in reinforce, GAE elsewhere", [ROLLOUTS]),
    "policy_loss": ("the algorithm", [PPO, KL_STEPS]),
    "value_loss": ("PPO may clip it", [BOTH_SPACES, PPO]),
    "critic_loss": ("in npg and trpo most of an update's time", [KL_STEPS]),
    "fit_critic": ("in npg and trpo most of an update's time", [KL_STEPS]),
    "total_loss": ("the algorithm", [PPO]),
    "main": ("the algorithm", [PPO]),
    "Setup": ("flags, optimisers and what a checkpoint has besides", [PPO]),
    "1. Collect": ("whole episodes in reinforce, T steps elsewhere", [ROLLOUTS]),
    "2. Advantages": ("PPO keeps the log-probabilities that acted", [PPO]),
    "3. Update": ("the algorithm", [PPO]),
    "4. Log": ("what an update has to tell", [PPO]),
    "parse_args": ("grpo_rloo has presets and no videos", [set(LADDER)]),
    "Run": ("grpo_rloo counts completions and rewards, not steps and episodes", [set(LADDER)]),
}


def source(name: str) -> str:
    return (ROOT / f"{name}.py").read_text()


def blocks(text: str) -> dict[str, tuple[int, int]]:
    """Name -> (first line, line after the last), counted from 0."""
    lines = text.splitlines()
    found = {}
    for node in ast.parse(text).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1
            assert node.end_lineno is not None
            found[node.name] = (first, node.end_lineno)
            if node.name == "main":
                banners = [i for i in range(first, node.end_lineno) if SECTION.match(lines[i])]
                for start, end in zip(banners, [*banners[1:], node.end_lineno]):
                    match = SECTION.match(lines[start])
                    assert match
                    while not lines[end - 1].strip():
                        end -= 1
                    found[match.group(1)] = (start, end)
    return found


def block_text(text: str, name: str) -> str:
    first, end = blocks(text)[name]
    return "\n".join(text.splitlines()[first:end])


def plumbing(text: str) -> str:
    """Everything below the banner, which must be the same as a whole, not only block by block."""
    return text[text.index(PLUMBING) :]


def disagreements(texts: dict[str, str]) -> list[str]:
    """One line for each block that differs without leave, or has leave and does not use it."""
    problems = []
    holders: dict[str, list[str]] = {}
    for script, text in texts.items():
        for name in blocks(text):
            holders.setdefault(name, []).append(script)
    for name, scripts in holders.items():
        versions = {script: block_text(texts[script], name) for script in scripts}
        groups = VARY[name][1] if name in VARY else [set(scripts)]
        for group in groups:
            members = [script for script in scripts if script in group]
            if len({versions[script] for script in members}) > 1:
                problems.append(f"{name} differs between {', '.join(members)}")
        if len(set(versions.values())) == 1 and len(scripts) > 1 and name in VARY:
            problems.append(f"{name} may vary but is the same in {', '.join(scripts)}")
    family = [script for script in texts if script != "grpo_rloo"]
    if len({plumbing(texts[script]) for script in family}) > 1:
        problems.append(f"the plumbing differs between {', '.join(family)}")
    return problems


def code_lines(text: str) -> list[str]:
    """The lines above the plumbing without docstrings, comments, blank lines and Args."""
    text = text[: text.index(PLUMBING)]
    dropped = set()
    for node in ast.walk(ast.parse(text)):
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if is_text or (isinstance(node, ast.ClassDef) and node.name == "Args"):
            dropped |= set(range(node.lineno, (node.end_lineno or 0) + 1))
    lines = text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column].rstrip()
    return [line for i, line in enumerate(lines, 1) if i not in dropped and line.strip()]


def changed_lines(parent: str, child: str) -> int:
    """Added plus removed code lines, as diff -u counts them."""
    diff = difflib.unified_diff(code_lines(parent), code_lines(child), lineterm="", n=0)
    return sum(line[0] in "+-" for line in diff if not line.startswith(("+++", "---", "@@")))


def neighbours() -> list[tuple[str, str]]:
    """Each script with its parent, or with the parent's parent while that one is not there."""
    pairs = []
    for child in [name for name in LADDER if name in SCRIPTS]:
        parent = PARENT.get(child)
        while parent and parent not in SCRIPTS:
            parent = PARENT.get(parent)
        pairs += [(parent, child)] if parent else []
    return pairs


def fix(name: str, owner: str) -> None:
    block = block_text(source(owner), name)
    for script in SCRIPTS:
        text = source(script)
        if script == owner or name not in blocks(text):
            continue
        first, end = blocks(text)[name]
        lines = text.splitlines()
        new = "\n".join([*lines[:first], block, *lines[end:]]) + "\n"
        if new != text:
            (ROOT / f"{script}.py").write_text(new)
            print(f"{name}: {owner}.py -> {script}.py")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--fix", metavar="NAME", help="copy this block to all that have it")
    parser.add_argument("--from", dest="owner", metavar="FILE", help="the script that owns it")
    parser.add_argument("--diffs", action="store_true", help="count changed code lines")
    args = parser.parse_args()
    if bool(args.fix) != bool(args.owner):
        parser.error("--fix and --from go together")
    if args.fix:
        owner = Path(args.owner).stem
        if owner not in SCRIPTS or args.fix not in blocks(source(owner)):
            parser.error(f"there is no {args.fix} in {args.owner}")
        fix(args.fix, owner)
    if args.diffs:
        for parent, child in neighbours():
            print(f"{parent} -> {child}: {changed_lines(source(parent), source(child))}")
    problems = disagreements({name: source(name) for name in SCRIPTS})
    print("\n".join(problems) or f"{len(SCRIPTS)} scripts, every shared block agrees")
    sys.exit(bool(problems))
