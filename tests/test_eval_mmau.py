"""The evaluation: the same file each time, for any batch size, any number of ranks and any interruption."""

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from eval_runs import BATCH, QUESTIONS, answers_in, arguments, evaluate, mmau_record
from forked import another_owner

import eval_mmau
from evaluation import answering, report
from model import checkpoints
from model.checkpoints import load_policy, save_checkpoint
from reward import prediction

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def batches(monkeypatch):
    """The number of prompts of each batch that goes through the model."""
    sizes, original = [], answering.sample_group

    def counted(model, prompt, *args):
        sizes.append(len(prompt["input_ids"]))
        return original(model, prompt, *args)

    monkeypatch.setattr(answering, "sample_group", counted)
    return sizes


# ---- the same file ----


def test_the_predictions_file_holds_the_input_and_the_answers(mmau, clean):
    given, answered = json.loads((mmau / "mmau.json").read_text()), json.loads(clean.read_text())
    added = ["model_prediction", "model_output", "answer_prediction", "completion"]
    for before, after in zip(given, answered, strict=True):
        assert list(after) == [*before, *added] and {key: after[key] for key in before} == before
        assert after["model_prediction"] == after["model_output"] == prediction(after["completion"])
    assert len(set(answers_in(clean))) > QUESTIONS / 2  # answers do depend on the question


@pytest.mark.parametrize("batch_size", [1, BATCH, 16])
def test_batch_size_changes_no_prediction_and_a_second_run_no_byte(mmau, clean, tmp_path, batch_size, batches):
    assert evaluate(*arguments(mmau, tmp_path / "a.json", "--batch_size", batch_size)) == 0
    assert Counter(batches) == {1: {1: 20}, 3: {3: 6, 2: 1}, 16: {16: 1, 4: 1}}[batch_size]
    assert (tmp_path / "a.json").read_bytes() == clean.read_bytes()


def test_sampling(mmau, tmp_path, capsys):
    """The seed decides the samples. The prediction is their majority vote, the completion is the first sample."""
    flags = ("--samples", 3, "--temperature", 0.9)
    for name, extra in {"a": (), "b": (), "c": ("--seed", 1), "d": ("--temperature", 1e-4)}.items():
        assert evaluate(*arguments(mmau, tmp_path / f"{name}.json", *flags, *extra)) == 0
    assert "pass@" in capsys.readouterr().out
    a, b, c, d = ((tmp_path / f"{name}.json").read_bytes() for name in "abcd")
    assert a == b and a != c
    for record in json.loads(a):
        assert len(record["samples"]) == 3 and record["completion"] == record["samples"][0]
        votes = Counter(prediction(text) for text in record["samples"])
        assert votes[record["model_prediction"]] == max(votes.values())
    assert sum(len(set(record["samples"])) > 1 for record in json.loads(a)) > QUESTIONS / 2
    assert all(len(set(record["samples"])) == 1 for record in json.loads(d))  # as good as greedy


def test_a_hugging_face_name_needs_no_out(mmau, clean, tmp_path, monkeypatch, capsys):
    """Its predictions go to runs/. Here, the name stands for a local folder."""
    for function in (eval_mmau.check_model, eval_mmau.check_texts, eval_mmau.heard_seconds,
                     eval_mmau.load_on_all_ranks):  # fmt: skip
        local = functools.partial(function, str(mmau / "model"))
        monkeypatch.setattr(eval_mmau, function.__name__, lambda name, *args, local=local, **kw: local(*args, **kw))
    monkeypatch.chdir(tmp_path)
    flags = arguments(mmau, "none", "--ckpt", "Org/Tiny")
    assert evaluate(*[flag for flag in flags if flag not in ("--out", "none")]) == 0
    out = Path("runs/Tiny/untouched/mmau_predictions.json")
    assert out.read_bytes() == clean.read_bytes() and f"predictions: {out}\n" in capsys.readouterr().out


# ---- interruptions ----

