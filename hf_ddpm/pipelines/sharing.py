"""`push_to_hub` and `save_pretrained` of a pipeline, with a model card of this package."""

import os
from functools import partial
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

import hf_ddpm

HUB_OPTIONS = ("commit_message", "private", "token", "create_pr")


class SharingMethods(DiffusionPipeline):
    """Methods of `DDPMPipeline` that push to the Hub."""

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Saves the pipeline in the format of diffusers.

        Args:
            save_directory: The folder; created if it is missing.
            safe_serialization: Write safetensors rather than pickles.
            variant: Part of the names of the weight files, such as `fp16`.
            max_shard_size: Largest size of a weight file, such as `"5GB"`.
            push_to_hub: Push the pipeline as `push_to_hub` does, and write the model card into the folder, too. Other
                files of the folder are not pushed, unless they are results or training records of these weights.
            **kwargs: Options of `push_to_hub` and of diffusers. `repo_id` is the folder's name by default.
        """
        folder = Path(save_directory)
        options = {name: kwargs.pop(name) for name in HUB_OPTIONS if name in kwargs}
        repo_id = kwargs.pop("repo_id", None) or folder.resolve().name
        save = partial(
            super().save_pretrained,
            safe_serialization=safe_serialization,
            variant=variant,
            max_shard_size=max_shard_size,
            **kwargs,
        )
        save(folder)
        if push_to_hub:
            hf_ddpm.push_pipeline(self, save, folder, repo_id, is_saved=True, **options)

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        subfolder: str | None = None,
    ) -> Any:
        """Pushes the pipeline to the Hub with a model card.

        The card has what is known: training, results and pictures are those of the folder that the pipeline was loaded
        from, if the weights are still the same. A card on the Hub or in that folder that a person wrote is kept.

        Args:
            repo_id: `namespace/name`, or a name in your namespace; created if it is missing.
            commit_message: The commit's first line.
            private: Make a new repository private.
            token: Token for the Hub; that of the login by default.
            create_pr: Open a pull request instead of committing.
            safe_serialization: Write safetensors rather than pickles.
            variant: Part of the names of the weight files, such as `fp16`.
            subfolder: Folder of the repository to push to; it gets no card.

        Returns:
            The commit, as `huggingface_hub` describes it.
        """
        save = partial(super().save_pretrained, safe_serialization=safe_serialization, variant=variant)
        origin = Path(self.config.get("_name_or_path") or "")
        return hf_ddpm.push_pipeline(
            self, save, origin if (origin / "model_index.json").is_file() else None, repo_id,
            commit_message=commit_message, private=private, token=token, create_pr=create_pr, subfolder=subfolder,
        )  # fmt: skip
