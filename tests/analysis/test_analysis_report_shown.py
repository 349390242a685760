"""How a real Chromium, without a network, shows and prints a report."""

import base64
from collections.abc import Sequence
from pathlib import Path

import pytest
from analysis_samples import cells_of, example
from browser import Browser
from report_samples import accuracies, page_of

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One page with the example and four models with long names, as a file."""
    models = [f"a_model_with_a_name_that_is_long_{k}" for k in range(4)]
    shifts = {"fp": 0.3, "bc": 0.0, "bnn": 0.1, "bnn++": 0.2}
    more = [
        cells_of(name, accuracies(shift, 4), model=model, dataset="more", num_full_precision_parameters=1000 * (2 + k))
        for k, model in enumerate(models)
        for name, shift in shifts.items()
    ]
    path = tmp_path_factory.mktemp("page") / "report.html"
    rows = [{str(key): value for key, value in row.items()} for row in example().frame.to_dict("records")]
    path.write_text(page_of(rows, *more), encoding="utf-8")
    return path


@pytest.mark.parametrize("width", [400, 1200])
def test_a_browser_without_a_network_shows_the_whole_page(browser: Browser, shown: Path, width: int) -> None:
    browser.open(shown, width)
    assert browser.complaints() == []
    assert all(address.startswith(("file:", "data:")) for address in browser.requests())
    assert browser.ask("document.title") == "proxbench: digits"
    num_images = browser.ask("document.images.length")
    assert num_images >= 4
    assert browser.ask("[...document.images].filter(i => i.complete && i.naturalWidth > 0).length") == num_images
    assert browser.ask("document.querySelector('.verdict').innerText.length") > 50
    assert browser.ask("document.documentElement.scrollWidth") == width
    assert len(browser.screenshot()) > 50_000


def contrasts(browser: Browser) -> Sequence[float]:
    """WCAG 2's contrast between each text and its background."""
    found: list[float] = browser.ask(
        """(() => {
        const parse = color => color.match(/[\\d.]+/g).map(Number);
        const light = color => parse(color).slice(0, 3).map(v => v / 255)
            .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
            .reduce((sum, v, k) => sum + v * [0.2126, 0.7152, 0.0722][k], 0);
        const ground = element => {
            for (let e = element; e; e = e.parentElement) {
                const color = getComputedStyle(e).backgroundColor;
                if (parse(color)[3] !== 0) return color;
            }
            return 'rgb(255, 255, 255)';
        };
        return [...document.querySelectorAll('main *')].filter(e => e.innerText).map(e => {
            const [a, b] = [light(getComputedStyle(e).color), light(ground(e))];
            return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        });
        })()"""
    )
    return found


def test_text_stands_out_from_its_ground(browser: Browser, shown: Path) -> None:
    browser.open(shown, 1200)
    assert min(contrasts(browser)) >= 4.5


def test_wide_tables_scroll_in_boxes_that_the_keyboard_reaches(browser: Browser, shown: Path) -> None:
    browser.open(shown, 400)
    boxes = "[...document.querySelectorAll('.scroll')]"
    assert browser.ask(f"{boxes}.some(box => box.scrollWidth > box.clientWidth)")
    assert browser.ask(f"{boxes}.every(box => box.tabIndex === 0 && box.getAttribute('aria-label'))")


def test_printed_no_table_is_cut_off(browser: Browser, shown: Path) -> None:
    browser.open(shown, 690)  # A4 less its margins, in CSS pixels
    folded = "[...document.querySelectorAll('details table')]"
    assert not browser.ask(f"{folded}.some(table => table.checkVisibility())")
    browser.call("Emulation.setEmulatedMedia", media="print")
    try:
        assert browser.ask("document.documentElement.scrollWidth") <= 690
        assert browser.ask("[...document.querySelectorAll('.scroll')].every(box => box.scrollWidth <= box.clientWidth)")
        # Sections that are folded on a screen are open on paper.
        assert browser.ask(f"{folded}.every(table => table.checkVisibility())")
    finally:
        browser.call("Emulation.setEmulatedMedia", media="")
    assert browser.pdf().startswith(b"%PDF")


def test_a_broken_image_or_a_foreign_one_is_noticed(browser: Browser, tmp_path: Path) -> None:
    broken = base64.b64encode(b"nothing").decode()
    path = tmp_path / "broken.html"
    foreign = '<img src="https://example.org/x.png"><script>console.error("oh")</script>'
    path.write_text(f'<!doctype html><img src="data:image/png;base64,{broken}">{foreign}', encoding="utf-8")
    browser.open(path, 400)
    assert browser.ask("[...document.images].filter(i => i.naturalWidth > 0).length") == 0
    assert len(browser.complaints()) >= 2
    assert any(address.startswith("https:") for address in browser.requests())
