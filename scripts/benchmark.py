"""`python -m benchmarks` as a file: `python scripts/benchmark.py`."""

import sys
from pathlib import Path
from runpy import run_module

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    run_module("benchmarks", run_name="__main__")
