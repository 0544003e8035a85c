"""Pushes to the Hub: a model's folder in one commit, a Space that shows it, and pushes beside a run that goes on.

A push that failed is repeated as a whole: contents that have arrived are not sent again.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, RepoCard, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from hf_ddpm.files import one_line
from hf_ddpm.hub.folder import matching, model_files, public_content

SPACE = ("app.py", "requirements.txt", "README.md")
LOGIN = "log in with `hf auth login`, or set HF_TOKEN"
HTTPError = HfHubHTTPError.__bases__[0]  # of whichever library the client uses; raised as it is if nobody answers


@dataclass(frozen=True)
class Pushed:
    """What a push has done.

    Attributes:
        url: Where the repository is.
        commit_url: The commit; the newest one before if nothing has changed.
        has_card: Whether the folder had a README.md.
    """

    url: str
    commit_url: str
    has_card: bool


def push_model(
    folder: Path | str,
    repo_id: str,
    private: bool | None = None,
    message: str = "Upload the model",
    token: str | None = None,
) -> Pushed:
    """Pushes a model's folder in one commit, and creates the repository if it is not there.

    What the folders of weights and configurations hold there and no longer here goes: a reader would take the index of
    former shards for that of the weights.

    Args:
        folder: Of which `model_files` says what is pushed.
        repo_id: `namespace/name`.
        private: Whether only its owners see the repository; by default what it is, or what the account says.
        message: The commit's first line.
        token: By default the one that is logged in with.

    Raises:
        ValueError: If the folder is no whole model, the token is missing, unknown or may not write, or the repository
            is not as private as asked.
        OSError: If the Hub does not answer, or fails.
    """
    files = model_files(Path(folder))
    with _in_one_line(repo_id):
        api = _api(repo_id, token)
        there = [sibling.rfilename for sibling in _open_repo(api, repo_id, private, "model").siblings]
        own = {PurePosixPath(file).parent for file in files} - {PurePosixPath()}
        former = [path for path in there if PurePosixPath(path).parent in own and path not in files]
        operations: list[Any] = [CommitOperationDelete(path) for path in former]
        operations += [CommitOperationAdd(file, public_content(Path(folder, file))) for file in files]
        commit = api.create_commit(repo_id, operations, commit_message=message)
    return Pushed(f"{constants.ENDPOINT}/{repo_id}", commit.commit_url, "README.md" in files)


def push_space(
    folder: Path | str,
    repo_id: str,
    model_id: str,
    private: bool | None = None,
    message: str = "Upload the demo",
    token: str | None = None,
) -> Pushed:
    """Pushes a Gradio app to a Space, where it finds the id of the model to show in the variable `MODEL_ID`.

    Args:
        folder: Holds `app.py`, further modules, `requirements.txt`, and a `README.md` with the Space's metadata.
        repo_id: The Space's `namespace/name`.
        model_id: The model's. A Space needs a secret `HF_TOKEN` to read a private one.
        private: As of `push_model`.
        message: The commit's first line.
        token: By default the one that is logged in with.

    Raises:
        ValueError: As `push_model`, or if the Hub wants to be paid for.
        OSError: If the Hub does not answer, or fails.
    """
    folder = Path(folder)
    for name in SPACE:
        if not (folder / name).is_file():
            raise ValueError(f"space {str(folder)!r} cannot be pushed: it has no {name}")
    with _in_one_line(repo_id):
        card = RepoCard.load(folder / "README.md")
        card.data["models"] = [model_id]
        contents: dict[str, Any] = {file.name: file for file in matching(folder, ("[!.]*.py", *SPACE))}
        contents["README.md"] = str(card).encode()
        api = _api(repo_id, token)
        if private is None and api.repo_exists(model_id) and not api.repo_exists(repo_id, repo_type="space"):
            private = api.model_info(model_id).private or None  # the demo of a private model is private, too
        _open_repo(api, repo_id, private, "space")
        api.add_space_variable(repo_id, "MODEL_ID", model_id)
        operations = [CommitOperationAdd(name, content) for name, content in contents.items()]
        commit = api.create_commit(repo_id, operations, commit_message=message, repo_type="space")
    return Pushed(f"{constants.ENDPOINT}/spaces/{repo_id}", commit.commit_url, has_card=True)


def check_push(repo_id: str, private: bool | None = None, token: str | None = None) -> None:
    """Creates a model's repository, and complains as `push_model` would: before a long run, not after it."""
    with _in_one_line(repo_id):
        api = _api(repo_id, token)
        if api.whoami().get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise ValueError("the token may only read")
        _open_repo(api, repo_id, private, "model")


