"""`hf-ddpm push` as a file: `python scripts/push_to_hub.py` and `accelerate launch scripts/push_to_hub.py`."""

from hf_ddpm.cli import run

if __name__ == "__main__":
    run("push")
