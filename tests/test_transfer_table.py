"""The table of reproduce.py --transfer, from files written here, against counting by hand."""

import json
import random
import statistics

import pytest

import reproduce
from paper import rows, transfer_table

TASKS = ("sound", "music", "speech")


def finish(job):
    """Write random results of a finished job. Returns the values of each column, counted by hand."""
    draw, columns = random.Random(str(job)), {name: [] for name in transfer_table.COLUMNS}
    records, clean, measured = [], [], {"among_choices": [], "kl": []}
    for i in range(90):
        right, among, cleanly, kl = (draw.random() < share for share in (0.6, 0.7, 0.9, 0.5))
        task = TASKS[i % 3]
        record = {"id": str(i), "audio_id": "a.wav", "question": f"What is {i}?", "choices": ["dog", "cat", "cow"],
                  "answer": "dog", "task": task}  # fmt: skip
        records.append(record | {"model_prediction": "dog" if right else "rain"})
        clean.append(record | {"model_prediction": "dog" if cleanly else "cat"})
        measured["among_choices"].append("dog" if among else "cow")
        measured["kl"].append(0.25 + kl)
        for name, value in (("average", right), ("clean", cleanly), ("kl", 0.25 + kl)):
            columns[name].append(value)
        columns["trained" if task == "sound" else "others"].append(right)
        columns["among_choices"] += [] if task == "sound" else [among]
    job.folder.mkdir(parents=True)
    for path, found in ((job.predictions, records), (job.clean, clean), (job.measured, measured)):
        path.write_text(json.dumps(found))
    return columns


def test_figures_against_counting_by_hand(tmp_path):
    args = reproduce.parse_args(["--transfer", "--seeds", "2", "--out", str(tmp_path)])
    jobs = rows.jobs(args)
    values = {(job.row.name, job.seed): finish(job) for job in jobs}
    text = transfer_table.write_transfer(args, jobs, picture=True)
    assert (tmp_path / "table.md").read_text() == text and (tmp_path / "table.png").stat().st_size > 10_000
    found = json.loads((tmp_path / "results.json").read_text())
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    shown = {line[0]: line[1:] for line in lines}
    for row in found["rows"]:
        assert bool(row["columns"]) == ("lora" not in row["row"])  # not asked for
        for column, own in row["columns"].items():
            factor = 1 if column == "kl" else 100
            means = [factor * statistics.mean(values[row["row"], seed][column]) for seed in range(2)]
            assert list(own["seeds"].values()) == pytest.approx(means)
            assert own["mean"] == pytest.approx(statistics.mean(means))
            assert own["deviation"] == pytest.approx(statistics.stdev(means))
            assert own["low"] < own["mean"] < own["high"]
    own = next(row for row in found["rows"] if row["row"] == "grpo_beta_0")["columns"]
    cells = shown["GRPO, beta 0, 3e-4"]
    assert cells[0].startswith(f"{own['trained']['mean']:.1f} ± {own['trained']['deviation']:.1f} [")
    assert cells[-1].startswith(f"{own['kl']['mean']:.2f} ± {own['kl']['deviation']:.2f} [")
    assert "base" in shown and "SFT, LoRA, 3e-3" not in shown and "Not finished" not in text

    equal = found["pairs"][0]
    assert [equal["a"], equal["b"]] == ["grpo_1e-4", "sft_1e-4"] and len(found["pairs"]) == 5
    for seed in range(2):
        a, b = (values[name, seed]["others"] for name in ("grpo_1e-4", "sft_1e-4"))
        assert equal["seeds"][str(seed)]["only_a"] == sum(x > y for x, y in zip(a, b))
        assert equal["seeds"][str(seed)]["only_b"] == sum(x < y for x, y in zip(a, b))
    a, b = ([x for seed in range(2) for x in values[name, seed]["others"]] for name in ("grpo_1e-4", "sft_1e-4"))
    assert equal["difference"] == pytest.approx(100 * (statistics.mean(a) - statistics.mean(b)))


def test_unfinished_rows_are_named(tmp_path):
    args = reproduce.parse_args(["--transfer", "--out", str(tmp_path), "--rows", "untouched,sft_1e-3,sft_lora"])
    text = transfer_table.write_transfer(args, [], picture=True)
    assert "Not finished: untouched of seed 0, sft_1e-3 of seed 0, sft_lora of seed 0." in text
    assert not (tmp_path / "table.png").exists()
    done = rows.jobs(args)[:2]
    for job in done:
        finish(job)
    text = transfer_table.write_transfer(args, done, picture=True)
    assert "Not finished: sft_lora of seed 0." in text and "±" not in text and (tmp_path / "table.png").exists()
