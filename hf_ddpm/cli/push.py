"""Push a model to the Hub, and a Space that shows it.

    hf-ddpm push --model runs/digits --hub_model_id org/ddpm-digits
    hf-ddpm push --model runs/digits --hub_model_id org/ddpm-digits --private --space org/ddpm-demo

Pushed are the pipeline, the card README.md (made from the files beside it unless a person has written it), pictures,
results, configuration and metrics; checkpoints and samples are not. The same command repeats a push that failed, and
sends what has changed.
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

    model: str = option("folder of a model, as hf-ddpm train or save_pretrained writes it, or of a checkpoint")
    hub_model_id: str = option("repository, namespace/name; created if it is missing")
    private: bool | None = option(
        "make the repository private; by default unchanged, or the account's default for a new one", None
    )
    revision_message: str = option("first line of the commit", "Upload the model")
    license: str | None = option("license of the model, for its card; that of the run by default", None)
    space: str | None = option("a Space to create and fill with a demo of the model, namespace/name", None)

    def __post_init__(self) -> None:
        """Check the values."""
        require_types(self)
        for name in ("hub_model_id", "space"):
            value = getattr(self, name)
            require(self, name, value is None or value.count("/") == 1, "namespace/name")
        require(self, "model", Path(self.model).is_dir(), "there is no such folder")
        require(self, "revision_message", bool(self.revision_message.strip()), "a line")


def main(argv: list[str]) -> int:
    """Run the command line; return the exit code."""
    (config,) = parse_options(argv, PushConfig, doc=__doc__)
    model_url, *space_urls = push_to_hub(**vars(config))
    print(f"{model_url} holds {config.model}")
    for url in space_urls:
        print(f"{url} shows it")
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
    """Push a model's folder to the Hub with its card, and a Space that shows it: `hf-ddpm push` in Python.

    Args:
        model: Folder of a model, as `hf_ddpm.train` or `save_pretrained` writes it.
        hub_model_id: The repository, `namespace/name`; created if it is missing.
        private: Whether to make the repository private; by default it stays as it is, and a new one as the account has
            it.
        revision_message: First line of the commit.
        license: License of the model, for its card; that of the run by default.
        space: A Space to create and fill with a demo of the model, `namespace/name`.

    Returns:
        The addresses of the repository and of the Space.

    Raises:
        ValueError: If an argument is not allowed, or the Hub refuses.
        OSError: If the Hub does not answer.
    """
    from hf_ddpm.demo.wheel import write_space
    from hf_ddpm.hub.card import write_card  # takes seconds
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
    """Yield the folder of a model; of a run with a newer checkpoint, a temporary export."""
    checkpoint = checkpoint_of(model, print)
    if checkpoint is None:
        with exclusive(Path(model), "model"):
            yield Path(model)
    else:
        with TemporaryDirectory(prefix="hf_ddpm-") as folder:
            yield export_model(checkpoint, output=Path(folder) / run_folder(checkpoint).resolve().name)[0]
