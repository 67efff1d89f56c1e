"""The page in a real browser."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest

from outlay.comparison.formats import MINUS, significant
from outlay.comparison.report import write_report

pytestmark = pytest.mark.browser
ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync",
    "--disable-component-update", "--no-first-run",
]  # fmt: skip
HOSTILE = "</script><img src=x onerror=\"document.title='taken'\">"


@pytest.fixture(scope="module")
def browser():
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if not program:
        reason = "no Chromium found: apt-get install chromium"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=program, args=ARGUMENTS)
        yield started
        started.close()


@pytest.fixture
def open_page(browser):
    """Function that opens a file; at the end nothing may have gone wrong or been requested."""
    contexts, complaints = [], []

    def opened(path: Path, address: str = "", script: bool = True, **options):
        context = browser.new_context(java_script_enabled=script, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on(
            "request",
            lambda request: (
                complaints.append(request.url)
                if request.url.split("#")[0] != path.as_uri()
                and not request.url.startswith(("data:image/svg+xml", "blob:"))
                else None
            ),
        )
        page.goto(path.as_uri() + address)
        if script:
            page.wait_for_selector("html[data-ready]", timeout=10_000)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert complaints == []


@pytest.fixture
def report(comparison, tmp_path):
    return write_report(comparison(), tmp_path)


def test_numbers_in_the_page_equal_the_json_on_disk(open_page, report):
    twin = json.loads(report.with_name("report.json").read_text())
    cells = open_page(report).eval_on_selector_all(
        "table[data-key] tbody tr",
        """rows => rows.map(row => [row.closest("table").dataset.key,
            [...row.children].map(c => [c.dataset.column, c.dataset.value, c.textContent])])""",
    )
    rows = {"arms": [], "differences": [], "runs": [], "settings": []}
    for key, row in cells:
        rows[key].append({column: (json.loads(value), text) for column, value, text in row})
    arms = {row["arm"][0]: row for row in rows["arms"]}
    assert len(arms) == len(twin["arms"])
    for arm in twin["arms"]:
        assert arms[arm["name"]]["mean"] == (arm["mean"], significant(arm["mean"]))
        assert arms[arm["name"]]["interval"][0] == arm["interval"]
        assert arms[arm["name"]]["seeds"] == (arm["seeds"], str(arm["seeds"]))
    pairs = {(row["a"][0], row["b"][0]): row for row in rows["differences"]}
    assert len(pairs) == len(twin["pairs"])
    for pair in twin["pairs"]:
        row = pairs[pair["a"], pair["b"]]
        for key in ("difference", "interval", "p_holm", "p_sign_flip", "p_floor", "detectable"):
            assert row[key][0] == pair[key]
        shown = float(row["difference"][1].replace(MINUS, "-"))
        assert shown == pytest.approx(pair["difference"], rel=0.005)
    assert [row["seed"][0] for row in rows["runs"]] == [run["seed"] for run in twin["runs"]]
    assert open_page(report).inner_text("#verdict") == twin["sentence"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_window(open_page, comparison, tmp_path, width, scheme):
    arms = {
        HOSTILE * 2: (0.08, 10, 2.0, 40),
        "a-name-without-a-single-space-" * 4: (0.05, 0, 1.0, 0),
        "plain": (0.0, 5, 1.0, 20),
    }
    for number, data in enumerate([comparison(), comparison(arms, seeds=3)]):
        path = write_report(data, tmp_path / str(number))
        page = open_page(path, viewport={"width": width, "height": 800}, color_scheme=scheme)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        shown = page.evaluate(
            "[...document.querySelectorAll('#differences svg.figure')].filter("
            "s => getComputedStyle(s).display !== 'none').map(s => s.classList[1])"
        )
        assert shown == ["narrow" if width == 390 else "wide"]
        paper = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
        assert (paper == "rgb(255, 255, 255)") == (scheme == "light")


def test_hostile_text_does_nothing(open_page, comparison, tmp_path):
    data = comparison({HOSTILE: (0.08, 10, 2.0, 40), "b": (0.0, 5, 1.0, 20)}, seeds=3)
    data |= {"title": HOSTILE, "command": HOSTILE, "notes": [HOSTILE]}
    page = open_page(write_report(data, tmp_path))
    assert page.title() == HOSTILE
    assert page.locator("img").count() == 0
    assert page.inner_text("h1") == HOSTILE


def test_without_javascript_tables_and_figures_still_show(open_page, report):
    page = open_page(report, script=False)
    assert page.locator("table[data-key=arms] tbody tr").count() == 6
    assert page.locator("#differences svg.wide").is_visible()
    assert page.locator("#quality svg.wide").first.is_visible()
    assert page.locator("#chart svg polyline").count() == 6
    assert not page.locator("button").first.is_visible()


def test_the_cost_is_chosen_with_the_keyboard_and_kept_in_the_address(open_page, report):
    page = open_page(report)
    visible = "#quality figure:visible"
    assert page.locator(visible).get_attribute("data-cost") == "trainable_parameters"
    page.focus("input[name=cost]:checked")
    page.keyboard.press("ArrowRight")
    assert page.locator(visible).get_attribute("data-cost") == "flops"
    assert "cost=flops" in page.url
    again = open_page(report, "#cost=flops")
    assert again.locator(visible).get_attribute("data-cost") == "flops"


def test_curves_are_chosen_with_the_keyboard_and_kept_in_the_address(open_page, report):
    page = open_page(report)
    assert page.locator("#chart canvas").count() == 1
    lines = int(page.get_attribute("html", "data-lines"))
    page.focus("#curve")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowDown")
    page.focus("[data-arm='1']")
    page.keyboard.press("Space")
    page.focus("#logarithmic")
    page.keyboard.press("Space")
    page.wait_for_function("location.hash.includes('log=1')")
    said = page.url.split("#")[1]
    assert "curve=training+loss" in said
    assert "x=tokens" in said
    assert "hide=1" in said
    assert "log=1" in said
    # One arm less: six seeds, a mean and two edges of its band.
    assert int(page.get_attribute("html", "data-lines")) == lines - 9
    again = open_page(report, f"#{said}")
    assert again.input_value("#curve") == "training loss"
    assert again.input_value("#meter") == "tokens"
    assert not again.is_checked("[data-arm='1']")
    assert again.get_attribute("html", "data-lines") == page.get_attribute("html", "data-lines")


def test_everything_that_acts_is_reached_by_tab(open_page, report):
    page = open_page(report)
    seen = set()
    for _ in range(80):
        page.keyboard.press("Tab")
        seen.add(
            page.evaluate(
                "(e => e.id || e.dataset.table || e.name || e.className || e.tagName)"
                "(document.activeElement)"
            )
        )
    assert {"curve", "meter", "part", "logarithmic", "arms", "differences", "SUMMARY"} <= seen
    assert any(str(name).startswith("cost-") for name in seen)


def test_tables_are_saved_as_csv_and_json(open_page, comparison, tmp_path):
    data = comparison({'=1+1,"x"': (0.08, 10, 2.0, 40), "b": (0.0, 5, 1.0, 20)}, seeds=3)
    page = open_page(write_report(data, tmp_path))
    with page.expect_download() as waiting:
        page.click("button[data-table=arms][data-format=csv]")
    lines = Path(waiting.value.path()).read_text().splitlines()
    assert waiting.value.suggested_filename == "arms.csv"
    assert lines[0].startswith("arm,groups,mean,interval_low,interval_high,seeds")
    assert '"\'=1+1,""x"""' in "\n".join(lines)
    with page.expect_download() as waiting:
        page.click("button[data-table=differences][data-format=json]")
    [row] = json.loads(Path(waiting.value.path()).read_text())
    assert row["difference"] == data["pairs"][0]["difference"]


