"""Push a model's public files to the Hub in one commit, and a demo to a Space.

To retry a failed push, repeat it: files that the Hub already has are not sent again.
"""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import yaml
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, RepoCard, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from safetensors import SafetensorError, safe_open

from hf_ddpm.utils.files import one_line
from hf_ddpm.utils.jsonl import as_lines, read_lines, to_json
from hf_ddpm.utils.public import public_values

# Files of a run that are pushed with its pipeline. Checkpoints, single samples and pickles are not pushed.
RUN_FILES = (
    "README.md",
    "samples.png",
    "loss.png",
    "results*_nearest.png",
    "results*.json",
    "config.yaml",
    "metrics.jsonl",
    "evaluations.jsonl",
)
NESTED = ("ema-*", "best")  # subfolders with further pipelines of the run
SPACE = ("app.py", "requirements.txt", "README.md")
LOGIN = "log in with `hf auth login`, or set HF_TOKEN"
HTTPError = HfHubHTTPError.__bases__[0]  # of the client's HTTP library; raised directly if the Hub does not respond


def push_model(folder: Path | str, repo_id: str, private: bool | None = None, message: str = "Upload the model") -> str:
    """Push a model's folder in one commit; create the repository if it is missing.

    Stale files in the remote folders of weights and configurations are deleted: an old shard index would shadow the new
    weights.

    Args:
        folder: The folder. `model_files` selects the files, `public_content` removes private parts of their contents.
        repo_id: `namespace/name`.
        private: Make the repository private (default: unchanged, or the account's default for a new one).
        message: First line of the commit message.

    Returns:
        The URL of the repository.

    Raises:
        ValueError: If the model is incomplete, the token is missing, invalid or lacks write permission, or an existing
            repository has another visibility than `private`.
        OSError: If the Hub fails or does not respond.
    """
    files = model_files(Path(folder))
    with _one_line_errors(repo_id):
        api = _api(repo_id)
        existing = [sibling.rfilename for sibling in _open_repo(api, repo_id, private, "model").siblings]
        own = {PurePosixPath(file).parent for file in files} - {PurePosixPath()}
        stale = [path for path in existing if PurePosixPath(path).parent in own and path not in files]
        operations: list[Any] = [CommitOperationDelete(path) for path in stale]
        operations += [CommitOperationAdd(file, public_content(Path(folder, file))) for file in files]
        api.create_commit(repo_id, operations, commit_message=message)
    return f"{constants.ENDPOINT}/{repo_id}"


def push_space(folder: Path | str, repo_id: str, model_id: str, private: bool | None = None) -> str:
    """Push a Gradio app to a Space, and set its variable `MODEL_ID` to the id of the model to show.

    Args:
        folder: Folder with `app.py`, further modules, wheels, `requirements.txt`, and a `README.md` with the Space's
            metadata. Other wheels in the Space are deleted.
        repo_id: The Space's `namespace/name`.
        model_id: The model's `namespace/name`. A Space needs a secret `HF_TOKEN` to read a private model.
        private: Make the Space private (default: unchanged, or the model's visibility for a new Space).

    Returns:
        The URL of the Space.

    Raises:
        ValueError: If a file is missing, the Hub requires payment, or for the reasons of `push_model`.
        OSError: If the Hub fails or does not respond.
    """
    folder = Path(folder)
    for name in SPACE:
        if not (folder / name).is_file():
            raise ValueError(f"cannot push the Space in {str(folder)!r}: {name} is missing")
    with _one_line_errors(repo_id):
        card = RepoCard.load(folder / "README.md")
        card.data["models"] = [model_id]
        contents: dict[str, Any] = {file.name: file for file in _matching(folder, ("[!.]*.py", "*.whl", *SPACE))}
        contents["README.md"] = str(card).encode()
        api = _api(repo_id)
        if private is None and api.repo_exists(model_id) and not api.repo_exists(repo_id, repo_type="space"):
            private = api.model_info(model_id).private  # a new demo must not reveal a private model
        existing = [sibling.rfilename for sibling in _open_repo(api, repo_id, private, "space").siblings]
        api.add_space_variable(repo_id, "MODEL_ID", model_id)
        stale = [name for name in existing if name.endswith(".whl") and name not in contents]
        operations: list[Any] = [CommitOperationDelete(name) for name in stale]
        operations += [CommitOperationAdd(name, content) for name, content in contents.items()]
        api.create_commit(repo_id, operations, commit_message="Upload the demo", repo_type="space")
    return f"{constants.ENDPOINT}/spaces/{repo_id}"


