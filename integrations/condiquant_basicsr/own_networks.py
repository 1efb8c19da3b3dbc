"""Networks of the user's own: a class in a Python file, whose code is run."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from basicsr.utils.registry import ARCH_REGISTRY
from torch import nn

from condiquant_plugin.errors import InputError

OWN_PACKAGE = "condiquant_own_"
"""How modules of users' files begin."""
_SOURCE = re.compile(r"(?P<file>.+\.py):(?P<name>[^\W\d]\w*)")
_BY_KEYWORD = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def is_own(kind: object) -> bool:
    """Whether the type of a network is written ``FILE.py:Class``."""
    return isinstance(kind, str) and ".py:" in kind


def code_file(kind: str) -> Path:
    """The file of ``FILE.py:Class``.

    Raises:
        InputError: it is not written so, or the file is not there.
    """
    path = Path(_parts(kind)[0]).expanduser()
    if not path.is_file():
        raise InputError(f"network_g.type={kind!r}: no such file: {path}")
    return path


def own_class(kind: str) -> Callable[..., nn.Module]:
    """What ``FILE.py:Class`` names, after the file has been run.

    The file may import its neighbours, by their names or relatively, and register architectures with
    BasicSR's registry, which stays as it was.

    Args:
        kind: a class, or a function that returns a network.

    Raises:
        InputError: no such file, code that fails, or nothing of the name in it.
    """
    path, name = code_file(kind).resolve(), _parts(kind)[1]
    try:
        with _separate_registry():
            module = _run(path)
    except (Exception, SystemExit) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(
            f"network_g.type={kind!r}: the code of {path.name} fails ({reason})"
        ) from error
    found = getattr(module, name, None)
    if not callable(found):
        classes = [
            key
            for key, value in vars(module).items()
            if isinstance(value, type)
            and issubclass(value, nn.Module)
            and value.__module__ == module.__name__
        ]
        raise InputError(
            f"network_g.type={kind!r}: {path.name} has no class {name}: use {_any_of(classes)}"
        )
    made: Callable[..., nn.Module] = found
    return made


def parameters(network_class: Callable[..., nn.Module]) -> set[str] | None:
    """Names of the arguments; ``None`` if any name is taken.

    A class that hands ``**kwargs`` on has its bases' arguments, too.
    """
    classes = inspect.getmro(network_class) if isinstance(network_class, type) else (network_class,)
    known: set[str] = set()
    for each in classes:
        if isinstance(each, type) and "__init__" not in vars(each):
            continue
        if each is nn.Module:
            break
        found = inspect.signature(each).parameters.values()
        known |= {p.name for p in found if p.kind in _BY_KEYWORD}
        if not any(p.kind is p.VAR_KEYWORD for p in found):
            return known
    return None


def _parts(kind: str) -> tuple[str, str]:
    match = _SOURCE.fullmatch(kind)
    if match is None:
        raise InputError(f"network_g.type={kind!r}: write FILE.py:Class")
    return match["file"], match["name"]


def _run(path: Path) -> ModuleType:
    """The module of a file, in a package of its own that has the file's folder."""
    content = hashlib.sha256(str(path).encode() + path.read_bytes()).hexdigest()[:16]
    package = ModuleType(f"{OWN_PACKAGE}{content}")
    package.__path__ = [str(path.parent)]
    sys.modules[package.__name__] = package
    sys.path.insert(0, str(path.parent))
    try:
        importlib.invalidate_caches()
        return importlib.import_module(f"{package.__name__}.{path.stem}")
    finally:
        sys.path.remove(str(path.parent))


@contextmanager
def _separate_registry() -> Iterator[None]:
    """An empty registry of architectures for a while: names in a file may be those of others."""
    before = ARCH_REGISTRY._obj_map
    ARCH_REGISTRY._obj_map = {}
    try:
        yield
    finally:
        ARCH_REGISTRY._obj_map = before


def _any_of(names: list[str]) -> str:
    return " or ".join(names) if names else "a file with one"
