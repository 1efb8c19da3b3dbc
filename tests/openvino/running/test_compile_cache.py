import os

import numpy as np
import openvino as ov
import openvino.opset13 as ops
import pytest

from condiquant_openvino import Upscaler, save
from condiquant_openvino.running.compile_cache import cache_properties
from condiquant_plugin import InputError


def save_factor(path, factor):
    """A network that multiplies."""
    x = ops.parameter(ov.PartialShape([1, 3, -1, -1]), np.float32)
    kernel = np.zeros((3, 3, 1, 1), np.float32)
    kernel[range(3), range(3)] = factor
    y = ops.convolution(x, ops.constant(kernel), [1, 1], [0, 0], [0, 0], [1, 1])
    save(ov.Model([y], [x]), path)
    return path


def output(path, folder):
    properties = cache_properties(path, folder)
    upscaler = Upscaler(path, properties=properties)
    loaded = upscaler._network.get_property("LOADED_FROM_CACHE")
    return float(upscaler(np.ones((3, 4, 4), np.float32)).mean()), loaded


def test_the_second_time_it_is_not_compiled(tmp_path):
    path, cache = save_factor(tmp_path / "model.xml", 2), tmp_path / "cache"
    assert output(path, cache) == (2, False)
    assert output(path, cache) == (2, True)


def test_another_network_under_the_same_name_is_compiled(tmp_path):
    path, cache = tmp_path / "model.xml", tmp_path / "cache"
    for factor in (2, 3):
        save_factor(path, factor)
        os.utime(path, (0, 0))
        assert output(path, cache) == (factor, False)


def test_a_half_written_cache_is_compiled_again(tmp_path):
    path, cache = save_factor(tmp_path / "model.xml", 2), tmp_path / "cache"
    output(path, cache)
    (blob,) = cache.glob("*/*.blob")
    blob.chmod(0o600)
    blob.write_bytes(blob.read_bytes()[:50])
    assert output(path, cache) == (2, False)


def test_the_last_eight_are_kept(tmp_path):
    (tmp_path / "of somebody else").mkdir()
    folders = []
    for factor in range(10):
        path = save_factor(tmp_path / f"{factor}.xml", factor)
        folders.append(cache_properties(path, tmp_path / "cache")["CACHE_DIR"])
        os.utime(folders[-1], (factor, factor))
    assert [os.path.exists(folder) for folder in folders] == [False] * 2 + [True] * 8


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    path = save_factor(tmp_path / "model.xml", 2)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot write to the cache .*file.*--cache"):
        cache_properties(path, tmp_path / "file")
    monkeypatch.delenv("CONDIQUANT_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert cache_properties(path) == {}
    monkeypatch.setenv("CONDIQUANT_CACHE", str(tmp_path / "elsewhere"))
    assert cache_properties(path)["CACHE_DIR"].startswith(str(tmp_path / "elsewhere"))
