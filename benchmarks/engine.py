"""Where runs live: a narrow interface, and its one implementation, processes of this machine."""

import contextlib
import fcntl
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Protocol


class Handle(Protocol):
    """A run that was started."""

    def poll(self) -> int | None:
        """Exit status, minus the signal's number if one killed it; None while it runs."""
        ...

    def stop(self, number: signal.Signals) -> None:
        """Send a signal to the run and all that it started."""
        ...


class Engine(Protocol):
    """To put a cluster behind the harness, write these two and name them in ENGINES."""

    def submit(self, command: list[str], environ: dict[str, str], directory: Path) -> Handle:
        """Run a command in a directory, appending to stdout.txt and stderr.txt there."""
        ...

    def end_leftover(self, directory: Path) -> bool:
        """End what a harness that was killed left running there; False if that did not work."""
        ...


class LocalHandle:
    def __init__(self, process: subprocess.Popen, lock: int):
        self.process, self.lock = process, lock

    def poll(self) -> int | None:
        status = self.process.poll()
        if status is not None and self.lock >= 0:
            os.close(self.lock)
            self.lock = -1
        return status

    def stop(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


class LocalEngine:
    """Processes in sessions of their own, so that Ctrl-C reaches the harness alone.

    A run inherits a lock on its directory and holds it until it ends, also when the harness was
    killed: a second harness then finds the run alive, and ends it before it resumes it.
    """

    def submit(self, command: list[str], environ: dict[str, str], directory: Path) -> LocalHandle:
        lock = os.open(directory, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        pid_file = directory / "pid"
        pid_file.unlink(missing_ok=True)
        out_path, err_path = directory / "stdout.txt", directory / "stderr.txt"
        with open(out_path, "ab") as out, open(err_path, "ab") as err:
            process = subprocess.Popen(
                command, env=environ, cwd=directory, stdin=subprocess.DEVNULL, stdout=out,
                stderr=err, start_new_session=True, pass_fds=[lock],
            )
        pid_file.write_text(str(process.pid))
        return LocalHandle(process, lock)

    def end_leftover(self, directory: Path) -> bool:
        lock = os.open(directory, os.O_RDONLY)
        try:
            for _ in range(100):
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return True
                except BlockingIOError:
                    # The lock is held, so the process that wrote this number is still alive.
                    with contextlib.suppress(OSError, ValueError):
                        os.killpg(int((directory / "pid").read_text()), signal.SIGKILL)
                    time.sleep(0.1)
            return False
        finally:
            os.close(lock)


ENGINES = {"local": LocalEngine}
