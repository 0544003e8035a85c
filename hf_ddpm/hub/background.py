"""Pushes to the Hub during training."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from hf_ddpm.hub.push import model_files, push_model


class BackgroundPush:
    """Pushes a model's folder while training continues.

    One push runs at a time, from a copy of the folder. States that become due meanwhile are skipped; the newest is
    pushed by the next `start` or by `finish`. Each push is a separate process. A thread, as in `HfApi.run_as_future`,
    would keep a stopped run alive while the Hub does not respond, since Python waits for threads at exit.

    Args:
        folder: The folder.
        repo_id: `namespace/name`.
        private: Make the repository private (default: unchanged, or the account's default for a new one).
        report: Called with one line for each failure.
    """

    def __init__(self, folder: Path, repo_id: str, private: bool | None, report: Callable[[str], object]):
        self.folder, self.repo_id, self.private, self.report = folder, repo_id, private, report
        self._copy = folder / ".push"
        self._message: str | None = None  # of the newest state
        self._is_behind = False
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, message: str = "Upload the model") -> None:
        """Start a push of the folder's current state unless one is running; return as soon as the copy is made."""
        self._message, self._is_behind = message, True
        self._collect(time_limit=0)
        self._launch()

    def finish(self, time_limit: float = 300) -> bool:
        """Wait for the running push, and push once more if a newer state is due or the push failed.

        Args:
            time_limit: Seconds to wait in total.

        Returns:
            True if the newest state is on the Hub.
        """
        end = time.monotonic() + time_limit
        self._collect(time_limit)
        self._launch()
        self._collect(end - time.monotonic())
        if self._process is not None:
            self.report(f"cannot push to {self.repo_id}: not finished after {time_limit:g} s")
        self.close()
        return not self._is_behind

    def close(self) -> None:
        """Stop the running push; since a push is one commit, the Hub has all of it or nothing."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process, self._is_behind = None, True
            shutil.rmtree(self._copy, ignore_errors=True)

    def _launch(self) -> None:
        """Start the push that is due, unless one is running."""
        if self._process is not None or not self._is_behind:
            return
        options = {"folder": str(self._copy), "repo_id": self.repo_id, "private": self.private}
        arguments = json.dumps({**options, "message": self._message})
        path = os.pathsep.join(filter(None, sys.path))
        try:
            self._make_copy()
            with (self._copy / "log").open("w") as log:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "hf_ddpm.hub.background", arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env={**os.environ, "PYTHONPATH": path, "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
                )
            self._is_behind = False
        except (OSError, ValueError) as error:
            shutil.rmtree(self._copy, ignore_errors=True)
            self.report(str(error))

    def _make_copy(self) -> None:
        shutil.rmtree(self._copy, ignore_errors=True)
        files = model_files(self.folder)
        # `public_content` reads these files; they are not pushed.
        records = [str(Path(file).with_name("export.json")) for file in files if file.endswith("model_index.json")]
        for file in [*files, *(record for record in records if (self.folder / record).exists())]:
            (self._copy / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.folder / file, self._copy / file)

    def _collect(self, time_limit: float) -> None:
        """Wait for the running push; if it ends within the limit, report its failure and remove its copy."""
        if self._process is None:
            return
        try:
            code = self._process.wait(max(0, time_limit))
        except subprocess.TimeoutExpired:
            return
        self._process = None
        if code:
            self._is_behind = True
            log = self._copy / "log"
            lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
            self.report(lines[-1] if lines else f"cannot push to {self.repo_id}: the process exited with code {code}")
        shutil.rmtree(self._copy, ignore_errors=True)


if __name__ == "__main__":  # entry point of the push process; an error is its last output line
    try:
        push_model(**json.loads(sys.argv[1]))
    except (OSError, ValueError) as error:
        sys.exit(str(error))
