"""Models on the Hub: what of a folder belongs there, one commit of it, and pushes beside a run that goes on.

Only what is named below is sent, so that checkpoints, samples and pickles stay where they are. A push that failed is
repeated as a whole: contents that have arrived are not sent again.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, RepoCard, constants, get_token
from huggingface_hub.errors import HTTPError, RepositoryNotFoundError  # HTTPError: of whichever library the client uses
from safetensors import SafetensorError, safe_open

BESIDE_MODEL = ("README.md", "[!.0-9]*.png", "results*.json", "config.yaml", "metrics.jsonl")
OF_SPACE = ("README.md", "requirements.txt", "[!.]*.py")
LOGIN = "log in with `hf auth login`, or set HF_TOKEN"


@dataclass(frozen=True)
class Pushed:
    """What a push has done.

    Attributes:
        url: Where the repository is.
        commit_url: The commit; the newest one that was there if nothing has changed.
        has_card: Whether the folder had a README.md.
    """

    url: str
    commit_url: str
    has_card: bool


def model_files(folder: Path) -> list[str]:
    """Returns what of a model's folder belongs on the Hub: pipelines, card, pictures, results, configuration, metrics.

    Args:
        folder: A pipeline as `save_pretrained` writes it, and what scripts/train.py leaves beside it; further pipelines
            in `ema-*/`.

    Returns:
        Paths below the folder, with slashes.

    Raises:
        ValueError: If a pipeline is not whole.
    """
    files = _pipeline_files(folder)
    files += [file for pattern in BESIDE_MODEL for file in sorted(folder.glob(pattern)) if file.is_file()]
    for index in sorted(folder.glob("ema-*/model_index.json")):
        files += _pipeline_files(index.parent)
    return [file.relative_to(folder).as_posix() for file in files]


def push_model(
    folder: Path | str,
    repo_id: str,
    private: bool | None = None,
    message: str = "Upload the model",
    token: str | None = None,
) -> Pushed:
    """Pushes a model's folder in one commit, and creates the repository if it is not there.

    Files of the folders of weights and configurations that the model no longer has are removed there: a reader would
    take the index of former shards for that of the weights.

    Args:
        folder: See `model_files`.
        repo_id: `namespace/name`.
        private: Whether only its owners see the repository; by default what it is, or what the account's default is.
        message: The commit's first line.
        token: By default the one that is logged in with.

    Raises:
        ValueError: If the folder is no whole model, the token is missing, unknown or may not write, or the repository
            is not as private as asked; nothing has been sent.
        OSError: If the Hub does not answer, or fails.
    """
    files = model_files(Path(folder))
    with _told_in_a_line(repo_id):
        api = _api(repo_id, token)
        info = _open_repo(api, repo_id, private, "model")
        owned = {PurePosixPath(file).parent for file in files} - {PurePosixPath(".")}
        there = [sibling.rfilename for sibling in info.siblings or []]
        stale = [path for path in there if PurePosixPath(path).parent in owned and path not in files]
        operations = [CommitOperationDelete(path) for path in stale]
        operations += [CommitOperationAdd(file, Path(folder) / file) for file in files]
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
    """Pushes a Gradio app to a Space that shows a model, whose id the app finds in the variable `MODEL_ID`.

    Args:
        folder: Holds `app.py`, `requirements.txt` and a `README.md` with the Space's metadata.
        repo_id: The Space's `namespace/name`.
        model_id: The model's.
        private: As of `push_model`; a Space needs a secret `HF_TOKEN` to read a private model.
        message: The commit's first line.
        token: By default the one that is logged in with.

    Raises:
        ValueError: As `push_model`, or if the Hub wants to be paid for.
        OSError: If the Hub does not answer, or fails.
    """
    folder = Path(folder)
    for name in ("app.py", "requirements.txt", "README.md"):
        if not (folder / name).is_file():
            raise ValueError(f"space {str(folder)!r} cannot be pushed: {name} is missing")
    with _told_in_a_line(repo_id):
        card = RepoCard.load(folder / "README.md")
        card.data["models"] = [model_id]
        contents: dict[str, Any] = {
            file.name: file for pattern in OF_SPACE for file in sorted(folder.glob(pattern)) if file.is_file()
        }
        contents["README.md"] = str(card).encode()
        api = _api(repo_id, token)
        _open_repo(api, repo_id, private, "space")
        api.add_space_variable(repo_id, "MODEL_ID", model_id)
        operations = [CommitOperationAdd(name, content) for name, content in contents.items()]
        commit = api.create_commit(repo_id, operations, commit_message=message, repo_type="space")
    return Pushed(f"{constants.ENDPOINT}/spaces/{repo_id}", commit.commit_url, True)


def check_push(repo_id: str, private: bool | None = None, token: str | None = None) -> None:
    """Complains as `push_model` would, before a long run rather than after it; creates the model's repository."""
    with _told_in_a_line(repo_id):
        api = _api(repo_id, token)
        if api.whoami().get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise ValueError("the token may only read")
        _open_repo(api, repo_id, private, "model")


