"""What a task's name means: one of lm-eval's, a task file, or a form that comes with compress and a file of samples.

``minimal_pairs:blimp/transitive.jsonl`` is the form `minimal_pairs` (``tasks/minimal_pairs.yaml``) over that file. Of a
folder each file of samples is a task. Anything else is looked up by lm-eval.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.calibration.plan_source import located
from compress.calibration.sources import is_file
from compress.errors import PlanError, nearest

if TYPE_CHECKING:
    from collections.abc import Iterable

FORMS_FOLDER = Path(__file__).parent / "tasks"
FORMS = tuple(sorted(path.stem for path in FORMS_FOLDER.glob("*.yaml")))
REQUIRED = ("task", "output_type", "doc_to_text", "doc_to_target")
SAMPLES = (".jsonl", ".txt", ".parquet")  # of a folder; .json is left out, which is often something else
EITHER = (("dataset_path", "custom_dataset"), ("test_split", "validation_split"))


@dataclass(frozen=True)
class Spec:
    """One task or group of lm-eval: `text` names it in a plan, `name` in results."""

    text: str
    name: str
    form: str | None = None
    file: str | None = None


def read_specs(texts: Iterable[str], folder: Path, where: str) -> list[Spec]:
    """The tasks that a plan or a command names.

    Args:
        texts: the names.
        folder: what relative files are relative to.
        where: names the setting in messages.

    Raises:
        PlanError: an unknown form, a form without a file, a missing file, or two tasks of one name.
    """
    try:
        specs = [spec for text in texts for spec in _read(text, folder, where)]
    except OSError as error:  # a name that is too long, a folder that may not be read
        problem, fix = f"cannot be read: {error.strerror or error}", "correct the path or its permissions"
        raise PlanError(problem, where=f"{where}: {error.filename}", fix=fix) from None
    for index, spec in enumerate(specs):
        for other in specs[:index]:
            if spec.name == other.name:
                both = f'"{other.text}" and "{spec.text}"' if other.text != spec.text else f'"{spec.text}", twice'
                raise PlanError(f"two tasks are named {spec.name}: {both}", where=where, fix="give one; rename a file")
    return specs


def _read(text: str, folder: Path, where: str) -> list[Spec]:
    form, colon, file = text.partition(":")
    if not colon:
        if text in FORMS:
            fix = f'write "{text}:FILE"; docs/evaluate.md says what is in it'
            raise PlanError(f'"{text}" needs a file of samples', where=where, fix=fix)
        if text.endswith((".yaml", ".yml")):
            path = folder / Path(text).expanduser()
            if not path.is_file():
                raise PlanError("no such task file", where=str(path), fix="correct the path")
            return [Spec(text, path.stem, file=str(path))]
        return [Spec(text, text)]
    if form not in FORMS:
        raise PlanError(f'unknown form of task "{form}"{nearest(form, FORMS)}', where=where, fix=_forms())
    place = located(file, folder)
    path = Path(place)
    if path.is_dir():
        files = sorted(one for one in path.iterdir() if one.suffix in SAMPLES)
        if not files:
            raise PlanError("holds no file of samples", where=str(path), fix=f"give files in {', '.join(SAMPLES)}")
        return [Spec(f"{form}:{Path(file) / one.name}", f"{form}:{one.stem}", form, str(one)) for one in files]
    if is_file(place) and not path.is_file():
        others = [one.name for one in path.parent.iterdir()] if path.parent.is_dir() else []
        raise PlanError(f"no such file{nearest(path.name, others)}", where=place, fix="correct the path")
    return [Spec(text, f"{form}:{path.stem}", form, place)]


def _forms() -> str:
    return f"the forms are {', '.join(FORMS)}; a task of lm-eval has no colon"


def load_tasks(spec: Spec, include_path: Path | None) -> Any:
    """lm-eval's tasks of one spec, with their documents loaded: ``TaskManager.load``.

    Raises:
        PlanError: there is no such task, its file lacks a field, or its documents cannot be loaded.
    """
    from lm_eval.tasks import TaskManager

    if spec.form:
        found = TaskManager(include_path=str(FORMS_FOLDER), include_defaults=False, metadata={"file": spec.file})
        return _build(found, spec.form, spec)
    if spec.file:
        _check_task_file(Path(spec.file))
        return _build(TaskManager(include_defaults=False), spec.file, spec)
    own = _own(include_path)
    if own and spec.name in own.all_tasks:
        entry = own.task_index[spec.name]
        if entry.yaml_path:
            _check_task_file(Path(entry.yaml_path))
        return _build(own, spec.name, spec)
    _must_be_stock(spec.name, own, "tasks")
    return _build(_stock(), spec.name, spec)


def check_names(specs: Iterable[Spec], include_path: Path | None, where: str) -> None:
    """Refuse names that neither lm-eval nor the folder has, without loading a task.

    Args:
        specs: what `read_specs` made of the names.
        include_path: the folder of the user's task files.
        where: names the setting in messages.

    Raises:
        PlanError: it names the nearest.
    """
    names = [spec.name for spec in specs if not spec.form and not spec.file]
    own = _own(include_path) if names else None
    for name in names:
        if not (own and name in own.all_tasks) and not _stated(name):
            _must_be_stock(name, own, where)


def _must_be_stock(name: str, own: Any, where: str) -> None:
    stock = _stock()
    if name not in stock.all_tasks:
        hint = nearest(name, [*(own.all_tasks if own else ()), *stock.all_tasks, *FORMS])
        raise PlanError(f'unknown task "{name}"{hint}', where=where, fix=f"lm-eval ls tasks names its; {_forms()}")


def _stated(name: str) -> bool:
    """Whether a file of lm-eval states the name as such: a quarter of a second, where `_stock` takes seven.

    Names that are made otherwise, by lists of tags and included files, are in `_stock` alone.
    """
    import lm_eval.tasks

    line = re.compile(rb"^[ -]*(?:task|group|tag): *[\"']?" + re.escape(name.encode()) + rb"[\"']?\s*$", re.MULTILINE)
    return any(line.search(path.read_bytes()) for path in Path(lm_eval.tasks.__file__).parent.rglob("*.yaml"))


def _own(include_path: Path | None) -> Any:
    """The user's own tasks; None without a folder of them."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(include_path), include_defaults=False) if include_path else None


