"""Clips: resampling, channels, file formats, odd and bad clips, real recordings."""

import io
import sys

import numpy as np
import pytest
import soundfile
from test_layers import FLOOR, ROOT

import data
from data import load_questions
from infra.audio import audio_seconds, load_audio
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


def encoded(samples, rate, subtype, format, **settings) -> bytes:
    """Return the bytes of an audio file."""
    file = io.BytesIO()
    soundfile.write(file, samples, rate, subtype, format=format, **settings)
    return file.getvalue()


def heard(path, content: bytes) -> tuple[float, float]:
    """Write a clip. Return its length in seconds, the same by header and by samples, and its loudest tone in Hz."""
    path.write_bytes(content)
    audio = load_audio(str(path))
    assert audio_seconds(str(path)) == pytest.approx(len(audio) / 16_000, abs=2e-4)
    return len(audio) / 16_000, np.argmax(np.abs(np.fft.rfft(audio))) * 16_000 / len(audio)


def fault(path, content: bytes) -> str:
    """Write a bad clip. Return its message, which must be the same for the check and for the decoder."""
    path.write_bytes(content)
    messages = []
    for function in (audio_seconds, load_audio):
        with pytest.raises(InputError) as error:
            function(str(path))
        messages.append(str(error.value).replace(str(path.parent), ""))
    assert messages[0] == messages[1] and "\n" not in messages[0]
    return messages[0]


def written(path):
    """Yield (format, subtype, bytes of one second of 500 Hz at 8 kHz) of all that this libsndfile writes."""
    for format in soundfile.available_formats():
        for subtype in soundfile.available_subtypes(format):
            if format != "RAW":
                try:
                    soundfile.write(path, tone(500, 8_000, 0.5), 8_000, subtype, format=format)
                except soundfile.LibsndfileError:
                    continue  # MP3 of layers I and II, for example
                yield format, subtype, path.read_bytes()


def test_all_that_soundfile_writes_is_read(tmp_path):
    """Some of the codecs cannot seek. Blocks may add some samples at the end, and one format has a rate of its own."""
    subtypes = set()
    for format, subtype, content in written(tmp_path / "a"):
        subtypes.add(subtype)
        rate = soundfile.info(tmp_path / "a").samplerate
        seconds, frequency = heard(tmp_path / "a", content)
        assert seconds == pytest.approx(8_000 / rate, abs=0.06), (format, subtype)
        assert frequency == pytest.approx(500 * rate / 8_000, abs=1.5), (format, subtype)
    assert subtypes > {"GSM610", "G721_32", "IMA_ADPCM", "MS_ADPCM", "DWVW_16"}


CUT = {"WAV", "WAVEX", "AIFF", "AU", "W64", "RF64", "SVX", "FLAC", "OGG", "MP3"}  # formats whose end is known


def test_files_that_were_cut_off(tmp_path):
    for format, subtype, content in written(tmp_path / "a"):
        if format in CUT:
            assert "was cut off" in fault(tmp_path / "a", content[: len(content) * 6 // 10]), (format, subtype)


def test_flac_of_unknown_length(tmp_path):
    """As from a pipe: the encoder could not go back to write the number of samples."""
    for samples, rate in ((tone(500, 16_000), 16_000), (np.ones(1_801_000) / 2, 1_000)):
        content = bytearray(encoded(samples, rate, "PCM_16", "FLAC"))
        content[21:26] = bytes([content[21] & 0xF0, 0, 0, 0, 0])
        if rate == 16_000:
            assert heard(tmp_path / "a.flac", content) == (1, 500)
            assert "was cut off or is damaged" in fault(tmp_path / "a.flac", content[:-500])
        else:
            assert "lasts over 1800 s" in fault(tmp_path / "a.flac", content)


WAV = encoded(tone(500, 16_000), 16_000, "PCM_16", "WAV")
HEADER, SAMPLES = WAV[:40], WAV[44:]  # the number of bytes stands between them


@pytest.mark.parametrize("size", [0, 32_008, 32_036, 32_044, 0x7F000000, 0x7FFFF000, 2**31, 2**32 - 1])
def test_wav_with_a_wrong_size(tmp_path, size):
    """Programs leave the size at 0, count the header too, or write a huge size because they do not know it."""
    assert heard(tmp_path / "a.wav", HEADER + size.to_bytes(4, "little") + SAMPLES) == (1, 500)


def test_other_oddities(tmp_path):
    odd = (31_999).to_bytes(4, "little") + SAMPLES[:-1]  # and no pad byte
    assert heard(tmp_path / "a.wav", HEADER + odd)[0] == pytest.approx(1, abs=1e-4)
    comment = b"LIST" + (2_000).to_bytes(4, "little") + b"INFO" + 1_996 * b"x"
    assert "has 0 ms" in fault(tmp_path / "a.wav", HEADER + bytes(4) + comment)
    aiff = bytearray(encoded(tone(500, 16_000), 16_000, "PCM_16", "AIFF"))
    place = aiff.find(b"SSND") + 4
    aiff[place : place + 4] = (len(aiff) + 8).to_bytes(4)
    assert heard(tmp_path / "a.aiff", aiff) == (1, 500)
    flac = encoded(tone(500, 16_000), 16_000, "PCM_16", "FLAC")
    assert heard(tmp_path / "a.flac", flac + b"TAG" + bytes(125)) == (1, 500)


def test_headerless_files_announce_no_length(tmp_path):
    soundfile.write(tmp_path / "a.au", tone(500, 8_000), 8_000, "ULAW", format="RAW")
    assert len(load_audio(str(tmp_path / "a.au"))) == pytest.approx(16_000, abs=50)


def test_sound_in_the_second_channel_only(tmp_path):
    path = tmp_path / "a b.wav"
    soundfile.write(path, np.stack([np.zeros(16_000), tone(500, 16_000)], axis=1), 16_000)
    with pytest.raises(InputError) as error:
        load_audio(str(path))
    command = f"ffmpeg -i '{path}' -ar 16000 -ac 1 '{tmp_path / 'a b_16k.wav'}'"
    assert "its first channel" in str(error.value) and "is silent" in str(error.value) and command in str(error.value)


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
