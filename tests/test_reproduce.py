"""The paper's table from one command: stubs in place of the scripts, and once the scripts themselves.

The stubs behave as the scripts do where reproduce.py relies on it: step folders, resume state, SIGTERM, predictions.
"""

import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest
import soundfile

import reproduce
import reproduce_estimate
import reproduce_rows
import toy

ROOT = Path(__file__).resolve().parents[1]
NAMES = [row.name for row in reproduce_rows.ROWS]
TASKS = ("sound", "music", "speech")

# What both stubs begin with: flags as a dictionary, and a line in calls.jsonl.
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
        file.write(json.dumps({"step": step, "seconds": 2.0 if script == "sft_aqa.py" else 4.0}) + "\\n")
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
# Which questions are right follows from the name of the row and the seed alone.
EVALUATE = """
name, seed = Path(flags["out"]).parts[-2], int(Path(flags["out"]).parts[-3][5:])
assert Path(flags["ckpt"]).is_dir()
records = json.loads(Path(flags["data"]).read_text())
for i, record in enumerate(records):
    right = (i * 7 + seed) % 10 < {"untouched": 3, "sft": 5, "grpo": 8}[name.split("_")[0]]
    record["model_prediction"] = record["answer"] if right else "nothing of these"
Path(flags["out"]).write_text(json.dumps(records))
"""


@pytest.fixture(autouse=True)
def ctrl_c():
    """Ctrl-C as in a terminal: shells start what runs in the background with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def stubs(tmp_path, monkeypatch):
    """A folder with scripts that take milliseconds, in place of those beside reproduce.py."""
    folder = tmp_path / "stubs"
    folder.mkdir()
    (folder / "grpo_aqa.py").write_text(HEAD + TRAIN)
    (folder / "sft_aqa.py").write_text(HEAD + TRAIN)
    (folder / "eval_mmau.py").write_text(HEAD + EVALUATE)
    monkeypatch.setattr(reproduce_rows, "ROOT", folder)
    monkeypatch.setattr(toy, "make_world", make_world)
    monkeypatch.setattr(toy, "make_base", lambda questions, out, seed: out.mkdir(parents=True))
    monkeypatch.chdir(tmp_path)
    return folder


def make_world(folder, **noise):
    """Forty questions, and the levers they are made with."""
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


def expected(name, seed):
    """Which of the forty questions the stub gets right, as EVALUATE has it."""
    limit = {"untouched": 3, "sft": 5, "grpo": 8}[name.split("_")[0]]
    return [(i * 7 + seed) % 10 < limit for i in range(40)]


def command_line(monkeypatch, *flags):
    """reproduce.py's exit status for these flags, run in this process."""
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


def test_table(stubs, tmp_path, monkeypatch, capfd):
    """Two seeds of all rows: what is called, what is written, against counting by hand. Again: nothing is called."""
    assert command_line(monkeypatch, "--seeds", 2, "--out", "t", "--label_noise", 0.25, "--heldout_noise", 2) == 0
    out, made = tmp_path / "t", calls(stubs)
    assert json.loads((out / "world" / "noise.json").read_text()) == {"heldout_noise": 2.0, "label_noise": 0.25}
    assert len(made) == 2 * (9 + 6) and all(call["threads"] == "1" for call in made)
    assert all(call["session"] != os.getsid(0) for call in made)  # Ctrl-C in a terminal does not reach it
    trained = [call for call in made if "steps" in call]
    assert all(call["resume"] is True and call["keep_last"] == "1" and call["steps"] == "3" for call in trained)
    assert {(call["model"], call["seed"]) for call in trained} == {(f"t/seed_{s}/base", str(s)) for s in range(2)}
    assert all(int(call["prompts_per_rank"]) == 16 for call in trained)

    found = json.loads((out / "results.json").read_text())
    assert [row["row"] for row in found["rows"]] == NAMES and all(row["paper"] is None for row in found["rows"])
    table = (out / "table.md").read_text()
    lines = {line.split("|")[1].strip(): line for line in table.splitlines() if line.startswith("|")}
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
        shown = f"{statistics.mean(music):.2f} ± {statistics.stdev(music):.2f} ({min(music):.2f} to {max(music):.2f})"
        assert lines[row["title"]].split("|")[3].strip() == shown
        kept = [path.name for path in (out / "seed_1" / row["row"] / "run").glob("*")]
        assert sorted(kept) == ([] if row["row"].startswith("untouched") else ["metrics.jsonl", "step_000003"])
    for seed, test in enumerate(found["mcnemar"]):
        pairs = list(zip(expected("grpo_answer", seed), expected("sft_full", seed)))
        only = pairs.count((True, False)), pairs.count((False, True))
        assert (test["only_a"], test["only_b"]) == only
        tail = sum(math.comb(sum(only), k) for k in range(min(only) + 1)) / 2 ** sum(only)
        assert test["p"] == pytest.approx(min(1, 2 * tail))
    assert "seed 1: only GRPO, answer right: " in table and "GRPO, answer is better" in table
    assert "last checkpoint" in table and "Not finished" not in table and "paper" not in table
    assert lines["guessing"].split("|")[5].strip() == "33.33"
    assert (out / "table.png").stat().st_size > 10_000

    assert command_line(monkeypatch, "--seeds", 2, "--out", "t", "--label_noise", 0.25, "--heldout_noise", 2) == 0
    assert len(calls(stubs)) == len(made) and (out / "table.md").read_text() == table
    printed = capfd.readouterr().out
    assert "18 of 18 rows are finished" in printed and table in printed and "$ " in printed


