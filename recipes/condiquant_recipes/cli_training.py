"""The commands ``condiquant train`` and ``condiquant test``, spelt as BasicSR's scripts."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from condiquant_plugin.errors import InputError
from condiquant_recipes.hosts import load

OptOption = Annotated[
    Path,
    typer.Option(
        "-opt", "--opt", metavar="FILE", help="BasicSR's option file (YAML), or bidrn/x4.yml."
    ),
]


class Launcher(StrEnum):
    """BasicSR's."""

    none = "none"
    pytorch = "pytorch"
    slurm = "slurm"


LauncherOption = Annotated[Launcher, typer.Option(help="Job launcher; torchrun is pytorch.")]
ForceOption = Annotated[
    list[str] | None,
    typer.Option("--force_yml", metavar="KEY:SUB=VALUE...", help="Override keys of the file."),
]
MoreArgument = Annotated[list[str] | None, typer.Argument(hidden=True)]
DebugOption = Annotated[
    bool,
    typer.Option("--debug", help="BasicSR's debug mode: validate and save every 8 iterations."),
]
LocalRankOption = Annotated[int, typer.Option("--local_rank", "--local-rank", hidden=True)]


def train(
    opt: OptOption,
    launcher: LauncherOption = Launcher.none,
    auto_resume: Annotated[
        bool, typer.Option("--auto_resume", help="Go on from the newest state of the experiment.")
    ] = False,
    debug: DebugOption = False,
    force_yml: ForceOption = None,
    more: MoreArgument = None,
    local_rank: LocalRankOption = 0,
) -> None:
    """BasicSR's train.py with CondiQuantModel, in the current folder.

    In two processes: torchrun --nproc_per_node=2 -m condiquant_recipes train -opt FILE --launcher pytorch
    """
    overrides = _forced(force_yml, more)
    load("training.jobs").train(
        _option_file(opt), overrides, launcher=launcher.value, auto_resume=auto_resume, debug=debug
    )


def evaluate(
    opt: OptOption,
    launcher: LauncherOption = Launcher.none,
    debug: DebugOption = False,
    force_yml: ForceOption = None,
    more: MoreArgument = None,
    local_rank: LocalRankOption = 0,
) -> None:
    """BasicSR's test.py with CondiQuantModel: scores of a trained checkpoint."""
    load("training.jobs").evaluate(
        _option_file(opt), _forced(force_yml, more), launcher=launcher.value, debug=debug
    )


def _option_file(path: Path) -> Path:
    from condiquant_recipes.recipe_files import training_path

    return training_path(path)


def _forced(force_yml: list[str] | None, more: list[str] | None) -> list[str]:
    """BasicSR takes several entries after one --force_yml."""
    if more and not force_yml:
        raise InputError(f"unexpected argument {more[0]}: options begin with a dash")
    return [*(force_yml or []), *(more or [])]
