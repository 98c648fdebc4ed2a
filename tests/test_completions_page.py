"""The page of a run's completions: texts, colors, players, the limit; its filter in a browser if there is one."""

import copy
import json
import os
import shutil
import subprocess
from html.parser import HTMLParser
from urllib.parse import unquote, urlencode

import pytest
import torch

from data import Question
from evaluation import completions_page
from evaluation.completions_page import completions_html, is_group
from training.groups import Groups
from training.metrics import log_completions, read_jsonl

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
EVIL = '</td></script><script>document.title = "ran"</script><!-- "\'&amp;\n <b onclick=alert(1)>'


class Page(HTMLParser):
    """The page's tags with their attributes' names, its texts by tag, and its groups with their completions' cells."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.clips, self.texts, self.groups, self.open = [], [], {}, [], ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, *(name for name, _ in attributes)))
        self.open, own = tag, dict(attributes)
        self.texts.setdefault(tag, []).append("")
        if tag == "audio":
            self.clips.append(own["src"])
        elif tag == "article":
            self.groups.append((own, []))
        elif tag == "tr" and own:  # not that of the headings
            self.groups[-1][1].append((own, []))
        elif tag == "td":
            self.groups[-1][1][-1][1].append("")

    def handle_data(self, data):
        if self.open == "td":
            self.groups[-1][1][-1][1][-1] += data
        if self.open:
            self.texts[self.open][-1] += data

    def handle_endtag(self, tag):
        self.open = ""


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """Two groups in each of the steps 10, 20, 30, as training logs them, and their clips; the texts have markup."""
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    for step in (10, 20, 30):
        asked = [Question(f"{step}<{b}>", f"clips/{step}'{b}.wav", f"What{EVIL}?", [], EVIL) for b in range(2)]
        scores = {name: torch.randint(0, 2, (2, 3), generator=generator).float() for name in ("accuracy", "<format>")}
        rewards = scores["accuracy"] + 0.5 * scores["<format>"]
        advantages = rewards - rewards.mean(dim=1, keepdim=True)
        texts = [EVIL, "a Dog\n barks", "", "a cat", "a dog", f"{step}"]
        (tmp_path / "run").mkdir(exist_ok=True)
        path = tmp_path / "run" / "completions.jsonl"
        tokens = torch.zeros(6, 1)
        groups = Groups(asked, {}, tokens, tokens, tokens, texts, scores, rewards)
        log_completions(path, step, "answer", groups, advantages)
    return read_jsonl(path)


def test_page_shows_all_texts_as_they_are(groups):
    """A page of plain words has the same tags and attributes."""
    page, notes = completions_html(groups, "run/page.html", EVIL)
    shown = Page(page)
    assert shown.texts["title"] == shown.texts["h1"] == [EVIL] and len(shown.texts["script"]) == 1
    assert shown.texts["h2"] == ["step 10", "step 20", "step 30"]
    assert [text for text in shown.texts["h3"] if text] == [group["prompt"] for group in groups]
    largest = max(abs(advantage) for group in groups for advantage in group["advantages"])
    for group, (_, rows) in zip(groups, shown.groups, strict=True):
        assert f"answer: {EVIL} · id {group['id']}" in shown.texts["p"]
        columns = [group[name] for name in ("completions", "accuracy", "<format>", "rewards", "advantages")]
        for row, (attributes, cells) in zip(zip(*columns), rows, strict=True):
            assert cells[0] == row[0] and list(map(float, cells[1:])) == pytest.approx(row[1:], abs=1e-4)
            assert attributes["class"] == ("up" if row[-1] > 0 else "down")
            assert attributes["style"] == f"--share: {70 * abs(row[-1]) / largest:.0f}%"
    assert shown.texts["th"][:5] == ["completion", "accuracy", "<format>", "reward", "advantage"]
    plain = json.loads(json.dumps(groups).replace(json.dumps(EVIL)[1:-1], "words"))
    assert Page(completions_html(plain, "run/page.html", "words")[0]).tags == shown.tags
    assert notes == ["6 of 6 clips are not found; start from the folder in which training started"]


def test_page_links_its_clips_relative_to_itself(groups, tmp_path):
    (tmp_path / "clips").mkdir()
    for group in groups:
        (tmp_path / group["audio"]).touch()
    groups[0]["audio"] = os.path.abspath(groups[0]["audio"])
    del groups[1]["audio"]
    page, notes = completions_html(groups, "run/page.html", "")
    steps_and_clips = [(10, 0), (20, 0), (20, 1), (30, 0), (30, 1)]
    assert [unquote(clip) for clip in Page(page).clips] == [f"../clips/{s}'{b}.wav" for s, b in steps_and_clips]
    assert notes == [] and str(tmp_path) not in page


def test_a_large_page_has_evenly_spaced_steps_with_the_last(groups, monkeypatch):
    many = [copy.copy(group) | {"step": step} for step in range(1, 12) for group in groups[:2]]  # 66 completions
    for largest, steps in ((66, list(range(1, 12))), (65, [1, 3, 5, 7, 9, 11]), (20, [3, 7, 11]), (5, [11])):
        monkeypatch.setattr(completions_page, "LARGEST", largest)
        page, notes = completions_html(many, "page.html", "", damaged=7)
        assert Page(page).texts["h2"] == [f"step {step}" for step in steps]
        assert Page(page).texts["option"][:-4] == ["all", *map(str, steps)]
        assert notes[0] == "7 damaged lines are left out" and all(note in page for note in notes)
        assert any(note.startswith(f"{len(steps)} of 11 logged steps") for note in notes) == (largest < 66)


def test_what_is_no_group(groups):
    """A group without the clip's path, or with other fields, is one. The page shows other columns of numbers."""
    good = groups[0]
    wrong = {"completions": ([], "abc", ["a", "b", 3], ["a"], None), "prompt": (None, 3), "id": (3,), "audio": (None,),
             "answer": (["a"],), "rewards": ([1, 2], [1, 2, "3"], [1, 2, 10**400], [1, 2, float("nan")], None),
             "advantages": ([1.0], {})}  # fmt: skip
    for name, values in wrong.items():
        for value in values:
            assert not is_group(good | {name: value}), (name, value)
    other = {name: value for name, value in good.items() if name != "audio"} | {"new": [1, 2, 3], "accuracy": "x"}
    assert is_group(good) and is_group(other)
    shown = Page(completions_html([good, other], "page.html", "")[0])
    assert shown.texts["th"][1:6] == ["accuracy", "<format>", "new", "reward", "advantage"]
    assert [cells[1:4:2] for _, cells in shown.groups[1][1]] == [["", "1"], ["", "2"], ["", "3"]]


