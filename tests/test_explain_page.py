"""The report of explain.py as text and as a page, from hand-made parts."""

import re
from html.parser import HTMLParser

from evaluation.explain_page import Colored, Table, Verbatim, num, to_html, to_text


class Page(HTMLParser):
    """The page's tokens, each as (text, numbers by name), the cells of its tables, and all tags and attributes."""

    def __init__(self, page):
        super().__init__()
        self.tokens, self.cells, self.tags, self.open = [], [], [], []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "meta":
            return
        self.open.append((tag, dict(attributes).get("class") or ""))
        if self.open[-1][1].startswith("token"):
            self.tokens.append(["", {}])

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, text):
        tag, kind = self.open[-1] if self.open else ("", "")
        if kind.startswith("token"):
            self.tokens[-1][0] += text
        elif tag == "dt":
            self.name = text
        elif tag == "dd":
            self.tokens[-1][1][self.name] = text
        elif tag == "td":
            self.cells.append(text)


def test_the_page_loads_nothing_and_escapes_everything():
    evil = '</pre><script src="https://a.example/x.js">alert(1)</script>&amp;"\''
    row = (evil, "1")
    parts = [(evil, [evil, Verbatim(evil), Table([row, row]), Colored(row, [[(evil, True, row)]], [-1.0])])]
    html = to_html(parts, evil)
    page = Page(html)
    assert not {"script", "link", "img", "iframe", "a", "base", "object"} & {tag for tag, _ in page.tags}
    assert not {"src", "href", "onload", "srcset"} & {name for _, attributes in page.tags for name in attributes}
    style = html[html.index("<style>") : html.index("</style>")]
    assert "url(" not in style and "@import" not in style and "//" not in style
    assert page.cells == [evil, "1"] and page.tokens == [[evil, {evil: evil} | {"1": "1"}]]
    assert "color-mix" in style and "prefers-color-scheme: dark" in style and 'style="--with: var(--down)' in html


def test_long_tables_are_cut_in_text_but_not_on_the_page():
    rows = [("token", "x"), *((f"word{i}", str(i)) for i in range(100))]
    parts = [("title", [Table(rows, cut=True)])]
    text = to_text(parts)
    assert "(70 tokens are left out here; python explain.py --html FILE shows all)" in text
    assert len(re.findall(r"^word\d+", text, re.MULTILINE)) == 30 and "word19 " in text and "word90 " in text
    assert sum(cell.startswith("word") for cell in Page(to_html(parts, "t")).cells) == 100


def test_text():
    """Paragraphs are wrapped, Verbatim keeps its lines, Colored is left out, long cells are cut."""
    table = Table([("name", "number"), ("x" * 99, "1")])
    blocks = ["word " * 40, Verbatim("one\ntwo"), Colored((), [], []), table]
    lines = to_text([("Title", blocks)]).splitlines()
    assert lines[:3] == ["Title", "-----", ""] and max(map(len, lines)) <= 110
    assert lines[3:5] == [("word " * 22).strip(), ("word " * 18).strip()]
    assert lines[6:8] == ["    one", "    two"] and len(lines) == 11
    assert lines[9].split() == ["name", "number"] and lines[10].split() == ["x" * 59 + "…", "1"]


def test_num():
    assert [num(-0.00001), num(0.0, signed=True), num(1.5, 2, signed=True)] == ["0.0000", "0.0000", "+1.50"]
