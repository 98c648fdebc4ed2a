"""The paper's table from one command, with stubs in place of the scripts; a slow test runs the scripts themselves.

The stubs do what reproduce.py relies on: step folders, resume state, saving at SIGTERM, predictions.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import soundfile
from forked import another_owner

import reproduce
from paper import commands, estimate, rows
from training import toy_model

ROOT = Path(__file__).resolve().parents[1]
TASKS = ("sound", "music", "speech")

# The first lines of each stub: parse the flags into a dictionary and add a line to calls.jsonl.
HEAD = """
import json, os, signal, sys, time
from pathlib import Path
here, script = Path(__file__).parent, Path(__file__).name
words, flags = sys.argv[1:], {}
for i, word in enumerate(words):
    if word.startswith("--"):
        flags[word[2:]] = words[i + 1] if i + 1 < len(words) and not words[i + 1].startswith("--") else True
with open(here / "calls.jsonl", "a") as file:
    file.write(json.dumps({"script": script, "threads": os.environ.get("OMP_NUM_THREADS"),
                           "session": os.getsid(0), **flags}) + "\\n")
"""
TRAIN = """
if (here / f"fail_{Path(flags['out']).parent.name}").exists():
    sys.exit("out of memory")
if (here / f"stop_{Path(flags['out']).parent.name}").exists():
    sys.exit(0)
out, steps, ended = Path(flags["out"]), int(flags["steps"]), []
signal.signal(signal.SIGTERM, lambda *_: ended.append(True))
states = sorted((out / "resume").glob("step_*"))
first = int(states[-1].name[5:]) + 1 if states else 1
for step in range(first, steps + 1):
    (out / "resume").mkdir(parents=True, exist_ok=True)
    with open(out / "metrics.jsonl", "a") as file:
        record = {"step": step, "seconds": 2.0 if script == "sft_aqa.py" else 4.0, "equal_reward_groups": step / 4}
        if "heldout" in flags and step >= 2:
            assert flags["heldout_every"] == "10" and Path(flags["heldout"]).exists()
            record["heldout_accuracy"] = step * 3 / 10
        file.write(json.dumps(record) + "\\n")
    print(f"step {step}", flush=True)
    while (here / "wait").exists() and step == 2 and not ended:
        time.sleep(0.01)
    if ended:
        time.sleep(0.3)  # saving takes its time
    if ended or step == steps:
        (out / "resume" / f"step_{step:06d}").mkdir()
    if ended:
        print("saved")
        sys.exit(0)
(out / f"step_{steps:06d}").mkdir()
"""
# The name of the row and the seed decide which questions are right. The rate decides it for validation questions.
EVALUATE = """
name, seed = Path(flags["out"]).parts[-2], int(Path(flags["out"]).parts[-3][5:])
assert Path(flags["ckpt"]).is_dir()
records = json.loads(Path(flags["data"]).read_text())
limit = {"untouched": 3, "sft": 5, "grpo": 8}.get(name.split("_")[0], 7)
if Path(flags["out"]).stem == "validation":
    limit = {"sft_full_x3": 6, "grpo_answer_x0.33": 9}.get(name, 5)
for i, record in enumerate(records):
    right = (i * 7 + seed) % 10 < limit
    record["model_prediction"] = record["answer"] if right else "nothing of these"
Path(flags["out"]).write_text(json.dumps(records))
"""


@pytest.fixture(autouse=True)
def ctrl_c():
    """Let Ctrl-C interrupt, as in a terminal: shells start background commands with Ctrl-C ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def stubs(tmp_path, monkeypatch):
    """A folder with scripts that take milliseconds, in place of the real scripts."""
    folder = tmp_path / "stubs"
    folder.mkdir()
    (folder / "grpo_aqa.py").write_text(HEAD + TRAIN)
    (folder / "sft_aqa.py").write_text(HEAD + TRAIN)
    (folder / "eval_mmau.py").write_text(HEAD + EVALUATE)
    monkeypatch.setattr(commands, "ROOT", folder)
    monkeypatch.setattr(toy_model, "make_world", make_world)
    monkeypatch.setattr(toy_model, "make_base", lambda questions, out, seed: out.mkdir(parents=True))
    monkeypatch.setattr(reproduce, "make_transfer", make_transfer)
    monkeypatch.setattr(reproduce, "measure", measure)
    monkeypatch.chdir(tmp_path)
    return folder


