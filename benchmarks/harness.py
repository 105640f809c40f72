"""What every benchmark script shares: arguments, device, torchrun, log, checkpoints, results.

A script is a plain program that asks this file for help:

    import harness                              # first: makes reference and data_tools importable
    run = harness.start(harness.parser(__doc__))
    for seed in run.seeds:
        name = f"pit-seed{seed}"
        if (row := run.recorded(name)) is None:         # None: not finished before
            steps = pit.train(model, loader, resume=run.resumed(name))
            run.drive(name, steps, total=1000)          # progress, log, checkpoints, Ctrl-C
            row = run.record(name, pit.evaluate(model, val_loader))
    run.finish(rows=[{"claim": "top-1", "paper": 81.0, "this run": row["top1"], "holds": None}])

Training loops are generators that yield one flat dict of numbers per step. `steps.send("state")`
makes such a generator hand out a snapshot of everything that moves (tensors, numbers, strings,
lists, dicts), and the same function called with `resume=snapshot` goes on from there.

What a run leaves in its folder (`--out`, by default `runs/<script>`):
    run.json                    the arguments, to refuse a --resume that changes them
    run.lock                    locked while a run is at work: two would mix their snapshots
    <name>.jsonl                one line per step
    <name>-<step>.rank<r>.pt    the two newest snapshots, removed once <name> is recorded
    recorded.json               what is finished
    <script>.json               the results: figures, hardware, versions, seeds, command, wall time
All but the log is written under a temporary name and renamed: a kill leaves the previous version.
"""

import argparse
import atexit
import fcntl
import itertools
import json
import math
import os
import re
import shlex
import signal
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Iterable, Iterator

import torch
import torch.distributed as dist

from arguments import count, parser, pick_device  # noqa: F401
from checkpoints import Snapshots, load_weights, read_tensors, write_tensors  # noqa: F401
from progress import ProgressLine
from records import (RESULTS, ROOT, format_table, hardware, plain, read_json,  # noqa: F401
                     verdict, versions, write_json)

# Arguments that may differ between a run and its --resume: another device rounds differently, the
# others change no number.
FREE_ARGUMENTS = {"resume", "out", "figures", "device", "workers", "record", "checkpoint_seconds"}


def start(arguments: argparse.ArgumentParser, argv: list[str] | None = None) -> "Run":
    """Parse, pick the device, join the process group under torchrun, open the output folder."""
    args = arguments.parse_args(argv)
    try:
        return Run(args, sys.argv[1:] if argv is None else argv)
    except OSError as error:
        arguments.error(f"cannot write there: {error}; choose other folders by --out and --figures")
    except ValueError as error:
        arguments.error(str(error))


