"""Results as JSON, as a table, and as plots."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from benchmarks.opd_step.rounds import time_to
from benchmarks.opd_step.workload import LEARNING, REGIMES

JSON_NAME = "opd_step.json"
NAMES = {"ours": "roll_opd", "trl": "TRL"}
COLOURS = {
    "weight_sync": "#e45756", "generate": "#4c78a8", "teacher": "#f58518", "old_logprobs": "#72b7b2",
    "advantages": "#ff9da6", "train": "#54a24b", "forward and loss": "#54a24b", "backward": "#eeca3b",
    "optimizer": "#b279a2", "other": "#bab0ac",
}  # fmt: skip
"""Phases of either side, in the order in which they are drawn."""
LEVELS = (0.5, 0.25, 0.15)
"""Shares of the KL at the start for which times are told beside the target."""
LINES = {"ours": "#4c78a8", "trl": "#f58518"}


def load(folder: Path) -> dict[str, Any]:
    """Results that an earlier run left; empty when there are none."""
    path = folder / JSON_NAME
    return dict(json.loads(path.read_text())) if path.exists() else {}


def write(results: Mapping[str, Any], folder: Path) -> None:
    """Write JSON, table and plots."""
    (folder / JSON_NAME).write_text(json.dumps(results, indent=1) + "\n")
    (folder / "opd_step.md").write_text(table(results))
    (folder / "opd_step_phases.svg").write_text(phases_plot(results))
    if "learning" in results:
        (folder / "opd_step_learning.svg").write_text(learning_plot(results["learning"]))


# ---- the table -------------------------------------------------------------------------------------------------------


def verdict(value: float | None, target: float | None, at_most: bool = False) -> str:
    """What became of a target, in plain words; nothing where there was none."""
    if target is None:
        return ""
    sign = "≤" if at_most else "≥"
    ok = value is not None and (value <= target if at_most else value >= target)
    return f"{sign} {target:g}x: {'reached' if ok else 'FALLS SHORT'}"


def table(results: Mapping[str, Any]) -> str:
    """Everything a reader needs to judge the figures."""
    lines = ["# One step of on-policy distillation: roll_opd beside TRL", ""]
    machine = results["machine"]
    changed = ", with uncommitted changes" if machine["uncommitted_changes"] else ""
    lines += [
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB; "
        f"commit {machine['commit'][:12]}{changed}.",
        "; ".join(
            f"{NAMES[who]}: " + ", ".join(f"{name} {version}" for name, version in versions.items())
            for who, versions in machine["versions"].items()
        )
        + ".",
        "",
        "Ratios of trained tokens/s are medians over pairs of adjacent turns, with the smallest and the largest.",
        "",
        "| regime | ratio | target | pairs | roll_opd s/step | TRL s/step | roll_opd tokens/s | TRL tokens/s "
        "| TRL with |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    measured = {name: results[name] for name in REGIMES if name in results}
    for result in measured.values():
        regime, ours, trl = result["regime"], result["ours"], result["trl"]
        lines.append(
            f"| {regime['title']} | **{_range(result['ratio'])}** "
            f"| {verdict(result['ratio']['median'], regime['target'])} | {len(result['pairs'])} "
            f"| {ours['seconds_per_step']['median']:.2f} | {trl['seconds_per_step']['median']:.2f} "
            f"| {ours['tokens_per_second']['median']:,.0f} | {trl['tokens_per_second']['median']:,.0f} "
            f"| {result['trl_setting']} |"
        )
    lines += [
        "",
        "Peak memory is that of all processes of a side, Ray's own included; shared pages count once (PSS).",
        "",
        "| regime | roll_opd MiB | TRL MiB | ratio | target |",
        "|---|---|---|---|---|",
    ]
    for result in measured.values():
        regime, ratio = result["regime"], result["memory_ratio"]
        lines.append(
            f"| {regime['title']} | {result['ours']['peak_pss_mib']:,.0f} | {result['trl']['peak_pss_mib']:,.0f} "
            f"| {ratio:.2f}x | {verdict(ratio, regime['memory_target'], at_most=True)} |"
        )
    lines += ["", "Phases, mean seconds of a step:", ""]
    for result in measured.values():
        for who in NAMES:
            parts = sorted(result[who]["phases"].items(), key=lambda item: -item[1])
            told = ", ".join(f"{name} {seconds:.2f}" for name, seconds in parts if seconds >= 0.005)
            lines.append(f"- {result['regime']['title']}, {NAMES[who]}: {told}")
    lines += ["", "![phases](opd_step_phases.svg)", ""]
    if gates := {result["regime"]["models"]: result["gate"] for result in measured.values()}:
        told = "; ".join(f"{name}: loss {g['loss']:.1e}, gradient {g['gradient']:.1e}" for name, g in gates.items())
        lines += [f"Relative differences on the same tokens, fp32: {told}.", ""]
    commit = machine["commit"]
    if older := [r["regime"]["title"] for r in measured.values() if r["machine"]["commit"] != commit]:
        lines += [f"Measured at another commit: {'; '.join(older)}.", ""]
    if disturbed := [r["regime"]["title"] for r in measured.values() if r["disturbed"]]:
        lines += [f"DISTURBED, other processes used the cores in turns that count: {'; '.join(disturbed)}.", ""]
    if "learning" in results:
        lines += _learning_lines(results["learning"])
    return "\n".join(lines).rstrip() + "\n"


def _learning_lines(learning: Mapping[str, Any]) -> list[str]:
    plan, ratio = learning["plan"], learning["ratio"]
    lines = [
        f"## Time to {plan['share']:.0%} of the held-out reverse KL that training starts from",
        "",
        f"{plan['regime']['title']}; learning rate {plan['regime']['optimizer']['learning_rate']:g}; KL of "
        f"student and teacher over the whole vocabulary, on the student's own responses to {plan['prompts']} held-out "
        f"prompts, by one evaluator for both sides, every {plan['every']} steps. A side ends once it is there, or "
        f"after {plan['max_steps']} steps. Evaluation is nobody's time.",
        "",
        f"Ratio: {'not reached' if ratio is None else _range(ratio)}; "
        f"{verdict(None if ratio is None else ratio['median'], LEARNING.target)}.",
        "",
        "| seed | target KL | roll_opd s | TRL s | ratio | steps of roll_opd, TRL | TRL with | disturbed turns |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for run in learning["runs"]:
        cells = [_seconds(run["seconds_to_target"][who]) for who in NAMES]
        ratio_cell = "" if run["ratio"] is None else f"{run['ratio']:.2f}x"
        lines.append(
            f"| {run['seed']} | {run['target_kl']:.4f} | {cells[0]} | {cells[1]} | {ratio_cell} "
            f"| {', '.join(str(run['curves'][who][-1]['step']) for who in NAMES)} | {run['trl_setting']} "
            f"| {run['void_turns']} of {run['turns']} |"
        )
    lines += ["", "Beside the target:", "", "| seed | KL | roll_opd s | TRL s | ratio |", "|---|---|---|---|---|"]
    lines += [line for run in learning["runs"] for line in _levels(run)]
    return [*lines, "", "![held-out KL](opd_step_learning.svg)", ""]


def _levels(run: Mapping[str, Any]) -> list[str]:
    """Rows of the times to a few levels; where the target was not reached, also to the lowest that both came to."""
    curves = {who: [(point["seconds"], point["kl"]) for point in run["curves"][who]] for who in NAMES}
    start = curves["ours"][0][1]
    lowest = max(min(kl for _, kl in curve) for curve in curves.values())
    levels = [(f"{share:.0%} of the start", share * start) for share in LEVELS]
    if lowest > run["target_kl"]:
        levels.append(("lowest of both", lowest))
    rows = []
    for name, level in levels:
        ours, trl = (time_to(level, curves[who]) for who in NAMES)
        ratio = f"{trl / ours:.2f}x" if ours and trl else ""
        rows.append(f"| {run['seed']} | {level:.4f}, {name} | {_seconds(ours)} | {_seconds(trl)} | {ratio} |")
    return rows


def _seconds(value: float | None) -> str:
    return "not reached" if value is None else f"{value:.1f}"


def _range(values: Mapping[str, float]) -> str:
    return f"{values['median']:.2f}x ({values['min']:.2f} to {values['max']:.2f})"


# ---- plots -----------------------------------------------------------------------------------------------------------


def phases_plot(results: Mapping[str, Any]) -> str:
    """Stacked bars, two for each regime, each regime on its own scale: TRL's step fills the width."""
    left, width, bar, y = 150, 640, 18, 26
    parts: list[str] = []
    for name in REGIMES:
        if name not in results:
            continue
        parts.append(_text(10, y, results[name]["regime"]["title"], bold=True))
        means = {who: sum(max(0.0, s) for s in results[name][who]["phases"].values()) for who in NAMES}
        for who in NAMES:
            y += bar + 6
            x = float(left)
            parts.append(_text(10, y + 4, f"{NAMES[who]} {means[who]:.2f} s"))
            phases = results[name][who]["phases"]
            for phase, seconds in sorted(phases.items(), key=lambda item: _place(item[0])):
                length = max(0.0, seconds) / max(means.values()) * width
                colour = COLOURS.get(phase, "#9d755d")
                parts.append(
                    f'<rect x="{x:.1f}" y="{y - 9}" width="{length:.1f}" height="{bar}" fill="{colour}">'
                    f"<title>{escape(phase)}: {seconds:.3f} s</title></rect>"
                )
                if length > 8 * len(phase):
                    parts.append(_text(x + 4, y + 4, phase))
                x += length
        y += 40
    return _svg(left + width + 20, y, parts)


