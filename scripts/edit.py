"""`hf-ddpm edit` as a file: `python scripts/edit.py` and `accelerate launch scripts/edit.py`."""

from hf_ddpm.cli import run

if __name__ == "__main__":
    run("edit")
