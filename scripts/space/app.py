"""`hf-ddpm demo` as a file: `python scripts/space/app.py`."""

from hf_ddpm.cli import run

if __name__ == "__main__":
    run("demo")
