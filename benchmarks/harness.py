"""What every benchmark script shares: arguments, device, torchrun, progress, checkpoints, results.

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
    <name>.jsonl                one line per step
    <name>-<step>.rank<r>.pt    the two newest snapshots, removed once <name> is recorded
    recorded.json               what is finished
    <script>.json               the results: figures, hardware, versions, seeds, command, wall time
Every file is written under a temporary name and renamed: a kill leaves the previous version.
"""

import argparse
import atexit
import json
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

from records import (RESULTS, ROOT, format_table, hardware, plain, read_json,  # noqa: F401
                     verdict, versions, write_atomically, write_json)

# Arguments that may differ between a run and its --resume without changing any number.
FREE_ARGUMENTS = {"resume", "out", "figures", "device", "workers", "record", "checkpoint_seconds"}


# ---------------------------------------------------------------- arguments and start

class _Parser(argparse.ArgumentParser):
    def error(self, message: str):                            # one line: --help shows the rest
        self.exit(2, f"{self.prog}: error: {message}\n")

    def parse_args(self, argv=None, namespace=None) -> argparse.Namespace:
        args = super().parse_args(argv, namespace)
        unused = [action.option_strings[0] for action in self.real._group_actions
                  if getattr(args, action.dest) != action.default]
        if unused and args.data is None:
            self.error(f"{', '.join(unused)}: only with --data")
        for action in self._actions:
            flag, given = "/".join(action.option_strings), getattr(args, action.dest, None)
            values = given if isinstance(given, (list, tuple)) else [given]
            if flag != "--seed" and any(isinstance(v, (int, float)) and not v >= 0 for v in values):
                self.error(f"{flag} must not be negative, not {given}")
            if action.choices and len(set(values)) < len(values):
                self.error(f"{flag} names one twice: {' '.join(map(str, values))}")
            for path in values if action.dest not in ("out", "figures") else ():
                if isinstance(path, Path) and not path.exists():
                    self.error(f"{flag} {path}: no such file or folder")
        if not re.fullmatch(r"[\w.+=-]*", args.record or ""):
            self.error(f"--record takes letters, digits and . + = - _, not {args.record!r}")
        return args


def count(text: str) -> int:
    """The type of arguments that count something: `add_argument("--epochs", type=count)`."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {text}")
    return int(text)


def parser(description: str, presets: tuple[str, ...] = ("default", "tiny"), seeds: int = 1,
           data: bool = True) -> argparse.ArgumentParser:
    """Arguments common to all scripts; `presets[0]` and `seeds` are the defaults.

    data False: the script has no use for a data set, and refuses --data. What embedded data has no
    use for, a script adds to the group `real`; a Path that is given must exist. What only the
    script can refuse, it refuses after `parser.parse_args(argv)`, before `start` opens the folder.
    """
    p = _Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    if data:
        add("--data", type=Path, help="folder of the real data set (default: embedded data)")
    add("--preset", choices=presets, default=presets[0])
    add("--device", help="cpu, cuda, cuda:1, mps, ... (default: the first accelerator, else cpu)")
    add("--seed", type=int, default=0, help="first seed")
    add("--seeds", type=count, default=seeds, help="number of seeds; --resume may add some")
    add("--out", type=Path, help="folder of logs, checkpoints and results (default: runs/<script>)")
    add("--figures", type=Path, help="folder for pictures")
    add("--resume", action="store_true", help="go on with the run in --out")
    add("--amp", choices=("none", "bf16", "fp16"), default="none", help="mixed precision")
    add("--compile", action="store_true", help="torch.compile the models")
    add("--workers", type=int, default=0, help="loader processes")
    add("--threads", type=int, default=0, help="CPU threads (0: torch's choice)")
    add("--checkpoint-seconds", type=float, default=60.0,
        help="time between checkpoints (0: every step)")
    add("--record", nargs="?", const="", metavar="SUFFIX",
        help="also write benchmarks/results/<script>[-SUFFIX].json")
    p.real = p.add_argument_group("with --data")
    return p


def start(arguments: argparse.ArgumentParser, argv: list[str] | None = None) -> "Run":
    """Parse, pick the device, join the process group under torchrun, open the output folder."""
    args = arguments.parse_args(argv)
    try:
        return Run(args, sys.argv[1:] if argv is None else argv)
    except OSError as error:
        arguments.error(f"cannot write the output folder: {error}; choose another with --out")
    except ValueError as error:
        arguments.error(str(error))


def pick_device(name: str | None, local_rank: int = 0) -> torch.device:
    if name is None:
        name = ("cuda" if torch.cuda.is_available()
                else "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device("cuda", local_rank) if name == "cuda" else torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name} is not usable here: {reason}") from None
    return device


def write_tensors(path: Path, value: dict) -> None:
    try:
        write_atomically(path, lambda file: torch.save(value, file))
    except RuntimeError as error:                             # how torch.save reports a full disk
        raise OSError(f"{path}: {str(error).splitlines()[0]}") from error


def read_tensors(path: Path) -> dict:
    """A checkpoint, on the CPU; ValueError for any other file."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:                                # of many types, if it is damaged
        raise ValueError(f"{path} is damaged or no checkpoint ({type(error).__name__})") from None


