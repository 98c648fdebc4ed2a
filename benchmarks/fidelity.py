"""Compare results that should be equal up to rounding, with random weights. Each item yields names and values:

relative_errors     log-probs and gradients: bfloat16 on the GPU and on the CPU, against float32 on the CPU
sampler_gaps        log-probs of sampled tokens: the sampler's against those of the training pass
replayed_rollouts   sampled tokens: CUDA graphs against the plain loop
resumed_run         metrics of training steps: a resumed run against an undisturbed one
"""

import copy
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from benchmarks.evaluation import make_questions
from benchmarks.models import NO_STOP, TEMPERATURE, build_model, make_prompt, qwen2_audio_small
from data import Question, load_questions
from grpo_aqa import parse_args, train
from infra.audio import audio_package
from infra.errors import InputError
from infra.processes import setup_distributed
from model.decoding import GroupDecoder
from model.qwen2_audio import Prompt, slice_prompt
from policy import completion_logprobs, sample_group, to_device
from training import toy_model
from training.optimizer import trainable
from training.run import Run

CPU = torch.device("cpu")
ROLLOUTS = ((0, 2), (2, 4), (0, 4), (0, 1), (2, 4))  # prompts of each rollout: shorter and longer ones, more and fewer
STEPS, SAVED = 5, 3  # steps of the toy, and the step after which it is saved and resumed
QUESTION: dict[str, Any] = dict(question="Which sound is it?", choices=["a bell", "a dog"])


def bench_fidelity(tiny: bool, save: Callable[..., None]) -> None:
    """Measure all items on the GPU; if `tiny`, on the CPU with a smaller model and fewer tokens.

    A part of one_gpu. If an item fails, its error is saved in `errors`, and the next item follows.
    """
    device, config = torch.device("cuda"), qwen2_audio_small()
    clip_seconds, group_size, tokens = [3.0, 5.0, 8.0, 10.0], 8, 80
    if tiny:
        question = Question("0", "0.wav", **QUESTION, answer="a bell")
        device, config = CPU, toy_model.make_model([question], seconds=2, seed=0)[0].config
        clip_seconds, group_size, tokens = [0.4, 0.8, 1.2, 1.6], 4, 70
    exact = random_model(config)
    model, prompt = copy.deepcopy(exact).to(device, torch.bfloat16), random_prompt(exact, clip_seconds)
    on_device, sizes = to_device(prompt, device), dict(group_size=group_size, max_new_tokens=tokens)
    save(device=device.type, weights=sum(weight.numel() for weight in exact.parameters()), **sizes)

    items: dict[str, Callable[[], Iterator[tuple[str, Any]]]] = {
        "relative_errors": partial(relative_errors, exact, device, prompt, group_size, tokens // 2),
        "sampler_gaps": partial(sampler_gaps, model, on_device, **sizes),
        "replayed_rollouts": partial(replayed_rollouts, model, on_device, **sizes),
        "resumed_run": resumed_run,
    }
    errors = {}
    for item, measure in items.items():
        try:
            for name, value in measure():
                save(**{name: value})
        except Exception as error:  # of any kind: the figures of the other items are still wanted
            errors[item] = f"{type(error).__name__}: {error}"
            save(errors=errors)


# ---- model and prompts ----


def random_model(config):
    """Build a model in float32 on the CPU. Its attention and its distributions are far from uniform.

    Attention scores and logits have standard deviations of about 2.3 and 2.5. With sharper attention, the gradient in
    bfloat16 is mostly rounding.
    """
    torch.manual_seed(0)
    model, gains = build_model(config, torch.float32, CPU), {"q_proj": 1.5, "k_proj": 1.5, "lm_head": 2.5}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=gains.get(name.split(".")[-1], 1.0) * module.in_features**-0.5)
    return model


