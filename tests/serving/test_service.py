"""The service over HTTP, within the test's process: answers, refusals, limits, tokens."""

import json
import re
import threading

import jax
import numpy as np
import polars as pl
import pytest

fastapi = pytest.importorskip("fastapi", reason="the service needs the extra [serve]")
httpx = pytest.importorskip("httpx", reason="requests within a process need httpx")

from experiments import recommend
from experiments.serve import __main__ as serve
from experiments.serve.app import make_app
from experiments.serve.limits import Limits
from tests.serving.in_process import Client
from tim4rec_jax.serving.answers import RecommendQuestion
from tim4rec_jax.serving.history_file import top_k
from tim4rec_jax.serving.recommender import Recommender

TOKEN = "a-token-of-some-length"
LATE = 2_000_000_000
FEW = Limits(body=20_000, users=9, k=8, history=40, events=5, pairs=6, listed=12, last=7)


def options(run, tmp_path, **more):
    return serve.ServeOptions(run=run, **{"state": tmp_path / "state", "max_batch": 4, "limits": FEW, **more})


@pytest.fixture
def open_service(monkeypatch):
    """Opens a service of a run that was read before."""

    def opening(recommender: Recommender, chosen: serve.ServeOptions):
        monkeypatch.setattr(serve.Recommender, "from_run", lambda run, report: recommender)
        return serve.service_of(serve.check(chosen))

    return opening


@pytest.fixture(scope="module")
def served(causal_recommender, causal_run, tmp_path_factory):
    """A warm service for the tests that leave it as it is, but for users of their own; its client raises at a 500."""
    folder = tmp_path_factory.mktemp("served")
    items = pl.DataFrame(
        {"item_id": causal_recommender.item_ids, "genre": ["Drama", "Comedy"] * 15, "price": list(range(30))}
    )
    items.write_csv(folder / "items.csv")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serve.Recommender, "from_run", lambda run, report: causal_recommender)
        with serve.service_of(options(causal_run, folder, items=folder / "items.csv")) as service:
            app = make_app(service)
            client = Client(app)
            assert client.get("/health").status_code == 200
            assert client.get("/ready").status_code == 503
            early = client.post("/v1/recommend", json={"users": ["u1"]})
            assert (early.status_code, early.headers["retry-after"]) == (503, "1")
            assert client.compiled == 0
            service.start()
            assert service.wait_until_ready(300)
            assert client.get("/ready").json() == {"status": "ready"}
            client.service, client.guard = service, app
            yield client
            assert client.compiled == 0


def asked(client, path, body, status=200, **more):
    answer = client.post(f"/v1/{path}", json=body, **more)
    assert answer.status_code == status, answer.text
    return answer.json() if status == 200 else answer.json()["error"]


def line_of(answer):
    """An error is one short line."""
    found = answer.json()
    assert set(found) == {"error"} and "\n" not in found["error"] and 5 < len(found["error"]) <= 280, found
    return found["error"]


RULES = [
    ((), {}),
    (("--exclude_seen",), {"exclude_seen": True}),
    (("--deny=i1,i2",), {"deny": ["i1", "i2"]}),
    (("--allow=i1,i2,i9,none", "--unknown_items=skip"), {"allow": ["i1", "i2", "i9", "none"], "unknown_items": "skip"}),
    (("--where", "genre=Drama", "price<20"), {"where": ["genre=Drama", "price<20"]}),
]


