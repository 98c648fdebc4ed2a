"""The README and CONTRIBUTING.md: what they name is there, and the flags in their commands are those of the scripts."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "CONTRIBUTING.md")}
README = TEXTS["README.md"]
SCRIPTS = ("grpo_aqa", "sft_aqa", "eval_mmau", "toy", "reproduce", "bench")
TORCHRUN = {"--nproc_per_node", "--nnodes", "--rdzv_backend", "--rdzv_endpoint", "--rdzv_id", "--max_restarts"}
TORCHRUN |= {"--shutdown_timeout"}


def flags_of(script, capsys, *words):
    with pytest.raises(SystemExit):
        importlib.import_module(script).parse_args([*words, "--help"])
    return set(re.findall(r"--\w+", capsys.readouterr().out))


@pytest.fixture
def known(capsys):
    """The flags that each script's --help lists."""
    flags = {script: flags_of(script, capsys) for script in SCRIPTS if script != "bench"}
    benches = importlib.import_module("bench").BENCHES
    flags["bench"] = set().union(*(flags_of("bench", capsys, bench) for bench in benches)) | {"--memory"}
    return flags


def commands(text):
    """(script, flags) of the commands in a text, lines that are continued put together."""
    for line in text.replace("\\\n", " ").split("\n"):
        found = re.search(r"(?:^    .*|`)\b(?:python|torchrun)\b[^`]*?(\w+)\.py\b([^`]*)", line)
        if found:
            yield found[1], set(re.findall(r"--\w+", found[2]))


@pytest.mark.parametrize("name", TEXTS)
def test_commands_have_flags_that_exist(name, known):
    found = list(commands(TEXTS[name]))
    assert len(found) > (20 if name == "README.md" else 0)
    for script, flags in found:
        assert flags <= known[script], f"{script}.py: {flags - known[script]}"


@pytest.mark.parametrize("name", TEXTS)
def test_flags_in_the_text_exist(name, known):
    named = {flag for quoted in re.findall(r"`([^`\n]+)`", TEXTS[name]) for flag in re.findall(r"--\w+", quoted)}
    others = {"--help", "--check", *TORCHRUN}  # ruff format --check
    assert named <= set().union(others, *known.values())


@pytest.mark.parametrize("name", TEXTS)
def test_files_and_tests_in_the_text_exist(name):
    for path in re.findall(r"`((?:tests/|docs/)?\w+\.(?:py|md|txt|png))", TEXTS[name]):
        written = ("table.md", "table.png", "mmau_scores.md", "curves.png", "evaluation.py")  # by runs, by MMAU
        assert (ROOT / path).exists() or path in written, path
    for path, test in re.findall(r"`(tests/\w+\.py)::(\w+)`", TEXTS[name]):
        assert f"def {test}(" in (ROOT / path).read_text(), test
    for path in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", TEXTS[name]):
        assert (ROOT / path).exists(), path


def test_functions_in_the_text_exist():
    named = re.findall(r"`(\w+)\.(\w+)`", README)
    modules = {path.stem for path in ROOT.glob("*.py")}
    checked = [(module, name) for module, name in named if module in modules and name != "py"]
    assert len(checked) > 10
    for module, name in checked:
        assert hasattr(importlib.import_module(module), name), f"{module}.{name}"


def test_every_file_is_listed():
    listing = README[README.index("## The files") : README.index("## Tests")]
    missing = [path.name for path in ROOT.glob("*.py") if path.name not in listing]
    assert not missing


def test_grpo_aqa_is_as_long_as_it_says():
    said = int(re.search(r"`grpo_aqa.py`, (\d+) lines", README)[1])
    lines = len((ROOT / "grpo_aqa.py").read_text().splitlines())
    assert lines <= 400 and abs(said - lines) <= 5
