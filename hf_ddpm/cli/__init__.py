"""The commands: argv, printing, exit codes."""

import sys
from importlib import import_module
from typing import NoReturn

from hf_ddpm.utils.launch import end_quietly, run_script

COMMANDS = {
    "train": "hf_ddpm.cli.train",
    "sample": "hf_ddpm.cli.sample",
    "evaluate": "hf_ddpm.cli.evaluate",
    "push": "hf_ddpm.cli.push",
    "convert": "hf_ddpm.cli.convert",
    "reproduce": "hf_ddpm.cli.reproduce",
    "demo": "hf_ddpm.demo.app",
}


def run(command: str) -> NoReturn:
    """Runs a command with the words of this process and exits with its code."""
    end_quietly()  # before imports that take seconds
    module = import_module(COMMANDS[command])
    run_script(module.main)


def main() -> NoReturn:
    """Runs the command that the first word names."""
    command = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if command not in COMMANDS:
        print(f"usage: hf-ddpm {{{','.join(COMMANDS)}}} [--help]", file=sys.stderr)
        sys.exit(2)
    sys.argv = [f"hf-ddpm {command}", *sys.argv[2:]]
    run(command)