def make_transfer(worlds, base, seed):
    """Make what transfer.make_transfer makes, small."""
    for name in ("known", "trained", "test", "clean"):
        make_world(worlds / name)
    base.mkdir(parents=True, exist_ok=True)


def measure(checkpoint, base, questions, template, seed):
    """Return figures like those of transfer.measure."""
    assert Path(checkpoint).is_dir() and Path(base).is_dir() and template == "answer"
    return {"among_choices": ["dog"] * len(questions), "kl": [float(seed)] * len(questions)}


def make_world(folder, **noise):
    """Write forty questions, and the noise settings to noise.json."""
    if not folder.exists():
        folder.mkdir(parents=True)
        (folder / "noise.json").write_text(json.dumps(noise))
        records = [
            {"id": str(i), "audio_id": "a.wav", "question": f"What is {i}?", "choices": ["dog", "cat", "cow"],
             "answer": "dog", "task": TASKS[i % 3]}
            for i in range(40)
        ]  # fmt: skip
        soundfile.write(folder / "a.wav", [0.1, -0.1] * 8_000, 16_000)
        (folder / "heldout.json").write_text(json.dumps(records))
        (folder / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def right(name, seed):
    """Count the questions that EVALUATE gets right."""
    limit = {"untouched": 3, "sft": 5, "grpo": 8}[name.split("_")[0]]
    return sum((i * 7 + seed) % 10 < limit for i in range(40))


def command_line(monkeypatch, *flags):
    """Run reproduce.py with these flags in this process. Return its exit status."""
    monkeypatch.setattr(sys, "argv", ["reproduce.py", "--nproc_per_node", "1", "--steps", "3", *map(str, flags)])
    before = [(ending, signal.getsignal(ending)) for ending in reproduce.ENDINGS]
    try:
        return reproduce.main()
    finally:
        for ending, handler in before:
            signal.signal(ending, handler)


def calls(stubs):
    path = stubs / "calls.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# ---- the table ----


def test_every_row_is_run_and_shown(stubs, tmp_path, monkeypatch, capfd):
    """Two seeds of all rows: what is called and written. The same command again calls nothing."""
    flags = ("--seeds", 2, "--out", "t", "--label_noise", 0.25, "--heldout_noise", 2)
    assert command_line(monkeypatch, *flags) == 0
    out, made = tmp_path / "t", calls(stubs)
    assert json.loads((out / "world" / "noise.json").read_text()) == {"heldout_noise": 2.0, "label_noise": 0.25}
    assert len(made) == 2 * (9 + 6) and all(call["threads"] == "1" for call in made)
    assert all(call["session"] != os.getsid(0) for call in made)  # Ctrl-C in a terminal does not reach them
    trained = [call for call in made if "steps" in call]
    assert all(call["resume"] is True and call["keep_last"] == "1" and call["steps"] == "3" for call in trained)
    assert {(call["model"], call["seed"]) for call in trained} == {(f"t/seed_{s}/base", str(s)) for s in range(2)}
    assert all(int(call["prompts_per_rank"]) == 16 for call in trained)

    found = json.loads((out / "results.json").read_text())
    assert len(found["rows"]) == 9 and len(rows.ROWS) == 10
    for row in found["rows"]:
        assert [own["average"]["right"] for own in row["seeds"].values()] == [right(row["row"], s) for s in range(2)]
        kept = [path.name for path in (out / "seed_1" / row["row"] / "run").glob("*")]
        assert sorted(kept) == ([] if row["row"].startswith("untouched") else ["metrics.jsonl", "step_000003"])
    assert (out / "table.png").stat().st_size > 10_000

    table = (out / "table.md").read_text()
    assert command_line(monkeypatch, *flags) == 0
    assert len(calls(stubs)) == len(made) and (out / "table.md").read_text() == table
    printed = capfd.readouterr().out
    assert "18 of 18 rows are finished" in printed and table in printed and "$ " in printed


def test_fewer_seeds_keep_the_table(stubs, tmp_path, monkeypatch, capfd):
    """A call for fewer seeds still shows all finished seeds, and names missing rows."""
    rows = ("--out", "t", "--rows", "sft_full,grpo_answer")
    assert command_line(monkeypatch, *rows, "--seeds", 3) == 0
    results, table = ((tmp_path / "t" / name).read_text() for name in ("results.json", "table.md"))
    assert "Mean ± standard deviation over 3 seeds" in table and json.loads(results)["seeds"] == 3
    assert command_line(monkeypatch, *rows, "--seeds", 1) == 0
    assert [(tmp_path / "t" / name).read_text() for name in ("results.json", "table.md")] == [results, table]
    shutil.rmtree(tmp_path / "t" / "seed_1")
    assert command_line(monkeypatch, *rows, "--seeds", 1) == 0
    found = json.loads((tmp_path / "t" / "results.json").read_text())
    assert found["seeds"] == 2 and list(found["pairs"][0]["seeds"]) == ["0", "2"]
    assert "Not finished: sft_full of seed 1, grpo_answer of seed 1." in (tmp_path / "t" / "table.md").read_text()
    assert "t: table.md, table.png, results.json" in capfd.readouterr().out
    (stubs / "fail_sft_full").touch()
    assert command_line(monkeypatch, "--out", "empty", "--rows", "sft_full") == 1
    assert "empty: table.md, results.json" in capfd.readouterr().out and not Path("empty/table.png").exists()


def test_real_model_is_evaluated_untouched_once(stubs, tmp_path, monkeypatch, capfd):
    """The untouched model is the same for every seed. Full fine-tuning keeps the scripts' own learning rates."""
    make_world(tmp_path / "w")
    monkeypatch.setattr(reproduce, "check_model", lambda model: None)
    checked = []
    monkeypatch.setattr(
        reproduce, "check_texts", lambda model, questions, template, tokens, strict: checked.append((template, strict))
    )
    size = {False: estimate.Size(2000, 12000), True: estimate.Size(20, 120)}
    monkeypatch.setattr(estimate, "sizes", lambda model: size)
    (tmp_path / "m").mkdir()
    real = ("--model", "m", "--data", "w/train.jsonl", "--mmau", "w/heldout.json", "--out", "real", "--seeds", 2)
    assert command_line(monkeypatch, *real) == 0
    assert len(calls(stubs)) == 3 + 2 * 14
    assert {Path(c["out"]).parts[-2] for c in calls(stubs) if "lr" in c} == {"sft_at_grpo_rate"}
    assert "64.50" in (tmp_path / "real" / "table.md").read_text()  # the paper's figure
    assert sorted(checked) == [(name, strict) for name in ("answer", "direct", "think") for strict in (False, True)]
    (tmp_path / "m" / "model.safetensors").touch()
    assert command_line(monkeypatch, *real) == 1
    error = r"real: holds the rows of another table, model_digest [0-9a-f]{16} \(now [0-9a-f]{16}\); name"
    assert re.search(error, capfd.readouterr().err)
    settings = json.loads((tmp_path / "real" / "reproduce.json").read_text())
    del settings["model_digest"]  # as in older tables
    (tmp_path / "real" / "reproduce.json").write_text(json.dumps(settings))
    assert command_line(monkeypatch, *real) == 0


def test_the_rate_is_chosen_on_the_validation_questions(stubs, tmp_path, monkeypatch, capfd):
    """Seed 0 trains at three rates, the other seeds at the best of them. The test questions have no say."""
    flags = ("--out", "t", "--rows", "untouched_answer,sft_full,grpo_answer", "--seeds", 2)
    assert command_line(monkeypatch, *flags, "--seeds", 1) == 0
    shutil.rmtree("t/seed_0/sft_full/run")  # trained again; earlier predictions do not count
    assert "two more learning rates of each trained row (--tune_rates): unknown" in capfd.readouterr().out
    before = len(calls(stubs))
    assert command_line(monkeypatch, *flags, "--tune_rates") == 0
    made = calls(stubs)[before:]
    trained = [(Path(call["out"]).parent.name, call["seed"], float(call["lr"])) for call in made if "steps" in call]
    assert trained == [
        ("sft_full", "0", 1e-3),
        ("sft_full_x0.33", "0", pytest.approx(1e-3 / 3)), ("sft_full_x3", "0", pytest.approx(3e-3)),
        ("grpo_answer_x0.33", "0", pytest.approx(1e-4)), ("grpo_answer_x3", "0", pytest.approx(9e-4)),
        ("sft_full_x3", "1", pytest.approx(3e-3)), ("grpo_answer_x0.33", "1", pytest.approx(1e-4)),
    ]  # fmt: skip
    scored = [Path(call["out"]).relative_to("t") for call in made if "ckpt" in call]
    for row, again in (("sft_full", True), ("grpo_answer", False)):
        assert Path("seed_0", row, "validation.json") in scored
        assert (Path("seed_0", row, "predictions.json") in scored) == again
    assert json.loads((tmp_path / "t" / "validation" / "noise.json").read_text()) == {
        "num_train": 0, "seed": 1, "heldout_noise": 1.0
    }  # fmt: skip
    found, table = (tmp_path / "t" / "results.json").read_text(), (tmp_path / "t" / "table.md").read_text()
    chosen = {rate["row"]: rate["lr"] for rate in json.loads(found)["rates"] if rate["chosen"]}
    assert chosen == {"sft_full": pytest.approx(3e-3), "grpo_answer": pytest.approx(1e-4)}
    assert "**60.00 (3e-3)**" in table and "50.00 (1e-3)" in table and "**90.00 (1e-4)**" in table
    assert {row["row"]: row["lr"] for row in json.loads(found)["rows"] if row["seeds"] and row["lr"]} == chosen
    assert "sft_full_x3 of seed 0" not in table and "Not finished" not in table
    before = len(calls(stubs))
    assert command_line(monkeypatch, *flags, "--tune_rates") == 0 and len(calls(stubs)) == before
    shutil.rmtree(tmp_path / "t" / "seed_0" / "grpo_answer_x3")
    (stubs / "fail_grpo_answer_x3").touch()
    assert command_line(monkeypatch, *flags, "--tune_rates") == 1
    assert "Not finished: grpo_answer_x3 of seed 0." in (tmp_path / "t" / "table.md").read_text()
    before = len(calls(stubs))  # the rate of GRPO is open: no later seed is trained, and other rows stay in the table
    assert command_line(monkeypatch, "--out", "t", "--rows", "grpo_answer", "--seeds", 3, "--tune_rates") == 1
    assert [Path(call["out"]).parts[:3] for call in calls(stubs)[before:]] == [("t", "seed_0", "grpo_answer_x3")]
    rows_shown = {row["row"]: row["seeds"] for row in json.loads((tmp_path / "t" / "results.json").read_text())["rows"]}
    assert list(rows_shown["sft_full"]) == ["0", "1"]
    capfd.readouterr()
    assert command_line(monkeypatch, *flags, "--dry_run") == 0
    # 2 rows: 2 more trainings of 3 steps at 2 and 4 s
    assert "two more learning rates of each trained row (--tune_rates): 36 s of training" in capfd.readouterr().out


def test_rates_of_the_real_model(stubs, tmp_path, monkeypatch, capfd):
    """SFT at GRPO's rate is left out. Validation questions have a folder of clips, and are no test questions."""
    make_world(tmp_path / "w")
    make_world(tmp_path / "v")
    monkeypatch.setattr(reproduce, "check_model", lambda model: None)
    monkeypatch.setattr(reproduce, "check_texts", lambda *args, **kwargs: None)
    size = {False: estimate.Size(2000, 12000), True: estimate.Size(20, 120)}
    monkeypatch.setattr(estimate, "sizes", lambda model: size)
    (tmp_path / "m").mkdir()
    flags = ("--model", "m", "--data", "w/train.jsonl", "--mmau", "w/heldout.json", "--out", "t", "--tune_rates")
    with pytest.raises(SystemExit):
        command_line(monkeypatch, *flags, "--validation", "v/heldout.json", "--rows", "sft_at_grpo_rate")
    flags = (*flags, "--rows", "grpo_lora,grpo_think", "--validation")
    assert command_line(monkeypatch, *flags, "w/heldout.json") == 1
    error = "w/heldout.json: 40 of its questions are also in --data; give others"
    assert f"reproduce.py: error: {error}\n" in capfd.readouterr().err and not calls(stubs)
    assert command_line(monkeypatch, *flags, "v/heldout.json", "--validation_audio_dir", "v") == 0
    rates = [call.get("lr") for call in calls(stubs) if "steps" in call]
    assert [rate and float(rate) for rate in rates] == [
        None, pytest.approx(1e-6 / 3), pytest.approx(3e-6), None, pytest.approx(1e-5 / 3), pytest.approx(3e-5)
    ]  # fmt: skip
    scored = {call["audio_dir"]: call["data"] for call in calls(stubs) if "ckpt" in call and "audio_dir" in call}
    assert scored == {"v": "v/heldout.json"}
    assert "validation_digest" in json.loads((tmp_path / "t" / "reproduce.json").read_text())
    chosen = [rate for rate in json.loads((tmp_path / "t" / "results.json").read_text())["rates"] if rate["chosen"]]
    assert [rate["rate"] for rate in chosen] == [1.0, 1.0]  # equally good: the row's own


def test_transfer(stubs, tmp_path, monkeypatch, capfd):
    """Two seeds: what is called and written, and that a result that was changed is made again."""
    assert command_line(monkeypatch, "--transfer", "--seeds", 2, "--out", "t") == 0
    made = calls(stubs)
    trained = [
        (Path(call["out"]).parent.name, float(call["lr"]), call.get("beta"), call["seed"])
        for call in made if "steps" in call
    ]  # fmt: skip
    assert [call[:3] for call in trained[:7]] == [call[:3] for call in trained[7:]] == [
        ("sft_1e-4", 1e-4, None), ("sft_3e-4", 3e-4, None), ("sft_1e-3", 1e-3, None), ("grpo_1e-4", 1e-4, None),
        ("grpo_3e-4", 3e-4, None), ("grpo_1e-3", 1e-3, None), ("grpo_beta_0", 3e-4, "0.0"),
    ]  # fmt: skip
    assert [call[3] for call in trained] == ["0"] * 7 + ["1"] * 7
    assert {call["data"] for call in made if "steps" in call} == {"t/worlds/trained/heldout.json"}
    scored = {(Path(call["out"]).name, call["data"]) for call in made if "ckpt" in call}
    assert scored == {("predictions.json", "t/worlds/test/heldout.json"), ("clean.json", "t/worlds/clean/heldout.json")}
    found = json.loads((tmp_path / "t" / "results.json").read_text())
    assert [row["columns"]["kl"]["mean"] for row in found["rows"] if row["columns"]] == [0.5] * 8
    capfd.readouterr()
    (tmp_path / "t" / "seed_1" / "sft_1e-3" / "measured.json").write_text("{}")
    (tmp_path / "t" / "seed_1" / "sft_3e-4" / "clean.json").unlink()
    assert command_line(monkeypatch, "--transfer", "--seeds", 2, "--out", "t") == 0
    assert [Path(call["out"]).relative_to("t/seed_1") for call in calls(stubs)[len(made) :]] == [
        Path("sft_3e-4/clean.json")
    ]
    assert json.loads((tmp_path / "t" / "results.json").read_text()) == found
    assert command_line(monkeypatch, "--transfer", "--seeds", 2, "--out", "t") == 0
    assert "16 of 16 rows are finished" in capfd.readouterr().out and len(calls(stubs)) == len(made) + 1
    assert command_line(monkeypatch, "--out", "t") == 1
    assert "t: holds the rows of another table, transfer True (now False)" in capfd.readouterr().err


def test_variants(stubs, tmp_path, monkeypatch, capfd):
    """Held-out scores come from a world of their own. A row that failed is tried again; the other row stays."""
    flags = ("--variants", "--out", "t", "--rows", "paper,gspo_4")
    (stubs / "fail_gspo_4").touch()
    assert command_line(monkeypatch, *flags) == 1
    assert "Not finished: gspo_4 of seed 0." in (tmp_path / "t" / "table.md").read_text()
    (stubs / "fail_gspo_4").unlink()
    before = len(calls(stubs))
    assert command_line(monkeypatch, *flags) == 0
    training, evaluation = calls(stubs)[before:]
    assert training["ratio"] == "sequence" and training["heldout"] == "t/validation/heldout.json"
    assert evaluation["data"] == "t/world/heldout.json"
    found = json.loads((tmp_path / "t" / "results.json").read_text())
    assert [row["row"] for row in found["rows"] if row["columns"]] == ["paper", "gspo_4"]
    for row in (found["rows"][0], found["rows"][-1]):
        assert row["curves"] == {"0": [[2, 8.0, 0.6], [3, 12.0, 0.9]]} and row["columns"]["seconds"]["mean"] == 12
    assert command_line(monkeypatch, *flags) == 0 and len(calls(stubs)) == before + 2
    assert "two more learning rates" not in capfd.readouterr().out
    assert command_line(monkeypatch, "--out", "t") == 1
    assert "t: holds the rows of another table, variants True (now False)" in capfd.readouterr().err


# ---- continuing ----


def test_interrupted_training_saves_and_continues(stubs, tmp_path, monkeypatch, capfd):
    """At SIGTERM and Ctrl-C, the training saves. The same command continues from there."""
    flags = ("--out", "t", "--rows", "grpo_answer")
    (stubs / "wait").touch()
    metrics = tmp_path / "t" / "seed_0" / "grpo_answer" / "run" / "metrics.jsonl"

    def interrupt(signum):
        while not metrics.exists() or len(metrics.read_text().splitlines()) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), signum)
        if signum == signal.SIGTERM:  # `timeout` signals its child, then the child's group
            time.sleep(0.1)
            os.kill(os.getpid(), signum)

    for signum in (signal.SIGTERM, signal.SIGINT):
        shutil.rmtree(tmp_path / "t", ignore_errors=True)
        thread = threading.Thread(target=interrupt, args=(signum,))
        thread.start()
        with pytest.raises(SystemExit, match="the same command continues the table in t"):
            command_line(monkeypatch, *flags)
        thread.join()
        assert "saved" in capfd.readouterr().out
        assert [path.name for path in (metrics.parent / "resume").iterdir()] == ["step_000002"]
    (stubs / "wait").unlink()
    assert command_line(monkeypatch, *flags) == 0
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == [1, 2, 3]
    log = (tmp_path / "t" / "seed_0" / "grpo_answer" / "log.txt").read_text()
    assert "saved" in log and "step 3" in log and log.count("$ ") == 3


