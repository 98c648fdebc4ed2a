"""What a training run needs around its algorithm: processes, phase times, averages, memory, held-out scores."""

import os
import resource
import time
from contextlib import contextmanager

import torch
import torch.distributed as dist

from data import Question
from policy import answer_greedily
from reward import format_reward, mmau_match, prediction


def setup_distributed() -> tuple[int, int, torch.device]:
    """Join the processes that torchrun started, or be a single one. Returns rank, number of processes and device."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    store = None if "RANK" in os.environ else dist.HashStore()  # without torchrun there is nobody to meet
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=world_size)
    return rank, world_size, device


class Clock:
    """Wall-clock seconds of a step and of its phases: `with clock("sample"): ...` adds to that phase."""

    def __init__(self, device: torch.device):
        self.device, self.started = device, time.perf_counter()
        self.phases = dict.fromkeys(("data", "sample", "reference", "train", "update"), 0.0)

    @contextmanager
    def __call__(self, phase: str):
        started = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # what the phase left running on the GPU belongs to it
        self.phases[phase] += time.perf_counter() - started

    def total(self) -> float:
        return time.perf_counter() - self.started


def mean_over_ranks(values: dict[str, float], device: torch.device) -> dict[str, float]:
    """The mean of each value over all ranks."""
    means = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
    dist.all_reduce(means)
    return dict(zip(values, (means / dist.get_world_size()).tolist()))


def peak_memory_gb(device: torch.device) -> float:
    """The most memory this process has held so far, in 1e9 bytes: on the GPU or, without one, as resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def score_greedily(
    model, processor, questions: list[Question], template: str, max_new_tokens: int
) -> tuple[float, float] | None:
    """Greedy accuracy by MMAU's rule and share of well-formed completions, the questions shared over the ranks."""
    if not questions:
        return None
    correct = well_formed = 0.0
    mine = questions[dist.get_rank() :: dist.get_world_size()]
    for i in range(0, len(mine), 32):
        batch = mine[i : i + 32]
        completions = answer_greedily(model, processor, batch, template, max_new_tokens)
        for question, completion in zip(batch, completions):
            correct += mmau_match(question.answer, prediction(completion), question.choices)
            well_formed += format_reward(completion, template)
    totals = torch.tensor([correct, well_formed], dtype=torch.float64, device=model.device)
    dist.all_reduce(totals)
    return tuple((totals / len(questions)).tolist())


def heldout_table(questions: list[Question], scores: dict[str, tuple[float, float]]) -> str:
    """Accuracy and format of named scores of score_greedily, with what guessing would score, as aligned lines."""
    guessing = sum(1 / len(question.choices) for question in questions) / len(questions)
    lines = [f"{len(questions)} held-out questions, greedy   accuracy   format", f"  {'guessing':<30}  {guessing:.3f}"]
    lines += [f"  {name:<30}  {accuracy:.3f}      {format_:.3f}" for name, (accuracy, format_) in scores.items()]
    return "\n".join(lines)
