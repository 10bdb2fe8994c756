"""A plan for a terminal."""

from __future__ import annotations

import math

from fedcanary.monitor.planner import PanelForecast, Plan, Unmet

HEADS = ("mode", "effect", "margin", "noise", "95% width", "delay", "power", "clear", "from round")


def text(plan: Plan) -> str:
    """What was wished, both kinds of panel, the one recommended, and what cannot be met."""
    wish = plan.wish
    lines = [
        f"{wish.clients} clients, {wish.rounds} rounds; the window costs epsilon {wish.epsilon:g} at delta "
        f"{wish.delta:g} ({wish.neighbours}, {wish.trust})",
        f"false alarms: at most {plan.false_alarm:g} for any, over all modes and rounds",
        f"effects begin in round {wish.first}; delay counts from it (1: at once), power is up to round {wish.rounds}",
        f"clear: share that say so in round {wish.rounds} where nothing is wrong, and the first round that does",
    ]
    for panel in plan.panels:
        lines += _panel(panel)
    lines += ["", f"recommended: {plan.recommended or 'neither'} ({plan.reason})"]
    if plan.unmet:
        lines += [f"cannot be met with power {wish.power:g}:", *(f"  {_plainly(u)}" for u in plan.unmet)]
    return "\n".join(lines)


def _panel(panel: PanelForecast) -> list[str]:
    how = "each client once" if panel.kind == "rotating" else "the same in every round"
    lines = ["", f"{panel.kind}: {panel.size} clients a round, {how}"]
    if panel.why:
        return [*lines, f"  impossible: {panel.why}"]
    lines += [
        f"  noise {panel.noise_multiplier:.3g} times the norm of a message, in the sum of {panel.floor}",
        "  {:<27}{:>7}{:>8}{:>9}{:>11}{:>7}{:>7}{:>7}{:>12}".format(*HEADS),
    ]
    for m in panel.modes:
        delay, since = (f"{x:.1f}" if math.isfinite(x) else "-" for x in (m.delay, m.clear_round))
        lines.append(
            f"  {m.mode:<27}{m.effect:>7.3g}{m.margin:>8.3g}{m.noise:>9.4f}{m.width:>11.3f}"
            f"{delay:>7}{m.power:>7.2f}{m.clear:>7.2f}{since:>12}"
        )
    return lines


def _plainly(unmet: Unmet) -> str:
    ways = [
        *([f"{unmet.clients} clients"] if unmet.clients is not None else []),
        *([f"epsilon {unmet.epsilon:g}"] if unmet.epsilon is not None else []),
        *([f"an effect of {unmet.effect:g}"] if unmet.effect is not None else []),
    ]
    about = "panel" if unmet.mode is None else f"{unmet.what} of {unmet.mode}"
    return f"{about}: {unmet.reason}; would do: {', or '.join(ways) or 'nothing within reach alone'}"
