import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
for folder in (ROOT, ROOT / "benchmarks"):      # the tests run from a checkout, installed or not
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
