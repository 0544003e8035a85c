"""Push a model to the Hub, optionally with a demo Space.

    hf-ddpm push --model runs/digits --hub_model_id org/ddpm-digits
    hf-ddpm push --model runs/digits --hub_model_id org/ddpm-digits --private --space org/ddpm-demo

It pushes the pipeline, the model card README.md (generated from the files of the folder, unless it was edited by hand),
images, results, configuration and metrics, but no checkpoints or samples. Run the same command to repeat a failed push
or to push changes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from hf_ddpm.cli.export import export_model
from hf_ddpm.utils.launch import exclusive
from hf_ddpm.utils.options import option, parse_options, require, require_types
from hf_ddpm.utils.runs import checkpoint_of, run_folder


@dataclass
class PushConfig:
    """Hub: the model, its repository, a Space."""

    model: str = option("folder of a model, from hf-ddpm train or save_pretrained, or of a checkpoint")
    hub_model_id: str = option("repository, as namespace/name; created if missing")
    private: bool | None = option(
        "make a new repository private; error if an existing one is public (default: the account's setting)", None
    )
    revision_message: str = option("first line of the commit", "Upload the model")
    license: str | None = option("license of the model, for its card (default: the license of the run)", None)
    space: str | None = option("Space for a demo of the model, as namespace/name; created if missing", None)

    def __post_init__(self) -> None:
        """Check the values."""
        require_types(self)
        for name in ("hub_model_id", "space"):
            value = getattr(self, name)
            require(self, name, value is None or value.count("/") == 1, "namespace/name")
        require(self, "model", Path(self.model).is_dir(), "an existing folder")
        require(self, "revision_message", bool(self.revision_message.strip()), "a line of text")


def main(argv: list[str]) -> int:
    """Run the command line; return the exit code."""
    (config,) = parse_options(argv, PushConfig, doc=__doc__)
    model_url, *space_urls = push_to_hub(**vars(config))
    print(f"pushed {config.model} to {model_url}")
    for url in space_urls:
        print(f"demo: {url}")
    return 0


def push_to_hub(
    model: Path | str,
    hub_model_id: str,
    *,
    private: bool | None = None,
    revision_message: str = "Upload the model",
    license: str | None = None,
    space: str | None = None,
) -> list[str]:
    """Push a model with its card to the Hub, and optionally a demo Space: `hf-ddpm push` in Python.

    Args:
        model: Folder of a model, from `hf_ddpm.train` or `save_pretrained`.
        hub_model_id: The repository, `namespace/name`; created if missing.
        private: If true, make a new repository private; an existing public repository is an error. None stands for
            the account's setting.
        revision_message: First line of the commit.
        license: License of the model, for its card; by default the license of the run.
        space: Space for a demo of the model, `namespace/name`; created if missing.

    Returns:
        The URLs of the repository and of the Space.

    Raises:
        ValueError: If an argument is invalid, or the Hub rejects the push.
        OSError: If the Hub cannot be reached.
    """
    from hf_ddpm.demo.wheel import write_space
    from hf_ddpm.hub.card import write_card  # slow import
    from hf_ddpm.hub.push import push_model, push_space

    config = PushConfig(model, hub_model_id, private, revision_message, license, space)
    with _exported(str(config.model)) as folder:
        write_card(folder, model_id=hub_model_id, license=license)
        urls = [push_model(folder, hub_model_id, private, revision_message)]
    if space is not None:
        with TemporaryDirectory(prefix="hf_ddpm-") as app:
            write_space(Path(app))
            urls.append(push_space(app, space, hub_model_id, private))
    return urls


@contextmanager
def _exported(model: str) -> Iterator[Path]:
    """Yield the folder of a model, or a temporary export if a run has a checkpoint newer than its model."""
    checkpoint = checkpoint_of(model, print)
    if checkpoint is None:
        with exclusive(Path(model), "model"):
            yield Path(model)
    else:
        with TemporaryDirectory(prefix="hf_ddpm-") as folder:
            yield export_model(checkpoint, output=Path(folder) / run_folder(checkpoint).resolve().name)[0]