@pytest.mark.parametrize(("given", "body"), RULES, ids=lambda part: " ".join(part) if isinstance(part, tuple) else "")
def test_the_same_bits_as_the_program(
    served, causal_recommender, causal_run, tmp_path, monkeypatch, capsys, given, body
):
    """A list per user and per history, each as `experiments.recommend` gives it to that one alone."""
    monkeypatch.setattr(recommend.Recommender, "from_run", lambda run, report: causal_recommender)
    if "--where" in given:
        pl.DataFrame(
            {"item_id": causal_recommender.item_ids, "genre": ["Drama", "Comedy"] * 15, "price": range(30)}
        ).write_csv(tmp_path / "items.csv")
        given = (*given, f"--items={tmp_path / 'items.csv'}")
    times = [978_300_000, 978_300_500, 979_000_000]
    lines = [{"user": user} for user in causal_recommender.users[:4]]
    lines += [{"history": ["i3", "i4", "i5"], "times": times}, {"history": ["i3", "i4"]}]
    for line in lines:
        (tmp_path / "one.jsonl").write_text(json.dumps(line))
        command = [f"--run={causal_run}", f"--input={tmp_path / 'one.jsonl'}", f"--output={tmp_path / 'top.parquet'}"]
        assert recommend.main([*command, "--k=8", *given]) == 0, capsys.readouterr().err
        table = pl.read_parquet(tmp_path / "top.parquet")
        question = {"users": [line["user"]]} if "user" in line else {}
        if "history" in line:
            question = {"histories": [{"items": line["history"]} | ({"times": times} if "times" in line else {})]}
        [found] = asked(served, "recommend", {**question, **body, "k": 8})["results"]
        assert [item["item"] for item in found["items"]] == table["item_id"].to_list()
        scores = np.array([item["score"] for item in found["items"]], np.float32)
        assert scores.tobytes() == table["score"].to_numpy().astype(np.float32).tobytes()
        assert [item["title"] for item in found["items"]] == table["title"].to_list()
        assert found["source"] == "model" and found["assumed_gap"] == table["assumed_gap"][0]


def test_the_same_popular_items(served, causal_recommender):
    body = {"users": ["nobody"], "histories": [{"items": [], "name": 7}], "k": 5, "unknown_users": "popularity"}
    first, second = asked(served, "recommend", body)["results"]
    items, counts = causal_recommender.popular(5)
    assert [item["item"] for item in first["items"]] == [causal_recommender.item_ids[i - 1] for i in items]
    assert [item["score"] for item in first["items"]] == counts.tolist() and first["source"] == "popularity"
    assert second["user"] == "7" and second["items"] == first["items"] and second["events"] == 0
    [fewer] = asked(served, "recommend", {**body, "histories": [], "allow": ["i4"]})["results"]
    assert [item["item"] for item in fewer["items"]] == ["i4"]


def test_users_keep_their_order_and_may_come_twice(served):
    users = ["u5", "u1", "u5", "u7", "u2"]
    found = asked(served, "recommend", {"users": users, "k": 3})["results"]
    assert [one["user"] for one in found] == users
    lists = [[item["item"] for item in one["items"]] for one in found]
    assert lists[0] == lists[2] and lists[0] != lists[1]
    assert [
        item["item"] for item in asked(served, "recommend", {"users": ["u7"], "k": 3})["results"][0]["items"]
    ] == lists[3]


def test_scores_of_pairs(served, causal_recommender):
    pairs = [("u3", "i2"), ("u4", "i9"), ("u3", "i1"), ("u3", "none")]
    body = {"pairs": [{"user": u, "item": i} for u, i in pairs], "unknown_items": "skip"}
    found = asked(served, "score", body)
    assert found["skipped"] == 1 and [(one["user"], one["item"]) for one in found["scores"]] == pairs[:3]
    for one in found["scores"]:
        item = np.array([causal_recommender.index_of_item[one["item"]]])
        [expected] = causal_recommender.item_scores([causal_recommender.history_of_user(one["user"])], [item])
        assert one["score"] == pytest.approx(float(expected[0]), abs=1e-5) and one["source"] == "model"
    assert "1 of 4 items are not the run's: 'none'" in asked(served, "score", {**body, "unknown_items": "refuse"}, 422)
    popular = {"pairs": [{"user": "nobody", "item": "i1"}], "unknown_users": "popularity"}
    [one] = asked(served, "score", popular)["scores"]
    expected = float(causal_recommender.training_counts[causal_recommender.index_of_item["i1"]])
    assert (one["score"], one["source"]) == (expected, "popularity")


def test_similar_items(served, causal_recommender):
    body = asked(served, "similar", {"items": ["i1", "i2"], "k": 4, "deny": ["i3"]})
    got = served.get("/v1/similar", params={"item": "i1", "k": 4}).json()
    indices, _ = causal_recommender.similar([causal_recommender.index_of_item["i1"]], 4)
    assert [item["item"] for item in got["results"][0]["items"]] == [
        causal_recommender.item_ids[i - 1] for i in indices[0]
    ]
    assert [one["item"] for one in body["results"]] == ["i1", "i2"]
    assert all(item["item"] != "i3" for one in body["results"] for item in one["items"])


