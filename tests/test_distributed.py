"""Real processes train what one process trains; they end together, and resume with the same bytes."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.distributed import Job, Share, World, assign, like
from compress.errors import PlanError
from compress.export.reader import open_model
from compress.report import load_report
from compress.training import Training, train
from tests.conftest import REFERENCE, ROOT, files_of, tiny_directory

if TYPE_CHECKING:
    from collections.abc import Iterator

HEAD = """\
[model]
path = "model"
[calibration]
source = "text.txt"
samples = 11
length = 24
packing = "documents"
[run]
output = "{output}"
device = "cpu"
threads = 1
"""
WANDA = '[[pass]]\nuse = "wanda"\npattern = "2:4"\n'
PLAN = HEAD + WANDA
TRAIN = """\
[[pass]]
use = "perp"
train = ["norms", "low_rank", "embeddings"]
variant = "masklora"
rank = 2
steps = 6
batch_size = 3
accumulation = 2
learning_rate = 1e-2
evaluate_every = 2
distill = 0.5
gradient_checkpointing = true
[[pass]]
use = "rtn"
bits = 8
group_size = 16
[[pass]]
use = "perp"
train = ["low_rank"]
steps = 3
batch_size = 1
evaluate_every = 2
"""
SPARSEGPT = '[[pass]]\nuse = "sparsegpt"\npattern = "2:4"\n'
EORA = '[[pass]]\nuse = "eora"\nrank = 4\n'
RECONSTRUCT = """\
[[pass]]
use = "perp"
mode = "reconstruct"
train = ["norms", "low_rank"]
variant = "masklora"
rank = 2
steps = 8
batch_size = 3
evaluate_every = 4
"""
GRIDS = '[[pass]]\nuse = "awq"\n[[pass]]\nuse = "gptq"\nbits = 4\ngroup_size = 16\n'
LONG = '[[pass]]\nuse = "perp"\ntrain = ["norms"]\nsteps = 400\nbatch_size = 4\nevaluate_every = 5\npatience = 100\n'


def source(folder: Path) -> None:
    """A model in float32, and documents of different lengths."""
    tiny_directory(folder / "model", "llama", blocks=2, dtype=torch.float32)
    words = (folder / "text.txt").read_text(encoding="utf-8").split()
    lengths = [4 + 7 * (n % 5) for n in range(60)]
    documents = [" ".join(words[(5 * n) % 400 :][:length]) for n, length in enumerate(lengths)]
    lines = [json.dumps({"text": document}) for document in documents]
    (folder / "text.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def start(folder: Path, output: str, processes: int, passes: str, head: str = PLAN) -> subprocess.Popen[str]:
    text = (head + passes).replace("{output}", output).replace("text.txt", "text.jsonl")
    (folder / f"{output}.toml").write_text(text, encoding="utf-8")
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *(launcher if processes > 1 else []), "-m", "compress", f"{output}.toml"]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, cwd=folder, stdout=pipe, stderr=pipe, text=True, env=environment, start_new_session=True
    )


def run(folder: Path, output: str, processes: int, passes: str, head: str = PLAN) -> tuple[int, str, str]:
    process = start(folder, output, processes, passes, head)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def compare(first: Path, second: Path, *, step: float = 0.0) -> None:
    """Equal masks; weights, embeddings and branches that differ by what the order of additions in float32 makes.

    `step`: of a grid, relative to the largest value. Of a hundred values near the middle between two codes one may go
    to the other.
    """
    _, one = open_model(first)
    _, other = open_model(second)
    for name in one.tensors:
        a, b = one.read(name).double(), other.read(name).double()
        assert torch.equal(a == 0, b == 0) or "weight" not in name or "proj" not in name, name
        gap, largest = (a - b).abs(), float(a.abs().max())
        moved = gap > 2e-3 * largest  # AdamW divides by small gradients
        assert float(moved.double().mean()) <= (0.01 if step else 0.0), name
        assert float(gap.max()) <= (step + 2e-3) * largest, name
        assert float(gap[~moved].norm()) <= 2e-4 * float(a.norm()), name


REPORTS = ("plan.toml", "lock.json", "README.md", "adapter/adapter_config.json")  # they name the output


def same_bytes(first: Path, second: Path) -> bool:
    """Whether two outputs have the same files, but for what names the output."""
    one, other = ({n: b for n, b in files_of(folder).items() if n not in REPORTS} for folder in (first, second))
    return one == other


@pytest.mark.slow
@pytest.mark.parametrize("refresh", ["block", "subset"])
def test_the_embedded_model_comes_out_the_same_whatever_the_number_of_processes(refresh: str, tmp_path: Path) -> None:
    """2:4 and 4 bits: the masks and codes of 1, 2 and 3 processes are the same bits, and so are all errors."""
    head = f"""\
