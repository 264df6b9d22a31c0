"""Sample trajectories for people: one HTML file, each token coloured by the teacher's verdict. And for programs: JSONL.

A single response is a card of its own. An episode in an environment is a card with its turns, segment after segment.
The page loads nothing and runs nothing. Whatever a model wrote is escaped, and a content security policy forbids
scripts should an escape ever be missing.
"""

from __future__ import annotations

import functools
import math
import unicodedata
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from roll_opd.utils.files import atomic_write_text, to_json

LEVELS: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0)
"""|advantage| in nats from which a token gets the 1st, 2nd, … colour; below the first it stays plain."""


@dataclass(frozen=True)
class TokenView:
    """One token of a response."""

    text: str
    """The token decoded by itself."""
    logprob_student: float
    """Nats, from the trainer before the update. NaN where it was not computed."""
    logprob_teacher: Mapping[str, float]
    """Teacher's name → nats."""
    advantage: float
    """The teachers' part of the advantage, ``Σ_i c_i (logprob_teacher_i - logprob_student)``, or without teachers the
    reward's: it decides the colour."""
    from_student: bool = True
    """False for what an environment or a template wrote: shown plain, counted nowhere."""
    special: bool = False
    """Whether the tokenizer calls it a special token: shown with a frame."""


@dataclass(frozen=True)
class TurnView:
    """One turn of an episode."""

    index: int
    """Counts over the episode, from 0."""
    start: int
    """The turn's first token among the sample's ``tokens``."""
    end: int
    """Behind the last one."""
    observation: str
    text: str
    """What the student wrote, decoded."""
    reward: float
    is_valid: bool | None = None
    """Whether the environment understood the action; None: it does not tell."""


@dataclass(frozen=True)
class SampleView:
    """One trajectory: a single response, or a segment of an episode."""

    id: str
    step: int
    tag: str
    prompt_text: str
    response_text: str
    finish_reason: str
    tokens: Sequence[TokenView] = field(default=())
    reward: float | None = None
    correct: bool | None = None
    ground_truth: str | None = None
    episode: str = ""
    """Name of the episode, the same on all its segments; empty where there are no turns."""
    segment: int = 0
    segments: int = 1
    """How many segments the episode has."""
    turns: Sequence[TurnView] = field(default=())
    """The turns of this segment, which hold all of ``tokens``; empty for a single response."""

    def reverse_kl(self) -> dict[str, float]:
        """Mean of ``logprob_student - logprob_teacher`` over the student's tokens in nats, for each teacher."""
        return _reverse_kl(self.student_tokens())

    def student_tokens(self) -> list[TokenView]:
        """The tokens that the student sampled."""
        return [token for token in self.tokens if token.from_student]


