"""The house: a file imports only files of lines above its own in ORDER, or of its own folder. Nothing is run."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# From the ground floor up. A name stands for the file NAME.py or for all files of the folder NAME/.
ORDER = [
    ["infra", "reward"],
    ["questions"],
    ["data"],
    ["model"],
    ["policy"],
    ["evaluation"],
    ["training"],
    ["grpo_aqa", "sft_aqa", "eval_mmau", "toy", "prepare", "paper"],
    ["explain", "benchmarks", "reproduce"],
    ["bench"],
]
FLOOR = {name: floor for floor, names in enumerate(ORDER) for name in names}
FILES = sorted([*ROOT.glob("*.py"), *(path for name in FLOOR for path in (ROOT / name).glob("*.py"))])
COMMANDS = {"sft_aqa", "eval_mmau", "toy", "prepare", "explain", "reproduce", "bench"}
NAMES = [str(path.relative_to(ROOT)) for path in FILES]


def imported(source: str) -> set[str]:
    """The files and folders of this project that a source imports, by name."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
    return found & set(FLOOR)


def home(name: str) -> str:
    """The name in ORDER of a file."""
    return name.split("/")[0].removesuffix(".py")


@pytest.mark.parametrize("name", NAMES)
def test_a_file_imports_only_from_above_or_from_its_folder(name):
    own = home(name)
    for other in imported((ROOT / name).read_text()):
        assert FLOOR[other] < FLOOR[own] or (other == own and "/" in name), f"{name} imports {other}"
        assert other not in COMMANDS, f"{name} imports the command {other}.py"
        assert other != "grpo_aqa" or own in ("explain", "benchmarks"), f"{name} imports the algorithm"


def test_files_of_a_folder_import_each_other_without_a_circle():
    """Python would start to run a circle's second file before its first one is complete."""
    imports = {}
    for path in FILES:
        if path.parent != ROOT:
            froms = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
            modules = {name for node in froms for name in (node.module, f"{node.module}.{node.names[0].name}")}
            imports[f"{path.parent.name}.{path.stem}"] = modules
    while imports:
        done = [name for name, modules in imports.items() if not modules & (set(imports) - {name})]
        assert done, f"a circle of imports: {sorted(imports)}"
        imports = {name: modules for name, modules in imports.items() if name not in done}


def test_the_house_has_the_rooms_that_the_order_names():
    top = {path.stem for path in ROOT.glob("*.py")}
    assert len(top) <= 11 and top <= set(FLOOR)
    folders = {path.parent.name for path in ROOT.glob("*/*.py")} - {"tests"}
    assert top | folders == set(FLOOR)
    for folder in folders:  # the sign on its door: one line
        assert len((ROOT / folder / "__init__.py").read_text().splitlines()) == 1, folder
    assert not list(ROOT.glob("[a-z]*/*/*.py")), "no folders within folders"


def test_each_file_has_its_tests():
    stems = [path.stem for path in FILES if path.stem != "__init__"]
    assert len(set(stems)) == len(stems), "test_NAME.py would be the tests of two files"
    missing = [stem for stem in stems if not (ROOT / "tests" / f"test_{stem}.py").exists()]
    assert not missing


def test_what_breaks_the_order_would_be_found():
    assert imported("import data\nfrom training.run import Run\nimport torch\nfrom policy import prefill") == {
        "data", "training", "policy"}  # fmt: skip
    assert imported("def f():\n    import grpo_aqa as g") == {"grpo_aqa"}
