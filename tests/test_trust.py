"""No downloaded file can run code: neither when a script opens it, nor when a page shows its texts."""

import ast
import html.parser
import json
import os
import stat
from pathlib import Path

import pytest
import torch

from data import Question
from evaluation.report import write_html
from infra.errors import InputError
from infra.files import check_folder, write_text
from training.run_folder import load_state

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(str(path.relative_to(ROOT)) for path in [*ROOT.glob("*.py"), *ROOT.glob("[a-z]*/*.py")]
                 if path.parent.name != "tests")  # fmt: skip
FORBIDDEN = {"eval", "exec", "os.system", "os.popen", "pickle.load", "pickle.loads", "marshal.loads", "joblib.load",
             "numpy.load", "np.load", "yaml.load", "tempfile.mktemp"}  # fmt: skip


def unsafe_calls(source: str) -> list[str]:
    """Return the calls in a source that could run code from a file."""
    found = []
    for call in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
        name, flags = ast.unparse(call.func), {word.arg: ast.unparse(word.value) for word in call.keywords}
        loads_weights = name.endswith(".from_pretrained")
        if (
            name in FORBIDDEN
            or (name == "torch.load" and flags.get("weights_only") != "True")
            or flags.get("shell", "False") != "False"
            or flags.get("trust_remote_code", "False") != "False"
            or (loads_weights and "ForConditionalGeneration" in name and flags.get("use_safetensors") != "True")
            or (loads_weights and name.startswith("Auto") and "trust_remote_code" not in flags)
        ):
            found.append(ast.unparse(call))
    return found


@pytest.mark.parametrize("source", SOURCES)
def test_no_source_has_an_unsafe_call(source):
    assert unsafe_calls((ROOT / source).read_text()) == []


BAD_CALLS = ["torch.load(x)", "torch.load(x, weights_only=False)", "pickle.load(x)", "eval(x)", "os.system(x)",
             "subprocess.run(x, shell=True)", "AutoConfig.from_pretrained(x)",
             "AutoProcessor.from_pretrained(x, trust_remote_code=True)",
             "Qwen2AudioForConditionalGeneration.from_pretrained(x)"]  # fmt: skip


@pytest.mark.parametrize("call", BAD_CALLS)
def test_unsafe_calls_would_be_found(call):
    assert len(unsafe_calls(f"def f(x):\n    return [{call}]")) == 1


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_resume_state_with_code_is_refused_and_the_code_does_not_run(one_rank, tmp_path):
    state, trace = tmp_path / "step_000001", tmp_path / "it ran"
    state.mkdir()
    (state / "progress.json").write_text(json.dumps({"step": 1, "position": 1, "before": None, "world_size": 1}))
    torch.save({"optimizer": Bomb(str(trace))}, state / "rank_0.pt")
    with pytest.raises(InputError, match="cannot be resumed from") as error:
        load_state(state, None, None)
    assert not trace.exists() and "\n" not in str(error.value)
    assert "weights_only" not in str(error.value)  # torch's own message advises to trust the file
    torch.load(state / "rank_0.pt", weights_only=False)
    assert trace.exists()  # an unsafe load does run the code


# ---- pages ----

MARKUP = ['"><script>alert(1)</script>', "</script><img src=x onerror=alert(1)>", "<!-- ", "'onmouseover='alert(1)",
          "]]>", "javascript:alert(1)", "&lt;b&gt;", "</pre></article><h1>"]  # fmt: skip


class Elements(html.parser.HTMLParser):
    """The elements of a page with their attributes, its src and href addresses, and its texts."""

    def __init__(self, text):
        super().__init__()
        self.found, self.addresses, self.texts = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, *sorted(name for name, _ in attributes)))
        self.addresses += [value for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data):
        self.texts.append(data)


def page(folder, text):
    """Return a page that has `text` in every field."""
    choices = [text, f"{text}!"]  # the same words: also the lines about such choices are in the page
    question = Question(text, f"clips/{text}.wav", text, choices, text, task=text, difficulty=text, sub_category=text)
    records = [
        {"model_prediction": text, "completion": text, "error": text},
        {"model_prediction": text, "completion": text, "samples": [text, text]},
    ]
    write_html(str(folder / "page.html"), [question, question], records, text)
    return (folder / "page.html").read_text()


@pytest.mark.parametrize("text", MARKUP)
def test_the_page_shows_markup_as_text(tmp_path, text):
    """The page has the elements and attributes of a page with plain words, and its addresses stay local files."""
    plain, marked = Elements(page(tmp_path, "words")), Elements(page(tmp_path, text))
    assert marked.found == plain.found
    assert any(text in shown for shown in marked.texts)
    assert not any(
        address.strip().lower().startswith(("javascript:", "http", "//", "data:")) for address in marked.addresses
    )


# ---- files that scripts write ----


def test_written_files_follow_the_umask(tmp_path, monkeypatch):
    """Files in the run folder follow the umask. The file with which check_folder tries to write has no name."""
    before = os.umask(0o077)
    try:
        write_text(tmp_path / "config.json", "{}")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "config.json").stat().st_mode) == 0o600
    check_folder(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_no_script_writes_to_a_folder_that_all_users_share():
    """No script names /tmp or makes a named temporary file."""
    for name in SOURCES:
        source = (ROOT / name).read_text()
        assert '"/tmp' not in source and "NamedTemporaryFile" not in source and "mkdtemp" not in source, name
