"""Latency and throughput of several IRs, paired: they take turns, so that drift hits all alike."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf, lcm
from time import perf_counter
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from condiquant_openvino.running.execution import int8_share, layer_executions
from condiquant_openvino.running.reading import read_ir, read_metadata
from condiquant_openvino.running.upscaling import compile_ir, next_multiple
from condiquant_plugin import InputError

_WARM_UP, _ROUNDS, _SIDE = 3, 8, 64
_HINTS = ("latency", "throughput", "none")
_PRECISIONS = ("f32", "bf16", "f16")
IrPath = str | os.PathLike[str]


@dataclass(frozen=True)
class _Candidate:
    """An IR and what to run it on."""

    path: IrPath
    model: ov.Model
    image: NDArray

    @property
    def is_dynamic(self) -> bool:
        return bool(self.model.inputs[0].get_partial_shape().is_dynamic)

    def compile(self, device: str, precision: str, hint: str | None) -> ov.CompiledModel:
        """Compile and run once.

        Raises:
            InputError: no such device, or a size that the network cannot take.
        """
        properties = {"INFERENCE_PRECISION_HINT": precision}
        if hint is not None:
            properties["PERFORMANCE_HINT"] = hint.upper()
        compiled = compile_ir(self.model, device, properties)
        with _taking(self.path, self.image.shape):
            # Inference with one thread does not refuse a wrong shape, or ends the process.
            self.model.clone().reshape(list(self.image.shape))
            compiled.create_infer_request().infer([self.image])
        return compiled


def compare_latency(
    models: Mapping[str, IrPath],
    shape: Sequence[int] | None = None,
    *,
    data_shape: Sequence[int] | None = None,
    iterations: int = 30,
    duration: float = 3.0,
    hint: str | None = None,
    device: str = "CPU",
    precision: str = "f32",
) -> dict[str, dict[str, Any]]:
    """Measure IRs against each other, one image at a time and with requests in flight.

    Latency: every iteration runs each of them once, under ``PERFORMANCE_HINT=LATENCY``. Throughput:
    they take turns in short rounds of as many parallel requests as OpenVINO finds best under
    ``PERFORMANCE_HINT=THROUGHPUT``.

    Args:
        models: IR path by name, of any tool; the first is the reference. Float or u8 images, NCHW
            or NHWC.
        shape: ``(1, 3, height, width)``, or ``(1, height, width, 3)``, to make every dynamic IR
            static with, as benchmark_app does.
        data_shape: of the images given to dynamic IRs that stay dynamic, instead of ``shape``. By
            default that of the static IRs, else about 64x64.
        iterations: of the latency measurement.
        duration: seconds of the throughput measurement, for each IR.
        hint: ``"latency"`` or ``"throughput"`` measures only that, ``"none"`` both with the
            device's own settings.
        precision: of the float operators: ``"f32"``, ``"bf16"`` or ``"f16"``.

    Returns:
        For each name ``shape`` (of the input), ``dynamic``; ``median_ms``, ``p10_ms``, ``p90_ms``,
        ``ratio`` (median over the iterations of its time over the reference's), ``iteration_ms``
        (one time per iteration, paired by index with those of the others);
        ``frames_per_second`` (median over the rounds), ``throughput_ratio`` (likewise, its over the
        reference's); ``precisions`` (number of products by precision), ``int8_share`` (of them) and
        ``layers`` (:func:`layer_executions`), empty on other devices than the CPU. None for what is
        not measured.

    Raises:
        InputError: on a file that is no IR, an unknown device or hint, or a shape that an IR or its
            windows cannot take.
    """
    if hint is not None and hint not in _HINTS:
        raise InputError(f"hint {hint!r} is not known: use one of {', '.join(_HINTS)}")
    if precision not in _PRECISIONS:
        raise InputError(f"precision {precision!r} is not known: use {', '.join(_PRECISIONS)}")
    if iterations < 1:
        raise InputError(f"{iterations} iterations measure nothing: use 1 or more")
    if not 0 < duration < inf:
        raise InputError(f"{duration} s cannot be measured: use a number above 0")
    candidates = _candidates(models, shape, data_shape)
    found: dict[str, dict[str, Any]] = {
        name: {"shape": list(candidate.image.shape), "dynamic": candidate.is_dynamic}
        | dict.fromkeys(("median_ms", "p10_ms", "p90_ms", "ratio", "iteration_ms"))
        | dict.fromkeys(("frames_per_second", "throughput_ratio"))
        for name, candidate in candidates.items()
    }
    images = {name: candidate.image for name, candidate in candidates.items()}
    for kind in [k for k in ("latency", "throughput") if hint in {None, "none", k}]:
        compiled = {
            name: candidate.compile(device, precision, None if hint == "none" else kind)
            for name, candidate in candidates.items()
        }
        if kind == "latency":
            figures = _measure_latency(compiled, images, iterations)
        else:
            figures = _measure_throughput(compiled, images, duration)
        for name, network in compiled.items():
            found[name] |= figures[name] | _execution(candidates[name].model, network)
    return found


def _execution(model: ov.Model, compiled: ov.CompiledModel) -> dict[str, Any]:
    on_cpu = compiled.get_property("EXECUTION_DEVICES") == ["CPU"]
    layers = layer_executions(model, compiled) if on_cpu else []
    return {
        "precisions": dict(Counter(layer.runs_as for layer in layers)),
        "int8_share": int8_share(layers) if on_cpu else None,
        "layers": layers,
    }


def _measure_latency(
    compiled: Mapping[str, ov.CompiledModel], images: Mapping[str, NDArray], iterations: int
) -> dict[str, dict[str, Any]]:
    requests = {name: network.create_infer_request() for name, network in compiled.items()}
    seconds: dict[str, list[float]] = {name: [] for name in compiled}
    for iteration in range(-_WARM_UP, iterations):
        for name, request in requests.items():
            start = perf_counter()
            request.infer([images[name]], share_inputs=True, share_outputs=True)
            if iteration >= 0:
                seconds[name].append(perf_counter() - start)
    times = {name: 1e3 * np.array(values) for name, values in seconds.items()}
    reference = next(iter(times.values()))
    return {
        name: {
            "median_ms": float(np.median(ms)),
            "p10_ms": float(np.percentile(ms, 10)),
            "p90_ms": float(np.percentile(ms, 90)),
            "ratio": float(np.median(ms / reference)),
            "iteration_ms": ms.tolist(),
        }
        for name, ms in times.items()
    }


def _measure_throughput(
    compiled: Mapping[str, ov.CompiledModel], images: Mapping[str, NDArray], duration: float
) -> dict[str, dict[str, float]]:
    queues = {name: ov.AsyncInferQueue(network) for name, network in compiled.items()}

    def frames_per_second(name: str, turns: int) -> float:
        """Every request gets as many images: none idles long at the end."""
        queue, image = queues[name], images[name]
        start = perf_counter()
        for _ in range(turns * len(queue)):
            queue.start_async([image], share_inputs=True)
        queue.wait_all()
        return turns * len(queue) * image.shape[0] / (perf_counter() - start)

    turns = {}
    for name, queue in queues.items():
        frames_per_second(name, 1)
        seconds = len(queue) * images[name].shape[0] / frames_per_second(name, 1)
        turns[name] = max(round(duration / _ROUNDS / seconds), 1)
    rounds = [
        {name: frames_per_second(name, turns[name]) for name in queues} for _ in range(_ROUNDS)
    ]
    reference = next(iter(queues))
    return {
        name: {
            "frames_per_second": float(np.median([r[name] for r in rounds])),
            "throughput_ratio": float(np.median([r[name] / r[reference] for r in rounds])),
        }
        for name in queues
    }


def _candidates(
    models: Mapping[str, IrPath], shape: Sequence[int] | None, data_shape: Sequence[int] | None
) -> dict[str, _Candidate]:
    if shape is not None and data_shape is not None:
        raise InputError("shape and data shape exclude each other: give one of them")
    given = shape if shape is not None else data_shape
    irs = {name: read_ir(path) for name, path in models.items()}
    wanted = _wanted_shape(given, irs, models)
    candidates = {}
    for name, ir in irs.items():
        path, port = models[name], ir.inputs[0]
        own = _as_nhwc(wanted) if _is_nhwc(port.get_partial_shape()) else wanted
        if not port.get_partial_shape().compatible(ov.PartialShape(list(own))):
            raise InputError(
                f"{path} takes images of shape {port.get_partial_shape()}, not {_text(own)}: "
                "give a shape that it takes, or export it for this one"
            )
        multiple, sizes = _pad_multiple(ir), wanted[2:]
        if any(size % multiple for size in sizes):
            nearest = [next_multiple(size, multiple) for size in sizes]
            raise InputError(
                f"{path} takes no images of {sizes[0]}x{sizes[1]}: its windows need multiples of "
                f"{multiple}, such as {nearest[0]}x{nearest[1]}"
            )
        if shape is not None and port.get_partial_shape().is_dynamic:
            with _taking(path, own):
                ir.reshape(list(own))
        candidates[name] = _Candidate(path, ir, _image(own, port.get_element_type()))
    return candidates


def _wanted_shape(
    given: Sequence[int] | None, irs: Mapping[str, ov.Model], paths: Mapping[str, IrPath]
) -> tuple[int, ...]:
    """Shape of the images in NCHW order."""
    shapes: dict[IrPath, ov.PartialShape] = {}
    for name, ir in irs.items():
        shape = ir.inputs[0].get_partial_shape() if len(ir.inputs) == 1 else None
        if shape is None or shape.rank.is_dynamic or len(shape) != 4:
            inputs = ", ".join(str(port.get_partial_shape()) for port in ir.inputs)
            raise InputError(f"{paths[name]} takes {inputs}: give an IR that takes one image")
        shapes[paths[name]] = shape
    if given is not None:
        if len(given) != 4 or min(given) < 1:
            raise InputError(f"shape {_text(given)} is no image: use 1,3,height,width")
        return _as_nchw(given)
    side = next_multiple(_SIDE, lcm(*(_pad_multiple(ir) for ir in irs.values())))
    wanted = []
    for axis, size in enumerate((1, 3, side, side)):
        sizes = (_sizes(shape)[axis] for shape in shapes.values())
        fixed = {size for size in sizes if size is not None}
        if len(fixed) > 1:
            found = ", ".join(f"{path} takes {shape}" for path, shape in shapes.items())
            raise InputError(f"{found}: compare IRs that take the same shape")
        wanted.append(next(iter(fixed), size))
    return tuple(wanted)


def _sizes(shape: ov.PartialShape) -> list[int | None]:
    """In NCHW order; None where dynamic."""
    sizes = [size.get_length() if size.is_static else None for size in shape]
    return [sizes[axis] for axis in ((0, 3, 1, 2) if _is_nhwc(shape) else range(4))]


def _pad_multiple(ir: ov.Model) -> int:
    return int(read_metadata(ir).get("pad_multiple", 1))


def _is_nhwc(shape: ov.PartialShape) -> bool:
    return bool(shape[3] == 3 and not (shape[1].is_static and shape[1] == 3))


def _as_nchw(shape: Sequence[int]) -> tuple[int, ...]:
    batch, *image = shape
    return (batch, image[2], *image[:2]) if image[2] == 3 != image[0] else (batch, *image)


def _as_nhwc(shape: Sequence[int]) -> tuple[int, ...]:
    batch, channels, height, width = shape
    return batch, height, width, channels


def _image(shape: Sequence[int], element_type: ov.Type) -> NDArray:
    pixels = np.random.default_rng(0).random(tuple(shape), dtype=np.float32)
    if element_type.is_integral():
        pixels = np.floor(pixels * 256)
    return pixels.astype(element_type.to_dtype())


def _text(shape: Sequence[int]) -> str:
    return f"[{','.join(map(str, shape))}]"


@contextmanager
def _taking(path: IrPath, shape: Sequence[int]) -> Iterator[None]:
    """OpenVINO's refusal of a shape in one line."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise InputError(
            f"{path} cannot take images of shape {_text(shape)} ({reason}): "
            "give a shape that fits its windows"
        ) from error
