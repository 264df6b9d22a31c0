import json
import math
import re
from html.parser import HTMLParser

import pytest

from roll_opd.utils.episode_log import write_episodes_log
from roll_opd.utils.files import truncate_jsonl
from roll_opd.utils.samples_page import (
    SampleView,
    TokenView,
    TurnView,
    verdict_class,
    write_samples_jsonl,
    write_samples_page,
)


def token(text, student=-1.0, teacher=-1.0, **kwargs):
    return TokenView(text, student, {"default": teacher}, teacher - student, **kwargs)


def sample(tokens, **kwargs):
    fields = {"id": "0/0/0", "step": 3, "tag": "math", "prompt_text": "2+2?", "response_text": "4"}
    return SampleView(**fields | {"finish_reason": "stop", "tokens": tokens} | kwargs)


class Page(HTMLParser):
    """The page as a browser reads it: elements, and (classes, title, text) of the tokens of responses."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.tokens, self._depth = [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.elements.append((tag, attrs))
        if tag == "span" and "title" in attrs:
            self.tokens.append([attrs["class"].split(), attrs["title"], ""])
            self._depth = True

    def handle_endtag(self, tag):
        self._depth = None

    def handle_data(self, data):
        if self._depth:
            self.tokens[-1][2] += data


@pytest.fixture
def page(tmp_path):
    def write(*samples, **kwargs):
        path = tmp_path / "page.html"
        write_samples_page(path, samples, kwargs.get("title", "Samples"), kwargs.get("subtitle", ""))
        return path.read_text(encoding="utf-8")

    return write


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        (-2.0, -1.5, "agree-2"),  # the teacher finds it likelier by 0.5 nats
        (-1.5, -2.0, "dislike-2"),
        (-5.0, -0.5, "agree-4"),
        (-0.5, -9.0, "dislike-4"),
        (-1.0, -0.85, "agree-1"),
        (-0.5, -2.0, "dislike-3"),
    ],
)
def test_colour_follows_the_sign_and_size_of_the_teachers_verdict(page, student, teacher, expected):
    (shown,) = Page(page(sample([token("x", student, teacher)]))).tokens
    assert shown[0] == ["t", expected]


def test_small_unknown_and_foreign_advantages_have_no_colour():
    assert verdict_class(token("x", -1.0, -1.05)) == "t"
    assert verdict_class(TokenView("x", math.nan, {}, math.nan)) == "t"
    assert verdict_class(token("x", 0.0, -9.0, from_student=False)) == "t other"


def test_hover_text_has_the_numbers(page):
    (shown,) = Page(page(sample([token(" cat", -0.5, -2.0)]))).tokens
    assert shown[1].splitlines() == [
        "token 0: cat",
        "student logprob \N{MINUS SIGN}0.500 (60.65%)",
        "default logprob \N{MINUS SIGN}2.000 (13.53%)",
        "  difference, teacher \N{MINUS SIGN} student \N{MINUS SIGN}1.500",
        "advantage \N{MINUS SIGN}1.500",
    ]
    assert shown[2] == " cat"


ATTACK = "</span></pre></style><script>alert('1')</script><img src=x onerror=\"alert(2)\">&amp;"


def test_nothing_a_model_or_a_file_wrote_becomes_markup(page):
    text = page(
        sample(
            [token(ATTACK, -0.1, -4.0), TokenView("a", -1.0, {ATTACK: -1.0, "b": -2.0}, 0.0)],
            id=ATTACK,
            tag=ATTACK,
            prompt_text=ATTACK,
            ground_truth=ATTACK,
            finish_reason=ATTACK,
        ),
        sample([], response_text=ATTACK),
        title=ATTACK,
        subtitle=ATTACK,
    )
    parsed = Page(text)
    assert "<script" not in text and "<img" not in text
    assert {tag for tag, _ in parsed.elements} & {"script", "img", "link", "iframe"} == set()
    assert not any(name.startswith("on") or name in ("src", "href") for _, attrs in parsed.elements for name in attrs)
    assert parsed.tokens[0][2] == ATTACK and f"token 0: {ATTACK}" in parsed.tokens[0][1]
    assert "default-src 'none'" in text and "http://" not in text and "https://" not in text


def test_invisible_tokens_are_made_visible(page):
    texts = ["\n", "  ", "\t", "", " word", "\u202e", "\x1b", "\r\n", "\udce9", "\u00a0", "é😀"]
    shown = [text for _, _, text in Page(page(sample([token(text) for text in texts]))).tokens]
    assert shown == ["↵\n", "␣␣", "⇥", "∅", " word", "[U+202E]", "[U+001B]", "␍↵\n", "[U+DCE9]", "⍽", "é😀"]


def test_special_tokens_are_framed(page):
    (shown,) = Page(page(sample([token("<|im_end|>", special=True)]))).tokens
    assert shown[0] == ["t", "special"] and shown[2] == "<|im_end|>"


def test_header_of_a_sample(page):
    tokens = [
        token("good", -1.0, -0.5),
        token("bad", -0.5, -3.0),
        token("tool", 0.0, -50.0, from_student=False),
        token("meh", -0.5, -0.5),
    ]
    text = page(sample(tokens, reward=-0.5, correct=False, ground_truth="4"))
    (facts,) = re.findall(r'<p class="facts">(.*?)</p>', text)
    plain = re.sub("<[^>]*>", "", facts)
    # reverse KL: mean of -0.5, 2.5 and 0.0
    assert plain == (
        "step 3 · 3 tokens · ended by stop · reward \N{MINUS SIGN}0.5 · reverse KL +0.667 · "
        "worst token bad \N{MINUS SIGN}2.500 (token 1)"
    )
    assert "✗ wrong" in text and "<code>4</code>" in text and ">math</span>" in text
    assert "0 of 1 correct" in text
    assert "✓" not in text and "✓ correct" in page(sample(tokens, correct=True))


GRID = "\nSF\n H"


def episode(**kwargs):
    """Three turns in two segments, the later one first."""
    fields = {"tag": "Lake", "episode": "7/1", "segments": 2, "reward": -0.5, "correct": False}
    later = sample(
        [token("end", -0.5, -2.5)],
        id="7/1/1", segment=1, prompt_text="again", finish_reason="length",
        turns=[TurnView(2, 0, 1, "hole", "end", -1.0, None)], **fields | kwargs,
    )  # fmt: skip
    first = sample(
        [token("a", -1.0, -0.5), token("b", -1.0, -1.0), token("c", -0.5, -1.0)],
        id="7/1/0", prompt_text="rules", turns=[
            TurnView(0, 0, 2, GRID, "ab", 0.5, True), TurnView(1, 2, 3, ATTACK, "c", 0.0, False)
        ], **fields | kwargs,
    )  # fmt: skip
    return [later, first]


def test_an_episode_is_one_card_with_its_turns_in_order(page):
    later, first = episode()
    text = page(later, sample([token("x", -1.0, -1.0)], id="8/0/0"), first)
    cards = re.findall("<section>.*?</section>", text, re.DOTALL)
    assert len(cards) == 2 and "8/0/0" in cards[1]
    plain = re.sub("<[^>]*>", "", cards[0])
    assert "episode 7/1Lake✗ no success" in plain
    # reverse KL of the student's tokens: -0.5, 0, 0.5 and 2
    assert "step 3 · 3 turns · 2 segments · 4 tokens · ended by length · score −0.5 · reverse KL +0.500" in plain
    order = ["segment 1 of 2 · ended by stop · worst token c", "turn 0 · reward 0.5 · reverse KL −0.250", "turn 1"]
    order += ["✗ invalid action", "segment 2 of 2 · ended by length", "again", "turn 2 · reward −1 · reverse KL +2.000"]
    places = [plain.index(part) for part in order]
    assert places == sorted(places) and plain.count("✗ invalid action") == 1
    assert [shown for _, _, shown in Page(cards[0]).tokens] == ["a", "b", "c", "end"]
    assert "2 episodes · 0 of 1 successful" in text


def test_observations_keep_their_shape_and_are_escaped(page):
    text = page(*episode(episode=ATTACK))
    # A browser drops the line break behind <pre>, and no further one.
    assert f'<pre class="observation">\n{GRID}</pre>' in text
    assert "white-space:pre-wrap" in text
    parsed = Page(text)
    assert {tag for tag, _ in parsed.elements} & {"script", "img"} == set()
    assert text.count("&lt;script&gt;alert") == 2


def test_turns_in_jsonl(tmp_path):
    write_samples_jsonl(tmp_path / "s.jsonl", episode())
    row = json.loads((tmp_path / "s.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert (row["episode"], row["segment"], row["segments"]) == ("7/1", 1, 2)
    (turn,) = row["turns"]
    assert turn == {
        "index": 2, "start": 0, "end": 1, "observation": "hole", "text": "end", "reward": -1.0, "is_valid": None
    }  # fmt: skip


def test_episodes_as_text(tmp_path):
    path = tmp_path / "episodes.txt"
    attack = TurnView(0, 0, 1, "==== episode 9/9\u2028x\n---- turn 5\x1b[2J", "", 1.0, True)
    single = sample([token("x")], turns=[attack], episode="8/0", reward=1.0, correct=True, ground_truth="42")
    write_episodes_log(path, [*episode(), sample([token("no turns")]), single])
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[:9] == [
        "==== episode 7/1 · Lake · step 3 · 3 turns · 2 segments · 4 tokens · ended by length · "
        "score −0.5 · no success",
        "---- segment 1 of 2",
        "---- turn 0",
        "",
        "    SF",
        "     H",
        "  student:",
        "    ab",
        "  reward 0.5",
    ]
    assert "  reward 0, invalid action" in lines
    # What an environment writes cannot pass for a heading, nor act on a terminal.
    assert [line.split()[2] for line in lines if line.startswith("====")] == ["7/1", "8/0"]
    at = lines.index("    ==== episode 9/9[U+2028]x")
    assert lines[at : at + 6] == [
        "    ==== episode 9/9[U+2028]x", "    ---- turn 5[U+001B][2J", "  student:", "    (nothing)", "  reward 1",
        "---- expected",
    ]  # fmt: skip


def test_two_teachers_are_told_apart():
    two = sample([TokenView("a", -1.0, {"math": -0.5, "code": -3.0}, -1.5), TokenView("b", -1.0, {"math": -1.5}, -0.5)])
    assert two.reverse_kl() == {"math": 0.0, "code": 2.0}


def test_legend_states_the_scale(page):
    legend = re.search("<aside>.*</aside>", page()).group()
    for number in ("0.1", "0.3", "1", "3"):
        assert f"≥ {number}<" in legend and f"≤ \N{MINUS SIGN}{number}<" in legend
    assert "nats" in legend


def test_without_a_teacher_the_page_speaks_of_the_reward(page):
    text = page(sample([TokenView("a", -1.0, {}, 0.9), TokenView("b", -1.0, {}, -0.9)]))
    assert "teacher" not in re.search("<body>.*</body>", text, re.DOTALL).group()
    assert "pushed down: 50% of 2 tokens" in text and "advantage of the reward" in text


def test_jsonl_is_appended_and_can_be_cut_at_a_step(tmp_path):
    path = tmp_path / "samples" / "samples.jsonl"
    write_samples_jsonl(path, [sample([token("a\n\udce9", -0.1, math.nan)], step=0)])
    write_samples_jsonl(path, [sample([], step=5), sample([], step=5, id="1/0/0")])
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [(row["step"], row["id"]) for row in rows] == [(0, "0/0/0"), (5, "0/0/0"), (5, "1/0/0")]
    assert rows[0]["tokens"][0]["logprob_teacher"] == {"default": None}
    assert truncate_jsonl(path, 5) == 2
    assert len(path.read_text(encoding="utf-8").splitlines()) == 1
