import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

settings.register_profile("tests", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("tests")


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder with Set5, Set14, B100 and calibration images, named by CONDIQUANT_DATA."""
    folder = os.environ.get("CONDIQUANT_DATA")
    if not folder:
        pytest.skip("set CONDIQUANT_DATA to a folder with Set5/HR and calibration images")
    return Path(folder)
