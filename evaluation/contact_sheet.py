"""Draw a contact sheet: some questions of a file, each with its clip's waveform and log-mel spectrogram."""

import math
import textwrap
from collections import Counter
from pathlib import Path
from unicodedata import east_asian_width

import numpy as np
from transformers import WhisperFeatureExtractor
from transformers.audio_utils import hertz_to_mel

from data import Question
from infra.audio import SAMPLE_RATE, load_audio
from infra.errors import InputError
from infra.pictures import save_picture
from reward import as_choice

CLIPS, COLUMNS = 8, 4
LINE, LINES, CHOICES = 38, 3, 6  # at most: characters in a line, lines of a question, choices shown
LINE_HEIGHT = 0.19  # inches
RIGHT = "#1a7f37"  # color of the right answer


def pick(questions: list[Question], count: int, seed: int) -> list[Question]:
    """Pick `count` questions that differ as much as possible: in their text, then their answer, then their clip."""
    order = [questions[i] for i in np.random.default_rng(seed).permutation(len(questions))]
    asked, answered, heard, picked = Counter[str](), Counter[str | None](), Counter[str](), []
    for _ in range(min(count, len(order))):
        best = min(order, key=lambda q: (asked[q.question], answered[q.answer], heard[q.audio]))
        order.remove(best)
        picked.append(best)
        asked[best.question] += 1
        answered[best.answer] += 1
        heard[best.audio] += 1
    return sorted(picked, key=lambda q: (q.question, q.choices))


def log_mel(clip: np.ndarray, mel_bins: int) -> np.ndarray:
    """Compute the log-mel spectrogram that a model hears of a clip [samples]: [mel bins, frames of 10 ms]."""
    extractor = WhisperFeatureExtractor(feature_size=mel_bins, chunk_length=math.ceil(len(clip) / SAMPLE_RATE))
    features = extractor(clip, sampling_rate=SAMPLE_RATE, return_attention_mask=True, return_tensors="np")
    return features["input_features"][0][:, : int(features["attention_mask"].sum())]


def bin_of(hertz: np.ndarray, mel_bins: int) -> np.ndarray:
    """Return the mel bin, with a fraction, whose center is at a frequency.

    The centers are evenly spaced on the mel scale, from one step above 0 Hz to one step below half the sample rate.
    """
    return np.asarray(hertz_to_mel(hertz, "slaney") / hertz_to_mel(SAMPLE_RATE / 2, "slaney") * (mel_bins + 1) - 1)


def wrap(text: str, width: int, count: int) -> list[str]:
    """Break a text into at most `count` lines of `width` letters. A Chinese character is as wide as two letters."""
    # textwrap breaks lines at spaces, and Chinese has none. A \v after each wide character counts as one space.
    spaced = "".join(c + "\v" * (east_asian_width(c) in "WF") for c in " ".join(text.split()))
    lines = textwrap.wrap(spaced, width, max_lines=count, placeholder=" …", replace_whitespace=False)
    return [line.replace("\v", "") for line in lines]


def lines_of(question: Question) -> list[tuple[str, str, str]]:
    """Return the lines of text above a clip, each with color and weight. The right answer is always among them."""
    lines = [(line, "black", "bold") for line in wrap(question.question, LINE, LINES)]
    choices = question.choices[:CHOICES]
    answer = question.answer and as_choice(question.answer, question.choices)  # None if withheld
    if answer is not None and answer not in choices:  # MMAU's answer may be none of the choices
        choices = [*question.choices[: CHOICES - 1], answer]
    for choice in choices:
        shown = "".join(wrap(choice, LINE - 4, 1))
        right = choice == answer
        lines.append((f"{'✓' if right else '–'} {shown}", RIGHT if right else "dimgray", "bold" if right else "normal"))
    left_out = sum(choice not in choices for choice in question.choices)
    lines += [(f"   and {left_out} more", "dimgray", "normal")] * (left_out > 0)
    lines += [("   answer withheld", "dimgray", "normal")] * (question.answer is None)
    return lines


def draw_contact_sheet(path: Path, questions: list[Question], mel_bins: int, seconds: float) -> None:
    """Write a PNG picture of some questions to `path`. Clips are cut to `seconds`. Raises InputError."""
    from matplotlib.figure import Figure

    clips = [load_audio(question.audio)[: int(seconds * SAMPLE_RATE)] for question in questions]
    texts = [lines_of(question) for question in questions]
    rows, text_height = math.ceil(len(questions) / COLUMNS), LINE_HEIGHT * max(map(len, texts))
    figure = Figure(figsize=(4 * COLUMNS, rows * (text_height + 2.6)), layout="constrained")
    panels = figure.subfigures(rows, COLUMNS, squeeze=False, wspace=0.03, hspace=0.03).flat
    for panel, question, clip, lines in zip(panels, questions, clips, texts):
        words, wave, mel = panel.subplots(3, 1, height_ratios=(text_height, 0.7, 1.5))
        words.axis("off")
        length = len(clip) / SAMPLE_RATE
        for i, (line, color, weight) in enumerate(lines):
            height = 1 - (i + 0.5) * LINE_HEIGHT / text_height
            font = dict(color=color, weight=weight, fontsize=9.5, parse_math=False)
            text = words.text(0, height, line, transform=words.transAxes, va="center", **font)
            text.set_in_layout(False)  # else a long line narrows the spectrogram
        peak = float(np.abs(clip).max()) or 1.0
        wave.plot(np.arange(len(clip)) / SAMPLE_RATE, clip, color="tab:blue", linewidth=0.4)
        wave.set(xlim=(0, length), ylim=(-1.1 * peak, 1.1 * peak), xticks=[])
        wave.set_yticks([-peak, 0, peak], [f"{-peak:.2f}", "0", f"{peak:.2f}"])
        mel.imshow(log_mel(clip, mel_bins), origin="lower", aspect="auto", extent=(0, length, -0.5, mel_bins - 0.5))
        mel.set_xlabel(f"{Path(question.audio).name[-LINE:]}, {length:.2f} s", parse_math=False)
        mel.set_ylabel("kHz")
        hertz = np.array([500, 1000, 2000, 4000])
        mel.set_yticks(bin_of(hertz, mel_bins), [f"{f / 1000:g}" for f in hertz])
        for axis in (wave, mel):
            axis.tick_params(labelsize=7)
            axis.xaxis.label.set_fontsize(8)
            axis.yaxis.label.set_fontsize(8)
    try:
        save_picture(figure, path, dpi=110)
    except OSError as error:
        raise InputError(f"{path}: the picture cannot be written ({error}); name another file with --out") from None
