import importlib
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"
for folder in (ROOT, BENCHMARKS):               # the tests run from a checkout, installed or not
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


@pytest.fixture(autouse=True)
def same_number_of_threads():
    """A script called with --threads leaves no other number to the next test: sums depend on it."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run_script(monkeypatch):
    """run_script(script, out folder, *arguments): the results, from a call of its main() here."""
    def call(script, out, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{script}.py"])
        monkeypatch.setattr(sys, "excepthook", sys.excepthook)          # the scripts set their own
        importlib.import_module(script).main(["--out", str(out), *map(str, arguments)])
        return json.loads((out / f"{script}.json").read_text())
    return call


@pytest.fixture
def kill_script():
    """kill_script(script, out folder, pattern, *arguments): run it, and kill it as soon as the
    folder holds a file of this pattern."""
    def call(script, out, pattern, *arguments):
        command = [sys.executable, BENCHMARKS / f"{script}.py", "--out", out, *arguments]
        process = subprocess.Popen([str(word) for word in command], stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL)
        while process.poll() is None and not list(out.glob(pattern)):
            time.sleep(0.005)
        process.kill()
        process.wait()
    return call
