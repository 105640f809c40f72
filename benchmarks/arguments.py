"""The command line that all scripts share, and the device it names."""

import argparse
import re
from pathlib import Path

import torch


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
           data: bool = True, networks: bool = True,
           figures: bool = True) -> argparse.ArgumentParser:
    """Arguments common to all scripts; `presets[0]` and `seeds` are the defaults.

    A script that has no use for them leaves out --data (data False), --figures (figures False), or
    --amp, --compile and --workers (networks False). What embedded data has no use for, it adds to
    the group `real`; a Path that is given must exist. What only the script can refuse, it refuses
    after `parser.parse_args(argv)`, before `start` opens the folder.
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
    add("--resume", action="store_true", help="go on with the run in --out")
    p.set_defaults(figures=None, amp="none", compile=False, workers=0)
    if figures:
        add("--figures", type=Path, help="folder for pictures")
    if networks:
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
