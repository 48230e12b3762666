"""inspect.html in a real browser: no requests, no errors in the console, a layout that fits, keys and taps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from contributions import contribution
from inspections import inspection

from mergeopd.reporting.page.contribution import write_contribution_page
from mergeopd.reporting.page.inspection import write_inspection_page

# The least contrast (WCAG 2) that a text has with the colours behind it, where it is below 4.5, or 3 for large text.
LOW_CONTRAST = r"""
(() => {
  const parse = (text) => {
    const numbers = text.match(/[\d.e-]+/g).map(Number), scale = text.startsWith("color(") ? 255 : 1;
    return [...numbers.slice(0, 3).map((number) => scale * number), numbers[3] ?? 1];
  };
  const over = (top, below) => [...[0, 1, 2].map((i) => top[3] * top[i] + (1 - top[3]) * below[i]), 1];
  const linear = (v) => (v <= 10 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4);
  const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const behind = (element) => {
    const own = parse(getComputedStyle(element).backgroundColor);
    return own[3] === 1 || !element.parentElement ? own : over(own, behind(element.parentElement));
  };
  const low = [];
  for (const element of document.querySelectorAll("body *")) {
    const hasText = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    if (!hasText || !element.checkVisibility() || element.closest("script, noscript")) continue;
    const style = getComputedStyle(element), back = behind(element), text = over(parse(style.color), back);
    const [high, dim] = [light(text), light(back)].sort((a, b) => b - a), ratio = (high + 0.05) / (dim + 0.05);
    const size = parseFloat(style.fontSize), isLarge = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
    if (ratio < (isLarge ? 3 : 4.5) || size < 11) low.push(`${ratio.toFixed(2)} ${size} ${element.outerHTML}`);
  }
  return low;
})()
"""
KEYS = {"Tab": 9, "Escape": 27, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39}
TIP = "document.getElementById('tip').checkVisibility() ? document.getElementById('tip').innerText : null"
FOCUS = "document.activeElement"
PLACE = f"[...{FOCUS}.parentElement.children].indexOf({FOCUS})"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("inspection") / "inspect.html"
    write_inspection_page(inspection(), file)
    return file.as_uri()


@pytest.fixture
def press(browser: Any) -> Callable[..., None]:
    """Press a key, as a keyboard does."""

    def key(name: str, shift: bool = False) -> None:
        values = {
            "key": name,
            "code": name,
            "windowsVirtualKeyCode": KEYS[name],
            "modifiers": 8 if shift else 0,
        }
        browser.call("Input.dispatchKeyEvent", type="rawKeyDown", **values)
        browser.call("Input.dispatchKeyEvent", type="keyUp", **values)

    return key


@pytest.mark.parametrize(("width", "dark"), [(390, True), (1440, False)])
def test_the_page_is_legible_and_loads_nothing(url: str, browser: Any, width: int, dark: bool) -> None:
    browser.show(url, width=width, height=40_000, dark=dark)  # all of it is in sight
    assert browser.evaluate("document.documentElement.scrollWidth") == width
    browser.evaluate("document.querySelectorAll('details').forEach((e) => { e.open = true; })")
    tokens = "document.querySelectorAll('.response [role=option]').length"
    browser.evaluate(
        f"new Promise(done => {{ const wait = () => {tokens} === 2160 ? done() : setTimeout(wait, 20); wait(); }})"
    )
    assert browser.evaluate("document.documentElement.scrollWidth") == width
    assert browser.evaluate(LOW_CONTRAST) == []
    background = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(19, 20, 22)" if dark else "rgb(247, 247, 245)")
    browser.evaluate("document.getElementById('theme').click()")
    assert browser.evaluate("getComputedStyle(document.body).backgroundColor") != background
    assert browser.evaluate(LOW_CONTRAST) == []
    assert browser.complaints() == []
    assert browser.requests() == [url]


@pytest.mark.parametrize("width", [390, 1440])
def test_long_names_fit(tmp_path: Path, browser: Any, width: int) -> None:
    name = "mathematics-and-physics/" + "x" * 80
    made = inspection(1, 12)
    assert made.teachers[0].signal is not None
    teacher = replace(made.teachers[0], name=name, model=name, by_domain={name: made.teachers[0].signal})
    long = replace(
        made,
        recipe=name,
        student=name,
        teachers=(teacher, replace(teacher, verdict=made.teachers[1].verdict)),
        domains=(replace(made.domains[0], domain=name),),
        conflicts=(replace(made.conflicts[0], first=name),),
        checkpoints=(replace(made.checkpoints[0], domain=name, checkpoint=name),),
        alignments=(replace(made.alignments[0], domain=name, teacher=name),),
    )
    write_inspection_page(long, tmp_path / "inspect.html")
    browser.show((tmp_path / "inspect.html").as_uri(), width=width, height=20_000)
    browser.evaluate("document.querySelectorAll('details').forEach((e) => { e.open = true; })")
    assert browser.evaluate("document.documentElement.scrollWidth") == width


def test_tokens_and_curves_can_be_read_by_keyboard(
    url: str, browser: Any, press: Callable[..., None]
) -> None:
    browser.show(url)
    browser.evaluate("document.querySelector('#teacher-0 .charts').previousElementSibling.scrollIntoView()")
    browser.evaluate("document.querySelector('#teacher-0 .signal').closest('.scroll').focus()")
    press("Tab")
    assert "0 to 15" in browser.evaluate(TIP)  # the first bucket of the first curve
    press("ArrowRight")
    assert "16 to 31" in browser.evaluate(TIP)
    for _ in range(20):
        press("Tab")
        if browser.evaluate(f"{FOCUS}.matches('.response > *')"):
            break
    assert browser.evaluate(PLACE) == 0  # one tab stop, at the first token
    first = inspection().teachers[0].responses[0].tokens
    tip = browser.evaluate(TIP)
    assert f"{first[0].reverse_kl:.3g} nats" in tip
    assert browser.evaluate("document.querySelectorAll('#tip li').length") == 10
    press("ArrowRight", shift=True)
    strong = [i for i, token in enumerate(first) if token.reverse_kl is not None and token.reverse_kl >= 1]
    assert browser.evaluate(PLACE) == strong[0]
    assert f"{100 * first[strong[0]].candidates_T[0].probability:.3g} %" in browser.evaluate(TIP)
    # No line of the token is covered.
    box, rect = "document.getElementById('tip').getBoundingClientRect()", f"{FOCUS}.getBoundingClientRect()"
    assert browser.evaluate(f"{box}.bottom <= {rect}.top || {box}.top >= {rect}.bottom")
    press("End")
    assert browser.evaluate(PLACE) == len(first) - 1
    end = browser.evaluate(f"{rect}.top")
    press("ArrowUp")
    assert browser.evaluate(PLACE) < len(first) - 1
    assert browser.evaluate(f"{rect}.top") != end or browser.evaluate("scrollY") > 0
    press("Escape")
    assert browser.evaluate(TIP) is None
    press("Home")
    assert browser.evaluate(PLACE) == 0
    press("Tab")
    assert not browser.evaluate(f"{FOCUS}.matches('.response > *')")  # out of the response by one key
    assert browser.evaluate(TIP) is None
    assert browser.complaints() == []


def test_a_tap_shows_a_token_and_hostile_text_is_inert(url: str, browser: Any) -> None:
    browser.show(url, width=390)
    browser.evaluate("document.documentElement.style.scrollBehavior = 'auto'")
    sample = "document.querySelectorAll('[data-response]')[1]"
    browser.evaluate(f"{sample}.querySelector('summary').click()")
    token = f"{sample}.querySelectorAll('[role=option]')[5]"
    browser.evaluate(
        f"new Promise(done => {{ const wait = () => {token} ? done() : setTimeout(wait, 20); wait(); }})"
    )
    assert "</script><script>alert('x')</script>" in browser.evaluate(
        f"{sample}.querySelector('.text').innerText"
    )
    browser.evaluate(f"{token}.scrollIntoView({{block: 'center'}})")
    x, y = browser.evaluate(
        f"(() => {{ const r = {token}.getBoundingClientRect(); return [r.x + 2, r.y + 9]; }})()"
    )
    for kind in ("mousePressed", "mouseReleased"):
        browser.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
    assert browser.evaluate(f"{FOCUS} === {token}")
    assert "reverse KL" in browser.evaluate(TIP)
    box = browser.evaluate("document.getElementById('tip').getBoundingClientRect().toJSON()")
    assert 0 <= box["left"] < box["right"] <= 390
    browser.evaluate(f"{sample}.querySelector('[data-jump=\"1\"]').click()")
    assert browser.evaluate(PLACE) > 5
    assert browser.complaints() == []
    assert browser.requests() == [url]


@pytest.mark.parametrize(("width", "dark"), [(390, True), (1440, False)])
def test_the_page_of_a_contribution_is_legible_and_loads_nothing(
    browser: Any, tmp_path: Path, width: int, dark: bool
) -> None:
    file = tmp_path / "contribution.html"
    write_contribution_page(contribution(), file)
    browser.show(file.as_uri(), width=width, height=20_000, dark=dark)
    assert browser.evaluate("document.documentElement.scrollWidth") == width
    browser.evaluate("document.querySelectorAll('details').forEach((e) => { e.open = true; })")
    assert browser.evaluate("document.documentElement.scrollWidth") == width
    assert browser.evaluate(LOW_CONTRAST) == []
    browser.evaluate("document.getElementById('theme').click()")
    assert browser.evaluate(LOW_CONTRAST) == []
    # The bar of the merged student is an eighth as long as that of the base.
    bars = (
        "[...document.querySelectorAll('.kl .bar i')].slice(0, 2).map((e) => e.getBoundingClientRect().width)"
    )
    base, merged = browser.evaluate(bars)
    assert merged == pytest.approx(base / 8, abs=1.0)
    assert browser.complaints() == []
    assert browser.requests() == [file.as_uri()]
