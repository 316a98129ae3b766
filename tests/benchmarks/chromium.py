"""Opens a page in a real browser, Qt's Chromium, without a screen: `chromium.py PAGE WIDTH HEIGHT light|dark PICTURE`.

Prints what the browser found as JSON, and leaves what it painted in PICTURE. Exit code 3: there is no browser here, and why.
"""

from __future__ import annotations

import json
import os
import sys

NO_BROWSER = 3
SECONDS = 60
# Every figure with its place and words, every word with its size, contrasts of words with what is behind them.
INSPECT = """
(() => {
  const rgb = text => (text.match(/[\\d.]+/g) || []).map(Number);
  const lightness = color => {
    const [r, g, b] = color.slice(0, 3).map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = e => {
    for (; e; e = e.parentElement) {
      const color = rgb(getComputedStyle(e).backgroundColor);
      if (color.length === 3 || color[3] === 1) return color;
    }
    return [255, 255, 255];
  };
  const contrast = (e, property = 'color') => {
    const [a, b] = [lightness(rgb(getComputedStyle(e)[property])), lightness(behind(e))].sort((x, y) => y - x);
    return (a + 0.05) / (b + 0.05);
  };
  document.querySelectorAll('details').forEach(e => e.open = true);
  const words = 'h1, h2, h3, h4, p, td, th, dt, dd, q, pre, code, summary, figcaption, a:not(.here), li, span, b, svg';
  const shown = [...document.querySelectorAll(words)];
  return JSON.stringify({
    width: innerWidth,
    overflow: document.documentElement.scrollWidth - innerWidth,
    words: document.body.innerText.length,
    dark: matchMedia('(prefers-color-scheme: dark)').matches,
    paper: lightness(behind(document.body)),
    pictures: [...document.querySelectorAll('svg, img, canvas')].map(e => ({
      title: (e.querySelector(':scope > title') || {}).textContent || e.alt || '',
      description: (e.querySelector(':scope > desc') || {}).textContent || e.alt || '',
      role: e.getAttribute('role'),
      width: e.getBoundingClientRect().width,
      height: e.getBoundingClientRect().height,
      shapes: e.querySelectorAll('path, use').length,
      smallest: Math.min(...[...e.querySelectorAll('text')].map(t => parseFloat(getComputedStyle(t).fontSize)
        * e.getBoundingClientRect().width / e.viewBox.baseVal.width)),
    })),
    contrasts: shown.map(e => ({ what: `${e.tagName} ${e.className.baseVal ?? e.className}`, ratio: contrast(e) })),
    words_in_pictures: [...document.querySelectorAll('svg text')].map(e => ({ what: e.textContent, ratio: contrast(e, 'fill'),
      fill: getComputedStyle(e).fill })),
    unlinked: [...document.querySelectorAll('h2, main > .panel > h3, article h3')].filter(
      e => !e.id || !e.querySelector(`a[href="#${e.id}"]`)).map(e => e.textContent),
  });
})()
"""


def look(page: str, width: int, height: int, picture: str) -> dict:
    from PySide6.QtCore import QEventLoop, QTimer, QUrl
    from PySide6.QtWebEngineCore import QWebEnginePage, QWebEngineUrlRequestInterceptor
    from PySide6.QtWebEngineWidgets import QWebEngineView
    from PySide6.QtWidgets import QApplication

    console: list[str] = []
    asked: list[str] = []

    class Page(QWebEnginePage):
        def javaScriptConsoleMessage(self, level, message, line, source):
            console.append(f"{level.name} {source}:{line}: {message}")

    class Requests(QWebEngineUrlRequestInterceptor):
        def interceptRequest(self, info):
            asked.append(info.requestUrl().toString())

    def wait(start):
        """What `start` hands to its callback; None if that takes too long."""
        loop, found = QEventLoop(), []
        QTimer.singleShot(SECONDS * 1000, loop.quit)
        start(lambda *values: (found.extend(values), loop.quit()))
        if not found:
            loop.exec()
        return found[0] if found else None

    app = QApplication([sys.argv[0], "--platform", "offscreen"])
    view, requests = QWebEngineView(), Requests()
    view.setPage(Page(view))
    view.page().setUrlRequestInterceptor(requests)
    view.resize(width, height)
    view.show()

    def load(done):
        view.page().loadFinished.connect(done)
        view.page().load(QUrl.fromLocalFile(page))

    loaded = wait(load)
    found = json.loads(wait(lambda done: view.page().runJavaScript(INSPECT, 0, done)) or "{}")
    wait(lambda done: QTimer.singleShot(300, done))  # it paints after it has been laid out
    view.grab().save(picture)
    app.processEvents()
    return found | {"loaded": loaded, "console": console, "requests": asked}


def main() -> int:
    page, width, height, scheme, picture = sys.argv[1:]
    os.environ["QTWEBENGINE_CHROMIUM_FLAGS"] = (
        f"--no-sandbox --blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}"
    )
    try:
        import PySide6.QtWebEngineWidgets  # noqa: F401
    except ImportError as error:
        print(f"no browser: {error}")
        return NO_BROWSER
    print(json.dumps(look(page, int(width), int(height), picture)))
    sys.stdout.flush()
    os._exit(0)  # Chromium's processes need not be taken down in order


if __name__ == "__main__":
    sys.exit(main())