def check_push(repo_id: str, private: bool | None = None) -> None:
    """Create a model's repository, and raise the errors of `push_model` before a long run instead of after it."""
    with _one_line_errors(repo_id):
        api = _api(repo_id)
        if api.whoami().get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise ValueError("the token is read-only; expected one with write permission")
        _open_repo(api, repo_id, private, "model")


def model_files(folder: Path) -> list[str]:
    """Return the files of a model's folder to push: pipelines, card, images, results, configuration, metrics.

    Args:
        folder: A pipeline as `save_pretrained` writes it, optionally with the files of a run.

    Returns:
        Paths relative to the folder, with slashes.

    Raises:
        ValueError: If a pipeline is incomplete.
    """
    nested = [index.parent for name in NESTED for index in sorted(folder.glob(f"{name}/model_index.json"))]
    files = [file for pipe in (folder, *nested) for file in (*_pipeline(pipe), *_matching(pipe, RUN_FILES))]
    return [file.relative_to(folder).as_posix() for file in files]


def public_content(file: Path) -> bytes | Path:
    """Return the public content of a file: the file itself, or its content without private parts.

    In options, results and configurations, only the last part of paths and URLs is kept, see `hf_ddpm.utils.public`.
    """
    if file.name == "config.yaml":
        given, write = _read_yaml(file), partial(yaml.safe_dump, sort_keys=False)
        public = public_values(given, _hub_ids_of_run(file.parent))
    elif file.name == "evaluations.jsonl":
        given, write = read_lines(file), as_lines
        public = public_values(given, _hub_ids_of_run(file.parent))
    elif file.match("results*.json"):
        given, write = _read_json(file), partial(to_json, indent=2)
        ids = {name: _hub_ids(part.get("made_by") if isinstance(part, dict) else None) for name, part in given.items()}
        ids["model"] = [name for names in ids.values() for name in names]
        public = {name: public_values(part, ids[name]) for name, part in given.items()}
    elif file.suffix == ".json":  # written by diffusers, with the path it was loaded from
        given, write = _read_json(file), partial(to_json, indent=2)
        public = {name: value for name, value in given.items() if name != "_name_or_path"}
    else:
        return file
    return file if public == given else (write(public).rstrip("\n") + "\n").encode()


def _hub_ids_of_run(folder: Path) -> list[str]:
    record = folder / "export.json"
    return _hub_ids(_read_json(record) if record.is_file() else None)


def _hub_ids(record: Any) -> list[str]:
    ids = record.get("hub_ids") if isinstance(record, dict) else None
    return [name for name in ids if isinstance(name, str)] if isinstance(ids, list) else []


def _matching(folder: Path, patterns: Iterable[str]) -> Iterator[Path]:
    return (file for pattern in patterns for file in sorted(folder.glob(pattern)) if file.is_file())


def _pipeline(folder: Path) -> list[Path]:
    """Return the files of a pipeline; raise a `ValueError` if one is missing or damaged."""
    index = folder / "model_index.json"
    if not index.is_file():
        raise ValueError(f"cannot push model {str(folder)!r}: model_index.json is missing")
    files = [index]
    for name, entry in _read_json(index).items():
        if isinstance(entry, list) and len(entry) == 2 and not name.startswith("_") and entry[0] is not None:
            files += _component(folder / name)
    if len(files) == 1:
        raise ValueError(f"cannot push model {str(folder)!r}: model_index.json lists no components")
    return files


