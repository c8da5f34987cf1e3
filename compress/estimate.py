"""What a run will cost: peak memory by phase, time, disk; and the choice of where activations live.

Memory is counted from the shapes in the lock: what is alive at once in each phase. The result of a run never depends
on the choice made here, only its speed: activations in memory or on disk, forwards paused or run anew.
"""

from __future__ import annotations

import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from compress.calibration.moments import Statistics, gram_entries, panels
from compress.errors import PlanError
from compress.estimate_training import fisher, reconstruction, refitted, refitting, training, wanting
from compress.journal import work_directory
from compress.memory import KEPT, resident_memory
from compress.passes.perp import PERP
from compress.report import human_bytes
from compress.training import Training
from compress.walk import batch_rows

if TYPE_CHECKING:
    from compress.lock import Linear, Lock
    from compress.passes.base import Pass

LATER_IMPORTS = 80 << 20  # tokenizer, report and data libraries that are imported after the estimate is made
HARNESS_IMPORTS = 180 << 20  # lm-eval, scipy.stats and what they import
# For each byte of a text that is tokenized in one call: three tokenizers (4.2 M characters; 1 to 3.6 of them a token)
# took 194 to 303.
TOKENIZING = 300
HEAD_BYTES = 16 << 20  # logits held at once while scoring; see compress.evals.perplexity
FEWER = "calibrate on fewer or shorter samples"
# What makes each phase smaller; verification holds one block, whatever a plan says.
LESS = {
    "blocks": FEWER,
    "embedding": FEWER,
    "self-calibration": "calibrate on a text instead",
    "training": "give the pass a smaller batch_size, or calibrate on shorter samples",
    "reconstruction": f"give the pass a smaller batch_size, or {FEWER}",
    "fisher": "leave fisher out, or calibrate on shorter samples",
    "evaluation": "leave evaluate.perplexity out and use compress eval afterwards",
    "tasks": "leave evaluate.tasks and the gate out and use compress eval and compress gate afterwards",
}


@dataclass(frozen=True)
class Mode:
    """How a run goes about it.

    `keep`: activations in memory too; `pause`: forwards wait between subsets; `overlap`: a block is written while the
    next one's forward runs.
    """

    device: torch.device
    dtype: torch.dtype
    keep: bool
    pause: bool
    overlap: bool
    memory: dict[str, int]  # peak bytes of each phase

    @property
    def peak(self) -> int:
        """The largest phase."""
        return max(self.memory.values())


def find_device(lock: Lock) -> torch.device:
    """The device of the plan. Raises PlanError when it is not there."""
    name = lock.plan.run.device
    where = lock.plan.source.where(("run", "device"))
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise PlanError(f'"{name}" is no device', where=where, fix='use "auto", "cpu", "cuda" or "cuda:0"') from None
    if device.type not in ("cpu", "cuda"):
        raise PlanError(f'device "{name}" is not supported', where=where, fix='use "auto", "cpu" or "cuda"')
    if device.type == "cuda" and not torch.cuda.is_available():
        raise PlanError("torch finds no CUDA device", where=where, fix='use device = "auto" or "cpu"')
    return device


def choose_mode(lock: Lock) -> Mode:
    """The fastest way that fits the plan's `memory`, or the machine's when the plan gives none.

    Raises:
        PlanError: even the leanest way needs more than the plan allows.
    """
    device = find_device(lock)
    stored = lock.checkpoint.tensors[lock.linears[0].stored].torch_dtype
    dtype = torch.float32 if device.type == "cpu" else stored  # float16 is slow and coarse on a CPU
    allowed, refresh = lock.plan.run.memory, lock.plan.run.refresh
    limit = int(allowed) if allowed else int(0.9 * _available(device))
    # Statistics of a whole block leave nothing to wait for.
    ways = [(True, False, True), (False, False, True), (False, False, False)]
    ways = [(True, True, True), *ways] if refresh == "subset" else ways
    modes = [Mode(device, dtype, *way, memory(lock, *way)) for way in ways]
    for mode in modes:
        if mode.peak <= limit:
            return mode
    leanest = modes[-1]
    if not allowed:
        return leanest
    phase = max(leanest.memory, key=lambda name: leanest.memory[name])
    raise PlanError(
        f"the run needs {human_bytes(leanest.peak)} ({phase}), more than memory = {human_bytes(limit)}",
        where=lock.plan.source.where(("run", "memory")),
        fix="allow more memory" + (f", or {LESS[phase]}" if phase in LESS else ""),
    )


