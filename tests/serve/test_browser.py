"""`fastsae serve`: the page in a browser, as a visitor uses it."""

from __future__ import annotations

import json
from urllib.parse import parse_qs, urlsplit

import pytest

pytest.importorskip("transformers")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("httpx")
pytest.importorskip("websockets")

from browser import Browser, chromium
from serving import TOKEN, Server, alone

from fastsae.steer import clamp

pytestmark = pytest.mark.skipif(chromium() is None, reason="no Chromium here")


@pytest.fixture(scope="module")
def guarded(service):
    made = Server(service, token=TOKEN)
    yield made
    made.stop()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    made = Browser(tmp_path_factory.mktemp("browser"))
    yield made
    made.close()


@pytest.fixture
def page(browser, guarded):
    """Opened anew, as wide as a desk's; no script error and nothing refused when it is left."""
    browser.size(1280, 900)
    browser.dark(False)
    browser.errors.clear()
    browser.open(f"{guarded.url}/#token={TOKEN}")
    yield browser
    browser.run("1")
    assert browser.errors == []


def text(page, name):
    return page.run(f"$('{name}').textContent")


def put(page, where, value):
    """As somebody types it."""
    page.run(
        f"{{const it = document.querySelector({json.dumps(where)}); it.value = {json.dumps(value)};"
        "it.dispatchEvent(new Event('input')); it.dispatchEvent(new Event('change'));}"
    )


def write(page, how="write"):
    page.run(f"delete document.body.dataset.done; $('{how}').click()")
    page.until("document.body.dataset.done === '1'")
    assert text(page, "error") == ""


def expected(service, prompt, value, tokens):
    program = None if value is None else [clamp(5, value, unit="max")]
    made = alone(service, prompt, program, tokens)
    return prompt + service.tokenizer.decode(made, skip_special_tokens=True)


def choose(page, latent):
    put(page, "#search", str(latent))
    page.until(f"$('found').textContent.startsWith('{latent}')")
    page.run("document.querySelector('#found .add').click()")


def alone_with(page, latent, prompt, tokens):
    """One edit, greedy."""
    page.run("document.querySelectorAll('#edits .remove').forEach((b) => b.click())")
    choose(page, latent)
    put(page, "#prompt", prompt)
    put(page, "#temperature", 0)
    put(page, "#tokens", tokens)


def test_it_opens_with_an_example_and_one_press_shows_a_difference(page):
    assert "64 latents" in text(page, "about")
    prompt = page.run("$('prompt').value")
    assert prompt and prompt == prompt.rstrip()
    assert page.run("document.querySelectorAll('#edits li .chip').length") == 6
    write(page)
    before, after = text(page, "before"), text(page, "after")
    assert before.startswith(prompt) and after.startswith(prompt) and before != after
    assert text(page, "state-after") == "full length" and page.run("$('stale').hidden")


def test_texts_are_those_of_the_edits_and_a_slider_moved_afterwards_offers_to_write_again(
    page, service
):
    alone_with(page, 5, "import os", 48)
    put(page, "#edits input[type=range]", 4)
    assert page.run("document.querySelector('#edits input[type=number]').value") == "4"
    write(page)
    assert text(page, "before") == expected(service, "import os", None, 48)
    assert text(page, "after") == expected(service, "import os", 4.0, 48)
    assert page.run("$('stale').hidden")
    put(page, "#edits input[type=range]", 2)
    assert not page.run("$('stale').hidden") and "have changed" in text(page, "why")
    assert page.run("$('again').getBoundingClientRect().height > 20")
    put(page, "#edits input[type=range]", 4)
    assert page.run("$('stale').hidden")  # as it was
    put(page, "#edits input[type=number]", 3)
    write(page, "again")
    assert text(page, "after") == expected(service, "import os", 3.0, 48)
    assert page.run("$('stale').hidden")
    put(page, "#prompt", "import sys")
    assert "settings have changed" in text(page, "why") and not page.run("$('stale').hidden")


