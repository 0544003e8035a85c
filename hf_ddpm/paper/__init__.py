"""Figures and tables of the paper, and further ones of their kind.

The figure `NAME` is the function `NAME` of the module `NAME`, with underscores; `options` has its options.
"""

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from hf_ddpm.paper.options import FIGURES, AllOptions, DistanceOptions
from hf_ddpm.utils.files import write_text

if TYPE_CHECKING:
    from hf_ddpm.paper.context import FigureContext


def figure(name: str) -> Callable[["FigureContext", Any], None]:
    """Return the function that makes a figure of a model, or `all` of them.

    It takes a `FigureContext` and the figure's options, and writes `NAME.json`, `NAME.md` and pictures. It raises a
    `ValueError` if there are no data, an option does not fit model or data, or the scheduler is none for this figure.
    """
    function = name.replace("-", "_")
    return everything if name == "all" else getattr(import_module(f"hf_ddpm.paper.{function}"), function)


def everything(context: "FigureContext", options: AllOptions) -> None:
    """Make every figure with its default options, then `report.md` of all whose results exist."""
    for name, kind in FIGURES.items():
        has_distances = issubclass(kind, DistanceOptions) or name == "progressive"
        figure(name)(context, kind(num_images=options.num_images) if has_distances else kind())
    if context.accelerator.is_main_process:
        sections = [context.folder / f"{name}.md" for name in (*FIGURES, "distillation", "ablation")]
        texts = [section.read_text(encoding="utf-8") for section in sections if section.exists()]
        write_text(context.folder / "report.md", "\n".join([f"# Figures of {context.options.model}", *texts]))
