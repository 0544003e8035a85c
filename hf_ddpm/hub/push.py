"""Pushes to the Hub: a model's folder in one commit, and a Space that shows it.

A push that failed is repeated as a whole: contents that have arrived are not sent again.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, RepoCard, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from hf_ddpm.hub.folder import matching, model_files, public_content
from hf_ddpm.utils.files import one_line

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
        private: As of `push_model`; a new Space is as private as its model by default.
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
            private = api.model_info(model_id).private  # a new demo is as private as its model
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