def test_history_users_and_mask(served, causal_recommender):
    user = causal_recommender.users[2]
    found = served.get("/v1/history", params={"user": user, "limit": 4, "mask": "true"}).json()
    stored = causal_recommender.history_of_user(user)
    assert (
        found["count"] == len(stored.items)
        and [e["timestamp"] for e in found["events"]] == stored.timestamps[-4:].tolist()
    )
    assert found["events"][0]["title"] == causal_recommender.titles[stored.items[-4] - 1]
    [mask] = np.array(found["mask"])
    assert (
        mask.shape == (4, 4)
        and (np.diag(mask) == 1).all()
        and (np.triu(mask, 1) == 0).all()
        and "mean over heads" in found["about_mask"]
    )
    plain = served.get("/v1/history", params={"user": user}).json()
    assert "mask" not in plain and len(plain["events"]) == min(FEW.last, len(stored.items))
    some = served.get("/v1/users", params={"prefix": "u1", "limit": 3}).json()
    assert some == {"users": sorted(u for u in causal_recommender.users if u.startswith("u1"))[:3], "known": 40}
    assert served.get("/v1/history", params={"user": "nobody"}).status_code == 422


def test_events_change_answers_and_outlive_a_restart(causal_recommender, causal_run, tmp_path, open_service):
    events = [{"user": "ÿ😀", "item": item, "timestamp": LATE + i} for i, item in enumerate(["i4", "i5", "i6"])]
    answers = []
    for start in range(2):
        with open_service(causal_recommender, options(causal_run, tmp_path, max_batch=1)) as service:
            service.start()
            assert service.wait_until_ready(300)
            client = Client(make_app(service))
            if start == 0:
                assert "unknown user" in asked(client, "recommend", {"users": ["ÿ😀"]}, 422)
                assert asked(client, "events", {"events": events}) == {"accepted": 3, "skipped": 0}
                more = {
                    "events": [
                        {"user": "u1", "item": "none", "timestamp": LATE},
                        {"user": "u1", "item": "i1", "timestamp": LATE},
                    ]
                }
                assert "no such item" in asked(client, "events", more, 422)
                assert asked(client, "events", more | {"unknown_items": "skip"}) == {"accepted": 1, "skipped": 1}
                early = {
                    "events": [
                        {"user": "new", "item": "i1", "timestamp": 5},
                        {"user": "ÿ😀", "item": "i1", "timestamp": 5},
                    ]
                }
                assert "goes backwards" in asked(client, "events", early, 422)
                assert served_count(client, "new") == 0
            answers.append(asked(client, "recommend", {"users": ["ÿ😀", "u1"], "k": 8, "exclude_seen": True}))
            history = {"items": ["i4", "i5", "i6"], "times": [LATE, LATE + 1, LATE + 2]}
            [given] = asked(client, "recommend", {"histories": [history], "k": 8, "exclude_seen": True})["results"]
            assert answers[-1]["results"][0]["items"] == given["items"]
            assert not {"i4", "i5", "i6"} & {item["item"] for item in given["items"]}
            assert served_count(client, "ÿ😀") == 3
    assert answers[0] == answers[1]


def served_count(client, user):
    answer = client.get("/v1/history", params={"user": user})
    return answer.json()["count"] if answer.status_code == 200 else 0


def test_without_a_state_events_are_refused(causal_recommender, causal_run, tmp_path, open_service):
    chosen = options(causal_run, tmp_path, state=None, max_batch=1, limits=Limits(k=1))
    with open_service(causal_recommender, chosen) as service:
        service.start()
        assert service.wait_until_ready(300)
        client = Client(make_app(service))
        event = {"user": "u1", "item": "i1", "timestamp": LATE}
        assert "--state=FILE" in asked(client, "events", {"events": [event]}, 409)