def test_a_slider_moved_while_text_is_written_acts_and_is_told(page, service):
    alone_with(page, 5, "import os", 96)
    put(page, "#edits input[type=range]", 4)
    page.run(  # before the server has said what this text is called
        "delete document.body.dataset.done; $('write').click();"
        "setTimeout(() => { const s = document.querySelector('#edits input[type=range]');"
        "s.value = 0; s.dispatchEvent(new Event('input')); })"
    )
    page.until("document.body.dataset.done === '1'")
    assert text(page, "after") != expected(service, "import os", 4.0, 96)
    assert "while this was written" in text(page, "why") and not page.run("$('stale').hidden")


def test_writing_again_gives_up_what_is_being_written(page, service):
    alone_with(page, 5, "import os", 40)
    page.run("delete document.body.dataset.done; $('write').click(); $('write').click();")
    page.run("$('write').click()")
    page.until("document.body.dataset.done === '1' && !running")
    assert text(page, "before") == expected(service, "import os", None, 40)
    page.run("delete document.body.dataset.done; $('tokens').value = 96; $('write').click()")
    page.until("!!running")
    page.run("$('stop').click()")
    page.until("document.body.dataset.done === '1'")
    assert text(page, "error") == ""


def test_limits_are_told_in_a_line(page):
    put(page, "#tokens", 5000)
    write(page)
    assert text(page, "note") == "At most 96 tokens are written at a time."
    page.run("$('prompt').value = 'x = 1 🙂\\n'.repeat(3000)")
    write(page)
    assert "only its last" in text(page, "note")
    put(page, "#prompt", "import os")
    page.run("document.querySelectorAll('#edits .remove').forEach((b) => b.click())")
    put(page, "#tokens", 4)
    write(page)
    assert "there are no edits" in text(page, "note") and not page.run("$('none').hidden")
    put(page, "#temperature", 17)
    put(page, "#seed", "")
    write(page)
    assert page.run("[$('temperature').value, $('seed').value]") == ["2", "0"]


def test_latents_that_fire_are_listed_by_token_and_chosen(page):
    put(page, "#prompt", "import os\nx = 1")
    page.run("document.querySelectorAll('#edits .remove').forEach((b) => b.click())")
    page.run("$('ask').click()")
    page.until("!$('firing').hidden")
    tokens = page.run("strip().map((b) => b.textContent)")
    assert "".join(tokens) == "import os⏎x = 1"
    assert page.run("document.querySelectorAll('#fired .add').length") > 5
    assert "× max" in text(page, "fired")
    page.run("document.querySelector('#fired .add').focus()")
    assert page.run("strip().some((b) => +b.style.getPropertyValue('--level') > 0.5)")
    page.run("strip()[0].focus()")
    for key in ("ArrowRight", "ArrowRight", "ArrowLeft", "Enter"):
        page.press(key)
    assert page.run("strip().map((b) => b.getAttribute('aria-pressed')).indexOf('true')") == 1
    page.until("!$('all').hidden && $('which').textContent.includes('os')")
    assert page.run("document.querySelectorAll('#fired .add').length") == page.run(
        "reading.fired[1].length"
    )
    latent = page.run("reading.fired[1][0][0]")
    page.run("document.querySelector('#fired .add').click()")
    assert page.run("program()[0].latent") == latent
    assert page.run("document.querySelector('#fired li').classList.contains('in')")
    put(page, "#prompt", "import sys")
    assert not page.run("$('outdated').hidden")


def test_a_card_is_opened_and_left_by_the_keyboard(page):
    put(page, "#search", "9")
    page.until("$('found').textContent.startsWith('9')")
    page.run("document.querySelector('#found .more').focus()")
    page.press("Enter")
    page.until("$('card').open")
    shown = text(page, "card")
    for part in ("Latent 9", "largest activation seen 30", "Promotes", "Suppresses"):
        assert part in shown
    assert page.run("document.querySelectorAll('#card .effects li').length") == 20
    page.press("Escape")
    page.until("!$('card').open")
    page.press("Enter")
    page.until("$('card').open")
    page.run("document.querySelector('#card .main').click()")
    assert not page.run("$('card').open") and page.run("program().at(-1).latent") == 9


