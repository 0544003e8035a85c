"""The commands: argv, printing, exit codes.

A module of a command imports in milliseconds: it reads the options, and what takes seconds is imported after that.
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
    """Run a command with the words of this process, and exit with its code."""
    end_quietly()  # before imports that take seconds
    run_script(import_module(f"hf_ddpm.cli.{command}").main)


def main() -> NoReturn:
    """Run the command that the first word names; without one, list the commands."""
    first = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if first in COMMANDS:
        sys.argv = [f"hf-ddpm {first}", *sys.argv[2:]]
        run(first)
    sys.argv = ["hf-ddpm", *sys.argv[1:]]
    run_script(list_commands)


def list_commands(argv: list[str]) -> int:
    """Print the commands; return the exit code. Raise a `ValueError` if the first word is no command."""
    from hf_ddpm.utils.options import require_name  # not before `end_quietly`

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
