import openvino as ov
import pytest
import torch
from hypothesis import settings

settings.register_profile("tests", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("tests")

_create_core = ov.Core.__init__


def _one_thread_on_any_core(core: ov.Core, *arguments: str) -> None:
    """By default the plugin of every pytest worker pins its threads to the same cores."""
    _create_core(core, *arguments)
    core.set_property("CPU", {"INFERENCE_NUM_THREADS": 1, "ENABLE_CPU_PINNING": False})


ov.Core.__init__ = _one_thread_on_any_core


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)
