"""Peak memory on a synthetic model several times larger than the memory the plan allows, against the estimate.

    python benchmarks/memory.py [--method wanda|sparsegpt] [--ratio 4] [--blocks 24] [--hidden 3072]

Builds a Llama with random float32 weights of which `--blocks` blocks together are `--ratio` times the plan's
`memory`, prunes it 2:4 in a process of its own and compares the measured peak (VmHWM) with the estimate printed by
`compress check`. The model and the output are removed afterwards.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
PLAN = """\
[model]
path = "model"
[calibration]
source = "text.txt"
samples = 4
length = 256
[run]
output = "output"
memory = {memory}
[[pass]]
use = "{method}"
pattern = "2:4"
"""


def main() -> None:
    """Build, prune, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=("wanda", "sparsegpt", "magnitude"), default="sparsegpt")
    parser.add_argument("--ratio", type=float, default=4.0)
    parser.add_argument("--blocks", type=int, default=24)
    parser.add_argument("--hidden", type=int, default=3072)
    parser.add_argument("--intermediate", type=int, default=3072)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="compress-memory-") as name:
        folder = Path(name)
        build = [sys.executable, str(HERE / "memory_model.py"), "--output", str(folder / "model")]
        build += ["--hidden", str(arguments.hidden), "--intermediate", str(arguments.intermediate)]
        build += ["--blocks", str(arguments.blocks), "--vocab", "4096", "--heads", "16", "--kv-heads", "8"]
        build += ["--dtype", "float32", "--shard-bytes", "1000000000"]
        build += ["--tokenizer", str(HERE.parent / "examples" / "reference")]
        subprocess.run(build, check=True, stdout=subprocess.DEVNULL)
        weights = sum(path.stat().st_size for path in (folder / "model").glob("*.safetensors"))
        allowed = int(weights / arguments.ratio)
        (folder / "text.txt").write_text((HERE.parent / "examples" / "prose.txt").read_text(encoding="utf-8"))
        (folder / "plan.toml").write_text(PLAN.format(method=arguments.method, memory=allowed))
        check = [sys.executable, "-m", "compress", "check", "--json", str(folder / "plan.toml")]
        checked = json.loads(subprocess.run(check, check=True, capture_output=True, text=True).stdout)
        subprocess.run([sys.executable, "-m", "compress", str(folder / "plan.toml")], check=True)
        report = json.loads((folder / "output" / "report.json").read_text(encoding="utf-8"))
    result = {
        "command": "python benchmarks/memory.py",
        "method": arguments.method,
        "weights_mib": weights / 2**20,
        "allowed_mib": allowed / 2**20,
        "estimated_mib": checked["memory"]["peak_bytes"] / 2**20,
        "measured_mib": report["peak_memory_bytes"] / 2**20,
        "sweep_seconds": report["phases"]["sweep"],
    }
    result["estimate_over_measured"] = result["estimated_mib"] / result["measured_mib"]
    print(json.dumps(result, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
