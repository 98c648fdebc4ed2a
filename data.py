"""Questions about audio: load question files, build prompts, share the questions among the ranks.

A question file is a JSON list, JSON lines or CSV. Your own records have the fields audio, question, choices, answer.
questions/fields.py has the field names of MMAU, MMAR, MMSU, AVQA and other data sets, whose files load as they are.
"""

import hashlib
import os
from collections import defaultdict
from dataclasses import dataclass, field, replace

import numpy as np

from infra.audio import load_audio as load_audio  # part of this file's interface
from infra.errors import InputError, list_problems
from questions.fields import LeftOut, present, read_fields, shown
from questions.reading import Placed, find_records, require
from reward import in_nfc

AUDIO_TOKEN = "<|AUDIO|>"  # the chat markup puts the clip in its place

# The paper's released checkpoints were trained with exactly these texts. {choices} looks like a Python list.
OPTIONS = " Please choose the answer from the following options: {choices}."  # left out if a question has no choices
_ASKED = "{question}" + OPTIONS
TEMPLATES = {
    "direct": _ASKED,
    "answer": _ASKED + " Output the final answer in <answer> </answer>.",
    "think": _ASKED + " Output the thinking process in <think> </think> and final answer in <answer> </answer>.",
}


@dataclass
class Question:
    id: str
    audio: str  # path of the clip
    question: str
    choices: list[str]  # empty: an open question
    answer: str | None  # one of the choices, or an open question's answer; None if the file withholds it
    task: str | None = None
    difficulty: str | None = None
    sub_category: str | None = None
    category: str | None = None
    spelled: list[str] = field(default_factory=list)  # each choice as predictions files write it; empty: as in choices
    also: list[str] = field(default_factory=list)  # further right answers of an open question
    place: str = field(default="", compare=False)  # file and line of the record, for messages: "FILE, line 3"

    @property
    def known_answer(self) -> str:
        """Return the answer of a question that must have one."""
        assert self.answer is not None, f"{self.place}: the answer is withheld"
        return self.answer


def build_prompt(question: Question, template: str) -> str:
    """Return the user's text for a question, without chat markup. Raises InputError for an unknown template."""
    if template not in TEMPLATES:
        raise InputError(f"unknown template {template!r}; choose from {', '.join(TEMPLATES)}")
    text = TEMPLATES[template] if question.choices else TEMPLATES[template].replace(OPTIONS, "")
    return text.format(question=question.question, choices=_shown_choices(question.choices))


def _shown_choices(choices: list[str]) -> str:
    """Format choices like the repr of a Python list, but without its escapes.

    The model must write the text of a choice. repr would show another text: it escapes, for example, a backslash, a
    line end and a zero-width joiner.
    """
    quotes = (repr(choice)[0] for choice in choices)
    return f"[{', '.join(quote + choice + quote for quote, choice in zip(quotes, choices))}]"


def shuffle_choices(question: Question, *seeds: int) -> Question:
    """Return the question with its choices in a random order, given by the seeds."""
    order = np.random.default_rng(seeds).permutation(len(question.choices)).tolist()
    spelled = [question.spelled[i] for i in order] if question.spelled else []
    return replace(question, choices=[question.choices[i] for i in order], spelled=spelled)


def target_text(answer: str, template: str) -> str:
    """Return the right completion: the bare answer for template `direct`, <answer>...</answer> for `answer`.

    Strips the answer, as the rewards do. Raises InputError for `think`: question files have no thoughts to learn from.
    """
    if template == "think":
        raise InputError("template 'think' has no target to imitate: question files have answers without thoughts")
    return answer.strip() if template == "direct" else f"<answer>{answer.strip()}</answer>"


# ---- question files ----


def load_questions(path: str, audio_dir: str | None = None) -> list[Question]:
    """Read a question file of any known format. Raises one InputError for all malformed records.

    Relative audio paths start from `audio_dir`, or else from the folder of the question file. Opens no audio.
    """
    return require(find_questions(path, audio_dir))


def find_questions(path: str, audio_dir: str | None = None) -> tuple[list[Question], list[str]]:
    """Read the usable questions of a file, and list a problem for each unusable record.

    Raises InputError if the file has no records.
    """
    records, problems = find_records(path)
    questions, more = find_questions_in(records, audio_dir or os.path.dirname(path))
    return share_answers(questions), problems + more


