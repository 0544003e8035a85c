"""Pushes a model's folder to the Hub, and a Space that shows it.

    python scripts/push_to_hub.py --model runs/digits --hub_model_id org/ddpm-digits
    python scripts/push_to_hub.py --model runs/digits --hub_model_id org/ddpm-digits --private --space org/ddpm-demo

What goes up is the pipeline, the card README.md (made from the files beside it unless a person has written it),
pictures, results, configuration and metrics; checkpoints and samples stay here. The same command goes on after a
failure, and pushes what has changed.
"""

from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

from hf_ddpm.hub.card import write_card
from hf_ddpm.hub.push import push_model, push_space
from hf_ddpm.utils.launch import exclusive
from hf_ddpm.utils.options import option, parse_options, require


@dataclass
class PushConfig:
    """What, and where to."""

    model: str = option("folder of a model, as train.py or save_pretrained writes it")
    hub_model_id: str = option("the repository, namespace/name; created if it is not there")
    private: bool | None = field(  # `--private` alone is true
        default=None,
        metadata={
            "help": "whether only its owners see it; by default what it is, or what the account says",
            "nargs": "?",
            "const": True,
        },
    )
    revision_message: str = option("first line of the commit", "Upload the model")
    license: str | None = option("license of the model, for its card; that of the run by default", None)
    space: str | None = option("a Space to create and fill with a demo of the model, namespace/name", None)

    def __post_init__(self) -> None:
        """Checks the values."""
        for name in ("hub_model_id", "space"):
            value = getattr(self, name)
            require(self, name, value is None or value.count("/") == 1, "namespace/name")
        require(self, "model", Path(self.model).is_dir(), "there is no such folder")
        require(self, "revision_message", bool(self.revision_message.strip()), "a line")


def main(argv: list[str]) -> int:
    """Runs the command line; returns the exit code."""
    (config,) = parse_options(argv, PushConfig)
    with exclusive(Path(config.model), "model"):
        write_card(Path(config.model), model_id=config.hub_model_id, license=config.license)
        pushed = push_model(config.model, config.hub_model_id, config.private, config.revision_message)
    print(f"{pushed.url} holds {config.model}")
    if config.space is not None:
        app = Path(str(resources.files("hf_ddpm.demo") / "space"))
        print(f"{push_space(app, config.space, config.hub_model_id, config.private).url} shows it")
    return 0
