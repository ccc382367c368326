"""The quickstart end to end, at a small size, and what the command line says when it cannot run."""

from __future__ import annotations

import json
import logging
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("typer")
pytest.importorskip("jinja2")

from fastsae._errors import UserError
from fastsae.features.cards import Card, Interval
from fastsae.features.excerpts import Example
from fastsae.lm.harvest import Windows
from fastsae.lm.load import EMBEDDED_MODEL, load_subject
from fastsae.nn import TopKSAE
from fastsae.quickstart import pipeline
from fastsae.quickstart.charts import Series, line_chart, ticks
from fastsae.quickstart.page import embedded, flow, render
from fastsae.quickstart.pipeline import TIMING_KEYS, run, write
from fastsae.quickstart.settings import Settings
from fastsae.quickstart.steering import Best, Steering, Text, best_of_each, choose_prompts
from fastsae.steer import MaxActivations
from fastsae.steer.sweep import Point, Sampling, damage, net_effect

NEEDED = {
    "tokens", "tokens_per_s", "speedup_vs_torch", "fvu", "l0", "dead_fraction", "ce_clean",
    "ce_spliced", "ce_zero_ablated", "loss_recovered", "features", "steering",
}  # fmt: skip


@contextmanager
def silent(_title: str, _total: int) -> Iterator[Any]:
    yield lambda n: None


pytestmark = pytest.mark.usefixtures("one_thread")


def small(out: Path) -> Settings:
    return Settings(
        out=out, tokens=3000, held_out_tokens=600, stats_tokens=3000, context=64, d_sae=256, k=8,
        steps=20, batch_size=256, plain_steps=2, cards=4, candidates=3, sample_tokens=8, samples=2,
        strengths=(1.0, 2.0), screen_strengths=(1.0,),
    )  # fmt: skip


@pytest.mark.parametrize("step_s,steps", [(0.0, 40), (0.0026, 30), (0.0035, 20), (0.02, 10)])
def test_a_slow_machine_trains_for_fewer_steps(monkeypatch, tmp_path, step_s, steps):
    now = [0.0]
    monkeypatch.setattr(pipeline.time, "perf_counter", lambda: now[0])

    def step(self, x):
        now[0] += step_s

    monkeypatch.setattr(pipeline.Trainer, "step", step)
    sae, x = TopKSAE(8, 32, 2, seed=0), torch.zeros(4, 8)
    asked = replace(small(tmp_path), steps=40, train_s=0.08)
    assert pipeline.affordable_steps(asked, sae, x) == steps
    assert pipeline.affordable_steps(replace(asked, train_s=None), sae, x) == 40


def cards_in(html: str) -> list[dict[str, Any]]:
    """What the page's script draws cards from."""
    found = re.search(r'<script type="application/json" id="cards-data">(.*?)</script>', html, re.S)
    assert found
    cards: list[dict[str, Any]] = json.loads(found[1])
    return cards


def without_times(report: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in report.items() if key not in TIMING_KEYS}