def test_failed_row_is_reported_and_tried_again(stubs, tmp_path, monkeypatch, capfd):
    (stubs / "fail_sft_lora").touch()
    assert command_line(monkeypatch, "--out", "t", "--rows", "sft_lora,grpo_lora") == 1
    printed = capfd.readouterr()
    errors = printed.err.splitlines()
    assert errors[-2].startswith("reproduce.py: error: sft_lora of seed 0: training ended with exit status 1; see t/")
    assert "out of memory" in (tmp_path / "t" / "seed_0" / "sft_lora" / "log.txt").read_text()
    table = (tmp_path / "t" / "table.md").read_text()
    assert "Not finished: sft_lora of seed 0." in table and "80.00" in table
    (stubs / "fail_sft_lora").rename(stubs / "stop_sft_lora")  # as if only the training had got SIGTERM
    assert command_line(monkeypatch, "--out", "t", "--rows", "sft_lora,grpo_lora") == 1
    assert (
        "sft_lora of seed 0: training ended before it wrote t/seed_0/sft_lora/run/step_000003" in capfd.readouterr().err
    )
    (stubs / "stop_sft_lora").unlink()
    before = len(calls(stubs))
    assert command_line(monkeypatch, "--out", "t", "--rows", "sft_lora,grpo_lora") == 0
    assert [call["script"] for call in calls(stubs)[before:]] == ["sft_aqa.py", "eval_mmau.py"]


