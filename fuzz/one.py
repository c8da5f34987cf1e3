"""One target under atheris: ``python -m fuzz.one TARGET FAULTS CORPUS [options of libFuzzer]``; see ``python -m fuzz``.

A fault does not end the run: its input and its traceback are kept, one of each kind. A hang, or memory beyond the
limit, does; libFuzzer then keeps the input.
"""

from __future__ import annotations

import hashlib
import sys
import tempfile
import traceback
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["compress"], exclude=["compress.kernels"]):  # Triton reads its kernels' source
    from fuzz.targets import TARGETS


def main() -> None:
    """Fuzz until libFuzzer ends it."""
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    name, faults, *options = sys.argv[1:]
    with tempfile.TemporaryDirectory(prefix="compress-fuzz-") as place:
        target = TARGETS[name](Path(place))

        def once(data: bytes) -> None:
            try:
                target.run(data)
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException as error:
                keep(error, data, Path(faults))

        atheris.Setup([sys.argv[0], *options], once)
        atheris.Fuzz()


def keep(error: BaseException, data: bytes, folder: Path) -> None:
    """Write the input and what it did, unless there is one that failed at the same place."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "compress" in Path(frame.filename).parts]
    place = f"{Path(frames[-1].filename).name} {frames[-1].lineno}" if frames else str(error)[:40]
    kind = hashlib.sha256(f"{type(error).__name__} {place}".encode()).hexdigest()[:12]
    file = folder / f"{type(error).__name__}-{kind}"
    if not file.exists():
        file.write_bytes(data)
        text = "".join(traceback.format_exception(error))
        file.with_suffix(".txt").write_text(text, encoding="utf-8", errors="backslashreplace")


if __name__ == "__main__":
    main()
