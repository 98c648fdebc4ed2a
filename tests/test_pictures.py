"""Pictures: characters that no font has, and installed fonts that have them."""

import warnings
from pathlib import Path

import matplotlib
import pytest
from matplotlib import font_manager
from matplotlib.figure import Figure

from infra.pictures import save_picture

ROOT = Path(__file__).resolve().parents[1]
OWN_FONTS = Path(matplotlib.get_data_path(), "fonts", "ttf")  # come with matplotlib


def draw(path, text):
    figure = Figure(figsize=(2, 2), layout="constrained")
    figure.subplots().set_xlabel(text)
    figure.suptitle(text[::-1], weight="bold")
    save_picture(figure, path, dpi=50)
    return path.read_bytes()


@pytest.fixture
def installed(monkeypatch):
    """Make this list of files the installed fonts. matplotlib has looked for fonts before STIX was installed."""
    fonts = []
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: fonts)
    known = [font for font in font_manager.fontManager.ttflist if "STIX" not in font.fname]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", known)
    return fonts


def test_characters_that_no_font_has_are_one_line(tmp_path, installed, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw(tmp_path / "known.png", "é … ✓")
        assert capsys.readouterr() == ("", "")
        draw(tmp_path / "unknown.png", "听到什么? 雨, 雨")
    line = f"{tmp_path}/unknown.png: no installed font has some characters of this picture (5, such as '么什到听雨'); "
    assert capsys.readouterr() == ("", f"{line}install a font that has them, for example Noto Sans CJK\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["known.png", "unknown.png"]


def test_an_installed_font_that_has_the_characters_is_used(tmp_path, installed, capsys, caplog):
    text = chr(0xE000)  # one of STIX's own signs, which Unicode does not have
    box = draw(tmp_path / "1.png", text)
    assert "(1, such as" in capsys.readouterr().err
    (tmp_path / "damaged.ttf").write_bytes(b"no font")
    installed += [str(tmp_path / "damaged.ttf"), str(OWN_FONTS / "cmr10.ttf"), str(OWN_FONTS / "STIXNonUni.ttf")]
    assert draw(tmp_path / "2.png", text) != box
    assert capsys.readouterr() == ("", "") and not caplog.records


def test_other_warnings_stay(tmp_path):
    figure = Figure()
    figure.savefig = lambda path, **options: [path.touch(), warnings.warn("too small", stacklevel=2)]
    with pytest.warns(UserWarning, match="too small"):
        save_picture(figure, tmp_path / "x.png", dpi=50)


def test_every_picture_is_saved_here():
    sources = [*ROOT.glob("*.py"), *(path for path in ROOT.glob("[!.]*/*.py") if path.parent.name != "tests")]
    found = [path.name for path in sources if "savefig" in path.read_text(encoding="utf-8")]
    assert found == ["pictures.py"]
