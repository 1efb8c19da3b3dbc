"""Calibration of DAT-light x4 in one and two processes of one thread each, and what they send.

CONDIQUANT_DATA=... python tests/benchmarks/scaling.py [crops] [--busy]

Needs a core for each process and a machine that does nothing else. `--busy` counts CPU seconds instead,
those of the process that took most, and so leaves out waiting and sending.
"""

import os
import sys
import time
from collections import defaultdict
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import torch
import torch.distributed as dist

import condiquant_nncf as nncf_host
from condiquant_nncf import network as quantization
from condiquant_plugin.methods.condiquant.reconditioning import ReconditioningConfig
from condiquant_recipes.recipe import load_recipe
from condiquant_recipes.source import load_source

PHASES = ("gram", "recondition", "bounds")
OBJECTIVES = ("least_squares", "condition")


def counting(collective, sent):
    """The collective, started by all at once, its bytes and seconds added to ``sent``."""

    def call(buffer, **arguments):
        dist.barrier()
        started = time.perf_counter()
        collective(buffer, **arguments)
        entry = sent[collective.__name__]
        entry["calls"] += 1
        entry["bytes"] += buffer.numel() * buffer.element_size()
        entry["seconds"] += time.perf_counter() - started

    return call


def work(rank: int, processes: int, crops: int, busy: bool, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous{processes}",
        rank=rank,
        world_size=processes,
    )
    if busy:
        quantization.time = SimpleNamespace(perf_counter=time.process_time)
    all_reduce, broadcast = dist.all_reduce, dist.broadcast
    recipe = load_recipe(Path(__file__).parents[2] / "recipes/dat_light/x4.yml")
    source = load_source(recipe, Path(os.environ["CONDIQUANT_DATA"]), [])
    for objective in OBJECTIVES:
        sent = defaultdict(lambda: {"calls": 0, "bytes": 0, "seconds": 0.0})
        dist.all_reduce, dist.broadcast = counting(all_reduce, sent), counting(broadcast, sent)
        config = nncf_host.QuantizationConfig(recondition=ReconditioningConfig(objective))
        result = nncf_host.quantize_network(
            source.network,
            source.crops[:crops],
            config,
            bounds_crops=max(crops // 4, 1),
            batch_size=4,
        )
        found = {"seconds": result.seconds, "sent": dict(sent)}
        torch.save(found, f"{folder}/{processes}-{rank}-{objective}.pt")


def main(crops: int, busy: bool) -> None:
    with TemporaryDirectory() as folder:
        for processes in (1, 2):
            torch.multiprocessing.spawn(work, (processes, crops, busy, folder), nprocs=processes)
        found = {
            (processes, rank, objective): torch.load(f"{folder}/{processes}-{rank}-{objective}.pt")
            for processes in (1, 2)
            for rank in range(processes)
            for objective in OBJECTIVES
        }
    unit = "CPU s" if busy else "s"
    print(f"{crops} crops, bounds on {max(crops // 4, 1)}\n")
    print(f"| objective | phase | 1 process, {unit} | 2 processes, {unit} | ratio |")
    print("|---|---|---|---|---|")
    for objective in OBJECTIVES:
        one = found[1, 0, objective]["seconds"]
        ranks = [found[2, rank, objective]["seconds"] for rank in range(2)]
        two = {phase: max(seconds[phase] for seconds in ranks) for phase in PHASES}
        one, two = (times | {"all": sum(times.values())} for times in (one, two))
        for phase, seconds in two.items():
            print(
                f"| `{objective}` | {phase} | {one[phase]:.1f} | {seconds:.1f} | "
                f"{one[phase] / seconds:.2f} |"
            )
    print("\n| objective | collective | calls | MB | s |\n|---|---|---|---|---|")
    for objective in OBJECTIVES:
        for name, entry in found[2, 0, objective]["sent"].items():
            print(
                f"| `{objective}` | {name} | {entry['calls']} | {entry['bytes'] / 1e6:.2f} | "
                f"{entry['seconds']:.3f} |"
            )


if __name__ == "__main__":
    numbers = [int(argument) for argument in sys.argv[1:] if argument != "--busy"]
    main(*(numbers or [128]), busy="--busy" in sys.argv)
