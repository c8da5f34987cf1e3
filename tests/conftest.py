"""What several test modules share: quiet and single-threaded libraries, the asset folder, tiny models with a tokenizer.

torch stays with one thread: the tiny models gain nothing from two, and pytest-xdist gives each core a process.
"""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path
from string import ascii_letters
from typing import TYPE_CHECKING, Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jinja2
import pytest
import torch

if not torch.cuda.is_available():  # read where a kernel is defined, Triton's own among them, which transformers imports
    os.environ["TRITON_INTERPRET"] = "1"
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

from tests.models import save_tiny

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / "examples" / "reference"
LETTERS = ascii_letters


def compile_report_once() -> None:
    """Compiling the report's pages takes half as long as all of a tiny run: do it once per process, not per run."""
    compiled: dict[str, Any] = {}
    original = jinja2.Environment.compile

    def compile_once(self: jinja2.Environment, source: Any, name: str | None = None, *more: Any, **options: Any) -> Any:
        if name is None or not name.startswith("report"):
            return original(self, source, name, *more, **options)
        if name not in compiled:
            compiled[name] = original(self, source, name, *more, **options)
        return compiled[name]

    jinja2.Environment.compile = compile_once  # type: ignore[method-assign]


def pytest_configure() -> None:
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    compile_report_once()


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """A test that changes the number of threads changes it for itself only."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results of tasks are kept per test run, not with the user's."""
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder of models and texts that are not part of the project; tests skip where it is absent."""
    folder = Path(os.environ.get("COMPRESS_ASSETS") or ROOT.parent / "shared" / "assets")
    if not folder.is_dir():
        pytest.skip(f"no assets at {folder}; set COMPRESS_ASSETS")
    return folder


def write_tokenizer(directory: Path, *, pad: str = "<pad>") -> None:
    """A tokenizer of single characters, the tiny models' vocabulary; <s> comes first, `pad` is the padding token."""
    special = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
    letters = {letter: number for number, letter in enumerate(["Ġ", "Ċ", *LETTERS, *".,!?"], start=len(special))}
    # Byte-level BPE without merges: some families have a tokenizer class of their own that knows no other kind.
    backend = Tokenizer(models.BPE(special | letters, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token=pad
    ).save_pretrained(directory)


def some_text(count: int, seed: int = 0) -> str:
    """Text of about so many characters (and tokens), in paragraphs of 3 to 20."""
    draw = random.Random(seed)
    paragraphs = ["".join(draw.choices(LETTERS + ",.", k=draw.randint(3, 20))) for _ in range(count // 13)]
    return "\n\n".join(paragraphs)


def tiny_directory(directory: Path, family: str, **settings: Any) -> Path:
    """`save_tiny`, with a tokenizer and with a text beside it: a model directory that a plan can name."""
    settings = {"tied": True, "gqa": True} | settings
    save_tiny(directory, family, **settings)
    write_tokenizer(directory)
    (directory.parent / "text.txt").write_text(some_text(3000))
    return directory


@pytest.fixture(scope="session")
def tiny_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model and a text; not to be changed."""
    folder = tmp_path_factory.mktemp("source")
    tiny_directory(folder / "model", "llama", blocks=2)
    return folder


@pytest.fixture
def folder(tiny_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a copy of them."""
    shutil.copytree(tiny_source, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def files_of(directory: Path) -> dict[str, bytes]:
    """The files of an output that must not differ between two runs: all but the reports, which carry times."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name not in ("report.json", "report.html")
    }


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equality of dtype, shape and bits."""
    same = a.dtype == b.dtype and a.shape == b.shape
    return same and torch.equal(a.contiguous().flatten().view(torch.uint8), b.contiguous().flatten().view(torch.uint8))
