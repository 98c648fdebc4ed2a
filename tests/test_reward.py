"""Check the rewards on a table of completions, and MMAU's scoring rule on a table of predictions."""

import random
import re
import string
from dataclasses import replace

import pytest

from data import Question
from reward import (
    REWARDS,
    _words,
    accuracy_reward,
    extract_answer,
    format_reward,
    mmau_match,
    open_match,
    open_reward,
    prediction,
)

# completion, extracted answer, accuracy reward if "dog" is right, format rewards of `answer` and of `think`
COMPLETIONS = [
    ("<answer>dog</answer>", "dog", 1, 1, 0),
    ("<answer>cat</answer>", "cat", 0, 1, 0),
    ("<answer>a dog</answer>", "a dog", 0, 1, 0),
    ("<answer>dog.</answer>", "dog.", 0, 1, 0),
    ("<answer>'dog'</answer>", "'dog'", 0, 1, 0),
    ("<answer>dog, cat</answer>", "dog, cat", 0, 1, 0),
    # no tags: the whole stripped text is the answer
    ("dog", None, 1, 0, 0),
    ("  dog\n", None, 1, 0, 0),
    ("It is a dog.", None, 0, 0, 0),
    ("", None, 0, 0, 0),
    (" \n ", None, 0, 0, 0),
    # white space inside the tags; an answer broken over lines is not extracted
    ("<answer> dog </answer>", "dog", 1, 1, 0),
    ("<answer>\tdog\u00a0\u3000</answer>", "dog", 1, 1, 0),
    ("<answer>dog\r</answer>", "dog", 1, 1, 0),
    ("<answer>dog\u2028</answer>", "dog", 1, 1, 0),
    ("<answer>\ndog\n</answer>", None, 0, 1, 0),
    ("<answer>dog\n</answer>", None, 0, 1, 0),
    ("<answer>\r\ndog</answer>", None, 0, 1, 0),
    ("<answer></answer>", "", 0, 1, 0),
    ("<answer>   </answer>", "", 0, 1, 0),
    ("<answer>\n</answer>", None, 0, 1, 0),
    # text around the tags
    ("The answer is <answer>dog</answer>", "dog", 1, 0, 0),
    ("<answer>dog</answer>.", "dog", 1, 0, 0),
    ("<answer>dog</answer>\n", "dog", 1, 0, 0),
    (" <answer>dog</answer>", "dog", 1, 0, 0),
    ("Well,\nit barks:\n<answer>dog</answer>\nI think.", "dog", 1, 0, 0),
    # tags twice, nested or swapped
    ("<answer>dog</answer><answer>cat</answer>", "dog", 1, 1, 0),
    ("<answer>cat</answer>\n<answer>dog</answer>", "cat", 0, 1, 0),
    ("<answer>cat\n<answer>dog</answer>", "dog", 1, 1, 0),
    ("<answer>\ncat</answer><answer>dog</answer>", "dog", 1, 1, 0),
    ("<answer><answer>dog</answer></answer>", "<answer>dog", 0, 1, 0),
    ("<answer>dog</answer></answer>", "dog", 1, 1, 0),
    ("</answer><answer>dog</answer>", "dog", 1, 0, 0),
    ("</answer>dog<answer>", None, 0, 0, 0),
    # missing, truncated or misspelled tags
    ("<answer>", None, 0, 0, 0),
    ("<answer>dog", None, 0, 0, 0),
    ("dog</answer>", None, 0, 0, 0),
    ("<answer>dog</answer", None, 0, 0, 0),
    ("<answer>dog<answer>", None, 0, 0, 0),
    ("<answer</answer>", None, 0, 0, 0),
    ("<answer>dog</ans", None, 0, 0, 0),
    ("<answer >dog</answer>", None, 0, 0, 0),
    ("<answer/>dog", None, 0, 0, 0),
    # case counts, in the answer and in the tags
    ("<answer>Dog</answer>", "Dog", 0, 1, 0),
    ("<ANSWER>dog</ANSWER>", None, 0, 0, 0),
    ("<Answer>dog</answer>", None, 0, 0, 0),
    ("<Think>woof</Think><answer>dog</answer>", "dog", 1, 0, 0),
    # with thinking
    ("<think>woof</think><answer>dog</answer>", "dog", 1, 0, 1),
    ("<think>woof</think>\n<answer>dog</answer>", "dog", 1, 0, 1),
    ("<think>\nIt barks,\n\nso:\n</think> \t\r\n\n<answer>dog</answer>", "dog", 1, 0, 1),
    ("<think>woof</think>\u00a0<answer>dog</answer>", "dog", 1, 0, 1),
    ("<think>woof</think>\u200b<answer>dog</answer>", "dog", 1, 0, 0),
    ("<think></think><answer></answer>", "", 0, 0, 1),
    ("<think>woof</think><answer>\ndog\n</answer>", None, 0, 0, 1),
    ("<think>woof</think>, so <answer>dog</answer>", "dog", 1, 0, 0),
    ("<think>woof</think><answer>dog</answer> ", "dog", 1, 0, 0),
    ("\n<think>woof</think><answer>dog</answer>", "dog", 1, 0, 0),
    ("<think>woof<answer>dog</answer>", "dog", 1, 0, 0),
    ("woof</think><answer>dog</answer>", "dog", 1, 0, 0),
    ("<answer>dog</answer><think>woof</think>", "dog", 1, 0, 0),
    ("<answer>dog</answer><think>woof</think><answer>dog</answer>", "dog", 1, 1, 0),
    ("<think>woof</think><think>wuff</think><answer>dog</answer>", "dog", 1, 0, 1),
    ("<think>woof</think> or so </think><answer>dog</answer>", "dog", 1, 0, 1),
    ("<think><answer>cat</answer></think><answer>dog</answer>", "cat", 0, 0, 1),
    ("<think>woof</think><answer>dog</answer><answer>cat</answer>", "dog", 1, 0, 1),
    ("<think>woof</think><answer>dog", None, 0, 0, 0),
    ("<think>woof</think>", None, 0, 0, 0),
    ("<think>wo", None, 0, 0, 0),
]


