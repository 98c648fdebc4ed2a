"""Read the bytes of audio files: recognize formats that libsndfile cannot read, repair files that it reads in part."""

import os
import re
import shlex
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

# first bytes -> format; ffmpeg reads all of them
FOREIGN = {
    rb"....(ftyp|moov|mdat|wide)": "MP4 or M4A",
    rb"\x1aE\xdf\xa3": "WebM or Matroska",
    rb"\xff[\xf0\xf1\xf8\xf9]|ADIF": "AAC",
    rb"0&\xb2u\x8ef\xcf\x11": "WMA or WMV",
    rb"#!AMR": "AMR",
    rb"RIFF....AVI ": "AVI",
    rb"FLV\x01": "FLV",
    rb"\0\0\x01\xba|G.{187}G": "MPEG video",
    rb"\x0bw": "AC-3",
    rb"wvpk": "WavPack",
    rb"MAC ": "Monkey's Audio",
}
# The first frame of an MP3 may hold the number of frames and of bytes instead of sound. Before these numbers are a
# checksum of 0 or 2 bytes and side information of 9, 17 or 32 bytes.
XING = rb"\xff[\xe2-\xff]..(?:..)?(?:.{9}|.{17}|.{32})(?:Xing|Info)\0\0\0[\x03\x07\x0b\x0f](.{4})(.{4})"
LAYER_III = rb"\xff[\xe2\xe3\xf2\xf3\xfa\xfb][\x10-\xef]."  # header of a frame of an MP3
MPEG_1, MPEG_2, MPEG_2_5 = 0xFB, 0xF3, 0xE3  # its second byte, where the lowest bit says that there is no checksum
KBITS_1 = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)
KBITS_2 = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)


class BadFile(Exception):
    """The fault of a clip and its remedy, as one line without the path."""

    def __init__(self, fault: str, remedy: str = "replace or remove this clip"):
        super().__init__(f"{fault}; {remedy}")


def ffmpeg_line(path: str) -> str:
    """Return the command that makes a WAV file of 16 kHz from a clip."""
    return f"ffmpeg -i {shlex.quote(path)} -ar 16000 -ac 1 {shlex.quote(os.path.splitext(path)[0] + '_16k.wav')}"


def replace_or_convert(path: str) -> str:
    """Return the remedy if a clip may be good although libsndfile cannot read it."""
    return f"replace or remove this clip, or if other programs play it, convert it: {ffmpeg_line(path)}"


def streams(path: str) -> list[str | bytes]:
    """Return what libsndfile has to open to read all of a clip: its path, or the bytes of one or more files in order.

    From the path, libsndfile reads only the first of several Ogg streams, nothing if the size of a WAV file is 0, and a
    guessed part of an MP3 without its length in the first frame. Raises BadFile for a format that libsndfile cannot
    read, and for an Ogg or MP3 file that was cut off.
    """
    with open(path, "rb") as file:
        start = 0
        while (head := file.read(4096)).startswith(b"ID3"):  # a tag, perhaps with pictures; its size has 7 bits a byte
            start += 10 + sum(byte << shift for byte, shift in zip(head[6:10], (21, 14, 7, 0)))
            file.seek(start)
    for first_bytes, name in FOREIGN.items():
        if re.match(first_bytes, head, re.DOTALL):
            raise BadFile(f"is {name}, which soundfile cannot read", f"convert it: {ffmpeg_line(path)}")
    if head.startswith(b"OggS"):
        return _ogg_streams(path)
    # A data chunk of size 0 before another chunk is empty. Otherwise the recorder left the size at 0.
    if head.startswith(b"RIFF") and (size := re.search(rb"data\0\0\0\0(?!LIST|bext|iXML|id3 )", head)):
        return [Path(path).read_bytes().replace(size[0], b"data\xff\xff\xff\xff", 1)]  # the size is not known
    if _frame_length(head):
        return [_mp3_with_length(path, head, start) or path]
    return [path]


def _ogg_streams(path: str) -> list[str | bytes]:
    """Split an Ogg file into streams that follow each other. Returns the path if there is only one.

    Raises BadFile if the file was cut off.
    """
    content = Path(path).read_bytes()
    starts, first_page_end, end, flags = [], -1, 0, 0
    for page in re.finditer(rb"OggS\0(.).{20}(.)", content, re.DOTALL):
        flags, end = page[1][0], page.end() + page[2][0] + sum(content[page.end() : page.end() + page[2][0]])
        if flags & 2:  # the first page of a stream; two first pages in a row belong to streams that run side by side
            if page.start() != first_page_end:
                starts.append(page.start())
            first_page_end = end
    if end > len(content) or not flags & 4:  # 4: the last page of a stream; a tag may follow
        raise BadFile("was cut off: its last page is missing", replace_or_convert(path))  # or its recorder was stopped
    if len(starts) < 2:
        return [path]
    return [content[a:b] for a, b in pairwise([*starts, len(content)])]


def _mp3_with_length(path: str, head: bytes, start: int) -> bytes | None:
    """Return an MP3 with its number of frames in front, or None if the file has the right number there.

    head: the bytes from its first frame on. start: where that frame begins in the file. A file of several MP3s in a row
    has the number of the first one alone. Raises BadFile if the file was cut off.
    """
    size, xing = os.path.getsize(path) - start, re.match(XING, head, re.DOTALL)
    number, announced = (int.from_bytes(field, "big") for field in xing.groups()) if xing else (0, 0)
    if size < 0.99 * announced:
        raise BadFile(f"was cut off: only {size} of {announced} bytes are left")
    if number and announced and size <= 1.01 * announced + 128:  # 128: a tag at the end
        return None
    frames = [frame for frame in _frames(Path(path).read_bytes(), start) if not re.match(XING, frame, re.DOTALL)]
    version, mono = head[1] | 1, head[3] >= 0xC0
    header = bytes([0xFF, version, head[2] & 15 | 0xE0, head[3]])  # no checksum, and the highest bit rate
    side = (17 if mono else 32) if version == MPEG_1 else (9 if mono else 17)
    first = header + bytes(side) + b"Xing" + (1).to_bytes(4) + len(frames).to_bytes(4)
    return first.ljust(_frame_length(header), b"\0") + b"".join(frames)


def _frames(content: bytes, at: int) -> Iterator[bytes]:
    """Yield the layer III frames from byte `at` on. After a tag or damage, continue at the next two frames in a row."""
    in_sync = True
    while 0 <= at < len(content):
        length = _frame_length(content[at : at + 4])
        in_sync = bool(length and (in_sync or _frame_length(content[at + length : at + length + 4])))
        if in_sync:
            yield content[at : at + length]
            at += length
        else:
            at = content.find(b"\xff", at + 1)


def _frame_length(header: bytes) -> int:
    """Return the number of bytes of the layer III frame that begins with this header of four bytes; 0 if none does."""
    if not re.match(LAYER_III, header, re.DOTALL) or header[2] & 12 == 12:
        return 0
    version, padding = header[1] | 1, header[2] >> 1 & 1
    rate = (44_100, 48_000, 32_000)[header[2] >> 2 & 3] // {MPEG_1: 1, MPEG_2: 2, MPEG_2_5: 4}[version]
    kbits = (KBITS_1 if version == MPEG_1 else KBITS_2)[header[2] >> 4]
    return (144_000 if version == MPEG_1 else 72_000) * kbits // rate + padding
