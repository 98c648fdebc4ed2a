"""Clips: what can be used as one, by its header and by all of its samples, and its samples as the model hears them."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import soundfile
import soxr

from errors import InputError
from files import kind_of_file

SAMPLE_RATE = 16_000  # Hz; what Qwen2-Audio's mel spectrogram is made for
MIN_SAMPLES = 400  # one 25 ms window of that spectrogram; less holds no audio token
# Beyond these, a clip or its header is more likely broken than meant: no recording of speech, music or a scene needs
# them, 5.1 sound has 6 channels, and the model hears 16 kHz and 30 s.
MAX_RATE, MAX_CHANNELS, MAX_SECONDS, MAX_PEAK = 96_000, 6, 1800, 1e5


def load_audio(path: str) -> np.ndarray:
    """A clip's first channel as float32 samples at 16 kHz, [samples], full scale 1.0. Raises InputError."""
    with open_clip(path) as file, _one_line_errors(path):
        samples = file.read(dtype="float32", always_2d=True)[:, 0]
        rate, announced = file.samplerate, file.frames
    if len(samples) < announced:
        fault = f"was cut off, {len(samples) / rate:.1f} of {announced / rate:.1f} s are there"
    elif not np.isfinite(samples).all():
        fault = "holds NaN or infinite samples"
    elif (peak := np.abs(samples).max()) > MAX_PEAK:
        fault = f"holds samples of up to {peak:.0e}, where full scale is 1"
    elif peak == 0:
        fault = "holds nothing but zeros, absolute silence"
    else:
        return soxr.resample(samples, rate, SAMPLE_RATE)
    raise InputError(f"{path}: {fault}; replace or remove this clip")


@contextmanager
def open_clip(path: str) -> Iterator[soundfile.SoundFile]:
    """A clip, opened to be read, if its header and its last sample are as a clip's should be. Raises InputError."""
    fault = file_fault(path)
    if fault is None:
        with _one_line_errors(path), soundfile.SoundFile(path) as file:
            fault = _header_fault(file)
            if fault is None and file.format != "MP3":  # there, seeking decodes all that is before
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
    """Why a path cannot be a clip, before it is opened."""
    if not os.path.lexists(path):
        return "no audio file of this name"
    if not os.path.isfile(path):  # reading a pipe would wait for someone to write
        return f"is a {kind_of_file(path)}, not an audio file"
    size = os.path.getsize(path)
    if size == 0:
        return "is an empty file"
    with _one_line_errors(path), open(path, "rb") as file:
        announced = _mp3_bytes(file.read(4096))
    return f"was cut off, {size} of {announced} bytes are there" if size < 0.99 * announced else None


def _mp3_bytes(start: bytes) -> int:
    """The size that an MP3 file says it has, in a frame named Xing or Info; 0 if it does not say."""
    place = max(start.find(b"Xing"), start.find(b"Info"))
    if place < 0 or not start.startswith((b"ID3", b"\xff")):
        return 0
    flags = int.from_bytes(start[place + 4 : place + 8], "big")  # bit 0: the number of frames is next; bit 1: of bytes
    field = place + 8 + 4 * (flags & 1)
    return int.from_bytes(start[field : field + 4], "big") if flags & 2 else 0


def _header_fault(file: soundfile.SoundFile) -> str | None:
    """What is wrong with a clip by its header."""
    seconds = file.frames / file.samplerate if file.samplerate > 0 else 0
    if not 0 < file.samplerate <= MAX_RATE:
        return f"has {file.samplerate} Hz, where at most {MAX_RATE} are expected (ffmpeg -ar 16000 changes that)"
    if file.channels > MAX_CHANNELS:
        return f"has {file.channels} channels, where at most {MAX_CHANNELS} are expected (ffmpeg -ac 1 mixes them)"
    if seconds < MIN_SAMPLES / SAMPLE_RATE:
        return f"holds {seconds * 1000:.0f} ms of audio, and at least 25 ms are needed"
    if seconds > MAX_SECONDS:
        return f"lasts {seconds:.0f} s, of which the model would hear the first 30 (ffmpeg -t 30 cuts it)"
    said = re.search(r"^data : (\d+) \(should be (\d+)\)", file.extra_info, re.MULTILINE)  # libsndfile's, of WAV
    if said and int(said[2]) < int(said[1]) < 2**31 - 2**16:  # a size near 2^31 or 2^32 stands for one not known
        return f"was cut off, {said[2]} of {said[1]} bytes of samples are there"
    if re.search("lacks an end-of-stream bit|Junk after the last page", file.extra_info):  # of Ogg
        return f"was cut off after {seconds:.1f} s: its end is missing"
    return None


def audio_seconds(path: str) -> float:
    """A clip's length by its header. Raises InputError."""
    with open_clip(path) as file:
        return file.frames / file.samplerate


@contextmanager
def _one_line_errors(path: str):
    try:
        yield
    # TypeError: headerless .raw files; MemoryError: a damaged header that claims hours of audio
    except (OSError, TypeError, ValueError, MemoryError, soundfile.LibsndfileError) as error:
        reason = " ".join(str(error).replace(f"Error opening {path!r}: ", "").split()) or type(error).__name__
        raise InputError(f"{path}: cannot be read as audio ({reason}); replace or remove this clip") from None