def test_fewer_seeds_keep_the_table(stubs, tmp_path, monkeypatch, capfd):
    """A call for fewer seeds shows those that are there; one whose row is missing is named."""
    rows = ("--out", "t", "--rows", "sft_full,grpo_answer")
    assert command_line(monkeypatch, *rows, "--seeds", 3) == 0
    results, table = ((tmp_path / "t" / name).read_text() for name in ("results.json", "table.md"))
    assert "Of 3 seeds" in table and json.loads(results)["seeds"] == 3
    assert command_line(monkeypatch, *rows, "--seeds", 1) == 0
    assert [(tmp_path / "t" / name).read_text() for name in ("results.json", "table.md")] == [results, table]
    shutil.rmtree(tmp_path / "t" / "seed_1")
    assert command_line(monkeypatch, *rows, "--seeds", 1) == 0
    found = json.loads((tmp_path / "t" / "results.json").read_text())
    assert found["seeds"] == 2 and [test["seed"] for test in found["mcnemar"]] == [0, 2]
    assert "Not finished: sft_full of seed 1, grpo_answer of seed 1." in (tmp_path / "t" / "table.md").read_text()
    assert "t: table.md, table.png, results.json" in capfd.readouterr().out
    (stubs / "fail_sft_full").touch()
    assert command_line(monkeypatch, "--out", "empty", "--rows", "sft_full") == 1
    assert "empty: table.md, results.json" in capfd.readouterr().out and not Path("empty/table.png").exists()


def test_paper_columns_stand_beside_the_real_model(stubs, tmp_path, monkeypatch):
    """Published figures where they are known, empty cells where not; one evaluation of the untouched model."""
    make_world(tmp_path / "w")
    monkeypatch.setattr(reproduce, "check_model", lambda model: None)
    monkeypatch.setattr(reproduce_estimate, "sizes", lambda model: {False: (2000, 12000), True: (20, 120)})
    monkeypatch.setattr(reproduce_estimate, "floor_seconds", lambda model, script: 2)
    (tmp_path / "m").mkdir()
    real = ("--model", "m", "--data", "w/train.jsonl", "--mmau", "w/heldout.json", "--out", "real", "--seeds", 2)
    assert command_line(monkeypatch, *real) == 0
    assert len(calls(stubs)) == 3 + 2 * 12 and not any("lr" in c and "lora_rank" not in c for c in calls(stubs))
    table = (tmp_path / "real" / "table.md").read_text()
    cells = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[6:10]]
             for line in table.splitlines() if line.startswith("| ")}  # fmt: skip
    assert cells["untouched, direct"] == ["54.95", "50.98", "42.04", "49.20"]
    assert cells["GRPO, answer"] == ["69.37", "66.77", "57.36", "64.50"]
    assert cells["SFT, full"] == cells["untouched, answer"] == ["", "", "", ""]
    assert "±" in table and "[" in table.split("untouched, think")[1].splitlines()[0]  # of one seed: an interval


# ---- continuing ----


def test_interrupted_training_saves_and_continues(stubs, tmp_path, monkeypatch, capfd):
    """SIGTERM and Ctrl-C reach the training, which saves; the same command goes on from there."""
    flags = ("--out", "t", "--rows", "grpo_answer")
    (stubs / "wait").touch()
    metrics = tmp_path / "t" / "seed_0" / "grpo_answer" / "run" / "metrics.jsonl"

    def interrupt(signum):
        while not metrics.exists() or len(metrics.read_text().splitlines()) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), signum)
        if signum == signal.SIGTERM:  # as `timeout` does, which signals its child and then the child's group
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