def test_operations_units_and_gates(page):
    alone_with(page, 5, "import os", 20)
    choose(page, 9)
    for op, value in (("min_clamp", 2), ("scale", 2), ("add", 2)):
        put(page, "#edits li select.op", op)
        made = page.run("program()[0]")
        assert made["op"] == op and made["value"] == value
        assert made.get("unit") == (None if op == "scale" else "max")
        write(page)
    put(page, "#edits li select.unit", "raw")
    assert page.run("program()[0]") == {"latent": 5, "op": "add", "value": 60, "unit": "raw"}
    assert page.run("document.querySelector('#edits input[type=range]').max") == "120"
    put(page, "#edits li select.op", "ablate")
    assert page.run("program()[0]") == {"latent": 5, "op": "ablate"}
    assert page.run(
        "document.querySelector('#edits li').querySelector('input[type=range]') === null"
    )
    page.run("document.querySelector('#edits .gate input').click()")
    assert page.run("program()[0].when") == {"latent": 9, "above": 0, "unit": "raw"}
    page.until("document.querySelectorAll('#edits .when .chip').length === 6")
    put(page, "#edits .when input", "64")
    page.until("$('edits').textContent.includes('A number from 0 to 63')")
    assert page.run("program()[0]") == {"latent": 5, "op": "ablate"}
    put(page, "#edits .when input", "7")
    put(page, "#edits .when input:nth-of-type(2)", "0.5")
    page.until("document.querySelector('#edits .when select').length === 2")
    put(page, "#edits .when select", "max")
    made = page.run("program()[0].when")
    assert made["latent"] == 7 and made["unit"] == "max"
    assert made["above"] == pytest.approx(0.5 / 30, rel=0.01)
    write(page)


def test_a_link_restores_all_but_the_token(page, guarded):
    alone_with(page, 5, "import os\nx = '%+&#\u00e9'", 33)
    choose(page, 9)
    put(page, "#seed", 7)
    put(page, "#edits li select.op", "scale")
    page.run("document.querySelector('#edits .gate input').click()")
    state = page.run("[settings(), program()]")
    link = page.run("link()")
    assert TOKEN not in link and "token=" not in link
    page.until(f"location.hash === '#token={TOKEN}&' + fragment()")
    address = page.run("location.href")
    page.open(address)  # a reload
    assert page.run("[settings(), program()]") == state
    fragment = urlsplit(link).fragment
    assert parse_qs(fragment)["seed"] == ["7"]
    page.open(f"{guarded.url}/#token={TOKEN}&{fragment}")
    assert page.run("[settings(), program()]") == state
    page.run(f"location.hash = {json.dumps(fragment.replace('seed=7', 'seed=8'))}")
    page.until("$('seed').value === '8'")  # a link that is pasted over the page
    page.run("$('share').click()")
    page.until("$('share').textContent === 'Copied' || !$('link').hidden")


def test_a_link_that_somebody_made_up_breaks_nothing(page, guarded):
    edits = [
        {"latent": 5, "value": 3}, {"latent": 99, "value": 3}, {"latent": 5.5, "value": 1}, None,
        {"latent": 6, "op": "exec", "value": 1}, {"latent": 7, "value": "1"}, "x",
        {"latent": 8, "op": "ablate", "when": {"latent": 640}}, [],
        {"latent": 9, "op": "add", "value": 1, "unit": "<b>", "when": {"latent": 3, "above": "y"}},
    ]  # fmt: skip
    for steer in (json.dumps(edits), "{", "3", "null", ""):
        page.open(f"{guarded.url}/#token={TOKEN}&prompt=<b>x</b>&tokens=a&steer={steer}")
        assert page.run("$('prompt').value") == "<b>x</b>"
        found = page.run("program()")
        assert [e["latent"] for e in found] == ([5, 8, 9] if "latent" in steer else [])
        write(page)
    assert text(page, "before").startswith("<b>x</b>")


