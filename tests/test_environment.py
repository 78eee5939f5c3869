"""launch/environment.sh with a fake python that only notes what it is asked to install, and where."""

import os
import shutil
import subprocess

import pytest

from tests.conftest import ROOT

# `python -m venv .venv` makes an environment whose python is this script, too. `python -c` checks the version.
FAKE_PYTHON = """#!/bin/bash
if [ "$1" = -c ]; then
    exit "${TOO_OLD:-0}"
elif [ "$2" = venv ]; then
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


def source(checkout, environment: str, **variables: str) -> subprocess.CompletedProcess:
    """Source environment.sh in a shell whose python lies in the folder `environment`."""
    for name in ("python", "python3"):
        path = checkout / environment / "bin" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(FAKE_PYTHON)
        path.chmod(0o755)
    settings = {"PATH": f"{path.parent}:{os.environ['PATH']}", **variables}
    command = ["bash", "-euo", "pipefail", "-c", "source launch/environment.sh"]
    return subprocess.run(command, cwd=checkout, env=settings, capture_output=True, text=True)


def installs(checkout) -> list[str]:
    """Return the commands that have installed packages."""
    return (checkout / "installs").read_text().splitlines()


@pytest.mark.parametrize("sign", ["name", "folder", "none"])
def test_packages_are_never_installed_into_the_base_of_conda(checkout, sign):
    """`sign`: how the base is recognized. With no active environment the result is the same."""
    variables = {} if sign == "none" else {"CONDA_PREFIX": str(checkout / "conda")}
    if sign == "name":
        variables["CONDA_DEFAULT_ENV"] = "base"
    if sign == "folder":
        (checkout / "conda" / "condabin").mkdir(parents=True)
        variables["CONDA_DEFAULT_ENV"] = str(checkout / "conda")
    done = source(checkout, "conda", **variables)
    assert done.returncode == 0 and ("base environment is active" in done.stdout) == (sign != "none")
    (install,) = installs(checkout)
    assert install.startswith(f"{checkout}/.venv/bin/python -m pip install") and "--constraint" in install
    assert source(checkout, "conda", **variables).returncode == 0
    assert installs(checkout) == [install]  # nothing is missing the second time


@pytest.mark.parametrize(
    "variables",
    [
        {"CONDA_PREFIX": "{here}/active", "CONDA_DEFAULT_ENV": "reg"},
        {"VIRTUAL_ENV": "{here}/active"},
        {"VIRTUAL_ENV": "{here}/active", "CONDA_PREFIX": "{here}/conda", "CONDA_DEFAULT_ENV": "base"},
    ],
)
def test_an_active_environment_is_used(checkout, variables):
    done = source(checkout, "active", **{name: value.format(here=checkout) for name, value in variables.items()})
    assert done.stdout == f"environment: {checkout}/active (active)\n" and not (checkout / ".venv").exists()
    (install,) = installs(checkout)
    assert install.endswith("-m pip install --quiet --requirement requirements.txt")


def test_an_old_python_is_refused(checkout):
    done = source(checkout, "old", TOO_OLD="1")
    assert done.returncode == 1 and "older than Python 3.10" in done.stderr and not (checkout / ".venv").exists()
