"""A block walked with pauses, walked anew for each subset, and observed once: the same inputs, bit for bit."""

from __future__ import annotations

import gc
import threading
import weakref
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

import compress
from compress.flows import Activations
from compress.passes import Magnitude, SparseGPT, Wanda
from compress.walk import BATCH_TOKENS, Walk, batch_rows
from tests.conftest import tiny_directory
from tests.models import FAMILIES, save_tiny
from tests.test_stream import CPU, skeleton_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

    from compress.stream import Skeleton

SHAPES = [(3, 20, 32), (3, 20, 32), (1, 20, 32)]


class Bench:
    """One block of a tiny model, its inputs and the stops of its subsets."""

    def __init__(self, folder: Path, family: str, index: int = 1) -> None:
        self.folder, self.index = folder, index
        self.skeleton: Skeleton = skeleton_of(save_tiny(folder / "model", family, tied=True, gqa=True))
        self.stops = list(self.skeleton.architecture.subsets)
        generator = torch.Generator().manual_seed(3)
        self.hidden = [torch.randn(shape, generator=generator) for shape in SHAPES]

    def source(self) -> Activations:
        flow = Activations(self.folder / "hidden", SHAPES, torch.float32, keep=True)
        for batch, hidden in enumerate(self.hidden):
            flow.put(batch, hidden.clone())
        flow.close()
        return flow

    def walk(self, block: nn.Module, *, pause: bool) -> Walk:
        calls = [self.skeleton.calls(*shape[:2])[self.index] for shape in SHAPES]
        return Walk(block, self.stops, calls, self.source(), pause=pause)

    def prune(self, block: nn.Module, stop: int) -> None:
        """Some change of the weights of a subset."""
        for name in self.stops[stop]:
            weight = block.get_submodule(name).weight
            weight.masked_fill_(weight.abs() < 0.1, 0.0)


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def stepwise(bench: Bench, *, pause: bool, prune: bool) -> tuple[list[list[Tensor]], list[Tensor]]:
    """Inputs by stop and batch, and the outputs."""
    found = []
    with bench.skeleton.block(bench.index) as block, bench.walk(block, pause=pause) as walk:
        for stop in range(len(bench.stops)):
            pairs = [(batch, inputs.clone()) for batch, inputs in walk.inputs(stop)]
            assert [batch for batch, _ in pairs] == [0, 1, 2]
            found.append([inputs for _, inputs in pairs])
            if prune:
                bench.prune(block, stop)
        return found, [output.clone() for _, output in walk.outputs()]


def by_hooks(bench: Bench, *, prune: bool) -> tuple[list[list[Tensor]], list[Tensor]]:
    """The same by whole forwards of the block and a hook of this test's own."""
    found: list[list[Tensor]] = []
    with bench.skeleton.block(bench.index) as block:

        def forwards() -> list[Tensor]:
            calls = [bench.skeleton.calls(*shape[:2])[bench.index] for shape in SHAPES]
            return [block(h.clone(), *c.args, **c.kwargs) for h, c in zip(bench.hidden, calls, strict=True)]

        for stop, names in enumerate(bench.stops):
            seen: list[Tensor] = []
            hook = block.get_submodule(names[-1]).register_forward_pre_hook(
                lambda _, args, seen=seen: seen.append(args[0].clone())
            )
            forwards()
            hook.remove()
            found.append(seen)
            if prune:
                bench.prune(block, stop)
        return found, forwards()


def assert_same(a: tuple[list[list[Tensor]], list[Tensor]], b: tuple[list[list[Tensor]], list[Tensor]]) -> None:
    for ours, theirs in zip([*a[0], a[1]], [*b[0], b[1]], strict=True):
        for x, y in zip(ours, theirs, strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prune", [False, True], ids=["dense", "changing"])
def test_pausing_equals_running_anew_equals_hooks(tmp_path: Path, family: str, prune: bool) -> None:
    bench = Bench(tmp_path, family)
    oracle = by_hooks(bench, prune=prune)
    assert_same(stepwise(bench, pause=True, prune=prune), oracle)
    assert_same(stepwise(bench, pause=False, prune=prune), oracle)


@pytest.mark.parametrize("family", FAMILIES)
def test_observing_sees_every_subset_once(tmp_path: Path, family: str) -> None:
    bench = Bench(tmp_path, family)
    found: list[list[Tensor]] = [[] for _ in bench.stops]
    with bench.skeleton.block(bench.index) as block, bench.walk(block, pause=False) as walk:
        walk.observe(lambda stop, batch, inputs: found[stop].append(inputs.clone()))
        outputs = [output.clone() for _, output in walk.outputs()]
    assert_same((found, outputs), by_hooks(bench, prune=False))


def test_a_walk_to_some_stops_only(tmp_path: Path) -> None:
    """With excepted linears a subset has no stop, and outputs come without any."""
    bench = Bench(tmp_path, "llama")
    oracle = by_hooks(bench, prune=False)
    bench.stops = [bench.stops[0], bench.stops[3]]
    for pause in (True, False):
        assert_same(stepwise(bench, pause=pause, prune=False), ([oracle[0][0], oracle[0][3]], oracle[1]))
    bench.stops = []
    for pause in (True, False):
        assert_same(stepwise(bench, pause=pause, prune=False), ([], oracle[1]))


# --- nothing stays ----------------------------------------------------------------------------------------------------


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(item), Tensor) for item in gc.get_objects())