KILLED = """
import os, signal, sys
import eval_mmau
from evaluation import answering
sys.argv[0] = "eval_mmau.py"
original, calls = answering.append_journal, []
def append(path, answers):
    original(path, answers)
    calls.append(1)
    if len(calls) == 3:
        with open(path, "a") as file:
            file.write('{"question": 19, "comple')
        os.kill(os.getpid(), signal.SIGKILL)
answering.append_journal = append
eval_mmau.main()
"""


@pytest.fixture(scope="module")
def killed(mmau):
    """The predictions file that a SIGKILL prevented. Its journal holds three batches of seven and a torn line."""
    out = mmau / "killed.json"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", KILLED, *arguments(mmau, out, "--dtype", "bfloat16", "--samples", 2)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert not out.exists() and len(Path(f"{out}.partial.jsonl").read_text().split("\n")) == 1 + 3 * BATCH + 1
    return out


@pytest.fixture(scope="module")
def sampled(mmau):
    """The file that the killed evaluation would have written: two samples a question, in bfloat16."""
    assert evaluate(*arguments(mmau, mmau / "sampled.json", "--dtype", "bfloat16", "--samples", 2)) == 0
    return (mmau / "sampled.json").read_bytes()


@pytest.mark.parametrize("lost, computed", [(0, 7 - 3), (1, 7 - 2)])
def test_a_killed_evaluation_continues(mmau, killed, sampled, tmp_path, batches, lost, computed):
    """It writes the same file. A batch of which the journal lacks an answer is computed again as a whole."""
    out = tmp_path / "out.json"
    journal = Path(f"{killed}.partial.jsonl").read_text().splitlines(keepends=True)
    Path(f"{out}.partial.jsonl").write_text("".join(journal[: len(journal) - 1 - lost] + journal[-1:]))
    assert evaluate(*arguments(mmau, out, "--dtype", "bfloat16", "--samples", 2)) == 0
    assert len(batches) == computed and batches[0] == BATCH
    assert out.read_bytes() == sampled
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "out.json.settings.json"]


def test_two_ranks_continue_what_one_began(mmau, killed, sampled, tmp_path):
    """They reuse three batches of the journal, as one changed answer shows, and share the other four."""
    out = tmp_path / "out.json"
    journal = Path(f"{killed}.partial.jsonl").read_text().split("\n")
    changed = json.loads(journal[1])
    changed["completions"][0] = "from the journal"
    Path(f"{out}.partial.jsonl").write_text("\n".join([journal[0], json.dumps(changed), *journal[2:]]))
    torchrun(*arguments(mmau, out, "--dtype", "bfloat16", "--samples", 2))
    answered, expected = json.loads(out.read_text()), json.loads(sampled)
    assert answered[changed["question"]].pop("completion") == "from the journal"
    for record in (answered[changed["question"]], expected[changed["question"]]):
        for key in ("completion", "samples", "model_prediction", "model_output", "answer_prediction"):
            record.pop(key, None)
    assert answered == expected
    assert not list(tmp_path.glob("*partial*"))


def test_two_ranks_write_the_file_of_one(mmau, sampled, tmp_path):
    printed = torchrun(*arguments(mmau, tmp_path / "out.json", "--dtype", "bfloat16", "--samples", 2))
    assert (tmp_path / "out.json").read_bytes() == sampled
    assert printed.count("predictions: ") == 1