@pytest.mark.skipif(not EMBEDDED_MODEL.exists(), reason="the embedded model is not here")
def test_end_to_end_and_the_same_seed_repeats(tmp_path: Path) -> None:
    import fastsae

    page = write(run(small(tmp_path / "a"), silent))
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    assert set(report) >= NEEDED
    assert 0 < report["fvu"] < 1
    assert 0 < report["l0"] <= 8
    assert report["ce_clean"] < report["ce_spliced"] < report["ce_zero_ablated"]
    assert 0 < report["loss_recovered"] < 1
    assert report["tokens"] == 20 * 256
    every = report["features"] + report["other_features"]
    assert len(report["features"]) == 4
    assert len({card["index"] for card in every}) == len(every) == report["firing_latents"] > 100
    for card in every:
        assert card["intervals"][0]["examples"] and card["title"]
        assert card["max_activation"] > 0
        assert 0 < card["density"] < 1
        assert sum(card["histogram"]) == pytest.approx(
            card["density"] * report["stats_tokens"], rel=1e-3
        )
        for interval in card["intervals"]:
            for example in interval["examples"]:
                text = "".join(example["pieces"])
                assert text and not text.endswith("\n") and "\n\n" not in text
    steering = report["steering"]
    assert steering["strength"] in (1.0, 2.0)
    assert steering["feature"] in {card["index"] for card in every}
    assert steering["before"].startswith(steering["prompt"])
    assert steering["after"].startswith(steering["prompt"])
    assert steering["prompt"].strip() and not steering["prompt"][-1].isspace()
    assert {p["method"] for p in steering["sweep"]} == {"clamp", "difference of means"}
    assert steering["net_effect"] == max(p["net_effect"] for p in steering["sweep"])
    html = page.read_text()
    assert "default-src 'none'" in html
    assert not re.search(r"""(src|href)=["'](?!#)""", html.split("<body>")[0])
    assert cards_in(html) == every
    again = json.loads((tmp_path / "a" / "report.json").read_text())
    assert render(again) == html  # without training
    sae = fastsae.nn.TopKSAE.from_pretrained(tmp_path / "a" / "sae")
    assert sae.d_sae == 256

    repeated = run(small(tmp_path / "b"), silent).report()
    assert without_times(json.loads(json.dumps(repeated))) == without_times(report)


def command(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fastsae", *args], capture_output=True, text=True, timeout=120
    )


def test_a_model_that_is_not_there_is_one_line_and_code_2(tmp_path: Path) -> None:
    done = command("quickstart", "--model", str(tmp_path / "none"), "--out", str(tmp_path))
    assert done.returncode == 2
    assert "no such folder" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_the_hubs_retries_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    hub, shown = logging.getLogger("huggingface_hub.utils._http"), []

    def offline(_name: str) -> None:
        shown.append(hub.isEnabledFor(logging.WARNING))  # at which the retries are logged
        raise OSError("no network")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", offline)
    logging.getLogger("huggingface_hub").setLevel(logging.WARNING)
    with pytest.raises(UserError, match="cannot load 'org/none': no network"):
        load_subject("org/none")
    assert shown == [False]


@pytest.mark.parametrize(
    "args",
    [
        ["quickstart", "--device", "nope", "--out", "{}"],  # found before any model is loaded
        ["quickstart", "--device", "nope", "--out", "{}/deep/er"],
        ["compare-steering", "--sae", "nope", "--feature", "0", "--out", "{}"],
        ["bench", "--device", "nope", "--json", "{}/b.json"],
        ["bench", "--device", "nope", "--plot", "{}"],
    ],
)
def test_a_folder_that_cannot_be_written_is_found_before_the_work(
    args: list[str], tmp_path: Path
) -> None:
    taken = tmp_path / "file"
    taken.write_text("mine")
    done = command(*(a.format(taken) for a in args))
    assert done.returncode == 2
    assert f"cannot write to {taken}" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert taken.read_text() == "mine"


def test_info_prints_json() -> None:
    done = command("info", "--json")
    assert done.returncode == 0, done.stderr
    assert "topk_encode" in json.loads(done.stdout)["ops"]


def test_info_says_why_a_forced_backend_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTSAE_BACKEND", "cuda")
    monkeypatch.setenv("COLUMNS", "200")
    done = command("info")
    assert done.returncode == 0, done.stderr
    assert "cuda: the cuda kernels need a GPU tensor, got cpu" in done.stdout


