"""Entry point of a Space; its variable MODEL_ID selects the model."""

import sys
import tempfile
from pathlib import Path
from zipfile import ZipFile

# Unpack the wheel at startup: the build of a Space cannot install it, since it only has access to requirements.txt.
for wheel in Path(__file__).parent.glob("hf_ddpm-*.whl"):
    sys.path.insert(0, tempfile.mkdtemp())
    ZipFile(wheel).extractall(sys.path[0])

from hf_ddpm.cli import run  # noqa: E402

if __name__ == "__main__":
    run("demo")
