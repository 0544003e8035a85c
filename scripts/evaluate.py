"""`hf-ddpm evaluate` as a file: `python scripts/evaluate.py` and `accelerate launch scripts/evaluate.py`."""

from hf_ddpm.cli import run

if __name__ == "__main__":
    run("evaluate")
