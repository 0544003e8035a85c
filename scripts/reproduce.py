"""`hf-ddpm reproduce` as a file: `python scripts/reproduce.py` and `accelerate launch scripts/reproduce.py`."""

from hf_ddpm.cli import run

if __name__ == "__main__":
    run("reproduce")
