import os
import re
import signal
import time
from dataclasses import fields
from datetime import timedelta

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import processes
from condiquant_plugin import FakeQuantizer, InputError
from condiquant_plugin.errors import DistributedError
from condiquant_plugin.layerwise import distributed
from condiquant_plugin.layerwise.moments import LayerGeometry, moments_of, no_moments
from condiquant_plugin.layerwise.problem import LayerProblem
from condiquant_plugin.methods.condiquant import reconditioning
from condiquant_plugin.methods.condiquant.reconditioning import ReconditioningConfig

WORLD = 3
OBJECTIVES = ("condition", "least_squares")
GROUPED = LayerGeometry("conv", (3, 3), padding=(1, 1), groups=2)
LAYERS = {
    "qkv": ((24, 10), LayerGeometry(), 3),
    "proj": ((8, 10), LayerGeometry(), 1),
    "fc1": ((12, 10), LayerGeometry(), 1),
    "conv": ((6, 2, 3, 3), GROUPED, 1),
    "half": ((12, 10), LayerGeometry(), 1),
}


def config(objective):
    return ReconditioningConfig(objective, steps=20)


def weight_and_bias(name):
    generator = torch.Generator().manual_seed(sorted(LAYERS).index(name))
    shape = LAYERS[name][0]
    weight = torch.randn(shape, generator=generator) / shape[1]
    bias = None if name == "fc1" else torch.randn(shape[0], generator=generator)
    return (weight.bfloat16(), bias.bfloat16()) if name == "half" else (weight, bias)


def part_of_moments(name, rank):
    """Moments of a process' own data; process 2 of 3 has none."""
    weight, geometry = weight_and_bias(name)[0], LAYERS[name][1]
    if rank == 2:
        return no_moments(weight, geometry, quantized=True)
    shape = (1, 4, 12, 12) if geometry.kind == "conv" else (100 + rank, weight.shape[1])
    x = torch.randn(shape, generator=torch.Generator().manual_seed(rank))
    return moments_of(x, geometry, x.mul(2).round().div(2))


def problems(moments):
    return [
        LayerProblem(name, *weight_and_bias(name), moments[name], geometry, row_blocks)
        for name, (_, geometry, row_blocks) in LAYERS.items()
    ]


def summary(solution):
    report = vars(solution.report).copy()
    return report.pop("name"), solution.weight, solution.bias, report


class Quantized(nn.Module):
    def __init__(self, rank):
        super().__init__()
        self.one = FakeQuantizer(4, "activation")
        self.rows = FakeQuantizer(4, "weight", row_blocks=3)
        self.one.set_bounds(-0.1 - rank, 0.3 + rank)
        self.rows.set_bounds(torch.tensor([-1.0, -2.0, -3.0]) / 7 - rank, torch.rand(3) + rank)


def failures(rank):
    """What each process sees when others fail, by what happened."""
    seen = {}

    def attempt(name, call):
        try:
            call()
        except Exception as error:
            seen[name] = type(error).__name__, str(error)

    def fail(error):
        with distributed.failing_together("testing"):
            if error is not None:
                raise error

    attempt("nothing", lambda: fail(None))
    attempt("input", lambda: fail([None, InputError("b: use c"), InputError("d: use e")][rank]))
    attempt("bug", lambda: fail(KeyError("the\nbug") if rank == 1 else None))
    moments = {name: part_of_moments(name, 0) for name in LAYERS}
    given = problems(moments)
    given[1].weight[0, 0] = float("nan")
    for objective in OBJECTIVES:
        attempt(objective, lambda o=objective: distributed.solve(given, config(o)))
    attempt("wrong call", lambda: distributed.all_reduce([object()]))
    return seen


