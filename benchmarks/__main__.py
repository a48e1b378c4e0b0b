"""Command line: python -m benchmarks {run,report,compare,speed,...}."""

import argparse
import os
import shlex
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn

from benchmarks.engine import ENGINES
from benchmarks.results import RESULTS, directory_lock, ensure_random
from benchmarks.suites import ROOT, BenchmarkError, load_suite, make_jobs, select_tasks

# Commands that time the tasks of a suite: what they are for, what is repeated, and what that is.
TIMED = {
    "speed": ("time the scripts beside Stable-Baselines3, in pairs",
              "pairs", "of runs, interleaved"),
    "limit": ("time the scripts beside what their environments and networks need at least",
              "rounds", "in turns"),
    "threshold": ("seconds until script and peer have learned", "seeds", "K: seeds 1 to K"),
    "scaling": ("speed and learning with more environments and wider networks",
                "seeds", "K: seeds 1 to K"),
}
WORK = Path(__file__).resolve().parent / "work"


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise BenchmarkError(f"{message}; {self.prog} --help shows what there is")


def names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def positive(kind: type) -> Any:
    def parse(text: str) -> Any:
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"{text} is not above 0")
        return value

    parse.__name__ = kind.__name__  # argparse says "invalid int value" with it
    return parse


def make_parser() -> Parser:
    parser = Parser(prog="python -m benchmarks", description="Run, report and compare benchmarks.")
    commands = parser.add_subparsers(dest="command", required=True)

    run = commands.add_parser("run", help="run a suite; what its results file holds or an "
                                       "earlier call began is not run again")
    run.add_argument("suite", help="a file in benchmarks/suites/, or a path to a .toml file")
    run.add_argument("--jobs", type=positive(int), default=os.cpu_count(),
                     help="runs at a time, each on one thread; by default the number of cores")
    run.add_argument("--seeds", type=positive(int), help="K: seeds 1 to K; by default the suite's")
    run.add_argument("--only", type=names, default=[], help="scripts, comma-separated: ppo,a2c")
    run.add_argument("--env", type=names, default=[], help="environments, comma-separated")
    run.add_argument("--peer", choices=["sb3"], default="",
                     help="run Stable-Baselines3 in the scripts' place, same hyperparameters")
    run.add_argument("--engine", choices=sorted(ENGINES), default="local", help="where runs live")
    run.add_argument("--time-limit", type=positive(float), metavar="SECONDS",
                     help="of a run, which is then killed; by default 600 + steps / 100")
    run.add_argument("--work", type=Path, default=WORK, help="directory of the runs' own files")
    run.add_argument("--results", type=Path, help="directory of the results files")
    run.add_argument("--scripts", type=Path, default=ROOT,
                     help="directory of the scripts, such as another commit's checkout")

    report = commands.add_parser("report", help="pictures and tables from results files")
    report.add_argument("results", type=Path, nargs="?", default=RESULTS, help="their directory")
    report.add_argument("--readme", type=Path, help="file whose results section is rewritten")
    report.add_argument("--check", action="store_true",
                        help="write nothing; status 1 if the tables are not those of the results")

    compare = commands.add_parser("compare", help="say whether B is better than A")
    for side in ("a", "b"):
        compare.add_argument(side, help="results file or directory; FILE:LABEL takes one algorithm")

    for command, (words, repeats, meaning) in TIMED.items():
        timed = commands.add_parser(command, help=words)
        timed.add_argument("suite", nargs="?", default=command, help=f"by default {command}")
        timed.add_argument(f"--{repeats}", type=positive(int), default=5, dest="repeats",
                           help=meaning)
        timed.add_argument("--only", type=names, default=[], help="scripts, comma-separated: a2c")
        timed.add_argument("--env", type=names, default=[], help="environments, comma-separated")
        if command != "limit":  # which leaves no runs behind
            timed.add_argument("--work", type=Path, default=WORK, help="directory of the runs")
        timed.add_argument("--results", type=Path, default=RESULTS, help=f"where {command}.json is")
        timed.add_argument("--scripts", type=Path, default=ROOT, help="directory of the scripts")
        if command == "speed":
            timed.add_argument("--threads", type=positive(int), default=1, help="of each run")

    gpu = commands.add_parser("cuda", help="time the scripts on a GPU beside Stable-Baselines3")
    gpu.add_argument("suite", nargs="?", default="cuda", help="by default cuda")
    gpu.add_argument("--only", type=names, default=[], help="scripts, comma-separated: a2c")
    gpu.add_argument("--work", type=Path, default=WORK, help="directory of the runs")
    gpu.add_argument("--results", type=Path, default=RESULTS, help="where cuda.json is")
    gpu.add_argument("--scripts", type=Path, default=ROOT, help="directory of the scripts")

    tokens = commands.add_parser("tokens", help="time grpo_rloo with larger networks on a GPU")
    tokens.add_argument("--repeats", type=positive(int), default=5, help="timed calls of each kind")
    tokens.add_argument("--results", type=Path, default=RESULTS, help="where tokens.json is")

    sizes = commands.add_parser("step-sizes", help="plain ascent beside steps of a fixed length")
    sizes.add_argument("--jobs", type=positive(int), default=os.cpu_count(), help="runs at a time")
    sizes.add_argument("--seeds", type=positive(int), default=10, help="K: seeds 1 to K")
    sizes.add_argument("--work", type=Path, default=WORK, help="directory of the runs' own files")
    sizes.add_argument("--results", type=Path, default=RESULTS, help="directory of the results")
    sizes.add_argument("--scripts", type=Path, default=ROOT, help="directory of the scripts")

    sampling = commands.add_parser("sampling", help="time grpo_rloo's sampling with and without "
                                                    "its cache")
    sampling.add_argument("--pairs", type=positive(int), default=5, help="interleaved")
    sampling.add_argument("--results", type=Path, default=RESULTS, help="where sampling.json is")

    random = commands.add_parser("random", help="measure random play for the normalised scores")
    random.add_argument("env", nargs="+", help="environments")
    random.add_argument("--results", type=Path, default=RESULTS)
    return parser


