"""Find the clip that a record names."""

import os
import re
import unicodedata


def leaves_folder(name: str) -> bool:
    """Tell whether a relative name leads out of the folder that it starts from."""
    return os.path.normpath(name.replace("\\", "/")).split("/")[0] == ".."


def clip_path(folder: str, name: str) -> str:
    """Return the path of a clip. If no file has the name, try \\ as / (Windows) and Unicode's NFC and NFD (macOS)."""
    slashes = name.replace("\\", "/")
    spellings = dict.fromkeys([name, slashes, *(unicodedata.normalize(form, slashes) for form in ("NFC", "NFD"))])
    paths = [os.path.join(folder, spelling) for spelling in spellings]
    if len(paths) == 1:  # nearly all names: do not look at the disk, which may be slow
        return paths[0]
    return next(filter(os.path.exists, paths), paths[0])


def avqa_clip_path(folder: str, video_name: str) -> str:
    """Return the path of an AVQA video's audio, under VGGSound's name (ID_000030) or the paper authors' (ID_30)."""
    stem, _, second = video_name.rpartition("_")
    names = [video_name] + ([f"{stem}_{int(second)}"] if stem and re.fullmatch(r"[0-9]{1,9}", second) else [])
    paths = [clip_path(folder, name + suffix) for name in names for suffix in (".wav", ".flac", ".ogg", ".mp3")]
    return next((path for path in paths if os.path.isfile(path)), paths[0])