FILTERS = [{}, {"step": "20"}, {"step": "7"}, {"text": "DOG"}, {"text": "20<1>"}, {"text": "no such"},
           {"score": "accuracy", "to": "0"}, {"score": "advantage", "from": "0.4", "text": "dog", "step": "30"},
           {"from": "0.5", "to": "1"}, {"score": "<format>", "from": "1"}, {"nonsense": "1"}]  # fmt: skip


def expected(groups, step="", text="", score="reward", **limits):
    """Return the indices of the completions that a filter selects, as (group, completion)."""
    found = []
    for g, group in enumerate(groups):
        values = group.get(score) or group[f"{score}s"]
        asked = f"{group['prompt']}answer: {group['answer']} · id {group['id']}"
        for c, (value, words) in enumerate(zip(values, group["completions"])):
            fits = float(limits.get("from", -9)) <= value <= float(limits.get("to", 9))
            fits &= text.lower() in f"{asked}\n{words}".lower()
            if fits and step in ("", "7", str(group["step"])):  # there is no step 7: all are shown
                found.append([g, c])
    return found


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_filter_in_a_browser(groups, tmp_path):
    """The address and the form select the same completions as a loop, and no text has run as a script."""
    page, _ = completions_html(groups, "page.html", EVIL)
    script = """
      const result = [];
      const selected = () => [...document.querySelectorAll("article")].flatMap((article, g) =>
        article.hidden || article.closest("section").hidden ? [] :
        [...article.querySelectorAll("tbody tr")].flatMap((row, c) => row.matches(".other") ? [] : [[g, c]]));
      for (const filter of FILTERS) {
        location.hash = filter;
        show();
        result.push([selected(), document.getElementById("shown").textContent]);
      }
      form.text.value = "dog";
      form.step.value = "20";
      form.text.dispatchEvent(new Event("change", {bubbles: true}));
      show();
      result.push([selected(), location.hash, document.title]);
      document.body.innerHTML = "<output></output>";
      document.querySelector("output").textContent = JSON.stringify(result);
    """.replace("FILTERS", json.dumps(list(map(urlencode, FILTERS))))
    (tmp_path / "page.html").write_text(page.replace("</body>", f"<script>{script}</script></body>"), encoding="utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
               "--disable-background-networking", "--disable-component-update", "--disable-sync",
               "--virtual-time-budget=1000", f"--user-data-dir={tmp_path}/profile", "--dump-dom",
               (tmp_path / "page.html").as_uri()]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=60)
    *results, (selected, address, title) = json.loads(Page(done.stdout).texts["output"][0])
    for wanted, (found, count) in zip(FILTERS, results, strict=True):
        right = expected(groups, **{name: value for name, value in wanted.items() if name != "nonsense"})
        assert found == right, wanted
        assert count == f"{len(right)} completions of {len({g for g, _ in right})} questions"
    assert selected == expected(groups, step="20", text="dog") and len(selected) == 2
    assert address == "#step=20&text=dog&score=reward" and title.startswith("</td>")