def work(rank, folder):
    distributed._BUCKET = 700  # several buckets, some of one tensor and some of many
    moments = {name: part_of_moments(name, rank) for name in LAYERS}
    moments["the same input"] = moments["fc1"]
    distributed.all_reduce(moments.values())
    model = Quantized(rank)
    distributed.broadcast_bounds(model)
    result = {
        "moments": {name: vars(m) for name, m in moments.items()},
        "bounds": model.state_dict(),
        "failures": failures(rank),
        "share": list(distributed.share([0, 1, 2, 3])),
    }
    for objective in OBJECTIVES:
        solutions = distributed.solve(problems(moments), config(objective))
        result[objective] = [summary(solution) for solution in solutions]
    torch.save(result, folder / f"{rank}.pt")
    torch.distributed.barrier()
    started = time.monotonic()
    if rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    outcome = {}
    try:
        distributed.solve(problems(moments), config("least_squares"))
    except DistributedError as error:
        outcome = {"message": str(error), "seconds": time.monotonic() - started}
    try:
        with distributed.failing_together("testing"):
            raise KeyError("of its own")
    except KeyError as error:
        outcome["own"] = str(error)
    torch.save(outcome, folder / f"killed{rank}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    assert processes.run(work, folder, WORLD) == [0, 0, -signal.SIGKILL]
    return folder


@pytest.fixture(scope="module")
def results(folder):
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


def whole_moments(name):
    return part_of_moments(name, 0) + part_of_moments(name, 1)


def assert_same(one, other):
    """Equal bit for bit, whatever lists and dicts hold the tensors."""
    if isinstance(one, dict):
        one, other = sorted(one.items()), sorted(other.items())
    if isinstance(one, list | tuple):
        for mine, theirs in zip(one, other, strict=True):
            assert_same(mine, theirs)
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    else:
        assert one == other


def test_moments_add_up_over_processes(results):
    for name in LAYERS:
        whole, found = whole_moments(name), results[0]["moments"][name]
        for field in fields(whole):
            torch.testing.assert_close(
                found[field.name], getattr(whole, field.name), rtol=1e-12, atol=0
            )
    assert_same(results[0]["moments"]["the same input"], results[0]["moments"]["fc1"])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_shards_solve_what_one_process_solves(results, objective):
    given = problems({name: whole_moments(name) for name in LAYERS})
    alone = reconditioning.recondition(given, config(objective))
    for expected, found, problem in zip(alone, results[0][objective], given, strict=True):
        name, weight, bias, report = summary(expected)
        assert not torch.equal(weight, problem.weight)
        assert found[0] == name == problem.name
        torch.testing.assert_close(found[1:3], (weight, bias), rtol=1e-6, atol=1e-7)
        assert found[3] == pytest.approx(report, rel=1e-4)


@pytest.mark.parametrize("key", ["moments", "bounds", *OBJECTIVES])
def test_all_processes_have_the_same_bits(results, key):
    for other in results[1:]:
        assert_same(other[key], results[0][key])


def test_every_batch_has_one_owner(results):
    assert [result["share"] for result in results] == [[0, 3], [1], [2]]


def test_bounds_are_those_of_the_first_process(results):
    expected = Quantized(0).state_dict()
    for name in ("one.lower", "one.upper", "rows.lower"):
        assert_same(results[2]["bounds"][name], expected[name])


def test_an_input_error_is_raised_in_every_process(results):
    for result in results:
        assert result["failures"]["input"] == ("InputError", "b: use c")
        assert "nothing" not in result["failures"]
        for objective in OBJECTIVES:
            kind, message = result["failures"][objective]
            assert kind == "InputError"
            assert "weight of proj" in message


def test_a_bug_ends_the_others_too_and_keeps_its_type(results):
    seen = [result["failures"]["bug"] for result in results]
    assert seen[1] == ("KeyError", "'the\\nbug'")
    for kind, message in (seen[0], seen[2]):
        assert kind == "DistributedError"
        assert re.fullmatch(
            r"process 1 failed testing \(KeyError: .*\): look at its log, .*", message
        )


def test_errors_that_are_no_lost_connection_stay_what_they_are(results):
    assert {result["failures"]["wrong call"][0] for result in results} == {"AttributeError"}


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_the_others(folder, rank):
    outcome = torch.load(folder / f"killed{rank}.pt", weights_only=True)
    assert outcome["seconds"] < 5
    assert outcome["message"] == (
        "another process ended reconditioning weights: look at its log, "
        "then run again with --auto_resume"
    )
    assert outcome["own"] == "'of its own'"


def test_shards_are_balanced_and_keep_equal_shapes_together():
    given = problems({name: whole_moments(name) for name in LAYERS})
    for count in (1, 2, 3, 8):
        for objective in OBJECTIVES:
            shards = distributed.shard(given, config(objective), count)
            assert sorted(i for indices in shards for i in indices) == list(range(len(given)))
            assert len(shards) == count
    together = distributed.shard(given, config("condition"), 3)
    owner = {i: rank for rank, indices in enumerate(together) for i in indices}
    names = list(LAYERS)
    assert owner[names.index("qkv")] == owner[names.index("proj")]
    assert owner[names.index("fc1")] == owner[names.index("half")]
    assert all(together)


def test_a_layer_costs_its_weights_times_the_side_that_its_steps_go_by():
    qkv = problems({name: whole_moments(name) for name in LAYERS})[0]
    sides = {"condition": 8, "least_squares": 10}
    for objective in OBJECTIVES:
        assert config(objective).cost(qkv) == 24 * 10 * sides[objective]


def test_the_costliest_layers_are_shared_out_first():
    sizes = [3, 3, 4, 5, 3]
    given = [
        LayerProblem(
            str(i), torch.randn(rows, 1), None, moments_of(torch.randn(2, 1), LayerGeometry())
        )
        for i, rows in enumerate(sizes)
    ]
    shards = distributed.shard(given, config("least_squares"), 2)
    assert sorted(sum(sizes[i] for i in indices) for indices in shards) == [8, 10]


def work_of_two(rank, folder):
    moments = [part_of_moments("fc1", rank)]
    distributed.all_reduce(moments)
    model = Quantized(rank)
    distributed.broadcast_bounds(model)
    share = list(distributed.share([0, 1, 2]))
    result = {"gram": moments[0].gram, "bounds": model.state_dict(), "share": share}
    torch.save(result, folder / f"{rank}.pt")


def test_two_processes_are_enough_to_share(tmp_path):
    assert processes.run(work_of_two, tmp_path, 2) == [0, 0]
    one, other = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    torch.testing.assert_close(one["gram"], whole_moments("fc1").gram, rtol=1e-12, atol=0)
    assert_same(one["gram"], other["gram"])
    assert_same(one["bounds"], other["bounds"])
    assert (one["share"], other["share"]) == ([0, 2], [1])


class Hanging(Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        time.sleep(10)


def test_data_that_takes_too_long_is_no_end_of_a_process():
    data = DataLoader(Hanging(), num_workers=1, timeout=0.1)
    with (
        pytest.raises(RuntimeError, match="DataLoader timed out") as info,
        distributed.noticing_the_end_of_others("training"),
    ):
        next(iter(data))
    assert not isinstance(info.value, DistributedError)


def test_a_process_that_never_comes():
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with (
        pytest.raises(DistributedError, match="another process ended starting: look at its log"),
        distributed.noticing_the_end_of_others("starting"),
    ):
        store.wait(["other"], timedelta(milliseconds=10))


def test_one_process_needs_no_group():
    moments = whole_moments("fc1")
    before = moments.gram.clone()
    distributed.all_reduce([moments])
    assert torch.equal(moments.gram, before)
    assert list(distributed.share([1, 2])) == [1, 2]
    model = Quantized(1)
    distributed.broadcast_bounds(model)
    assert model.one.lower.item() == pytest.approx(-1.1)
    with pytest.raises(KeyError), distributed.failing_together("testing"):
        raise KeyError("a")