class BackgroundPush:
    """Pushes a model's folder now and then, beside a run that neither waits for it nor fails with it.

    A push is a process, at work on a copy: threads of the client would keep a run that is told to end from ending. At
    most one goes on at a time; what is due meanwhile is left to the next `start`, or to `finish`.

    Args:
        repo_id: As of `push_model`.
        private: As of `push_model`.
        report: Told of each failure, in a line.
        token: By default the one that is logged in with.
    """

    def __init__(self, repo_id: str, private: bool | None, report: Callable[[str], object], token: str | None = None):
        self.repo_id = repo_id
        self.private = private
        self.report = report
        self._environment = {**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1"} | ({"HF_TOKEN": token} if token else {})
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
            for file in model_files(folder):
                (self._copy / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(folder / file, self._copy / file)
            self._said = tempfile.TemporaryFile("w+", errors="replace")
            self._process = subprocess.Popen(
                [sys.executable, "-c", _PUSH, json.dumps({"path": sys.path, "options": options})],
                stdin=subprocess.DEVNULL, stdout=self._said, stderr=self._said, env=self._environment,
            )  # fmt: skip
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


def _api(repo_id: str, token: str | None) -> HfApi:
    if repo_id.count("/") != 1:
        raise ValueError("its name is not of the form namespace/name")
    if token is None and get_token() is None:
        raise ValueError(f"there is no token: {LOGIN}")
    return HfApi(token=token, library_name="hf_ddpm")


def _open_repo(api: HfApi, repo_id: str, private: bool | None, kind: str) -> Any:
    """Returns what the Hub says of a repository, which is created if it is not there."""
    try:
        info = api.repo_info(repo_id, repo_type=kind)
    except RepositoryNotFoundError:
        sdk = "gradio" if kind == "space" else None
        api.create_repo(repo_id, private=private, repo_type=kind, space_sdk=sdk, exist_ok=True)
        info = api.repo_info(repo_id, repo_type=kind)
    if private is not None and info.private != private:
        is_now, wanted = ("private", "public") if info.private else ("public", "private")
        raise ValueError(f"it is {is_now}, not {wanted} as asked for: change its settings on the Hub, or do not ask")
    return info


@contextmanager
def _in_one_line(repo_id: str) -> Iterator[None]:
    """Turns what the client raises into a `ValueError` or an `OSError` of one line."""
    try:
        yield
    except (OSError, RuntimeError, ValueError, HTTPError) as error:
        cause: BaseException = error
        while isinstance(cause, RuntimeError) and cause.__cause__ is not None:  # it says which file, its cause says why
            cause = cause.__cause__
        kind, why = _explain(cause)
        raise kind(f"{repo_id} cannot be pushed to: {why}") from error


def _explain(error: BaseException) -> tuple[type[Exception], str]:
    line = one_line(error)
    status = getattr(getattr(error, "response", None), "status_code", None)
    said = getattr(error, "server_message", None) or line
    told = {
        401: f"the Hub does not know the token: {LOGIN}",
        402: f"the Hub wants to be paid for it: {said}",
        403: f"the token may not write there: {said}",
        404: f"it is not there, or the token may not see it: {said}",
    }
    if status in told:
        return ValueError, one_line(told[status])
    # Of several uploads at once, the first that fails closes the client, and another may be the one that is told of.
    is_gone = isinstance(error, HTTPError) or "client has been closed" in line
    if status is None and is_gone:
        return OSError, f"{constants.ENDPOINT} does not answer: {line or type(error).__name__}"
    return ValueError if isinstance(error, ValueError) else OSError, line