def load_weights(model: torch.nn.Module, path: Path, head: bool = True) -> torch.nn.Module:
    """A checkpoint of the model: a plain state dict or one under "model" or "state_dict".

    head=False: the last layer stays as it is.
    """
    try:
        state = read_tensors(path)
        for wrapper in ("model", "state_dict"):
            state = state.get(wrapper, state)
        state = {key.removeprefix("module."): value for key, value in state.items()}
        if not head:
            own = {key: value for key, value in model.state_dict().items() if key.startswith("fc.")}
            state = {key: v for key, v in state.items() if not key.startswith("fc.")} | own
        model.load_state_dict(state)
    except Exception as error:  # of many types, if the state is not a network's
        reason = f"{type(error).__name__}: {error}"
        raise SystemExit(f"checkpoint {path} does not fit this model: {reason}") from None
    return model


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
        self.began = time.monotonic()
        self._wall_before = 0.0
        self._recorded: dict[str, Any] = {}
        self._last: dict[str, dict] = {}
        self._interrupted = False
        if self.is_main:
            self._open_folder()
        self.barrier()
        sys.excepthook = self._explain
        if args.resume and (self.out / "recorded.json").exists():
            saved = read_json(self.out / "recorded.json")
            self._recorded, self._wall_before = saved["results"], saved["wall_seconds"]

    def _open_folder(self) -> None:
        if self.figures is not None:
            self.figures.mkdir(parents=True, exist_ok=True)
        settings = {k: plain(v) for k, v in vars(self.args).items() if k not in FREE_ARGUMENTS}
        description = self.out / "run.json"
        if self.args.resume:
            if not description.exists():
                raise ValueError(f"--resume: no run in {self.out}; start one without --resume, "
                                 "or name its folder with --out")
            before = read_json(description)
            changed = [f"--{key.replace('_', '-')} was {before.get(key)}, now {value}"
                       for key, value in settings.items() if before.get(key) != value
                       and not (key == "seeds" and value > before.get(key, value))]
            if changed:
                raise ValueError(
                    "--resume must repeat the run's own arguments, or have more --seeds: "
                    + "; ".join(changed))
            write_json(description, settings)
            return
        if self._unfinished():                                # keep it, out of the way
            number = next(n for n in range(1, 10000)
                          if not self.out.with_name(f"{self.out.name}.{n}").exists())
            aside = self.out.with_name(f"{self.out.name}.{number}")
            self.out.rename(aside)
            print(f"an unfinished run was in {self.out}; it is kept in {aside} "
                  "(--resume would have gone on with it)")
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / "recorded.json").unlink(missing_ok=True)
        write_json(description, settings)

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
        """Averages over all processes, weighted with each one's `count`; key "count" is summed."""
        if self.world_size == 1:
            return dict(metrics)
        names = sorted(metrics)
        sums = [metrics[name] * (1.0 if name == "count" else count) for name in names]
        sums = torch.tensor([*sums, count], dtype=torch.float64, device=self.device)
        *sums, total = self.sum(sums).tolist()
        return {name: value if name == "count" else value / total
                for name, value in zip(names, sums)}

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
        line = ProgressLine(label, total, self.is_main)
        for done, item in enumerate(items, 1):
            yield item
            line.update(done)
        line.close()

    # ------------------------------------------------------------ training

    def drive(self, name: str, steps: Iterator[dict], total: int | None = None) -> dict:
        """Run a training generator to its end; returns its last dict.

        Ctrl-C or SIGTERM lets the current step end, saves, prints the command that goes on, and
        exits with 130. A second Ctrl-C stops at once. Processes of one run look for the signal
        together, once a second.
        """
        _check_name(name)
        first = self._resumed_step(name)
        log = open(self.out / f"{name}.jsonl", "a+b") if self.is_main else None
        if log:
            log.truncate(_offset_of_line(log, first))         # later lines are written again
        line = ProgressLine(name, total, self.is_main, first)
        last, step, saved_at = self._last.pop(name, {}), first, time.monotonic()
        checked, checked_at, check_at = first, saved_at, first + 1
        try:
            with self._catch_signals():
                for last in steps:
                    step += 1
                    if log:
                        log.write(json.dumps(plain(last)).encode() + b"\n")
                        line.update(step, last)
                    if step < check_at:
                        continue
                    now = time.monotonic()
                    interrupted, due, rate = self._agree(
                        self._interrupted, now - saved_at >= self.args.checkpoint_seconds,
                        (step - checked) / max(now - checked_at, 1e-3))
                    checked, checked_at, check_at = step, now, step + 1
                    if self.world_size > 1 and self.args.checkpoint_seconds >= 1:
                        check_at = step + max(1, min(int(rate), 2 * (step - first)))
                    if due or interrupted:
                        if log:
                            log.flush()
                        self._save(name, step, steps.send("state"), last)
                        saved_at = time.monotonic()
                    if interrupted:
                        line.close()
                        self.log(f"stopped after step {step} of {name}; everything is saved. "
                                 f"To go on:\n  {self.resume_command()}")
                        self._leave(130)
                        sys.exit(130)
            if log:
                log.flush()
        except OSError as error:
            raise SystemExit(
                f"{name}: writing failed after step {step}: {error}. Snapshots in {self.out} are "
                f"whole; free space there and run\n  {self.resume_command()}") from error
        finally:
            with suppress(OSError):                           # a full disk was told above
                log and log.close()
        line.close()
        return last

    def resumed(self, name: str) -> dict | None:
        """The newest snapshot of `name` that all processes have; None for a fresh start."""
        step = self._resumed_step(name)
        if step == 0:
            return None
        path = self._snapshot(name, step)
        self.log(f"{name}: going on after step {step}")
        try:
            snapshot = read_tensors(path)
        except ValueError as error:
            raise ValueError(f"{error}; remove it, and --resume goes on from the snapshot before "
                             "it") from None
        self._last[name] = json.loads(snapshot.pop("last of drive", "{}"))
        return snapshot

    def _resumed_step(self, name: str) -> int:
        _check_name(name)
        if not self.args.resume:
            return 0
        steps = [set(self._snapshot_steps(name, rank)) for rank in range(self.world_size)]
        return max(set.intersection(*steps), default=0)

    def _snapshot(self, name: str, step: int) -> Path:
        return self.out / f"{name}-{step:08d}.rank{self.rank}.pt"

    def _snapshot_steps(self, name: str, rank: int) -> list[int]:
        pattern = re.compile(re.escape(name) + rf"-(\d{{8}})\.rank{rank}\.pt")
        return sorted(int(m[1]) for m in map(pattern.fullmatch, os.listdir(self.out)) if m)

    def _save(self, name: str, step: int, snapshot: dict, last: dict) -> None:
        snapshot = {**snapshot, "last of drive": json.dumps(last, default=plain)}
        write_tensors(self._snapshot(name, step), snapshot)
        self._write_recorded()
        self.barrier()                      # all ranks have the new one before an old one goes
        for old in self._snapshot_steps(name, self.rank)[:-2]:
            self._snapshot(name, old).unlink(missing_ok=True)

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

    def _explain(self, kind, error, trace):
        """Ctrl-C outside a training loop and bad input (ValueError, OSError) end in one line."""
        if issubclass(kind, KeyboardInterrupt):
            self.log(f"\nstopped. To go on from the last checkpoint:\n  {self.resume_command()}")
        elif issubclass(kind, (ValueError, OSError)) and not os.environ.get("TRACEBACK"):
            print(f"error: {error}\n(TRACEBACK=1 in the environment shows where)", file=sys.stderr,
                  flush=True)
        else:
            return sys.__excepthook__(kind, error, trace)
        os._exit(130 if issubclass(kind, KeyboardInterrupt) else 1)   # workers must not hold it

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
        for step in self._snapshot_steps(name, self.rank):
            self._snapshot(name, step).unlink(missing_ok=True)
        return self._recorded[name]

    def _write_recorded(self) -> None:
        if self.is_main:
            write_json(self.out / "recorded.json",
                       {"results": self._recorded, "wall_seconds": self._wall()})

    def save(self, name: str, value: dict) -> Path:
        """Keep tensors (trained weights, say) in the run's folder, atomically."""
        _check_name(name)
        path = self.out / f"{name}.pt"
        if self.is_main:
            write_tensors(path, value)
        return path

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
        if self.world_size > 1 and dist.is_initialized():
            # A thread of gloo may still hold Python objects, which it gives back under the GIL: the
            # interpreter's shutdown would abort it, and the end of a DistributedDataParallel that
            # owns the group would wait for it forever. So the group stays, and the process ends.
            group = dist.group.WORLD
            dist.destroy_process_group()
            atexit.register(_end_process, group, code)