@pytest.mark.parametrize("completion, extracted, accuracy, answer_form, think_form", COMPLETIONS)
def test_rewards(completion, extracted, accuracy, answer_form, think_form):
    """The extracted answer and the rewards of each completion. The template `direct` asks for no form."""
    forms = [format_reward(completion, template) for template in ("answer", "think", "direct")]
    rewards = [accuracy_reward(completion, "dog"), *forms]
    assert extract_answer(completion) == extracted
    assert rewards == [accuracy, answer_form, think_form, 1.0]
    assert all(type(reward) is float for reward in rewards)


@pytest.mark.parametrize(
    "answer, completion, accuracy",
    [
        ("c++ (fast)", "<answer>c++ (fast)</answer>", 1),
        ("$5.00 [net]^", "$5.00 [net]^", 1),
        (".*", "<answer>dog</answer>", 0),
        (r"\w+", "<answer>dog</answer>", 0),
        ("a|b", "<answer>a</answer>", 0),
        ("<b>", "<answer><b></answer>", 1),
        ("犬の声", "<answer> 犬の声 </answer>", 1),
        ("caf\u00e9", "<answer>cafe\u0301</answer>", 1),
        ("cafe\u0301", "<answer>caf\u00e9</answer>", 1),
        ("cafe", "<answer>caf\u00e9</answer>", 0),
        ("\u2460", "<answer>1</answer>", 0),  # NFKC would make them equal
        ("Straße", "<answer>STRASSE</answer>", 0),
        (" dog\n", "<answer>dog</answer>", 1),
        ("a  dog", "<answer>a dog</answer>", 0),
        ("1/2", "<answer>0.5</answer>", 0),
        ("", "<answer> </answer>", 1),
        ("one\ntwo", "one\ntwo\n", 1),
        ("one\ntwo", "<answer>one\ntwo</answer>", 1),
        ("one\ntwo", "<answer>\none\ntwo</answer>.", 1),
        ("one\ntwo", "<answer>one two</answer>", 0),
        ("two", "<answer>\ntwo</answer>", 0),
    ],
)
def test_accuracy_compares_literally(answer, completion, accuracy):
    """Exact equality of the stripped texts in NFC: no pattern, no folding of case, no arithmetic.

    The paper's expression reads one line. An answer of several lines is read across lines, any other as in the paper.
    """
    assert accuracy_reward(completion, answer) == accuracy


