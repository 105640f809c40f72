"""What a run records and how it is shown: JSON of tensors, Markdown tables, hardware, versions."""

import json
import math
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:                                 # reference and data_tools
    sys.path.insert(0, str(ROOT))

from data_tools.files import write_whole as write_atomically   # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"


def write_json(path: Path, value: Any) -> None:
    text = json.dumps(plain(value), indent=1, ensure_ascii=False) + "\n"
    write_atomically(path, text.encode())


def read_json(path: Path) -> dict:
    """The object that `write_json` left; ValueError for any other file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} is damaged: no object but {value!r:.60}")
    return value


def plain(value: Any) -> Any:
    """Tensors, numpy values and paths as what JSON knows; infinities and NaN as None."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (torch.Tensor, np.ndarray, np.generic)):
        return plain(value.tolist())
    if isinstance(value, Path):
        return value.name
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def format_table(rows: list[dict]) -> str:
    """A GitHub table of dicts with the same keys; floats with four significant digits."""
    if not rows:
        return "(no rows)"
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_cell(row.get(column)) for column in columns] for row in rows]
    cells.insert(0, list(map(_cell, columns)))
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = ["| " + " | ".join(text.ljust(width) for text, width in zip(line, widths)) + " |"
             for line in cells]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def hardware(device: torch.device) -> dict:
    names = re.findall(r"model name\s*:\s*(.+)", _read("/proc/cpuinfo"))
    memory = re.search(r"MemTotal:\s*(\d+)", _read("/proc/meminfo"))
    return {"device": str(device), "cpu": names[0] if names else platform.processor(),
            "cores": os.cpu_count(), "threads": torch.get_num_threads(),
            "memory_gib": round(int(memory[1]) / 2**20) if memory else None,
            "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None}


def versions() -> dict:
    try:
        commit = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"],
                                capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    return {"python": platform.python_version(), "torch": torch.__version__,
            "numpy": np.__version__, "pillow": PIL.__version__, "commit": commit}


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, (torch.Tensor, np.generic)):
        value = value.tolist()
    return f"{value:.4g}" if isinstance(value, float) else " ".join(
        str(value).replace("|", "\\|").splitlines())


def verdict(holds: bool | None) -> str:
    return "not asserted" if holds is None else "yes" if holds else "NO"


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
