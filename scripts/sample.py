"""`hf-ddpm sample` as a file: `python scripts/sample.py` and `accelerate launch scripts/sample.py`."""

from hf_ddpm.cli import run

if __name__ == "__main__":
    run("sample")
