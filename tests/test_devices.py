"""The methods on a device that is not the CPU, on machines without one."""

import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import backend_registration


@pytest.mark.skipif(not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
                    reason="this torch has no backends in Python")
def test_every_method_on_a_second_device():
    cases = Path(__file__).parent / "device_cases.py"
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", cases],
                          capture_output=True, text=True, cwd=cases.parent.parent)
    assert done.returncode == 0, done.stdout[-6000:]