def test_failed_row_is_told_and_tried_again(stubs, tmp_path, monkeypatch, capfd):
    (stubs / "fail_sft_lora").touch()
    assert command_line(monkeypatch, "--out", "t", "--rows", "sft_lora,grpo_lora") == 1
    printed = capfd.readouterr()
    errors = printed.err.splitlines()
    assert errors[-2].startswith("reproduce.py: error: sft_lora of seed 0: training ended with exit status 1; see t/")
    assert "out of memory" in (tmp_path / "t" / "seed_0" / "sft_lora" / "log.txt").read_text()
    table = (tmp_path / "t" / "table.md").read_text()
    assert "Not finished: sft_lora of seed 0." in table and "80.00" in table
    (stubs / "fail_sft_lora").rename(stubs / "stop_sft_lora")  # as by a SIGTERM that only the training had
    assert command_line(monkeypatch, "--out", "t", "--rows", "sft_lora,grpo_lora") == 1
    assert "sft_lora of seed 0: training ended before t/seed_0/sft_lora/run/step_000003" in capfd.readouterr().err
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
    assert command_line(monkeypatch, *rows) == 0  # changed by hand: evaluated again, not trained again
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
    """Resume state, other checkpoints, half-removed folders: after training, and where there was none to do."""
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
    """A damaged row.json counts as none; a damaged reproduce.json ends in a line that names it."""
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


# ---- a command and its output ----


def no_terminal(monkeypatch):
    """Standard output as it is when `tee` has ended."""

    def fail(*_):
        raise BrokenPipeError

    gone = types.SimpleNamespace(write=fail, flush=fail)
    monkeypatch.setattr(sys, "stdout", types.SimpleNamespace(write=fail, flush=fail, buffer=gone))


def test_command_ends_well_without_terminal_or_log(tmp_path, monkeypatch):
    """More output than a pipe holds: it is read all the same, and a full disk is told at the end."""
    code = "import sys; print('x' * 300_000); print('end'); open(sys.argv[1], 'w').close(); sys.exit(3)"
    command, environment = [sys.executable, "-c", code, str(tmp_path / "done")], dict(os.environ)
    with monkeypatch.context() as patch:
        no_terminal(patch)
        assert reproduce.run_command(command, tmp_path / "log", environment) == 3
    assert (tmp_path / "log").read_text().splitlines()[2:] == ["x" * 300_000, "end"]
    (tmp_path / "done").unlink()
    with pytest.raises(OSError, match="No space left"):
        reproduce.run_command(command, Path("/dev/full"), environment)
    assert (tmp_path / "done").exists()


WAIT = """
import signal, subprocess, sys, time
ended = []
signal.signal(signal.SIGTERM, lambda *_: ended.append(True))
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
print("worker", worker.pid, flush=True)
while not ended:
    time.sleep(0.01)
print("saving", flush=True)
time.sleep(float(sys.argv[1]))
worker.kill()
print("saved")
"""


def interrupted(log, seconds, *awaited):
    """Run WAIT and send Ctrl-C after each of these texts is in the log. Returns the log's lines."""

    def interrupt():
        for text in awaited:
            while not log.exists() or text not in log.read_text():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGINT)

    log.parent.joinpath("wait.py").write_text(WAIT)
    command = [sys.executable, str(log.parent / "wait.py"), str(seconds)]
    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        reproduce.run_command(command, log, dict(os.environ))
    thread.join()
    return log.read_text().splitlines()[2:]


def test_interruption_without_terminal_saves(tmp_path, monkeypatch):
    no_terminal(monkeypatch)
    assert interrupted(tmp_path / "log", 0, "worker ")[1:] == ["saving", "saved"]


def test_second_interruption_kills_workers_in_their_own_sessions(tmp_path):
    worker, *rest = interrupted(tmp_path / "log", 60, "worker ", "saving")
    assert rest == ["saving"]
    pid = worker.removeprefix("worker ")
    state = Path(f"/proc/{pid}/stat")
    for _ in range(500):  # the kernel takes a moment; no one may collect it: Z
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.01)
    os.kill(int(pid), signal.SIGKILL)
    pytest.fail("the worker runs on")


def test_closed_terminal_is_an_interruption_unless_ignored(monkeypatch):
    """As SIGTERM is; under nohup, SIGHUP stays ignored."""
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


