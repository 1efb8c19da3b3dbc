"""Errors that a user can act on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


class InputError(ValueError):
    """Something the user gave cannot be used; the message is one line: the value and the remedy."""


class DistributedError(RuntimeError):
    """Another process ended or failed; the message is one line: what was being done and the remedy."""


class MissingExtraError(ModuleNotFoundError):
    """A package that an extra brings is not installed; the message is one line with the remedy."""

    def __init__(self, who: str, package: str, extra: str) -> None:
        super().__init__(f'{who} needs {package}: pip install "condiquant-plugin[{extra}]"')


def check_finite(x: Tensor, place: str) -> None:
    """Raise :class:`InputError` for NaN or Inf in ``x``, which is ``"the input of head"``."""
    if not all(extreme.isfinite() for extreme in x.aminmax()):
        raise InputError(f"NaN or Inf in {place}: check the checkpoint and the calibration images")


def check_count(name: str, value: int) -> None:
    """Raise :class:`InputError` unless there is at least one."""
    if value < 1:
        raise InputError(f"{name}={value}: use at least 1")


def check_choice(name: str, value: object, allowed: Sequence[object]) -> None:
    """Accept one of ``allowed``.

    Raises:
        InputError: naming ``name``, the value and the choices.
    """
    if value not in allowed:
        raise InputError(f"{name}={value!r} is not known: use {' or '.join(map(repr, allowed))}")