def test_changed_settings_and_files_are_noticed(stubs, tmp_path, monkeypatch, capfd):
    rows = ("--out", "t", "--rows", "untouched_answer,sft_full")
    assert command_line(monkeypatch, *rows) == 0
    row = tmp_path / "t" / "seed_0" / "sft_full"
    (row / "predictions.json").write_text((row / "predictions.json").read_text().replace("nothing of these", "dog"))
    before = len(calls(stubs))
    assert command_line(monkeypatch, *rows) == 0  # predictions changed by hand: evaluated again, not trained again
    assert [call["script"] for call in calls(stubs)[before:]] == ["eval_mmau.py"]
    before = len(calls(stubs))
    assert command_line(monkeypatch, *rows, "--steps", 2) == 0  # the untouched row stays as it is
    assert [call["script"] for call in calls(stubs)[before:]] == ["sft_aqa.py", "eval_mmau.py"]
    assert (row / "run" / "step_000002").exists()
    assert (row.with_name("sft_full.earlier_1") / "run" / "step_000003").exists()
    capfd.readouterr()
    assert command_line(monkeypatch, *rows, "--label_noise", 0.5) == 1
    error = "t: holds the rows of another table, label_noise 0.0 (now 0.5); name another folder with --out"
    assert capfd.readouterr().err == f"reproduce.py: error: {error}\n"


