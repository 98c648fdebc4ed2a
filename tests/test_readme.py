"""README, CONTRIBUTING and docs/: the commands, flags, files, functions, tests and links that they name exist."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PATHS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in PATHS}
SCRIPTS = ("grpo_aqa", "sft_aqa", "eval_mmau", "toy", "prepare", "explain", "reproduce", "bench")
TORCHRUN = {"--nproc_per_node", "--nnodes", "--rdzv_backend", "--rdzv_endpoint", "--rdzv_id", "--max_restarts"}
TORCHRUN |= {"--shutdown_timeout"}
HF = {"--repo", "--local"}  # hf download --repo-type dataset --local-dir
TENSORBOARD = {"--logdir", "--samples_per_plugin"}
SOURCES = [path for path in [*ROOT.glob("*.py"), *ROOT.glob("[a-z]*/*.py")] if path.parent.name != "tests"]
# Files that runs write, and files of other projects.
WRITTEN = set("audio_headers.json adapter_config.json aqa.json config.json table.md table.png results.json".split())
WRITTEN |= {"mmau_scores.md", "mmau_predictions.json", "mmau-test-mini.json", "train_qa.json", "evaluation.py"}
WRITTEN |= {"generation_config.json", "completions.html"}
WRITTEN |= {"scripts/chat_rl.py", "__init__.py", "owner.json", "metrics.jsonl", "curves.png"}
MADE = {"runs/", "resume/", "earlier_1/", "earlier_2/", "tensorboard/"}


def flags_of(script, capsys, *words):
    with pytest.raises(SystemExit):
        importlib.import_module(script).parse_args([*words, "--help"])
    return set(re.findall(r"--\w+", capsys.readouterr().out))


@pytest.fixture
def known(capsys):
    """The flags that each script's --help lists, by script; for bench.py, by bench as well."""
    flags = {script: flags_of(script, capsys) for script in SCRIPTS if script != "bench"}
    benches = importlib.import_module("bench").BENCHES
    flags |= {f"bench {bench}": flags_of("bench", capsys, bench) for bench in benches}
    flags["bench"] = {"--help"}
    return flags


def code(text):
    """The pieces of code in a text, each on one line: inline code, and the lines of blocks."""
    text = re.sub(r"^```.*?^```", "", text.replace("\\\n", " "), flags=re.MULTILINE | re.DOTALL)  # equations
    yield from re.findall(r"^ {4}.*", text, re.MULTILINE)
    yield from (re.sub(r"\s+", " ", piece) for piece in re.findall(r"`([^`]+)`", text))


def commands(text):
    """(script, flags) of the commands in a text. A bench is a script of its own: "bench memory"."""
    for line in code(text):
        if found := re.search(r"\b(?:python|torchrun)\b.*?(\w+)\.py\b(?: ([a-z]+))?(.*)", line):
            script = f"bench {found[2]}" if found[1] == "bench" and found[2] else found[1]
            yield script, set(re.findall(r"--\w+", found[3]))


def links(text):
    """The targets of links and pictures that are not on the web."""
    return [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]


def anchors(text):
    """The anchors of a text's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def resolve(name):
    """Return what a dotted name such as training.run.Run.record stands for. Raises AttributeError or ImportError."""
    parts = name.split(".")
    module = next(i for i in range(len(parts), 0, -1) if (ROOT / "/".join(parts[:i])).with_suffix(".py").exists())
    found = importlib.import_module(".".join(parts[:module]))
    for part in parts[module:]:
        found = getattr(found, part)
    return found


def test_the_readme_is_short():
    assert (ROOT / "README.md").stat().st_size <= 15_000


def test_the_quick_start_is_two_commands():
    for command in (
        "pip install -r requirements.txt && torchrun --nproc_per_node 2 grpo_aqa.py",
        "pip install -r requirements-dev.txt && pytest",
    ):
        assert f"\n    {command}\n" in TEXTS["README.md"]


@pytest.mark.parametrize("name", TEXTS)
def test_commands_have_flags_that_exist(name, known):
    for script, flags in commands(TEXTS[name]):
        assert flags <= known[script] | TORCHRUN, f"{script}: {flags - known[script]}"


def test_commands_are_found():
    assert [len(list(commands(TEXTS[name]))) > 10 for name in ("README.md", "docs/training.md")] == [True, True]
    found = "Type `python bench.py memory\n--table`.\n\n    torchrun --nnodes 2 toy.py --out x \\\n        --seed 1\n"
    assert list(commands(found)) == [("toy", {"--out", "--seed"}), ("bench memory", {"--table"})]


@pytest.mark.parametrize("name", TEXTS)
def test_flags_in_the_text_exist(name, known):
    named = {flag for piece in code(TEXTS[name]) for flag in re.findall(r"(?<![\w-])--[a-z]\w*", piece)}
    assert named <= set().union({"--check"}, TORCHRUN, HF, TENSORBOARD, *known.values())  # ruff format --check


@pytest.mark.parametrize("name", TEXTS)
def test_files_in_the_text_exist(name):
    for path in re.findall(r"`((?:\w+/)*\w[\w.-]*\.(?:py|md|txt|png|json|toml|cff))(?:`|::)", TEXTS[name]):
        assert (ROOT / path).exists() or path in WRITTEN, path
    for folder in re.findall(r"`(\w+/)`", TEXTS[name]):
        assert (ROOT / folder).is_dir() or folder in MADE, folder


@pytest.mark.parametrize("name", TEXTS)
def test_tests_in_the_text_exist(name):
    found = re.findall(r"`(tests/\w+\.py)::(\w+)`", TEXTS[name])
    assert len(found) > 5 or name not in ("README.md", "docs/algorithm.md")
    for path, test in found:
        assert f"def {test}(" in (ROOT / path).read_text(), f"{path}::{test}"


@pytest.mark.parametrize("name", TEXTS)
def test_functions_in_the_text_exist(name):
    rooms = {path.stem for path in ROOT.glob("*.py")} | {path.parent.name for path in SOURCES if path.parent != ROOT}
    named = [dotted for dotted in re.findall(r"`(\w+(?:\.\w+)+)`", TEXTS[name]) if not dotted.endswith(".py")]
    found = [resolve(dotted) for dotted in named if dotted.split(".")[0] in rooms]
    assert len(found) > 10 or name != "README.md"


def test_a_name_that_does_not_exist_would_be_found():
    assert resolve("training.run.Run.record") and resolve("policy.prefill")
    for name in ("training.run.Walk", "policy.postfill"):
        with pytest.raises(AttributeError):
            resolve(name)


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_somewhere(name):
    for target in links(TEXTS[name]):
        path, _, anchor = target.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file.read_text(encoding="utf-8")), target


def test_the_readme_links_every_page():
    assert {f"docs/{path.name}" for path in PATHS if path.parent.name == "docs"} <= set(links(TEXTS["README.md"]))


def test_every_file_is_in_the_tree():
    """The tree names files of the top as NAME.py, and those of a folder without .py, in the folder's line."""
    readme = TEXTS["README.md"]
    tree = readme[readme.index("## The files") : readme.index("## Limits")]
    for path in SOURCES:
        if path.parent == ROOT:
            assert re.search(rf"^    {path.name} ", tree, re.MULTILINE), path.name
        elif path.name != "__init__.py":
            line = re.search(rf"^    {path.parent.name}/ (.*(?:\n {{10,}}.*)*)", tree, re.MULTILINE)
            assert line and re.search(rf"\b{path.stem}\b", line[1]), path


def test_the_algorithm_stays_short():
    assert len((ROOT / "grpo_aqa.py").read_text().splitlines()) <= 400