def test_requests_at_once_are_computed_together(served):
    """Each with rules of its own, and as the same request alone but for rounding."""
    bodies = [
        {"users": [f"u{i}"], "k": 1 + i % 8, "exclude_seen": i % 2 == 0, "deny": [f"i{1 + i}"]} for i in range(24)
    ]
    alone = [asked(served, "recommend", body) for body in bodies]
    found = [None] * len(bodies)

    def ask(place):
        found[place] = asked(served, "recommend", bodies[place])

    threads = [threading.Thread(target=ask, args=(place,)) for place in range(len(bodies))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, among in zip(alone, found, strict=True):
        [one], [among] = one["results"], among["results"]
        assert [item["item"] for item in one["items"]] == [item["item"] for item in among["items"]]
        np.testing.assert_allclose(
            [item["score"] for item in one["items"]], [item["score"] for item in among["items"]], atol=1e-5
        )


def test_a_request_that_fails_fails_no_other(served, monkeypatch):
    rank = served.service.answering.prepared.rank

    def failing(rows):
        if any(row.user == "u3" for row in rows):
            raise RuntimeError("planted")
        return rank(rows)

    monkeypatch.setattr(served.service.answering.prepared, "rank", failing)
    questions = [RecommendQuestion([user], k=2) for user in ("u1", "u3", "u2")]
    first, failed, last = served.service.answering.answer(questions)
    assert isinstance(failed, RuntimeError) and len(first["results"]) == len(last["results"]) == 1


def event(**changes):
    return {"events": [{"user": "bad", "item": "i1", "timestamp": LATE} | changes]}


HUGE = 10**400
BAD = [
    ("recommend", {"users": ["u1"], "k": 0}, "k: "),
    ("recommend", {"users": ["u1"], "k": 9}, "k: Input should be less than or equal to 8"),
    ("recommend", {"users": ["u1"], "k": HUGE}, "k: "),
    ("recommend", {"users": ["u1"], "k": 2.5}, "k: "),
    ("recommend", {"users": ["u1"], "k": "3"}, "k: "),
    ("recommend", {"users": ["u1"], "k": True}, "k: "),
    ("recommend", {}, "give 1 to 9 users"),
    ("recommend", {"users": ["u1"] * 10}, "users: List should have at most 9 items"),
    ("recommend", {"users": ["u1"] * 5, "histories": [{"items": ["i1"]}] * 5}, "give 1 to 9 users"),
    ("recommend", {"users": "u1"}, "users: Input should be a valid list"),
    ("recommend", {"users": [None]}, "users.0: "),
    ("recommend", {"users": [1.5]}, "users.0: "),
    ("recommend", {"users": [True]}, "users.0: "),
    ("recommend", {"users": [["u1"]]}, "users.0: "),
    ("recommend", {"users": ["x" * 1001]}, "users.0: "),
    ("recommend", {"users": ["nobody"]}, "unknown user 'nobody'"),
    ("recommend", {"users": [10**300]}, "unknown user"),
    ("recommend", {"users": ["u1"], "more": 1}, "more: "),
    ("recommend", {"users": ["u1"], "allow": []}, "the rules leave no item"),
    ("recommend", {"users": ["u1"], "allow": ["none"]}, "allow: 1 of 1 items are not the run's"),
    ("recommend", {"users": ["u1"], "allow": ["i1"], "deny": ["i1"]}, "the rules leave no item"),
    ("recommend", {"users": ["u1"], "deny": ["none"] * 13}, "deny: List should have at most 12"),
    ("recommend", {"users": ["u1"], "where": ["genre"]}, "is no condition"),
    ("recommend", {"users": ["u1"], "where": ["colour=red"]}, "has no column"),
    ("recommend", {"users": ["u1"], "where": ["price<cheap"]}, "holds numbers"),
    ("recommend", {"users": ["u1"], "where": ["genre=None"]}, "leave"),
    ("recommend", {"users": ["u1"], "where": ["x" * 1001]}, "where.0: "),
    ("recommend", {"users": ["u1"], "exclude_seen": "yes"}, "exclude_seen: "),
    ("recommend", {"users": ["u1"], "unknown_items": "drop"}, "unknown_items: "),
    ("recommend", {"histories": [{"items": []}]}, "is empty"),
    ("recommend", {"histories": [{"items": ["none"]}]}, "histories[0]: 1 of 1 items"),
    ("recommend", {"histories": [{"items": ["none"]}], "unknown_items": "skip"}, "all unknown"),
    ("recommend", {"histories": [{"items": ["i1"] * 41}]}, "histories.0.items: List should have at most 40"),
    ("recommend", {"histories": [{"items": ["i1"], "times": []}]}, "1 items but 0 times"),
    ("recommend", {"histories": [{"items": ["i1", "i2"], "times": [5, 4]}]}, "go backwards"),
    ("recommend", {"histories": [{"items": ["i1"], "times": [-1]}]}, "times.0: "),
    ("recommend", {"histories": [{"items": ["i1"], "times": [2**31]}]}, "times.0: "),
    ("recommend", {"histories": [{"items": ["i1"], "times": [HUGE]}]}, "times.0: "),
    ("recommend", {"histories": [{"items": ["i1"], "times": [1.0]}]}, "times.0: "),
    ("recommend", {"histories": ["i1"]}, "histories.0: "),
    ("recommend", [], "must be a JSON object"),
    ("recommend", None, "must be a JSON object"),
    ("events", {"events": []}, "events: List should have at least 1"),
    ("events", event(timestamp=-1), "timestamp: "),
    ("events", event(timestamp=2**31), "timestamp: "),
    ("events", event(timestamp=HUGE), "timestamp: "),
    ("events", event(timestamp="5"), "timestamp: "),
    ("events", event(timestamp=5.0), "timestamp: "),
    ("events", event(timestamp=None), "timestamp: "),
    ("events", event(item="none"), "the run has no such item"),
    ("events", event(user="x" * 1001), "user: "),
    ("events", event(user="u1", timestamp=5), "goes backwards"),
    ("events", {"events": event()["events"] * 6}, "events: List should have at most 5"),
    ("score", {"pairs": []}, "pairs: "),
    ("score", {"pairs": [{"user": "nobody", "item": "i1"}]}, "unknown user"),
    ("score", {"pairs": [{"user": "u1"}]}, "pairs.0.item: Field required"),
    ("similar", {"items": ["none"]}, "items: 1 of 1 items"),
    ("similar", {"items": []}, "items: "),
]


@pytest.mark.parametrize(("path", "body", "message"), BAD)
def test_what_cannot_be_done_is_one_line(served, path, body, message):
    content = json.dumps(body).encode()
    answer = served.post(f"/v1/{path}", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 422 and message in line_of(answer), answer.text
    assert served_count(served, "bad") == 0


RAW = [
    (b"{", 400, "not JSON"),
    (b"", 422, "must be a JSON object"),
    (b'{"users": ["u1"], "users": ["u2"]}', 400, '"users" stands there twice'),
    (b'{"users": ["u1"], "k": NaN}', 400, "NaN is no JSON number"),
    (b'{"users": ["u1"], "k": -Infinity}', 400, "-Infinity is no JSON number"),
    (b'{"users": ["u1"], "k": 1e999}', 422, "k: "),
    (b'{"users": ["\xff"]}', 400, "not JSON in UTF-8"),
    (b'{"users": ["\\ud800"]}', 422, "users.0: "),
    (b"[" * 15_000, 400, "not JSON"),
    (b'{"users": [' + b"1" * 5_000 + b"]}", 400, "not JSON"),
    (b'{"users": ["\\u0000"]}', 422, "unknown user"),
]


@pytest.mark.parametrize(("content", "status", "message"), RAW)
def test_what_is_no_json_is_one_line(served, content, status, message):
    answer = served.post("/v1/recommend", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == status and message in line_of(answer), answer.text


def test_other_content_types_paths_and_methods(served):
    answer = served.post("/v1/recommend", content=b'{"users": ["u1"]}', headers={"content-type": "text/plain"})
    assert answer.status_code == 422 and "Content-Type: application/json" in line_of(answer)
    assert served.get("/v1/nothing").status_code == 404 and served.delete("/v1/users").status_code == 405
    assert served.get("/v1/users", params={"limit": 8}).status_code == 422
    assert served.get("/v1/similar", params={"item": "i1", "k": "many"}).status_code == 422


def test_too_large_a_body(served):
    async def pieces():
        for _ in range(2):
            yield b"x" * 15_000

    for content in (b"x" * 20_001, pieces()):
        answer = served.post("/v1/recommend", content=content)
        assert answer.status_code == 413 and "over 20000 bytes" in line_of(answer)
    assert served.post("/v1/recommend", content=b" " * 20_000).status_code in (400, 422)


def test_metrics_count(served):
    def value(name):
        [found] = re.findall(rf"^{re.escape(name)} (\S+)$", served.get("/metrics").text, re.MULTILINE)
        return float(found)

    asked(served, "recommend", {"users": ["u1"]})
    name = 'tim4rec_requests_total{route="/v1/recommend",status="200"}'
    before = value(name)
    asked(served, "recommend", {"users": ["u1"]})
    assert value(name) == before + 1
    assert value("tim4rec_ready") == 1
    assert value("tim4rec_users") == 40 and value("tim4rec_batch_rows_count") > 1 and value("tim4rec_compilations") > 3
    assert value('tim4rec_request_seconds_count{route="/v1/recommend"}') > 1


def test_openapi_describes_every_answer(served):
    found = served.get("/openapi.json").json()
    paths = {(method, path) for path, methods in found["paths"].items() for method in methods}
    for path in ("recommend", "score", "similar", "events"):
        assert ("post", f"/v1/{path}") in paths
        responses = found["paths"][f"/v1/{path}"]["post"]["responses"]
        assert set(responses) >= {"200", "400", "401", "413", "422", "503"}
        for status, response in responses.items():
            schema = response["content"]["application/json"]["schema"]
            assert schema["$ref"].endswith("Error") == (status != "200")
    assert {("get", "/health"), ("get", "/ready"), ("get", "/metrics"), ("get", "/v1/history")} <= paths
    recommend_body = found["components"]["schemas"]["Recommend"]["properties"]
    assert recommend_body["k"]["maximum"] == FEW.k and recommend_body["users"]["maxItems"] == FEW.users


def test_tokens(served, tmp_path):
    file = tmp_path / "tokens"
    file.write_text(f"{TOKEN}\nanother-token-to-come\n")
    client = Client(make_app(served.service, serve.read_tokens(file)))
    for headers in (
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": TOKEN},
        {"authorization": f"Bearer {TOKEN}x"},
        {"authorization": "Bearer "},
        {"authorization": f"Basic {TOKEN}"},
        {"authorization": "Bearer ÿ".encode("latin-1")},
    ):
        for path in ("/v1/users", "/metrics", "/openapi.json", "/v1/nothing"):
            answer = client.get(path, headers=headers)
            assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer" and line_of(answer)
    for token in (TOKEN, "another-token-to-come"):
        assert client.get("/v1/users", headers={"authorization": f"bearer {token}"}).status_code == 200
    for path in ("/health", "/ready", "/", "/page.js"):
        assert client.get(path).status_code == 200
    schema = client.get("/openapi.json", headers={"authorization": f"Bearer {TOKEN}"}).json()
    assert schema["paths"]["/v1/recommend"]["post"]["security"]


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "holds no token"), (b"short", "under 16"), (b"a token with some blanks", "blanks"), (b"\xff" * 20, "ASCII")],
)
def test_bad_token_files(tmp_path, content, message):
    (tmp_path / "tokens").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        serve.read_tokens(tmp_path / "tokens")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--max_batch=3"], "--max_batch=3 must be a power of two"),
        (["--port=70000"], "--port=70000 must lie in"),
        (["--batch_ms=-1"], "--batch_ms"),
        (["--batch_ms=nan"], "--batch_ms"),
        (["--limits.k=0"], "--limits.k=0 must lie in 1"),
        (["--where", "a=b"], "--where needs --items"),
        (["--state={run}/config.json"], "is a file of a run"),
        (["--state={run}/nowhere/x"], "there is no folder"),
        (["--token_file={run}/none"], "No such file"),
        (["--token={run}"], "unknown option"),
        (["--host=no.such.host.invalid"], "no.such.host.invalid"),
    ],
)
def test_bad_options(causal_run, causal_recommender, capsys, monkeypatch, given, message):
    monkeypatch.setattr(serve.Recommender, "from_run", lambda run, report: causal_recommender)
    words = [word.replace("{run}", str(causal_run)) for word in given]
    assert serve.main([f"--run={causal_run}", *words]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error and len(error) < 400


def test_a_model_that_cannot_answer_never_gets_ready(causal_recommender, causal_run, capsys, monkeypatch):
    params = jax.tree.map(lambda leaf: leaf, causal_recommender.params)
    params["item_embedding"] = jax.tree.map(
        lambda leaf: np.full(leaf.shape, np.nan, leaf.dtype), params["item_embedding"]
    )
    broken = Recommender(
        causal_recommender.model,
        params,
        causal_recommender.config,
        item_ids=causal_recommender.item_ids,
        titles=None,
        histories=pl.DataFrame({"user_id": ["u"], "items": [[1]], "timestamps": [[5]]}),
    )
    monkeypatch.setattr(serve.Recommender, "from_run", lambda run, report: broken)
    assert serve.main([f"--run={causal_run}", "--port=0", "--max_batch=1", "--limits.k=2"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and "not finite" in error and len(error) < 400


def test_a_full_disk_is_said(served, monkeypatch):
    def full(events):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(served.service.answering.durable, "append", full)
    error = asked(served, "events", event(user="late", item="i1"), 503)
    assert "nothing was taken in: No space left on device" in error and served_count(served, "late") == 0


def test_a_missing_extra_is_named(causal_run, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "uvicorn", None)
    assert serve.main([f"--run={causal_run}"]) == 2
    assert "pip install 'tim4rec_jax[serve]'" in capsys.readouterr().err


def test_stopping_refuses_what_is_new(served):
    served.guard.stopping = True
    try:
        answer = served.get("/v1/users")
        assert answer.status_code == 503 and "stopping" in line_of(answer)
        assert served.get("/health").status_code == 200
        assert served.get("/ready").json() == {"status": "stopping"}
    finally:
        served.guard.stopping = False


def test_whole_histories(causal_recommender, causal_run, tmp_path, monkeypatch):
    """Lists of `recommend --full_history`, and of a given history with the events that came."""
    monkeypatch.setattr(serve, "load_streamable", lambda run, report: causal_recommender)
    user = max(causal_recommender.users, key=lambda user: len(causal_recommender.history_of_user(user).items))
    stored = causal_recommender.history_of_user(user)
    assert len(stored.items) > causal_recommender.max_len + 5
    for start in range(2):
        with serve.service_of(options(causal_run, tmp_path, full_history=True, max_batch=2)) as service:
            service.start()
            assert service.wait_until_ready(300)
            client = Client(make_app(service))
            if start == 0:
                [indices], _ = top_k(causal_recommender, [stored], 8, whole_histories=True)
                [found] = asked(client, "recommend", {"users": [user], "k": 8})["results"]
                names = [causal_recommender.item_ids[i - 1] for i in indices]
                assert [item["item"] for item in found["items"]] == names
                new = [{"user": user, "item": item, "timestamp": LATE} for item in ("i7", "i8")]
                assert asked(client, "events", {"events": new})["accepted"] == 2
            items = [*(causal_recommender.item_ids[i - 1] for i in stored.items), "i7", "i8"]
            given = {"items": items, "times": [*stored.timestamps.tolist(), LATE, LATE]}
            body = {"users": [user, "u1"], "histories": [given], "k": 8}
            mine, _, same = asked(client, "recommend", body)["results"]
            assert [item["item"] for item in mine["items"]] == [item["item"] for item in same["items"]]
            scores = [[item["score"] for item in one["items"]] for one in (mine, same)]
            np.testing.assert_allclose(*scores, atol=1e-5)
            assert client.compiled == 0 and "tim4rec_kept_states 2.0" in client.get("/metrics").text


def test_whole_histories_need_a_causal_model(run, capsys):
    assert serve.main([f"--run={run}", "--full_history"]) == 2
    assert "cannot go on from a state" in capsys.readouterr().err
