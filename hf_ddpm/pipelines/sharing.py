"""Methods `push_to_hub` and `save_pretrained` of the pipeline, with the model card of this package."""

import os
from functools import partial
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

import hf_ddpm

HUB_OPTIONS = ("commit_message", "private", "token", "create_pr")


class SharingMethods(DiffusionPipeline):
    """Methods of `DDPMPipeline` that save it and push it to the Hub."""

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Save the pipeline in the format of diffusers.

        Args:
            save_directory: The folder; created if it does not exist.
            safe_serialization: Write safetensors files instead of pickles.
            variant: Suffix of the names of weight files, such as `fp16`.
            max_shard_size: Maximum size of a weight file, such as `"5GB"`.
            push_to_hub: Also push the pipeline, as the method `push_to_hub` does, and write the model card to the
                folder. Other files of the folder are pushed only if they are results or training records of these
                weights.
            **kwargs: Arguments of the method `push_to_hub` and of `diffusers.DiffusionPipeline.save_pretrained`.
                `repo_id` defaults to the name of the folder.
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
        """Push the pipeline to the Hub with a model card.

        The card describes the training, the results and the sample images found in the folder that the pipeline was
        loaded from, if the weights have not changed since. A card written by hand, on the Hub or in that folder, is
        kept.

        Args:
            repo_id: `namespace/name`, or a name in your namespace; created if it does not exist.
            commit_message: First line of the commit message.
            private: Make a new repository private.
            token: Access token of the Hub; by default the token of the current login.
            create_pr: Open a pull request instead of committing to the main branch.
            safe_serialization: Write safetensors files instead of pickles.
            variant: Suffix of the names of weight files, such as `fp16`.
            subfolder: Folder of the repository to push to; no card is written there.

        Returns:
            The commit, a `huggingface_hub.CommitInfo`.
        """
        save = partial(super().save_pretrained, safe_serialization=safe_serialization, variant=variant)
        origin = Path(self.config.get("_name_or_path") or "")
        return hf_ddpm.push_pipeline(
            self, save, origin if (origin / "model_index.json").is_file() else None, repo_id,
            commit_message=commit_message, private=private, token=token, create_pr=create_pr, subfolder=subfolder,
        )  # fmt: skip
