"""Odd audio files: tags, MP3s without a length, joined files, formats that soundfile cannot read."""

import numpy as np
import pytest
import soundfile
from test_audio import encoded, fault, heard, tone

from infra.audio import load_audio
from infra.containers import _frame_length, streams
from infra.errors import InputError


def id3(content: bytes) -> bytes:
    """Return an ID3 tag. Its size has 7 bits a byte."""
    size = len(content)
    return b"ID3\3\0\0" + bytes([size >> 21, size >> 14 & 127, size >> 7 & 127, size & 127]) + content


# ---- MP3 ----


def mp3(seconds=3, frequency=500, rate=16_000, channels=1, **settings) -> bytes:
    """Return an MP3 of a tone after half a second of silence. Its first frame has the length."""
    samples = np.tile(tone(frequency, rate, 0.5), int(seconds))
    samples[: rate // 2] = 0
    return encoded(np.stack(channels * [samples], axis=1), rate, "MPEG_LAYER_III", "MP3", **settings)


def without_length(content: bytes) -> bytes:
    """Take out the first frame of an MP3, as programs that write to a pipe do."""
    assert b"Info" in content[:60] or b"Xing" in content[:60]
    return content[_frame_length(content) :]


TAGS = {
    "Info in a comment": id3(b"COMM\0\0\0\x10\0\0\0eng\0Info: band.org"),
    "Xing in a comment": id3(b"COMM\0\0\0\x10\0\0\0eng\0Xing\0\0\0\x0f\xff\xff\xff\xff\xff\xff\xff\xff"),
    "pictures": id3(20_000 * b"Info\0\0\0\x0f"),
    "two tags": id3(b"Info\0\0\0\x0f" + 300 * b"\xff") + id3(5_000 * b"\0"),
}


@pytest.mark.parametrize("case", TAGS)
def test_mp3_with_a_tag(tmp_path, case):
    assert heard(tmp_path / "a.mp3", TAGS[case] + mp3()) == (3, 500)
    assert "was cut off: only" in fault(tmp_path / "a.mp3", TAGS[case] + mp3()[:-2_000])


@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 44_100, 48_000])
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("mode", ["CONSTANT", "VARIABLE"])
def test_mp3_without_a_length(tmp_path, rate, channels, mode):
    """libsndfile guesses from the first frame's bit rate, which is low in silence. All samples are those of the MP3."""
    whole, path = mp3(rate=rate, channels=channels, bitrate_mode=mode), tmp_path / "a.mp3"
    seconds, _ = heard(path, whole)
    exact = soundfile.read(path, always_2d=True)[0]
    for content in (without_length(whole), id3(b"Info") + without_length(whole) + b"TAG" + bytes(125)):
        assert heard(path, content)[0] == pytest.approx(seconds, abs=0.15)
        [stream] = streams(str(path))
        assert stream.endswith(whole[-50:])
        (tmp_path / "b.mp3").write_bytes(stream)
        samples = soundfile.read(tmp_path / "b.mp3", always_2d=True)[0]
        assert np.abs(samples[576 : 576 + 2 * rate] - exact[: 2 * rate]).max() < 1e-6


def test_joined_mp3s(tmp_path):
    """The first one's length is not that of all. Between them may be tags, even with the bytes of a frame's header."""
    tag = id3(100 * (without_length(mp3())[:4] + bytes(300)))
    parts = [mp3(3), tag, mp3(2), b"TAG" + bytes(125), without_length(mp3(4))]
    assert heard(tmp_path / "a.mp3", b"".join(parts)) == (pytest.approx(9, abs=0.3), pytest.approx(500, abs=0.2))


def test_mp3_damaged_within(tmp_path):
    """The decoder stops at a frame of stereo sound within a mono file."""
    content, path, at = bytearray(mp3()), tmp_path / "a.mp3", 0
    while at < len(content) / 2:
        at += _frame_length(content[at : at + 4])
    content[at + 3] ^= 0xC0
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"is damaged: only 1\.\d of 3\.0 s can be read"):
        load_audio(str(path))


