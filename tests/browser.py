"""A real browser for the tests of pages: Debian's Chromium, without a window and by its path."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

BROWSER = "/usr/bin/chromium"
DRIVER = "/usr/bin/chromedriver"
INSTALL = "apt-get install chromium chromium-driver"


def require_browser() -> None:
    """Skip the test where there is no browser, and say why."""
    pytest.importorskip("selenium", reason="no browser test: selenium is not installed")
    for path in (BROWSER, DRIVER):
        if not os.access(path, os.X_OK) and shutil.which(path) is None:
            pytest.skip(f"no browser test: there is no {path}; {INSTALL}")


@contextmanager
def chromium() -> Iterator[Any]:
    """A selenium driver."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    # In a container, as root and with a small /dev/shm.
    for argument in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage"):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


def look(driver: Any, page: Path, width: int = 1400, height: int = 900, dark: bool = False) -> None:
    """Open a page in a window of this size and with this taste, and wait until it is drawn."""
    from selenium.webdriver.support.ui import WebDriverWait

    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    taste = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [taste]})
    driver.get(page.as_uri())
    ready = "return document.documentElement.dataset.ready"
    WebDriverWait(driver, 20).until(lambda d: d.execute_script(ready) == "yes")
