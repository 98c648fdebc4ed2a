"""Clips: load their samples for the model, and check them by their header or by all of their samples."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import numpy as np

from infra.errors import InputError
from infra.files import kind_of_file

SAMPLE_RATE = 16_000  # Hz; Qwen2-Audio's mel spectrogram is made for this rate
MIN_SAMPLES = 400  # one 25 ms window of the spectrogram; a shorter clip has no audio token
# A clip above these limits is probably broken: recordings of speech, music or scenes stay below them, 5.1 sound has 6
# channels, and the model hears 16 kHz and 30 s.
MAX_RATE, MAX_CHANNELS, MAX_SECONDS, MAX_PEAK = 96_000, 6, 1800, 1e5


def load_audio(path: str) -> np.ndarray:
    """Read the first channel of a clip as float32 samples at 16 kHz, [samples], full scale 1.0. Raises InputError."""
    soxr = audio_package("soxr")
    with open_clip(path) as file, _one_line_errors(path):
        samples = file.read(dtype="float32", always_2d=True)[:, 0]
        rate, announced = file.samplerate, file.frames
    if len(samples) < announced:
        fault = f"was cut off: only {len(samples) / rate:.1f} of {announced / rate:.1f} s are left"
    elif not np.isfinite(samples).all():
        fault = "has NaN or infinite samples"
    elif (peak := np.abs(samples).max()) > MAX_PEAK:
        fault = f"has samples up to {peak:.0e}, but full scale is 1"
    elif peak == 0:
        fault = "has only zeros, absolute silence"
    else:
        return soxr.resample(samples, rate, SAMPLE_RATE)
    raise InputError(f"{path}: {fault}; replace or remove this clip")


def audio_package(name: str) -> Any:
    """Import soundfile or soxr, which only clips need: GPU benchmarks run without them. Raises InputError."""
    try:
        return import_module(name)
    except (ImportError, OSError) as error:  # OSError: the libsndfile of soundfile is missing
        raise InputError(f"clips need the package {name} ({error}): pip install -r requirements.txt") from None


@contextmanager
def open_clip(path: str) -> Iterator[Any]:
    """Open a clip as a soundfile.SoundFile. Raises InputError for a bad header, or if its end cannot be reached."""
    soundfile = audio_package("soundfile")
    fault = file_fault(path)
    if fault is None:
        with _one_line_errors(path), soundfile.SoundFile(path) as file:
            fault = _header_fault(file)
            if fault is None and file.format != "MP3":  # in an MP3, seeking decodes everything before
                try:
                    file.seek(file.frames - 1)
                    file.seek(0)
                except soundfile.LibsndfileError:
                    fault = "was cut off or is damaged: its last sample cannot be reached"
            if fault is None:
                yield file
                return
    raise InputError(f"{path}: {fault}; replace or remove this clip")


def file_fault(path: str) -> str | None:
    """Return why a path cannot be a clip, before opening it as one; None if it can."""
    if not os.path.lexists(path):
        return "no audio file of this name"
    if not os.path.isfile(path):  # reading a pipe would wait for someone to write
        return f"is a {kind_of_file(path)}, not an audio file"
    size = os.path.getsize(path)
    if size == 0:
        return "is an empty file"
    with _one_line_errors(path), open(path, "rb") as file:
        announced = _mp3_bytes(file.read(4096))
    return f"was cut off: only {size} of {announced} bytes are left" if size < 0.99 * announced else None


def _mp3_bytes(start: bytes) -> int:
    """Return the file size that an MP3 announces in a frame named Xing or Info; 0 if it announces none."""
    tag = max(start.find(b"Xing"), start.find(b"Info"))
    if tag < 0 or not start.startswith((b"ID3", b"\xff")):
        return 0
    flags = int.from_bytes(start[tag + 4 : tag + 8], "big")  # bit 0: a number of frames follows; bit 1: of bytes
    field = tag + 8 + 4 * (flags & 1)
    return int.from_bytes(start[field : field + 4], "big") if flags & 2 else 0


def _header_fault(file) -> str | None:
    """Return what is wrong with the header of an open clip, or None."""
    seconds = file.frames / file.samplerate if file.samplerate > 0 else 0
    if not 0 < file.samplerate <= MAX_RATE:
        return f"has {file.samplerate} Hz, and at most {MAX_RATE} are allowed (ffmpeg -ar 16000 resamples it)"
    if file.channels > MAX_CHANNELS:
        return f"has {file.channels} channels, and at most {MAX_CHANNELS} are allowed (ffmpeg -ac 1 mixes them)"
    if seconds < MIN_SAMPLES / SAMPLE_RATE:
        return f"has {seconds * 1000:.0f} ms of audio, and at least 25 ms are needed"
    if seconds > MAX_SECONDS:
        return f"lasts {seconds:.0f} s, but the model would hear only the first 30 (ffmpeg -t 30 cuts it)"
    sizes = re.search(r"^data : (\d+) \(should be (\d+)\)", file.extra_info, re.MULTILINE)  # libsndfile's log of a WAV
    if sizes and int(sizes[2]) < int(sizes[1]) < 2**31 - 2**16:  # a size near 2^31 or 2^32 means: not known
        return f"was cut off: only {sizes[2]} of {sizes[1]} bytes of samples are left"
    if re.search("lacks an end-of-stream bit|Junk after the last page", file.extra_info):  # Ogg
        return f"was cut off after {seconds:.1f} s: its end is missing"
    return None


def audio_seconds(path: str) -> float:
    """Return the length of a clip by its header. Raises InputError."""
    with open_clip(path) as file:
        return file.frames / file.samplerate


@contextmanager
def _one_line_errors(path: str):
    damaged = audio_package("soundfile").LibsndfileError
    try:
        yield
    # TypeError: .raw files without header; MemoryError: a damaged header that claims hours of audio
    except (OSError, TypeError, ValueError, MemoryError, damaged) as error:
        reason = " ".join(str(error).replace(f"Error opening {path!r}: ", "").split()) or type(error).__name__
        raise InputError(f"{path}: cannot be read as audio ({reason}); replace or remove this clip") from None
