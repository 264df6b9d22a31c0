"""The student's move in its text."""

import pytest

from roll_opd.environments.action import ActionParser, ParsedAction

LOOKUP = {0: "Left", 1: "Down", 2: "Right", 3: "Up"}
THINK = r"<think>(.*?)</think>\s*<answer>(.*?)</answer>"
OPTIONAL = r"(?:<think>(.*?)</think>)?\s*<answer>(.*?)</answer>"
NOTHING = ParsedAction(None, "", "")


@pytest.mark.parametrize(
    ("pattern", "text", "expected"),
    [
        (r"<answer>(.*?)</answer>", "<answer>Right</answer>", ParsedAction(2, "Right")),
        (r"<answer>(.*?)</answer>", "so\n<answer>\n rIGHT \n</answer><|im_end|>", ParsedAction(2, "rIGHT")),
        (r"<answer>(.*?)</answer>", "<answer>Up</answer> or <answer>Down</answer>", ParsedAction(3, "Up")),
        (r"<answer>(.*?)</answer>", "<answer>Forward</answer>", ParsedAction(None, "Forward")),
        (r"<answer>(.*?)</answer>", "<answer></answer>", ParsedAction(None, "")),
        (r"<answer>(.*?)</answer>", "<answer>Right", NOTHING),
        (r"<answer>(.*?)</answer>", "", NOTHING),
        (THINK, "<think>a\nb</think>\n<answer>Left</answer>", ParsedAction(0, "Left", "a\nb")),
        (THINK, "<answer>Left</answer>", NOTHING),
        (OPTIONAL, "<answer>Left</answer>", ParsedAction(0, "Left", "")),
        (r"^(.*)$", " down <|im_end|>\n", ParsedAction(1, "down")),
    ],
)
def test_table(pattern, text, expected):
    assert ActionParser(pattern, LOOKUP).parse(text) == expected


def test_without_a_lookup_the_text_is_the_action():
    assert ActionParser(r"^(.*)$").parse("crane<|im_end|>") == ParsedAction("crane", "crane")
    assert ActionParser(r"^(.*)$", special_tokens=None).parse("crane<|im_end|>").action == "crane<|im_end|>"


@pytest.mark.parametrize("pattern", ["<answer>(.*?", "<answer>.*?</answer>", "(?:a)"])
def test_a_pattern_that_cannot_find_an_action_is_refused_with_the_fix(pattern):
    with pytest.raises(ValueError, match=r"action_pattern .*<answer>\(\.\*\?\)</answer>"):
        ActionParser(pattern)


def test_two_actions_of_one_name_are_refused():
    with pytest.raises(ValueError, match="action_lookup"):
        ActionParser(r"(.*)", {0: "Go", 1: "go"})
