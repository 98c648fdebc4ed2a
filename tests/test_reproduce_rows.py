"""What each row of the table is called with."""

from pathlib import Path

import pytest

import grpo_aqa
import reproduce
import reproduce_rows
import sft_aqa

NAMES = [row.name for row in reproduce_rows.ROWS]


def test_each_row_gets_its_flags():
    """What tells the rows apart, of the toy and of the real model."""
    for flags in ([], ["--model", "m", "--data", "d", "--mmau", "e", "--nproc_per_node", "8"]):
        args = reproduce.parse_args(flags)
        trained = [row for _, row in reproduce.jobs(args) if row.script]
        commands = {row.name: reproduce_rows.training_command(args, 0, row) for row in trained}
        assert list(commands) == NAMES[3:]
        told = {name: dict(zip(command, command[1:])) for name, command in commands.items()}
        assert {name: own["--template"] for name, own in told.items()} == {
            "sft_full": "answer", "sft_lora": "answer", "grpo_direct": "direct", "grpo_answer": "answer",
            "grpo_think": "think", "grpo_lora": "answer",
        }  # fmt: skip
        assert {name for name, own in told.items() if own.get("--lora_rank") == "8"} == {"sft_lora", "grpo_lora"}
        scripts = [next(Path(word).name for word in command if word.endswith(".py")) for command in commands.values()]
        assert scripts == ["sft_aqa.py"] * 2 + ["grpo_aqa.py"] * 4
        assert all(command[1:3] == ["-m", "torch.distributed.run"] for command in commands.values())
        if args.toy:
            assert float(told["grpo_lora"]["--lr"]) == pytest.approx(0.003)
            assert float(told["sft_lora"]["--lr"]) == pytest.approx(0.01)
            assert all(own["--prompts_per_rank"] == "8" and own["--steps"] == "360" for own in told.values())
        else:
            full, lora = (
                grpo_aqa.parse_args(commands[name][commands[name].index("--model") :])
                for name in ("grpo_answer", "grpo_lora")
            )
            assert full.lr == 1e-6 and full.steps == 1000  # the script's, the paper's
            assert lora.lr == pytest.approx(1e-5)


def test_toy_rows_have_the_scripts_own_settings():
    args = reproduce.parse_args([])
    rows = {row.name: row for row in reproduce_rows.ROWS}
    for name, script in (("grpo_answer", grpo_aqa), ("sft_full", sft_aqa)):
        flags = reproduce_rows.training_flags(args, 0, rows[name])
        own = {key: value for key, value in script.TOY.items() if key != "out"}
        assert {key: flags[key] for key in own} == own
        assert reproduce_rows.evaluation_flags(args, rows[name])["dtype"] == own["dtype"]
