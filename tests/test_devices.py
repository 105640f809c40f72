"""The methods on a device that is not the CPU: on one made of the CPU, and on a GPU where there
is one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils import backend_registration


@pytest.mark.skipif(not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
                    reason="this torch has no backends in Python")
def test_every_method_on_a_second_device():
    run_cases()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_every_method_on_a_gpu():
    run_cases(DEVICE="cuda")


def run_cases(**environment):
    cases = Path(__file__).parent / "device_cases.py"
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", cases],
                          capture_output=True, text=True, cwd=cases.parent.parent,
                          env={**os.environ, **environment})
    assert done.returncode == 0, done.stdout[-6000:]