def learning_plot(learning: Mapping[str, Any]) -> str:
    """Held-out KL over seconds of training; one line for each side and seed, the target dashed."""
    left, top, width, height = 60, 20, 680, 300
    curves = [(who, run["curves"][who]) for run in learning["runs"] for who in NAMES]
    most = max(point["seconds"] for _, curve in curves for point in curve)
    highest = 1.05 * max(point["kl"] for _, curve in curves for point in curve)

    def at(seconds: float, kl: float) -> str:
        return f"{left + seconds / most * width:.1f},{top + height - kl / highest * height:.1f}"

    parts = [f'<path d="M{at(0, highest)} L{at(0, 0)} L{at(most, 0)}" fill="none" stroke="#333"/>']
    for who, curve in curves:
        points = " ".join(at(point["seconds"], point["kl"]) for point in curve)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{LINES[who]}" stroke-width="2"/>')
    for run in learning["runs"]:
        target = run["target_kl"]
        parts.append(f'<path d="M{at(0, target)} L{at(most, target)}" stroke="#888" stroke-dasharray="5 4"/>')
    for i, who in enumerate(NAMES):
        parts.append(_text(left + width - 90, top + 16 + 18 * i, NAMES[who], colour=LINES[who], bold=True))
    for share in (0.0, 0.5, 1.0):
        parts.append(_text(left + share * width - 8, top + height + 18, f"{share * most:.0f}"))
        parts.append(_text(8, top + height - share * height / 1.05 + 4, f"{share * highest / 1.05:.3f}"))
    parts.append(_text(left + width / 2 - 60, top + height + 36, "seconds of training"))
    parts.append(_text(left + 8, top + 4, "held-out reverse KL, nats a token"))
    return _svg(left + width + 20, top + height + 50, parts)


def _place(phase: str) -> int:
    order = list(COLOURS)
    return order.index(phase) if phase in order else len(order)


def _text(x: float, y: float, text: str, colour: str = "#222", bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}"{weight}>{escape(text)}</text>'


def _svg(width: float, height: float, parts: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'font-family="sans-serif" font-size="12">\n<rect width="100%" height="100%" fill="white"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )
