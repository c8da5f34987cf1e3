"""``python -m fuzz``: run each target for some seconds, one after the other, and keep every input that shows a fault.

``python -m fuzz --replay FILE`` runs a kept input again, without the fuzzer.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
STALLED = 60  # seconds for one input after which it counts as a hang
MEMORY = 12_288  # MiB, above the bounds that compress sets itself


def main() -> int:
    """Run what the command line asks for; 1 where a fault was found."""
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", help="names of targets; default: all")
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "fuzz", help="folder of corpora and faults")
    parser.add_argument("--replay", type=Path, nargs="+", default=[], help="kept inputs, in the folder of their target")
    given = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "RUST_BACKTRACE": "0"}
    if given.replay:
        return replay(given.replay)
    from fuzz.targets import TARGETS

    unknown = [name for name in given.targets if name not in TARGETS]
    if unknown:
        parser.error(f"no target {unknown[0]}; the targets are {', '.join(TARGETS)}")
    found = [run(name, given.seconds, given.out.resolve() / name) for name in given.targets or TARGETS]
    return int(any(found))


def run(name: str, seconds: int, folder: Path) -> int:
    """Fuzz one target; the number of inputs that are kept. A process that dies is started anew."""
    corpus, faults = folder / "corpus", folder / "faults"
    for place in (corpus, faults):
        place.mkdir(parents=True, exist_ok=True)
    for seed in range(64):  # any bytes are decisions: begin with long ones, not with none
        (corpus / f"seed-{seed}").write_bytes(random.Random(seed).randbytes(64))
    end, executions, coverage = time.monotonic() + seconds, 0, "-"
    while (left := round(end - time.monotonic())) > 0:
        command = [sys.executable, "-m", "fuzz.one", name, str(faults), str(corpus), f"-max_total_time={left}"]
        command += [
            f"-timeout={STALLED}",
            f"-rss_limit_mb={MEMORY}",
            "-max_len=256",
            "-len_control=0",
            f"-artifact_prefix={faults}/",
        ]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, errors="replace", check=False)
        log = done.stderr
        (folder / "log.txt").write_text(log)
        counts = [int(count) for count in re.findall(r"^#(\d+)\s", log, re.MULTILINE)]
        executions += int(runs[1]) if (runs := re.search(r"Done (\d+) runs", log)) else max(counts, default=0)
        coverage = next(iter(re.findall(r"cov: (\d+)", log)[::-1]), coverage)
        if not counts:
            sys.stderr.write(log[-4000:])
            raise SystemExit(f"target {name} does not start")
    kept = sorted(path.name for path in faults.iterdir() if path.suffix != ".txt")
    print(f"{name}: {executions:,} executions in {seconds} s, {coverage} edges, {len(kept)} faults {kept}", flush=True)
    return len(kept)


def replay(files: list[Path]) -> int:
    """Run kept inputs; ``out/fuzz/TARGET/faults/FILE`` names its target."""
    from fuzz.targets import TARGETS

    for file in files:
        name = file.resolve().parent.parent.name
        with tempfile.TemporaryDirectory() as place:
            TARGETS[name](Path(place)).run(file.read_bytes())
        print(f"{file}: no fault")
    return 0


if __name__ == "__main__":
    sys.exit(main())