def test_import_brings_in_neither_the_cli_nor_its_packages() -> None:
    code = (
        "import sys, fastsae; bad = {'transformers', 'matplotlib', 'typer', 'jinja2', 'rich', "
        "'fastsae.cli', 'fastsae.quickstart'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_missing_package_says_how_to_get_it() -> None:
    code = "import sys; sys.modules['typer'] = None; import fastsae.cli as c; c.main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "typer" in done.stderr
    assert "pip install" in done.stderr
    assert "Traceback" not in done.stderr


def test_model_text_is_escaped() -> None:
    evil = "<script>alert('x')</script>&\n"
    assert "<script" not in flow(evil)
    assert "↵" in flow(evil)
    assert "<" not in embedded([{"title": "</script><script>"}])
    assert cards_in(render(report_of_nothing() | {"features": [card(title=evil)]})) == [
        card(title=evil)
    ]
    assert "<b>" not in line_chart(
        [Series("<b>", [(0.0, 1.0), (1.0, 2.0)])], x_label="<b>", title="<b>"
    )


def tick_labels(svg: str) -> list[str]:
    return re.findall(r'<text class="tick"[^>]*text-anchor="end">([^<]*)', svg)


def test_charts_show_no_value_that_cannot_be() -> None:
    def labels(*ys: float, percent: bool = True) -> list[str]:
        points = [(float(x), y) for x, y in enumerate(ys)]
        bounds = (0.0, 1.0) if percent else (0.0, float("inf"))
        series = [Series("s", points)]
        svg = line_chart(series, x_label="", title="", percent=percent, bounds=bounds)
        return tick_labels(svg)

    for ys in [(0.0, 1.0), (0.0, 0.0), (1.0, 1.0), (0.01, 0.02), (0.97, 1.0), (0.0, 0.003)]:
        shown = labels(*ys)
        assert shown and all(0 <= float(label[:-1]) <= 100 for label in shown), shown
        assert not any(label.startswith("-") for label in shown)
    assert not any(label.startswith("-") for label in labels(0.0, 5.0, percent=False))


def test_charts_show_the_range_in_focus_and_cut_off_the_rest() -> None:
    series = [Series("s", [(0.0, 0.2), (1.0, 0.3), (2.0, 900.0)])]
    svg = line_chart(series, x_label="", title="", focus=(0.2, 0.3))
    assert all(0.1 < float(label) < 0.4 for label in tick_labels(svg))
    inside = re.search(r'<svg x="[^"]*" y="(\d+)" width="[^"]*" height="(\d+)"', svg)
    assert inside and "polyline" in svg[inside.end() :]  # drawn in a viewport that cuts it off
    top, height = map(int, inside.groups())
    ys = [float(y) for y in re.findall(r'<circle[^>]*cy="([^"]*)"', svg)]
    assert [top <= y <= top + height for y in ys] == [True, True, False]


def test_the_loss_curve_leaves_its_first_steps_out_of_the_range() -> None:
    curve = [[i, 50.0 if i == 0 else 0.5 - 0.002 * i] for i in range(120)]
    html = render(report_of_nothing() | {"loss_curve": curve})
    assert all(0 <= float(y) < 1 for y in tick_labels(html) if not y.startswith("held"))


def test_ticks_are_round_and_inside() -> None:
    assert ticks(0.0, 1.0) == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert ticks(3.0, 3.0) == [3.0]
    assert all(0.013 <= t <= 0.47 for t in ticks(0.013, 0.47))


def report_of_nothing() -> dict[str, Any]:
    return {
        "model": "<m>", "hook": "h", "d_sae": 8, "k": 2, "seed": 0, "tokens": 10,
        "tokens_per_s": 1.0, "speedup_vs_torch": 2.0, "fvu": 0.1, "l0": 2.0, "dead_fraction": 0.0,
        "held_out_tokens": 5, "ce_clean": 1.0, "ce_spliced": 1.1, "ce_zero_ablated": 3.0,
        "loss_recovered": 0.95, "loss_curve": [[1, 0.5], [2, 0.2]], "stats_tokens": 10,
        "firing_latents": 0, "features": [], "other_features": [], "steering": None, "busy": "",
        "steps": 3, "steps_planned": 3,
        "timing": {"step_ms": 1.0, "plain_step_ms": 2.0, "threads": 1, "seconds": {}},
    }  # fmt: skip


def card(**changes: Any) -> dict[str, Any]:
    example = Example("a/file.py", ["some ", "cat", " and\nmore"], [0.0, 2.0, 0.0], 1)
    made = Card(
        index=7, title="cat, dog", max_activation=4.0, density=0.25, fires_on=[(" cat", 0.75)],
        promotes=[(" purrs", 0.5), ("\n\n   ", 0.25)], suppresses=[(" barks", -0.5)],
        followed_by=[], agreement=0.5, concentration=0.75, histogram=[4, 0, 1],
        intervals=[Interval(0.75, 1.0, 0.2, []), Interval(0.25, 0.5, 0.1, [example])],
    )  # fmt: skip
    shown: dict[str, Any] = json.loads(json.dumps(replace(made, **changes).as_dict()))
    return shown


def test_page_renders_without_steering() -> None:
    html = render(report_of_nothing())
    assert "&lt;m&gt;" in html
    assert "<m>" not in html
    assert "busy" not in html and "because steps were slow" not in html
    slow = report_of_nothing() | {"busy": "threads waited for a core 48% of the time", "steps": 1}
    told = render(slow)
    assert "on a busy machine: threads waited for a core 48%" in told
    assert "Trained for 1 steps of 3, because steps were slow" in told


def test_latents_without_a_card_are_told() -> None:
    cards = {"features": [card()], "other_features": [card(index=8)]}
    assert "left out" not in render(report_of_nothing() | cards | {"firing_latents": 2})
    told = render(report_of_nothing() | cards | {"firing_latents": 1236})
    assert "The 1,234 that fire least are left out." in told


CLAMP, VECTOR = "clamp", "difference of means"


def steering_of(points: list[Point]) -> Steering:
    base = Point("none", 0.0, 0.01, 0.8, 3.0)
    net = [net_effect(point, base, 5.0) for point in points]
    best = []
    for i in best_of_each(points, net):
        after = [f" {points[i].method}", "\n"]
        best.append(Best(points[i], net[i], [Text("Once", [" a"], after, [False], [True, False])]))
    return Steering(7, [" cat", "cat"], 2.0, base, points, net, best, [], Sampling(2), 5.0)


def test_the_best_point_of_both_methods_is_shown_and_justified() -> None:
    points = [
        Point(CLAMP, 1.0, 0.05, 0.8, 3.1), Point(CLAMP, 2.0, 0.15, 0.8, 3.2),
        Point(VECTOR, 1.0, 0.21, 0.8, 3.1), Point(VECTOR, 2.0, 0.9, 0.1, 9.0),
    ]  # fmt: skip
    steering = steering_of(points)
    got = steering.as_dict()
    assert (got["method"], got["strength"], got["value"]) == (VECTOR, 1.0, 2.0)
    assert got["net_effect"] == max(steering.net) == pytest.approx(0.20 - 0.02)
    assert got["effect"]["gain"] == pytest.approx(0.20)
    assert got["damage"]["total"] == damage(points[2], steering.base, 5.0)
    assert [(o["method"], o["strength"]) for o in got["other_methods"]] == [(CLAMP, 2.0)]
    html = text_of(render(report_of_nothing() | {"steering": got}))
    assert "The difference-of-means vector of latent 7's tokens is added at every token" in html
    assert "The difference of means at 1× has the most effect after damage of all: +0.180" in html
    assert "The best clamp, at 2×, has +0.100, so the vector is what is shown, although" in html
    before, after = html.index("Before Once a"), html.index("After: difference of means at 1× Once")
    assert before < after < html.index("After: clamp at 2× Once clamp")

    html = text_of(
        render(report_of_nothing() | {"steering": steering_of([*points[:2], points[3]]).as_dict()})
    )
    assert "Latent 7 is held at 2× its largest activation" in html
    assert "The clamp at 2× has the most effect after damage of all: +0.100" in html
    assert "The best difference of means, at 2×, has" in html
    assert "although the clamp" not in html


def text_of(html: str) -> str:
    """A page's running text."""
    body = re.sub(r"<(style|script).*?</\1>", "", html, flags=re.S)
    return " ".join(unescape(re.sub(r"<[^>]*>", "", body.replace("<pre>", " <pre>"))).split())


def test_a_sweep_without_a_gain_says_so() -> None:
    points = [Point(CLAMP, 1.0, 0.01, 0.7, 3.5), Point(VECTOR, 1.0, 0.01, 0.6, 4.0)]
    html = text_of(render(report_of_nothing() | {"steering": steering_of(points).as_dict()}))
    assert (
        "Damage outweighs effect at every one of them; the clamp at 1× loses least: -0.225" in html
    )


def test_sweep_charts_leave_out_strengths_that_break_the_text() -> None:
    points = [
        Point(method, strength, share, bigrams, loss)
        for method in (CLAMP, VECTOR)
        for strength, share, bigrams, loss in
        [(1.0, 0.1, 0.8, 3.1), (2.0, 0.2, 0.75, 3.4), (5.0, 0.99, 0.02, 900.0)]
    ]  # fmt: skip
    html = render(report_of_nothing() | {"steering": steering_of(points).as_dict()})
    for svg in html.split('<svg class="chart"')[1:5]:
        assert "at 2: " in svg and "at 5: " not in svg
        assert all(float(label.rstrip("%")) < 100 for label in tick_labels(svg))
    assert "900.000" in html  # the table has it


def test_points_that_are_no_number_do_not_win() -> None:
    points = [Point(CLAMP, s, 0.1, 0.8, 3.0) for s in (1.0, 2.0)] + [
        Point(VECTOR, 1.0, 0.1, 0.8, 3.0)
    ]
    assert best_of_each(points, [float("nan"), 0.1, 0.2]) == [2, 1]


class Words:
    """A tokenizer whose tokens are the pieces given."""

    def __init__(self, pieces: list[str], bos: int | None = None) -> None:
        self.vocabulary, self.bos_token_id = pieces, bos

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [0]}

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(self.vocabulary[i] for i in ids)


