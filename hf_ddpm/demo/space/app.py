"""A Space that shows a model: its variable MODEL_ID names it."""

from hf_ddpm.cli import run

if __name__ == "__main__":
    run("demo")
