"""The rows of ``condiquant compare-weights``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from condiquant_plugin.compression import CompressionConfig, Mode
from condiquant_plugin.errors import InputError
from condiquant_plugin.layerwise.blocks import Inputs

Group = Literal["float", "nncf-weights", "gptq", "low-rank", "one-bit", "pruned"]
GROUPS: dict[Group, str] = {
    "float": "Float",
    "nncf-weights": "NNCF",
    "gptq": "GPTQ",
    "low-rank": "Low rank",
    "one-bit": "One bit",
    "pruned": "N of every M",
}
_RATIOS, _BITS = (0.8, 0.6, 0.4), (4, 3, 2)
_PATTERNS = ((6, 8), (5, 8), (4, 8))
_ONE_BIT: dict[Mode, str] = {"billm": "BiLLM", "arb": "ARB", "arb_x": "ARB-X", "arb_rc": "ARB-RC"}
_RANK = 32


@dataclass(frozen=True)
class WeightContender:
    """What makes an IR of the float network; with neither of the two it stays float."""

    id: str
    label: str
    group: Group
    config: CompressionConfig | None = None
    nncf: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of ``nncf.compress_weights``."""


def all_contenders(
    group_size: int = 64, inputs: Inputs = CompressionConfig.inputs
) -> list[WeightContender]:
    """Every row, in the order of the table.

    Args:
        group_size: of all methods that have one.
        inputs: what this project's methods are solved on.

    Raises:
        InputError: one of them that is not allowed.
    """
    found = [
        WeightContender("float", "float", "float"),
        *_nncf(group_size),
        *_low_rank(),
        *_own(group_size),
    ]
    return [
        c if c.config is None else replace(c, config=replace(c.config, inputs=inputs))
        for c in found
    ]


def choose(contenders: Iterable[WeightContender], ids: Iterable[str]) -> list[WeightContender]:
    """Those named, in the order of the table, the float network first; all where none is named.

    Raises:
        InputError: an unknown id.
    """
    found, wanted = list(contenders), set(ids)
    known = [contender.id for contender in found]
    if unknown := sorted(wanted - set(known)):
        raise InputError(f"methods: there is no {', '.join(unknown)}; use {', '.join(known)}")
    return [c for c in found if not wanted or c.id in wanted or c.group == "float"]


def _nncf(group_size: int) -> Iterator[WeightContender]:
    int4 = {"mode": "int4_sym", "group_size": group_size, "ratio": 1.0}
    yield WeightContender("nncf-int8", "NNCF INT8_ASYM", "nncf-weights", nncf={"mode": "int8_asym"})
    yield WeightContender("nncf-int4", "NNCF INT4_SYM", "nncf-weights", nncf=int4)
    for name, key in (("AWQ", "awq"), ("scale estimation", "scale_estimation"), ("GPTQ", "gptq")):
        extra = {key: True, "dataset": True}
        label = f"NNCF INT4_SYM, {name}"
        yield WeightContender(
            f"nncf-int4-{key.partition('_')[0]}", label, "nncf-weights", nncf=int4 | extra
        )
    for mode in ("nf4", "int2_sym"):
        settings = int4 | {"mode": mode}
        name = f"nncf-{mode.removesuffix('_sym')}"
        yield WeightContender(name, f"NNCF {mode.upper()}", "nncf-weights", nncf=settings)


def _low_rank() -> Iterator[WeightContender]:
    for ratio in _RATIOS:
        kept = f"{ratio:.0%} of the parameters"
        alike = CompressionConfig("adasvd", ratio, adaptive=False)
        plain = CompressionConfig("adasvd", ratio, adaptive=False, rounds=0)
        yield WeightContender(f"svd-{ratio}", f"plain SVD, {kept}", "low-rank", plain)
        yield WeightContender(f"whitened-{ratio}", f"whitened SVD, {kept}", "low-rank", alike)
        yield WeightContender(
            f"adasvd-{ratio}", f"AdaSVD, {kept}", "low-rank", CompressionConfig("adasvd", ratio)
        )


def _own(group_size: int) -> Iterator[WeightContender]:
    def made(mode: Mode, **settings: Any) -> CompressionConfig:
        return CompressionConfig(mode, group_size=group_size, **settings)

    for bits in _BITS:
        yield WeightContender(f"gptq-{bits}", f"GPTQ, {bits} bits", "gptq", made("gptq", bits=bits))
    low = made("gptq", bits=2, residual_rank=_RANK)
    yield WeightContender(f"gptq-2-rank-{_RANK}", f"GPTQ, 2 bits, rank {_RANK} beside", "gptq", low)
    plain = made("rounding", compensation="none")
    yield WeightContender("rounding", "rounding to signs", "one-bit", plain)
    for mode, label in _ONE_BIT.items():
        yield WeightContender(mode, label, "one-bit", made(mode))
        with_bitmaps = made(mode, bitmaps=True)
        yield WeightContender(f"{mode}-bitmaps", f"{label}, bitmaps", "one-bit", with_bitmaps)
    theirs = made("billm", bitmaps=True, compensation="billm")
    yield WeightContender("billm-own", "BiLLM, bitmaps, its compensation", "one-bit", theirs)
    low = made("arb_rc", residual_rank=_RANK)
    yield WeightContender(f"arb_rc-rank-{_RANK}", f"ARB-RC, rank {_RANK} beside", "one-bit", low)
    for n, m in _PATTERNS:
        name = f"{n}:{m}"
        pruned = CompressionConfig("magnitude", pattern=(n, m))
        yield WeightContender(f"magnitude-{name}", f"magnitude {name}", "pruned", pruned)
        spbo = made("pbs2p", pattern=(n, m))
        yield WeightContender(f"pbs2p-{name}", f"PBS²P {name}", "pruned", spbo)
    n, m = _PATTERNS[-1]
    name = f"{n}:{m}"
    spbo = made("pbs2p", pattern=(n, m), bitmaps=True)
    yield WeightContender(f"pbs2p-{name}-bitmaps", f"PBS²P {name}, bitmaps", "pruned", spbo)
    low = made("pbs2p", pattern=(n, m), residual_rank=_RANK)
    yield WeightContender(
        f"pbs2p-{name}-rank-{_RANK}", f"PBS²P {name}, rank {_RANK} beside", "pruned", low
    )
