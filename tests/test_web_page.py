"""The frame of a page: escaped text, the shared style, nothing from the network."""

import html
from pathlib import Path

from evaluation.web_page import escape, player, web_page


def test_escape():
    text = """</title><b class='x' id="y">&amp;"""
    assert not set("<>'\"") & set(escape(text)) and html.unescape(escape(text)) == text
    assert escape(7) == "7"


def test_a_player_links_its_clip_relative_to_the_page():
    """In a name every character but the slash is escaped."""
    for clip, page, address in (
        ("clips/a.wav", "a.html", "clips/a.wav"),
        (f"{Path.cwd()}/clips/a.wav", "pages/run/a.html", "../../clips/a.wav"),
        ('../a"<?#%: .wav', f"{Path.cwd()}/a.html", "../a%22%3C%3F%23%25%3A%20.wav"),
        ("javascript:x", "a.html", "javascript%3Ax"),
    ):
        assert player(clip, page) == f'<audio controls preload="none" src="{address}"></audio>'


def test_a_page_has_the_shared_style_and_then_its_own():
    page = web_page("a < b", "\nbody { color: red; }\n", "<p>text</p>\n")
    assert page.startswith("<!DOCTYPE html>\n") and "<title>a &lt; b</title>" in page
    assert page.count("<style>") == 1 and page.index("color-scheme: light dark") < page.index("body { color: red; }")
    assert page.endswith("<body>\n<p>text</p>\n</body>\n</html>\n")
    assert not [text for text in ("http", "url(", "@import", "<script", "<link") if text in page]
