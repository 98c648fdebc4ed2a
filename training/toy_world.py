"""The toy's sounds and questions: synthesized clips as audio files, questions in the formats of real data sets.

Clips last 1 to 2 s. They are WAV and FLAC files of 16 and 44.1 kHz, mono and stereo, with more or less background
noise. Training questions are in the R1-AQA format. Held-out questions are about other clips, in MMAU's format.
"""

import json
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from infra.audio import audio_package

# ---- sounds: functions (random generator, seconds, sample rate) -> [samples], roughly within +-1 ----


def _time(seconds, rate):
    return np.arange(int(seconds * rate)) / rate


def _tone(frequency, rate, amplitudes=(0.6,)):
    """Make a tone. frequency: in Hz for each sample, [samples]; amplitudes: of its harmonics."""
    phase = 2 * np.pi * np.cumsum(frequency) / rate
    audible = [(k, a) for k, a in enumerate(amplitudes, start=1) if a and k * np.max(frequency) < 7500]
    return sum(a * np.sin(k * phase) for k, a in audible)


def _strokes(seconds, rate, gap, decay):
    """Make an envelope that restarts every `gap` seconds and falls to 1/e in `decay` seconds."""
    return np.exp(-(_time(seconds, rate) % gap) / decay)


def rain(rng, seconds, rate):
    return rng.normal(0, 0.3, int(seconds * rate))


def clock(rng, seconds, rate):
    return rng.normal(0, 0.8, int(seconds * rate)) * _strokes(seconds, rate, rng.uniform(0.2, 0.33), 0.008)


def siren(rng, seconds, rate):
    swing = np.sin(2 * np.pi * rng.uniform(1.5, 3) * _time(seconds, rate) + rng.uniform(0, 6))
    return _tone(900 + 400 * swing, rate, (0.6, 0.2))


def engine(rng, seconds, rate):
    wobble = 5 * np.sin(2 * np.pi * 3 * _time(seconds, rate))
    return _tone(rng.uniform(60, 100) + wobble, rate, 0.5 / np.arange(1, 16))


def whistle(rng, seconds, rate):
    return _tone(rng.uniform(1800, 2600) + 40 * np.sin(2 * np.pi * 6 * _time(seconds, rate)), rate)


def bird(rng, seconds, rate):
    gap = rng.uniform(0.15, 0.25)
    sweep = _time(seconds, rate) % gap / gap
    return _tone(3000 + 2500 * sweep, rate) * np.sin(np.pi * np.minimum(1.6 * sweep, 1))


def instrument(name):
    def play(rng, seconds, rate):
        pitch = rng.uniform(250, 500) * np.ones(int(seconds * rate))
        if name == "flute":
            return _tone(pitch, rate, (0.6, 0.1)) + rng.normal(0, 0.02, len(pitch))
        if name == "violin":
            return _tone(pitch + 6 * np.sin(2 * np.pi * 6 * _time(seconds, rate)), rate, 0.5 / np.arange(1, 13))
        if name == "guitar":
            return _tone(pitch, rate, 0.8 / np.arange(1, 7)) * _strokes(seconds, rate, 0.4, 0.1)
        return _tone(pitch, rate, (0.4, 0, 0, 0.3, 0, 0, 0, 0.3))  # organ: octaves

    return play


def melody(move):
    def play(rng, seconds, rate):
        semitones = {"rises": 1, "falls": -1, "stays the same": 0}[move] * rng.uniform(3, 5) * np.arange(4)
        pitches = rng.uniform(500, 900) * 2 ** (semitones / 12)
        note = (_time(seconds, rate) / seconds * 4).astype(int)
        return _tone(pitches[note], rate, (0.5, 0.2)) * _strokes(seconds, rate, seconds / 4, 0.2)

    return play


def voice(vowel=None, speaker=None):
    """Make a held vowel: harmonics of the speaker's pitch, shaped by two formants. Arguments left out are random."""

    def speak(rng, seconds, rate):
        low, high, tract = SPEAKERS[speaker or rng.choice(list(SPEAKERS))]
        pitch = rng.uniform(low, high)
        harmonics = pitch * np.arange(1, int(4000 / pitch))
        formants = tract * np.array(FORMANTS[vowel or rng.choice(list(FORMANTS))])
        shape = sum(1 / (1 + ((harmonics - formant) / 120) ** 2) for formant in formants)
        return _tone(pitch + 3 * np.sin(2 * np.pi * 4 * _time(seconds, rate)), rate, 0.4 * shape)

    return speak


# lowest and highest pitch in Hz; height of the formants, relative to FORMANTS
SPEAKERS = {"a man": (75, 95, 0.9), "a woman": (210, 250, 1.2), "a child": (400, 480, 1.6)}
FORMANTS = {"ah": (750, 1200), "ee": (300, 2400), "oo": (320, 800), "eh": (550, 1850)}  # Hz