class Fault(Exception):
    pass


def abandon(bench: Bench, how: str, pause: bool) -> weakref.ref[Tensor]:
    """Begin a walk and leave it; returns a reference to the input of a linear in a forward that was under way."""
    kept: list[weakref.ref[Tensor]] = []
    with bench.skeleton.block(bench.index) as block:
        broken = block.get_submodule(bench.stops[-1][0])
        if how == "raise inside":

            def fail(*_: object) -> None:
                if len(kept) > 4:
                    raise Fault

            broken.register_forward_pre_hook(fail)
        with bench.walk(block, pause=pause) as walk:
            for stop in range(len(bench.stops)):
                for batch, inputs in walk.inputs(stop):
                    kept.append(weakref.ref(inputs))
                    if how == "raise outside" and (stop, batch) == (1, 1):
                        raise Fault
                    if how == "leave" and (stop, batch) == (1, 1):
                        return kept[-1]
                if how == "leave between" and stop == 1:
                    return kept[-1]
            for batch, output in walk.outputs():
                kept.append(weakref.ref(output))
                if batch == 1:
                    return kept[-1]
    raise AssertionError("unreachable")


@pytest.mark.parametrize("pause", [True, False])
@pytest.mark.parametrize("how", ["leave", "leave between", "leave in outputs", "raise outside", "raise inside"])
def test_an_abandoned_walk_leaves_nothing(tmp_path: Path, how: str, pause: bool) -> None:
    bench = Bench(tmp_path, "llama")
    bench.skeleton.calls(*SHAPES[0][:2]), bench.skeleton.calls(*SHAPES[2][:2])  # kept by the skeleton
    before = live_tensors()
    for _ in range(3):
        try:
            reference = abandon(bench, how, pause)
        except Fault:
            assert how.startswith("raise")
        else:
            assert reference() is None
    block = bench.skeleton.blocks[bench.index]
    broken = block.get_submodule(bench.stops[-1][0])
    ours = 3 if how == "raise inside" else 0  # the faults of `abandon`, which hold no tensor
    assert sum(len(module._forward_pre_hooks) for module in block.modules()) == len(broken._forward_pre_hooks) == ours
    assert live_tensors() == before


def test_repeated_runs_leave_no_tensors_threads_or_files(tmp_path: Path) -> None:
    tiny_directory(tmp_path / "model", "llama")

    def once(number: int) -> tuple[int, int, int]:
        plan = compress.Plan(
            model=compress.Model(path=str(tmp_path / "model")),
            calibration=compress.Calibration(source=str(tmp_path / "text.txt"), samples=5, length=24),
            run=compress.Run(output=str(tmp_path / f"out-{number}"), refresh="subset"),
            passes=[Wanda(sparsity=0.2), SparseGPT(pattern="2:4"), Magnitude(sparsity=0.6, scope="global")],
            evaluate=compress.Evaluate(perplexity=str(tmp_path / "text.txt"), window=32, windows=5),
        )
        compress.run(plan)
        return live_tensors(), threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))

    first = once(0)
    assert [once(number) for number in range(1, 6)] == [first] * 5
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "model", *(f"out-{number}" for number in range(6)), "text.txt"
    ]  # fmt: skip


def test_failing_runs_leave_no_tensors_threads_or_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_directory(tmp_path / "model", "llama")
    plan = compress.Plan(
        model=compress.Model(path=str(tmp_path / "model")),
        calibration=compress.Calibration(source=str(tmp_path / "text.txt"), samples=5, length=24),
        run=compress.Run(output=str(tmp_path / "out"), refresh="subset"),
        passes=[SparseGPT(pattern="2:4")],
    )

    def fail(*_: object) -> None:
        raise Fault

    monkeypatch.setattr(SparseGPT, "apply", fail)

    def once() -> tuple[int, int, int]:
        with pytest.raises(Fault):
            compress.run(plan)
        return live_tensors(), threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))

    first = once()
    assert [once() for _ in range(3)] == [first] * 3


@pytest.mark.parametrize(("samples", "length"), [(1, 2), (7, 600), (128, 256), (3, 5000), (5, 2048)])
def test_batches_cover_all_rows_and_keep_to_their_tokens(samples: int, length: int) -> None:
    rows = batch_rows(samples, length, CPU)
    assert sum(rows) == samples
    assert all(count * length <= max(BATCH_TOKENS["cpu"], length) for count in rows)
    assert len(set(rows[:-1])) <= 1


@pytest.mark.parametrize(("samples", "length"), [(7, 600), (11, 24), (128, 256), (128, 2048), (5, 2048)])
def test_processes_have_the_batches_of_one_and_smaller_ones_only_if_they_are_more(samples: int, length: int) -> None:
    one = batch_rows(samples, length, CPU)
    assert len(one) >= min(samples, 8)
    for processes in range(1, samples + 1):
        rows = batch_rows(samples, length, CPU, processes)
        assert sum(rows) == samples
        assert len(rows) >= processes
        assert rows == one or processes > len(one)
