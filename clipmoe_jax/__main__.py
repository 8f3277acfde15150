"""The command `clipmoe`: one name for what `python -m clipmoe_jax.prepare` and its siblings do.

    clipmoe train --config=demo --workdir=runs/demo
    clipmoe prepare --help

Each is a module beside this one, whose docstring is its manual.
"""

import ast
import pathlib
import runpy
import sys

from clipmoe_jax import __version__

# {command: the module of clipmoe_jax that is run}
COMMANDS = {
    "prepare": "prepare",
    "train": "main",
    "plan": "plan",
    "evaluate": "evaluate",
    "embed": "embed",
    "convert": "convert",
    "report": "report",
}


def main() -> None:
    """Runs the command that the first argument names."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("--help", "-h", "help"):
        print(_help())
    elif name == "--version":
        print(f"clipmoe {__version__}")
    elif name not in COMMANDS:
        sys.exit(f"error: no command {name!r}: choose one of {', '.join(COMMANDS)}")
    else:
        sys.argv = [f"clipmoe {name}", *arguments]
        runpy.run_module(f"clipmoe_jax.{COMMANDS[name]}", run_name="__main__")


def _help() -> str:
    """Returns the list of commands. Modules are not imported for it: JAX takes a second."""
    lines = [f"  {name:10}{_purpose(module)}" for name, module in COMMANDS.items()]
    return "\n".join(
        [
            "CLIP-MoE in JAX: any dense CLIP and captioned images in, a mixture of experts out.",
            "",
            "Usage: clipmoe COMMAND --option=value …",
            "",
            *lines,
            "",
            "clipmoe COMMAND --help is its manual. clipmoe --version tells the version. Without installing,",
            "python -m clipmoe_jax is the same command.",
        ]
    )


def _purpose(module: str) -> str:
    """Returns the first sentence of a module's docstring."""
    source = pathlib.Path(__file__).with_name(f"{module}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]


if __name__ == "__main__":
    main()
