"""Fixtures that tests share: a tiny random Qwen2-Audio, questions about clips, an evaluation, a training run."""

import numpy as np
import pytest
import soundfile
import torch
import torch.distributed as dist
from eval_runs import arguments, evaluate, make_home
from forked import Forker
from training_runs import make_runs

from data import Question
from infra import processes
from training import toy_model

torch.set_num_threads(1)  # on such small tensors two threads are slower: they wait for each other


@pytest.fixture(scope="session")
def questions(tmp_path_factory) -> list[Question]:
    """Four questions of different text lengths, about clips of 0.4, 1.0, 1.31 and 2.0 s."""
    folder = tmp_path_factory.mktemp("clips")
    rng = np.random.default_rng(0)
    made = []
    for i, seconds in enumerate((0.4, 1.0, 1.31, 2.0)):
        path = folder / f"{i}.wav"
        soundfile.write(path, 0.3 * rng.normal(size=int(16_000 * seconds)).clip(-3, 3), 16_000)
        text = "What is it?" if i % 2 else "Which of these sounds, if any at all, is in the audio?"
        made.append(Question(str(i), str(path), text, ["rain", "a bell", "wind"][: 2 + i % 2], "rain"))
    return made


@pytest.fixture(scope="session")
def tiny(questions):
    """Return (model, processor). The weights are random, in float64: two ways of computing agree to many digits."""
    model, processor = toy_model.make_model(questions, seconds=2, seed=0)
    return model.double(), processor


@pytest.fixture(scope="session")
def config(tiny):
    """The tiny model's configuration."""
    return tiny[0].config


@pytest.fixture
def exact(monkeypatch):
    """Compute all in float64, even if the code asks for float32 (RMSNorm, log-softmax): rounding hides no mistake."""
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


@pytest.fixture
def one_rank(monkeypatch):
    """Make this process the only rank of a process group."""
    monkeypatch.setattr(processes, "_patient_group", None)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def forker():
    """A Forker. It runs commands without importing torch for each of them."""
    with Forker() as forker:
        yield forker


@pytest.fixture(scope="session")
def mmau(tmp_path_factory):
    """A folder with `model/` (random weights) and `mmau.json` (20 questions about clips of 0.3 to 2 s)."""
    folder = tmp_path_factory.mktemp("mmau")
    make_home(folder)
    return folder


@pytest.fixture(scope="session")
def clean(mmau):
    """The predictions file of an undisturbed evaluation."""
    assert evaluate(*arguments(mmau, mmau / "clean.json")) == 0
    assert not list(mmau.glob("clean*partial*"))
    return mmau / "clean.json"


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """A folder with `base/`, `questions.jsonl` and a complete training run on 2 ranks in `reference/`."""
    folder = tmp_path_factory.mktemp("runs")
    make_runs(folder)
    return folder