def _component(folder: Path) -> list[Path]:
    scheduler, config = folder / "scheduler_config.json", folder / "config.json"
    if scheduler.is_file():
        return [scheduler]
    indexes, weights = (list(_matching(folder, [f"*.safetensors{end}"])) for end in (".index.json", ""))
    shards = {folder / shard for index in indexes for shard in _read_json(index).get("weight_map", {}).values()}
    missing = [path for path in (config, *sorted(shards)) if not path.is_file()]
    if missing or not weights:
        what = f"{folder.name}/{missing[0].name} is" if missing else f"weights {folder.name}/*.safetensors are"
        raise ValueError(f"cannot push model {str(folder.parent)!r}: {what} missing")
    for file in weights:
        try:
            with safe_open(file, framework="numpy"):  # checks the header and the file's length
                pass
        except (OSError, SafetensorError) as error:
            raise ValueError(f"cannot push model {str(folder.parent)!r}: {file} is damaged: {error}") from error
    return [config, *indexes, *weights]


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: invalid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected a JSON object")
    return content


def _read_yaml(file: Path) -> Any:
    try:
        return yaml.safe_load(file.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{file}: invalid YAML: {one_line(error)}") from error


def _api(repo_id: str) -> HfApi:
    if repo_id.count("/") != 1:
        raise ValueError("expected a repository name of the form namespace/name")
    if get_token() is None:
        raise ValueError(f"no token found; {LOGIN}")
    return HfApi(library_name="hf_ddpm")


def _open_repo(api: HfApi, repo_id: str, private: bool | None, kind: str) -> Any:
    """Return the Hub's information on a repository; create the repository if it is missing."""
    try:
        info = api.repo_info(repo_id, repo_type=kind)
    except RepositoryNotFoundError:
        sdk = "gradio" if kind == "space" else None
        api.create_repo(repo_id, private=private, repo_type=kind, space_sdk=sdk, exist_ok=True)
        info = api.repo_info(repo_id, repo_type=kind)
    if private is not None and info.private != private:
        actual, requested = ("private", "public") if info.private else ("public", "private")
        raise ValueError(
            f"the repository is {actual}, but {requested} was requested; change its settings on the Hub, or omit the "
            "option"
        )
    return info


@contextmanager
def _one_line_errors(repo_id: str) -> Iterator[None]:
    """Convert errors of the client into a `ValueError` or an `OSError` with a message of one line."""
    try:
        yield
    except (OSError, RuntimeError, ValueError, HTTPError) as error:
        cause: BaseException = error
        while isinstance(cause, RuntimeError) and cause.__cause__ is not None:  # its own message is only the file name
            cause = cause.__cause__
        kind, reason = _explain(cause)
        raise kind(f"cannot push to {repo_id}: {reason}") from error


def _explain(error: BaseException) -> tuple[type[Exception], str]:
    line = one_line(error)
    status = getattr(getattr(error, "response", None), "status_code", None)
    message = getattr(error, "server_message", None) or line
    reasons = {
        401: f"the Hub rejected the token; {LOGIN}",
        402: f"the Hub requires payment: {message}",
        403: f"the token has no write permission: {message}",
        404: f"repository not found, or the token has no access to it: {message}",
    }
    if status in reasons:
        return ValueError, one_line(reasons[status])
    # The first failed upload closes the client; parallel uploads then fail with "client has been closed".
    is_unreachable = isinstance(error, HTTPError) or "client has been closed" in line
    if status is None and is_unreachable:
        return OSError, f"{constants.ENDPOINT} does not respond: {line or type(error).__name__}"
    return ValueError if isinstance(error, ValueError) else OSError, line