# ---- Ogg ----


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_ogg_streams_in_a_row(tmp_path, monkeypatch, subtype):
    a, b = (encoded(tone(frequency, 16_000), 16_000, subtype, "OGG") for frequency in (500, 700))
    stereo = encoded(np.stack(2 * [tone(900, 48_000)], axis=1), 48_000, subtype, "OGG")
    assert heard(tmp_path / "a.ogg", a + b + stereo)[0] == 3
    audio = load_audio(str(tmp_path / "a.ogg")).reshape(3, 16_000)
    assert np.argmax(np.abs(np.fft.rfft(audio)), axis=1).tolist() == [500, 700, 900]
    assert heard(tmp_path / "a.ogg", a + a) == (2, 500)  # both have the same number
    for tag in (b"TAG" + bytes(125), bytes(300)):
        assert heard(tmp_path / "a.ogg", a + tag) == (1, 500)
    assert "was cut off: its last page is missing" in fault(tmp_path / "a.ogg", a + b[:-100])
    assert "ffmpeg -i /a.ogg" in fault(tmp_path / "a.ogg", a[: a.rfind(b"OggS")])  # its recorder was stopped
    monkeypatch.setattr("infra.audio.MAX_SECONDS", 2)
    assert "lasts 3 s" in fault(tmp_path / "a.ogg", a + b + stereo)


def page(flags: int, body: bytes) -> bytes:
    """Return an Ogg page of one segment."""
    return b"OggS\0" + bytes([flags]) + bytes(20) + bytes([1, len(body)]) + body


def test_pages_of_ogg(tmp_path):
    """2 is a stream's first page, 4 its last one. Streams side by side have their first pages side by side."""
    row = page(2, b"a") + page(0, b"aa") + page(4, b"a")
    beside = page(2, b"b") + page(2, b"c") + page(0, b"OggS") + page(4, b"b") + page(4, b"c")
    path = tmp_path / "a.ogg"
    for content, found in ((row, [str(path)]), (beside, [str(path)]), (row + beside + row, [row, beside, row])):
        path.write_bytes(content)
        assert streams(str(path)) == found


# ---- formats that soundfile cannot read ----

FOREIGN = {
    "MP4 or M4A": b"\0\0\0\x20ftypM4A \0\0\0\0",
    "WebM or Matroska": b"\x1a\x45\xdf\xa3\x9f\x42",
    "AAC": b"\xff\xf1\x60\x40\x05",
    "WMA or WMV": bytes.fromhex("3026b2758e66cf11a6d9"),
    "AMR": b"#!AMR\n",
    "AVI": b"RIFF\0\x10\0\0AVI LIST",
    "MPEG video": b"G" + bytes(187) + b"G",
}


@pytest.mark.parametrize("format", FOREIGN)
def test_other_formats_get_the_line_that_converts_them(tmp_path, format):
    for name in ("a.m4a", "a.wav", "a.mp3", "a.au"):
        for content in (FOREIGN[format], id3(b"TIT2") + FOREIGN[format]):
            message = fault(tmp_path / name, content + bytes(2_000))
            line = f"ffmpeg -i /{name} -ar 16000 -ac 1 /a_16k.wav"
            assert message == f"/{name}: is {format}, which soundfile cannot read; convert it: {line}"


def test_a_codec_that_soundfile_cannot_read(tmp_path):
    """Speex in Ogg, AAC in CAF: the container is known."""
    caf = encoded(tone(500, 16_000), 16_000, "PCM_16", "CAF").replace(b"lpcm", b"aac ")
    for content in (caf, page(2, b"Speex   " + bytes(72)) + page(4, b"x")):
        message = fault(tmp_path / "a.xyz", content)
        assert "cannot be read as audio (" in message and "-i /a.xyz -ar 16000 -ac 1 /a_16k.wav" in message
    for name, reason in (("a.wav", "Format not recognised."), ("a.mp3", "it is not an MP3")):
        assert fault(tmp_path / name, 100 * b"<html>404</html>").endswith(f"({reason}); replace or remove this clip")
