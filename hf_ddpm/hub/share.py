"""Pushes of a pipeline in memory, with its model card."""

import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi

from hf_ddpm.hub.card import Sources, is_generated, read_sources, write_card
from hf_ddpm.hub.push import public_content

# Files of a run's folder that are pushed with a pipeline: those of its results, and those of its training.
OF_RESULTS = ("results.json", "results_nearest.png")
OF_TRAINING = ("config.yaml", "metrics.jsonl", "samples.png")
# Read for the card only.
OF_CARD = ("export.json", "status.json")


def push_pipeline(
    pipe: Any,
    save: Callable[[Path], object],
    folder: Path | None,
    repo_id: str,
    *,
    commit_message: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    create_pr: bool = False,
    subfolder: str | None = None,
    is_saved: bool = False,
) -> Any:
    """Push a pipeline and its card; a card on the Hub or in the folder that a person wrote is kept.

    Args:
        pipe: The pipeline.
        save: Writes the pipeline's files to a folder.
        folder: A folder that may hold results and training records of the same weights, such as that of a run.
        repo_id: `namespace/name`, or a name in the namespace of the token; created if it is missing.
        commit_message: The commit's first line.
        private: Make a new repository private.
        token: Token for the Hub; that of the login by default.
        create_pr: Open a pull request instead of committing.
        subfolder: A folder of the repository; the card is left as it is then.
        is_saved: Whether the pipeline was just saved to the folder, which gets the card, too.

    Returns:
        The commit, as `huggingface_hub` describes it.
    """
    api = HfApi(library_name="hf_ddpm", token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    with TemporaryDirectory() as name:
        staged = Path(name)
        save(staged)
        for file in staged.rglob("*.json"):
            _copy_public(file, file)
        if is_saved and folder is not None:
            write_card(folder, pipe=pipe, model_id=repo_id)
        if subfolder is None:
            _add_card(staged, pipe, folder, repo_id, is_saved)
            if _has_own_card(api, repo_id):
                (staged / "README.md").unlink()
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=staged,
            path_in_repo=subfolder,
            commit_message=commit_message or "Upload DDPMPipeline",
            create_pr=create_pr,
        )


def _add_card(staged: Path, pipe: Any, folder: Path | None, repo_id: str, is_saved: bool) -> None:
    """Write the card beside a saved pipeline, with the files of the folder that are about the same weights."""
    sources = Sources(pipe, {}) if folder is None else read_sources(folder, pipe)
    names = [*(OF_RESULTS if sources.results else ()), *(OF_TRAINING if sources.options else ())]
    if folder is not None and (names or is_saved):
        for file in [folder / name for name in ("README.md", *names, *OF_CARD)]:
            if file.is_file():
                _copy_public(file, staged / file.name)
    write_card(staged, pipe=pipe, model_id=repo_id)
    for name in OF_CARD:
        (staged / name).unlink(missing_ok=True)


def _copy_public(file: Path, target: Path) -> None:
    """Copy a file as `hf_ddpm.hub.push.public_content` has it."""
    content = public_content(file)
    if isinstance(content, bytes):
        target.write_bytes(content)
    elif file != target:
        shutil.copy(file, target)


def _has_own_card(api: HfApi, repo_id: str) -> bool:
    """Return whether a person wrote the card that is on the Hub."""
    if not api.file_exists(repo_id, "README.md"):
        return False
    return not is_generated(Path(api.hf_hub_download(repo_id, "README.md")).read_bytes())
