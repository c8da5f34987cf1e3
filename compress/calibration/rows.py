"""The rows of .jsonl, .json and .parquet files, which may come from anybody: read a piece at a time, and bounded.

A parquet file of some kilobytes can hold gigabytes: a page that decompresses to them, or one long text that is stored
once and repeated a million times. So rows come out of a file one by one, memory is bounded while the next ones are
read, and a file that says far more than its size is refused.
"""

from __future__ import annotations

import json
import stat
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from compress.errors import PlanError
from compress.limits import GIB, MIB, LimitExceeded, bounded_memory, each_within

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

T = TypeVar("T")
Row = tuple[str, Any]  # its place, for messages, and what it holds

PARQUET_ROWS = 1024  # rows held at once; a row of web text is a few KiB
ROWS_MEMORY = 2 * GIB  # for reading the next rows: the pages of a column, or one line
MAX_FILE = 4 * GIB  # of a .txt file, which is held as a whole
MAX_ARRAY, ARRAY_MEMORY = GIB, 8 * GIB  # of a .json file, and for the objects that it is parsed into
MAX_LINE = 64 * MIB  # of a .jsonl file; the Bible has 4 MiB
SMALL = MIB  # a line of no more cannot be large as objects
MAX_RATIO, FREE = 200, 256 * MIB  # documents in memory per size of the file, and how much there may be of any file


def json_rows(path: Path) -> Iterator[Row]:
    """Each row of a .jsonl or .json file, with its place for messages. Raises PlanError where there is no JSON."""
    if path.suffix.lower() == ".json":
        text = decode(read(path, MAX_ARRAY), path)
        if text.lstrip().startswith("["):
            with _refused(str(path)), bounded_memory(ARRAY_MEMORY):
                rows = _parsed(text, str(path))
            for number, row in enumerate(rows, start=1):
                yield f"{path}, item {number}", row
            return
    with _refused(str(path)):
        yield from _lines(path)


def _lines(path: Path) -> Iterator[Row]:
    number = 0
    try:
        with path.open("rb") as file:
            while line := file.readline(MAX_LINE + 1):
                number += 1
                place = f"{path}:{number}"
                if len(line) > MAX_LINE:
                    fix = "write one JSON object per line, or cut the document"
                    raise PlanError(f"a line has more than {MAX_LINE:,} bytes", where=place, fix=fix)
                text = decode(line, path, number)
                if text.strip():
                    with bounded_memory(ROWS_MEMORY if len(line) > SMALL else None):
                        row = _parsed(text, place)
                    yield place, row
    except OSError as error:
        raise unreadable(path, error) from error


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        fix = "write one JSON object per line" if ":" in where else "write an array of objects"
        raise PlanError(f"not JSON: {error}", where=where, fix=fix) from error


def parquet_rows(path: Path, choose: Callable[[list[str]], str]) -> Iterator[Row]:
    """Each row of one column of a .parquet file; `choose` names it. Raises PlanError where that cannot be read."""
    import pyarrow  # type: ignore[import-untyped]  # here, because only parquet needs it
    import pyarrow.parquet  # type: ignore[import-untyped]

    def rows() -> Iterator[Row]:
        number = 0
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                chosen = choose(file.schema_arrow.names)
                leaves = [file.schema.column(index) for index in range(len(file.schema))]
            texts = [leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY"]
            mine = [path for path in texts if path.split(".")[0] == chosen]
            # As a dictionary: a text that is stored once and repeated is in memory once.
            with pyarrow.parquet.ParquetFile(path, read_dictionary=mine) as file:
                for batch in each_within(file.iter_batches(batch_size=PARQUET_ROWS, columns=[chosen]), ROWS_MEMORY):
                    # A text is in memory already; a list may name it any number of times.
                    bound = ROWS_MEMORY if pyarrow.types.is_nested(batch.schema.types[0]) else None
                    for value in batch.column(0):
                        number += 1
                        with bounded_memory(bound):
                            row = {chosen: value.as_py()}
                        yield f"{path}, row {number}", row
        except MemoryError:  # pyarrow's is an ArrowException, too
            raise
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise PlanError(
                f"cannot be read as parquet after {number} rows ({' '.join(str(error).split())[:500]})",
                where=str(path),
                fix="write or download it again",
            ) from error

    with _refused(str(path)):
        yield from rows()


@contextmanager
def _refused(where: str) -> Iterator[None]:
    """Turn a bound that was reached into the PlanError of a file."""
    try:
        yield
    except (LimitExceeded, MemoryError) as error:
        problem = str(error) if isinstance(error, LimitExceeded) else "a row does not fit into memory"
        fix = "the file is damaged or hostile; cut it into smaller documents if you trust it"
        raise PlanError(f"cannot be read: {problem}", where=where, fix=fix) from None


def modest(documents: Iterable[T], path: Path) -> Iterator[T]:
    """The documents of a file, as long as they are not far more than the file. Raises PlanError beyond that."""
    size = path.stat().st_size
    held, limit = 0, max(FREE, MAX_RATIO * size)
    for number, document in enumerate(documents, start=1):
        held += _memory_of(document)
        if held > limit:
            raise PlanError(
                f"its first {number:,} rows take {held:,} bytes of memory, the file has {size:,}",
                where=str(path),
                fix="the file is a decompression bomb; if you trust it, write the rows that you need as .jsonl",
            )
        yield document


def _memory_of(value: Any) -> int:
    if isinstance(value, list):
        return sys.getsizeof(value) + sum(map(_memory_of, value))
    if isinstance(value, dict):
        return sys.getsizeof(value) + sum(map(_memory_of, value.values()))
    return sys.getsizeof(value)


def read(path: Path, limit: int = MAX_FILE) -> bytes:
    """All bytes of a file. Raises PlanError where it cannot be read, or has more than `limit`."""
    try:
        check_regular(path)
        size = path.stat().st_size
        if size > limit:
            problem = f"has {size:,} bytes; of a {path.suffix} file at most {limit:,} are read"
            raise PlanError(problem, where=str(path), fix="write it as .jsonl or .parquet, which are read row by row")
        return path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from error


def check_regular(path: Path) -> None:
    """Refuse a FIFO or a device, which may never end. Raises PlanError, and OSError where there is nothing."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise PlanError("is not a file", where=str(path), fix="give a file of text or data")


def decode(data: bytes, path: Path, line: int = 1) -> str:
    """`data`, which starts at `line` of `path`, as text; a byte order mark is an encoding's signature, not text."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        bad = line + data.count(b"\n", 0, error.start)
        raise PlanError(f"not UTF-8: {error.reason}", where=f"{path}:{bad}", fix="convert the file to UTF-8") from error


def unreadable(path: Path, error: OSError) -> PlanError:
    """The refusal of a file that the system does not give."""
    reason = error.strerror or str(error)
    return PlanError(f"cannot be read: {reason}", where=str(path), fix="correct the path or its permissions")