def test_prompts_are_whole_words_and_do_not_end_in_a_line_end() -> None:
    tokenizer = Words(["<s>", "ler", " hand", "\n", " the", " end", "ing", "."], bos=0)
    windows = torch.tensor([
        [0, 1, 4, 2, 1, 3, 4, 5, 6],  # ler| the handler\n| the ending
        [0, 4, 5, 7, 3, 3, 3, 3, 3],  # a whole one at once
        [0, 3, 3, 3, 3, 3, 3, 3, 3],  # there is none
    ])  # fmt: skip
    got = choose_prompts(Windows(windows, ["a", "b", "c"]), tokenizer, 3, 4)
    assert [tokenizer.decode(row) for row in got.tolist()] == [
        "<s> the handler", "<s> the end.", "<s>\n\n\n",
    ]  # fmt: skip
    tokenizer.bos_token_id = None
    got = choose_prompts(Windows(windows[:2, 1:], ["a", "b"]), tokenizer, 1, 3)
    assert tokenizer.decode(got[0].tolist()) == " the handler"


BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
ACTIONS = """
<script>
function told() {
  const rows = [...document.querySelectorAll("#latents .latent")].map((row) => row.dataset.latent);
  const text = (element) => element && element.textContent.replace(/\\s+/g, " ").trim();
  const title = document.querySelector("#opened .card h3");
  return { rows, found: text(document.getElementById("found")), opened: text(title) };
}
function look(words) {
  query.value = words;
  query.dispatchEvent(new Event("input"));
  return told();
}
const out = { first: told(), shown: document.querySelectorAll("#cards .card").length };
out.card = document.querySelector("#cards .card").textContent;
out.marks = [...document.querySelectorAll("#cards .card .excerpt .on")].map(
  (on) => on.textContent + on.style.getPropertyValue("--a"));
out.word = look("whale"); out.token = look("PURRS"); out.number = look("12");
out.both = look("dog cat"); out.all = look("");
document.querySelector("[data-sort=density]").click();
out.densest = told();
document.querySelector("#latents [data-latent='12']").click();
addEventListener("hashchange", () => {
  out.clicked = told();
  const result = document.createElement("pre");
  result.id = "result";
  result.textContent = JSON.stringify(out);
  document.body.append(result);
});
</script>
"""