[model]
path = "{REFERENCE}"
[calibration]
source = "{ROOT / "examples" / "prose.txt"}"
samples = 15
length = 128
[run]
output = "{{output}}"
device = "cpu"
threads = 1
refresh = "{refresh}"
"""
    grid = '[[pass]]\nuse = "gptq"\nbits = 4\ngroup_size = 64\n[[export]]\nformat = "packed"\n'
    for processes in (1, 2, 3):
        status, _, err = run(tmp_path, str(processes), processes, SPARSEGPT + grid, head=head)
        assert status == 0, err
    figures = [
        [(line.linear, line.use, line.sparsity, line.tokens, line.error_before, line.error_after) for line in lines]
        for lines in (load_report(tmp_path / output).linears for output in "123")
    ]
    assert figures[0] == figures[1] == figures[2]
    assert same_bytes(tmp_path / "1", tmp_path / "2")
    assert same_bytes(tmp_path / "1", tmp_path / "3")


@pytest.mark.slow
def test_processes_take_part_in_all_stages(tmp_path: Path) -> None:
    """Training before and behind structured pruning; the second one has a smaller model, and the first as teacher."""
    source(tmp_path)
    before = '[[pass]]\nuse = "perp"\ntrain = ["norms"]\nsteps = 3\n'
    width = '[[pass]]\nuse = "width"\nchannels = 0.5\nhidden = 0.25\nmultiple = 8\n'
    passes = before + width + WANDA + TRAIN.replace("16", "8")
    for output, processes in (("alone", 1), ("several", 2)):
        status, _, err = run(tmp_path, output, processes, passes, head=HEAD)
        assert status == 0, err
    compare(tmp_path / "alone", tmp_path / "several", step=1 / 127)  # 8 bits
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["alone", "alone.toml", "model", "several", "several.toml", "text.jsonl", "text.txt"]


@pytest.mark.slow
def test_several_processes_spread_what_blocks_keep_as_one_does(tmp_path: Path) -> None:
    """The scores of one sweep decide for all processes of the next."""
    source(tmp_path)
    width = '[[pass]]\nuse = "width"\nchannels = 0.4\nmultiple = 4\nheterogeneous = true\n'
    for output, processes in (("alone", 1), ("several", 2)):
        status, _, err = run(tmp_path, output, processes, width + WANDA, head=HEAD)
        assert status == 0, err
    assert same_bytes(tmp_path / "alone", tmp_path / "several")


@pytest.mark.slow
def test_several_processes_mask_and_refit_as_one_does(tmp_path: Path) -> None:
    """Second moments are of all processes' samples, without their padding, seen once though blocks run again."""
    source(tmp_path)
    prune = (
        '[[pass]]\nuse = "loraprune"\nchannels = 0.5\nheads = 0.5\nmultiple = 8\nrank = 2\nsteps = 6\nprune_every = 1\n'
    )
    prune += "end = 0.8\nbatch_size = 4\nevaluate_every = 2\ngradient_checkpointing = true\n"
    for output, processes in (("alone", 1), ("several", 2)):
        status, _, err = run(tmp_path, output, processes, prune, head=HEAD)
        assert status == 0, err
    compare(tmp_path / "alone", tmp_path / "several")


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_several_processes_train_what_one_trains(processes: int, tmp_path: Path) -> None:
    source(tmp_path)
    status, _, err = run(tmp_path, "alone", 1, TRAIN)
    assert status == 0, err
    status, out, err = run(tmp_path, "several", processes, TRAIN)
    assert status == 0, err
    assert out.count("read back, equal bit for bit") == 2  # the first process alone tells of it: once in the summary
    compare(tmp_path / "alone", tmp_path / "several")


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("refresh", ["block", pytest.param("subset", marks=pytest.mark.slow)])
def test_several_processes_compress_what_one_compresses(refresh: str, processes: int, tmp_path: Path) -> None:
    """Samples, moments and solves are shared; so is the training of a block, in batches and parts of them."""
    source(tmp_path)
    head = HEAD.replace("threads = 1", f'threads = 1\nrefresh = "{refresh}"')
    for output, count in (("alone", 1), ("several", processes)):
        status, _, err = run(tmp_path, output, count, SPARSEGPT + RECONSTRUCT + EORA, head=head)
        assert status == 0, err
    compare(tmp_path / "alone", tmp_path / "several")
    ledgers = [load_report(tmp_path / output).linears for output in ("alone", "several")]
    assert len(ledgers[0]) == 3 * 2 * 7
    for one, other in zip(*ledgers, strict=True):
        assert (one.linear, one.use, one.tokens) == (other.linear, other.use, other.tokens)
        assert other.error_after == pytest.approx(one.error_after, rel=1e-2, abs=1e-9)


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("refresh", ["block", pytest.param("subset", marks=pytest.mark.slow)])
def test_several_processes_write_the_bytes_of_one(refresh: str, processes: int, tmp_path: Path) -> None:
    """Where nothing is trained: masks, codes and branches. Documents of different lengths: some tokens are padding."""
    source(tmp_path)
    head = HEAD.replace("threads = 1", f'threads = 1\nrefresh = "{refresh}"')
    for output, count in (("alone", 1), ("several", processes)):
        status, _, err = run(tmp_path, output, count, SPARSEGPT + GRIDS + EORA, head=head)
        assert status == 0, err
    assert same_bytes(tmp_path / "alone", tmp_path / "several")