def test_a_prediction_is_spelled_like_its_choice():
    choices = ["cafe\u0301", "th\u00e9", "one\ntwo", " a dog"]
    for completion, said in [
        ("<answer>caf\u00e9</answer>", choices[0]),
        ("the\u0301", choices[1]),
        ("<answer>one\ntwo</answer>", choices[2]),
        ("<answer>a dog</answer>", choices[3]),
        ("<answer>A dog</answer>", "A dog"),
        ("<answer>\na dog\n</answer>", "<answer>\na dog\n</answer>"),  # as without a choice of two lines
    ]:
        assert prediction(completion, choices) == said


@pytest.mark.parametrize("template", ["", "Answer", "thinking", None])
def test_unknown_template(template):
    """An unknown template is an error, not a reward of 0."""
    with pytest.raises(ValueError, match="template"):
        format_reward("<answer>dog</answer>", template)


def test_rewards_equal_the_papers_expressions():
    """On random texts, the extracted answer and the format rewards equal the paper's regular expressions."""
    pieces = ["<answer>", "</answer>", "<think>", "</think>", "<answer>", "</answer>", "</think><answer>", "\n", " "]
    pieces += ["\r", "\t", "\u2028", "dog", "a", "<", ">", "/", "<ans", "wer>", "</answer", "answer>", "<think", "<ANS"]
    rng, seen = random.Random(0), {"extracted": 0, "answer": 0, "think": 0}
    for _ in range(20_000):
        text = "".join(rng.choices(pieces, k=rng.randrange(9)))
        text = rng.choice(["", "<answer>", "<think>"]) + text + rng.choice(["", "</answer>"])
        match = re.search(r"<answer>(.*?)</answer>", text)
        assert extract_answer(text) == (match and match.group(1).strip()), repr(text)
        assert prediction(text) == (match.group(1) if match else text).strip(), repr(text)
        answer_form = re.fullmatch(r"<answer>.*?</answer>", text, re.DOTALL) is not None
        think_form = re.fullmatch(r"<think>.*?</think>\s*<answer>.*?</answer>", text, re.DOTALL) is not None
        assert format_reward(text, "answer") == answer_form, repr(text)
        assert format_reward(text, "think") == think_form, repr(text)
        for kind, found in zip(seen, (match, answer_form, think_form), strict=True):
            seen[kind] += bool(found)
    assert min(seen.values()) > 500


@pytest.mark.parametrize(
    "text, answer_form, think_form",
    [
        ("<answer>" * 120_000, 0, 0),
        ("</answer>" * 120_000, 0, 0),
        ("<answer>\n" * 120_000 + "</answer>", 1, 0),
        ("<think>" * 150_000 + "</answer>", 0, 0),
        ("<think>" + "</think>" * 120_000, 0, 0),
        ("</think><answer>" * 60_000, 0, 0),
        ("<think>" + "</think><answer>" * 60_000, 0, 0),
        ("<think>" + "</think>\n<answer>\n" * 60_000 + "</answer>", 0, 1),
        ("<think></think>" + " " * 1_000_000 + "</answer>", 0, 0),
        ("<think>" + ("</think>" + "\n" * 1000) * 1000 + "</answer>", 0, 0),
        ("<" * 1_000_000, 0, 0),
        ("\n" * 1_000_000, 0, 0),
    ],
    ids=lambda value: repr(value[:40]) if isinstance(value, str) else str(value),
)
def test_a_megabyte_takes_linear_time(text, answer_form, think_form):
    """Degenerate completions of 1 MB finish; a backtracking expression would take quadratic time."""
    assert extract_answer(text) is None and accuracy_reward(text, "dog") == 0
    assert (format_reward(text, "answer"), format_reward(text, "think")) == (answer_form, think_form)
    assert not mmau_match("dog", text, ["dog", "cat"])


# ---- MMAU ----

