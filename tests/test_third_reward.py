"""A reward that is added to REWARDS is chosen, weighed, recorded, drawn, shown and explained under its name."""

import json

import pytest
from forked import ROOT

import explain
import grpo_aqa
from reward import REWARDS

CODE = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
sys.argv[0] = "SCRIPT.py"
import matplotlib.figure, reward
reward.REWARDS["brevity"] = lambda completion, question, template: 1 / (1 + len(completion))
savefig = matplotlib.figure.Figure.savefig
matplotlib.figure.Figure.savefig = lambda figure, path, **options: (
    print("titles:", [axis.get_title() for axis in figure.axes]), savefig(figure, path, **options))
import grpo_aqa, explain
status = START
sys.exit(status)
"""
TRAIN = 'grpo_aqa.run_training(grpo_aqa.parse_args(), "grpo_aqa.py", "GRPO", grpo_aqa.train)'
FLAGS = ["--model=base", "--data=questions.jsonl", "--steps=2", "--prompts_per_rank=2", "--max_new_tokens=8",
         "--log_completions_every=1", "--reward_weights=format=1,brevity=0.5", "--out=third"]  # fmt: skip


def test_it_is_seen_everywhere(runs, forker):
    done = forker.run(runs, ["grpo_aqa.py", *FLAGS], CODE.replace("START", TRAIN).replace("SCRIPT", "grpo_aqa"))
    assert done.returncode == 0, done.stderr
    assert "brevity=" in done.stderr and "accuracy=" not in done.stderr  # the progress bar
    assert "'brevity reward'" in done.stdout and "'sampled training accuracy'" not in done.stdout
    lines = [json.loads(line) for line in (runs / "third" / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        assert line["reward"] == pytest.approx(line["format"] + 0.5 * line["brevity"], rel=1e-5)
        assert line["brevity"] > 0 and "accuracy" not in line
    for line in map(json.loads, (runs / "third" / "completions.jsonl").read_text().splitlines()):
        brevity = [1 / (1 + len(completion)) for completion in line["completions"]]
        assert line["brevity"] == pytest.approx(brevity)
        assert line["rewards"] == pytest.approx([f + 0.5 * b for f, b in zip(line["format"], brevity)])
    start = "explain.explain(explain.parse_args())"
    done = forker.run(runs, ["explain.py", *FLAGS], CODE.replace("START", start).replace("SCRIPT", "explain"))
    assert done.returncode == 0, done.stderr
    assert "reward    = format + 0.5 * brevity" in done.stdout
    heading = next(line for line in done.stdout.splitlines() if "completion" in line and "advantage" in line)
    assert heading.split() == ["completion", "tokens", "format", "brevity", "reward", "advantage"]


@pytest.mark.parametrize(
    "given, message",
    [
        ("accuracy=1,fromat=1", "unknown reward 'fromat'; choose from accuracy, format"),
        ("", "unknown reward ''; choose from accuracy, format"),
        ("accuracy=1,accuracy=2", "names the reward 'accuracy' twice"),
        ("accuracy", "'accuracy' needs a number, as in accuracy=1"),
        ("accuracy=one", "'accuracy=one' needs a number"),
        ("accuracy=nan", "'accuracy=nan' needs a number"),
        ("accuracy=inf", "'accuracy=inf' needs a number"),
    ],
)
def test_weights_that_make_no_sense_are_refused(capsys, given, message):
    for parse_args in (grpo_aqa.parse_args, explain.parse_args):
        with pytest.raises(SystemExit):
            parse_args([f"--reward_weights={given}"])
        said = capsys.readouterr().err
        assert message in said and "--reward_weights" in said and said.count("\n") == 1


def test_weights_are_numbers_by_name():
    assert grpo_aqa.parse_args([]).reward_weights == {"accuracy": 1.0, "format": 1.0}
    assert grpo_aqa.parse_args(["--reward_weights", "format=0.5,accuracy=-2"]).reward_weights == {
        "format": 0.5, "accuracy": -2.0}  # fmt: skip


def test_names_of_rewards_are_no_other_metrics_or_fields(runs):
    """A reward of such a name would overwrite the other value."""
    metrics = json.loads((runs / "reference" / "metrics.jsonl").read_text().splitlines()[0])
    fields = json.loads((runs / "reference" / "completions.jsonl").read_text().splitlines()[0])
    assert {"accuracy", "format"} <= metrics.keys() & fields.keys()
    others = {"step", "lr", "loss", "kl", "clip_fraction", "entropy", "reward", "reward_std", "completion_tokens",
              "equal_reward_groups", "replaced_groups", "sampling_rounds", "all_right_groups", "all_wrong_groups",
              "truncated_completions", "tokens_per_second", "sampler_gap", "grad_norm", "peak_memory_gb"}  # fmt: skip
    assert {name for name in metrics if not name.startswith("seconds")} == others | set(REWARDS)
    others |= {"id", "audio", "prompt", "answer", "completions", "rewards", "advantages", "replaced_questions"}
    assert fields.keys() <= others | set(REWARDS) and not others & set(REWARDS)