def test_processes_that_end_right_after_an_exchange_end_in_peace(tmp_path: Path) -> None:
    """A thread of gloo that still runs then aborts its process: five of six runs of eight, were it not joined."""
    script = """\
import torch
from compress.distributed import World
world = World(torch.device("cpu"))
for number in range(20):
    world.sum(torch.ones(4))
    world.collect(number)
"""
    (tmp_path / "exchange.py").write_text(script, encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=8", "exchange.py"]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment, timeout=300)
    assert ended.returncode == 0, ended.stderr


def test_more_processes_than_samples_are_refused(tmp_path: Path) -> None:
    source(tmp_path)
    status, _, err = run(tmp_path, "out", 2, WANDA, head=HEAD.replace("samples = 11", "samples = 1"))
    assert status != 0
    assert "1 calibration samples cannot be shared by 2 processes" in err
    assert not (tmp_path / ".out.compress").exists()


@pytest.mark.slow
def test_a_divergence_ends_all_of_them_with_one_message(tmp_path: Path) -> None:
    source(tmp_path)
    wild = TRAIN.replace("learning_rate = 1e-2", "learning_rate = 1e30")
    status, _, err = run(tmp_path, "out", 2, wild)
    assert status != 0
    assert err.count("error: perp") == 1
    assert "training diverged" in err
    assert not (tmp_path / "out").exists()
    assert (tmp_path / ".out.compress" / "journal.jsonl").exists()


def journal(folder: Path, output: str) -> list[str]:
    path = folder / f".{output}.compress" / "journal.jsonl"
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def processes_in(folder: Path) -> list[int]:
    """The processes that carry out a plan there, by their rank."""
    found = {}
    for path in Path("/proc").iterdir():
        if not path.name.isdecimal():
            continue
        try:
            inside = (path / "cwd").resolve() == folder
            pairs = (path / "environ").read_text().split("\0") if inside else []
        except OSError:  # it ended, or is not ours
            continue
        environment = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
        if "LOCAL_RANK" in environment:
            found[int(environment["RANK"])] = int(path.name)
    return [found[rank] for rank in sorted(found)]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize(("passes", "kind"), [(LONG, "training"), (SPARSEGPT + RECONSTRUCT + EORA, "block")])
def test_the_death_of_one_ends_the_run_and_the_same_command_resumes_it(
    passes: str, kind: str, victim: int, tmp_path: Path
) -> None:
    """Killed in the middle of a training or a sweep; the bytes are those of a run that nobody killed."""
    source(tmp_path)
    status, _, err = run(tmp_path, "whole", 2, passes)
    assert status == 0, err
    process = start(tmp_path, "out", 2, passes)
    deadline = time.monotonic() + 120
    while sum(f'"kind": "{kind}"' in line for line in journal(tmp_path, "out")) < 3:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(processes_in(tmp_path)[victim], signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert f'File "{ROOT / "compress"}' not in err  # no traceback of ours
    assert not (tmp_path / "out").exists()
    before = len(journal(tmp_path, "out"))
    assert before
    status, _, err = run(tmp_path, "out", 1, passes)
    assert status == 2
    assert "another number of processes (2, now 1)" in err
    status, out, err = run(tmp_path, "out", 2, passes)
    assert status == 0, err
    assert "resuming the run" in out
    assert same_bytes(tmp_path / "whole", tmp_path / "out")


# ---------------------------------------------------------------- two hosts

HOSTS = (("compress-a", "10.77.0.1"), ("compress-b", "10.77.0.2"))  # a network of their own; nothing leaves it


def ip(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)


@pytest.fixture
def hosts() -> Iterator[None]:
    """Two network namespaces with a cable between them."""
    if shutil.which("ip") is None or ip("netns", "add", HOSTS[0][0]).returncode:
        pytest.skip("network namespaces cannot be made here")
    try:
        ip("netns", "add", HOSTS[1][0])
        made = ip("link", "add", "cable", "netns", HOSTS[0][0], "type", "veth", "peer", "cable", "netns", HOSTS[1][0])
        if made.returncode:
            pytest.skip(f"no virtual cable can be made here: {made.stderr.strip()}")
        for name, address in HOSTS:
            ip("-n", name, "address", "add", f"{address}/24", "dev", "cable")
            ip("-n", name, "link", "set", "cable", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield
    finally:
        for name, _ in HOSTS:
            ip("netns", "delete", name)


@pytest.mark.slow
def test_two_hosts_share_a_disk_and_a_network(hosts: None, tmp_path: Path) -> None:
    source(tmp_path)
    passes = SPARSEGPT + EORA
    status, _, err = run(tmp_path, "alone", 1, passes, head=HEAD)
    assert status == 0, err
    (tmp_path / "several.toml").write_text((HEAD + passes).format(output="several").replace("text.txt", "text.jsonl"))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "cable"}
    running = []
    for rank, (name, _) in enumerate(HOSTS):
        launcher = ["--nnodes=2", "--nproc-per-node=1", f"--node-rank={rank}", f"--master-addr={HOSTS[0][1]}"]
        command = ["ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run", *launcher]
        command += ["--master-port=29400", "-m", "compress", "several.toml"]
        pipe = subprocess.PIPE
        running.append(subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=pipe, stderr=pipe, text=True))
    told = [process.communicate(timeout=300) for process in running]
    assert [process.returncode for process in running] == [0, 0], told
    assert same_bytes(tmp_path / "alone", tmp_path / "several")


# ---------------------------------------------------------------- who does what


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=6), st.integers(1, 3))
def test_work_is_spread_within_the_bound_of_the_longest_first_rule(costs: list[int], size: int) -> None:
    """Graham (1969): the busiest process has at most 4/3 − 1/(3 m) of what the best of all ways gives it."""
    owners = assign([Job(n, cost) for n, cost in enumerate(costs)], size)
    loads = [sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == rank) for rank in range(size)]
    best = min(
        max(sum(cost for cost, owner in zip(costs, some, strict=True) if owner == rank) for rank in range(size))
        for some in itertools.product(range(size), repeat=len(costs))
    )
    assert max(loads) <= (4 / 3 - 1 / (3 * size)) * best + 1e-9


