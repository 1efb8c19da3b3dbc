"""Layers solved block by block: one block's moments in memory, whatever the depth of the network.

Beside the network, the peak is: what one block computes of one batch; the moments of one block's layers,
``f**2 + f`` numbers of a layer with ``f`` features, ``3 f**2 + 2 f`` with quantized inputs; and 256 MiB for
the inputs of one block for all batches (twice that where quantized inputs are fitted to float ones): what
they take more lies on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from condiquant_plugin.errors import InputError, check_choice
from condiquant_plugin.forward_pass import run as run_model
from condiquant_plugin.layerwise import distributed
from condiquant_plugin.layerwise.chain import check_chain, equal_arguments, first_of
from condiquant_plugin.layerwise.collecting import (
    Collector,
    ReachedError,
    observed,
    share_equal,
)
from condiquant_plugin.layerwise.moments import LayerGeometry, Moments
from condiquant_plugin.layerwise.problem import (
    LayerProblem,
    LayerReport,
    Method,
    Solution,
    fused_blocks,
)
from condiquant_plugin.layerwise.shelf import Shelf

LAYERS = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
"""Modules whose weights a method can solve."""
Inputs = Literal["original", "compressed"]
"""Whose values a layer is solved on: the network as it came, or with all blocks before compressed."""


def module_geometry(module: nn.Module) -> LayerGeometry:
    """Geometry of one of :data:`LAYERS`.

    Raises:
        InputError: a convolution that pads by its input's size.
    """
    layer: Any = module
    if isinstance(layer, nn.Linear):
        return LayerGeometry()
    if isinstance(layer.padding, str):
        if layer.padding != "valid":
            raise InputError(f'{layer} has padding="{layer.padding}": give the padding as numbers')
        padding = (0,) * len(layer.kernel_size)
    else:
        padding = layer.padding
    return LayerGeometry(
        "conv_transpose" if layer.transposed else "conv",
        layer.kernel_size,
        layer.stride,
        padding,
        layer.output_padding,
        layer.dilation,
        layer.groups,
        layer.padding_mode,
    )


def find_blocks(model: nn.Module) -> list[str]:
    """The blocks of a network: children of the list of modules that holds most layers, first to last
    that has any.

    Raises:
        InputError: no layer lies in an ``nn.ModuleList`` or ``nn.Sequential``.
    """
    lists: dict[tuple[int, int], list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList | nn.Sequential):
            held = {c: len(_layers(block)) for c, block in module._modules.items() if block}
            places = [i for i, count in enumerate(held.values()) if count]
            children = list(held)[places[0] : places[-1] + 1] if places else []
            blocks = [f"{name}.{child}".removeprefix(".") for child in children]
            # Of lists that hold as much, the one of most blocks.
            lists.setdefault((sum(held.values()), len(places)), blocks)
    if not lists or not max(lists)[0]:
        raise InputError(
            f"{type(model).__name__} has no list of blocks with linear layers or convolutions"
        )
    return lists[max(lists)]


def write_dense(layer: nn.Module, solution: Solution) -> None:
    """Put a solution's dense weight, and its bias if it has one, into ``layer``."""
    with torch.no_grad():
        layer.weight.copy_(solution.weight)  # type: ignore[operator]
        if solution.bias is not None:
            layer.bias.copy_(solution.bias)  # type: ignore[operator]


@torch.no_grad()
def solve_block_by_block(
    model: nn.Module,
    batches: Iterable[Any],
    method: Method,
    *,
    blocks: Sequence[str] | None = None,
    is_excluded: Callable[[str], bool] = lambda name: False,
    inputs: Inputs = "compressed",
    input_quantizers: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
    write: Callable[[nn.Module, Solution], None] = write_dense,
    progress: Callable[[str], object] | None = None,
) -> dict[str, LayerReport]:
    """Solve the layers of a chain of blocks and change them in place, block after block.

    All layers of a block are solved on what that block computes before any of them is changed. Layers
    outside the blocks stay as they are. Under ``torch.distributed`` all processes call this with the
    same network and batches, share the work and end with the same weights.

    Args:
        model: in the mode to be run in, with blocks that follow one another: each takes as its first
            argument what the one before returns (or its first element), and all take the same others.
        batches: a tensor, or a tuple of positional or a dict of keyword arguments of ``model`` each.
        blocks: module names in their order; by default :func:`find_blocks`.
        is_excluded: whether a layer, by its name, stays as it is.
        inputs: see :data:`Inputs`. A method that needs quantized inputs is given the original network's
            as float ones and, with ``"compressed"``, the compressed network's as quantized ones.
        input_quantizers: what quantizes the input of a layer in the compressed network, by name.
        write: puts a solution into its layer.
        progress: called with the name of each block when it is done.

    Returns:
        Report of every layer that was solved, by name.

    Raises:
        InputError: no layers or batches; an unknown block, or blocks that are not such a chain; a layer
            that is not called; NaN or Inf in inputs or weights.
        DistributedError: another process ended or failed.
    """
    check_choice("inputs", inputs, get_args(Inputs))
    names = list(find_blocks(model) if blocks is None else blocks)
    known = dict(model.named_modules())
    for name in names:
        if name not in known:
            raise InputError(f"there is no module {name!r} in {type(model).__name__}")
    batches = list(batches)
    if not batches:
        raise InputError("there are no batches to calibrate with: give at least one")
    mine = distributed.share(batches)
    with distributed.failing_together("reading the blocks"):
        check_chain(model, names, batches[0])
        run = _Run(method, inputs, input_quantizers or {})
        for batch in mine:
            run.add(_call_of(model, names[0], batch))
    reports: dict[str, LayerReport] = {}
    for name in names:
        block = model.get_submodule(name)
        layers = {
            full: layer for full, layer in _layers(block, name).items() if not is_excluded(full)
        }
        with distributed.failing_together(f"collecting moments of {name}"):
            moments = run.collect(block, layers)
        distributed.all_reduce(moments.values())
        for full, seen in moments.items():
            if not seen.samples:
                raise InputError(f"{full} is not called by its block as a module: exclude it")
        share_equal(moments)
        problems = [_problem(full, layer, moments.pop(full)) for full, layer in layers.items()]
        for layer, solution in zip(
            layers.values(), distributed.solve(problems, method), strict=True
        ):
            write(layer, solution)
            reports[solution.report.name] = solution.report
        del problems
        if name != names[-1]:
            run.advance(block, layers)
        if progress is not None:
            progress(name)
    if not reports:
        raise InputError(f"no layer of {', '.join(names)} is left to solve: check is_excluded")
    return reports