@pytest.mark.skipif(BROWSER is None, reason="no browser here")
def test_in_a_browser_every_latent_is_found_and_drawn(tmp_path: Path) -> None:
    evil = "<img src=x onerror=document.title='broken'>"
    cards = [
        card(),
        card(index=12, title="a whale", density=0.5, promotes=[]),
        card(index=3, title=evil),
    ]
    cards += [card(index=100 + i, title="dog", promotes=[], fires_on=[]) for i in range(600)]
    report = report_of_nothing() | {"features": cards[:2], "other_features": cards[2:]}
    page = tmp_path / "index.html"
    page.write_text(render(report).replace("</body>", ACTIONS + "</body>"))
    done = subprocess.run(
        [str(BROWSER), "--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom",
         f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000",
         page.as_uri() + "#latent-3"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    found = re.search(r'<pre id="result">(.*?)</pre>', done.stdout, re.S)
    assert found, done.stderr
    out = json.loads(unescape(found[1]))
    assert out["shown"] == 2
    assert "fires on 25% of tokens" in out["card"] and "↵␣×3+0.25" in out["card"].replace(
        "\u21b5", "↵"
    )
    assert "−0.50" in out["card"] and "some cat and↵ more" in out["card"]
    assert out["marks"] == ["cat0.50"] * 2
    assert out["first"]["opened"] == evil  # the address named it
    assert out["first"]["rows"][:3] == ["3", "7", "12"]
    assert 3 < len(out["first"]["rows"]) < 603 == len(cards)  # drawn as one scrolls
    assert out["first"]["found"] == "603 of 603"
    assert out["word"]["rows"] == ["12"]
    assert out["token"]["rows"] == ["3", "7"]
    assert out["number"]["rows"][:2] == ["12", "112"]
    assert out["both"]["rows"] == ["7"]
    assert out["all"]["found"] == "603 of 603"
    assert out["densest"]["rows"][0] == "12"
    assert out["clicked"]["opened"] == "a whale"
    assert "broken" not in re.search("<title>(.*?)</title>", done.stdout)[1]  # type: ignore[index]


class _Result:
    """What `write` needs of a Result, with the report given."""

    def __init__(self, out: Path, report: dict[str, Any]) -> None:
        from types import SimpleNamespace

        self.settings = Settings(out=out)
        self.training = SimpleNamespace(sae=TopKSAE(4, 8, 2))
        self.max_activation = MaxActivations(torch.ones(8), 1, "nothing")
        self.report = lambda: report


def test_numbers_that_json_lacks_are_null(tmp_path: Path) -> None:
    """As when zeroing the layer costs the model nothing, or training diverges."""
    report = report_of_nothing()
    report |= {"loss_recovered": float("nan"), "fvu": float("inf"), "ce_spliced": float("-inf")}
    report["loss_curve"][1][1] = float("nan")
    page = write(_Result(tmp_path, report))  # type: ignore[arg-type]

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    read = json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)
    assert read["loss_recovered"] is read["fvu"] is read["ce_spliced"] is None
    assert read["loss_curve"] == [[1, 0.5], [2, None]]
    assert read["ce_clean"] == 1.0
    assert 'y1="nan"' not in page.read_text()


def test_a_report_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(_Result(tmp_path, report_of_nothing()))  # type: ignore[arg-type]
    old = (tmp_path / "report.json").read_text()

    def full(self: Path, text: str, **_: Any) -> int:
        with self.open("w") as file:
            file.write(text[:20])
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UserError, match="no space"):
        write(_Result(tmp_path, report_of_nothing() | {"seed": 1}))  # type: ignore[arg-type]
    monkeypatch.undo()
    assert (tmp_path / "report.json").read_text() == old
    assert sorted(p.name for p in tmp_path.iterdir()) == ["index.html", "report.json", "sae"]