def test_jobs_of_a_group_stay_together_where_their_setup_costs_more_than_waiting() -> None:
    jobs = [Job("a", 1.0, 10.0), Job("a", 1.0, 10.0), Job("b", 1.0, 10.0), Job("b", 1.0, 10.0)]
    owners = assign(jobs, 2)
    assert owners[0] == owners[1] != owners[2] == owners[3]


@given(st.integers(1, 9), st.integers(0, 60))
def test_portions_are_a_partition(size: int, count: int) -> None:
    parts = [range(count)[world(rank, size).portion(count)] for rank in range(size)]
    assert [n for part in parts for n in part] == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@given(st.integers(1, 9), st.lists(st.integers(1, 5), max_size=30))
def test_parts_are_whole_batches_and_their_samples(size: int, batches: list[int]) -> None:
    parts = [world(rank, size).part(batches) for rank in range(size)]
    assert [n for rows, _ in parts for n in rows] == batches
    assert [n for _, own in parts for n in range(sum(batches))[own]] == list(range(sum(batches)))
    assert all(own.stop - own.start == sum(rows) for rows, own in parts)


@pytest.mark.slow
def test_what_is_damaged_starts_over_in_all_of_them(tmp_path: Path) -> None:
    """A file of a sweep, then one of a training, of a run that died in its last training."""
    source(tmp_path)
    passes = TRAIN + LONG
    status, _, err = run(tmp_path, "whole", 2, passes)
    assert status == 0, err
    process = start(tmp_path, "out", 2, passes)
    deadline = time.monotonic() + 240
    while sum('"kind": "training"' in line and '"sweep": 4' in line for line in journal(tmp_path, "out")) < 2:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(processes_in(tmp_path)[0], signal.SIGKILL)
    process.communicate(timeout=120)
    kept = tmp_path / "kept"
    shutil.copytree(tmp_path / ".out.compress", kept)
    for name in ("block-0-00001", "block-1-00000"):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        shutil.rmtree(tmp_path / ".out.compress", ignore_errors=True)
        shutil.copytree(kept, tmp_path / ".out.compress")
        path = tmp_path / ".out.compress" / f"{name}.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
        status, out, err = run(tmp_path, "out", 2, passes)
        assert status == 0, err
        assert f"{name}.safetensors of the journal: damaged" in out
        assert same_bytes(tmp_path / "whole", tmp_path / "out")