PETS = ["a dog", "a cat", "a big cat"]
# right answer, prediction, choices, whether MMAU counts the prediction as right
MATCHES = [
    ("dog", "dog", ["dog", "cat"], True),
    ("dog", "cat", ["dog", "cat"], False),
    ("dog", "DOG!", ["Dog", "Cat"], True),
    ("dog", "(dog)", ["cat", "dog"], True),
    ("dog", "I clearly hear a dog barking.", ["dog", "cat"], True),
    ("dog", "dogs", ["dog", "cat"], False),
    ("dog", "hotdog", ["dog", "cat"], False),
    ("dog", "dog or cat", ["dog", "cat"], False),
    ("dog", "a dog, not a cat", ["dog", "cat"], False),
    ("dog", "", ["dog", "cat"], False),
    ("dog", " ?! ", ["dog", "cat"], False),
    ("dog", "<answer>dog</answer>", ["dog", "cat"], True),
    ("dog", "dog-cat", ["dog", "cat"], False),
    # words and their order
    ("loud then quiet", "quiet then loud", ["loud then quiet", "always loud"], True),
    ("loud then quiet", "quiet and loud", ["loud then quiet", "always loud"], False),
    ("loud then quiet", "loud then quiet", ["loud then quiet", "quiet then loud"], True),
    ("loud then quiet", "quiet then loud", ["loud then quiet", "quiet then loud"], True),
    ("dog", "dog dog", ["dog", "cat"], True),
    # choices that share words, contain each other or repeat
    ("a dog", "a dog", PETS, True),
    ("a dog", "dog", PETS, False),
    ("a dog", "a big dog", PETS, False),
    ("a cat", "a cat", PETS, True),
    ("a cat", "a big cat", PETS, False),
    ("a big cat", "a big cat", PETS, True),
    ("a big cat", "a cat", PETS, False),
    ("dog", "dog", ["dog", "dog", "cat"], True),
    ("dog", "dog", ["Dog!", "dog", "cat"], True),
    ("rising", "rising", ["falling", "rising and falling", "rising"], True),
    ("rising", "rising and falling", ["falling", "rising and falling", "rising"], False),
    # two to eight choices, in any order
    ("h", "h", ["a", "b", "c", "d", "e", "f", "g", "h"], True),
    ("h", "h", ["h", "g", "f", "e", "d", "c", "b", "a"], True),
    ("h", "h, not a", ["a", "b", "c", "d", "e", "f", "g", "h"], False),
    ("h", "(C) h", ["a", "b", "c", "d", "e", "f", "g", "h"], False),
    ("no", "no", ["yes", "no"], True),
    # numbers
    ("2", "2", ["2", "12", "20"], True),
    ("2", "12", ["2", "12", "20"], False),
    ("2", "two", ["2", "12", "20"], False),
    ("3.5 Hz", "3,5 hz", ["3.5 Hz", "4 Hz"], True),
    ("3.5 Hz", "35 Hz", ["3.5 Hz", "4 Hz"], False),
    ("1:00", "1:00 to 2:00", ["1:00", "2:00"], False),
    # apostrophe and hyphen separate words; underscore and letters of any script do not
    ("it's a bell", "it s a bell", ["it's a bell", "it's a drum"], True),
    ("it's a bell", "its a bell", ["it's a bell", "it's a drum"], False),
    ("hip-hop", "hip hop", ["hip-hop", "pop"], True),
    ("hip-hop", "hiphop", ["hip-hop", "pop"], False),
    ("dog_bark", "dog bark", ["dog_bark", "cat_meow"], False),
    ("dog_bark", "Dog_Bark", ["dog_bark", "cat_meow"], True),
    ("Café", "CAFÉ", ["Café", "Bar"], True),
    ("Café", "cafe", ["Café", "Bar"], False),
    ("犬", "犬!", ["犬", "猫"], True),
    ("犬", "犬の声", ["犬", "猫"], False),
    # an answer that is not literally a choice, or has no words
    ("Dogs", "dogs", ["dog", "cat"], True),
    ("a dog", "a dog", ["dog", "cat"], True),
    ("?", "anything", ["?", "!"], True),
    ("?", "?", ["?", "!"], False),
    ("?", "dog", ["?", "dog"], False),
    ("dog", "dog", [], True),
]


@pytest.mark.parametrize("answer, predicted, choices, right", MATCHES)
def test_mmau_match(answer, predicted, choices, right):
    """A right prediction has every word of the answer, and no word that only other choices have."""
    assert mmau_match(answer, predicted, choices) is right