def test_leftovers_of_an_interrupted_removal_go(stubs, tmp_path, monkeypatch):
    """Resume state, other checkpoints, half-removed folders: also if the row is already trained."""
    row = tmp_path / "t" / "seed_0" / "sft_full"
    for called in (["sft_aqa.py", "eval_mmau.py"], ["eval_mmau.py"]):
        before = len(calls(stubs))
        assert command_line(monkeypatch, "--out", "t", "--rows", "sft_full") == 0
        assert [call["script"] for call in calls(stubs)[before:]] == called
        assert sorted(path.name for path in (row / "run").iterdir()) == ["metrics.jsonl", "step_000003"]
        for name in ("resume", "resume.removed.unfinished", "step_000002", "step_000001.removed.unfinished"):
            (row / "run" / name / "inside").mkdir(parents=True)
        (row / "run" / "curves.png.unfinished").touch()
        (row / "predictions.json").unlink()
    assert command_line(monkeypatch, "--out", "t", "--rows", "sft_full") == 0
    assert sorted(path.name for path in (row / "run").iterdir()) == ["metrics.jsonl", "step_000003"]


def test_damaged_files(stubs, tmp_path, monkeypatch, capfd):
    """A damaged row.json counts as missing. A damaged reproduce.json is an error of one line."""
    rows = ("--out", "t", "--rows", "untouched_answer")
    assert command_line(monkeypatch, *rows) == 0
    row = tmp_path / "t" / "seed_0" / "untouched_answer"
    for text in ("{", "[]"):
        (row / "row.json").write_text(text)
        before = len(calls(stubs))
        assert command_line(monkeypatch, *rows) == 0 and len(calls(stubs)) == before + 1
    capfd.readouterr()
    for text in ("{", "3"):
        (tmp_path / "t" / "reproduce.json").write_text(text)
        assert command_line(monkeypatch, *rows) == 1
        error = capfd.readouterr().err
        assert error.startswith("reproduce.py: error: t/reproduce.json: damaged (") and error.count("\n") == 1


