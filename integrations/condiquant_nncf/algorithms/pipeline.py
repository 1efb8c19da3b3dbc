"""Calibration image by image, so that results do not depend on how a dataset is batched."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import nncf
import numpy as np
from nncf.common.utils.backend import BackendType, get_backend
from nncf.quantization.algorithms.pipeline import Pipeline, PipelineStep
from torch import Tensor

_IMAGE_BATCH_DIMENSIONS = 4


class SingleImages(nncf.Dataset):
    """The images of a dataset one by one; items other than batches of images as they are."""

    def __init__(self, dataset: nncf.Dataset) -> None:
        super().__init__(dataset._data_source, dataset._transform_func)

    def get_inference_data(self, indices: list[int] | None = None) -> Iterable[Any]:
        """Batches of one image, in order."""
        return _images(super().get_inference_data(indices))

    def get_length(self) -> int | None:
        """Unknown before the items are read."""
        return None


def _images(items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        if isinstance(item, Tensor | np.ndarray) and item.ndim == _IMAGE_BATCH_DIMENSIONS:
            yield from (item[i : i + 1] for i in range(len(item)))
        else:
            yield item


class CalibrationPipeline(Pipeline):
    """CondiQuant's steps on single images, then NNCF's own on the items as they are."""

    def __init__(self, steps: Sequence[PipelineStep], following: Sequence[PipelineStep] = ()):
        super().__init__([*steps, *following])
        self._ours, self._following = Pipeline(list(steps)), Pipeline(list(following))

    def run(self, model: Any, dataset: nncf.Dataset) -> Any:
        """The model after all steps."""
        images = SingleImages(dataset) if _takes_single_images(model) else dataset
        return self._following.run(self._ours.run(model, images), dataset)


def _takes_single_images(model: Any) -> bool:
    """False for an ``ov.Model`` of another fixed batch size."""
    if get_backend(model) is not BackendType.OPENVINO:
        return True
    shapes = [port.get_partial_shape() for port in model.inputs]
    return all(s.rank.is_dynamic or len(s) == 0 or s[0].get_min_length() <= 1 for s in shapes)