def run(args: argparse.Namespace) -> int:
    from benchmarks.runner import Campaign

    suite = load_suite(args.suite)
    scripts, work = args.scripts.resolve(), args.work.resolve()
    tasks, skipped = select_tasks(suite, scripts, args.only, args.env, args.peer)
    for line in skipped:
        print(line)
    jobs = make_jobs(tasks, args.seeds or suite.seeds, scripts)
    results = args.results or (RESULTS if suite.publish else work / "results")
    try:
        with directory_lock(work, wait=False):
            engine = ENGINES[args.engine]()
            path = results.resolve() / f"{suite.name}.jsonl"
            campaign = Campaign(jobs, work, path, engine, args.jobs, args.time_limit)
            complete = campaign.run()
            envs = [job.task.env for job in jobs if job.task.script != "grpo_rloo"]
            ensure_random(results, envs)
    except BlockingIOError:
        raise BenchmarkError(
            f"another harness is running in {work}; wait for it, or give --work another directory"
        ) from None
    for failure in campaign.failures.values():
        print(f"missing: {failure}", file=sys.stderr)
    if complete:
        print(f"Results: {path}\nPictures and tables: python -m benchmarks report {results}")
    return 0 if complete else 1


def time_suite(args: argparse.Namespace) -> int:
    from benchmarks.limit import limit
    from benchmarks.scaling import scaling
    from benchmarks.speed import speed
    from benchmarks.threshold import threshold

    suite, scripts, results = load_suite(args.suite), args.scripts.resolve(), args.results.resolve()
    tasks, skipped = select_tasks(suite, scripts, args.only, args.env, "")
    print("".join(line + "\n" for line in skipped), end="")
    if args.command == "limit":
        limit(tasks, args.repeats, results, scripts)
        return 0
    where = args.work.resolve(), results, scripts
    if args.command == "speed":
        speed(tasks, args.repeats, args.threads, *where)
    else:
        {"threshold": threshold, "scaling": scaling}[args.command](tasks, args.repeats, *where)
    return 0


def interrupt(_number: int, _frame: Any) -> NoReturn:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not cut the stopping short
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def main(argv: list[str]) -> int:
    try:
        args = make_parser().parse_args(argv)
        if args.command == "run":
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, interrupt)
            return run(args)
        if args.command == "report":
            from benchmarks.report import report

            return report(args.results, args.readme, args.check)
        if args.command == "compare":
            from benchmarks.compare import compare

            print(compare(args.a, args.b))
            return 0
        if args.command in TIMED:
            signal.signal(signal.SIGTERM, interrupt)  # what it holds must not be left behind
            return time_suite(args)
        if args.command == "cuda":
            from benchmarks.cuda import cuda

            signal.signal(signal.SIGTERM, interrupt)
            tasks, _ = select_tasks(load_suite(args.suite), args.scripts, args.only, [], "")
            cuda(tasks, args.work.resolve(), args.results.resolve(), args.scripts.resolve())
            return 0
        if args.command == "tokens":
            from benchmarks.tokens import tokens

            tokens(args.results, args.repeats)
            return 0
        if args.command == "step-sizes":
            from benchmarks import step_sizes

            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, interrupt)
            return step_sizes.main(args.work, args.results, args.scripts, args.jobs, args.seeds)
        if args.command == "sampling":
            from benchmarks.sampling import sampling

            sampling(args.results, args.pairs)
            return 0
        ensure_random(args.results, args.env)
        return 0
    except BenchmarkError as error:
        print(f"benchmarks: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        again = f"python -m benchmarks {shlex.join(argv)}"
        print(f"benchmarks: interrupted; to go on: {again}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    try:
        status = main(sys.argv[1:])
        print(end="", flush=True)
    except BrokenPipeError:  # who was to read it has gone, such as head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    sys.exit(status)
