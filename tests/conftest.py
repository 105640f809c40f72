import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
for folder in (ROOT, ROOT / "benchmarks"):      # the tests run from a checkout, installed or not
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


@pytest.fixture(autouse=True)
def same_number_of_threads():
    """A script called with --threads leaves no other number to the next test: sums depend on it."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
