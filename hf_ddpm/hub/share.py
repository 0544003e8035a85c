"""Push a pipeline in memory, with its model card."""

import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi

from hf_ddpm.hub.card import Sources, is_generated, read_sources, write_card
from hf_ddpm.hub.push import public_content

# Files of a run's folder that are pushed with a pipeline.
RESULTS_FILES = ("results.json", "results_nearest.png")
TRAINING_FILES = ("config.yaml", "metrics.jsonl", "samples.png")
# Files that are only read for the card.
CARD_FILES = ("export.json", "status.json")


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
    """Push a pipeline and its card; keep a card on the Hub or in the folder that was written by a person.

    Args:
        pipe: The pipeline.
        save: Writes the pipeline's files to a folder.
        folder: A folder that may contain results and training records of the same weights, such as a run's folder.
        repo_id: `namespace/name`, or a name in the token's own namespace; created if it is missing.
        commit_message: First line of the commit message.
        private: Make a new repository private.
        token: Token for the Hub; by default the one saved at login.
        create_pr: Open a pull request instead of committing.
        subfolder: Target folder in the repository; the card is then not changed.
        is_saved: The pipeline was just saved to `folder`, so the card is also written there.

    Returns:
        The `CommitInfo` of `huggingface_hub`.
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
    """Write the card of a staged pipeline, and copy the folder's files that belong to the same weights."""
    sources = Sources(pipe, {}) if folder is None else read_sources(folder, pipe)
    names = [*(RESULTS_FILES if sources.results else ()), *(TRAINING_FILES if sources.options else ())]
    if folder is not None and (names or is_saved):
        for file in [folder / name for name in ("README.md", *names, *CARD_FILES)]:
            if file.is_file():
                _copy_public(file, staged / file.name)
    write_card(staged, pipe=pipe, model_id=repo_id)
    for name in CARD_FILES:
        (staged / name).unlink(missing_ok=True)


def _copy_public(file: Path, target: Path) -> None:
    """Copy the public content of a file, see `hf_ddpm.hub.push.public_content`."""
    content = public_content(file)
    if isinstance(content, bytes):
        target.write_bytes(content)
    elif file != target:
        shutil.copy(file, target)


def _has_own_card(api: HfApi, repo_id: str) -> bool:
    """Return whether the repository has a card that was written by a person."""
    if not api.file_exists(repo_id, "README.md"):
        return False
    return not is_generated(Path(api.hf_hub_download(repo_id, "README.md")).read_bytes())
