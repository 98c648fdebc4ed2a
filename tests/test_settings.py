"""Settings of training: the toy's and the paper's defaults, and flags that contradict each other."""

import pytest

import grpo_aqa
import sft_aqa
from training.settings import TOY_PROMPTS

REAL = ["--model", "some/Model", "--data", "x.json"]
SCRIPTS = [(grpo_aqa.parse_args, "runs/toy", 1e-6), (sft_aqa.parse_args, "runs/toy_sft", 1e-5)]


@pytest.mark.parametrize("ranks, prompts", [(None, 16), (2, 8), (8, 2), (64, 1)])
@pytest.mark.parametrize("parse_args, out, _", SCRIPTS)
def test_without_a_model_the_toy_shares_its_questions_over_the_ranks(monkeypatch, parse_args, out, _, ranks, prompts):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if ranks:
        monkeypatch.setenv("WORLD_SIZE", str(ranks))
    args = parse_args([])
    assert (args.model, args.out, args.prompts_per_rank) == ("runs/toy/base", out, prompts)
    assert (args.steps, args.accumulation_steps, args.max_new_tokens, args.dtype) == (360, 1, 32, "float32")
    assert TOY_PROMPTS % (ranks or 1) == 0 or prompts == 1
    assert parse_args(["--steps", "7", "--lr", "0.5"]).lr == 0.5


@pytest.mark.parametrize("parse_args, _, lr", SCRIPTS)
def test_with_a_model_the_defaults_are_the_papers(parse_args, _, lr):
    args = parse_args(REAL)
    assert (args.lr, args.steps, args.prompts_per_rank, args.accumulation_steps) == (lr, 1000, 2, 1)
    assert args.out.startswith("runs/Model") and args.max_new_tokens == 256 and args.save_every == 100


@pytest.mark.parametrize(
    "place, model, name",
    [("", "base/", "base"), ("base", ".", "base"), ("base/inner", "..", "base"), ("", "latest", "latest")],
)
def test_a_model_folder_names_its_run(tmp_path, monkeypatch, place, model, name):
    (tmp_path / "base" / "inner").mkdir(parents=True)
    (tmp_path / "latest").symlink_to("base")
    monkeypatch.chdir(tmp_path / place)
    assert grpo_aqa.parse_args(["--model", model, "--data", "x.json"]).out == f"runs/{name}"


def test_states_are_saved_as_often_as_checkpoints_unless_told():
    assert sft_aqa.parse_args([*REAL, "--save_every", "7"]).save_state_every == 7
    args = grpo_aqa.parse_args(["--save_every", "7", "--save_state_every", "50"])
    assert (args.save_every, args.save_state_every) == (7, 50)


def test_on_and_off_are_booleans():
    args = grpo_aqa.parse_args([])
    assert (args.normalize_std, args.cuda_graph, args.gradient_checkpointing) == (True, True, None)
    args = grpo_aqa.parse_args(["--normalize_std", "off", "--cuda_graph", "off", "--gradient_checkpointing", "on"])
    assert (args.normalize_std, args.cuda_graph, args.gradient_checkpointing) == (False, False, True)


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--lora_dropout", "0.1"], "--lora_dropout needs --lora_rank"),
        (["--lora_rank", "-1"], "--lora_rank must be at least 0"),
        (["--lora_rank", "8", "--lora_alpha", "0"], "--lora_alpha must be above 0"),
        (["--lora_rank", "8", "--lora_dropout", "1"], "--lora_dropout must be below 1, not 1.0"),
        (["--save_state_every", "0"], "--save_state_every must be at least 1, not 0"),
        (
            ["--prompts_per_rank", "3", "--accumulation_steps", "2"],
            "--prompts_per_rank must be a multiple of --accumulation_steps",
        ),
        (["--cuda_graph", "maybe"], "argument --cuda_graph: must be on or off, not 'maybe'"),
    ],
)
@pytest.mark.parametrize("parse_args", [sft_aqa.parse_args, grpo_aqa.parse_args])
def test_settings_that_contradict_are_refused(parse_args, flags, said, capsys):
    with pytest.raises(SystemExit):
        parse_args([*REAL, *flags])
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("parse_args, _, lr", SCRIPTS)
def test_lora_takes_ten_times_the_learning_rate_unless_told(parse_args, _, lr):
    assert parse_args([*REAL, "--lora_rank", "8"]).lr == pytest.approx(10 * lr)
    assert parse_args([*REAL, "--lora_rank", "8", "--lr", str(lr)]).lr == lr