def test_a_server_with_a_token_asks_for_it(browser, guarded):
    browser.call("Page.navigate", url="about:blank")
    browser.call("Page.navigate", url=guarded.url + "/#prompt=x&steer=[]")
    browser.until("document.body && !$('locked').hidden")
    assert text(browser, "error") == ""
    browser.run("$('token').value = 'wrong'; $('open').click()")
    browser.until("$('error').textContent === 'This is not the server\\'s token.'")
    browser.run(f"$('token').value = {TOKEN!r}; $('open').click()")
    browser.until("document.body.dataset.ready === '1' && $('locked').hidden")
    browser.until(f"location.hash.startsWith('#token={TOKEN}&prompt=x&')")


def test_a_server_that_is_gone_is_said_in_plain_words(browser, service):
    own = Server(service)
    browser.open(own.url)
    own.stop()
    for press in ("write", "ask"):
        browser.run(f"show(''); $('{press}').click()")
        browser.until(
            "$('error').textContent === 'The server does not answer. Is it still running?'"
        )


# text and its background, over one another, of all that can be seen
CONTRAST = """(() => {
  const number = (text) => {
    const parts = text.match(/[\\d.]+/g).map(Number), unit = text.startsWith("color(") ? 255 : 1;
    return [...parts.slice(0, 3).map((v) => v * unit), parts[3] === undefined ? 1 : parts[3]];
  };
  const over = ([r, g, b, a], under) => [r, g, b].map((v, i) => v * a + under[i] * (1 - a));
  const ground = (e) => {
    const below = e.parentElement ? ground(e.parentElement) : [255, 255, 255];
    return over(number(getComputedStyle(e).backgroundColor), below);
  };
  const light = (c) => {
    const [r, g, b] = c.map((v) => v / 255).map((v) => v < 0.04 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const bad = [];
  for (const e of document.querySelectorAll("body *")) {
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    if (!own || !e.checkVisibility() || e.disabled || e.closest("script")) continue;
    const back = ground(e), front = over(number(getComputedStyle(e).color), back);
    const [low, high] = [light(back), light(front)].sort((a, b) => a - b);
    if ((high + 0.05) / (low + 0.05) < 4.5) bad.push(e.outerHTML.slice(0, 90));
  }
  return bad;
})()"""  # noqa: E501


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width,height", [(1280, 900), (390, 844)])
def test_it_fits_and_can_be_read(page, width, height, dark, tmp_path):
    """Nothing wider than the screen, every text at 4.5 to 1 on its background or better."""
    page.size(width, height, mobile=width < 500)
    page.dark(dark)
    page.run("$('ask').click()")
    page.until("!$('firing').hidden")
    write(page)
    put(page, "#edits input[type=range]", 1)
    page.run("document.querySelector('#edits .gate input').click()")
    page.run("document.querySelector('#fired .add').focus()")
    wide = """[...document.querySelectorAll("main *")].filter((e) => e.checkVisibility() &&
        !e.closest("pre, .list, .tokens, option") &&
        e.getBoundingClientRect().right > document.documentElement.clientWidth + 1)
        .map((e) => e.outerHTML.slice(0, 80))"""
    assert page.run("document.documentElement.scrollWidth") <= width and page.run(wide) == []
    assert page.run(CONTRAST) == []
    if width < 500:  # both texts on one screen with the slider that changes them
        top = "$('before').getBoundingClientRect().top"
        bottom = "document.querySelector('#edits input[type=range]').getBoundingClientRect().bottom"
        assert page.run(f"{bottom} - {top}") < height
    page.run("open(9)")
    page.until("$('card').open")
    assert page.run("$('card').getBoundingClientRect().right") <= width
    assert page.run("$('card').scrollWidth <= $('card').clientWidth")
    assert page.run(CONTRAST.replace("body *", "#card *")) == []
    page.picture(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 20_000
