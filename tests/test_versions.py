"""The two files of exact versions keep to the bounds in pyproject.toml: one at the lowest, one within."""

from __future__ import annotations

import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.conftest import ROOT


def bounds(*extras: str) -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = [text for extra in extras for text in project["optional-dependencies"][extra]]
    return [Requirement(text) for text in project["dependencies"] + named]


def pins(name: str) -> dict[str, Version]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(package): Version(version) for package, version in pairs}


@pytest.mark.parametrize("requirement", bounds("test"), ids=str)
def test_the_lowest_are_those_that_are_allowed(requirement: Requirement) -> None:
    (lowest,) = [one.version for one in requirement.specifier if one.operator == ">="]
    assert pins("constraints-lowest.txt")[canonicalize_name(requirement.name)] == Version(lowest)


@pytest.mark.parametrize("requirement", bounds("test", "dev", "eval", "readers", "track"), ids=str)
def test_what_is_installed_is_allowed(requirement: Requirement) -> None:
    assert pins("constraints.txt")[canonicalize_name(requirement.name)] in requirement.specifier
