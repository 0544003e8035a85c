"""Figures and tables of the paper, and similar ones.

The figure `NAME` is made by the function `NAME` of the module `NAME` (with underscores for hyphens); its options are in
`options`.
"""

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from hf_ddpm.paper.options import FIGURES, AllOptions, DistanceOptions
from hf_ddpm.utils.files import write_text

if TYPE_CHECKING:
    from hf_ddpm.paper.context import FigureContext


def figure(name: str) -> Callable[["FigureContext", Any], None]:
    """Return the function that makes the figure `name`, or every figure for `all`.

    The function takes a `FigureContext` and the figure's options, and writes `NAME.json`, `NAME.md` and pictures. It
    raises a `ValueError` if the dataset is missing, an option does not fit the model or the data, or the figure does
    not support the scheduler.
    """
    function = name.replace("-", "_")
    return everything if name == "all" else getattr(import_module(f"hf_ddpm.paper.{function}"), function)


def everything(context: "FigureContext", options: AllOptions) -> None:
    """Make every figure with its default options, then join all existing texts in `report.md`."""
    for name, options_type in FIGURES.items():
        has_distances = issubclass(options_type, DistanceOptions) or name == "progressive"
        figure(name)(context, options_type(num_images=options.num_images) if has_distances else options_type())
    if context.accelerator.is_main_process:
        sections = [context.folder / f"{name}.md" for name in (*FIGURES, "distillation", "ablation")]
        texts = [section.read_text(encoding="utf-8") for section in sections if section.exists()]
        write_text(context.folder / "report.md", "\n".join([f"# Figures of {context.options.model}", *texts]))
