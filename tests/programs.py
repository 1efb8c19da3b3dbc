"""Programs that a test starts and that do not outlive it."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil


@contextmanager
def started(command: list, errors: Path, **options) -> Iterator[psutil.Popen]:
    """A program, killed with its children however the block ends; ``errors`` is its stderr.

    ``subprocess.Popen`` would wait for it there, and a pipe that nobody reads stop it.
    """
    with errors.open("w") as stderr:
        process = psutil.Popen([*map(str, command)], stderr=stderr, **options)
    try:
        yield process
    finally:
        family = [process, *process.children(recursive=True)] if process.is_running() else []
        for member in family:
            member.kill()
        process.wait()


def wait_for(condition: Callable[[], bool], process: psutil.Popen, seconds: float = 300) -> None:
    """Until ``condition`` holds, which must be before ``process`` ends."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.returncode
        assert time.monotonic() < end, f"not in {seconds} s"
        time.sleep(0.001)
