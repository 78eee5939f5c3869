"""launch/environment.sh with a fake python that only notes what it is asked to install, and where."""

import os
import shutil
import subprocess

import pytest

from tests.conftest import ROOT

# `python -m venv .venv` makes an environment whose python is this script too.
FAKE_PYTHON = """#!/bin/bash
if [ "$2" = venv ]; then
    mkdir -p "$3/bin"
    cp "$0" "$3/bin/python"
    echo "export PATH=$PWD/$3/bin:\\$PATH" > "$3/bin/activate"
else
    echo "$0 $*" >> installs
fi
"""


@pytest.fixture
def checkout(tmp_path):
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    for name in ("requirements.txt", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def set_up(checkout, environment: str, **variables: str) -> tuple[str, list[str]]:
    """Source environment.sh with the python of a folder; return its output and the commands that install packages."""
    for name in ("python", "python3"):
        path = checkout / environment / "bin" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(FAKE_PYTHON)
        path.chmod(0o755)
    settings = {"PATH": f"{path.parent}:{os.environ['PATH']}", **variables}
    command = ["bash", "-euo", "pipefail", "-c", "source launch/environment.sh"]
    done = subprocess.run(command, cwd=checkout, env=settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    installs = checkout / "installs"
    return done.stdout, installs.read_text().splitlines() if installs.exists() else []


@pytest.mark.parametrize("sign", ["name", "folder", "none"])
def test_packages_are_never_installed_into_the_base_of_conda(checkout, sign):
    """`sign`: how the base is known. Without any active environment the result is the same."""
    variables = {} if sign == "none" else {"CONDA_PREFIX": str(checkout / "conda")}
    if sign == "name":
        variables["CONDA_DEFAULT_ENV"] = "base"
    if sign == "folder":
        (checkout / "conda" / "condabin").mkdir(parents=True)
        variables["CONDA_DEFAULT_ENV"] = str(checkout / "conda")
    text, installs = set_up(checkout, "conda", **variables)
    assert ("base environment is active" in text) == (sign != "none")
    (install,) = installs
    assert install.startswith(f"{checkout}/.venv/bin/python -m pip install") and "--constraint" in install
    assert set_up(checkout, "conda", **variables)[1] == installs  # nothing is missing the second time


@pytest.mark.parametrize(
    "variables",
    [
        {"CONDA_PREFIX": "{here}/active", "CONDA_DEFAULT_ENV": "reg"},
        {"VIRTUAL_ENV": "{here}/active"},
        {"VIRTUAL_ENV": "{here}/active", "CONDA_PREFIX": "{here}/conda", "CONDA_DEFAULT_ENV": "base"},
    ],
)
def test_an_active_environment_is_used(checkout, variables):
    text, installs = set_up(checkout, "active", **{k: v.format(here=checkout) for k, v in variables.items()})
    assert text == f"environment: {checkout}/active (active)\n" and not (checkout / ".venv").exists()
    (install,) = installs
    assert install.endswith("-m pip install --quiet --requirement requirements.txt")
