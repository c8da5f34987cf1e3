"""A model larger than memory, compressed under a hard limit: peak memory by the number of blocks, and time.

    python benchmarks/streaming.py [--blocks 8 16 32] [--hidden 1536] [--intermediate 4096] [--memory 1.25GiB]

Builds Llamas with random weights that differ in their number of blocks, and prunes each 2:4, quantizes it to 4 bits
and compensates it by EoRA, in a process of its own that the kernel kills when it holds more than `--memory`: in a
memory cgroup (version 2 or 1), or where none can be made under RLIMIT_DATA. The page cache counts in a cgroup, too,
but the kernel takes it back. Before each run the cache is emptied, where that is allowed, so that weights come from
the disk. The estimate is that of `compress check`; the measured peak is VmHWM.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ByteSize, TypeAdapter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HERE = Path(__file__).resolve().parent
PLAN = """\
[model]
path = "model"
[calibration]
source = "text.txt"
samples = {samples}
length = 512
[run]
output = "output"
memory = {memory}
"""
PASSES = {
    "magnitude": '[[pass]]\nuse = "magnitude"\npattern = "2:4"\n',
    "wanda": '[[pass]]\nuse = "wanda"\npattern = "2:4"\n',
    "sparsegpt": '[[pass]]\nuse = "sparsegpt"\npattern = "2:4"\n',
    "gptq": '[[pass]]\nuse = "gptq"\nbits = 4\ngroup_size = 128\n',
    "eora": '[[pass]]\nuse = "eora"\nrank = 64\n',
}
CGROUPS = Path("/sys/fs/cgroup")


def main() -> None:
    """Build, compress, compare, for each number of blocks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=["sparsegpt", "gptq", "eora"])
    parser.add_argument("--blocks", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--hidden", type=int, default=1536)
    parser.add_argument("--intermediate", type=int, default=4096)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--samples", type=int, default=32, help="of 512 tokens")
    parser.add_argument("--memory", default="1.25GiB", help="of the plan, and the hard limit")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    memory = int(TypeAdapter(ByteSize).validate_python(given.memory))
    rows: list[dict[str, Any]] = []
    result = {"command": "python benchmarks/streaming.py " + " ".join(sys.argv[1:]), "rows": rows}
    for blocks in given.blocks:
        with tempfile.TemporaryDirectory(prefix="compress-streaming-") as name:
            rows.append(measure(Path(name), given, blocks, memory))
        print(json.dumps(rows[-1]), flush=True)
        if given.json:
            given.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def measure(folder: Path, given: argparse.Namespace, blocks: int, memory: int) -> dict[str, Any]:
    """One run; its numbers."""
    build = [sys.executable, str(HERE / "memory_model.py"), "--output", str(folder / "model")]
    build += ["--hidden", str(given.hidden), "--intermediate", str(given.intermediate), "--blocks", str(blocks)]
    build += ["--vocab", "4096", "--heads", "16", "--kv-heads", "4", "--dtype", given.dtype]
    build += ["--shard-bytes", "1000000000", "--tokenizer", str(HERE.parent / "examples" / "reference")]
    subprocess.run(build, check=True, stdout=subprocess.DEVNULL)
    weights = sum(path.stat().st_size for path in (folder / "model").glob("*.safetensors"))
    text = (HERE.parent / "examples" / "prose.txt").read_text(encoding="utf-8")
    (folder / "text.txt").write_text(text * (given.samples * 512 * 8 // len(text) + 1), encoding="utf-8")
    plan = PLAN.format(samples=given.samples, memory=memory) + "".join(PASSES[one] for one in given.passes)
    plan += '[[export]]\nformat = "packed"\n' if "gptq" in given.passes else ""
    (folder / "plan.toml").write_text(plan, encoding="utf-8")
    check = [sys.executable, "-m", "compress", "check", "--json", str(folder / "plan.toml")]
    checked = json.loads(subprocess.run(check, check=True, capture_output=True, text=True).stdout)
    cold = empty_cache()
    with hard_limit(memory) as (kind, enter, highest):
        subprocess.run([sys.executable, "-m", "compress", str(folder / "plan.toml")], check=True, preexec_fn=enter)
        charged = highest()
    report = json.loads((folder / "output" / "report.json").read_text(encoding="utf-8"))
    return {
        "blocks": blocks,
        "weights_mib": weights / 2**20,
        "limit_mib": memory / 2**20,
        "limit": kind,
        "limit_over_weights": memory / weights,
        "estimated_mib": checked["memory"]["peak_bytes"] / 2**20,
        "measured_mib": report["peak_memory_bytes"] / 2**20,
        "charged_mib": None if charged is None else charged / 2**20,
        "activations": checked["activations"],
        "cold": cold,
        "seconds": report["phases"],
        "sweep_seconds_per_block": report["phases"]["sweep"] / blocks,
    }


@contextmanager
def hard_limit(memory: int) -> Iterator[tuple[str, Callable[[], None], Callable[[], int | None]]]:
    """What limits a process: its name, what the process must call to enter, and the most that was charged."""
    for root, limit, peak in (
        (CGROUPS / "memory", "memory.limit_in_bytes", "memory.max_usage_in_bytes"),
        (CGROUPS, "memory.max", "memory.peak"),
    ):
        place = root / f"compress-{os.getpid()}"
        try:
            place.mkdir()
            (place / limit).write_text(str(memory), encoding="ascii")
        except OSError:
            with suppress(OSError):
                place.rmdir()
            continue
        try:
            yield "memory cgroup", partial(_enter, place), partial(_number, place / peak)
        finally:
            place.rmdir()
        return
    yield "RLIMIT_DATA", partial(resource.setrlimit, resource.RLIMIT_DATA, (memory, memory)), lambda: None


def _enter(place: Path) -> None:
    (place / "cgroup.procs").write_text(str(os.getpid()), encoding="ascii")


def _number(path: Path) -> int:
    return int(path.read_text(encoding="ascii"))


def empty_cache() -> bool:
    """Have the kernel forget what it has read from the disk. False where it may not be asked."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3", encoding="ascii")
    except OSError:
        return False
    return True


if __name__ == "__main__":
    main()
