"""The documentation's site: it builds without a warning, and a browser finds what is searched for."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from browser import Browser

ROOT = Path(__file__).parents[1]
WAIT_MS = 30_000
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    """Where the site is served on this machine."""
    handler = partial(SimpleHTTPRequestHandler, directory=str(site))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def test_a_search_on_the_first_page_for_resume_finds_its_page(address: str, browser: Browser) -> None:
    browser.open(address, 1200)
    assert browser.ask("document.title").startswith("proxbench")
    found = browser.ask(
        f"""new Promise((resolve, reject) => {{
            const field = document.querySelector('input.md-search__input');
            field.focus();
            field.value = 'resume';
            field.dispatchEvent(new Event('input', {{bubbles: true}}));
            field.dispatchEvent(new KeyboardEvent('keyup', {{bubbles: true}}));
            const list = document.querySelector('.md-search-result__list');
            const look = () => {{
                const links = [...list.querySelectorAll('a.md-search-result__link')].map(link => link.href);
                if (links.length) resolve(links);
            }};
            new MutationObserver(look).observe(list, {{childList: true, subtree: true}});
            look();
            setTimeout(() => reject('nothing was found'), {WAIT_MS});
        }})"""
    )
    assert any("/resume/" in each for each in found), found


def test_the_reference_has_every_grid_key_and_every_command(site: Path) -> None:
    keys = (site / "reference" / "grid-keys" / "index.html").read_text(encoding="utf-8")
    assert all(
        f"<code>{key}</code>" in keys for key in ("quantizers", "micro_batch_size", "label_smoothing", "margin_points")
    )
    commands = (site / "reference" / "commands" / "index.html").read_text(encoding="utf-8")
    assert all(f"python -m {name}" in commands for name in ("launch grid", "analysis tables", "suite.data prepare"))
    assert "[dim]" not in commands
    python = (site / "reference" / "python" / "index.html").read_text(encoding="utf-8")
    assert "ProxConnect" in python
    assert "clip_grad_norm_" in python


def test_nothing_is_loaded_from_elsewhere(address: str, browser: Browser) -> None:
    browser.open(address, 1200)
    assert all(each.startswith((address, "data:", "blob:")) for each in browser.requests())
    assert browser.complaints() == []
