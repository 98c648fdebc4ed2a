"""The rows of the table: their flags, and which of them are finished."""

import json
from pathlib import Path

import pytest

import grpo_aqa
import reproduce
import sft_aqa
from paper import rows
from paper.commands import training_command

BY_NAME = {row.name: row for row in rows.ROWS}


def test_each_row_gets_its_flags():
    """What tells the rows apart, for the toy and for the real model."""
    for flags in ([], ["--model", "m", "--data", "d", "--mmau", "e", "--nproc_per_node", "8"]):
        args = reproduce.parse_args(flags)
        commands = {job.row.name: training_command(job) for job in rows.jobs(args) if job.row.script}
        assert list(commands) == [row.name for row in rows.table_rows(args)[3:]]
        rate = commands.pop("sft_at_grpo_rate", None)
        assert (rate is None) == args.toy and (args.toy or rate[rate.index("--lr") + 1] == "1e-06")
        told = {name: dict(zip(command, command[1:])) for name, command in commands.items()}
        assert {name: own["--template"] for name, own in told.items()} == {
            "sft_full": "answer", "sft_lora": "answer", "grpo_direct": "direct", "grpo_answer": "answer",
            "grpo_think": "think", "grpo_lora": "answer",
        }  # fmt: skip
        assert {name for name, own in told.items() if own.get("--lora_rank") == "8"} == {"sft_lora", "grpo_lora"}
        scripts = [next(Path(word) for word in command if word.endswith(".py")) for command in commands.values()]
        assert [script.name for script in scripts] == ["sft_aqa.py"] * 2 + ["grpo_aqa.py"] * 4
        assert all(script.exists() for script in scripts)
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
            assert full.lr == 1e-6 and full.steps == 1000  # the script's own, the paper's
            assert lora.lr == pytest.approx(1e-5)


def test_variants_have_flags_that_the_script_takes():
    args = reproduce.parse_args(["--variants", "--out", "v"])
    assert args.rows == [row.name for row in rows.VARIANT_ROWS] and args.steps == 360
    for job in rows.jobs(args):
        command = training_command(job)
        parsed = vars(grpo_aqa.parse_args(command[command.index("--model") :]))
        ours = dict(job.row.flags) | {"heldout": "v/validation/heldout.json", "heldout_every": 10, "lr": 3e-4}
        if "normalize_std" in ours:
            ours["normalize_std"] = False  # parsed from "off"
        assert {name: parsed[name] for name in ours} == ours


def test_toy_rows_have_the_scripts_own_settings():
    args = reproduce.parse_args([])
    for name, script in (("grpo_answer", grpo_aqa), ("sft_full", sft_aqa)):
        job = rows.Job(args, 0, BY_NAME[name])
        # A row is scored after it has trained, not meanwhile.
        own = {key: value for key, value in script.TOY_DEFAULTS.items() if key not in ("out", "heldout_every")}
        flags = job.training_flags()
        assert {key: flags[key] for key in own} == own
        assert job.evaluation_flags()["dtype"] == own["dtype"]


def test_a_job_knows_how_far_it_is(tmp_path):
    """Not begun, trained, finished; then with changed predictions, and with other settings."""
    args = reproduce.parse_args(["--out", str(tmp_path), "--rows", "untouched_think"])
    job = rows.Job(args, 2, BY_NAME["sft_full"])

    def state():
        return job.has_same_settings(), job.is_trained(), job.is_finished()

    assert state() == (False, False, False)
    job.checkpoint.mkdir(parents=True)
    job.record.write_text(json.dumps({"settings": job.settings()}))
    assert state() == (True, True, False)
    job.predictions.write_text("[]")
    done = {"settings": job.settings(), "predictions_sha256": rows.sha256(job.predictions)}
    job.record.write_text(json.dumps(done))
    assert state() == (True, True, True)
    assert rows.finished_jobs(args) == [job]  # neither --rows nor --seeds asks for it
    job.predictions.write_text("[ ]")
    assert state() == (True, True, False) and not rows.finished_jobs(args)
    args.steps = 7
    assert state() == (False, False, False)
