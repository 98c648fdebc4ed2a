"""Reports: a run's table, picture and warning against counting by hand; the page, in a browser if there is one."""

import csv
import json
import os
import random
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from data import Question
from evaluation import report
from evaluation.scores import ALL_APART, compare, mcnemar_exact, wilson_interval
from infra.errors import InputError

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
RIGHT = "dog"


def predictions_file(path, rights, tasks=("sound", "music", "speech"), **changes):
    """Write a predictions file; rights: whether each answer is right. changes: a key's value for all questions."""
    records = [
        {"id": str(i), "audio_id": f"{i}.wav", "question": f"What is {i}?", "choices": ["dog", "cat", "cow"],
         "answer": RIGHT, "task": tasks[i % len(tasks)], "model_prediction": RIGHT if right else ""} | changes
        for i, right in enumerate(rights)
    ]  # fmt: skip
    path.write_text(json.dumps(records))
    return str(path)


# ---- the checkpoints of a run ----


@pytest.fixture
def drawn(monkeypatch):
    """The saved pictures, as matplotlib's figures."""
    from matplotlib.figure import Figure

    figures, savefig = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kw: [figures.append(self), savefig(self, *args, **kw)])
    return figures


def test_run_report(tmp_path, drawn):
    rng = random.Random(0)
    rights = {step: [rng.random() < p for _ in range(90)] for step, p in ((100, 0.3), (200, 0.9), (1000, 0.85))}
    results = [(step, predictions_file(tmp_path / str(step), own)) for step, own in rights.items()]
    caption, *table = report.run_report(tmp_path, results, "90 questions of a_b.json").splitlines()
    assert caption == "90 questions of a_b.json"

    expected = []
    for step, own in rights.items():
        tasks = [own[start::3] for start in range(3)]
        low, high = wilson_interval(sum(own), 90)
        expected.append([f"step_{step:06d}", *(f"{sum(part) / len(part) * 100:.2f}%" for part in [*tasks, own]),
                         f"[{100 * low:.2f}, {100 * high:.2f}]", f"{sum(own)}/90"])  # fmt: skip
    headings = ["checkpoint", "sound", "music", "speech", "average", "95% interval", "right"]
    assert [re.split(" {2,}", line) for line in table[:4]] == [headings, *expected]

    ps = {}
    for step, own in rights.items():
        pairs = list(zip(rights[200], own))
        ps[step] = mcnemar_exact(sum(a > b for a, b in pairs), sum(a < b for a, b in pairs))
    assert ps[100] < 0.05 <= ps[1000]
    assert table[4] == f"best: step_000200 with {expected[1][4]}"
    warning = "warning: its lead, if any, may be luck; 1 of the 2 others do not differ significantly"
    assert table[5].startswith(warning)
    assert table[5].endswith(f": step_001000 (p = {ps[1000]:.4f})") and "step_000100" not in table[5]
    assert table[6:] == ["guessing would score 33.33%", ALL_APART]

    markdown = (tmp_path / "mmau_scores.md").read_text().splitlines()
    assert [line[2:-2].split(" | ") for line in markdown[4:] if line.startswith("| ")] == [headings, *expected]
    assert markdown[2] == r"90 questions of a\_b.json"
    assert markdown[5] == "|---|" + 6 * "---:|" and [line[2:] for line in markdown[-4:]] == table[4:]
    with open(tmp_path / "mmau_scores.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [100, 200, 1000]
    for row, own in zip(rows, rights.values()):
        parts = {"sound": own[0::3], "music": own[1::3], "speech": own[2::3], "average": own}
        for name, part in parts.items():
            assert float(row[name]) == pytest.approx(100 * sum(part) / len(part), abs=5e-5)
        interval = [float(row[end]) / 100 for end in ("low", "high")]
        assert interval == pytest.approx(wilson_interval(sum(own), 90), abs=1e-6)
        assert (row["right"], row["questions"]) == (str(sum(own)), "90")

    axis = drawn[0].axes[0]
    lines = {line.get_label(): list(line.get_ydata()) for line in axis.lines}
    assert lines["all 90 questions"] == pytest.approx([100 * sum(own) / 90 for own in rights.values()])
    assert lines["guessing"] == pytest.approx([100 / 3, 100 / 3])
    assert lines["music (30)"] == pytest.approx([100 * sum(own[1::3]) / 30 for own in rights.values()])
    assert set(lines) == {"all 90 questions", "sound (30)", "music (30)", "speech (30)", "guessing"}
    band = {tuple(map(float, point)) for point in axis.collections[0].get_paths()[0].vertices}
    for step, own in rights.items():
        for end in wilson_interval(sum(own), 90):
            assert min(abs(x - step) + abs(y - 100 * end) for x, y in band) < 1e-9
    assert (tmp_path / "mmau_scores.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("*.unfinished"))


def report_lines(folder, *all_rights, **changes):
    results = [(step, predictions_file(folder / f"{step}", own, **changes)) for step, own in enumerate(all_rights)]
    caption, *lines = report.run_report(folder, results, "of what").splitlines()
    assert caption == "of what"
    return lines


def test_a_clear_winner_has_no_warning(tmp_path):
    lines = report_lines(tmp_path, [0] * 30, [1] * 30, [0] * 30)
    assert lines[4:] == ["best: step_000001 with 100.00%", "guessing would score 33.33%", ALL_APART]


def test_of_equally_good_checkpoints_the_earliest_is_best(tmp_path):
    lines = report_lines(tmp_path, [0, 0, 1], [1, 1, 0], [0, 1, 1])
    assert lines[4] == "best: step_000001 with 66.67%"
    assert "2 of the 2 others" in lines[5] and "step_000002 (p = 1.0000)" in lines[5]


NOT_APART = "MMAU's rule cannot tell the choices of 2 questions apart: s0, s1"


def test_questions_that_the_rule_cannot_tell_apart_have_a_second_figure_everywhere(tmp_path, capsys):
    """In the table of a checkpoint, in that of its ablations, in a run's report, in a comparison and on the page."""
    questions = [Question(f"s{i}", f"{i}.wav", "What?", ["+", "-"], "+-"[i]) for i in range(2)]
    records = [{"id": q.id, "audio_id": q.audio, "question": q.question, "choices": q.choices, "answer": q.answer,
                "model_prediction": "+", "completion": "+", "samples": ["+"]} for q in questions]  # fmt: skip
    exact = [NOT_APART, "accuracy if exact comparison decides these: 50.00%"]
    lines = report.checkpoint_report(questions, {"plain": records}, None, "")
    assert lines[0].splitlines()[1].split()[1] == "0.00%" and lines[1:] == ["guessing would score 0.00%", *exact]
    several = {"plain": records, "silence": records, "another question's audio": records}
    lines = report.checkpoint_report(questions, several, None, "")
    assert lines[1:] == [NOT_APART, exact[1].replace("50.00%", ", ".join(f"{name} 50.00%" for name in several))]
    (tmp_path / "p.json").write_text(json.dumps(records))
    results = [(step, str(tmp_path / "p.json")) for step in (1, 2)]
    assert report.run_report(tmp_path, results, "of what").splitlines()[-2:] == [
        NOT_APART, exact[1].replace("50.00%", "step_000001 50.00%, step_000002 50.00%")
    ]  # fmt: skip
    assert compare(*2 * [str(tmp_path / "p.json")]).splitlines()[-2:] == [
        NOT_APART, exact[1].replace("50.00%", "A 50.00%, B 50.00%")
    ]  # fmt: skip
    report.write_html(str(tmp_path / "a.html"), questions, records, "")
    assert Page((tmp_path / "a.html").read_text()).texts["p"][1:3] == exact


def test_samples_and_answers_are_spelled_like_their_choices(tmp_path):
    records = [{"model_prediction": "the\u0301", "completion": "th\u00e9", "samples": ["th\u00e9", "the\u0301"]}]
    questions = [Question("0", "a.wav", "What?", ["the\u0301", "tea"], answer) for answer in ("the\u0301", "th\u00e9")]
    samples = report.checkpoint_report(questions[:1], {"plain": records}, 2, "")[3].splitlines()
    assert samples[1].split()[-1] == "100.00%"  # pass@1
    report.write_html(str(tmp_path / "a.html"), questions[1:], records, "")
    assert '<li class="answer predicted">the\u0301 ' in (tmp_path / "a.html").read_text(encoding="utf-8")
    choices = ["(A) the\u0301", "(B) tea"]  # as the Hub's copy of MMAU spells them
    questions = [replace(questions[0], spelled=choices, answer="tea")]
    report.write_html(str(tmp_path / "b.html"), questions, [{"model_prediction": "(B) tea"}], "")
    assert '<li class="answer predicted">tea ' in (tmp_path / "b.html").read_text(encoding="utf-8")


def test_open_questions_have_no_choices_to_guess_from(tmp_path):
    questions = [Question("0", "a.wav", "What?", [], "dog", also=["a hound"])]
    lines = report.checkpoint_report(questions, {"plain": [{"model_prediction": "Hound."}]}, None, "")
    assert "1/1" in lines[0] and lines[1:] == ["guessing would score 0.00%"]
    report.write_html(str(tmp_path / "a.html"), questions, [{"model_prediction": "Hound."}], "")
    assert "<dd>dog or a hound</dd>" in (tmp_path / "a.html").read_text(encoding="utf-8")


def test_a_single_checkpoint_of_other_tasks(tmp_path, drawn):
    """MMAU's tasks have columns only if the questions have one of them, or none at all."""
    lines = report_lines(tmp_path, [1, 1, 0, 0], tasks=("zoo $x$", "a|b"))
    assert re.split(" {2,}", lines[0])[1:4] == ["a|b", "zoo $x$", "average"]
    assert re.split(" {2,}", lines[1])[1:4] == ["50.00%", "50.00%", "50.00%"]
    assert lines[2:] == ["best: step_000000 with 50.00%", "guessing would score 33.33%", ALL_APART]
    assert r" a\|b |" in (tmp_path / "mmau_scores.md").read_text()
    assert "0,50.0000,50.0000,50.0000," in (tmp_path / "mmau_scores.csv").read_text()
    assert len(drawn) == 1
    lines = report_lines(tmp_path, [1, 1, 0, 0], tasks=("mix-sound-music", "music"))
    assert re.split(" {2,}", lines[0])[1:6] == ["sound", "music", "speech", "mix-sound-music", "average"]
    assert "0,,50.0000,,50.0000,50.0000," in (tmp_path / "mmau_scores.csv").read_text()


def test_questions_without_answer_or_task(tmp_path):
    (tmp_path / "mmau_scores.md").write_text("of other questions")
    path = predictions_file(tmp_path / "none", [1, 1], answer=None)
    assert "no scores to report" in report.run_report(tmp_path, [(5, path)], "of what")
    assert not list(tmp_path.glob("mmau_scores*"))
    lines = report_lines(tmp_path, [1, 0], task=None)
    assert re.split(" {2,}", lines[1])[1:5] == ["-", "-", "-", "50.00%"]
    path = predictions_file(tmp_path / "some", [1, 0, 1])
    records = json.loads(Path(path).read_text())
    records[0]["answer"] = ""
    Path(path).write_text(json.dumps(records))
    assert "1/2" in report.run_report(tmp_path, [(5, path)], "of what")


def test_files_of_other_questions_are_refused(tmp_path):
    a, b = predictions_file(tmp_path / "a", [1, 0]), predictions_file(tmp_path / "b", [1, 0, 1])
    with pytest.raises(InputError, match="holds 2 questions and .*b holds 3: .*; remove the outdated file"):
        report.run_report(tmp_path, [(1, a), (2, b)], "of what")
    assert not list(tmp_path.glob("mmau_scores*"))


# ---- the page ----

EVIL = """<script>document.title = "x"</script> & "quotes" 'n' </article><img src=x onerror="document.title='x'">"""


@pytest.fixture
def page(tmp_path):
    """(path of a page, its clips, questions, records): seven questions with texts and names made to break it."""
    names = ["a b.wav", "#1?.wav", "ü%20 犬.wav", 'it\'s "q"&.wav', "x:y.wav", "<b>.wav", "plain.wav"]
    (tmp_path / "clips # ö").mkdir()
    clips = [tmp_path / "clips # ö" / name for name in names]
    for clip in clips:
        clip.write_bytes(b"RIFF")
    tasks = ["sound", "music", "music", "hip 'hop' & \"b\"", None, "music", "sound"]
    answers = [RIGHT] * 6 + [None]
    said = [RIGHT, "cat", EVIL, "", "a dog!", "dog", EVIL]
    questions = [
        Question(f"id<{i}>", str(clip), EVIL if i == 2 else f"What is {i}?", [RIGHT, "cat", EVIL], answer, task, "easy",
                 category="<layer>")
        for i, (clip, task, answer) in enumerate(zip(clips, tasks, answers))
    ]  # fmt: skip
    records = [{"model_prediction": text, "completion": f"\n<think>{EVIL}</think>{text}"} for text in said]
    records[3]["error"] = "cannot be read " + EVIL
    records[5]["samples"] = ["one", "<two>"]
    path = tmp_path / "reports" / "report & <i>.html"
    report.write_html(str(path), questions, records, "step <1> & " + EVIL)
    return path, clips, questions, records


class Page(HTMLParser):
    """The questions of a page as dictionaries, its clips, its scripts, and texts by tag."""

    def __init__(self, text):
        super().__init__()
        self.questions, self.clips, self.open, self.texts = [], [], [], {}
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag == "article":
            self.questions.append(dict(attributes))
        if tag == "audio":
            self.clips.append(dict(attributes))
        self.open.append(tag)
        self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag):
        while self.open.pop() != tag:
            pass

    def handle_data(self, data):
        if self.open:
            self.texts[self.open[-1]][-1] += data


def test_page_shows_all_texts_as_they_are(page):
    path, clips, questions, records = page
    text = path.read_text(encoding="utf-8")
    shown = Page(text)
    assert len(shown.questions) == 7 and len(shown.texts["script"]) == 1 and "img" not in shown.texts
    assert shown.texts["title"] == shown.texts["h1"] == ["step <1> & " + EVIL]
    assert [question["data-verdict"] for question in shown.questions] == [
        "right", "wrong", "wrong", "wrong", "right", "right", "unscored"
    ]  # fmt: skip
    assert [question["data-task"] for question in shown.questions] == [q.task or "" for q in questions]
    assert all(question.question in heading for question, heading in zip(questions, shown.texts["h2"]))
    assert shown.texts["dd"][:6] == ["dog", "dog", "cat", "dog", EVIL, "dog"] and shown.texts["dd"][-1] == "withheld"
    assert [line for line in shown.texts["pre"] if line != ""] == [  # a browser drops the first newline
        "\n" + text for record in records for text in record.get("samples", [record["completion"]])
    ]
    assert shown.texts["option"] == ["all", "sound", "music", "hip 'hop' & \"b\""]
    assert "cannot be read " + EVIL in shown.texts["p"] and "id<3>" in text.replace("&lt;", "<").replace("&gt;", ">")
    assert not re.search(r"https?:|@import|url\(", text)  # nothing from the network


def test_page_links_its_clips(page):
    path, clips, _, _ = page
    sources = [clip["src"] for clip in Page(path.read_text(encoding="utf-8")).clips]
    for source, clip in zip(sources, clips, strict=True):
        parts = urlsplit(source)
        assert (parts.scheme, parts.netloc, parts.query, parts.fragment) == ("", "", "", "")
        assert os.path.samefile(path.parent / unquote(parts.path), clip) and parts.path.startswith("../clips")
    assert all(clip["preload"] == "none" for clip in Page(path.read_text(encoding="utf-8")).clips)


def test_page_links_a_clip_whose_name_is_not_text(tmp_path):
    """The name's bytes are not UTF-8. The page is in the clip's own folder."""
    questions = [Question("0", str(tmp_path / "\udcff.wav"), "What?", ["x", "y"], "x")]
    report.write_html(str(tmp_path / "a.html"), questions, [{"model_prediction": "x"}], "")
    assert [clip["src"] for clip in Page((tmp_path / "a.html").read_text()).clips] == ["%FF.wav"]


def test_page_has_the_table(page):
    shown = Page(page[0].read_text(encoding="utf-8"))
    cells = [text for text in shown.texts["td"] if text]
    low, high = wilson_interval(3, 6)
    assert cells[:4] == ["all questions", "50.00%", f"[{100 * low:.2f}, {100 * high:.2f}]", "3/6"]
    assert [cells[i : i + 4 : 3] for i in range(4, len(cells), 4)] == [
        ["sound", "1/1"], ["music", "1/3"], ["hip 'hop' & \"b\"", "0/1"], ["easy", "3/6"], ["<layer>", "3/6"]
    ]  # fmt: skip
    assert "music · easy · <layer> · id id<1>" in shown.texts["p"]
    assert "guessing would score 33.33%" in shown.texts["p"]


def test_page_without_answers(tmp_path):
    questions = [Question("0", "a.wav", "What?", ["x", "y"], None)]
    report.write_html(str(tmp_path / "a.html"), questions, [{"model_prediction": "x"}], "withheld")
    text = (tmp_path / "a.html").read_text()
    assert "nothing is scored" in text and "<table>" not in text and not list(tmp_path.glob("*.unfinished"))
    with pytest.raises(ValueError):
        report.write_html(str(tmp_path / "b.html"), questions, [], "")
    assert not (tmp_path / "b.html").exists()


FILTERS = {
    "": [0, 1, 2, 3, 4, 5, 6],
    "#wrong": [1, 2, 3],
    "#task=music": [1, 2, 5],
    "#wrong&task=music": [1, 2],
    "#task=hip%20%27hop%27%20%26%20%22b%22": [3],
    "#task=nonsense": [0, 1, 2, 3, 4, 5, 6],
}


def browse(address, profile):
    """Return the page that the browser shows after its scripts ran."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
               "--disable-background-networking", "--disable-component-update", "--disable-sync",
               "--virtual-time-budget=1000", f"--user-data-dir={profile}", "--dump-dom", address]  # fmt: skip
    shown = Page(subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=60).stdout)
    assert len(shown.questions) == 7
    return shown


def visible(shown):
    return [i for i, question in enumerate(shown.questions) if "hidden" not in question]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
@pytest.mark.parametrize("fragment", FILTERS)
def test_filter_in_a_browser(page, tmp_path, fragment):
    """The address selects the questions, and no question's text has run as a script."""
    shown = browse(page[0].as_uri() + fragment, tmp_path / "profile")
    assert visible(shown) == FILTERS[fragment]
    assert shown.texts["output"] == [f"{len(FILTERS[fragment])} of 7 questions"]
    assert shown.texts["title"] == ["step <1> & " + EVIL] and len(shown.texts["script"]) == 1


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_clicks_in_a_browser(page, tmp_path):
    """Box and menu select the same questions as the address."""
    clicks = "form.wrong.click(); form.task.value = 'music'; "
    clicks += "form.task.dispatchEvent(new Event('change', {bubbles: true}))"
    text = page[0].read_text(encoding="utf-8").replace("</body>", f"<script>{clicks}</script></body>")
    (tmp_path / "clicked.html").write_text(text, encoding="utf-8")
    shown = browse((tmp_path / "clicked.html").as_uri(), tmp_path / "profile")
    assert visible(shown) == FILTERS["#wrong&task=music"]