def random_prompt(model, clip_seconds: list[float]) -> Prompt:
    """Make prompts in the form of encode_prompts: random words and noise. Longer clips make longer prompts."""
    parts, generator = [make_prompt(model, 1, seconds) for seconds in clip_seconds], torch.Generator().manual_seed(0)

    def pad(name: str, side: str) -> Tensor:
        return pad_sequence([part[name][0] for part in parts], batch_first=True, padding_side=side)

    ids, mask, heard = pad("input_ids", "left"), pad("attention_mask", "left"), pad("feature_attention_mask", "right")
    words = torch.randint(model.config.audio_token_id, ids.shape, generator=generator)
    mel = torch.randn(len(ids), model.config.audio_config.num_mel_bins, heard.shape[1], generator=generator)
    return {
        "input_ids": torch.where(ids == model.config.audio_token_id, ids, words),
        "attention_mask": mask,
        "input_features": mel * heard[:, None],
        "feature_attention_mask": heard,
    }


def random_completions(model, rows: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Make completions of 1 to `tokens` random words. Returns completions and mask, [rows, tokens]."""
    generator = torch.Generator().manual_seed(0)
    completions = torch.randint(model.config.audio_token_id, (rows, tokens), generator=generator)
    lengths = torch.randint(1, tokens + 1, (rows, 1), generator=generator)
    lengths[0] = tokens
    return completions, torch.arange(tokens) < lengths


# ---- a GPU against the CPU ----


def logprobs_and_gradient(
    model, prompt: Prompt, completions: Tensor, mask: Tensor, checkpointing: bool
) -> tuple[Tensor, Tensor]:
    """Compute the log-probs of the completions' tokens, and the gradient of their sum.

    Returns two vectors in float32 on the CPU. The gradient has all parameters that learn, one after the other.
    """
    prompt, completions, mask = to_device(prompt, model.device), completions.to(model.device), mask.to(model.device)
    logprobs, _ = completion_logprobs(model, prompt, completions, mask, TEMPERATURE, checkpointing)
    gradients = torch.autograd.grad(logprobs.sum(), list(trainable(model).values()))
    return logprobs[mask].detach().cpu(), torch.cat([gradient.flatten().float().cpu() for gradient in gradients])


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference, divided by the norm of `expected`."""
    return ((found - expected).norm() / expected.norm()).item()


def relative_errors(
    exact, device: torch.device, prompt: Prompt, group_size: int, tokens: int
) -> Iterator[tuple[str, dict[str, float]]]:
    """Compute relative errors of log-probs and gradient against `exact`, a model in float32 on the CPU.

    The CPU's bfloat16 shows the error of the dtype alone; the GPU's should be no larger. Completions have
    1 to `tokens` random tokens.
    """
    completions = random_completions(exact, len(prompt["input_ids"]) * group_size, tokens)
    expected = logprobs_and_gradient(exact, prompt, *completions, False)
    for where, dtype in ((CPU, torch.bfloat16), (device, torch.bfloat16), (device, torch.float32)):
        model = copy.deepcopy(exact).to(where, dtype)
        for checkpointing in (False, True):
            found = logprobs_and_gradient(model, prompt, *completions, checkpointing)
            name = f"relative error, {str(dtype)[6:]} on {where.type}{', checkpointing' * checkpointing}"
            yield name, dict(zip(("logprobs", "gradient"), map(relative_error, found, expected)))


# ---- the sampler against the training pass, CUDA graphs against the plain loop ----


def make_decoders(model, prompt: Prompt, group_size: int, max_new_tokens: int) -> list[GroupDecoder]:
    """Make two decoders, without and with CUDA graphs. Both have memory for the whole prompt."""
    prompts, prompt_tokens = prompt["input_ids"].shape
    return [GroupDecoder(model, group_size, max_new_tokens, graph, prompts, prompt_tokens) for graph in (False, True)]


def draw(decoder: GroupDecoder, prompt: Prompt, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Sample completions of full length, with the same random numbers in each call. Returns sample_group's results."""
    generator = torch.Generator(decoder.model.device).manual_seed(0)
    sizes = decoder.group_size, decoder.max_new_tokens
    return sample_group(decoder.model, prompt, *sizes, temperature, NO_STOP, generator, decoder)


def sampler_gaps(model, prompt: Prompt, group_size: int, max_new_tokens: int) -> Iterator[tuple[str, dict[str, float]]]:
    """Compare the sampler's log-probs of its tokens with those of the training pass. Differences are in nats."""
    decoders = make_decoders(model, prompt, group_size, max_new_tokens)
    for name, decoder in zip(("plain loop", "CUDA graphs"), decoders):
        completions, mask, sampled = draw(decoder, prompt, TEMPERATURE)
        with torch.no_grad():
            trained, _ = completion_logprobs(model, prompt, completions, mask, TEMPERATURE)
        difference = (sampled - trained)[mask].abs()
        yield f"sampler gap, {name}", {"mean": difference.mean().item(), "max": difference.max().item()}


def count_differing(decoders: list[GroupDecoder], prompt: Prompt, temperature: float) -> int:
    """Count the completions that differ between two decoders."""
    plain, replayed = (draw(decoder, prompt, temperature)[0] for decoder in decoders)
    return int((plain != replayed).any(dim=1).sum())


def replayed_rollouts(
    model, prompt: Prompt, group_size: int, max_new_tokens: int
) -> Iterator[tuple[str, dict[str, int]]]:
    """Sample the rollouts of ROLLOUTS with and without CUDA graphs, and count the completions that differ."""
    decoders = make_decoders(model, prompt, group_size, max_new_tokens)
    for number, (start, stop) in enumerate(ROLLOUTS, start=1):
        part = slice_prompt(prompt, start, stop)
        name = f"rollout {number}, {stop - start} prompts of {part['input_ids'].shape[1]} tokens, differing"
        greedy, sampled = (count_differing(decoders, part, temperature) for temperature in (0.0, TEMPERATURE))
        yield name, {"greedy": greedy, "sampled": sampled}


# ---- a resumed run ----


@contextmanager
def only_rank():
    """Inside `with`, be the only rank of a run: with NCCL on a GPU, with gloo without one. Yields the device."""
    device = setup_distributed()[-1]
    try:
        yield device
    finally:
        dist.destroy_process_group()


class StoppedRun(Run):
    """A run that ends after it has saved step SAVED, as it would after SIGTERM."""

    def save_if_due(self) -> None:
        super().save_if_due()
        self.stopping |= self.step == SAVED


def resumed_run() -> Iterator[tuple[str, Any]]:
    """Train a tiny model twice: undisturbed, and stopped after step SAVED and resumed. Yields the later steps' metrics.

    Both runs are in this process and in a temporary folder. Without soundfile or soxr, yields the reason instead.
    """
    try:
        audio_package("soundfile"), audio_package("soxr")
    except InputError as error:
        yield "resumed run", f"left out: {error}"
        return
    torch.set_num_threads(1)  # on such small tensors more threads are slower
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        clips = [question.audio for question in make_questions(folder, 4, [0.4, 1.0])]
        records = [QUESTION | {"audio": clip, "answer": QUESTION["choices"][i % 2]} for i, clip in enumerate(clips)]
        (folder / "questions.json").write_text(json.dumps(records), encoding="utf-8")
        questions = load_questions(str(folder / "questions.json"))
        toy_model.make_base(questions, folder / "base", steps=45, random_answers=1.0)  # then some rewards differ
        undisturbed = train_toy(folder, "undisturbed", Run)
        yield "undisturbed run", undisturbed
        train_toy(folder, "resumed", StoppedRun)
        resumed = train_toy(folder, "resumed", Run, "--resume")
        yield "resumed run", resumed
        yield "resumed run is equal", resumed == undisturbed


def train_toy(folder: Path, name: str, kind: type[Run], *switches: str) -> list[dict]:
    """Train folder/base on folder/questions.json. Return the metrics of the steps after SAVED, without times."""
    flags = f"--model {folder}/base --data {folder}/questions.json --out {folder / name} --steps {STEPS} --lr 1e-4"
    args = parse_args([*flags.split(), f"--save_every={SAVED}", "--max_new_tokens=8", *switches])
    with only_rank() as device:
        train(args, kind(args, "GRPO", device))
    steps = map(json.loads, (folder / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[SAVED:])
    return [{key: step[key] for key in step if "second" not in key and key != "peak_memory_gb"} for step in steps]