def test_log_keeps_the_last_state_of_a_progress_bar(tmp_path):
    code = r"import sys; sys.stderr.write('\r10%\r50%\r100%\nnext\r\n'); sys.stderr.write('x\r\ry'); sys.exit(3)"
    assert reproduce.run_command([sys.executable, "-c", code], tmp_path / "log", dict(os.environ)) == 3
    assert (tmp_path / "log").read_text().splitlines()[2:] == ["100%", "next", "y"]


# ---- before the start ----


def test_dry_run_writes_nothing(stubs, tmp_path, monkeypatch, capfd):
    assert command_line(monkeypatch, "--dry_run", "--out", "t", "--seeds", 2, "--seconds_per_step", 10) == 0
    printed = capfd.readouterr().out
    assert not (tmp_path / "t").exists() and not calls(stubs)
    assert len([line for line in printed.splitlines() if line.startswith(sys.executable)]) == 2 * 15
    # 2 seeds x 6 rows x 3 steps x 10 s
    assert "time: about 6 min; unknown until the first of its kind has run: 18 evaluations\n" in printed


def test_time_from_measured_steps(stubs, tmp_path, monkeypatch):
    """4 s a step of GRPO and 2 s of SFT, as the stubs write them; two steps of a row that was interrupted count."""
    assert command_line(monkeypatch, "--out", "t", "--rows", "sft_full,grpo_answer") == 0
    args = reproduce.parse_args(["--out", "t", "--steps", "100", "--nproc_per_node", "1"])
    for path in (tmp_path / "t").glob("seed_0/*/row.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"evaluation_seconds": 39}))
    half = tmp_path / "t" / "seed_0" / "grpo_lora" / "run"
    half.mkdir(parents=True)
    whole = '{"step": 1, "seconds": 7}\n{"step": 2, "seconds": 9}\n'
    (half / "metrics.jsonl").write_text("\0\0\n" + whole + '{"step": 3}\n{"step": 4, "secon')  # some is damaged
    rows = {row.name: (0, row) for row in reproduce_rows.ROWS}
    own = {"settings": reproduce_rows.settings(args, *rows["grpo_lora"])}
    half.with_name("row.json").write_text(json.dumps(own))
    todo = [rows[name] for name in ("untouched_think", "sft_lora", "grpo_think", "grpo_lora")]
    grpo = statistics.mean([4, 4, 4, 7, 9])  # of rows of that script; its own, where it has some
    seconds = 100 * 2 + 100 * grpo + 98 * 8 + 4 * 39
    assert reproduce_estimate.time_text(args, todo) == f"about {seconds / 60:.0f} min"
    (half / "metrics.jsonl").write_text('{"step": 1, "seconds": 8}\n' * 150)  # never less than nothing
    assert reproduce_estimate.time_text(args, todo[3:]) == "about 39 s"
    half.with_name("row.json").write_text('{"settings": {}}')  # of other settings: none of them is done
    assert reproduce_estimate.time_text(args, todo[3:]) == f"about {(100 * 8 + 39) / 60:.0f} min"
    args.out = "elsewhere"
    unknown = "1 trainings by sft_aqa.py, 2 trainings by grpo_aqa.py, 4 evaluations"
    assert reproduce_estimate.time_text(args, todo) == f"unknown until the first of its kind has run: {unknown}"


@pytest.mark.parametrize("flags, error", [
    ("--rows grpo", "--rows: there is no row 'grpo'; choose from untouched_direct, "),
    ("--data d", "--data needs --model"),
    ("--model m --data d", "--model needs --mmau, a file of questions"),
    ("--model m --data d --mmau e --label_noise 0.1", "--label_noise and --heldout_noise are the toy's"),
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
    assert "error: start it with python: it calls torchrun itself" in capsys.readouterr().err.splitlines()[-1]


# ---- the scripts themselves ----


@pytest.mark.slow
def test_real_scripts(tmp_path):
    """Two steps of every row of the toy, on two processes."""
    command = [sys.executable, str(ROOT / "reproduce.py"), "--out", "t", "--steps", "2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads((tmp_path / "t" / "results.json").read_text())
    assert found["questions"] == 600
    assert all(0 <= row["spread"]["average"]["mean"] <= 100 for row in found["rows"])
    for row in reproduce_rows.ROWS[3:]:
        run = tmp_path / "t" / "seed_0" / row.name / "run"
        (checkpoint,) = run.glob("step_*")
        assert checkpoint.name == "step_000002" and not (run / "resume").exists()
        assert json.loads((checkpoint / "aqa.json").read_text())["template"] == row.template
        assert (checkpoint / "adapter_config.json").exists() == row.lora
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert again.returncode == 0 and "9 of 9 rows are finished" in again.stdout and "\n$ " not in again.stdout
