"""TensorBoard's log, read back with TensorBoard's own reader and renderer; failures of its writer."""

import re
import shutil
import sys
import threading
from html import unescape

import pytest
import torch.distributed as dist
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.plugin_util import markdown_to_safe_html
from tensorboard.util.tensor_util import make_ndarray

import grpo_aqa
from infra.errors import InputError
from training.tensorboard import TensorBoard, require_tensorboard


@pytest.fixture
def board(one_rank, tmp_path, monkeypatch):
    """A function that starts a log in tmp_path, or continues it after a step."""
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)  # restored after the test

    def board(step=0):
        args = grpo_aqa.parse_args(["--tensorboard", f"--out={tmp_path}"])
        return TensorBoard(args, {"lr": 0.5, "model": "a_b"}, step)

    return board


def read(out):
    """Read a run's log: tag -> [(step, value)]."""
    log = EventAccumulator(str(out / "tensorboard"), {"tensors": 0}).Reload()  # 0: keep all steps
    return {
        tag: [(event.step, make_ndarray(event.tensor_proto).item()) for event in log.Tensors(tag)]
        for tag in log.Tags()["tensors"]
    }


def test_metrics_are_grouped_and_settings_are_shown(board, tmp_path):
    record = {"step": 7, "lr": 0.5, "kl": None, "reward": 1.5, "accuracy": 1.0, "equal_reward_groups": 0.25}
    record |= {"truncated_completions": 0.75, "heldout_questions": 9, "seconds": 2.5, "seconds_heldout": 4.0}
    board().log_metrics(record)
    log = read(tmp_path)
    [(step, settings)] = log.pop("settings/text_summary")
    assert step == 1 and '"lr": 0.5,\n  "model": "a_b"' in settings.decode()
    expected = {"training/lr": 0.5, "reward/reward": 1.5, "reward/accuracy": 1.0, "groups/equal_reward_groups": 0.25,
                "completion/truncated_completions": 0.75, "heldout/heldout_questions": 9, "seconds/seconds": 2.5,
                "seconds/seconds_heldout": 4.0}  # fmt: skip
    assert log == {tag: [(7, value)] for tag, value in expected.items()}


def test_completions_are_shown_as_they_are(board, tmp_path):
    """TensorBoard renders Markdown and removes unsafe HTML. Its page has the texts and numbers of completions.jsonl."""
    texts = ["<answer>a|b</answer>", "", "*two*\n_lines_ of `text`", "漢字 <script>x</script> &amp; [a](b) \\| #"]
    record = {"step": 3, "id": "q", "prompt": "1. What?\n    ['a', 'b']", "answer": "**a**", "completions": texts,
              "rewards": [2.0, 0.20000000298, 0.0, 1.0], "advantages": [-0.9352, 0.0, 0.5, 1e-4]}  # fmt: skip
    board().log_completions([record, record | {"prompt": "Who?"}])
    [(step, written)] = read(tmp_path)["completions/text_summary"]
    page = markdown_to_safe_html(written)
    paragraphs = [
        " ".join(unescape(re.sub("<.*?>", "", part)).split()) for part in re.findall("<p>(.*?)</p>", page, re.S)
    ]
    assert paragraphs == [f"Question: {asked} Answer: **a**" for asked in ("1. What? ['a', 'b']", "Who?")]
    cells = [unescape(cell) for cell in re.findall("<t[hd]>(.*?)</t[hd]>", page, re.S)]
    numbers = [["2", "-0.9352"], ["0.2", "0"], ["0", "0.5"], ["1", "0.0001"]]
    table = [["completions", "rewards", "advantages"], *([text, *row] for text, row in zip(texts, numbers))]
    assert step == 3 and cells == 2 * sum(table, [])


def test_a_continued_log_has_each_step_once(board, tmp_path):
    for start, steps, value in ((0, range(1, 6), 1.0), (3, range(4, 7), 2.0), (3, range(4, 8), 3.0)):
        log = board(start)
        for step in steps:
            log.log_metrics({"step": step, "loss": value})
    assert read(tmp_path)["training/loss"] == [(step, 1.0 if step < 4 else 3.0) for step in range(1, 8)]
    assert [step for step, _ in read(tmp_path)["settings/text_summary"]] == [1, 4]


def test_a_failure_is_one_line(board, tmp_path, capfd):
    """The writer's thread, which meets the error, prints no traceback. Other threads still do."""
    tracebacks = []
    threading.excepthook = tracebacks.append
    log = board()
    log.log_metrics({"step": 1, "loss": 1.0})
    worker = log.writer.file_writer.event_writer._async_writer._worker
    shutil.rmtree(tmp_path / "tensorboard")
    for step in (2, 3):
        log.log_metrics({"step": step, "loss": 1.0})
    worker.join()
    (tmp_path / "tensorboard").write_text("a file")  # so the log cannot even start
    board().log_metrics({"step": 4, "loss": 1.0})
    said = capfd.readouterr()
    lines = said.out.splitlines()
    assert len(lines) == 2 and not tracebacks and not said.err
    assert all(re.fullmatch("--tensorboard: .*tensorboard.*; the run continues without it", line) for line in lines)
    other = threading.Thread(target=lambda: 1 / 0)
    other.start()
    other.join()
    assert [args.exc_type for args in tracebacks] == [ZeroDivisionError]


def test_other_ranks_write_nothing(board, tmp_path, monkeypatch):
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    board().log_metrics({"step": 1, "loss": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_one_line(monkeypatch):
    require_tensorboard()
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard")
    monkeypatch.setitem(sys.modules, "tensorboard", None)  # as if it were not installed
    with pytest.raises(InputError, match=r"^--tensorboard needs a package: pip install --upgrade tensorboard \(.+\)$"):
        require_tensorboard()
