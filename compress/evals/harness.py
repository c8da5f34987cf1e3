"""lm-eval on an emitted directory, through its own Python API, with each linear on the runtime's kernel.

Every task is evaluated alone, so that its numbers do not depend on which others are asked for: lm-eval sorts the
requests of all tasks into common batches, and the last digits of a log-likelihood depend on the batch. With the same
settings lm-eval's own command gives the same numbers. One setting is not its default: log-probabilities are taken in
float32, since in 16 bits a tenth of all choices are ties.

Results are cached by model, task (configuration and documents), versions and conditions.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import io
import json
import logging
import math
import os
import random
import re
import sys
from importlib.metadata import version
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from traceback import walk_tb
from typing import TYPE_CHECKING, Any

from compress import __version__
from compress.calibration.sources import file_digest
from compress.calibration.tokenizer import load_tokenizer
from compress.errors import CompressError, PlanError
from compress.evals.outcomes import Outcomes, Sample, Task, filters_of, prompts_hash
from compress.evals.specs import load_tasks, read_specs, reason

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch

    from compress.evals.specs import Spec
    from compress.plan import Evaluate

WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "adapter_config.json")
WORDS = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.jinja")


def run_tasks(
    directory: Path,
    settings: Evaluate,
    *,
    folder: Path = Path(),
    device: torch.device | None = None,
    trust_remote_code: bool = False,
    cache: bool = True,
    say: Callable[[str], None] | None = None,
) -> Outcomes:
    """Evaluate a model directory on the tasks of `settings`.

    Args:
        directory: an output of compress in any format, or any model in safetensors.
        settings: tasks and conditions.
        folder: what relative files are relative to.
        device: where to compute; the CPU by default.
        trust_remote_code: run Python code that comes with the model.
        cache: use what an earlier evaluation found, and keep what this one finds.
        say: takes a line for each task.

    Raises:
        PlanError: lm-eval is not installed, or a task or its samples are not there.
        ModelError: the directory cannot be loaded.
    """
    need_harness()
    import torch

    device = device or torch.device("cpu")
    specs = read_specs(settings.tasks, folder, "tasks")
    runner = Runner(directory, settings, device, trust_remote_code=trust_remote_code)
    include = folder / settings.include_path if settings.include_path else None
    if include and not include.is_dir():
        raise PlanError("no such folder", where=f"include_path {include}", fix="give the folder of your task files")
    parts = []
    for spec in specs:
        with quiet():
            loaded = load_tasks(spec, include)
        parts.append(_one(spec, loaded, runner, cache=cache, say=say))
    tasks = tuple(task for part in parts for task in part.tasks)
    samples = {name: found for part in parts for name, found in part.samples.items()}
    if len(samples) < len(tasks):
        raise PlanError("two of the tasks are the same one", where="tasks", fix="name each task once")
    groups = {name: found for part in parts for name, found in part.groups.items()}
    return runner.outcomes(tasks, groups).with_samples(samples)


def need_harness() -> None:
    """Raises PlanError where lm-eval is not installed."""
    if find_spec("lm_eval") is None:
        fix = "pip install 'llm-compress[eval]'"
        raise PlanError("tasks need lm-eval, which is not installed", where="tasks", fix=fix)


def _one(spec: Spec, loaded: Any, runner: Runner, *, cache: bool, say: Callable[[str], None] | None) -> Outcomes:
    """The outcomes of one spec: from the cache, or by running it."""
    for task in loaded["tasks"].values():
        settle(task, runner.settings.num_fewshot)
    hashes = {name: task_hash(task) for name, task in loaded["tasks"].items()}
    documents = {name: documents_hash(task, runner.settings.limit) for name, task in loaded["tasks"].items()}
    entry = cache_folder() / f"{runner.key(spec, hashes, documents)}.json"
    if cache and entry.is_file():
        try:
            found = Outcomes.load(entry)
        except PlanError:
            found = None  # damaged or of another version: measured again
        if found:
            if say:
                say(f"  {spec.name}: from the cache")
            known = tuple(task.model_copy(update={"spec": spec.text}) for task in found.tasks)  # the path may be new
            return found.model_copy(update={"tasks": known})
    try:
        with quiet():
            results = runner.run(loaded)
    except PlanError as error:  # of a sample: the model does not know whose
        raise PlanError(
            error.problem, where=spec.text if error.where == "tasks" else error.where, fix=error.fix
        ) from None
    names = {name: spec.name if spec.form else name for name in loaded["tasks"]}
    tasks, samples = [], {}
    for name, task in loaded["tasks"].items():
        samples[names[name]] = [_sample(one, task) for one in results["samples"][name]]
        tasks.append(_task(names[name], spec, hashes[name], task, results["results"][name], samples[names[name]]))
    groups = {name: _figures(values) for name, values in results.get("groups", {}).items()}
    made = runner.outcomes(tuple(tasks), groups).with_samples(samples)
    if cache:
        entry.parent.mkdir(parents=True, exist_ok=True)
        made.save(entry)
    if say:
        say(f"  {spec.name}: {sum(task.samples for task in tasks):,} samples")
    return made


class Runner:
    """A directory under fixed conditions; the model is loaded when the first task needs it."""

    def __init__(
        self, directory: Path, settings: Evaluate, device: torch.device, *, trust_remote_code: bool = False
    ) -> None:
        """Hash the directory and read its tokenizer and configuration."""
        from compress.export.reader import open_model

        open_model(directory, trust_remote_code=trust_remote_code)  # refuses what is no model, before it is hashed
        self.directory, self.settings, self.device, self.trusted = directory, settings, device, trust_remote_code
        self.tokenizer = load_tokenizer(directory, trust_remote_code=trust_remote_code)
        self.model_hash = model_hash(directory)
        self._lm: Any = None
        self._dtype = settings.dtype

    def lm(self) -> Any:
        """The model, as lm-eval's."""
        if self._lm is None:
            from compress.evals.lm import HarnessLM
            from compress.runtime import load

            model = load(self.directory, device=self.device, dtype=self.settings.dtype, trust_remote_code=self.trusted)
            self._lm = HarnessLM(model, self.tokenizer, self.settings.batch_size, self.settings.add_bos_token)
        return self._lm

    def run(self, loaded: Any) -> Any:
        """lm-eval's results on loaded tasks, samples among them. Raises PlanError for what goes wrong in a task."""
        from lm_eval.evaluator import evaluate

        lm = self.lm()
        seed_as_harness()
        try:
            return evaluate(lm, loaded, limit=self.settings.limit, bootstrap_iters=0, log_samples=True)
        except (CompressError, MemoryError):
            raise
        except Exception as error:  # prompts, filters and metrics are a task's own code and templates
            if any(frame.f_locals.get("self") is lm for frame, _ in walk_tb(error.__traceback__)):
                raise  # the model was at work
            problem = f"lm-eval cannot evaluate this task ({reason(error)})"
            raise PlanError(problem, where="tasks", fix="correct the task file or its samples") from error

    def conditions(self) -> dict[str, Any]:
        """What two evaluations must share to be compared sample by sample, and versions."""
        settings = self.settings
        return {
            "compress_version": __version__,
            "harness": version("lm_eval"),
            "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers", "datasets")},
            "device": self.device.type,
            "dtype": settings.dtype,
            "batch_size": settings.batch_size,
            "limit": settings.limit,
            "num_fewshot": settings.num_fewshot,
            "add_bos_token": settings.add_bos_token,
        }

    def key(self, spec: Spec, *more: Any) -> str:
        """What the cache knows a result by."""
        content = [self.model_hash, spec.name, self.conditions(), *more]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def outcomes(self, tasks: tuple[Task, ...], groups: dict[str, dict[str, float | None]]) -> Outcomes:
        """The outcomes of some tasks, without their samples."""
        return Outcomes(
            model=self.directory.resolve().name,
            model_hash=self.model_hash,
            tokenizer_hash=tokenizer_hash(self.tokenizer),
            tasks=tasks,
            groups=groups,
            **self.conditions(),
        )


