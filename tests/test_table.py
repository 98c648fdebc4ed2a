"""The paper's table, from predictions written here, against counting by hand."""

import json
import math
import statistics

import pytest

import reproduce
from paper import rows, table

TASKS = ("sound", "music", "speech")
METHODS = {"untouched": 3, "sft": 5, "grpo": 8}  # how many of ten questions a row of the method has right


def expected(name, seed):
    """Which of forty questions a row has right."""
    return [(i * 7 + seed) % 10 < METHODS[name.split("_")[0]] for i in range(40)]


def finish(job, **changes):
    """Write the predictions of a finished job. changes: a key's value for all questions."""
    records = [
        {"id": str(i), "audio_id": "a.wav", "question": f"What is {i}?", "choices": ["dog", "cat", "cow"],
         "answer": "dog", "task": TASKS[i % 3], "model_prediction": "dog" if right else "nothing of these"} | changes
        for i, right in enumerate(expected(job.row.name, job.seed))
    ]  # fmt: skip
    job.folder.mkdir(parents=True)
    job.predictions.write_text(json.dumps(records))


def cells(text):
    """The cells of each line of a Markdown table, by the line's first cell."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    return {line[0]: line[1:] for line in lines}


@pytest.fixture
def real(tmp_path):
    """Arguments of a table of the real model with two seeds."""
    flags = ["--model", "m", "--data", "d", "--mmau", "e", "--seeds", "2", "--out", str(tmp_path)]
    return reproduce.parse_args(flags)


def test_figures_against_counting_by_hand(tmp_path):
    args = reproduce.parse_args(["--seeds", "2", "--out", str(tmp_path)])
    jobs = rows.jobs(args)
    for job in jobs:
        finish(job)
    text = table.write_table(args, jobs, picture=True)
    assert (tmp_path / "table.md").read_text() == text
    found, shown = json.loads((tmp_path / "results.json").read_text()), cells(text)
    assert [row["row"] for row in found["rows"]] == [row.name for row in rows.table_rows(args)]
    assert all(row["paper"] is None for row in found["rows"])
    for row in found["rows"]:
        for seed in range(2):
            own, right = row["seeds"][str(seed)], expected(row["row"], seed)
            assert own["average"]["right"] == sum(right) and own["average"]["accuracy"] == 2.5 * sum(right)
            for t, task in enumerate(TASKS):
                assert own[task]["right"] == sum(right[t::3]) and own[task]["questions"] == len(right[t::3])
                share = own[task]["accuracy"] / 100  # from both ends of a Wilson interval, 1.96 standard errors away
                for end in (own[task]["low"] / 100, own[task]["high"] / 100):
                    assert abs(share - end) == pytest.approx(1.96 * math.sqrt(end * (1 - end) / len(right[t::3])), 1e-3)
        music = [100 * sum(part) / len(part) for part in (expected(row["row"], seed)[1::3] for seed in range(2))]
        assert shown[row["title"]][2] == f"{statistics.mean(music):.2f} ± {statistics.stdev(music):.2f}"
    (pair,) = found["pairs"]
    both = {seed: list(zip(expected("grpo_answer", seed), expected("sft_full", seed))) for seed in range(2)}
    for seed, pairs in both.items():
        test, only = pair["seeds"][str(seed)], (pairs.count((True, False)), pairs.count((False, True)))
        assert (test["only_a"], test["only_b"]) == only
        tail = sum(math.comb(sum(only), k) for k in range(min(only) + 1)) / 2 ** sum(only)
        assert test["p"] == pytest.approx(min(1, 2 * tail))
    differences = [a - b for pairs in both.values() for a, b in pairs]
    assert pair["difference"] == pytest.approx(100 * statistics.mean(differences))
    assert pair["low"] < pair["difference"] < pair["high"]
    assert f"GRPO, answer minus SFT, full: {pair['difference']:+.2f} points" in text
    assert "seed 1: only GRPO, answer right: " in text and "GRPO, answer is better" in text
    assert "last checkpoint" in text and "Not finished" not in text and "paper" not in text
    assert shown["guessing"][4] == "33.33" and [shown[title][0] for title in ("SFT, LoRA", "GRPO, think")] == [
        "1e-2", "3e-4"
    ]  # fmt: skip
    assert (tmp_path / "table.png").stat().st_size > 10_000


def test_paper_columns_stand_beside_the_real_model(real):
    """The paper's figures of rows that the paper has, and empty cells of the others."""
    jobs = rows.jobs(real)
    for job in jobs:
        finish(job)
    text = table.write_table(real, jobs, picture=False)
    shown = {title: line[5:] for title, line in cells(text).items()}
    assert cells(text)["SFT, full, GRPO's rate"][0] == cells(text)["GRPO, answer"][0] == "1e-6"
    assert "GRPO, answer minus SFT, full, GRPO's rate: " in text
    assert shown["SFT, full"] == ["60.96", "49.19", "45.35", "51.80"]
    assert shown["SFT, LoRA"] == ["58.26", "58.08", "52.58", "56.40"]
    assert shown["untouched, direct"] == ["54.95", "50.98", "42.04", "49.20"]
    assert shown["GRPO, answer"] == ["69.37", "66.77", "57.36", "64.50"]
    assert shown["GRPO, think"] == ["66.67", "62.87", "53.75", "61.10"]
    for title in ("SFT, full, GRPO's rate", "untouched, answer", "untouched, think", "GRPO, direct"):
        assert shown[title] == ["", "", "", ""]
    assert "±" in text and "[" in text.split("untouched, think")[1].splitlines()[0]  # one seed: an interval


def test_questions_that_the_rule_cannot_tell_apart_have_a_second_figure(real):
    """The other figures stay MMAU's. Guessing is the share of choices that the rule calls right."""
    real.rows = ["untouched_answer", "sft_full"]
    jobs = rows.jobs(real, seeds=1)
    for job in jobs:
        finish(job, choices=["C", "C#"], answer="C#", model_prediction="C#" if job.row.script else "C")
    text = table.write_table(real, jobs, picture=False)
    lines = [line for line in text.splitlines() if line.startswith("- MMAU's") or line.startswith("- accuracy")]
    assert lines[0].startswith("- MMAU's rule cannot tell the choices of 40 questions apart: 0, 1, 2, ")
    assert lines[1].replace("\\", "").endswith("these: untouched_answer of seed 0 0.00%, sft_full of seed 0 100.00%")
    shown = cells(text)
    assert shown["untouched, answer"][4].startswith("100.00 ") and shown["guessing"][4] == "100.00"


def test_unfinished_rows_are_named(real, tmp_path):
    """Also those of a seed that only an earlier call asked for. No finished row: no picture and no figures."""
    text = table.write_table(real, [], picture=True)
    assert not (tmp_path / "table.png").exists() and cells(text)["SFT, full"][1:5] == ["-"] * 4
    real.rows, real.seeds = ["sft_full", "grpo_answer"], 1
    finished = [job for job in rows.jobs(real, seeds=3) if job.seed != 1]
    for job in finished:
        finish(job)
    text = table.write_table(real, finished, picture=False)
    assert (
        "Not finished: sft_full of seed 1, grpo_answer of seed 1." in text
        and "Mean ± standard deviation over 2 seeds" in text
    )
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["seeds"] == 2 and list(found["pairs"][0]["seeds"]) == ["0", "2"]