def torchrun(*flags):
    """Run the script on two ranks. Returns what it printed."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", str(ROOT / "eval_mmau.py")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launcher, *flags], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_a_journal_of_other_settings_is_not_used(mmau, clean, killed, tmp_path, batches, capsys):
    out = tmp_path / "out.json"
    shutil.copy(f"{killed}.partial.jsonl", f"{out}.partial.jsonl")
    assert evaluate(*arguments(mmau, out)) == 0
    assert len(batches) == 7 and out.read_bytes() == clean.read_bytes()
    notes = [line for line in capsys.readouterr().err.splitlines() if "partial" in line]
    assert len(notes) == 1 and f"{out}.partial.jsonl.old" in notes[0]
    assert Path(f"{out}.partial.jsonl.old").read_bytes() == Path(f"{killed}.partial.jsonl").read_bytes()


# ---- bad audio ----


@pytest.fixture
def broken(mmau, tmp_path):
    """A question file whose records 3, 5 and 20 have no usable clip: missing, not audio, 10 ms long."""
    records = json.loads((mmau / "mmau.json").read_text())
    for i, name in ((2, "gone.wav"), (4, "noise.wav"), (19, "short.wav")):
        records[i]["audio_id"] = str(tmp_path / name)
    (tmp_path / "noise.wav").write_bytes(b"RIFF, not really")
    soundfile.write(tmp_path / "short.wav", np.zeros(160), 16_000)
    path = tmp_path / "broken.json"
    path.write_text(json.dumps(records))
    return path


def test_bad_audio_is_reported_before_weights_are_loaded(mmau, broken, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(checkpoints, "load_policy", lambda *args: pytest.fail("weights were loaded"))
    flags = ("--data", broken, "--audio_dir", mmau)
    assert evaluate(*arguments(mmau, tmp_path / "out.json", *flags)) == 1
    message = capsys.readouterr().err
    assert "error: 3 of 20 " in message and "--skip_bad_audio" in message
    for number, name in ((3, "gone.wav"), (5, "noise.wav"), (20, "short.wav")):
        assert re.search(rf"broken\.json, record {number}: .*{name}", message)
    assert not list(tmp_path.glob("out*"))
    capsys.readouterr()
    assert evaluate(*arguments(mmau, tmp_path / "out.json", "--audio_dir", tmp_path)) == 1  # all are missing
    message = capsys.readouterr().err
    assert "error: 20 of 20 " in message and message.count(": no audio file") == 20


def test_unwritable_files_are_reported_before_weights_are_loaded(mmau, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(checkpoints, "load_policy", lambda *args: pytest.fail("weights were loaded"))
    (tmp_path / "file").write_text("")
    for flags in (("--out", tmp_path), ("--out", tmp_path / "file" / "out.json"), ("--html", tmp_path)):
        assert evaluate(*arguments(mmau, tmp_path / "out.json", *flags)) == 1
        assert str(flags[1]) in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_questions_that_hold_earlier_predictions(mmau, clean, tmp_path):
    """Keys of an earlier predictions file are replaced, not kept."""
    earlier = {"error": "gone", "samples": ["?"], "completion": "?"}
    records = [record | earlier for record in json.loads(clean.read_text())]
    (tmp_path / "earlier.json").write_text(json.dumps(records))
    flags = ("--data", tmp_path / "earlier.json", "--audio_dir", mmau)
    assert evaluate(*arguments(mmau, tmp_path / "out.json", *flags)) == 0
    assert (tmp_path / "out.json").read_bytes() == clean.read_bytes()


def test_skipped_bad_audio_counts_as_wrong(mmau, broken, clean, tmp_path, monkeypatch, capsys):
    """The other predictions and the number of questions stay as before."""
    monkeypatch.setattr(report, "is_right", lambda question, said: said != "")
    flags = ("--data", broken, "--audio_dir", mmau, "--skip_bad_audio")
    assert evaluate(*arguments(mmau, tmp_path / "out.json", *flags)) == 0
    answered, expected = json.loads((tmp_path / "out.json").read_text()), json.loads(clean.read_text())
    for i, (mine, theirs) in enumerate(zip(answered, expected, strict=True)):
        if i in (2, 4, 19):
            assert mine["error"] and mine["model_prediction"] == mine["model_output"] == mine["completion"] == ""
        else:
            assert mine["completion"] == theirs["completion"] and "error" not in mine
    printed = capsys.readouterr().out
    assert re.search(r"^all .*17/20", printed, re.MULTILINE) and "record 5: " in printed and "3 questions" in printed


def test_long_clips_are_counted_once(mmau, tmp_path, capsys):
    """The tiny model hears 2 s."""
    records = json.loads((mmau / "mmau.json").read_text())[:4]
    soundfile.write(tmp_path / "long.wav", 0.1 * np.sin(np.arange(40_000)), 16_000)
    for record in records[:2]:  # two questions about one clip
        record["audio_id"] = str(tmp_path / "long.wav")
    (tmp_path / "long.json").write_text(json.dumps(records))
    flags = ("--data", tmp_path / "long.json", "--audio_dir", mmau)
    assert evaluate(*arguments(mmau, tmp_path / "out.json", *flags)) == 0
    note = "1 of 3 clips are longer than 2 s: the model hears their first 2 s\n"
    assert capsys.readouterr().out.count(note) == 1
    assert evaluate(*arguments(mmau, tmp_path / "out.json", "--limit", 2)) == 0
    assert "longer than" not in capsys.readouterr().out


def test_a_predictions_file_has_one_owner(mmau, tmp_path, monkeypatch, capsys):
    """A second evaluation of one of its files is refused before weights are loaded. Nothing of the first changes."""
    monkeypatch.setattr(checkpoints, "load_policy", lambda *args: pytest.fail("weights were loaded"))
    run = tmp_path / "run"
    for step in (1, 2):
        shutil.copytree(mmau / "model", run / f"step_00000{step}")
    of_run = ["--ckpt", run, *arguments(mmau, "none")[2:]]
    of_run = [flag for flag in of_run if flag not in ("--out", "none")]
    for name, flags in {
        "new/p.json": arguments(mmau, tmp_path / "new" / "p.json"),
        "run/step_000001/mmau_predictions.json": of_run,
    }.items():
        out, before = tmp_path / name, set(tmp_path.rglob("*"))
        with another_owner(f"{out}.owner.json"):
            Path(f"{out}.partial.jsonl").write_text("theirs")
            assert evaluate(*flags) == 1
            line = f"eval_mmau.py: error: {out}.owner.json: another job (process "
            assert capsys.readouterr().err.splitlines()[-1].startswith(line)
            assert Path(f"{out}.partial.jsonl").read_text() == "theirs"
            Path(f"{out}.partial.jsonl").unlink()
        assert set(tmp_path.rglob("*")) == before


# ---- a run's checkpoints ----


def test_a_checkpoint_that_training_removes_meanwhile_does_not_stop_the_others(mmau, tmp_path, monkeypatch, capsys):
    """With --keep_last, a run removes its older checkpoints, here once the first one is evaluated."""
    for step in (1, 2):
        shutil.copytree(mmau / "model", tmp_path / "run" / f"step_00000{step}")
    write = eval_mmau.write_predictions

    def write_and_remove(*args):
        write(*args)
        shutil.rmtree(tmp_path / "run" / "step_000001", ignore_errors=True)

    monkeypatch.setattr(eval_mmau, "write_predictions", write_and_remove)
    flags = arguments(mmau, "none", "--ckpt", tmp_path / "run", "--limit", 2)
    assert evaluate(*[flag for flag in flags if flag not in ("--out", "none")]) == 1
    printed = capsys.readouterr()
    assert "1 of 2 checkpoints not evaluated: " in printed.err and "mmau_predictions.json was removed" in printed.err
    assert "best: step_000002" in printed.out


def test_a_run_folder(mmau, tmp_path, batches, capsys):
    """Each checkpoint is evaluated once, and again if its weights or predictions changed; unfinished ones never."""
    run = tmp_path / "run"
    for step in (20, 100):
        shutil.copytree(mmau / "model", run / f"step_{step:06}")
    model, processor = load_policy(str(mmau / "model"), torch.float32, torch.device("cpu"))
    with torch.no_grad():
        model.lm_head.weight.mul_(-1)
    shutil.rmtree(run / "step_000100")
    save_checkpoint(run / "step_000100", model, processor)
    shutil.copytree(mmau / "model", run / "step_000200.unfinished")
    (run / "config.json").write_text('{"heldout": null}')
    flags = ["--ckpt", run, *arguments(mmau, "none")[2:]]
    flags = [flag for flag in flags if flag not in ("--out", "none")]

    def answered():
        del batches[:]
        assert evaluate(*flags) == 0
        return len(batches)

    assert answered() == 2 * 7
    files = [run / f"step_{step:06}" / "mmau_predictions.json" for step in (20, 100)]
    assert answers_in(files[0]) != answers_in(files[1])
    assert not (run / "step_000200.unfinished" / "mmau_predictions.json").exists()
    printed = capsys.readouterr().out
    assert 0 < printed.index("step_000020") < printed.index("step_000100") and "already" not in printed
    whole = [path.read_bytes() for path in files]
    assert answered() == 0 and capsys.readouterr().out.count("already there") == 2
    files[1].write_bytes(whole[1].replace(b"id-7", b"id-8"))
    assert answered() == 7
    os.utime(run / "step_000020" / "model.safetensors")
    assert answered() == 7
    assert [path.read_bytes() for path in files] == whole
    flags += ["--limit", 5]
    assert answered() == 2 * 2 and len(answers_in(files[0])) == 5
    assert [Path(f"{path}.old_2").read_bytes() for path in files] == whole  # each was set aside once before
    assert f"{files[0]}.old_2" in capsys.readouterr().out


def test_a_broken_checkpoint_does_not_hide_the_others(mmau, tmp_path, capsys):
    for step in (1, 2):
        shutil.copytree(mmau / "model", tmp_path / f"step_{step:06}")
    (tmp_path / "step_000001" / "model.safetensors").write_bytes(b"cut off")
    flags = ("--data", mmau / "mmau.json", "--max_new_tokens", 4, "--dtype", "float32")
    assert evaluate("--ckpt", tmp_path, *flags) == 1
    printed = capsys.readouterr()
    assert "best: step_000002" in printed.out and "best: step_000001" not in printed.out
    assert "1 of 2 checkpoints not evaluated" in printed.err and "step_000001" in printed.err


def test_a_run_without_a_checkpoint(mmau, tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text("")
    (tmp_path / "step_000100.unfinished").mkdir()
    assert evaluate("--ckpt", tmp_path, "--data", mmau / "mmau.json") == 1
    assert "no complete checkpoint yet" in capsys.readouterr().err


# ---- question files ----


def test_odd_choices_and_answers(mmau, tmp_path, capsys):
    """Made-up records with MMAU's keys, whose v05.15.25 changed only texts.

    An answer is not literally among the choices, as in both versions; 2 to 8 choices repeat or contain each other.
    """
    clip = "./test-mini-audios/clip-0.wav"
    odd = [
        mmau_record(0, clip, choices=["Rain", "Wind"], answer="(B) Wind"),
        mmau_record(1, clip, choices=["3/4", "4/4", "6/8", "2/4"], answer="4/4"),
        mmau_record(
            2, clip, choices=["dog", "a dog", "Dog", "the dog", "dogs", "dog", "2 dogs", "no dog"], answer="dog"
        ),
        mmau_record(3, clip, choices=["It's off-key.", "It isn't (quite) on key"], answer="It's off-key."),
    ]
    path = mmau / "odd.json"
    path.write_text(json.dumps(odd, indent=2))
    assert evaluate(*arguments(mmau, tmp_path / "out.json", "--data", path)) == 0
    captured = capsys.readouterr()
    assert re.search(r"^all .*/4", captured.out, re.MULTILINE) and "sub_category" in captured.out
    assert f"{path}, record 1: the right answer '(B) Wind' cannot be rewarded: it is not one" in captured.out
    assert [list(r)[: len(odd[0])] for r in json.loads((tmp_path / "out.json").read_text())] == [list(r) for r in odd]


@pytest.mark.parametrize("withheld", [{"answer": None}, {"answer": ""}, None])
def test_withheld_answers_get_predictions_and_no_score(mmau, clean, tmp_path, capsys, withheld):
    records = json.loads((mmau / "mmau.json").read_text())
    records = [r | withheld if withheld else {k: v for k, v in r.items() if k != "answer"} for r in records]
    path = mmau / "withheld.json"
    path.write_text(json.dumps(records))
    assert evaluate(*arguments(mmau, tmp_path / "out.json", "--data", path)) == 0
    assert answers_in(tmp_path / "out.json") == answers_in(clean)
    printed = capsys.readouterr().out
    assert "all " not in printed and "20 questions have no answer" in printed


def test_default_data(tmp_path):
    """The toy's held-out questions for a run, checkpoint or base model of the toy; MMAU for all others."""
    heldout = tmp_path / "toy" / "world" / "heldout.json"
    for name, value in (("toy", str(heldout)), ("real", "/somewhere/my_heldout.json"), ("none", None)):
        (tmp_path / name / "step_000100").mkdir(parents=True)
        (tmp_path / name / "config.json").write_text(json.dumps({"heldout": value}))
        (tmp_path / name / "step_000100" / "config.json").write_text('{"model_type": "qwen2_audio"}')
        for ckpt in (tmp_path / name, tmp_path / name / "step_000100"):
            expected = str(heldout) if name == "toy" else "data/MMAU/mmau-test-mini.json"
            assert eval_mmau.parse_args(["--ckpt", str(ckpt)]).data == expected
    for damaged in ("[]", "7", '{"heldout": 7}', "[" * 100_000):
        (tmp_path / "none" / "config.json").write_text(damaged)
        assert eval_mmau.parse_args(["--ckpt", str(tmp_path / "none")]).data == "data/MMAU/mmau-test-mini.json"
    assert eval_mmau.parse_args(["--ckpt", "some/model"]).data == "data/MMAU/mmau-test-mini.json"


