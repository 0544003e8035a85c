"""Pushes to the Hub beside a run that goes on, which neither waits for them nor fails with them."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_ddpm.hub.folder import model_files


class BackgroundPush:
    """Pushes a model's folder now and then.

    A push is a process, at work on a copy: threads of the client would keep a run that is told to end from ending. At
    most one goes on at a time; what is due meanwhile is left to the next `start`, or to `finish`.

    Args:
        repo_id: As of `push_model`.
        private: As of `push_model`.
        report: Told of each failure, in a line.
    """

    def __init__(self, repo_id: str, private: bool | None, report: Callable[[str], object]):
        self.repo_id = repo_id
        self.private = private
        self.report = report
        self._newest: tuple[Path, str] | None = None
        self._is_behind = False
        self._process: subprocess.Popen[bytes] | None = None
        self._said: Any = None
        self._copy: Path | None = None

    def start(self, folder: Path, message: str = "Upload the model") -> None:
        """Starts to push a folder as it is now, unless a push still goes on; returns when a copy is made."""
        self._newest, self._is_behind = (folder, message), True
        self._look_after()
        if self._process is None:
            self._launch(folder, message)

    def finish(self, time_limit: float = 300) -> bool:
        """Waits for what goes on, and pushes what has come since or has failed.

        Args:
            time_limit: Seconds; what is not done by then is given up.

        Returns:
            Whether the newest state is on the Hub.
        """
        end = time.monotonic() + time_limit
        self._wait(end)
        if self._is_behind and self._process is None and self._newest is not None:
            self._launch(*self._newest)
            self._wait(end)
        if self._process is not None:
            self.report(f"{self.repo_id} cannot be pushed to: it takes more than {time_limit:g} s")
        self.close()
        return not self._is_behind

    def close(self) -> None:
        """Gives up what goes on. A push is a single commit at its end: there or not."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process, self._is_behind = None, True
        self._remove_copy()

    def _launch(self, folder: Path, message: str) -> None:
        self._copy = folder / ".push"
        options = {"folder": str(self._copy), "repo_id": self.repo_id, "private": self.private, "message": message}
        try:
            shutil.rmtree(self._copy, ignore_errors=True)
            files = model_files(folder)
            # Not pushed, but read for what may be pushed: see public_content.
            records = [str(Path(file).with_name("export.json")) for file in files if file.endswith("model_index.json")]
            for file in [*files, *(record for record in records if (folder / record).exists())]:
                (self._copy / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(folder / file, self._copy / file)
            self._said = tempfile.TemporaryFile("w+", errors="replace")
            self._process = subprocess.Popen(
                [sys.executable, "-c", _PUSH, json.dumps({"path": sys.path, "options": options})],
                stdin=subprocess.DEVNULL,
                stdout=self._said,
                stderr=self._said,
                env={**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
            )
            self._is_behind = False
        except (OSError, ValueError) as error:
            self._remove_copy()
            self.report(str(error))

    def _wait(self, end: float) -> None:
        if self._process is not None:
            try:
                self._process.wait(max(0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                return
        self._look_after()

    def _look_after(self) -> None:
        """Forgets a push that has ended, and reports why it failed if it did."""
        if self._process is None or self._process.poll() is None:
            return
        code, self._process = self._process.returncode, None
        if code:
            self._is_behind = True
            self._said.seek(0)
            lines = self._said.read().strip().splitlines()
            self.report(lines[-1] if lines else f"{self.repo_id} cannot be pushed to: the process ended with {code}")
        self._remove_copy()

    def _remove_copy(self) -> None:
        if self._copy is not None:
            shutil.rmtree(self._copy, ignore_errors=True)
            self._copy = None


# What the process of a push runs; its last line is the error.
_PUSH = """
import json, sys
given = json.loads(sys.argv[1])
sys.path[:] = given["path"]
from hf_ddpm.hub.push import push_model
try:
    push_model(**given["options"])
except (OSError, ValueError) as error:
    sys.exit(str(error))
"""