def find_questions_in(records: Placed, folder: str) -> tuple[list[Question], list[str]]:
    """Parse records of find_records, with audio paths relative to `folder`. List a problem for each unusable record.

    Leaves out questions about several clips and MMAU-Pro's open questions, and prints how many and which. Raises
    InputError if no other question is in the file.
    """
    questions, problems, places = [], [], {}  # places: id -> place
    left_out: dict[str, list[str]] = {}  # reason -> places
    for place, record in records:
        try:
            question = parse_record(record, place, folder)
        except LeftOut as reason:
            left_out.setdefault(str(reason), []).append(place)
            continue
        except InputError as error:
            problems.append(str(error))
            continue
        first = places.setdefault(question.id, place)
        if first != place:
            problems.append(f"{place}: has the id {shown(question.id)}, the same as {first}; give it another id")
            continue
        # A published benchmark is scored as it is: MMAU's rule does not need the answer among the choices.
        if not ("audio_id" in present(record) or question.answer is None or answer_is_a_choice(question)):
            answer, choices = shown(question.answer), shown(question.choices)
            problems.append(f"{place}: answer {answer} is not among the choices {choices}{_almost(question)}")
            continue
        questions.append(question)
    texts = [
        list_problems(own, f"{len(own)} of {len(records)} questions are left out: {why}")
        for why, own in left_out.items()
    ]
    if texts and not questions and not problems:
        raise InputError("\n".join(texts))
    print(*texts, sep="\n", end="\n" if texts else "", flush=True)
    return questions, problems


def share_answers(questions: list[Question]) -> list[Question]:
    """Give open questions with the same clip and text each other's answers, as `also`. Returns the same questions.

    Clotho-AQA asks each question three times, with the answers of three people.
    """
    opened = [q for q in questions if not q.choices and q.answer is not None]
    answers = defaultdict(list)
    for q in opened:
        answers[q.audio, q.question] += [q.answer, *q.also]
    for q in opened:
        q.also = [answer for answer in dict.fromkeys(answers[q.audio, q.question]) if answer != q.answer]
    return questions


def answer_is_a_choice(question: Question) -> bool:
    """Tell whether the answer is one of the choices, compared in NFC. True for open questions. Needs an answer."""
    return not question.choices or in_nfc(question.known_answer) in map(in_nfc, question.choices)


def _almost(question: Question) -> str:
    """Return a hint if a choice differs from the answer only in case or spaces, else ""."""
    squeezed = "".join(question.known_answer.split()).lower()
    alike = [choice for choice in question.choices if "".join(choice.split()).lower() == squeezed]
    return f"; {alike[0]!r} differs only in case or spaces: correct one of them" if alike else ""


def digest(questions: list[Question]) -> str:
    """Return a hash of the questions, the names of their clips, their choices, answers and order."""
    # `also` only if there is any: the digest of other questions is the same as in older run folders.
    content = [(q.question, os.path.basename(q.audio), q.choices, q.answer, *filter(None, [q.also])) for q in questions]
    return hashlib.sha256(repr(content).encode()).hexdigest()[:16]


def parse_record(record: dict, place: str, folder: str) -> Question:
    """Parse one record of any format. Relative audio paths start from `folder`. Raises InputError, LeftOut."""
    values = read_fields(record, place, folder)
    values["audio"] = os.path.normpath(values["audio"])
    own = present(record)
    name = [str(own[key]) for key in ("source_dataset", "id") if key in own]  # AudioMCQ counts ids in each source
    parsed = Question(id="/".join(name) if "id" in own else place, place=place, **values)
    try:  # JSON's escapes can spell a lone surrogate, half of a character, which UTF-8 cannot encode
        "".join(text for value in vars(parsed).values() for text in value or ()).encode()
    except UnicodeEncodeError as error:
        half = shown(error.object[error.start])
        raise InputError(f"{place}: has half of a character, {half}; write the whole character") from None
    try:
        os.fsencode(parsed.audio)
    except UnicodeEncodeError as error:  # in the locale C, with Python's UTF-8 mode off
        fault = f"the system's encoding of file names, {error.encoding}, lacks characters of {shown(parsed.audio)}"
        raise InputError(f"{place}: {fault}; set PYTHONUTF8=1") from None
    return parsed


# ---- which questions a rank trains on ----


def step_indices(num_questions: int, position: int, prompts_per_rank: int, rank: int, seed: int) -> list[int]:
    """Return the indices of a rank's questions in the next batch, [prompts_per_rank].

    All ranks read one endless stream of epochs. Each epoch is a new shuffle of all questions, given by seed and epoch,
    so every question is used once per epoch, for any number of ranks. A batch takes the next questions of the stream:
    the first prompts_per_rank for rank 0, the following ones for rank 1, and so on. `position` is the number of
    questions that all ranks have taken so far, the only state that a run has to save.
    """
    start, indices = position + rank * prompts_per_rank, []
    for i in range(start, start + prompts_per_rank):
        epoch, offset = divmod(i, num_questions)
        order = np.random.default_rng([seed, epoch]).permutation(num_questions)
        indices.append(int(order[offset]))
    return indices