# ---------------------------------------------------------------- shares of a batch


def world(rank: int, size: int) -> World:
    """A process of a run without the others."""
    made = object.__new__(World)
    made.rank, made.size, made.device, made.together = rank, size, torch.device("cpu"), False
    return made


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.lists(st.integers(1, 30), min_size=1, max_size=9))
def test_the_mean_of_weighed_shares_is_the_mean_of_the_batch(size: int, counts: list[int]) -> None:
    """Of a mean over tokens, whatever samples and tokens a process gets; every process gets some sample."""
    losses = torch.arange(1.0, len(counts) + 1).double() ** 2  # the mean over the tokens of each sample
    tokens = torch.tensor(counts)

    def mean(indices: torch.Tensor) -> float:
        return float((losses[indices] * tokens[indices]).sum() / tokens[indices].sum())

    every = torch.arange(len(counts))
    total = 0.0
    for rank in range(size):
        share = Share(world(rank, size), lambda indices: int(tokens[indices].sum()))
        mine, weight = share.part(every)
        assert len(mine) >= 1
        total += mean(mine) * weight / size
    assert total == pytest.approx(mean(every), rel=1e-12)


def test_who_borrows_a_sample_does_not_count_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of batches of one sample each goes to one process; the other runs another's, and no watcher may see it."""
    monkeypatch.setattr(Share, "mean", lambda _, value: value)
    seen: list[list[int]] = []

    class Watching:
        def expect(self, chosen: torch.Tensor) -> None:
            seen.append(chosen.tolist())

        def observe(self, step: int) -> None: ...

        def settled(self, steps: int) -> bool:
            return True

        def state(self) -> dict[str, torch.Tensor]:
            return {}

        def restore(self, tensors: dict[str, torch.Tensor]) -> None: ...

    class Nowhere:
        def load(self) -> None: ...

        def save(self, tensors: dict[str, torch.Tensor], numbers: dict[str, float]) -> None: ...

        def report(self, step: int, steps: int, loss: float, held_out: float | None) -> None: ...

    for rank in (0, 1):
        p = torch.nn.Parameter(torch.ones(1))
        train(
            {"p": p},
            lambda chosen, p=p: p.sum() * chosen.float().sum(),
            4,
            Training(steps=4, batch_size=1, holdout=0),
            Nowhere(),
            Share(world(rank, 2)),
            watcher=Watching(),
        )
    assert sorted(sample for some in seen for sample in some) == [0, 1, 2, 3]


def test_what_is_read_goes_where_the_parameter_is() -> None:
    """From a file in host memory to a device, when a training is resumed there."""
    assert like(torch.ones(2), torch.empty(2, device="meta")).device.type == "meta"


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before any of them waits for another."""
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(PlanError, match="3 processes on this machine, 2 GPUs: each needs one of its own"):
        World(torch.device("cuda"))