@cache
def _stock() -> Any:
    """lm-eval's own tasks: reading their files takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _build(manager: Any, name: str, spec: Spec) -> Any:
    try:
        return manager.load([name])
    except PlanError:
        raise
    except Exception as error:  # datasets, jinja and lm-eval raise what they like
        raise PlanError(
            f"lm-eval cannot load this task ({reason(error)})",
            where=spec.text,
            fix="go online for a task of the hub, correct the task file, or give samples as FORM:FILE",
        ) from None


def reason(error: Exception) -> str:
    """An error of code that is not ours, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500] or 'no reason given'}"


def _check_task_file(path: Path) -> None:
    """Refuse a task file without what every task needs; lm-eval's own errors do not say what is missing."""
    from lm_eval.tasks._yaml_loader import load_yaml

    try:
        found = load_yaml(path, resolve_func=False)
    except Exception as error:  # yaml's errors, missing includes, cycles
        raise PlanError(f"not a task file: {error}", where=str(path), fix="correct the YAML") from None
    if "group" in found or "class" in found:
        return
    needed = list(REQUIRED) + (["doc_to_choice"] if found.get("output_type") == "multiple_choice" else [])
    missing = [f'"{key}"' for key in needed if key not in found]
    missing += [" or ".join(f'"{key}"' for key in keys) for keys in EITHER if not any(key in found for key in keys)]
    if missing:
        near = nearest(missing[0].split('"')[1], found)
        raise PlanError(f"the task lacks {', '.join(missing)}{near}", where=str(path), fix=f"add {missing[0]}: ...")
