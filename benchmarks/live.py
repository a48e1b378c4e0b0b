"""What the user sees of a campaign: a table that is redrawn, or a line per change."""

import os
import re
import sys
import time
from pathlib import Path

PROGRESS = re.compile(
    r"(\d+) (?:steps|completions), +\d+%, (?:return|reward) (\S+), (\d+) (?:steps|completions)/s"
)


def last_progress(log: Path) -> tuple[int, str, str] | None:
    """Steps, return and steps per second of the last progress line of a run's stdout."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 2000))
            found = PROGRESS.findall(file.read().decode(errors="replace"))
    except OSError:
        return None
    return (int(found[-1][0]), found[-1][1], found[-1][2]) if found else None


def duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s"


class Live:
    def __init__(self, total_runs: int, todo_steps: int):
        self.total_runs, self.todo_steps = total_runs, todo_steps
        self.start, self.drawn, self.terminal = time.monotonic(), 0, sys.stdout.isatty()
        self.next_draw = 0.0

    def header(self, done: int, failed: int, running: int, steps: int) -> str:
        elapsed = time.monotonic() - self.start
        words = f"{done}/{self.total_runs} done, {running} running, {failed} failed"
        if 0 < steps < self.todo_steps:
            words += f", {duration(elapsed * (self.todo_steps / steps - 1))} left"
        return words

    def line(self, text: str) -> None:
        """Something has changed: above the table, or as a line of its own."""
        self.erase()
        print(text, flush=True)
        self.next_draw = 0.0

    def erase(self) -> None:
        if self.drawn:
            sys.stdout.write(f"\033[{self.drawn}F\033[J")
            self.drawn = 0

    def due(self) -> bool:
        """Whether the table is to be drawn: twice a second, on a terminal."""
        return self.terminal and time.monotonic() >= self.next_draw

    def draw(self, header: str, rows: list[tuple[str, int, Path]]) -> None:
        """Redraw the table of running jobs (name, steps in all, stdout)."""
        self.erase()
        width = os.get_terminal_size().columns - 1
        name_width = max([len(row[0]) for row in rows], default=0)
        lines = [header]
        for name, steps, log in rows:
            at, mean_return, sps = last_progress(log) or (0, "-", "-")
            status = f"{at / steps:4.0%}  return {mean_return:>8}  {sps:>6} steps/s"
            lines.append(f"  {name:<{name_width}}  {status}")
        sys.stdout.write("".join(line[:width] + "\n" for line in lines))
        sys.stdout.flush()
        self.drawn, self.next_draw = len(lines), time.monotonic() + 0.5