def test_the_command_is_copied(open_page, report):
    page = open_page(report, permissions=["clipboard-read", "clipboard-write"])
    page.click("[data-copy]")
    page.locator(".status", has_text="Command copied.").wait_for()
    assert page.evaluate("navigator.clipboard.readText()").startswith("outlay compare")


def test_it_prints_in_light_colors(open_page, report, tmp_path):
    page = open_page(report, color_scheme="dark")
    printed = page.pdf(format="A4")
    assert len(re.findall(rb"/Type\s*/Page\b", printed)) >= 2
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    page.emulate_media(media="print")
    paper = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    assert paper == "rgb(255, 255, 255)"
    assert not page.locator(".buttons").first.is_visible()


def test_one_run_alone(open_page, comparison, tmp_path):
    path = write_report(comparison({"only": (0.1, 7, 1.0, 28)}, seeds=1), tmp_path)
    page = open_page(path, viewport={"width": 390, "height": 800})
    assert page.locator("#chart canvas").count() == 1
    assert "only reaches" in page.inner_text("#verdict")
    data = comparison({"only": (0.1, 7, 1.0, 28)}, seeds=1)
    for run in data["runs"]:
        del run["curves"]
    page = open_page(write_report(data, tmp_path / "bare"))
    assert page.locator("#curves").count() == 0


def test_axe_finds_no_violation(open_page, report):
    axe = os.environ.get("OUTLAY_AXE")
    if not axe or not Path(axe).is_file():
        pytest.skip("set OUTLAY_AXE to the path of axe.min.js")
    for scheme in ("light", "dark"):
        page = open_page(report, color_scheme=scheme)
        page.evaluate(Path(axe).read_text(encoding="utf-8"))
        found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
        assert [(v["id"], v["nodes"][0]["html"]) for v in found["violations"]] == []