def memory(lock: Lock, keep: bool, pause: bool, overlap: bool = True) -> dict[str, int]:
    """Peak bytes of each phase of a run on the CPU (on a GPU the same tensors lie on the device)."""
    skeleton, tensors = lock.skeleton, lock.checkpoint.tensors
    base = resident_memory() + LATER_IMPORTS
    sizes = {name: tensors[stored].bytes for name, stored in skeleton.stored.items()}
    counts = {name: sizes[name] // tensors[stored].torch_dtype.itemsize for name, stored in skeleton.stored.items()}
    light = sum(4 * counts[n] for n in skeleton.outside if n not in (skeleton.embedding, skeleton.head))
    embedding = 4 * counts[skeleton.embedding] + sizes[skeleton.embedding]
    head = 4 * counts[skeleton.head] + sizes[skeleton.head]
    block = max(sum(4 * counts[n] for n in skeleton.block_parameters(i)) for i in range(lock.blocks))
    largest = max((linear for linear in lock.linears if linear.passes), key=lambda linear: linear.weights)
    widest = max(max(linear.in_features, linear.out_features) for linear in lock.linears)
    batch = _batch_tokens(lock)
    # Twice what is alive: what is freed in pieces smaller than the C library's threshold stays in its heap.
    forward = 2 * 4 * batch * (4 * skeleton.width + 3 * widest)
    done = [linear for linear in _widest(lock) if linear.passes]
    # What the journal keeps of a block: that of the block before is written during the first forward, that of this one
    # is collected while it is solved, and shares the float32 weights of a float32 model, unless they become codes.
    written = sum(sizes[f"{lin.name}.weight"] + lin.weights // 8 for lin in done)
    shared = [lin for lin in done if lin.dtype == "F32"]
    codes = sum(lin.weights for lin in shared if any(one.grid() is not None for _, one in lin.passes))
    kept = written - sum(sizes[f"{lin.name}.weight"] for lin in shared) + codes
    flow = _flow(lock, keep=keep, pause=pause)
    # float32 dense, current and solved weight, scores, and the int64 order of a sort
    solve = 32 * largest.weights
    # Gram matrices, about half of each: of all subsets of a block together, which a pass over blocks always has, or of
    # one at a time. In float64 while tokens are seen, with a panel's product, in both precisions, that is added to it.
    widths = {n.subset: n.in_features for n in done if _statistics(lock, n) is Statistics.GRAM}
    square = 4 * max(widths.values(), default=0) ** 2
    together = lock.plan.run.refresh == "block" or any(lock.block_passes(sweep) for sweep in range(len(lock.sweeps)))
    entries = [gram_entries(width) for width in widths.values()]
    grams = sum(entries) if together else max(entries, default=0)
    adding = 12 * max((width * panels(width)[0][1] for width in widths.values()), default=0)
    # Factoring holds three more matrices of a Gram's size beside the weight; solving, the factor and the whole Gram.
    factor, held = (3 * square + 8 * largest.weights if square else 0), 2 * square
    beyond = (one.solving_bytes(n.out_features, n.in_features) for n in done for _, one in n.passes)
    solve += max(beyond, default=0)
    seeing = written * overlap + forward + 8 * grams + adding
    busiest = max(seeing, 4 * grams + kept + max(factor, held + solve))
    phases = {"blocks": base + light + block + flow + busiest + KEPT}  # the heap keeps so much when it is freed
    if lock.calibrated:
        phases["embedding"] = base + light + embedding + flow
    if lock.plan.calibration and lock.plan.calibration.source == "self":
        phases["self-calibration"] = base + 4 * sum(counts.values()) + 2 * sizes[skeleton.embedding] + forward
    if any(lock.is_barrier(sweep) for sweep in range(len(lock.sweeps))):
        phases["training"] = base + training(lock, sum(counts.values()))
    if any(one.learns() for sweep in range(len(lock.sweeps)) for _, one in lock.block_passes(sweep)):
        gathered = 4 * _calibration_tokens(lock) * skeleton.width * (1 if keep else 2)  # all samples, beside `flow`
        there = flow + gathered + 4 * grams + kept + written * overlap + forward + KEPT
        phases["reconstruction"] = base + light + there + reconstruction(lock, block)
    if wanting(lock):
        phases["fisher"] = base + fisher(lock, sum(counts.values()))
    phases["verification"] = base + written + 4 * largest.weights
    if lock.plan.evaluate and lock.plan.evaluate.perplexity and lock.ends:
        models = 2
        scoring = models * head + 12 * HEAD_BYTES  # logits, log p, p and products of both
        text = _longest_text(lock)
        hidden = models * (_evaluation_tokens(lock, text) if keep else 0) * 4 * skeleton.width
        measuring = max(TOKENIZING * text, hidden + max(embedding, block + forward, scoring))
        phases["evaluation"] = base + models * light + measuring
    if lock.ends and (lock.plan.gate or (lock.plan.evaluate and lock.plan.evaluate.tasks)):
        phases["tasks"] = base + _tasks(lock, sum(sizes.values()))
    return phases


def _tasks(lock: Lock, size: int) -> int:
    """Bytes of whole models as lm-eval runs them: one while it is loaded, or two, and the logits of a batch."""
    settings = lock.plan.evaluate
    context = min(getattr(lock.config, "max_position_embeddings", None) or 2048, 2048)
    tokens = (settings.batch_size if settings else 16) * context
    vocabulary: int = lock.skeleton.model.get_input_embeddings().num_embeddings
    widest: int = max(max(linear.in_features, linear.out_features) for linear in lock.linears)
    # Logits in the model's dtype, in float32, and their log-softmax.
    return HARNESS_IMPORTS + 3 * size + 4 * tokens * (3 * vocabulary + 4 * lock.skeleton.width + 3 * widest)


def _longest_text(lock: Lock) -> int:
    """Bytes of the longest text to be evaluated; of datasets of the hub, which are not read before, 2 MiB."""
    settings = lock.plan.evaluate
    assert settings is not None
    files = [lock.plan.resolve(text) for text in settings.perplexity]
    return max((path.stat().st_size for path in files if path.is_file()), default=1 << 21)


def _evaluation_tokens(lock: Lock, text: int) -> int:
    """Tokens to be scored of a text of so many bytes, as far as it can be known without reading it: four bytes each."""
    settings = lock.plan.evaluate
    assert settings is not None
    context = getattr(lock.config, "max_position_embeddings", None) or 2048
    most = (settings.windows or 1 << 62) * (settings.window or min(2048, context))
    return min(most, text // 4)


def _flow(lock: Lock, *, keep: bool, pause: bool) -> int:
    """Bytes of activations alive at once during a sweep."""
    calibration = lock.plan.calibration
    if not lock.calibrated or calibration is None:
        return 0
    width, tokens = lock.skeleton.width, _calibration_tokens(lock)
    tokens = tokens if keep else min(tokens, 2 * _batch_tokens(lock))
    # A paused forward holds its input, the sum after attention, its norm, and the input of the subset it waits at.
    waiting = 2 * width + max(linear.in_features for linear in lock.linears) if pause else 0
    return 4 * tokens * (width + waiting)


def _calibration_tokens(lock: Lock) -> int:
    calibration = lock.plan.calibration
    return calibration.samples * calibration.length if calibration else 0


def _batch_tokens(lock: Lock) -> int:
    calibration = lock.plan.calibration
    if calibration is None:
        return 0
    return max(batch_rows(calibration.samples, calibration.length, find_device(lock))) * calibration.length


def _widest(lock: Lock) -> list[Linear]:
    """The linears of the block that has most weights."""
    return max((lock.in_block(block) for block in range(lock.blocks)), key=lambda some: sum(n.weights for n in some))


def _statistics(lock: Lock, linear: Linear) -> Statistics:
    return max(lock.statistics(linear, sweep) for sweep in range(len(lock.sweeps)))


def seconds(lock: Lock, mode: Mode) -> float:
    """A rough time for the sweeps: multiplications over the speed of a matrix product measured now, and the reading."""
    speed = _speed(mode.device)
    calibration = lock.plan.calibration
    tokens = calibration.samples * calibration.length if calibration and lock.calibrated else 0
    work = 0.0
    for sweep in range(len(lock.sweeps)):
        stops = {(n.block, n.subset): n for n in lock.linears if lock.statistics(n, sweep)}
        again = 1.0 if lock.plan.run.refresh == "block" else len(stops) / lock.blocks / 2
        forwards = 1.0 if mode.pause else 1.0 + again
        work += forwards * 2.0 * tokens * sum(n.weights for n in lock.linears)
        for linear in stops.values():
            gram = lock.statistics(linear, sweep) is Statistics.GRAM
            work += (tokens * 1.3 * linear.in_features**2 + 2.0 * linear.in_features**3) if gram else 0.0
        for linear in lock.linears:
            if lock.statistics(linear, sweep) is Statistics.GRAM:
                work += 8.0 * linear.weights * linear.in_features
    data = sum(lock.checkpoint.sizes.values()) * (len(lock.sweeps) + 2)
    return 1.6 * work / speed + data / 1e9 + 0.5  # 1.6 allows for norms, attention and the like; a guess, not fitted


def _speed(device: torch.device) -> float:
    """Floating-point operations per second of a float32 matrix product here and now."""
    a = torch.randn(1024, 1024, device=device)
    best = float("inf")
    for _ in range(4):
        began = time.perf_counter()
        for _ in range(2):
            a @ a
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, (time.perf_counter() - began) / 2)
    return 2.0 * 1024**3 / best


def disk_bytes(lock: Lock) -> int:
    """Bytes needed beside the output while the run is under way: journal, activations and the output itself.

    With several stages, what each leaves stays until the end.
    """
    earlier = disk_bytes(lock.before) if lock.before else 0
    blocks = sum(lock.checkpoint.tensors[n.stored].bytes + n.weights // 8 for n in lock.linears if n.passes)
    calibration = lock.plan.calibration
    flow = 8 * calibration.samples * calibration.length * lock.skeleton.width if calibration and lock.calibrated else 0
    trained = 2 * max((_training_state(lock, index) for index in lock.stage), default=0)  # the last two are kept
    gradients = 4 * sum(linear.weights for linear in wanting(lock))
    return lock.output_bytes + blocks * len(lock.sweeps) + flow + trained + gradients + earlier


def _training_state(lock: Lock, index: int) -> int:
    """Bytes of a training's state, at most: values and the best of them, both moments of AdamW, what is refitted.

    Block by block there are the states of two: one is trained, and what became of the other is written.
    """
    one = lock.plan.passes[index]
    if not isinstance(one, Training):
        return 0
    blocks = [0] * lock.blocks
    for linear in lock.linears:
        if index in dict(linear.passes):
            blocks[linear.block] += one.learned(linear)
    if not one.barrier():
        return 2 * 16 * (max(blocks) + _beside(lock, one))
    masks = refitting(lock, one)[0] + 4 * sum(linear.weights for linear in refitted(lock, one))
    return 16 * (sum(blocks) + _beside(lock, one)) + masks


def _beside(lock: Lock, one: Pass) -> int:
    """How many numbers beside linears a pass trains, at most."""
    kinds = one.trained if isinstance(one, PERP) else frozenset()
    skeleton, tensors = lock.skeleton, lock.checkpoint.tensors
    ends = {"embeddings": skeleton.stored[skeleton.embedding], "head": skeleton.stored[skeleton.head]}  # may be one
    trained = {stored for kind, stored in ends.items() if kind in kinds}
    if kinds & {"norms", "biases"}:
        trained |= set(skeleton.stored.values()) - {n.stored for n in lock.linears} - set(ends.values())
    return sum(math.prod(tensors[stored].shape) for stored in trained)


def check_disk(lock: Lock) -> None:
    """Refuse a run that will not fit the disk of its output. Raises PlanError."""
    folder = lock.plan.resolve(lock.plan.run.output).absolute()
    while not folder.exists():
        folder = folder.parent
    output = lock.plan.resolve(lock.plan.run.output)
    held = work_directory(output)
    there = sum(path.stat().st_size for path in held.rglob("*") if path.is_file()) if held.is_dir() else 0
    free = shutil.disk_usage(folder).free
    if free + there < disk_bytes(lock):
        raise PlanError(
            f"the run needs {human_bytes(disk_bytes(lock))} on the disk of its output, {human_bytes(free)} are free",
            where=lock.plan.source.where(("run", "output")),
            fix="free some space, or choose an output on another disk",
        )


def _available(device: torch.device) -> int:
    """Bytes that the machine can still give."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + resident_memory()
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        free = next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        free = 4 << 30
    return free + resident_memory()
