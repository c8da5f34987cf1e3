"""The crash matrix: whatever befalls a run, the same command ends with the same bytes, or says why not.

    python benchmarks/crash_matrix.py [--only PLAN …] [--faults FAULT …] [--share 1.0] [--seed 0] [--json FILE]

The plans (`tests/crash_plans.py`) have between them every kind of pass; the faults are in `tests/crash_faults.py`. Each
trial runs the plan from the start, has one fault befall it, gives the same command again, and compares the SHA-256 of
every emitted file but the reports with an uninterrupted run's. Full and read-only disks need the right to mount. Exits
with 1 if a trial was wrong.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.crash import Runner
from tests.crash_faults import Case, may_mount
from tests.crash_plans import PLANS

# How many moments each fault has in each plan; 0: all there are.
MOMENTS: dict[str, int] = {
    "kills_at_lines": 0,
    "kills_at_random": 25,
    "power_cuts": 8,
    "power_cuts_on_ext4": 6,
    "full_disks": 8,
    "read_only_disks": 4,
    "signals": 12,
    "torn_lines": 15,
    "flipped_bits": 18,
    "second_processes": 2,
}
MOUNTING = ("power_cuts_on_ext4", "full_disks", "read_only_disks")
EVERY = 1 << 30
EMBEDDED_SHARE = 0.2  # of the moments for the embedded model, a run of which takes ten times as long


def carry_out(case: Case, faults: list[str], share: float) -> None:
    """Have the faults befall one plan, and print what came of each."""
    for fault in faults:
        began, before = time.monotonic(), Counter(case.counts)
        count = max(1, round((MOMENTS[fault] or EVERY) * share)) if MOMENTS[fault] or share == 1.0 else 10
        getattr(case, fault)(count)
        found = Counter[str]()
        for (_, result), number in (case.counts - before).items():
            found[result] += number
        print(f"{case.name:<10} {fault:<17} {dict(found)}  {time.monotonic() - began:.0f} s", flush=True)


def table(cases: list[Case]) -> list[dict[str, Any]]:
    """Plan × fault → trials and results."""
    rows = []
    for case in cases:
        for fault in dict.fromkeys(fault for fault, _ in case.counts):
            results = {result: case.counts[fault, result] for result in ("identical", "refused", "wrong")}
            rows.append({"plan": case.name, "fault": fault, "trials": sum(results.values()), **results})
    return rows


def main() -> int:
    """Read the arguments, run the matrix, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=PLANS, default=list(PLANS))
    parser.add_argument("--faults", nargs="*", choices=MOMENTS, default=list(MOMENTS))
    parser.add_argument("--share", type=float, default=1.0, help="of the moments")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    cases: list[Case] = []
    runner = Runner()
    with tempfile.TemporaryDirectory(prefix="compress-crash-") as folder:
        faults = [one for one in arguments.faults if one not in MOUNTING or may_mount(Path(folder) / "mount")]
        if skipped := sorted({*arguments.faults} - {*faults}):
            print(f"left out, for want of the right to mount: {', '.join(skipped)}")
        for name in arguments.only:
            cases.append(Case(name, PLANS[name], Path(folder) / name, runner, arguments.seed))
            share = arguments.share * (EMBEDDED_SHARE if PLANS[name].embedded else 1.0)
            carry_out(cases[-1], faults, share)
            if arguments.json:
                write(arguments.json, cases)
    runner.close()
    wrong = [problem for case in cases for problem in case.problems]
    print(f"{sum(case.trials for case in cases)} trials, {len(wrong)} wrong")
    for problem in wrong:
        print(f"\n{problem}")
    return int(bool(wrong))


def write(path: Path, cases: list[Case]) -> None:
    """The table so far, with the command; of other plans and faults, what the file has stays."""
    known = json.loads(path.read_text()) if path.is_file() else {"rows": [], "problems": [], "commands": []}
    fresh = table(cases)
    mine = {(row["plan"], row["fault"]) for row in fresh}
    rows = [row for row in known["rows"] if (row["plan"], row["fault"]) not in mine] + fresh
    problems = [one for one in known["problems"] if tuple(one.split(": ")[0].split("; ")[:2]) not in mine]
    totals = {key: sum(row[key] for row in rows) for key in ("trials", "identical", "refused", "wrong")}
    commands = list(dict.fromkeys([*known["commands"], shlex.join(["python", *sys.argv])]))
    problems += [problem for case in cases for problem in case.problems]
    content = {"commands": commands, "totals": totals, "rows": rows, "problems": problems}
    path.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