def test_mmau_match_equals_the_rule_spelled_out():
    """On random choices and predictions, the match equals the rule written out word by word."""

    def words(text):
        return set("".join(c if c.isalnum() or c == "_" else " " for c in text.lower()).split(" ")) - {""}

    def rule(answer, predicted, choices):
        if not words(predicted) or any(word not in words(predicted) for word in words(answer)):
            return False
        wrong = [choice for choice in choices if words(choice) != words(answer)]
        return not any(word in words(choice) - words(answer) for choice in wrong for word in words(predicted))

    pieces = ["dog", "Dog", "dogs", "cat", "a", "it's", "hip-hop", "x_y", "É", "é", "犬", "2", "20", "3.5", "?", ""]
    pieces += ["e\u0301", "İ", "ß", "SS", "²", "½", "٣", "\u200b", "\xa0", "🎵"]
    rng, outcomes = random.Random(0), []
    for _ in range(20_000):
        choices = [" ".join(rng.choices(pieces, k=rng.randint(1, 3))) for _ in range(rng.randint(2, 8))]
        answer = rng.choice(choices + ["a dog"])
        extra = rng.choices(pieces, k=rng.randrange(3))
        predicted = rng.choice([" ", ", ", "-"]).join([rng.choice([answer, answer.upper(), *choices, ""])] + extra)
        outcomes.append(mmau_match(answer, predicted, choices))
        assert outcomes[-1] is rule(answer, predicted, choices), (answer, predicted, choices)
    assert 4_000 < sum(outcomes) < 16_000


def test_words_equal_the_words_that_mmau_finds():
    """_words finds the same words as MMAU's \\b\\w+\\b, for every character between two letters."""
    text = " ".join(f"a{chr(code)}b" for code in range(0x20000) if not 0xD800 <= code < 0xE000)
    assert _words(text) == set(re.findall(r"\b\w+\b", text.lower()))


# ---- open answers ----


def squad(text: str) -> str:
    """Normalize an answer as SQuAD's evaluation script does."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def test_open_answers_compare_as_squads_do():
    """For all texts of words, articles, spaces and the punctuation around them."""
    pieces = ["a ", "The ", "an ", "dog", "Dog ", "two ", " bell", ". ", ", ", '"', "( ", "! ", "\n"]
    rng, texts = random.Random(0), set()
    while len(texts) < 300:
        texts.add("".join(rng.choices(pieces, k=rng.randint(1, 4))))
    texts = sorted(
        text for text in texts if squad(text) and "(" not in text.strip("( ") and '"' not in text.strip('" ')
    )
    pairs = [(one, other) for one in texts for other in texts]
    assert len(texts) > 100 and 0 < sum(squad(one) == squad(other) for one, other in pairs) < len(pairs)
    for one, other in pairs:
        assert open_match([one], other) == (squad(one) == squad(other)), (one, other)


@pytest.mark.parametrize(
    "answer, same, others",
    [
        ("a dog", ["Dog", "the dog.", " A  DOG ", "dog!"], ["dogs", "dog bark", "", "a"]),
        ("-3 dB", ["-3 db"], ["3 dB", "+3 dB"]),
        ("C#", ["c#", "C#."], ["C"]),
        ("0.5", ["0.5."], ["0,5", "05", "5"]),
        ("café", ["Cafe\u0301"], ["cafe"]),
        ("A", ["a"], ["the", ""]),  # the note
        ("dog cat", ["dog cat"], ["cat dog"]),
        ("“yes”", ["yes", "'Yes'"], ["yes no"]),
    ],
)
def test_open_answers(answer, same, others):
    assert all(open_match(["x", answer], text) for text in same)
    assert not any(open_match(["x", answer], text) for text in others)
    assert open_reward(f"<answer>{same[0]}</answer>", ["x", answer]) == 1.0


def test_the_accuracy_of_a_question_with_choices_stays_exact():
    question = Question("0", "a.wav", "?", ["a dog", "a bell"], "a dog")
    reward = REWARDS["accuracy"]
    assert [reward(text, question, "direct") for text in ("a dog", "dog", "A dog")] == [1.0, 0.0, 0.0]
    question = replace(question, choices=[], also=["hound"])
    assert [reward(text, question, "direct") for text in ("dog", "A hound.", "cat")] == [1.0, 1.0, 0.0]
