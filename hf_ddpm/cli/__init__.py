"""Command line: parse arguments, run a command, return its exit code.

The module of a command imports in milliseconds. Slow imports follow after its options are parsed.
"""

import sys
from importlib import import_module
from typing import NoReturn

import hf_ddpm
from hf_ddpm.utils.launch import end_quietly, run_script

COMMANDS = (
    *("train", "distill", "sample", "edit", "evaluate", "push", "export", "status", "convert", "reproduce", "demo"),
    "presets",
)


def run(command: str) -> NoReturn:
    """Run a command with the arguments of this process, and exit with its code."""
    end_quietly()  # before slow imports
    run_script(import_module(f"hf_ddpm.cli.{command}").main)


def main() -> NoReturn:
    """Run the command given by the first argument, or list the commands if there is no argument."""
    first = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if first in COMMANDS:
        sys.argv = [f"hf-ddpm {first}", *sys.argv[2:]]
        run(first)
    sys.argv = ["hf-ddpm", *sys.argv[1:]]
    run_script(list_commands)


def list_commands(argv: list[str]) -> int:
    """Print the commands and return the exit code; raise a `ValueError` if the first argument is not a command."""
    from hf_ddpm.utils.options import require_name  # slow, so after `end_quietly`

    if argv and argv[0] == "--version":
        print(hf_ddpm.__version__)
        return 0
    if argv and argv[0] not in ("-h", "--help"):
        require_name("command", argv[0], COMMANDS)
    print("usage: hf-ddpm COMMAND [--OPTION VALUE ...]\n\nhf-ddpm COMMAND --help lists the options of a command.\n")
    for command in COMMANDS:
        doc = import_module(f"hf_ddpm.cli.{command}").__doc__ or ""
        print(f"  {command:11}{doc.splitlines()[0]}")
    print("\nFor several processes: accelerate launch -m hf_ddpm COMMAND, with the same options.")
    return 0
