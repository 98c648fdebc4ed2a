"""The clip that a record names: AVQA's names, and names from Windows and macOS."""

import pytest

from questions.clips import avqa_clip_path, clip_path, leaves_folder


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".ogg", ".mp3"])
@pytest.mark.parametrize(
    "video_name, stem",
    [("-HG3Omg_89c_000030", "-HG3Omg_89c_000030"), ("-HG3Omg_89c_000030", "-HG3Omg_89c_30")]
    + [("a_b_000000", "a_b_0"), ("a_b_000120", "a_b_120"), ("no-second", "no-second"), ("no_second", "no_second")],
)
def test_avqa_audio(tmp_path, video_name, stem, suffix):
    """The audio of a video is found under both names and any suffix, and never mistaken for another clip."""
    for name in (f"{stem}1.wav", f"{stem}_3.wav", "-HG3Omg_89c_3.wav", "-HG3Omg_89c.wav"):
        (tmp_path / name).touch()
    missing = str(tmp_path / f"{video_name}.wav")  # a message will name this path
    assert avqa_clip_path(str(tmp_path), video_name) == missing
    (tmp_path / (stem + suffix)).touch()
    assert avqa_clip_path(str(tmp_path), video_name) == str(tmp_path / (stem + suffix))


NAMES = [("a\\b", "a/b"), ("\u00e9", "e\u0301"), ("e\u0301", "\u00e9"), ("\u00e9\\e\u0301", "\u00e9/\u00e9")]


@pytest.mark.parametrize("find, suffix", [(clip_path, ".wav"), (avqa_clip_path, "")])
@pytest.mark.parametrize("name, other", NAMES)
def test_names_from_windows_and_macos(tmp_path, find, suffix, name, other):
    r"""The \ of Windows stands for /, and macOS decomposes letters. The name of the folder stays as it is."""
    home = tmp_path / "e\u0301\\x"
    assert find(str(home), name + suffix) == str(home / f"{name}.wav")  # it is missing, and a message will say so
    for existing in (other, name):  # as it is written, it wins
        (home / f"{existing}.wav").parent.mkdir(parents=True, exist_ok=True)
        (home / f"{existing}.wav").touch()
        assert find(str(home), name + suffix) == str(home / f"{existing}.wav")


def test_usual_names_are_not_searched_for(monkeypatch):
    """On a network disk, 38,000 looks take long."""
    looked = []
    monkeypatch.setattr("os.path.exists", looked.append)
    assert clip_path("x", "\u9f13/\u9f13.wav") == "x/\u9f13/\u9f13.wav" and not looked


def test_names_that_leave_a_folder():
    assert all(map(leaves_folder, ["../a", "a/../../b", "..", "a\\..\\..\\b"]))
    assert not any(map(leaves_folder, ["a/../b", "..a", "/x/a", "./a", "a/..b"]))
