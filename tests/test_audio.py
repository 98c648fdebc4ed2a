"""Clips: resampling, channels, file formats, bad clips, real recordings."""

import sys

import numpy as np
import pytest
import soundfile
from test_layers import FLOOR, ROOT

import data
from data import load_questions
from infra.audio import load_audio
from infra.errors import InputError

REAL_SOUNDS = ROOT.parent / "shared" / "real_sounds"


def test_data_has_load_audio_too():
    assert data.load_audio is load_audio


def tone(frequency, rate, amplitude=0.9):
    """Make one second of a sine."""
    return amplitude * np.sin(2 * np.pi * frequency * np.arange(rate) / rate)


def spectrum(audio):
    """Return the amplitude of each frequency. One second at 16 kHz has one bin per Hz."""
    window = np.hanning(len(audio))
    return 2 * np.abs(np.fft.rfft(audio * window)) / window.sum()


@pytest.mark.parametrize("rate", [5_000, 8_000, 11_025, 16_000, 22_050, 44_100, 48_000])
@pytest.mark.parametrize("share", [0.02, 0.25, 0.42], ids=["low", "middle", "high"])
def test_resampling(tmp_path, rate, share):
    """A tone keeps its frequency and amplitude. Everything else stays 60 dB below full scale."""
    frequency = int(share * min(rate, 16_000))
    soundfile.write(tmp_path / "a.wav", tone(frequency, rate), rate, "FLOAT")
    audio = load_audio(str(tmp_path / "a.wav"))
    assert audio.dtype == np.float32 and audio.ndim == 1 and abs(len(audio) - 16_000) <= 1
    amplitudes = spectrum(audio)
    assert abs(np.argmax(amplitudes) - frequency) <= 1
    assert amplitudes.max() == pytest.approx(0.9, rel=0.01)
    amplitudes[frequency - 4 : frequency + 5] = 0
    assert amplitudes.max() < 1e-3


@pytest.mark.parametrize("rate, frequency", [(22_050, 10_000), (44_100, 10_000), (48_000, 10_000), (48_000, 15_500)])
def test_no_aliases(tmp_path, rate, frequency):
    """A tone that 16 kHz cannot hold vanishes."""
    soundfile.write(tmp_path / "a.wav", tone(frequency, rate), rate, "FLOAT")
    assert spectrum(load_audio(str(tmp_path / "a.wav"))).max() < 1e-3


@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_first_channel_only(tmp_path, rate):
    """As in the paper's code, the other channels are left out, not mixed in."""
    soundfile.write(tmp_path / "mono.wav", tone(500, rate), rate, "FLOAT")
    soundfile.write(tmp_path / "many.wav", np.stack([tone(f, rate) for f in (500, 1500, 2500)], axis=1), rate, "FLOAT")
    assert np.array_equal(load_audio(str(tmp_path / "many.wav")), load_audio(str(tmp_path / "mono.wav")))


LOSSLESS = [("a.wav", "PCM_16", 1e-4), ("a.wav", "PCM_24", 1e-6), ("a.wav", "DOUBLE", 1e-6), ("a.flac", "PCM_24", 1e-6)]
LOSSY = [("a.ogg", "VORBIS", 0.02), ("a.mp3", "MPEG_LAYER_III", 0.02)]


@pytest.mark.parametrize("name, subtype, tolerance", LOSSLESS + LOSSY)
def test_file_formats(tmp_path, name, subtype, tolerance):
    """Every file format gives the samples of the float WAV, within its own precision."""
    if name.endswith(".mp3") and "MP3" not in soundfile.available_formats():
        pytest.skip("this libsndfile cannot write MP3")
    stereo = np.stack([tone(500, 44_100, 0.5), tone(3_000, 44_100, 0.5)], axis=1)
    soundfile.write(tmp_path / name, stereo, 44_100, subtype)
    soundfile.write(tmp_path / "float.wav", stereo, 44_100, "FLOAT")
    audio, exact = load_audio(str(tmp_path / name)), load_audio(str(tmp_path / "float.wav"))
    assert audio.dtype == np.float32 and audio.ndim == 1 and abs(len(audio) - 16_000) <= 1
    assert np.abs(audio - exact)[1_000:-1_000].max() < tolerance


# case: samples and rate, or the file's bytes; what the message names
BAD = {
    "8 channels": ((np.ones((1600, 8)), 16_000), ["8 channels", "-ac 1"]),
    "192 kHz": ((np.ones(16_000), 192_000), ["192000 Hz", "-ar 16000"]),
    "an hour": ((np.ones(3_600_000), 1_000), ["3600 s", "-t 30"]),
    "silence": ((np.zeros(1600), 16_000), ["silence"]),
    "samples like 1e30": ((np.full(1600, 1e30), 16_000), ["1e+30"]),
    "infinite samples": ((np.full(1600, np.inf), 16_000), ["infinite"]),
    "text": (b"This is no sound.", []),
    "empty": (b"", []),
    "raw samples": (bytes(32_000), []),
    "zero samples": ((np.zeros(0), 16_000), ["0 ms"]),
    "5 ms": ((np.ones(80), 16_000), ["5 ms"]),
    "NaN": ((np.where(np.arange(16_000) == 8_000, np.nan, 0), 16_000), ["NaN"]),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_clip_is_one_line_that_names_it(tmp_path, case):
    content, named = BAD[case]
    path = tmp_path / ("a.raw" if case == "raw samples" else "a.wav")
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        soundfile.write(path, *content, subtype="FLOAT")
    with pytest.raises(InputError) as error:
        load_audio(str(path))
    assert "\n" not in str(error.value) and [name for name in [str(path), *named] if name not in str(error.value)] == []


WITHOUT = """
import sys
for name in [name for name in sys.modules if name.split(".")[0] in FILES]:
    del sys.modules[name]  # import it anew
sys.modules.update(soundfile=None, soxr=None)  # importing these two raises ImportError
import COMMANDS
"""


def test_commands_are_imported_without_soundfile_and_soxr(tmp_path, forker):
    commands = ", ".join(path.stem for path in ROOT.glob("*.py"))
    done = forker.run(tmp_path, ["bench.py"], WITHOUT.replace("FILES", str([*FLOOR])).replace("COMMANDS", commands))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("package", ["soundfile", "soxr"])
def test_a_missing_package_is_one_line(questions, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=rf"^clips need the package {package} .*: pip install -r requirements"):
        load_audio(questions[0].audio)


@pytest.mark.parametrize("file, number", [("train_r1aqa.jsonl", 89), ("test_mmau.json", 44)])
def test_real_recordings(file, number):
    """Real recordings of many rates, mono and stereo, can be loaded."""
    if not REAL_SOUNDS.is_dir():
        pytest.skip("no real recordings next to this checkout")
    questions = load_questions(str(REAL_SOUNDS / file))
    assert len(questions) == number
    for question in questions:
        assert question.answer in question.choices and "video" not in question.question
        if not soundfile.read(question.audio)[0].any():  # three of the recordings are empty
            with pytest.raises(InputError, match="absolute silence"):
                load_audio(question.audio)
            continue
        audio, info = load_audio(question.audio), soundfile.info(question.audio)
        assert audio.dtype == np.float32 and audio.ndim == 1 and np.abs(audio).max() < 2
        assert abs(len(audio) - 16_000 * info.frames / info.samplerate) <= 1