def test_a_table_and_its_rows_have_one_owner(stubs, tmp_path, monkeypatch, capfd):
    """Refused in one line: a second reproduce.py, and one whose predecessor was killed and left a script running."""
    flags = ("--out", "t", "--rows", "sft_full")
    owned = ["t/owner.json", "t/seed_0/sft_full/run/owner.json", "t/seed_0/sft_full/predictions.json.owner.json"]
    for name in owned:
        with another_owner(name):
            before = set(Path("t/seed_0").rglob("*"))
            assert command_line(monkeypatch, "--dry_run", *flags) == 0  # reads only
            assert command_line(monkeypatch, *flags) == 1
            printed = capfd.readouterr()
            assert printed.err.startswith(f"reproduce.py: error: {name}: another job (process ")
            assert printed.err.count("\n") == 1 and not calls(stubs)
            assert set(Path("t/seed_0").rglob("*")) - {Path("t/seed_0/base")} == before - {Path("t/seed_0/base")}
    assert command_line(monkeypatch, *flags) == 0 and not list(tmp_path.rglob("*owner.json"))


# ---- before the start ----


def test_closed_terminal_is_an_interruption_unless_ignored(monkeypatch):
    """SIGHUP interrupts like SIGTERM. Under nohup, SIGHUP stays ignored."""
    seen = []
    monkeypatch.setattr(reproduce, "reproduce", lambda args: seen.append(signal.getsignal(signal.SIGHUP)) or 0)
    before = signal.getsignal(signal.SIGHUP)
    try:
        for handler in (signal.SIG_DFL, signal.SIG_IGN):
            signal.signal(signal.SIGHUP, handler)
            assert command_line(monkeypatch) == 0
    finally:
        signal.signal(signal.SIGHUP, before)
    assert seen == [reproduce.interrupt, signal.SIG_IGN]