def model_hash(directory: Path) -> str:
    """SHA-256 over the files that a model and its tokenizer are made of, branches beside the weights included."""
    found = {path for pattern in (*WEIGHTS, *WORDS) for path in directory.rglob(pattern) if path.is_file()}
    named = sorted((path.relative_to(directory).as_posix(), file_digest(path)) for path in found)
    return hashlib.sha256(json.dumps(named).encode()).hexdigest()


def tokenizer_hash(tokenizer: Any) -> str:
    """SHA-256 over what a tokenizer does with a text; how it pads and truncates is left out."""
    if tokenizer.is_fast:
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        content = {key: value for key, value in content.items() if key not in ("padding", "truncation")}
    else:
        content = sorted(tokenizer.get_vocab().items())
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id, list(tokenizer("a")["input_ids"]))
    return hashlib.sha256(json.dumps([content, special], sort_keys=True).encode()).hexdigest()


def check_alike(tokenizer: Any, dense: Any, directory: Path) -> None:
    """Raises PlanError where the tokenizers of a model in `directory` and of the dense one differ."""
    if tokenizer_hash(tokenizer) != tokenizer_hash(dense):
        fix = "copy the tokenizer of the dense model"
        raise PlanError("its tokenizer differs from the dense model's", where=str(directory), fix=fix)


def task_hash(task: Any) -> str:
    """SHA-256 over a task's configuration: prompts, targets, filters, metrics, number of examples; not its files."""
    config = task.dump_config()
    kept = {key: value for key, value in config.items() if key not in ("dataset_kwargs", "metadata", "task")}
    kept["version"] = str(task.VERSION)
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=_source).encode()).hexdigest()


def _source(value: Any) -> str:
    """What stands for a value that JSON has no form of: of a function its text, for it lies elsewhere in each process.

    lm-eval writes out those of the configuration itself, but not those that the settings of its examples repeat.
    """
    try:
        return inspect.getsource(value)
    except (TypeError, OSError):
        return re.sub(r" at 0x[0-9a-f]+", "", str(value))


