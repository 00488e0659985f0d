import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

import gstlib

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture
def environment() -> list:
    return yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]


def test_environment_takes_its_requirements_from_the_project(environment):
    (pip,) = [entry["pip"] for entry in environment if isinstance(entry, dict)]
    assert pip == ["-e .[book,test]"] and {"book", "test"} <= PROJECT["optional-dependencies"].keys()
    assert [re.match(r"[a-z]+", entry)[0] for entry in environment if isinstance(entry, str)] == ["python", "pip"]


def test_environment_s_python_is_one_the_project_takes(environment):
    (python,) = [entry for entry in environment if isinstance(entry, str) and entry.startswith("python")]
    lowest = re.search(r"\d+\.\d+", python)[0]
    assert Version(lowest) in SpecifierSet(PROJECT["requires-python"])


def test_version_is_stated_once():
    assert gstlib.__version__ == PROJECT["version"]


def test_every_requirement_is_bounded_below_and_named_once():
    for requirements in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()):
        parsed = [Requirement(text) for text in requirements]
        assert len({r.name for r in parsed}) == len(parsed)
        assert all(any(s.operator in (">=", "==") for s in r.specifier) for r in parsed)


def test_what_the_package_imports_is_required():
    imported = set()
    for file in (ROOT / "gstlib").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module.split(".")[0])
    distributions = {"PIL": "pillow", "sklearn": "scikit-learn", "IPython": "ipykernel",
                     "vl_convert": "vl-convert-python", "torch_pruning": "torch-pruning"}
    outside = {distributions.get(name, name) for name in imported - sys.stdlib_module_names - {"gstlib"}}
    required = {Requirement(text).name for text in PROJECT["dependencies"]}
    optional = {Requirement(text).name for texts in PROJECT["optional-dependencies"].values() for text in texts}
    assert {"torch", "numpy", "pandas", "pyarrow"} <= outside <= required | optional
