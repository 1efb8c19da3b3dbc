"""Each claim needs a fresh interpreter, in which nothing has been imported yet."""

import subprocess
import sys
from pathlib import Path

import pytest


def _run(code: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True
    )


def test_import_heals_torchvision_for_basicsr_and_spandrel():
    result = _run(
        "import condiquant_basicsr, torch\n"
        "from condiquant_basicsr import compatibility\n"
        "compatibility.heal()\n"
        "from torchvision.transforms.functional_tensor import rgb_to_grayscale\n"
        "assert rgb_to_grayscale(torch.rand(1, 3, 4, 4)).shape == (1, 1, 4, 4)\n"
        "assert torch.ops.torchvision.nms.default and torch.ops.torchvision.qnms\n"
        "import basicsr.data.degradations, spandrel, torchvision.ops\n"
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("other", ["basicsr", "spandrel", "torchvision"])
def test_import_heals_after_another_has_failed(other):
    result = _run(
        f"try:\n    import {other}\nexcept (ImportError, RuntimeError):\n    pass\n"
        "import condiquant_basicsr, basicsr, spandrel, torchvision.ops\n"
        "assert condiquant_basicsr.build_network({'type': 'EDSR', 'num_in_ch': 3, 'num_out_ch': 3})\n"
    )
    assert result.returncode == 0, result.stderr


def test_the_training_job_of_the_tests_imports_alone():
    tests = str(Path(__file__).parents[1])
    result = _run(f"import sys; sys.path.insert(0, {tests!r}); import training_job")
    assert result.returncode == 0, result.stderr