def test_dry_run_writes_nothing(stubs, tmp_path, monkeypatch, capfd):
    assert command_line(monkeypatch, "--dry_run", "--out", "t", "--seeds", 2, "--seconds_per_step", 10) == 0
    printed = capfd.readouterr().out
    assert not (tmp_path / "t").exists() and not calls(stubs)
    assert len([line for line in printed.splitlines() if line.startswith(sys.executable)]) == 2 * 15
    # 2 seeds x 6 rows x 3 steps x 10 s
    assert "time: about 6 min; unknown until the first row of its kind has run: 18 x evaluation\n" in printed


@pytest.mark.parametrize("flags, error", [
    ("--rows grpo", "--rows: there is no row 'grpo'; choose from untouched_direct, "),
    ("--data d", "--data needs --model"),
    ("--model m --data d", "--model needs --mmau, a file of questions"),
    ("--model m --data d --mmau e --label_noise 0.1", "--label_noise and --heldout_noise are for the toy"),
    ("--model m --data d --mmau e --tune_rates", "with --model, --tune_rates needs --validation, and"),
    ("--validation v", "--validation needs --model"),
    ("--transfer --tune_rates", "--transfer and --variants cannot be combined with each other, --model, --tune_rates"),
    ("--variants --transfer", "--transfer and --variants cannot be combined with each other"),
    ("--variants --model m", "--transfer and --variants cannot be combined with each other"),
    ("--variants --tune_rates", "--transfer and --variants cannot be combined with each other"),
    ("--variants --label_noise 0.1", "--transfer and --variants cannot be combined with each other"),
    ("--variants --rows sft_full", "--rows: there is no row 'sft_full'; choose from paper, beta_0, "),
    ("--transfer --rows sft_full", "--rows: there is no row 'sft_full'; choose from untouched, sft_1e-4, "),
    ("--seeds 0", "--seeds must be at least 1, not 0"),
    ("--steps 0", "--steps must be at least 1, not 0"),
    ("--nproc_per_node 0", "--nproc_per_node must be at least 1, not 0"),
    ("--heldout_noise nan", "--heldout_noise must be at least 0, not nan"),
    ("--heldout_noise inf", "--heldout_noise must be at most 1000, not inf"),
    ("--seconds_per_step nan", "--seconds_per_step must be above 0, not nan"),
    ("--seconds_per_step inf", "--seconds_per_step must be at most 1000000, not inf"),
    ("--nproc_per_node 3", "--nproc_per_node must divide the toy's 16 questions a step"),
    ("--label_noise 2", "--label_noise must be at most 1, not 2.0"),
])  # fmt: skip
def test_bad_flags_end_in_one_line(flags, error, capsys):
    with pytest.raises(SystemExit):
        reproduce.parse_args(flags.split())
    assert f"error: {error}" in capsys.readouterr().err.splitlines()[-1]