def test_the_error_for_missing_mmau_says_what_to_download(mmau, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert evaluate("--ckpt", mmau / "model") == 1
    message = capsys.readouterr().err
    for text in ("data/MMAU/mmau-test-mini.json", "github.com/Sakshi113/MMAU", "data/MMAU/test-mini-audios/", "--data"):
        assert text in message


# ---- flags ----

BAD_FLAGS = {
    "--silence --shuffle_audio": ["--silence", "--shuffle_audio"],
    "--ablations --silence": ["--ablations", "--silence"],
    "--ablations --shuffle_choices 0": ["--ablations", "--shuffle_choices"],
    "--ablations --samples 4": ["--ablations", "--samples"],
    "--ablations --html x": ["--ablations", "--html"],
    "--ablations --orders 2": ["--ablations", "--orders"],
    "--orders 2 --shuffle_choices 0": ["--orders", "--shuffle_choices"],
    "--orders 2 --samples 4": ["--orders", "--samples"],
    "--orders 2 --html x": ["--orders", "--html"],
    "--orders 2 --check_batching": ["--orders", "--check_batching"],
    "--orders 1": ["--orders", "2"],
    "--write_needs_audio x": ["--write_needs_audio", "--ablations"],
    "--ablations --write_needs_audio x.json --data ./x.json": ["--write_needs_audio", "--data"],
    "--check_batching --samples 4": ["--check_batching", "--samples"],
    "--check_batching --html x": ["--check_batching", "--html"],
    "--check_batching --ablations": ["--check_batching", "--ablations"],
    "--compare a b": ["--compare", "--ckpt"],
    "--data x.json --out ./x.json": ["--data", "--out"],
    "--samples 2 --seed 99999999999": ["--seed"],
    "--temperature 0.5": ["--temperature", "--samples"],
    "--samples 1": ["--samples", "2"],
    "--samples 4 --temperature 0": ["--temperature", "0"],
    "--samples 4 --temperature nan": ["--temperature", "nan"],
    "--batch_size 0": ["--batch_size"],
    "--shuffle_choices -1": ["--shuffle_choices"],
    "--check_batching 0": ["--check_batching"],
    "--check_batching --out ./x.json": ["--check_batching", "--out"],
}


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_contradictory_flags_are_refused_by_name(flags, tmp_path, capsys):
    with pytest.raises(SystemExit):
        eval_mmau.parse_args(["--ckpt", str(tmp_path), *flags.split()])
    message = capsys.readouterr().err.split("error: ")[1]
    assert [name for name in BAD_FLAGS[flags] if name not in message] == []


def test_a_flag_with_its_default_value_counts_as_given(capsys):
    for flags in (["--compare", "a", "b", "--seed", "0"], ["--ckpt", "a", "--merge", "b", "--cuda_graph", "on"]):
        with pytest.raises(SystemExit):
            eval_mmau.parse_args(flags)
        assert f"{flags[-2]} contradict each other" in capsys.readouterr().err
    assert eval_mmau.parse_args(["--ckpt", "a", "--merge", "b", "--dtype", "auto"]).merge == "b"


@pytest.mark.parametrize("flag", eval_mmau.ONE_CHECKPOINT)
def test_flags_that_a_run_folder_does_not_take(flag, tmp_path, capsys):
    (tmp_path / "step_000001").mkdir()
    value = {"shuffle_choices": ["1"], "samples": ["2"], "orders": ["2"], "html": ["x"], "out": ["x"]}.get(flag, [])
    with pytest.raises(SystemExit):
        eval_mmau.parse_args(["--ckpt", str(tmp_path), f"--{flag}", *value])
    assert f"--{flag} needs one checkpoint" in capsys.readouterr().err


def test_check_batching(mmau, tmp_path, monkeypatch, capsys):
    flags = [flag for flag in arguments(mmau, "none") if flag not in ("--out", "none")]
    before = sorted(mmau.rglob("*"))
    assert evaluate(*flags, "--check_batching", 8) == 0
    assert "8 questions in batches of 3 and one by one, float32 on cpu: 0 predictions differ" in capsys.readouterr().out
    original = answering.answer_questions

    def answer(*args, batch_size, **options):
        answers = original(*args, batch_size=batch_size, **options)
        return [["other"], *answers[1:-1], [answers[-1][0] + " "]] if batch_size == 1 else answers

    monkeypatch.setattr(answering, "answer_questions", answer)
    assert evaluate(*flags, "--check_batching") == 0
    printed = capsys.readouterr().out
    assert "20 questions" in printed and "1 predictions differ, 2 whole completions" in printed
    assert "different predictions: id-0\n" in printed
    assert sorted(mmau.rglob("*")) == before


def test_compare_loads_no_model(clean, capsys, monkeypatch):
    monkeypatch.setattr(eval_mmau, "setup_distributed", lambda: pytest.fail("not needed"))
    assert evaluate("--compare", clean, clean) == 0
    assert "McNemar" in capsys.readouterr().out
    assert evaluate("--compare", clean, "none.json") == 1
    assert "none.json" in capsys.readouterr().err


def test_html_shows_what_was_heard(mmau, tmp_path):
    page = mmau / "pages" / "a.html"
    assert evaluate(*arguments(mmau, tmp_path / "out.json", "--html", page)) == 0
    clips = re.findall(r'src="([^"]*)"', page.read_text())
    assert clips == [f"../test-mini-audios/clip-{i}.wav" for i in range(QUESTIONS)]
    assert evaluate(*arguments(mmau, tmp_path / "out.json", "--shuffle_audio", "--html", page)) == 0
    other = re.findall(r'src="([^"]*)"', page.read_text())
    assert sorted(other) == sorted(clips) and not any(a == b for a, b in zip(clips, other))
