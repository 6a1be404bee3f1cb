"""The page of sample.py --serve in a real browser, through chromedriver: make browser-check. Needs chromium and
chromedriver, as Debian has them."""
import json
import shutil
import subprocess
import time
import urllib.request

import pytest
from test_sample import checkpoint, page  # noqa: F401


class Browser:
    """As much of the WebDriver protocol (w3.org/TR/webdriver2) as this needs."""

    def __init__(self, port, folder):
        self.url = f'http://localhost:{port}'
        for _ in range(100):
            try:
                self.call('GET', '/status')
                break
            except OSError:
                time.sleep(.1)
        options = {'args': ['--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-sync',
                            '--disable-background-networking', '--disable-component-update', f'--user-data-dir={folder}']}
        session = self.call('POST', '/session', {'capabilities': {'alwaysMatch': {'browserName': 'chrome', 'goog:chromeOptions': options}}})
        self.url += f"/session/{session['sessionId']}"

    def call(self, method, path, body=None):
        request = urllib.request.Request(self.url + path, json.dumps(body or {}).encode() if method == 'POST' else None, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())['value']

    def element(self, css):
        return next(iter(self.call('POST', '/element', {'using': 'css selector', 'value': css}).values()))

    def type(self, css, text):
        self.call('POST', f'/element/{self.element(css)}/value', {'text': text})

    def click(self, css):
        self.call('POST', f'/element/{self.element(css)}/click')

    def script(self, code):
        return self.call('POST', '/execute/sync', {'script': code, 'args': []})

    def wait(self, code, seconds=20):
        end = time.monotonic() + seconds
        while not (value := self.script(code)):
            assert time.monotonic() < end, f'{code} never came true; {self.script("return document.body.innerText")}'
            time.sleep(.05)
        return value


@pytest.fixture
def browser(tmp_path):
    driver = shutil.which('chromedriver')
    assert driver, 'no chromedriver here: apt-get install chromium chromium-driver'
    process = subprocess.Popen([driver, '--port=9515'], stdout=subprocess.DEVNULL)
    try:
        browser = Browser(9515, tmp_path / 'browser')
        yield browser
        browser.call('DELETE', '')
    finally:
        process.kill()


def ask(browser, text):
    before = browser.script("return document.querySelectorAll('.answer').length")
    browser.type('#text', text)
    browser.click('#send')
    browser.wait(f"return document.querySelectorAll('.answer[data-done]').length == {before + 1}")
    return browser.script("return [...document.querySelectorAll('.answer')].at(-1).textContent")


def test_a_picture_and_a_video(browser, page, checkpoint, tmp_path):  # noqa: F811
    page, talking = page
    browser.call('POST', '/url', {'url': f'http://{page}/'})
    browser.type('#file', str(checkpoint.parent / 'a.png'))
    browser.wait("return document.querySelector('figure img')?.clientWidth > 0")
    assert ask(browser, 'Where is it?') == 'There: <point 0.25, 0.50, 1> <point 0.75, 0.50, 2>'
    pixel = """const c = document.querySelector('canvas'), x = %s * c.width, y = .5 * c.height
               return [...c.getContext('2d').getImageData(x, y, 1, 1).data]"""
    assert browser.script("return document.querySelector('canvas').dataset.points") == '2'
    assert browser.script(pixel % .25) == browser.script(pixel % .75) == [255, 0, 255, 255] and browser.script(pixel % .5)[3] == 0
    browser.type('#file', str(checkpoint.parent / 'b.png'))            # joins, and what was pointed at is gone
    browser.wait("return document.querySelectorAll('figure img').length == 2")
    assert len(talking.media['images']) == 2 and browser.script("return document.querySelector('canvas').dataset.points") == '0'
    browser.script("show(new File(['hello'], 'text.jpg'))")
    assert 'text.jpg: not a picture' in browser.wait("return document.querySelector('.error')?.textContent")
    clip = next((checkpoint.parent / 'clips/media').glob('train*.mp4'))
    browser.type('#file', str(clip))
    browser.wait("return document.querySelector('video')?.readyState >= 2")
    assert browser.script("return document.querySelectorAll('figure').length") == 1
    browser.script("points = [{t: 0, x: .25, y: .5, id: 1}, {t: 1, x: .75, y: .5, id: 1}]; document.querySelector('video').currentTime = .5")
    browser.wait("return Math.abs(document.querySelector('video').currentTime - .5) < .01 && document.querySelector('canvas').dataset.points == 1")
    assert browser.script(pixel % .5) == [255, 0, 255, 255]            # half-way between its places
    browser.click('#new')
    browser.wait("return !document.querySelector('figure') && !document.querySelector('.answer')")
    assert not talking.messages and not talking.media
