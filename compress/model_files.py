"""What may be opened in a model directory: regular files inside it, of a size that such files have.

A model directory may come from anybody. Links that lead out of it would publish or read what they point to, a FIFO or
a device would never end, and a JSON file of gigabytes would take a multiple of that in memory.
"""

from __future__ import annotations

import json
import os
import stat
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Any

from compress.errors import ModelError
from compress.limits import MIB

if TYPE_CHECKING:
    from pathlib import Path

MAX_JSON = 32 * MIB  # the index of the largest public model has 9 MiB
# What transformers, tokenizers and compress read of a directory beside weights, and the size it may have.
READ = {
    "lock.json": 256 * MIB,  # of an output, which is a model directory, too
    "report.json": 256 * MIB,
    "tokenizer.json": 256 * MIB,  # a vocabulary of 262,144 words and its merges take 32 MiB
    "vocab*": 256 * MIB,
    "merges.txt": 256 * MIB,
    "*.model": 256 * MIB,
    "*.tiktoken": 256 * MIB,
    "*.json": MAX_JSON,
    "*.jinja": MIB,
    "chat_template*": MIB,
    "tokenizer*": MAX_JSON,
    "README.md": MAX_JSON,
    "LICENSE*": MAX_JSON,
    "NOTICE*": MAX_JSON,
    "*.py": MAX_JSON,
    "*.txt": MAX_JSON,
}
FOLDERS = ("adapter", "additional_chat_templates")  # subfolders that are read


def check_directory(directory: Path) -> None:
    """Refuse a model directory with a file that must not be opened; call it before anything is.

    Raises:
        ModelError: a file that would be read is a link out of the directory, no regular file, or too large.
    """
    try:
        for folder in (directory, *(directory / name for name in FOLDERS)):
            if folder != directory and not os.path.lexists(folder):
                continue
            if not is_inside(folder, directory):
                raise _leads_out(folder)
            for path in sorted(folder.iterdir()) if folder.is_dir() else ():
                check_file(path, directory)
    except OSError as error:
        reason, fix = error.strerror or str(error), "correct the path or its permissions"
        raise ModelError(f"cannot be read: {reason}", where=str(error.filename or directory), fix=fix) from None


def check_file(path: Path, directory: Path) -> None:
    """Check one file of a model directory, if it is one that is read. Raises ModelError, as `check_directory`."""
    limit = next((size for pattern, size in READ.items() if fnmatch(path.name, pattern)), None)
    if limit is None:
        return
    if not is_inside(path, directory):
        raise _leads_out(path)
    try:
        found = path.stat()
    except FileNotFoundError:  # a dangling link: whoever needs it says that it is missing
        return
    if not stat.S_ISREG(found.st_mode):
        raise ModelError("is not a file", where=str(path), fix="copy the model again")
    if found.st_size > limit:
        size = f"has {found.st_size:,} bytes; of such a file at most {limit:,} are read"
        raise ModelError(size, where=str(path), fix="give the file of the original model")


def _leads_out(path: Path) -> ModelError:
    fix = "copy the file into the model directory, or remove the link"
    return ModelError("is a link that leads outside the model directory", where=str(path), fix=fix)


def is_inside(path: Path, directory: Path) -> bool:
    """Whether a file lies in the directory; the hub's cache links snapshots to ../../blobs, which is its own layout."""
    directory = directory.resolve()
    roots = [directory]
    for snapshot in (directory, directory.parent):  # a snapshot, or a folder of one
        if snapshot.parent.name == "snapshots":
            roots.append((snapshot.parent.parent / "blobs").resolve())
    try:
        found = path.resolve()
    except (OSError, RuntimeError):  # links in a circle
        return False
    return any(found.is_relative_to(root) for root in roots)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of the model. Raises ModelError when it is missing or anything else."""
    check_file(path, path.parent)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path.name} is missing", where=str(path.parent), fix="copy the whole model") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"cannot be read as JSON: {error}", where=str(path), fix="copy the file again") from None
    if not isinstance(value, dict):
        raise ModelError("is not a JSON object", where=str(path), fix="copy the file again")
    return value
