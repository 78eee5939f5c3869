"""The structure of the repository: where imports may point, which files may import which library."""

import ast
import importlib.util
import re
import subprocess

import pytest

from tests.conftest import ROOT

# A module may import its own level and the levels below.
LEVELS = [
    {"common"},
    {"models"},
    {"loss", "samplers", "dataset"},
    {"training", "generation", "evaluations", "preprocessing"},
    {"train", "generate", "export", "experiments", "benchmarks", "docs"},
]
EXCEPTIONS = {("models/pipeline.py", "samplers")}  # notebooks import the pipeline from models
LIBRARIES = {"diffusers": {"models/autoencoder.py", "models/pipeline.py"}, "timm": {"models/encoders.py"}}


def tracked(pattern: str) -> list[str]:
    found = subprocess.run(["git", "ls-files", pattern], cwd=ROOT, capture_output=True, text=True)
    if found.returncode != 0:
        pytest.skip("the code is not in a git repository")
    return [name for name in found.stdout.split() if (ROOT / name).exists()]


def product_imports() -> list[tuple[str, str]]:
    """Return pairs of a file and the first part of a module that it imports."""
    pairs = []
    for name in tracked("*.py"):
        if name.startswith("tests/"):
            continue
        for node in ast.walk(ast.parse((ROOT / name).read_text())):
            if isinstance(node, ast.Import):
                pairs += [(name, alias.name.split(".")[0]) for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                pairs.append((name, node.module.split(".")[0]))
    return pairs


def level(module: str) -> int | None:
    return next((number for number, names in enumerate(LEVELS) if module in names), None)


def test_no_import_points_back():
    back = []
    for name, module in product_imports():
        importer = level(name.split("/")[0].removesuffix(".py"))
        assert importer is not None, f"{name} is in no level"
        if level(module) is not None and level(module) > importer and (name, module) not in EXCEPTIONS:
            back.append((name, module))
    assert not back


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_library_is_imported_where_it_belongs(library):
    product = [
        (name, module) for name, module in product_imports() if not name.startswith(("experiments", "benchmarks"))
    ]
    assert {name for name, module in product if module == library} == LIBRARIES[library]


def test_images_are_opened_in_one_place():
    """Elsewhere, Pillow could choose decoders that start other programs, and would ignore damage."""
    opened = {name for name in tracked("*.py") if re.search(r"\bImage\.open\(|\bimread\(", (ROOT / name).read_text())}
    product = {name for name in opened if not name.startswith("tests/")}
    assert product == {"common/images.py"}
    assert not any("Image.open" in (ROOT / name).read_text() for name in tracked("*.ipynb"))


def test_few_files_lie_at_the_top():
    assert len([name for name in tracked("*") if "/" not in name]) <= 16


def test_the_page_of_flags_is_up_to_date():
    spec = importlib.util.spec_from_file_location("flags", ROOT / "docs" / "flags.py")
    flags = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(flags)
    assert (ROOT / "docs" / "flags.md").read_text() == flags.page(), "run python docs/flags.py"
