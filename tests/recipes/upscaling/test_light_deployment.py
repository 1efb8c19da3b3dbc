import subprocess
import sys

import pytest
import torch

from condiquant_basicsr import write_image

_HEAVY = ("torch", "nncf", "basicsr", "brevitas", "spandrel", "torchvision")
_SCRIPT = f"""
import sys
from condiquant_recipes import cli

sys.argv = ["condiquant", *sys.argv[1:]]
try:
    cli.main()
except SystemExit as exit:
    assert not exit.code, exit.code
found = [name for name in {_HEAVY!r} if name in sys.modules]
assert not found, found
"""


@pytest.mark.parametrize("command", ["upscale", "inspect"])
def test_running_an_ir_loads_no_framework(finished_job, command):
    job = finished_job()
    write_image(job.folder / "low.png", torch.rand(3, 20, 30))
    arguments = {
        "upscale": [job.out, job.folder / "low.png", job.folder / "high.png", "-q"],
        "inspect": [job.out / "model.xml", "--layers"],
    }[command]
    ran = subprocess.run(
        [sys.executable, "-c", _SCRIPT, command, *map(str, arguments)],
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    assert (job.folder / "high.png").exists() == (command == "upscale")
