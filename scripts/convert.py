"""`hf-ddpm convert` as a file: `python scripts/convert.py` and `accelerate launch scripts/convert.py`."""

from hf_ddpm.cli import run

if __name__ == "__main__":
    run("convert")
