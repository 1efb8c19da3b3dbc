"""The command line ``condiquant``: exit code 0, 1 (a run failed) or 2 (bad usage or input)."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterable

try:
    import typer
except ImportError:
    sys.exit('the command line needs its extra: pip install "condiquant-plugin[all]"')

from condiquant_plugin.errors import DistributedError, InputError, MissingExtraError
from condiquant_recipes import cli_recipe, hosts

COMMANDS = {
    "run": ("cli_run", "run"),
    "evaluate": ("cli_run", "evaluate"),
    "export": ("cli_run", "export"),
    "recipe": ("cli_recipe", "recipe"),
    "quantize": ("cli_quantize", "quantize"),
    "upscale": ("cli_upscale", "upscale"),
    "compress": ("cli_compress", "compress"),
    "compare-weights": ("cli_compress", "compare_weights"),
    "train": ("cli_training", "train"),
    "test": ("cli_training", "evaluate"),
    "inspect": ("cli_measure", "inspect"),
    "benchmark": ("cli_measure", "benchmark"),
    "compare": ("cli_measure", "compare"),
    "demo": ("cli_measure", "demo"),
}
"""Modules and functions, in the order of the help."""
_SIGINT = 130
"""What newer versions of Typer make of a KeyboardInterrupt."""


def main() -> None:
    """Entry point."""
    try:
        with hosts.naming_extras():
            code = app(_asked())(standalone_mode=False)
        code = _interrupted() if code == _SIGINT else code
    except (InputError, MissingExtraError) as error:
        code = _fail(str(error), 2)
    except DistributedError as error:
        code = _fail(str(error), 1)
    except typer.Exit as error:
        code = error.exit_code
    except (typer.Abort, KeyboardInterrupt):
        code = _interrupted()
    except Exception as error:
        usage = getattr(error, "format_message", None)
        if len(sys.argv) == 1:
            code = 2  # the help has been shown
        elif usage is not None:
            code = _fail(str(usage()), 2)
        elif os.environ.get("CONDIQUANT_TRACEBACK"):
            raise
        else:
            message = " ".join(f"{type(error).__name__}: {error}".split())
            code = _fail(f"{message} (CONDIQUANT_TRACEBACK=1 shows where)", 1)
    sys.exit(code or 0)


def _asked() -> Iterable[str]:
    """The command that is named, or all, for help and completion."""
    return [name for name in sys.argv[1:2] if name in COMMANDS] or COMMANDS


def app(names: Iterable[str]) -> typer.Typer:
    """A command line with some of the commands; what the others import is not loaded."""
    found = typer.Typer(name="condiquant", no_args_is_help=True, pretty_exceptions_enable=False)
    found.callback()(cli_recipe.about)
    for name in names:
        module, function = COMMANDS[name]
        loaded = importlib.import_module(f"condiquant_recipes.{module}")
        found.command(name)(getattr(loaded, function))
    return found


def _interrupted() -> int:
    remedies = dict.fromkeys(("run", "quantize", "compare"), ": add --resume to go on")
    remedies["compare-weights"] = ": run it again to go on"
    remedies |= {"train": ": add --auto_resume to go on", "upscale": ": run it again to go on"}
    return _fail("interrupted" + remedies.get("".join(sys.argv[1:2]), ""), 1)


def _fail(message: str, code: int) -> int:
    print(f"condiquant: error: {' '.join(message.split())}", file=sys.stderr)
    return code
