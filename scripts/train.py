"""`hf-ddpm train` as a file: `python scripts/train.py` and `accelerate launch scripts/train.py`."""

from hf_ddpm.cli import run

if __name__ == "__main__":
    run("train")
