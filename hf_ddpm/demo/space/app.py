"""A Space that shows a model: its variable MODEL_ID names it."""

import sys
import tempfile
from pathlib import Path
from zipfile import ZipFile

# The build of a Space installs requirements.txt and sees no other file: the wheel is unpacked at the start.
for wheel in Path(__file__).parent.glob("hf_ddpm-*.whl"):
    sys.path.insert(0, tempfile.mkdtemp())
    ZipFile(wheel).extractall(sys.path[0])

from hf_ddpm.cli import run  # noqa: E402

if __name__ == "__main__":
    run("demo")
