import json
import math
import re
from html.parser import HTMLParser

import pytest

from roll_opd.utils.files import truncate_jsonl
from roll_opd.utils.samples_page import SampleView, TokenView, verdict_class, write_samples_jsonl, write_samples_page


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
