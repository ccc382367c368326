"""The HTML page of a quickstart run: one file, nothing fetched from anywhere.

Model text and file names are untrusted: jinja2 escapes everything, the one filter that returns
markup escapes what it is given first, and the cards are drawn from JSON by a script that makes
text nodes only (`assets/card.js`).
"""

from __future__ import annotations

import json
import math
from typing import Any

from .._files import json_text
from ..steer.sweep import ENOUGH
from .charts import Series, line_chart
from .settings import ASSETS
from .steering import CLAMP, VECTOR


def render(report: dict[str, Any]) -> str:
    """The page for the content of report.json."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ASSETS),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["flow"] = flow
    template = environment.get_template("quickstart.html.j2")
    steering = report["steering"]
    cards = report["features"] + report["other_features"]
    return template.render(
        r=report,
        s=steering,
        curve=_curve(report),
        sweep=[] if steering is None else _sweep_charts(steering),
        enough=ENOUGH,
        rows=[] if steering is None else _sweep_rows(steering),
        cards=Markup(embedded(cards)),
        left_out=max(0, report["firing_latents"] - len(cards)),
        card_css=Markup((ASSETS / "card.css").read_text(encoding="utf-8")),
        card_js=Markup((ASSETS / "card.js").read_text(encoding="utf-8")),
        page_js=Markup((ASSETS / "quickstart.js").read_text(encoding="utf-8")),
    )


def compact(card: dict[str, Any]) -> str:
    """A card as JSON in one line; NaN and infinities become null."""
    try:
        return json.dumps(card, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except ValueError:
        return compact(json.loads(json_text(card)))


def embedded(cards: list[dict[str, Any]]) -> str:
    """JSON that can stand in a script element, whatever texts it holds."""
    return "[{}]".format(",\n".join(map(compact, cards))).replace("<", "\\u003c")


def flow(text: str) -> Any:
    """A token in running text: line ends are marked and still break the line."""
    from markupsafe import Markup, escape

    shown = str(escape(text)).replace("\r", "").replace("\t", "    ")
    return Markup(shown.replace("\n", '<i class="ws">↵</i>\n'))


def _curve(report: dict[str, Any]) -> Any:
    from markupsafe import Markup

    points = [(x, y) for x, y in report["loss_curve"]]
    # the first steps, from an SAE that knows nothing, would press the rest flat
    settled = [y for _, y in points[len(points) // 50 :] if math.isfinite(y)]
    return Markup(
        line_chart(
            [Series("FVU", points, marks=False)],
            x_label="tokens trained on",
            title="FVU of the training batches",
            bounds=(0.0, math.inf),
            focus=(min(settled), max(settled)) if settled else None,
            baseline=report["fvu"],
            baseline_label=f"held out {report['fvu']:.3f}",
        )
    )


def in_focus(steering: dict[str, Any]) -> list[dict[str, Any]]:
    """The points of the sweep that lose at most as much as there is to gain, and so are not far
    below the best. Beyond them a model says nothing of use, and charts of it show nothing else."""
    return [p for p in steering["sweep"] if p["net_effect"] >= steering["net_effect"] - ENOUGH]


def _sweep_charts(steering: dict[str, Any]) -> list[tuple[str, Any]]:
    from markupsafe import Markup

    damage, effect = steering["damage"], steering["effect"]
    unbounded, share = (-math.inf, math.inf), (0.0, 1.0)
    panels = [
        ("Its own tokens in sampled text", "share", effect["share_before"], share),
        ("Held-out loss, nats", "loss", damage["loss_before"], (0.0, math.inf)),
        (
            "Distinct bigrams in sampled text",
            "distinct_bigrams",
            damage["distinct_bigrams_before"],
            share,
        ),
        ("Effect minus damage", "net_effect", 0.0, unbounded),
    ]
    focus = in_focus(steering)
    last = max((p["strength"] for p in focus), default=math.inf)
    shown = [p for p in steering["sweep"] if p["strength"] <= last]
    charts = []
    for title, key, base, bounds in panels:
        series = [
            Series(
                method,
                [(0.0, base)] + [(p["strength"], p[key]) for p in shown if p["method"] == method],
                style,
            )
            for method, style in ((VECTOR, "b"), (CLAMP, "a"))
        ]
        values = [base, *(p[key] for p in focus)]
        svg = line_chart(
            series,
            x_label="strength, multiples of the maximum activation",
            title=title,
            percent=bounds == share,
            bounds=bounds,
            focus=(min(values), max(values)),
            x_mark=steering["strength"],
        )
        charts.append((title, Markup(svg)))
    return charts


def _sweep_rows(steering: dict[str, Any]) -> list[dict[str, Any]]:
    chosen = steering["method"], steering["strength"]
    return [{**p, "chosen": (p["method"], p["strength"]) == chosen} for p in steering["sweep"]]
