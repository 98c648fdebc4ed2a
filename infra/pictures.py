"""Save figures as PNG files. Installed fonts supply the characters that matplotlib's own fonts lack."""

import logging
import re
import sys
import warnings
from contextlib import suppress
from pathlib import Path

from infra.files import replacing


def save_picture(figure, path: Path, dpi: int) -> None:
    """Write a matplotlib figure as a PNG file. Print one line if the installed fonts lack some of its characters."""
    with replacing(path) as unfinished:
        missing = _save(figure, unfinished, dpi)
        if missing:
            _add_fonts(figure, missing)
            missing = _save(figure, unfinished, dpi)
    if missing:
        some = "".join(sorted(missing)[:10])
        lack = f"{path}: no installed font has some characters of this picture ({len(missing)}, such as {some!r})"
        print(f"{lack}; install a font that has them, for example Noto Sans CJK", file=sys.stderr)


def _save(figure, path: Path, dpi: int) -> set[str]:
    """Write the PNG file. Return the characters that matplotlib found in no font; it warns about each of them."""
    missing = set()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        figure.savefig(path, dpi=dpi, format="png")
    for warning in caught:
        if glyph := re.match(r"Glyph (\d+) .* missing from", str(warning.message)):
            missing.add(chr(int(glyph[1])))
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return missing


def _add_fonts(figure, missing: set[str]) -> None:
    """Let the texts of a figure use every installed font that has some of the missing characters."""
    from matplotlib.font_manager import findSystemFonts, fontManager, get_font  # imported here: it takes a second
    from matplotlib.text import Text

    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # it warns if a font has no bold letters
    codes, families = set(map(ord, missing)), []
    for path in sorted(findSystemFonts()):  # matplotlib's own list is older than fonts installed since its first use
        with suppress(Exception):  # matplotlib cannot read some fonts, such as bitmap fonts
            font = get_font(path)
            if codes & font.get_charmap().keys():
                fontManager.addfont(path)
                families.append(font.family_name)
    for text in figure.findobj(Text):
        text.set_fontfamily([*text.get_fontfamily(), *dict.fromkeys(families)])