# ---- questions ----

# task, sub-category, three wordings of the question, and the sound of each possible answer
KINDS = [
    ("sound", "Sound Source",
     ("What makes the sound in the video?", "Which of these is heard in the video?", "What can you hear in the video?"),
     {make.__name__: make for make in (rain, clock, siren, engine, whistle, bird)}),
    ("music", "Instrument",
     ("Which instrument plays in the video?", "What is played in the video?", "Name the instrument."),
     {name: instrument(name) for name in ("flute", "violin", "guitar", "organ")}),
    ("music", "Melody",
     ("How does the melody in the video move?", "What does the pitch in the video do?", "Where does the tune go?"),
     {move: melody(move) for move in ("rises", "falls", "stays the same")}),
    ("speech", "Vowel",
     ("Which vowel does the voice in the video hold?", "What does the voice in the video say?", "Name the vowel."),
     {vowel: voice(vowel=vowel) for vowel in FORMANTS}),
    ("speech", "Speaker",
     ("Who speaks in the video?", "Whose voice is in the video?", "Name the speaker."),
     {speaker: voice(speaker=speaker) for speaker in SPEAKERS}),
]  # fmt: skip
NOISE = {"easy": 0.003, "medium": 0.01, "hard": 0.03}  # background noise, relative to full scale


def write_world(
    folder: Path,
    num_train: int = 1200,
    num_heldout: int = 600,
    seed: int = 0,
    heldout_noise: float = 1.0,
    label_noise: float = 0.0,
    tasks: Collection[str] = ("sound", "music", "speech"),
    wordings: Sequence[int] = (0,),
) -> None:
    """Write audio/, train.jsonl (R1-AQA lines) and heldout.json (MMAU's format) into `folder`.

    Two settings make the task harder. `heldout_noise` multiplies the background noise of the held-out clips, which
    moves them away from the training clips. `label_noise` is the share of training questions with a wrong answer.
    `wordings`: which of the three wordings of each question in KINDS are used, in turn. These three settings change
    nothing else, not even a random draw. `tasks`, the areas that are asked about, changes the draws.
    """
    soundfile, rng = audio_package("soundfile"), np.random.default_rng(seed)
    (folder / "audio").mkdir(parents=True)
    every_answer = [(kind, answer) for kind in KINDS if kind[0] in tasks for answer in kind[-1]]
    train, heldout = [], []
    for i in range(num_train + num_heldout):
        (task, sub_category, texts, sounds), answer = every_answer[i % len(every_answer)]
        text = texts[wordings[i // len(every_answer) % len(wordings)]]
        others = rng.permutation([option for option in sounds if option != answer])[:3]
        choices = [str(option) for option in rng.permutation([answer, *others])]
        difficulty = str(rng.choice(list(NOISE)))
        audio = f"audio/{i:05d}.{rng.choice(['wav', 'flac'])}"
        rate = int(rng.choice([16_000, 44_100]))
        clip = sounds[answer](rng, rng.uniform(1, 2), rate)
        clip = rng.uniform(0.3, 0.9) * clip / np.abs(clip).max()
        channels = [clip] if rng.random() < 0.5 else [clip, 0.5 * clip]
        noise = NOISE[difficulty] * (1 if i < num_train else heldout_noise)
        noisy = np.stack([c + rng.normal(0, noise, len(c)) for c in channels], axis=1)
        soundfile.write(folder / audio, noisy.clip(-1, 1), rate)

        if i < num_train:
            train.append({
                "id": i, "video_name": Path(audio).stem, "video_id": i, "question_text": text, "multi_choice": choices,
                "answer": choices.index(answer), "question_relation": "Sound", "question_type": text.split()[0],
                "dataset_name": "AVQA", "audio_path": audio,
            })  # fmt: skip
        else:
            heldout.append({
                "id": str(i), "audio_id": f"./{audio}", "question": text.replace("video", "audio"),
                "choices": choices, "answer": answer, "dataset": "toy", "task": task, "split": "held-out",
                "category": "Information Extraction", "sub-category": sub_category, "difficulty": difficulty,
            })  # fmt: skip
    train = with_label_noise(train, label_noise, seed)
    (folder / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in train), encoding="utf-8")
    (folder / "heldout.json").write_text(json.dumps(heldout, indent=1), encoding="utf-8")


def with_label_noise(records: list[dict], share: float, seed: int) -> list[dict]:
    """Return R1-AQA records with wrong answers in round(share * len(records)) of them, drawn by `seed`.

    Each wrong choice is equally likely. Does not change `records`.
    """
    rng = np.random.default_rng(seed)
    changed = [dict(record) for record in records]
    for i in rng.choice(len(records), round(share * len(records)), replace=False):
        wrong = [k for k in range(len(records[i]["multi_choice"])) if k != records[i]["answer"]]
        changed[i]["answer"] = int(rng.choice(wrong))
    return changed