def test_torchrun_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    with pytest.raises(SystemExit):
        reproduce.parse_args([])
    assert "error: start reproduce.py with python; it calls torchrun itself" in capsys.readouterr().err.splitlines()[-1]


# ---- the scripts themselves ----


@pytest.mark.slow
def test_real_scripts(tmp_path):
    """Two steps of every row of the toy, on two ranks. Then of a variant, from the same world and base model."""
    command = [sys.executable, str(ROOT / "reproduce.py"), "--out", "t", "--steps", "2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads((tmp_path / "t" / "results.json").read_text())
    assert found["questions"] == 600
    assert all(0 <= row["spread"]["average"]["mean"] <= 100 for row in found["rows"])
    for row in [row for row in rows.ROWS if row.script and row.lr is None]:
        run = tmp_path / "t" / "seed_0" / row.name / "run"
        (checkpoint,) = run.glob("step_*")
        assert checkpoint.name == "step_000002" and not (run / "resume").exists()
        assert json.loads((checkpoint / "aqa.json").read_text())["template"] == row.template
        assert (checkpoint / "adapter_config.json").exists() == row.lora
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert again.returncode == 0 and "9 of 9 rows are finished" in again.stdout and "\n$ " not in again.stdout

    for made in ("world", "seed_0/base"):
        shutil.copytree(tmp_path / "t" / made, tmp_path / "v" / made)
    flags = ["--variants", "--out", "v", "--steps", "2", "--rows", "dapo"]
    done = subprocess.run([*command[:2], *flags], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads((tmp_path / "v" / "results.json").read_text())
    ((columns, curve),) = [(row["columns"], row["curves"]["0"]) for row in found["rows"] if row["columns"]]
    assert [point[0] for point in curve] == [2] and 0.1 < curve[0][2] < 0.7 and columns["steps"]["mean"] is None
    assert curve[0][1] == pytest.approx(2 * columns["seconds_per_step"]["mean"], abs=0.06)
    tested, scored = ((tmp_path / "v" / part / "heldout.json").read_text() for part in ("world", "validation"))
    assert tested != scored


@pytest.mark.slow
def test_real_scripts_of_the_transfer(tmp_path):
    """Two steps of two rows, on two ranks. The base model knows all areas a little."""
    flags = ["--transfer", "--out", "t", "--steps", "2", "--rows", "untouched,sft_1e-4,grpo_beta_0"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "reproduce.py"), *flags], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads((tmp_path / "t" / "results.json").read_text())
    base, *trained = [row["columns"] for row in found["rows"] if row["columns"]]
    for column in ("trained", "others", "among_choices"):
        assert 60 < base[column]["mean"] < 95
    assert base["average"]["mean"] + 5 < base["clean"]["mean"]  # noise makes the questions harder
    assert base["kl"]["mean"] == pytest.approx(0.0, abs=1e-4) and all(row["kl"]["mean"] > 0 for row in trained)
