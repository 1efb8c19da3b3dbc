"""Calibration image by image, so that results do not depend on how a dataset is batched."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from itertools import islice
from statistics import mean
from typing import Any

import nncf
import numpy as np
from nncf.common.logging import nncf_logger
from nncf.common.utils.backend import BackendType, get_backend
from nncf.quantization.algorithms.pipeline import Pipeline, PipelineStep
from nncf.torch.function_hook.nncf_graph.nncf_graph_builder import GraphModelWrapper
from torch import Tensor, nn

from condiquant_nncf.algorithms.condiquant import CondiQuant
from condiquant_nncf.backends.choose import get_algo_backend
from condiquant_plugin.calibration import Calibration, fidelity_in_db, held_out
from condiquant_plugin.layerwise.problem import LayerReport

OfTorch = Callable[[GraphModelWrapper, nncf.Dataset], tuple[nn.Module, Calibration]]
_IMAGE_BATCH_DIMENSIONS = 4


class SingleImages(nncf.Dataset):
    """The images of a dataset one by one; items other than batches of images as they are.

    Args:
        splits: whether batches are taken apart.
        places: of the images that are left in; ``None`` leaves all.
    """

    def __init__(
        self,
        dataset: nncf.Dataset,
        *,
        splits: bool = True,
        places: Collection[int] | None = None,
    ) -> None:
        super().__init__(dataset._data_source, dataset._transform_func)
        self._splits, self._places = splits, places

    def get_inference_data(self, indices: list[int] | None = None) -> Iterable[Any]:
        """Batches of one image, in order."""
        items = super().get_inference_data(indices)
        images = _images(items) if self._splits else items
        if self._places is None:
            return images
        return (image for place, image in enumerate(images) if place in self._places)

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
    """CondiQuant's steps on single images, then NNCF's own on the items as they are.

    Args:
        steps: what every candidate goes by; they leave the model as it is, if there are several.
        candidates: further steps by name. Of several, what is closest to the float model stays, on
            every eighth of the images, which the steps do not see.
        following: on the whole dataset.
        subset_size: images of the dataset that count.
        of_torch: what replaces steps and candidates for a torch model; changes the one it is given.

    Attributes:
        chosen: name of the candidate whose result stayed in the last run.
        fidelity: of every candidate of that run, if there were several; see
            :class:`condiquant_plugin.calibration.Calibration`.
    """

    def __init__(
        self,
        steps: Sequence[PipelineStep],
        candidates: Mapping[str, Sequence[PipelineStep]],
        following: Sequence[PipelineStep] = (),
        *,
        subset_size: int,
        of_torch: OfTorch | None = None,
    ) -> None:
        first = next(iter(candidates.values()), ())
        super().__init__([*steps, *first, *following])
        self._common, self._following = Pipeline(list(steps)), Pipeline(list(following))
        self._candidates = {name: Pipeline(list(own)) for name, own in candidates.items()}
        self._subset_size, self._of_torch = subset_size, of_torch
        self.chosen, self.fidelity = next(iter(candidates), ""), dict[str, float]()
        self._reports: list[LayerReport] | None = None

    def steps_taken(self) -> list[PipelineStep]:
        """Those whose result stayed; of a torch model that was calibrated without steps what follows."""
        if self._reports is not None:
            return list(self._following.pipeline_steps)
        own = self._candidates[self.chosen].pipeline_steps if self._candidates else []
        return [*self._common.pipeline_steps, *own, *self._following.pipeline_steps]

    @property
    def reports(self) -> list[LayerReport]:
        """What became of the layers' weights in the last run."""
        if self._reports is not None:
            return self._reports
        algorithms = [algorithm for step in self.steps_taken() for algorithm in step]
        return [r for a in algorithms if isinstance(a, CondiQuant) for r in a.reports]

    def run(self, model: Any, dataset: nncf.Dataset) -> Any:
        """The model after all steps; a torch model is left untouched if it is calibrated without steps.

        Raises:
            InputError: what the steps do, or :func:`condiquant_nncf.quantize_network`.
        """
        self._reports, self.chosen, self.fidelity = None, next(iter(self._candidates), ""), {}
        if self._of_torch is not None and get_backend(model) is BackendType.TORCH:
            wrapped = deepcopy(model)
            wrapped.model, found = self._of_torch(wrapped, dataset)
            self._reports, self.chosen, self.fidelity = found.reports, found.chosen, found.fidelity
            return self._following.run(wrapped, dataset)
        splits = _takes_single_images(model)
        images = SingleImages(dataset, splits=splits)
        if len(self._candidates) < 2:
            result = self._common.run(model, images)
            for pipeline in self._candidates.values():
                result = pipeline.run(result, images)
        else:
            count = sum(1 for _ in islice(images.get_inference_data(), self._subset_size))
            kept, chosen = held_out(count)
            seen, unseen = (SingleImages(dataset, splits=splits, places=p) for p in (kept, chosen))
            result = self._chosen(self._common.run(model, seen), seen, unseen)
        return self._following.run(result, dataset)

    def _chosen(self, model: Any, seen: nncf.Dataset, unseen: nncf.Dataset) -> Any:
        before = get_algo_backend(model)
        targets = before.outputs(unseen.get_inference_data())
        best = None
        for name, pipeline in self._candidates.items():
            result = pipeline.run(before.copy_of_model(), seen)
            outputs = get_algo_backend(result).outputs(unseen.get_inference_data())
            pairs = zip(outputs, targets, strict=True)
            self.fidelity[name] = mean(fidelity_in_db(output, target) for output, target in pairs)
            if self.fidelity[name] == max(self.fidelity.values()):
                self.chosen, best = name, result
        nncf_logger.info(f"chose {self.chosen} of {self.fidelity} (dB, held-out images)")
        return best


def _takes_single_images(model: Any) -> bool:
    """False for an ``ov.Model`` of another fixed batch size."""
    if get_backend(model) is not BackendType.OPENVINO:
        return True
    shapes = [port.get_partial_shape() for port in model.inputs]
    return all(s.rank.is_dynamic or len(s) == 0 or s[0].get_min_length() <= 1 for s in shapes)