# ---------------------------------------------------------------- small parts

def _end_process(group, code: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


class ProgressLine:
    """`name 120/700  12.3/s  0:47 left  loss 1.2`: fresh on a terminal, else now and then."""

    def __init__(self, label: str, total: int | None, active: bool = True, first: int = 0):
        self.label, self.total, self.active, self.first = label, total, active, first
        self.began = self.shown = time.monotonic()
        self.terminal = sys.stderr.isatty()
        self.pause, self.done, self.values = (0.2 if self.terminal else 10.0), first, {}

    def update(self, done: int, values: dict | None = None) -> None:
        self.done, self.values = done, values or {}
        now = time.monotonic()
        if self.active and now - self.shown >= self.pause:
            self.shown = now
            self._show("\r" if self.terminal else "", "\x1b[K" if self.terminal else "\n")

    def close(self) -> None:
        if self.active and self.done > self.first:
            self._show("\r" if self.terminal else "", "\x1b[K\n" if self.terminal else "\n")
            self.active = False

    def _show(self, before: str, after: str) -> None:
        elapsed = time.monotonic() - self.began
        rate = (self.done - self.first) / max(elapsed, 1e-9)
        left = f"  {_clock((self.total - self.done) / rate)} left" if self.total and rate else ""
        count = f"{self.done}/{self.total}" if self.total else str(self.done)
        values = "  ".join(f"{key} {value:.4g}" for key, value in self.values.items()
                           if isinstance(value, (int, float)) and key != "step")
        line = f"{before}{self.label} {count}  {rate:.3g}/s  {_clock(elapsed)}{left}  {values}"
        width = os.get_terminal_size(sys.stderr.fileno()).columns if self.terminal else 160
        sys.stderr.write(line[:width] + after)                # \r takes no column: one stays free
        sys.stderr.flush()


def _clock(seconds: float) -> str:
    seconds = int(seconds)
    hours, rest = divmod(seconds, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


def _check_name(name: str) -> None:
    if not re.fullmatch(r"[\w.+=-]+", name):
        raise ValueError(f"name must be made of letters, digits and . + = - _, not {name!r}")


def _offset_of_line(file, count: int) -> int:
    file.seek(0)
    for _ in range(count):
        if not file.readline():
            break
    return file.tell()
