"""``condiquant`` in this process."""

import sys

import pytest

from condiquant_recipes import cli


def fails(capsys, monkeypatch, *arguments) -> str:
    """The error line of ``condiquant ARGUMENTS``, which must exit with code 2."""
    monkeypatch.setattr(sys, "argv", ["condiquant", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_info:
        cli.main()
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    errors = [i for i, line in enumerate(lines) if line.startswith("condiquant: error: ")]
    assert exit_info.value.code == 2, captured.err
    assert errors == [len(lines) - 1]
    assert "Traceback" not in captured.err
    return lines[-1]