def _layers(block: nn.Module, prefix: str = "") -> dict[str, nn.Module]:
    found = ((f"{prefix}.{n}".strip("."), m) for n, m in block.named_modules())
    return {name: module for name, module in found if isinstance(module, LAYERS)}


def _problem(name: str, layer: Any, moments: Moments) -> LayerProblem:
    bias = None if layer.bias is None else layer.bias.detach()
    weight = layer.weight.detach()
    blocks = fused_blocks(name, weight.shape[0]) if isinstance(layer, nn.Linear) else 1
    return LayerProblem(name, weight, bias, moments, module_geometry(layer), blocks)


@dataclass
class _Call:
    """A block's arguments for one batch."""

    hidden: Tensor
    others: tuple[Any, ...]
    keywords: dict[str, Any]

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        return first_of(block(hidden, *self.others, **self.keywords))


class _Run:
    """The inputs of the current block, and what is collected there."""

    def __init__(
        self,
        method: Method,
        inputs: Inputs,
        quantizers: Mapping[str, Callable[[Tensor], Tensor]],
    ) -> None:
        self.method, self.quantizers = method, quantizers
        self.follows_compressed = inputs == "compressed"
        self.needs_both = self.follows_compressed and method.needs_quantized_inputs
        self.arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.hidden, self.originals = Shelf(), Shelf()

    def add(self, call: _Call) -> None:
        """A batch."""
        number, arguments = len(self.arguments), (call.others, call.keywords)
        if number and equal_arguments(tree_flatten(arguments), tree_flatten(self.arguments[0])):
            arguments = self.arguments[0]  # position embeddings, masks: once for all batches
        self.arguments.append(arguments)
        self.hidden.put(number, call.hidden)
        if self.needs_both:
            self.originals.put(number, call.hidden)

    def calls(self) -> Iterator[tuple[int, _Call]]:
        """Arguments of the current block, batch by batch."""
        for number, (others, keywords) in enumerate(self.arguments):
            yield number, _Call(self.hidden.get(number), others, keywords)

    def collect(self, block: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, Moments]:
        """Moments of this process' batches."""
        quantized = self.method.needs_quantized_inputs
        collector = Collector(
            layers,
            {name: module_geometry(layer) for name, layer in layers.items()},
            dtype=self.method.moments_dtype,
            quantized=quantized,
        )
        for number, call in self.calls():
            floats: dict[str, list[Tensor]] = {name: [] for name in layers}
            if self.needs_both:
                with observed(layers, partial(_keep, floats)):
                    self.originals.put(number, call.run(block, self.originals.get(number)))

            def add(name: str, x: Tensor, floats: dict[str, list[Tensor]] = floats) -> None:
                original = floats[name].pop(0) if self.needs_both else x
                collector.add(name, original, self._quantized(name, x) if quantized else None)
                if self.follows_compressed and collector.has_all:
                    raise ReachedError

            collector.next_batch(call.hidden.numel())
            if layers or not self.follows_compressed:
                with suppress(ReachedError), observed(layers, add), self._quantizing(layers):
                    output = call.run(block, call.hidden)
                if not self.follows_compressed:
                    self.hidden.put(number, output)
        return collector.moments

    def advance(self, block: nn.Module, layers: Mapping[str, nn.Module]) -> None:
        """To the inputs of the next block, past the compressed one."""
        if self.follows_compressed:
            for number, call in self.calls():
                with self._quantizing(layers):
                    self.hidden.put(number, call.run(block, call.hidden))

    def _quantized(self, name: str, x: Tensor) -> Tensor:
        return self.quantizers[name](x) if name in self.quantizers else x

    @contextmanager
    def _quantizing(self, layers: Mapping[str, nn.Module]) -> Iterator[None]:
        """Input quantizers at work, in the compressed network."""

        def quantize(
            name: str, _module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]
        ) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
            if args:
                return (self._quantized(name, args[0]), *args[1:]), kwargs
            return args, kwargs | {"input": self._quantized(name, kwargs["input"])}

        active = layers if self.follows_compressed else {}
        hooks = [
            layer.register_forward_pre_hook(partial(quantize, name), with_kwargs=True)
            for name, layer in active.items()
            if name in self.quantizers
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _keep(kept: dict[str, list[Tensor]], name: str, x: Tensor) -> None:
    kept[name].append(x)


def _call_of(model: nn.Module, first: str, batch: Any) -> _Call:
    found: list[_Call] = []

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(_Call(args[0], args[1:], kwargs))
        raise ReachedError

    handle = model.get_submodule(first).register_forward_pre_hook(stop, with_kwargs=True)
    try:
        run_model(model, batch)
    except ReachedError:
        pass
    finally:
        handle.remove()
    return found[0]