def write_samples_page(path: Path, samples: Sequence[SampleView], title: str, subtitle: str = "") -> None:
    """Write a self-contained HTML page, about 250 bytes a token, replacing an earlier one atomically."""
    body = "\n".join(_episode(group) if group[0].turns else _sample(group[0]) for group in by_episode(samples))
    atomic_write_text(
        path,
        f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{escape(visible(title))}</title>
<style>{_CSS}</style>
</head>
<body>
<header>
<h1>{escape(visible(title))}</h1>
<p class="subtitle">{escape(visible(subtitle))}</p>
<p class="totals">{_totals(samples)}</p>
</header>
{_legend(samples)}
<main>
{body or '<p class="totals">No samples.</p>'}
</main>
</body>
</html>
""",
        durable=False,
    )


def write_samples_jsonl(path: Path, samples: Iterable[SampleView]) -> None:
    """Append one JSON object a sample, keys sorted, NaN as null. ``truncate_jsonl`` drops what a resume repeats."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
        file.writelines(to_json(_fields(sample)) + "\n" for sample in samples)


def _fields(sample: SampleView) -> dict[str, object]:
    """What ``asdict`` returns, without the deep copy that costs it ten times as long."""
    return vars(sample) | {"tokens": [vars(t) for t in sample.tokens], "turns": [vars(t) for t in sample.turns]}


def by_episode(samples: Iterable[SampleView]) -> list[list[SampleView]]:
    """Put the segments of each episode together, in their order; a single response stays by itself."""
    groups: dict[tuple[int, str], list[SampleView]] = {}
    for number, sample in enumerate(samples):
        groups.setdefault((sample.step, sample.episode or f"#{number}"), []).append(sample)
    return [sorted(group, key=lambda sample: sample.segment) for group in groups.values()]


def episode_facts(segments: Sequence[SampleView]) -> list[str]:
    """What is said about an episode beside its name, tag and success."""
    last, turns = segments[-1], sum(len(sample.turns) for sample in segments)
    facts = [f"step {last.step}", _plural(turns, "turn")]
    if last.segments > 1:
        facts.append(_plural(last.segments, "segment"))
    facts += [f"{sum(len(sample.student_tokens()) for sample in segments)} tokens", f"ended by {last.finish_reason}"]
    if last.reward is not None:
        facts.append(f"score {short(last.reward)}")
    return facts


def verdict_class(token: TokenView) -> str:
    """CSS classes of a token: ``agree-<level>`` where the teachers prefer it, ``dislike-<level>``."""
    classes = "t"
    level = bisect_right(LEVELS, abs(token.advantage)) if math.isfinite(token.advantage) else 0
    if not token.from_student:
        classes += " other"
    elif level:
        classes += f" {'agree' if token.advantage > 0 else 'dislike'}-{level}"
    return classes + " special" if token.special else classes


def _sample(sample: SampleView) -> str:
    facts = [f"step {sample.step}", f"{len(sample.student_tokens())} tokens", f"ended by {sample.finish_reason}"]
    if sample.reward is not None:
        facts.append(f"reward {short(sample.reward)}")
    facts += _reverse_kl_facts(sample.student_tokens())
    response = _tokens(sample, 0, len(sample.tokens))
    return f"""<section>
{_heading(sample, sample.id, "✓ correct", "✗ wrong")}
<p class="facts">{escape(visible(" · ".join(facts)))}{_worst(sample)}</p>
<details{" open" if len(sample.prompt_text) <= 600 else ""}><summary>prompt</summary>
<pre>{escape(visible(sample.prompt_text, keep=LAYOUT))}</pre></details>
<div class="response">{response or escape(visible(sample.response_text, keep=LAYOUT))}</div>
{_truth(sample)}</section>"""


def _episode(segments: Sequence[SampleView]) -> str:
    """An episode's card. Prompts are closed: the turns show what is new in them."""
    facts = episode_facts(segments) + _reverse_kl_facts([t for sample in segments for t in sample.student_tokens()])
    return f"""<section>
{_heading(segments[-1], f"episode {segments[-1].episode}", "✓ success", "✗ no success")}
<p class="facts">{escape(visible(" · ".join(facts)))}{_worst(segments[0]) if len(segments) == 1 else ""}</p>
{"".join(_segment(sample) for sample in segments)}{_truth(segments[-1])}</section>"""


def _segment(sample: SampleView) -> str:
    head = ""
    if sample.segments > 1:
        facts = f"segment {sample.segment + 1} of {sample.segments} · ended by {sample.finish_reason}"
        head = f'<p class="facts segment">{escape(visible(facts))}{_worst(sample)}</p>\n'
    return f"""{head}<details><summary>prompt</summary>
<pre>{escape(visible(sample.prompt_text, keep=LAYOUT))}</pre></details>
{"".join(_turn(sample, turn) for turn in sample.turns)}"""


def _turn(sample: SampleView, turn: TurnView) -> str:
    tokens = [token for token in sample.tokens[turn.start : turn.end] if token.from_student]
    facts = [f"turn {turn.index}", f"reward {short(turn.reward)}", *_reverse_kl_facts(tokens)]
    kind, chip = "turn", ""
    if turn.is_valid is False:
        kind, chip = "turn invalid", ' <span class="chip wrong">✗ invalid action</span>'
    # A browser drops a line break that stands directly behind <pre>; the first one is ours.
    return f"""<div class="{kind}">
<p class="facts">{escape(visible(" · ".join(facts)))}{chip}</p>
<pre class="observation">
{escape(visible(turn.observation, keep=LAYOUT))}</pre>
<div class="response">{_tokens(sample, turn.start, turn.end)}</div>
</div>
"""


def _heading(sample: SampleView, name: str, right: str, wrong: str) -> str:
    chips = f'<span class="chip">{escape(visible(sample.tag))}</span>' if sample.tag else ""
    if sample.correct is not None:
        kind, verdict = ("right", right) if sample.correct else ("wrong", wrong)
        chips += f'<span class="chip {kind}">{verdict}</span>'
    return f'<h2><span class="id">{escape(visible(name))}</span>{chips}</h2>'


def _truth(sample: SampleView) -> str:
    if sample.ground_truth is None:
        return ""
    return f'<p class="truth">expected: <code>{escape(visible(sample.ground_truth, keep=LAYOUT))}</code></p>'


def _reverse_kl(tokens: Sequence[TokenView]) -> dict[str, float]:
    names = dict.fromkeys(name for token in tokens for name in token.logprob_teacher)
    return {
        name: _mean(
            token.logprob_student - token.logprob_teacher[name] for token in tokens if name in token.logprob_teacher
        )
        for name in names
    }


def _reverse_kl_facts(tokens: Sequence[TokenView]) -> list[str]:
    teachers = _reverse_kl(tokens)
    return [
        f"reverse KL {_number(value)}" if len(teachers) == 1 else f"reverse KL to {name} {_number(value)}"
        for name, value in teachers.items()
    ]


def _tokens(sample: SampleView, start: int, end: int) -> str:
    return "".join(_token(index, sample.tokens[index]) for index in range(start, end))


def _worst(sample: SampleView) -> str:
    tokens = [
        (token.advantage, index)
        for index, token in enumerate(sample.tokens)
        if token.from_student and math.isfinite(token.advantage)
    ]
    if not tokens or min(tokens)[0] >= 0:
        return ""
    advantage, index = min(tokens)
    token = sample.tokens[index]
    text = f'<code class="{verdict_class(token)}">{escape(_shown(token.text).strip())}</code>'
    return f" · worst token {text} {_number(advantage)} (token {index})"


def _token(index: int, token: TokenView) -> str:
    shown, stripped = _shown_html(token.text)
    lines = [f"token {index}: {stripped}"]
    if token.from_student:
        lines.append(f"student logprob {_probability(token.logprob_student)}")
        for name, value in token.logprob_teacher.items():
            lines.append(f"{escape(visible(name))} logprob {_probability(value)}")
            lines.append(f"  difference, teacher {_MINUS} student {_number(value - token.logprob_student)}")
        lines.append(f"advantage {_number(token.advantage)}")
    else:
        lines.append("not sampled by the student")
    return f'<span class="{verdict_class(token)}" title="{"&#10;".join(lines)}">{shown}</span>'


@functools.lru_cache(maxsize=1 << 14)
def _shown_html(text: str) -> tuple[str, str]:
    """A token as it is displayed, and as it stands in the first line of its title."""
    shown = _shown(text)
    return escape(shown), escape(shown.strip()).replace("\n", "&#10;")


def _shown(text: str) -> str:
    """A token as it is displayed: every character of it can be seen, and a line break also breaks the line."""
    if not text:
        return "∅"
    if not text.strip(" "):
        return "␣" * len(text)
    return visible(text).replace("↵", "↵\n")


LAYOUT = "\n\t\u200c\u200d"
"""What running text keeps: line breaks, tabs, and the joiners that some scripts and emoji need."""
_MINUS = "\N{MINUS SIGN}"
_PICTURES = {"\n": "↵", "\t": "⇥", "\r": "␍", "\u00a0": "⍽"}


def visible(text: str, keep: str = "") -> str:
    """Replace what is invisible or acts on its surroundings (controls, direction marks, surrogates) by what shows."""
    return text.translate(_visible(keep))


class _Visible(dict[int, str]):
    """Code point → what is shown for it, as ``str.translate`` wants it; learns what it is asked for."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        shown = _PICTURES.get(character, character)
        if shown == character and unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp"):
            shown = f"[U+{code:04X}]"
        self[code] = shown
        return shown


@functools.cache
def _visible(keep: str) -> _Visible:
    return _Visible({ord(character): character for character in keep})


def _totals(samples: Sequence[SampleView]) -> str:
    groups = by_episode(samples)
    noun, adjective = ("episodes", "successful") if any(sample.turns for sample in samples) else ("samples", "correct")
    facts = [f"{len(groups)} {noun}"]
    graded = [group[-1].correct for group in groups if group[-1].correct is not None]
    if graded:
        facts.append(f"{sum(graded)} of {len(graded)} {adjective}")
    tokens = [token for sample in samples for token in sample.student_tokens() if math.isfinite(token.advantage)]
    if tokens:
        disliked = sum(token.advantage <= -LEVELS[0] for token in tokens)
        facts.append(f"mean advantage {_number(_mean(token.advantage for token in tokens))} nats per token")
        subject = "teacher dislikes" if _has_teacher(samples) else "pushed down:"
        facts.append(f"{subject} {disliked / len(tokens):.0%} of {len(tokens)} tokens")
    return " · ".join(facts)


def _has_teacher(samples: Sequence[SampleView]) -> bool:
    return any(token.logprob_teacher for sample in samples for token in sample.tokens)


def _legend(samples: Sequence[SampleView]) -> str:
    top = len(LEVELS)
    steps = [(f"dislike-{level}", f"≤ {_MINUS}{LEVELS[level - 1]:g}") for level in range(top, 0, -1)]
    steps.append(("", f"± {LEVELS[0]:g}"))
    steps += [(f"agree-{level}", f"≥ {LEVELS[level - 1]:g}") for level in range(1, top + 1)]
    cells = "".join(f'<span class="t {name}">{escape(text)}</span>' for name, text in steps)
    # A page without samples speaks of teachers: nothing on it says otherwise.
    low, high, what = (
        ("teacher dislikes", "teacher likes it more than the student", f"in nats: teacher {_MINUS} student logprob")
        if _has_teacher(samples) or not samples
        else ("pushed down", "pushed up", "of the reward")
    )
    return (
        f'<aside><span class="end">{low}</span>'
        f'<span class="scale">{cells}</span><span class="end">{high}</span>'
        f'<span class="note">advantage {what}. '
        '<span class="t other">italic</span> not sampled by the student, <span class="t special">framed</span> special '
        "token. Point at a token for its numbers.</span></aside>"
    )


def short(value: float) -> str:
    """Three significant digits, with a real minus sign."""
    return f"{value:.3g}".replace("-", _MINUS)


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _number(value: float) -> str:
    """Signed, three decimals, with a real minus sign."""
    return "unknown" if math.isnan(value) else f"{value:+.3f}".replace("-", _MINUS)


def _probability(logprob: float) -> str:
    return (
        "unknown" if math.isnan(logprob) else f"{logprob:.3f} ({math.exp(min(0.0, logprob)):.2%})".replace("-", _MINUS)
    )


def _mean(values: Iterable[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return math.fsum(finite) / len(finite) if finite else math.nan


# Blue and orange stay apart for every common colour blindness; the strongest dislikes are underlined as well, so that
# the verdict does not rest on colour alone. Text keeps a contrast of 4.5 : 1 or more in both schemes.
_CSS = """
:root { --bg:#fcfcfd; --card:#fff; --fg:#1c2127; --dim:#5d6773; --line:#d9dee4; --soft:#f2f4f7;
  --a1:#dcebfa; --a2:#b3d5f5; --a3:#7fb8ec; --a4:#4d9ae0; --d1:#fdebd3; --d2:#fbd09c; --d3:#f7a85a; --d4:#ee7f22; }
@media (prefers-color-scheme: dark) {
:root { --bg:#14171b; --card:#1b1f25; --fg:#e4e8ed; --dim:#98a3b0; --line:#323a44; --soft:#232931;
  --a1:#1b3047; --a2:#1d4469; --a3:#1f5a8f; --a4:#1f6fb5; --d1:#3d2a14; --d2:#5c3a10; --d3:#824a08; --d4:#a85a00; } }
* { box-sizing:border-box; }
body { margin:0 auto; max-width:72rem; padding:1.5rem 1.25rem 4rem; background:var(--bg); color:var(--fg);
  font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif; }
h1 { margin:0; font-size:1.5rem; line-height:1.25; }
p { margin:.25rem 0; }
.subtitle, .totals, .facts, .note, .end, summary, .truth { color:var(--dim); }
.totals, .facts, .note, .end, summary, .truth { font-size:.875rem; }
aside { position:sticky; top:0; z-index:1; display:flex; flex-wrap:wrap; align-items:center; gap:.25rem .75rem;
  margin:1rem 0; padding:.6rem 0; background:var(--bg); border-bottom:1px solid var(--line); }
.scale { display:inline-flex; border:1px solid var(--line); border-radius:4px; overflow:hidden; }
.scale .t { min-width:3.6em; padding:.15rem .4rem; text-align:center; font-size:.8125rem; border-radius:0; }
@media (max-width:40rem) { .scale .t { min-width:0; padding:.15rem .2rem; font-size:.6875rem; white-space:nowrap; } }
.note { flex-basis:100%; }
section { margin:0 0 1rem; padding:1rem 1.25rem; background:var(--card); border:1px solid var(--line);
  border-radius:8px; }
h2 { display:flex; flex-wrap:wrap; align-items:center; gap:.5rem; margin:0; font-size:1rem; }
.segment { margin-top:1rem; padding-top:.5rem; border-top:1px solid var(--line); }
.id { overflow-wrap:anywhere; }
.chip { padding:0 .5rem; border:1px solid var(--line); border-radius:1em; font-size:.8125rem; font-weight:400; }
.right { border-color:var(--a4); } .wrong { border-color:var(--d4); }
details { margin:.5rem 0; }
summary { cursor:pointer; }
pre, .response, code { font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;
  font-size:.875rem; }
pre { margin:.25rem 0; padding:.5rem .75rem; max-height:24rem; overflow:auto; background:var(--soft);
  border-radius:6px; white-space:pre-wrap; overflow-wrap:anywhere; }
.response { line-height:1.9; white-space:pre-wrap; overflow-wrap:anywhere; }
.turn { display:flex; flex-wrap:wrap; align-items:flex-start; gap:.25rem 1rem; margin:.75rem 0; padding-left:.75rem;
  border-left:3px solid var(--line); }
.turn .chip { white-space:nowrap; }
.turn.invalid { border-color:var(--d4); }
.turn .facts { flex-basis:100%; margin:0; }
.turn .observation { margin:0; max-width:100%; line-height:1.35; }
.turn .response { flex:1 1 20rem; min-width:0; }
.t { padding:.12em 0; border-radius:3px; box-decoration-break:clone; -webkit-box-decoration-break:clone; }
.response .t { border-right:1px solid var(--card); }
.response .t:hover { outline:2px solid var(--fg); }
code.t { color:var(--fg); }
.other { color:var(--dim); font-style:italic; }
.special { outline:1px solid var(--dim); outline-offset:-1px; padding-left:.2em; padding-right:.2em; }
.agree-1 { background:var(--a1); } .agree-2 { background:var(--a2); }
.agree-3 { background:var(--a3); } .agree-4 { background:var(--a4); }
.dislike-1 { background:var(--d1); } .dislike-2 { background:var(--d2); }
.dislike-3 { background:var(--d3); text-decoration:underline; }
.dislike-4 { background:var(--d4); text-decoration:underline 2px; }
@media (prefers-color-scheme: light) { .agree-4, .dislike-4 { color:#10151a; } }
"""
