"""A line that says how far a loop is, how fast it goes and how long it will take."""

import os
import sys
import time


class ProgressLine:
    """`name 120/700  12.3/s  0:47 left  loss 1.2`: fresh on a terminal, else now and then."""

    def __init__(self, label: str, total: int | None, active: bool = True, first: int = 0):
        self.label, self.total, self.active, self.first = label, total, active, first
        self.began = self.shown = time.monotonic()
        self.terminal = sys.stderr.isatty()
        self.pause, self.done, self.values = (0.2 if self.terminal else 10.0), first, {}

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def update(self, done: int, values: dict | None = None) -> None:
        self.done, self.values = done, values or {}
        now = time.monotonic()
        if self.active and now - self.shown >= self.pause:
            self.shown = now
            self._show("\x1b[K" if self.terminal else "\n")

    def close(self) -> None:
        if self.active and self.done > self.first:
            self._show("\x1b[K\n" if self.terminal else "\n")
            self.active = False

    def _show(self, after: str) -> None:
        elapsed = time.monotonic() - self.began
        rate = (self.done - self.first) / max(elapsed, 1e-9)
        left = f"  {_clock((self.total - self.done) / rate)} left" if self.total and rate else ""
        count = f"{self.done}/{self.total}" if self.total else str(self.done)
        pace = f"{rate:.3g}/s" if rate < 1000 else f"{rate:.0f}/s"
        values = "  ".join(f"{key} {value:.4g}" for key, value in self.values.items()
                           if isinstance(value, (int, float)) and key != "step")
        line = f"{self.label} {count}  {pace}  {_clock(elapsed)}{left}  {values}"
        width = 160
        if self.terminal:                                     # one column stays free: no new line
            width = (os.get_terminal_size(sys.stderr.fileno()).columns or 80) - 1
        sys.stderr.write("\r" * self.terminal + line[:width].rstrip() + after)
        sys.stderr.flush()


def _clock(seconds: float) -> str:
    seconds = int(seconds)
    hours, rest = divmod(seconds, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"
