"""Clips: load their samples for the model, and check them by their header or by all of their samples."""

import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import Any

import numpy as np

from infra.containers import BadFile, ffmpeg_line, replace_or_convert, streams
from infra.errors import InputError
from infra.files import kind_of_file

SAMPLE_RATE = 16_000  # Hz; Qwen2-Audio's mel spectrogram is made for this rate
MIN_SAMPLES = 400  # one 25 ms window of the spectrogram; a shorter clip has no audio token
# A clip above these limits is probably broken: recordings of speech, music or scenes stay below them, 5.1 sound has 6
# channels, and the model hears 16 kHz and 30 s.
MAX_RATE, MAX_CHANNELS, MAX_SECONDS, MAX_PEAK = 96_000, 6, 1800, 1e5
TOO_LONG = "lasts {} s, but the model would hear only the first 30 (ffmpeg -t 30 cuts it)"
UNKNOWN = 2**63 - 1  # libsndfile's number of frames if the header has none, as in a FLAC file from a pipe


def load_audio(path: str) -> np.ndarray:
    """Read the first channel of a clip as float32 samples at 16 kHz, [samples], full scale 1.0. Raises InputError."""
    soxr = audio_package("soxr")
    parts, seconds, others = [], 0.0, False
    with _one_line_errors(path):
        for stream in _streams(path):
            with _open(stream) as file:
                samples = _decode(file)
                parts.append(soxr.resample(samples[:, 0], file.samplerate, SAMPLE_RATE))
                seconds += len(samples) / file.samplerate
                others = others or bool(samples[:, 1:].any())
        _check_seconds(seconds)
        audio = np.concatenate(parts)
        if not np.isfinite(audio).all():
            raise BadFile("has NaN or infinite samples")
        if (peak := np.abs(audio).max()) > MAX_PEAK:
            raise BadFile(f"has samples up to {peak:.0e}, but full scale is 1")
        if peak == 0 and others:
            fault = "its first channel, the one that the model hears, is silent, but another channel is not"
            raise BadFile(fault, f"mix the channels: {ffmpeg_line(path)}")
        if peak == 0:
            raise BadFile("has only zeros, absolute silence")
    return audio


def audio_seconds(path: str) -> float:
    """Return the seconds of a clip. Decodes it only if a seek to its last sample fails. Raises InputError."""
    with _one_line_errors(path):
        seconds = sum(_seconds(stream) for stream in _streams(path))
        _check_seconds(seconds)
    return seconds


def audio_package(name: str) -> Any:
    """Import soundfile or soxr, which only clips need: GPU benchmarks run without them. Raises InputError."""
    try:
        return import_module(name)
    except (ImportError, OSError) as error:  # OSError: the libsndfile of soundfile is missing
        raise InputError(f"clips need the package {name} ({error}): pip install -r requirements.txt") from None


def _streams(path: str) -> list[str | bytes]:
    """Check that the path is a file with bytes, and call containers.streams. Raises BadFile."""
    if not os.path.lexists(path):
        raise BadFile("no audio file of this name")
    if not os.path.isfile(path):  # reading a pipe would wait for someone to write
        raise BadFile(f"is a {kind_of_file(path)}, not an audio file")
    if os.path.getsize(path) == 0:
        raise BadFile("is an empty file")
    return streams(path)


@contextmanager
def _open(stream: str | bytes) -> Iterator[Any]:
    """Open a stream as a soundfile.SoundFile. Raises BadFile for a bad header."""
    source, size = (io.BytesIO(stream), len(stream)) if isinstance(stream, bytes) else (stream, os.path.getsize(stream))
    with audio_package("soundfile").SoundFile(source) as file:
        if not 0 < file.samplerate <= MAX_RATE:
            fault = f"has {file.samplerate} Hz, and at most {MAX_RATE} are allowed (ffmpeg -ar 16000 resamples it)"
            raise BadFile(fault)
        if file.channels > MAX_CHANNELS:
            fault = f"has {file.channels} channels, and at most {MAX_CHANNELS} are allowed (ffmpeg -ac 1 mixes them)"
            raise BadFile(fault)
        if MAX_SECONDS * file.samplerate < file.frames != UNKNOWN:
            raise BadFile(TOO_LONG.format(f"{file.frames / file.samplerate:.0f}"))
        # For WAV, AIFF, AU, W64 and RF64, libsndfile logs the announced and the real number of bytes. Two wrong numbers
        # are harmless: some programs count the header, too, and some write 2 GB or more if they do not know the size.
        sizes = r"^ *(?:data|SSND|BODY|Data Size|riff|Riff size) *: (\d+) \(should be (\d+)\)"
        log = re.search(sizes, file.extra_info, re.MULTILINE)
        if log and size + 8 < int(log[1]) < 2_000_000_000:
            raise BadFile(f"was cut off: only {log[2]} of {log[1]} bytes are left")
        yield file


def _decode(file: Any) -> np.ndarray:
    """Read all samples of an open stream, [samples, channels]. Raises BadFile if some are missing."""
    file.seekable = lambda: False  # soundfile would seek after reading, and some codecs cannot
    longest = MAX_SECONDS * file.samplerate
    try:
        samples = file.read(min(file.frames, longest + 1), dtype="float32", always_2d=True)
    except audio_package("soundfile").LibsndfileError as error:
        raise BadFile(f"cannot be read as audio: it was cut off or is damaged ({error})") from None
    if len(samples) > longest:
        raise BadFile(TOO_LONG.format(f"over {MAX_SECONDS}"))
    if file.frames != UNKNOWN and len(samples) < 0.9 * file.frames:  # for an MP2, frames is an estimate
        left, announced = len(samples) / file.samplerate, file.frames / file.samplerate
        raise BadFile(f"was cut off or is damaged: only {left:.1f} of {announced:.1f} s can be read")
    return samples


def _seconds(stream: str | bytes) -> float:
    """Return the seconds of a stream: from its header, or by decoding it if a seek to its last sample fails."""
    with _open(stream) as file, suppress(audio_package("soundfile").LibsndfileError):
        if "MPEG" not in file.subtype:  # there, seeking decodes everything before
            file.seek(file.frames - 1)  # fails for some codecs, for an unknown length and if the file was cut off
        return file.frames / file.samplerate
    with _open(stream) as file:
        return len(_decode(file)) / file.samplerate


def _check_seconds(seconds: float) -> None:
    if seconds < MIN_SAMPLES / SAMPLE_RATE:
        raise BadFile(f"has {seconds * 1000:.0f} ms of audio, and at least 25 ms are needed")
    if seconds > MAX_SECONDS:
        raise BadFile(TOO_LONG.format(f"{seconds:.0f}"))


@contextmanager
def _one_line_errors(path: str):
    damaged = audio_package("soundfile").LibsndfileError
    try:
        yield
    except BadFile as fault:
        raise InputError(f"{path}: {fault}") from None
    # TypeError: .raw files without header; MemoryError: a damaged header that claims hours of audio
    except (OSError, TypeError, ValueError, MemoryError, damaged) as error:
        reason = " ".join(getattr(error, "error_string", str(error)).split()) or type(error).__name__
        code, remedy = getattr(error, "code", 0), "replace or remove this clip"
        if code == 7:  # libsndfile says "does not exist" of an .mp3 file that is something else
            reason = "it is not an MP3"
        elif code > 2:  # the format is known, but perhaps not the codec in it
            remedy = replace_or_convert(path)
        raise InputError(f"{path}: cannot be read as audio ({reason}); {remedy}") from None