class BackgroundPush:
    """Pushes a model's folder again and again, beside a run that neither waits for it nor fails with it.

    A push is a process of its own, working on a copy: its threads would keep a run that is told to end from ending. At
    most one goes on at a time; what is due meanwhile is left to the next one, and to `finish`.

    Args:
        repo_id: As of `push_model`.
        private: As of `push_model`.
        report: Told of each failure, in a line.
        token: By default the one that is logged in with.
    """

    def __init__(
        self, repo_id: str, private: bool | None, report: Callable[[str], None], token: str | None = None
    ) -> None:
        self.repo_id = repo_id
        self.private = private
        self.report = report
        self._environment = {**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1"} | ({"HF_TOKEN": token} if token else {})
        self._newest: tuple[Path, str] | None = None
        self._is_behind = False
        self._process: subprocess.Popen | None = None

    def start(self, folder: Path, message: str = "Upload the model") -> None:
        """Starts to push a folder as it is now, unless a push still goes on; returns when the copy is made."""
        self._newest, self._is_behind = (folder, message), True
        self._look_after()
        if self._process is None:
            self._launch()

    def finish(self, time_limit: float = 600) -> bool:
        """Waits for what goes on, and pushes what has come since or has failed.

        Args:
            time_limit: Seconds; what is not done by then is given up.

        Returns:
            Whether the newest state is on the Hub.
        """
        end = time.monotonic() + time_limit
        self._wait(end)
        if self._is_behind:
            self._launch()
            self._wait(end)
        if self._process is not None:
            self.report(f"{self.repo_id} is not pushed: it takes more than {time_limit:g} s")
            self.close()
        return not self._is_behind

    def close(self) -> None:
        """Gives up what goes on; what has arrived is on the Hub only with the commit, its last step."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process, self._is_behind = None, True
        self._remove_copy()

    def _launch(self) -> None:
        folder, message = self._newest
        options = {"repo_id": self.repo_id, "private": self.private, "message": message}
        try:
            files = model_files(folder)
            self._remove_copy()
            for file in files:
                (self._copy / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(folder / file, self._copy / file)
            with open(self._copy / ".errors", "wb") as errors:
                self._process = subprocess.Popen(
                    [sys.executable, "-c", _PUSH, json.dumps([sys.path, options | {"folder": str(self._copy)}])],
                    stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors, env=self._environment,
                )  # fmt: skip
            self._is_behind = False
        except (OSError, ValueError) as error:
            self.report(f"{self.repo_id} is not pushed: {error}")

    @property
    def _copy(self) -> Path:
        return self._newest[0] / ".push"

    def _remove_copy(self) -> None:
        if self._newest is not None:
            shutil.rmtree(self._copy, ignore_errors=True)

    def _wait(self, end: float) -> None:
        if self._process is not None:
            try:
                self._process.wait(max(0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                return
        self._look_after()

    def _look_after(self) -> None:
        """Forgets a push that has ended, and reports why if it failed."""
        if self._process is None or self._process.poll() is None:
            return
        code, self._process = self._process.returncode, None
        if code:
            said = (self._copy / ".errors").read_text(errors="replace").split("\n")
            self._is_behind = True
            self.report(next((line for line in reversed(said) if line), f"a push to {self.repo_id} ended with {code}"))
        self._remove_copy()


# What the process of a push runs. The last line that it says is the error.
_PUSH = """
import json, sys
sys.path[:], options = json.loads(sys.argv[1])
from hf_ddpm.hub.push import push_model
try:
    push_model(**options)
except (OSError, ValueError) as error:
    sys.exit(str(error))
"""


def _pipeline_files(folder: Path) -> list[Path]:
    index = folder / "model_index.json"
    if not index.is_file():
        raise ValueError(f"model {str(folder)!r} cannot be pushed: it has no model_index.json")
    components = _read(index, dict)
    files = [index]
    for name, entry in components.items():
        if isinstance(entry, list) and not name.startswith("_") and entry[0] is not None:
            files += _component_files(folder / name)
    if len(files) == 1:
        raise ValueError(f"{index} names no components")
    return files


def _component_files(folder: Path) -> list[Path]:
    scheduler, config = folder / "scheduler_config.json", folder / "config.json"
    if scheduler.is_file():
        return [scheduler]
    weights, indexes = sorted(folder.glob("*.safetensors")), sorted(folder.glob("*.safetensors.index.json"))
    shards = {folder / shard for index in indexes for shard in _read(index, dict).get("weight_map", {}).values()}
    missing = [config] * (not config.is_file()) + sorted(shards - set(weights))
    if missing or not weights:
        what = missing[0].name if missing else "*.safetensors"
        raise ValueError(f"model {str(folder.parent)!r} cannot be pushed: {folder.name}/ has no {what}")
    for file in weights:
        try:
            safe_open(file, framework="numpy").__enter__()  # reads the header, and checks the length
        except (OSError, SafetensorError) as error:
            raise ValueError(f"model {str(folder.parent)!r} cannot be pushed: {file} is damaged: {error}") from error
    return [config, *indexes, *weights]


def _read(file: Path, kind: type) -> Any:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}") from error
    if not isinstance(content, kind):
        raise ValueError(f"{file} holds a {type(content).__name__}, not a {kind.__name__}")
    return content


def _api(repo_id: str, token: str | None) -> HfApi:
    if repo_id.count("/") != 1:
        raise ValueError("its name is not allowed: namespace/name")
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
        raise ValueError(f"it is {is_now}, and {wanted} is asked for: change its settings on the Hub, or do not ask")
    return info


@contextmanager
def _told_in_a_line(repo_id: str) -> Iterator[None]:
    """Turns what the client raises into a `ValueError` or an `OSError` of one line."""
    try:
        yield
    except (OSError, RuntimeError, ValueError, HTTPError) as error:
        told: BaseException = error
        while isinstance(told, RuntimeError) and told.__cause__ is not None:  # which file it was, and then why
            told = told.__cause__
        kind, why = _explain(told)
        raise kind(f"{repo_id} cannot be pushed to: {why}") from error


def _explain(error: BaseException) -> tuple[type[Exception], str]:
    line = " ".join(str(error).split())
    status = getattr(getattr(error, "response", None), "status_code", None)
    said = getattr(error, "server_message", None) or line
    if status == 401:
        return ValueError, f"the Hub does not know the token: {LOGIN}"
    if status == 402:
        return ValueError, f"the Hub wants to be paid for it: {said}"
    if status == 403:
        return ValueError, f"the token may not write there: {said}"
    if status == 404:
        return ValueError, f"it is not there, or the token may not see it: {said}"
    if status is None and isinstance(error, HTTPError):
        return OSError, f"{constants.ENDPOINT} does not answer: {line or type(error).__name__}"
    return ValueError if isinstance(error, ValueError) else OSError, line
