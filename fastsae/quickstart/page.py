"""The HTML page of a quickstart run: one file, nothing fetched from anywhere.

Model text and file names are untrusted: jinja2 escapes everything, and the few filters that return
markup escape what they are given first.
"""

from __future__ import annotations

from typing import Any

from ..steer.sweep import ENOUGH
from .charts import Series, line_chart
from .settings import ASSETS

CLAMP, VECTOR = "clamp", "difference of means"


def render(report: dict[str, Any]) -> str:
    """The page for the content of report.json."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ASSETS),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["flow"] = flow
    environment.filters["chip"] = chip
    template = environment.get_template("quickstart.html.j2")
    steering = report["steering"]
    return template.render(
        r=report,
        s=steering,
        curve=_curve(report),
        sweep=[] if steering is None else _sweep_charts(steering),
        enough=ENOUGH,
        rows=[] if steering is None else _sweep_rows(steering),
    )


def flow(text: str) -> Any:
    """A token in running text: line ends are marked and still break the line."""
    from markupsafe import Markup, escape

    shown = str(escape(text)).replace("\r", "").replace("\t", "    ")
    return Markup(shown.replace("\n", '<i class="ws">↵</i>\n'))


def chip(text: str) -> Any:
    """A token on its own: spaces and line ends are made visible."""
    from markupsafe import Markup, escape

    newlines = len(text) - len(text.lstrip("\n"))
    spaces = len(text[newlines:]) - len(text[newlines:].lstrip(" "))
    rest = text[newlines + spaces :]
    mark = "↵" * newlines
    mark += f"␣×{spaces}" if spaces > 2 else "␣" * spaces
    shown = str(escape(rest)).replace("\n", "↵").replace("\t", "⇥").replace("\r", "")
    if not mark and not shown:
        shown = '""'
    return Markup((f'<i class="ws">{mark}</i>' if mark else "") + shown)


def _curve(report: dict[str, Any]) -> Any:
    from markupsafe import Markup

    points = [(x, y) for x, y in report["loss_curve"]]
    return Markup(
        line_chart(
            [Series("FVU", points, marks=False)],
            x_label="tokens trained on",
            title="FVU of the training batches",
            y_zero=True,
            baseline=report["fvu"],
            baseline_label=f"held out {report['fvu']:.3f}",
        )
    )


def _sweep_charts(steering: dict[str, Any]) -> list[tuple[str, Any]]:
    from markupsafe import Markup

    damage, effect = steering["damage"], steering["effect"]
    panels = [
        ("Its own tokens in sampled text", "share", effect["share_before"], True, True),
        ("Held-out loss, nats", "loss", damage["loss_before"], False, False),
        (
            "Distinct bigrams in sampled text",
            "distinct_bigrams",
            damage["distinct_bigrams_before"],
            True,
            True,
        ),
        ("Effect minus damage", "net_effect", 0.0, False, False),
    ]
    charts = []
    for title, key, base, y_zero, percent in panels:
        series = [
            Series(
                method,
                [(0.0, base)]
                + [(p["strength"], p[key]) for p in steering["sweep"] if p["method"] == method],
                style,
            )
            for method, style in ((VECTOR, "b"), (CLAMP, "a"))
        ]
        svg = line_chart(
            series,
            x_label="strength, multiples of the maximum activation",
            title=title,
            height=190,
            y_zero=y_zero,
            percent=percent,
            x_mark=steering["strength"],
        )
        charts.append((title, Markup(svg)))
    return charts


def _sweep_rows(steering: dict[str, Any]) -> list[dict[str, Any]]:
    return [{**p, "chosen": _is_chosen(p, steering)} for p in steering["sweep"]]


def _is_chosen(point: dict[str, Any], steering: dict[str, Any]) -> bool:
    return bool(point["method"] == CLAMP and point["strength"] == steering["strength"])