def documents_hash(task: Any, limit: int | None) -> str:
    """SHA-256 over what is asked, over what the examples of the prompts are drawn from, and over the task's code."""
    digest = hashlib.sha256()
    for content in _code(task):
        digest.update(content)
    asked = (doc for _, doc in task.doc_iterator(limit=limit))
    with quiet():
        shown = task.fewshot_docs() if task.get_config("num_fewshot") else ()
    for doc in chain(asked, [None], shown):
        digest.update(json.dumps(doc, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _code(task: Any) -> list[bytes]:
    """The files of the functions that a configuration names: what they call may lie there, too."""
    found: set[bytes] = set()
    waiting: list[Any] = [type(task), task.config.to_dict(keep_callable=True)]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            waiting += one.values()
        elif isinstance(one, list):
            waiting += one
        elif callable(one):
            with contextlib.suppress(TypeError, OSError):
                found.add(Path(inspect.getsourcefile(one) or "").read_bytes())
    return sorted(found)


def settle(task: Any, num_fewshot: int | None) -> None:
    """Set the number of examples in a prompt and their seed, as `simple_evaluate` does."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED

    if task.get_config("num_fewshot") is None or (num_fewshot is not None and task.get_config("num_fewshot") != 0):
        task.set_config("num_fewshot", num_fewshot or 0)
    task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)


def seed_as_harness() -> None:
    """The seeds of lm-eval's command."""
    import numpy as np
    import torch
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    torch.manual_seed(DEFAULT_OTHER_SEED)


def _task(name: str, spec: Spec, digest: str, task: Any, values: dict[str, Any], samples: list[Sample]) -> Task:
    aggregation = {metric: getattr(fn, "__name__", "other") for metric, fn in task.aggregation().items()}
    return Task(
        name=name,
        spec=spec.text,
        hash=digest,
        prompts=prompts_hash(samples),
        version=str(task.VERSION),
        num_fewshot=int(task.get_config("num_fewshot") or 0),
        output_type=task.OUTPUT_TYPE,
        samples=len(samples) // len(filters_of(samples)) if samples else 0,
        metrics=_figures(values),
        aggregation=aggregation,
        higher_is_better={metric: bool(value) for metric, value in task.higher_is_better().items()},
    )


def _figures(values: dict[str, Any]) -> dict[str, float | None]:
    """lm-eval's "acc,none" as "acc"; standard errors are left out, since the report has intervals of its own."""
    return {
        key.removesuffix(",none"): float(value)
        for key, value in values.items()
        if "," in key and "_stderr," not in key and isinstance(value, (int, float))
    }


def _sample(found: dict[str, Any], task: Any) -> Sample:
    """One of lm-eval's logged samples, less its texts."""
    asked = json.dumps([found["arguments"], found["target"]], default=str, ensure_ascii=False)
    scored: list[tuple[float, bool]] = []
    if task.OUTPUT_TYPE in ("loglikelihood", "multiple_choice"):
        scored = [(float(one[0]), bool(one[1])) for one in found["filtered_resps"]]
    elif task.OUTPUT_TYPE == "loglikelihood_rolling":
        scored = [(float(one), False) for one in found["filtered_resps"]]
    if "acc_mutual_info" in found["metrics"]:
        scored = scored[: len(scored) // 2]  # without the answers' likelihoods of their own, which follow
    gold = found["target"] if task.OUTPUT_TYPE == "multiple_choice" and type(found["target"]) is int else None
    if gold is not None and not 0 <= gold < len(scored):
        gold = None  # a label beyond the choices: lm-eval counts every answer as wrong
    return Sample(
        filter=found["filter"],
        doc_id=int(found["doc_id"]),
        doc=found["doc_hash"][:16],
        prompt=hashlib.sha256(asked.encode()).hexdigest()[:16],
        loglikelihoods=tuple(value for value, _ in scored),
        greedy=tuple(greedy for _, greedy in scored),
        gold=gold,
        metrics={name: values for name in found["metrics"] if (values := _numbers(found[name])) is not None},
    )


def _numbers(value: Any) -> tuple[float, ...] | None:
    """A metric of one sample as numbers; None for what the harness aggregates from texts, as BLEU."""
    values = value if isinstance(value, (tuple, list)) else (value,)
    try:
        return tuple(float(one) for one in values)
    except (TypeError, ValueError):
        return None


def not_finite(samples: list[Sample]) -> int:
    """How many samples have a log-likelihood that is not finite."""
    return sum(not all(map(math.isfinite, one.loglikelihoods)) for one in samples)


def cache_folder() -> Path:
    """Where results are kept: ``COMPRESS_CACHE``, or ``compress`` in the user's cache folder."""
    given = os.environ.get("COMPRESS_CACHE")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "compress/evals"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep log lines to errors, and lm-eval's progress bars to terminals."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "transformers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