class Run:
    """One run of one script: its arguments, device, seeds, folders, rank and world size."""

    def __init__(self, args: argparse.Namespace, argv: list[str]):
        self.args, self.argv = args, list(argv)
        self.script = Path(sys.argv[0]).stem
        self.rank = int(os.environ.get("RANK", 0))
        self.world_size = int(os.environ.get("WORLD_SIZE", 1))
        self.is_main = self.rank == 0
        self.device = pick_device(args.device, int(os.environ.get("LOCAL_RANK", 0)))
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if args.threads:
            torch.set_num_threads(args.threads)
        if self.world_size > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        self.amp_dtype = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}[args.amp]
        self.seeds = list(range(args.seed, args.seed + args.seeds))
        self.out = args.out or Path("runs") / self.script
        self.figures = args.figures
        self.began, self._wall_before = time.monotonic(), 0.0
        self._recorded: dict[str, Any] = {}
        self._last: dict[str, dict] = {}
        self._interrupted = False
        self._snapshots = Snapshots(self.out, self.rank, self.world_size)
        if self.is_main:
            self._open_folder()
        self.barrier()
        sys.excepthook = self._explain
        if args.resume and (self.out / "recorded.json").exists():
            saved = read_json(self.out / "recorded.json")
            self._recorded, self._wall_before = saved["results"], saved["wall_seconds"]
            for name in self._recorded:                       # left by a kill just after `record`
                self._snapshots.keep(name, 0)

    def _open_folder(self) -> None:
        if self.figures is not None:
            self.figures.mkdir(parents=True, exist_ok=True)
        settings = {k: plain(v) for k, v in vars(self.args).items() if k not in FREE_ARGUMENTS}
        settings["nproc_per_node"] = self.world_size
        description = self.out / "run.json"
        if self.args.resume and not description.exists():
            raise ValueError(f"--resume: no run in {self.out}; start one without --resume, or name "
                             "its folder with --out")
        self._lock()
        if self.args.resume:
            before = {"nproc_per_node": 1, **read_json(description)}
            changed = [f"--{key.replace('_', '-')} was {before.get(key)}, now {value}"
                       for key, value in settings.items() if before.get(key) != value
                       and not (key == "seeds" and value > before.get(key, value))]
            if changed:
                raise ValueError(
                    "--resume must repeat the run's own arguments, or have more --seeds: "
                    + "; ".join(changed))
        else:
            if self._unfinished():                            # keep it, out of the way
                number = next(n for n in itertools.count(1)
                              if not self.out.with_name(f"{self.out.name}.{n}").exists())
                aside = self.out.with_name(f"{self.out.name}.{number}")
                self.out.rename(aside)
                print(f"an unfinished run was in {self.out}; it is kept in {aside} "
                      "(--resume would have gone on with it)")
                self._lock()
            (self.out / "recorded.json").unlink(missing_ok=True)
        for left in self.out.glob(".*.tmp"):                  # by a kill while it was written
            left.unlink()
        write_json(description, settings)

    def _lock(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        self._locked = open(self.out / "run.lock", "w")       # until the run or its process ends
        try:
            fcntl.lockf(self._locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise ValueError(f"another run is at work in {self.out}; name another folder with "
                             "--out") from None

    def _unfinished(self) -> bool:
        """Whether the folder holds snapshots, or records younger than any results."""
        written = {path.name: path.stat().st_mtime_ns for path in self.out.glob("*.json")}
        recorded, _ = written.pop("recorded.json", 0), written.pop("run.json", 0)
        return recorded > max(written.values(), default=0) or any(self.out.glob("*-*.rank*.pt"))

    # ------------------------------------------------------------ many processes

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """The sum of `value` over all processes (in place)."""
        if self.world_size > 1:
            dist.all_reduce(value)
        return value

    def mean(self, metrics: dict[str, float], count: float = 1.0) -> dict[str, float]:
        """Averages over all processes, weighted with each one's `count`; key "count" is summed.

        What a process with count 0 found, NaN say, does not matter."""
        if self.world_size == 1:
            return dict(metrics)
        weights = {name: 1.0 if name == "count" else count for name in sorted(metrics)}
        sums = [metrics[name] * weight if weight else 0.0 for name, weight in weights.items()]
        sums = torch.tensor([*sums, count], dtype=torch.float64, device=self.device)
        *sums, total = self.sum(sums).tolist()
        return {name: value if name == "count" else value / total if total else math.nan
                for name, value in zip(weights, sums)}

    def wrap(self, model: torch.nn.Module) -> torch.nn.Module:
        """The model on the run's device, compiled if asked, under torchrun in DDP."""
        model = model.to(self.device)
        if self.args.compile:
            model.compile()
        if self.world_size > 1:
            ids = [self.device.index] if self.device.type == "cuda" else None
            model = torch.nn.parallel.DistributedDataParallel(model, device_ids=ids)
        return model

    # ------------------------------------------------------------ talking

    def log(self, *text: Any) -> None:
        if self.is_main:
            print(*text, flush=True)

    def progress(self, items: Iterable, total: int | None = None, label: str = "") -> Iterator:
        """Iterate with a progress line (rate, time left)."""
        if total is None and hasattr(items, "__len__"):
            total = len(items)
        with ProgressLine(label, total, self.is_main) as line:
            for done, item in enumerate(items, 1):
                yield item
                line.update(done)

    # ------------------------------------------------------------ training

    def drive(self, name: str, steps: Iterator[dict], total: int | None = None) -> dict:
        """Run a training generator to its end; returns its last dict.

        Ctrl-C or SIGTERM lets the current step end, saves, prints the command that goes on, and
        exits with 130. A second Ctrl-C stops at once. Processes of one run look for the signal
        together, once a second.
        """
        step = first = self._first_step(name)
        last, look_at = self._last.pop(name, {}), first + 1
        began = saved_at = time.monotonic()
        with (self._log_file(name, first) as log, self._catch_signals(),
              ProgressLine(name, total, self.is_main, first) as line):
            for last in steps:
                step += 1
                with self._writing():
                    log.write(json.dumps(plain(last)).encode() + b"\n")
                line.update(step, last)
                if step < look_at:
                    continue
                now = time.monotonic()
                interrupted, due, rate = self._agree(
                    self._interrupted, now - saved_at >= self.args.checkpoint_seconds,
                    (step - first) / max(now - began, 1e-3))
                alone = self.world_size == 1 or self.args.checkpoint_seconds < 1
                look_at = step + (1 if alone else max(1, min(int(rate), 2 * (step - first))))
                if due or interrupted:
                    self._save(name, step, steps.send("state"), last)
                    saved_at = time.monotonic()
                if interrupted:
                    line.close()
                    self.log(f"stopped after step {step} of {name}; everything is saved. "
                             f"To go on:\n  {self.resume_command()}")
                    self._leave(130)
                    sys.exit(130)
        return last

    def resumed(self, name: str) -> dict | None:
        """The newest snapshot of `name` that all processes have; None for a fresh start."""
        step = self._first_step(name)
        if step == 0:
            return None
        self.log(f"{name}: going on after step {step}")
        snapshot = self._snapshots.read(name, step)
        self._last[name] = json.loads(snapshot.pop("last of drive", "{}"))
        return snapshot

    def _first_step(self, name: str) -> int:
        _check_name(name)
        return self._snapshots.newest(name) if self.args.resume else 0

    def _log_file(self, name: str, first: int):
        """The log of `name` after `first` lines: later ones are written again. Unbuffered."""
        path = self.out / f"{name}.jsonl" if self.is_main else Path(os.devnull)
        if self.is_main:
            with open(path, "a+b") as log:
                log.seek(0)
                log.truncate(sum(len(line) for line in itertools.islice(log, first)
                                 if line.endswith(b"\n")))
        return open(path, "ab", buffering=0)

    def _save(self, name: str, step: int, snapshot: dict, last: dict) -> None:
        snapshot = {**snapshot, "last of drive": json.dumps(last, default=plain)}
        with self._writing():
            self._snapshots.write(name, step, snapshot)
        self._write_recorded()
        self.barrier()                      # all ranks have the new one before an old one goes
        self._snapshots.keep(name, 2)

    def _agree(self, *votes: float) -> list[float]:
        """The largest vote of all processes: they stop, save and look again after the same step."""
        if self.world_size == 1:
            return list(votes)
        votes = torch.tensor(votes, dtype=torch.float32, device=self.device)
        dist.all_reduce(votes, dist.ReduceOp.MAX)
        return votes.tolist()

    @contextmanager
    def _catch_signals(self):
        def note(number, frame):
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True
        before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def _writing(self):
        """A full disk ends in one line that says how to go on; all that was written stays whole."""
        try:
            yield
        except OSError as error:
            raise OSError(f"writing to {self.out} failed: {error}; what is there is whole. When "
                          f"that is mended, go on with\n  {self.resume_command()}") from error

    def _explain(self, kind, error, trace):
        """Ctrl-C outside a training loop, bad input (ValueError, OSError) and a loss of NaN
        (FloatingPointError) end in one line."""
        if issubclass(kind, KeyboardInterrupt):
            self.log(f"\nstopped. To go on from the last checkpoint:\n  {self.resume_command()}")
        elif (issubclass(kind, (ValueError, OSError, FloatingPointError))
              and not os.environ.get("TRACEBACK")):
            print(f"error: {error}\n(TRACEBACK=1 in the environment shows where)", file=sys.stderr,
                  flush=True)
        else:
            return sys.__excepthook__(kind, error, trace)
        _end_process(130 if issubclass(kind, KeyboardInterrupt) else 1)   # whatever workers do

    def resume_command(self) -> str:
        extra = [] if "--resume" in self.argv else ["--resume"]
        return self._command_line(sys.argv[0], *self.argv, *extra)

    def _command_line(self, *words: str) -> str:
        several = self.world_size > 1
        launcher = ["torchrun", f"--nproc_per_node={self.world_size}"] if several else ["python"]
        return shlex.join([*launcher, *words])

    # ------------------------------------------------------------ results

    def recorded(self, name: str) -> Any | None:
        """What `record` kept under this name before an interruption (None: not finished)."""
        return self._recorded.get(name)

    def record(self, name: str, value: Any) -> Any:
        """Keep a finished part's figures: a resumed run skips it, the results file holds it."""
        _check_name(name)
        self._recorded[name] = plain(value)
        self._write_recorded()
        self.barrier()
        self._snapshots.keep(name, 0)
        return self._recorded[name]

    def _write_recorded(self) -> None:
        if self.is_main:
            with self._writing():
                write_json(self.out / "recorded.json",
                           {"results": self._recorded, "wall_seconds": self._wall()})

    def save(self, name: str, value: dict) -> None:
        """Keep tensors (trained weights, say) in the run's folder, atomically."""
        _check_name(name)
        if self.is_main:
            with self._writing():
                write_tensors(self.out / f"{name}.pt", value)

    def saved(self, name: str) -> dict:
        """What `save` kept under this name, on the CPU."""
        return read_tensors(self.out / f"{name}.pt")

    def finish(self, rows: list[dict], tables: dict[str, list[dict]] | None = None,
               **more: Any) -> dict:
        """Print the tables, last the claims (paper / this run / holds?), and write the results."""
        script = f"benchmarks/{self.script}.py"
        words = [re.sub(r"(^|=)/.*/(?=.)", r"\1", word) for word in self.argv]  # no machine folders
        results = {"script": script, "command": self._command_line(script, *words),
                   "seed": self.seeds[0], "seeds": self.seeds, "date": time.strftime("%Y-%m-%d"),
                   "wall_seconds": round(self._wall(), 1), "hardware": hardware(self.device),
                   "versions": versions(), "claims": rows, "tables": tables or {},
                   "results": self._recorded, **more}
        if self.is_main:                                      # files first: printing can fail
            with self._writing():
                write_json(self.out / f"{self.script}.json", results)
            if self.args.record is not None:
                suffix = f"-{self.args.record}" if self.args.record else ""
                RESULTS.mkdir(exist_ok=True)
                write_json(RESULTS / f"{self.script}{suffix}.json", results)
            for title, table in (tables or {}).items():
                print(f"\n{title}\n{format_table(table)}")
            claims = [{**row, "holds": verdict(row.get("holds"))} for row in rows]
            print(f"\n{format_table(claims)}", flush=True)
        self._leave()
        return results

    def _wall(self) -> float:
        return self._wall_before + time.monotonic() - self.began

    def _leave(self, code: int = 0) -> None:
        if self.is_main:
            self._locked.close()
        if self.world_size > 1 and dist.is_initialized():
            # A thread of gloo may still hold Python objects, which it gives back under the GIL: the
            # interpreter's shutdown would abort it, and the end of a DistributedDataParallel that
            # owns the group would wait for it forever. So the group stays, and the process ends.
            group = dist.group.WORLD
            dist.destroy_process_group()
            atexit.register(_end_process, code, group)


def _end_process(code: int, group=None) -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):                               # a closed pipe
            stream.flush()
    os._exit(code)


def _check_name(name: str) -> None:
    if not re.fullmatch(r"[\w.+=-]+", name):
        raise ValueError(f"name must be made of letters, digits and . + = - _, not {name!r}")
