"""The page of `alvts show`, in a real browser."""

import re

import numpy as np
import pytest
from browser import chromium, look, require_browser
from show_tools import LAYERS, make_shown

from alvts_cli.show.page import to_page

WORDS = "what's </script><b>this</b> & that?"


@pytest.fixture(scope="module")
def driver():
    require_browser()
    with chromium() as driver:
        yield driver


@pytest.fixture(scope="module")
def shown():
    return make_shown(WORDS)


@pytest.fixture(scope="module")
def page(shown, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "x.html"
    path.write_bytes(to_page(shown))
    return path


@pytest.fixture(autouse=True)
def no_complaints(driver):
    """Whatever a test does, the console stays empty."""
    driver.get_log("browser")
    yield
    assert driver.get_log("browser") == []


def press(driver, place, *keys):
    """Press keys with the focus on an element."""
    from selenium.webdriver.common.by import By

    element = driver.find_element(By.CSS_SELECTOR, place)
    for key in keys:
        element.send_keys(key)


def text(driver, place):
    return driver.execute_script("return document.querySelector(arguments[0]).innerText", place)


def keys():
    from selenium.webdriver.common.keys import Keys

    return Keys


CLEAR = """
const [index, rows, columns] = arguments, shown = document.querySelectorAll("canvas")[index];
const copy = document.createElement("canvas");
copy.width = shown.width; copy.height = shown.height;
const context = copy.getContext("2d", {willReadFrequently: true});
context.drawImage(shown, 0, 0);
return Array.from({length: rows * columns}, (_, i) => {
  const x = (i % columns + .5) / columns * copy.width;
  const y = (Math.floor(i / columns) + .5) / rows * copy.height;
  return [...context.getImageData(x, y, 1, 1).data].slice(0, 3);
});"""


def drawn_clear(driver, shown, index):
    """bool `[rows, columns]` of a view with a token a square: whether it has the square's colour.

    Where it has not, it must be without colour.
    """
    view = shown.views[index]
    rows, columns = view.tokens.shape
    pixels = np.array(driver.execute_script(CLEAR, index, rows, columns))
    pixels = pixels.reshape(rows, columns, 3)
    clear = np.abs(pixels - np.asarray(shown.picture(view))[8::16, 8::16]).max(axis=-1) <= 3
    grey = np.ptp(pixels, axis=-1) <= 14
    assert (clear ^ grey).all()
    return clear


def test_both_sliders_change_the_picture_to_what_is_kept(driver, page, shown):
    look(driver, page)
    Keys = keys()
    press(driver, "#keep", Keys.HOME)
    pictures = set()
    for traced in shown.traces:
        press(driver, "#layer", Keys.HOME)
        for layer in range(LAYERS):
            for index in (0, 2):
                kept = traced.kept[layer][shown.views[index].tokens.numpy()]
                assert (drawn_clear(driver, shown, index) == kept).all(), (layer, index)
            assert f"keeps {traced.counts[layer]} of 48" in text(driver, "#layer-says")
            assert text(driver, "#bars .now b") == str(traced.counts[layer])
            pictures.add(driver.execute_script("return views[2].canvas.toDataURL()"))
            press(driver, "#layer", Keys.ARROW_RIGHT)
        press(driver, "#keep", Keys.ARROW_RIGHT)
    # One choice for layers 1 to 3 and one for 4 and 5, then a new one in each; and all in layer 0.
    assert len(pictures) == 1 + 2 + 5


def test_what_a_layer_does_is_said(driver, page, shown):
    look(driver, page)
    Keys = keys()
    press(driver, "#keep", Keys.HOME)
    said = []
    for _ in range(LAYERS):
        said.append(text(driver, "#layer-says").partition("; ")[2])
        press(driver, "#layer", Keys.ARROW_RIGHT)
    held = "goes on with the choice of layer 1"
    assert said == ["runs on all", "chooses anew", held, held, "chooses anew", held[:-1] + "4"]
    average = shown.traces[0].answer.visual_tokens_kept
    assert f"{average:.1f} of 48 tokens" in text(driver, "#keep-says")


def test_bars_are_as_high_as_the_counts_and_lead_to_their_layer(driver, page, shown):
    look(driver, page)
    press(driver, "#keep", keys().END)
    heights = driver.execute_script(
        "return [...document.querySelectorAll('#bars i')].map(e => e.offsetHeight)"
    )
    counts = np.array(shown.traces[1].counts)
    assert np.abs(np.array(heights) / max(heights) - counts / counts.max()).max() < 0.02
    driver.execute_script("document.querySelectorAll('#bars div')[4].click()")
    assert text(driver, "#layer-says").startswith("4 of")


def test_pointing_at_a_token_says_how_important_it_is_and_where_it_is_kept(driver, page, shown):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By

    look(driver, page)
    Keys = keys()
    press(driver, "#keep", Keys.END)
    press(driver, "#layer", Keys.HOME, *[Keys.ARROW_RIGHT] * 3)
    canvas = driver.find_elements(By.CSS_SELECTOR, "canvas")[2]
    size = canvas.size
    # Row 1, column 4 of 4 x 6, from the middle.
    right, down = size["width"] * (4.5 / 6 - 0.5), size["height"] * (1.5 / 4 - 0.5)
    ActionChains(driver).move_to_element_with_offset(canvas, round(right), round(down)).perform()
    said = text(driver, "#token")
    traced, token = shown.traces[1], 20 + 1 * 7 + 4
    assert said.startswith(f"Token {token} (image 2, tiles, row 1, column 4): ")
    assert ("kept" if traced.kept[3, token] else "skipped") + " in layer 3" in said
    importance = traced.importance[3]
    number, rank = re.search(r"Importance (\S+) times the mean, rank (\d+) of 48", said).groups()
    assert float(number) == pytest.approx(importance[token], rel=0.06)
    assert int(rank) == 1 + (importance > importance[token]).sum()
    having = np.flatnonzero(traced.kept[:, token])
    assert f"Kept in {len(having)} of 6 layers: " in said
    marked = driver.execute_script(
        "return [...document.querySelectorAll('#bars div')].map(e => e.classList.contains('has'))"
    )
    assert np.flatnonzero(marked).tolist() == having.tolist()
    ActionChains(driver).move_to_element(driver.find_element(By.ID, "prompt")).perform()
    assert text(driver, "#token").startswith("Point at the picture")


def test_the_arrow_keys_walk_over_the_tokens(driver, page):
    look(driver, page)
    Keys = keys()
    press(driver, "figure:nth-child(1) canvas", Keys.ARROW_UP)
    assert text(driver, "#token").startswith("Token 10 (image 1, row 2, column 2)")
    press(driver, "figure:nth-child(1) canvas", Keys.ARROW_UP, Keys.ARROW_LEFT)
    assert text(driver, "#token").startswith("Token 5 (image 1, row 1, column 1)")
    press(driver, "figure:nth-child(1) canvas", *[Keys.ARROW_RIGHT] * 9)
    assert text(driver, "#token").startswith("Token 7 (image 1, row 1, column 3)")
    press(driver, "figure:nth-child(1) canvas", Keys.ESCAPE)
    assert text(driver, "#token").startswith("Point at the picture")
    # Everything is reached with the tab key alone.
    reached = driver.execute_script(
        "return [...document.querySelectorAll('canvas, input')].every(e => e.tabIndex === 0)"
    )
    assert reached


def test_answers_stand_beside_each_other(driver, page):
    look(driver, page)
    Keys = keys()
    press(driver, "#keep", Keys.HOME)
    assert (text(driver, "#dense"), text(driver, "#selective")) == ("a dog", "a cat")
    assert "another answer" in text(driver, "#selective-says")
    press(driver, "#keep", Keys.ARROW_RIGHT)
    assert (text(driver, "#dense"), text(driver, "#selective")) == ("a dog", "a dog")
    assert "the same" in text(driver, "#selective-says")
    assert text(driver, "h1") == WORDS
    left, right = (
        driver.execute_script(
            "const r = document.querySelector(arguments[0]).getBoundingClientRect();"
            "return [r.left, r.top]",
            place,
        )
        for place in ("#dense", "#selective")
    )
    assert left[1] == right[1] and left[0] < right[0]


MEASURED = """
const shows = e => e.checkVisibility() && e.innerText !== "" && [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim());
const rgb = text => text.match(/[\\d.]+/g).map(Number);
const light = c => c.slice(0, 3).map(v => v / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
  .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
const behind = e => { for (; e; e = e.parentElement) { const c = rgb(getComputedStyle(e).backgroundColor); if (c.length < 4 || c[3] > 0) return c; } return [255, 255, 255]; };
return [...document.body.querySelectorAll("*")].filter(e => !["SCRIPT", "STYLE"].includes(e.tagName) && shows(e)).map(e => {
  const box = e.getBoundingClientRect(), style = getComputedStyle(e);
  const [a, b] = [light(rgb(style.color)), light(behind(e))].sort((x, y) => y - x);
  return {what: e.id || e.tagName, left: box.left, right: box.right, size: parseFloat(style.fontSize), contrast: (a + .05) / (b + .05), cut: e.scrollWidth - e.clientWidth};
});"""  # noqa: E501


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [400, 1400])
def test_it_is_readable(driver, page, width, dark):
    look(driver, page, width, dark=dark)
    press(driver, "figure:nth-child(3) canvas", keys().ARROW_UP)
    for one in driver.execute_script(MEASURED):
        assert one["left"] >= 0 and one["right"] <= width, one
        assert one["size"] >= 11 and one["contrast"] >= 4.5, one
    assert driver.execute_script("return document.documentElement.scrollWidth") <= width
    paper = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", paper))) < 200) == dark
    # In a narrow window the sliders stay in sight under the pictures; in a wide one, beside them.
    views, sliders = (
        driver.execute_script(
            "return document.querySelector(arguments[0]).getBoundingClientRect().toJSON()", place
        )
        for place in ("#views", "#controls")
    )
    assert sliders["bottom"] <= 900
    assert (sliders["left"] >= views["right"]) == (width == 1400)


def test_nothing_is_fetched(driver, page):
    look(driver, page)
    fetched = driver.execute_script(
        "return performance.getEntriesByType('resource').map(e => e.name)"
    )
    assert all(name.startswith("data:") for name in fetched)
    # And nothing can be.
    driver.execute_script(
        "window.blocked = 0; addEventListener('securitypolicyviolation', () => blocked++)"
    )
    driver.execute_async_script("fetch('https://example.org').catch(() => 0).finally(arguments[0])")
    assert driver.execute_script("return blocked") == 1
    assert len(driver.get_log("browser")) >= 1
