"""The paper's situation as a second toy: train on sounds alone, test on all areas, in other words and more noise.

The base model knows all three areas a little. Training asks about sounds alone, in one wording, about noisy clips. The
test asks about all areas, in two other wordings. The paper trains on AVQA and tests on MMAU.
"""

from pathlib import Path

import torch

from data import Question, load_questions, target_text
from model.checkpoints import load_policy
from policy import completion_logprobs, encode_prompts, encode_targets, sample_group, stop_token_ids
from training.settings import TOY_TOKENS
from training.toy_model import make_base, make_world

TRANSFER_STEPS = 120  # of each training
NOISE = 5.0  # factor on the background noise of the clips of training and test
TRAINED = "sound"  # the area that training asks about
BASE_STEPS, RANDOM_ANSWERS = 350, 0.3  # of the base model's warm start
BATCH = 50  # questions
SAMPLES = 8  # completions of a question for its KL divergence


def make_worlds(folder: Path) -> None:
    """Write the worlds that are missing.

    known: trains the base. trained and test: train and test the rows. clean: the test without extra noise.
    """
    test = dict(num_train=0, num_heldout=600, seed=2, wordings=(1, 2))
    make_world(folder / "known", num_train=1200, num_heldout=0, wordings=(0, 1, 2))
    # The questions of training are the held-out part of their world: only that part has more noise.
    make_world(folder / "trained", num_train=0, num_heldout=1200, seed=1, tasks=[TRAINED], heldout_noise=NOISE)
    make_world(folder / "test", heldout_noise=NOISE, **test)
    make_world(folder / "clean", **test)


def make_transfer(worlds: Path, base: Path, seed: int) -> None:
    """Write the worlds and the base model of a seed, if they are missing."""
    make_worlds(worlds)
    if not base.exists():
        make_base(load_questions(str(worlds / "known" / "train.jsonl")), base, seed, BASE_STEPS, RANDOM_ANSWERS)


@torch.no_grad()
def measure(checkpoint: str, base: str, questions: list[Question], template: str, seed: int) -> dict[str, list]:
    """Measure what greedy answers do not show, for each question.

    among_choices: the choice that the checkpoint finds most likely. kl: the KL divergence of the checkpoint from the
    base model in nats per completion, the mean of log pi(completion) - log pi_base(completion) over SAMPLES completions
    that the checkpoint samples. The mean over questions is an unbiased estimate. A question's own may be negative.
    """
    cpu = torch.device("cpu")
    (policy, processor), (base_model, _) = (load_policy(name, torch.float32, cpu) for name in (checkpoint, base))
    stop_ids, generator = stop_token_ids(policy, processor), torch.Generator().manual_seed(seed)
    found: dict[str, list] = {"among_choices": [""] * len(questions), "kl": [0.0] * len(questions)}
    for count in sorted({len(question.choices) for question in questions}):
        same = [i for i, question in enumerate(questions) if len(question.choices) == count]
        for start in range(0, len(same), BATCH):
            own = same[start : start + BATCH]
            batch = [questions[i] for i in own]
            prompt = encode_prompts(processor, batch, template)
            texts = [target_text(choice, template) for question in batch for choice in question.choices]
            logprobs, _ = completion_logprobs(policy, prompt, *encode_targets(processor, texts), temperature=1.0)
            best = logprobs.sum(dim=1).view(len(batch), count).argmax(dim=1)  # [B * choices, T] -> [B]

            completions, mask, logprobs = sample_group(policy, prompt, SAMPLES, TOY_TOKENS, 1.0, stop_ids, generator)
            base_logprobs, _ = completion_logprobs(base_model, prompt, completions, mask, temperature=1.0)
            kl = (logprobs - base_logprobs).sum(dim=1).view(len(batch), SAMPLES).mean(dim=1)  # [B * SAMPLES, T] -> [B]
            for i, question, choice, value in zip(own, batch, best.tolist(), kl.tolist()):
                found["among_choices"][i], found["kl"][i] = question.choices[choice], value
    return found
