"""The page of the service: what it loads, what it shows in a browser, and its data without one."""

import contextlib
import dataclasses
import html.parser
import re
import shutil
import subprocess
import urllib.parse

import polars as pl
import pytest

pytest.importorskip("uvicorn", reason="the service needs the extra [serve]")
pytest.importorskip("httpx", reason="requests within a process need httpx")

from experiments.serve import __main__ as serve
from experiments.serve.app import FOLDER, make_app
from experiments.serve.limits import Limits
from tests.serving.in_process import Client, at_a_port
from tests.serving.tiny_run import make_causal_config, make_config, make_run
from tim4rec_jax.serving.answers import RecommendQuestion
from tim4rec_jax.serving.recommender import Recommender

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
MARKUP = "<b id=injected>R&D</b><script>document.title='injected'</script>"


@pytest.fixture(scope="module")
def page_of(tmp_path_factory, log):
    """Makes the application over a run of a model, warm; item i1 is called what would be markup."""

    @contextlib.contextmanager
    def opening(config):
        folder = tmp_path_factory.mktemp("page")
        titles = log.titles.to_list()
        titles[log.item_ids.to_list().index("i1")] = MARKUP
        named = dataclasses.replace(log, titles=pl.Series(titles, dtype=pl.String))
        make_run(folder / "run", named, config)
        chosen = serve.ServeOptions(run=folder / "run", max_batch=2, limits=Limits(k=8, last=30))
        with serve.service_of(chosen) as service:
            service.start()
            assert service.wait_until_ready(300)
            yield make_app(service, ["a-token-of-some-length"]), service

    return opening


class _Loads(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.loaded, self.ids = [], set()

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.loaded += [found[name] for name in ("src", "href", "action", "data") if name in found]
        self.ids |= {found["id"]} if "id" in found else set()


def test_nothing_comes_from_outside():
    page = _Loads()
    page.feed((FOLDER / "page.html").read_text(encoding="utf-8"))
    assert page.loaded == ["data:,", "/page.js"]
    script = (FOLDER / "page.js").read_text(encoding="utf-8")
    assert re.findall(r"https?://[^\"]+", script) == ["http://www.w3.org/2000/svg"]
    assert "innerHTML" not in script and "eval(" not in script
    named = set(re.findall(r'at\("(\w+)"\)', script))
    assert named <= page.ids and len(named) > 10
    # What the page asks for is there.
    assert set(re.findall(r'"(/v1/\w+)|`(/v1/\w+)', script)) == {
        ("/v1/recommend", ""),
        ("", "/v1/history"),
        ("", "/v1/users"),
    }


def test_the_page_is_open_and_its_data_is_not(page_of):
    with page_of(make_config("ssd4rec")) as (app, _):
        client = Client(app)
        page = client.get("/")
        assert page.status_code == 200 and page.headers["content-type"] == "text/html; charset=utf-8"
        assert "default-src 'self'" in page.headers["content-security-policy"]
        assert 'data-last="30" data-k="8"' in page.text
        assert client.get("/page.js").headers["content-type"] == "text/javascript; charset=utf-8"
        asked = {"user": "u1", "mask": "true"}
        assert client.get("/v1/history", params=asked).status_code == 401
        token = {"authorization": "Bearer a-token-of-some-length"}
        found = client.get("/v1/history", params=asked, headers=token).json()
        assert found["mask"] is None and found["about_mask"] == "the model 'ssd4rec' has no time-aware mask"


def shown(browser, tmp_path, url):
    """Returns what the page has become in a browser."""
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=8000", "--dump-dom", url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-500:]
    return done.stdout


@pytest.mark.parametrize("name", ["tim4rec_causal", pytest.param("ssd4rec", marks=pytest.mark.exhaustive)])
def test_in_a_browser(name, page_of, tmp_path):
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser here: {', '.join(BROWSERS)}")
    config = make_causal_config() if name == "tim4rec_causal" else make_config(name)
    with page_of(config) as (_, service), at_a_port(make_app(service)) as url:
        known: Recommender = service.answering.known
        user = next(user for user in known.users if known.index_of_item["i1"] in known.history_of_user(user).items[-5:])
        stored = known.history_of_user(user)
        page = shown(browser, tmp_path, f"{url}/?user={urllib.parse.quote(user)}")
        assert f'data-shown="{user}"' in page, page[-1500:]
        history, mask = page[page.index('<table id="history"') :], page[page.index('id="mask_about"') :]
        assert history.count("<tr>") == 1 + min(30, len(stored.items))
        # A title is text.
        assert "&lt;b id=injected&gt;R&amp;D&lt;/b&gt;" in history and "<b id=injected" not in page
        assert "<title>tim4rec_jax: one user</title>" in page
        following = page[page.index('<table id="next"') : page.index('<table id="history"')]
        best = service.batcher.submit(RecommendQuestion([user], k=8)).result(60)["results"][0]["items"]
        assert following.count("<tr>") == 1 + 8 and [f"{item['score']:.3f}" in following for item in best] == [True] * 8
        read = min(12, len(stored.items))
        if name == "ssd4rec":
            assert "has no time-aware mask" in mask and "<svg" not in mask
        else:
            assert mask.count("<svg") == 1 and mask.count("<rect") == read * (read + 1) // 2
            assert "how much of an event" in mask
        unknown = shown(browser, tmp_path, f"{url}/?user=nobody")
        assert "unknown user 'nobody'" in unknown and "data-shown" not in unknown
