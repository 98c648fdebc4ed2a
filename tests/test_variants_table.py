"""The table of reproduce.py --variants, from files written here, against counting by hand."""

import json
import math
import random
import statistics

import pytest

import reproduce
from infra.errors import InputError
from paper import rows, variants_table

REACHED = {  # row -> the step at which each seed reaches 0.90, of 35 steps
    "paper": [30, 30, 20], "beta_0": [20, 10, 20], "dr_grpo": [10, None, 35], "dapo_loss": [35, 35, 35]
}  # fmt: skip


def finish(job):
    """Write random results of a finished job. Returns the seconds of each step, the curve, and the right answers."""
    draw, reached = random.Random(str(job)), REACHED[job.row.name][job.seed]
    seconds = [draw.uniform(0.1, 0.9) for _ in range(35)]
    records, curve = [], []
    for step in range(1, 36):
        records.append({"step": step, "seconds": seconds[step - 1], "equal_reward_groups": draw.random()})
        if step in (10, 20, 30, 35):
            # Exactly 0.9 at first; a later fall does not count.
            accuracy = 0.9 if step == reached else draw.uniform(0.5, 0.89)
            records[-1] |= {"heldout_accuracy": accuracy, "seconds_heldout": 100.0}
            curve.append([step, pytest.approx(sum(seconds[:step]), abs=0.051), pytest.approx(accuracy, abs=1e-4)])
    job.run_folder.mkdir(parents=True)
    (job.run_folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    right = [draw.random() < 0.8 for _ in range(60)]
    questions = [
        {"id": str(i), "audio_id": "a.wav", "question": f"What is {i}?", "choices": ["dog", "cat"], "answer": "dog",
         "model_prediction": "dog" if right[i] else "cat"}
        for i in range(60)
    ]  # fmt: skip
    job.predictions.write_text(json.dumps(questions))
    equal = statistics.mean(record["equal_reward_groups"] for record in records if record["step"] > 23)
    return {"seconds": seconds, "curve": curve, "right": right, "equal": equal}


def test_figures_against_counting_by_hand(tmp_path):
    """Three seeds of four rows. Seed 1 of Dr. GRPO never reaches 0.90, so the row has no mean."""
    args = reproduce.parse_args(["--variants", "--seeds", "3", "--out", str(tmp_path), "--rows", ",".join(REACHED)])
    jobs = rows.jobs(args)
    made = {(job.row.name, job.seed): finish(job) for job in jobs}
    text = variants_table.write_variants(args, jobs, picture=True)
    assert (tmp_path / "table.md").read_text() == text and (tmp_path / "table.png").stat().st_size > 10_000
    found = json.loads((tmp_path / "results.json").read_text())
    shown = {cells[1].strip(): [cell.strip() for cell in cells[2:-1]]
             for line in text.splitlines() if len(cells := line.split("|")) > 5}  # fmt: skip

    until = {  # seconds of training until 0.90
        (name, seed): None if step is None else sum(made[name, seed]["seconds"][:step])
        for name, steps in REACHED.items() for seed, step in enumerate(steps)
    }  # fmt: skip
    for row in found["rows"]:
        if row["row"] not in REACHED:
            assert not row["columns"] and not row["curves"] and row["title"] not in shown
            continue
        own, columns = [made[row["row"], seed] for seed in range(3)], row["columns"]
        assert row["curves"] == {str(seed): own[seed]["curve"] for seed in range(3)}
        assert list(columns["steps"]["seeds"].values()) == REACHED[row["row"]]
        seconds = [until[row["row"], seed] for seed in range(3)]
        assert list(columns["seconds"]["seeds"].values()) == pytest.approx(seconds)
        every = [second for one in own for second in one["seconds"]]
        assert columns["seconds_per_step"]["mean"] == pytest.approx(sum(every) / 105)
        assert columns["equal"]["mean"] == pytest.approx(100 * statistics.mean(one["equal"] for one in own))
        accuracies = [100 * statistics.mean(one["right"]) for one in own]
        assert columns["accuracy"]["mean"] == pytest.approx(statistics.mean(accuracies))
        assert columns["accuracy"]["deviation"] == pytest.approx(statistics.stdev(accuracies))
        if row["row"] == "dr_grpo":
            assert columns["steps"]["mean"] is columns["seconds"]["mean"] is columns["time"]["mean"] is None
            continue
        assert columns["steps"]["mean"] == pytest.approx(statistics.mean(REACHED[row["row"]]))
        assert columns["seconds"]["mean"] == pytest.approx(statistics.mean(seconds))
        assert columns["seconds"]["deviation"] == pytest.approx(statistics.stdev(seconds))
        ratios = [second / until["paper", seed] for seed, second in enumerate(seconds)]
        assert columns["time"]["mean"] == pytest.approx(math.prod(ratios) ** (1 / 3))

    assert shown["Dr. GRPO"][:2] == ["--normalize_std off --loss_average constant --beta 0", "2 of 3 seeds (10, -, 35)"]
    assert shown["beta 0"][1] == "17 ± 6 (20, 10, 20)" and shown["DAPO's loss"][1] == "35 ± 0 (35, 35, 35)"
    assert shown["the paper's settings"][3] == "1.00 ± 0.00 (1.00, 1.00, 1.00)"
    expected = [("beta_0", "paper"), ("dr_grpo", "beta_0"), ("dapo_loss", "beta_0")]
    assert [(pair["a"], pair["b"]) for pair in found["pairs"]] == expected
    a, b = ([x for seed in range(3) for x in made[name, seed]["right"]] for name in ("beta_0", "paper"))
    assert found["pairs"][0]["difference"] == pytest.approx(100 * (sum(a) - sum(b)) / 180)
    assert "- beta 0 minus the paper's settings: " in text and "Not finished" not in text


def test_unfinished_rows(tmp_path):
    """Without the paper's settings there is no ratio. A single seed has no brackets. Missing scores are an error."""
    args = reproduce.parse_args(["--variants", "--out", str(tmp_path), "--rows", "paper,beta_0"])
    text = variants_table.write_variants(args, [], picture=True)
    assert "Not finished: paper of seed 0, beta_0 of seed 0." in text and not (tmp_path / "table.png").exists()
    job = rows.jobs(args)[1]
    finish(job)
    text = variants_table.write_variants(args, [job], picture=False)
    assert "Not finished: paper of seed 0." in text and "±" not in text and "compared" not in text
    (line,) = [line for line in text.splitlines() if line.startswith("| beta 0 ")]
    cells = [cell.strip() for cell in line.split("|")]
    assert cells[3] == "20" and cells[5] == "-"
    metrics = job.run_folder / "metrics.jsonl"
    metrics.unlink()
    with pytest.raises(InputError, match="metrics.jsonl: no record has a heldout_accuracy; remove .*beta_0 and start"):
        variants_table.write_variants(args, [job], picture=False)
