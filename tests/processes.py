"""A script in a process of its own, forked from one that has the libraries imported already: what a
start from the shell does, without the seconds that the imports take each time."""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONTEXT = multiprocessing.get_context("forkserver")
LIBRARIES = ["gymnasium", "numpy", "torch", "torch.utils.tensorboard", "tqdm", "tyro"]
CONTEXT.set_forkserver_preload(LIBRARIES)


def _become(
    path: str,
    flags: list[str],
    cwd: str,
    env: dict[str, str],
    files: list[str],
    before: Callable[[], None] | None,
) -> None:
    """In the new process: take on the streams, directory, environment and arguments, then run."""
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = [path, *flags]
    sys.path.insert(0, str(Path(path).parent))
    if before:
        before()
    try:
        runpy.run_path(path, run_name="__main__")
    except Exception as error:  # which multiprocessing would print in its own way
        sys.excepthook(type(error), error, error.__traceback__)
        sys.exit(1)


class Child:
    """As much of subprocess.Popen as the tests use."""

    def __init__(self, path: Path, flags: list[str], cwd: Path, env: dict[str, str], before=None):
        make = lambda: tempfile.NamedTemporaryFile("r")  # noqa: SIM115 (read in communicate)
        self.files = [make(), make()]
        names = [file.name for file in self.files]
        arguments = (str(path), flags, str(cwd), dict(env), names, before)
        self.process = CONTEXT.Process(target=_become, args=arguments, daemon=True)
        self.process.start()
        assert self.process.pid
        self.pid = self.process.pid

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, timeout: float | None = None) -> int | None:
        self.process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        out, err = (file.read() for file in self.files)
        return out, err


def start(
    script: str,
    *flags,
    cwd: Path = ROOT,
    env: dict[str, str] | None = None,
    before: Callable[[], None] | None = None,
) -> Child:
    """before is called in the new process first; it must be picklable."""
    environment = dict(os.environ if env is None else env)
    return Child(ROOT / f"{script}.py", [str(x) for x in flags], cwd, environment, before)


def run(script: str, *flags, status: int = 0, **kwargs) -> tuple[str, str]:
    """Run to the end; the exit status must be as expected. Returns (stdout, stderr)."""
    process = start(script, *flags, **kwargs)
    try:
        out, err = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        raise
    assert process.returncode == status, f"status {process.returncode}\n{out}\n{err}"
    return out, err


def wait_for(condition, process: Child, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)
