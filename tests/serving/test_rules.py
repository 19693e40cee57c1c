"""Rules against a sorted list of all scores, in every place that answers, and how bad ones are refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments import recommend
from tests.serving.streams import event, main, write
from tests.serving.tiny_run import NUM_ITEMS
from tim4rec_jax.data.splits import split_log
from tim4rec_jax.evaluation.baselines import popularity_counts
from tim4rec_jax.serving.history_file import top_k
from tim4rec_jax.serving.ranking import best_columns, items_left
from tim4rec_jax.serving.rules import RuleOptions, Rules, allowed_items, rules_from_options
from tim4rec_jax.serving.user_table import UserTable

ITEMS = pl.DataFrame(
    {
        "item_id": [f"i{i}" for i in range(1, 26)],
        "genre": [["Drama", "Comedy", None][i % 3] for i in range(1, 26)],
        "price": [None if i == 4 else i / 2 for i in range(1, 26)],
        "tags": [["a", "b"] if i % 2 else ["b"] for i in range(1, 26)],
        "since": [f"20{i:02d}-01-01" for i in range(1, 26)],
    }
)
_BEST = jax.jit(best_columns, static_argnames="k")
ids = st.sets(st.integers(1, NUM_ITEMS))


def _quiet(_):
    pass


def _at(recommender, *names):
    """Indices of items, in ascending order."""
    return sorted(recommender.index_of_item[name] for name in names)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32 - 1), st.sampled_from([1, 9, 63, 64, 700, 900]), st.sampled_from([1, 3, 20]), st.floats(0, 1)
)
def test_the_best_columns_are_those_of_a_sort(seed, width, k, share):
    """With many equal scores, narrow and wide catalogues, and rules that leave few columns or none."""
    rng = np.random.default_rng(seed)
    width, k = width + 1, min(k, width)
    scores = rng.integers(-3, 4, (3, width)).astype(np.float32)
    allowed = rng.random(width) < share
    excluded = rng.integers(0, width, (3, 4)).astype(np.int32)
    for mask in (allowed, None):
        best, indices, finite = _BEST(jnp.asarray(scores), jnp.asarray(excluded), k, mask)
        assert finite.all()
        for row in range(3):
            left = [i for i in range(1, width) if (mask is None or mask[i]) and i not in excluded[row]]
            expected = sorted(left, key=lambda i, row=row: (-scores[row, i], i))[:k]
            found = items_left(np.asarray(indices), np.asarray(best))[row]
            assert found.tolist() == expected + [0] * (k - len(expected))
            assert np.asarray(best)[row, : len(expected)].tolist() == scores[row, expected].tolist()


@pytest.fixture(scope="module")
def everything(causal_recommender, log):
    """Histories, and all scores of each, as the recommender and as the table of states give them."""
    histories = [causal_recommender.history_of_user(user) for user in log.user_ids[:6]]
    scores = []
    for whole in (False, True):
        indices, found = top_k(causal_recommender, histories, NUM_ITEMS, whole_histories=whole)
        scores.append(np.take_along_axis(found, np.argsort(indices, axis=1), axis=1))
    return histories, scores


@settings(max_examples=25, deadline=None)
@given(ids, ids, st.booleans(), st.booleans(), st.sampled_from([1, 5, NUM_ITEMS]))
def test_lists_under_rules_are_those_of_a_sort(causal_recommender, everything, allow, deny, seen, whole, k):
    recommender, (histories, scores) = causal_recommender, everything
    names = [[recommender.item_ids[i - 1] for i in chosen] for chosen in (allow, deny)]
    left = [i for i in range(1, NUM_ITEMS + 1) if i in allow and i not in deny]
    if not left:
        with pytest.raises(ValueError, match="the rules leave none of the 30 items"):
            allowed_items(recommender.index_of_item, allow=names[:1], deny=names[1:])
        return
    allowed = allowed_items(recommender.index_of_item, allow=names[:1], deny=names[1:])
    indices, found = top_k(recommender, histories, k, rules=Rules(allowed, seen), whole_histories=whole)
    for history, row, listed, listed_scores in zip(histories, scores[whole], indices, found, strict=True):
        rest = [i for i in left if not (seen and i in history.items)]
        expected = sorted(rest, key=lambda i, row=row: (-row[i - 1], i))[:k]
        assert listed.tolist() == expected + [0] * (k - len(expected))
        np.testing.assert_allclose(listed_scores[: len(expected)], row[np.array(expected, int) - 1], rtol=1e-6)


@pytest.mark.parametrize(
    ("where", "meets"),
    [
        (["genre=Drama"], lambda i: i % 3 == 0),
        (["genre!=Drama"], lambda i: i % 3 == 1),
        (["genre~ram"], lambda i: i % 3 == 0),
        (["price<5"], lambda i: i < 10 and i != 4),
        (["price >= 2.5"], lambda i: i >= 5),
        (["price<=3", "genre = Comedy"], lambda i: i <= 6 and i % 3 == 1 and i != 4),
        (["tags=a"], lambda i: i % 2 == 1),
        (["tags!=a"], lambda i: i % 2 == 0),
        (["since>2020-06"], lambda i: i > 20),
    ],
)
@pytest.mark.parametrize("ending", [None, ".parquet", ".jsonl", ".csv"])
def test_conditions(recommender, tmp_path, where, meets, ending):
    items = ITEMS
    if ending is not None:
        items = tmp_path / f"items{ending}"
        if ending == ".csv":
            ITEMS.drop("tags").write_csv(items)
            if "tags" in where[0]:
                return
        else:
            (ITEMS.write_parquet if ending == ".parquet" else ITEMS.write_ndjson)(items)
    said = []
    allowed = allowed_items(recommender.index_of_item, items=items, where=where, report=said.append)
    expected = [i for i in range(1, 26) if meets(i)]
    assert np.flatnonzero(allowed).tolist() == _at(recommender, *(f"i{i}" for i in expected))
    assert len(said) == 1 and "5 of 30 items of the run are not in it and are not recommended" in said[0]


def test_an_item_of_several_rows_needs_one_that_meets_all(recommender):
    items = pl.DataFrame({"id": ["i1", "i1", "i2", "i2"], "shop": [1, 2, 1, 2], "stock": [0, 3, 0, 0]})
    allowed = allowed_items(recommender.index_of_item, items=items, where=["stock>0", "shop=2"], report=_quiet)
    assert np.flatnonzero(allowed).tolist() == [recommender.index_of_item["i1"]]


@pytest.mark.parametrize("name", ["ids.txt", "ids.csv", "ids.tsv", "ids.jsonl", "ids.parquet"])
def test_lists_from_files(recommender, tmp_path, name):
    path, table = tmp_path / name, pl.DataFrame({"item_id": ["i7", "i9", "i7"]})
    if name == "ids.txt":
        path.write_text("i7\n\n i9 \ni7\n")
    elif name.endswith(".parquet"):
        table.write_parquet(path)
    elif name.endswith(".jsonl"):
        table.write_ndjson(path)
    else:
        table.write_csv(path, separator="\t" if name.endswith(".tsv") else ",")
    rules = rules_from_options(RuleOptions(allow_file=path, allow="i3"), recommender.index_of_item)
    assert np.flatnonzero(rules.allowed).tolist() == _at(recommender, "i3", "i7", "i9")
    rules = rules_from_options(RuleOptions(deny_file=path), recommender.index_of_item)
    assert np.flatnonzero(~rules.allowed).tolist() == [0, *_at(recommender, "i7", "i9")]


def test_unknown_ids_are_refused_or_counted(recommender):
    said, index = [], recommender.index_of_item
    with pytest.raises(ValueError, match="--deny: 2 of 3 ids are no item of the run: 'x', 'y'; take them out, or"):
        allowed_items(index, deny=[["x", "i3", "y"]])
    allowed = allowed_items(index, deny=[["x", "i3", "y"]], skip_unknown=True, report=said.append)
    assert np.flatnonzero(~allowed).tolist() == [0, *_at(recommender, "i3")]
    assert said == ["--deny: 2 of 3 ids are no item of the run and were skipped"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--allow=i1,,i2"], "--allow: nothing stands at position 2 of 'i1,,i2'; remove the comma"),
        (["--allow="], "the rules leave none of the 30 items; loosen one of them"),
        (
            ["--deny=i99"],
            "--deny: 1 of 1 ids are no item of the run: 'i99'; take them out, or give --unknown_items=skip",
        ),
        (["--deny_file=none.txt"], "none.txt"),
        (["--deny_file=none.csv"], "there is no file none.csv"),
        (["--allow_file=bad.txt"], "bad.txt is no text in UTF-8 (byte 1)"),
        (["--allow_file=bad.parquet"], "bad.parquet cannot be read as parquet: "),
        (
            ["--allow_file=items.csv", "--item_column=sku"],
            "items.csv has no column sku; its columns are item_id, genre,",
        ),
        (["--allow_file=items.csv", "--item_column=price"], "items.csv: column price holds Float64, no ids"),
        (["--items=items.csv"], "--items and --where belong together"),
        (["--where", "price<3"], "--items and --where belong together"),
        (["--items=items.xls", "--where", "price<3"], "items.xls: the ending says what the file holds"),
        (
            ["--items=items.csv", "--where", "cost<3"],
            "--where: items.csv has no column 'cost'; its columns are item_id,",
        ),
        (["--items=items.csv", "--where", "price"], "--where: 'price' is no condition; write one as in genre=Drama"),
        (["--items=items.csv", "--where", "price<cheap"], "price holds numbers, and 'cheap' is none"),
        (["--items=items.csv", "--where", "genre<3"], "the column holds text such as 'Comedy', which has no order"),
        (["--items=items.csv", "--where", "price>99"], "the rules leave none of the 30 items; loosen one of them"),
        (["--items=items.parquet", "--where", "tags<b"], "tags holds lists; ask with = or !="),
        (["--unknown_items=drop"], "--unknown_items=drop: expected one of refuse, skip"),
        (["--unknown_users=drop"], "--unknown_users=drop: expected one of refuse, popularity"),
    ],
)
def test_bad_rules_are_one_line(run, tmp_path, capsys, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    ITEMS.drop("tags").write_csv("items.csv")
    ITEMS.write_parquet("items.parquet")
    for name in ("bad.txt", "bad.parquet"):
        (tmp_path / name).write_bytes(b"\xff\xfe")
    assert recommend.main([f"--run={run}", "--user=u1", *options]) == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert out == "" and len(lines) == 1 and message in lines[0] and len(lines[0]) < 300


def test_popularity_is_that_of_the_training_part(recommender, log):
    counts = popularity_counts(log, split_log(log, recommender.config.data).first_held_out)
    np.testing.assert_array_equal(recommender.training_counts, counts)
    allowed = np.arange(NUM_ITEMS + 1) % 3 > 0
    for mask in (None, allowed):
        left = [i for i in range(1, NUM_ITEMS + 1) if mask is None or mask[i]]
        expected = sorted(left, key=lambda i: (-counts[i], i))
        indices, scores = recommender.popular(NUM_ITEMS, allowed=mask)
        assert indices.tolist() == expected + [0] * (NUM_ITEMS - len(expected))
        assert scores[: len(expected)].tolist() == counts[expected].tolist()


def test_similar_items_have_the_greatest_cosines(recommender):
    table = np.asarray(recommender.params["item_embedding"]["embedding"], np.float64)
    table = table / np.linalg.norm(table, axis=1, keepdims=True)
    allowed = np.arange(NUM_ITEMS + 1) % 5 > 0
    for mask in (None, allowed):
        indices, cosines = recommender.similar([3, 8, 1], 12, allowed=mask)
        for item, row, row_cosines in zip((3, 8, 1), indices, cosines, strict=True):
            left = [i for i in range(1, NUM_ITEMS + 1) if i != item and (mask is None or mask[i])]
            expected = sorted(left, key=lambda i, item=item: -(table[i] @ table[item]))[:12]
            assert row.tolist() == expected
            np.testing.assert_allclose(row_cosines, table[expected] @ table[item], atol=1e-6)


def test_scores_of_items_are_those_of_the_lists(causal_recommender, everything):
    histories, (scores, states) = everything
    items = [np.array([(3 * i) % NUM_ITEMS + 1, 7, 7][: i % 3 + 1], np.int32) for i in range(len(histories))]
    found = causal_recommender.item_scores(histories, items)
    table = UserTable(causal_recommender)
    table.add_histories({str(i): history for i, history in enumerate(histories)})
    for i, (row, chosen) in enumerate(zip(found, items, strict=True)):
        np.testing.assert_allclose(row, scores[i, chosen - 1], rtol=1e-6)
        np.testing.assert_allclose(table.item_scores(str(i), chosen), states[i, chosen - 1], rtol=1e-6)


def test_the_stream_has_the_same_rules(causal_run, causal_recommender, tmp_path, capsys):
    lines = [
        event("a", "i1", 0),
        event("a", "new", 5),
        event("a", "i2", 10),
        {"user": "a", "recommend": 5},
        {"user": "a", "recommend": 5, "allow": ["i4", "i1", "i9"], "deny": ["i9"], "exclude_seen": False},
        {"user": "a", "score": ["i7", "i4"]},
        {"user": "nobody", "recommend": 3},
        {"user": "nobody", "score": ["i4"]},
        {"item": "i3", "similar": 2, "deny": ["i5"]},
        {"user": "a", "recommend": 5, "allow": "i4"},
        {"user": "a", "score": [1.5]},
        {"similar": 2},
    ]
    log = write(tmp_path / "events.jsonl", lines)
    rules = ["--exclude_seen", "--deny=i4", "--unknown_items=skip", "--unknown_users=popularity"]
    code, answers, err = main(capsys, f"--run={causal_run}", f"--events={log}", *rules)
    assert code == 0 and "2 events, 6 answers, 3 bad lines, 1 events of unknown items skipped" in err
    known, table, at = causal_recommender, UserTable(causal_recommender), causal_recommender.index_of_item
    table.add_histories({"a": known.history_from_ids(["i1", "i2"], [978_300_000, 978_300_010])})
    allowed = np.arange(NUM_ITEMS + 1) != at["i4"]
    [expected], _ = table.top_k(["a"], 5, exclude_seen=True, allowed=allowed)
    assert [item["item"] for item in answers[0]["items"]] == [known.item_ids[i - 1] for i in expected]
    assert answers[0]["source"] == "model" and len(answers[0]["items"]) == 5
    assert [item["item"] for item in answers[1]["items"]] == ["i1"]
    assert [item["item"] for item in answers[2]["items"]] == ["i7", "i4"]
    np.testing.assert_allclose(
        [item["score"] for item in answers[2]["items"]],
        table.item_scores("a", np.array([at["i7"], at["i4"]])),
        rtol=1e-5,
    )
    popular, counts = known.popular(3, allowed=allowed)
    assert answers[3]["source"] == "popularity"
    assert [item["item"] for item in answers[3]["items"]] == [known.item_ids[i - 1] for i in popular]
    assert [item["score"] for item in answers[3]["items"]] == counts.tolist()
    assert answers[4]["items"][0]["score"] == known.training_counts[at["i4"]] and answers[4]["source"] == "popularity"
    [similar], _ = known.similar([at["i3"]], 2, allowed=(np.arange(NUM_ITEMS + 1) != at["i5"]) & allowed)
    assert [item["item"] for item in answers[5]["items"]] == [known.item_ids[i - 1] for i in similar]
    for answer, message in zip(answers[6:], ('"allow" must be a list', "id 1.5 must", '"similar" asks'), strict=True):
        assert message in answer["error"]


def _main(capsys, *argv):
    code = recommend.main([str(word) for word in argv])
    captured = capsys.readouterr()
    return code, " ".join(captured.out.split()), captured.err


def test_the_program_prints_scores_and_similar_items(run, recommender, capsys):
    [[score]] = recommender.item_scores([recommender.history_of_user("u3")], [np.array(_at(recommender, "i7"))])
    code, out, _ = _main(capsys, f"--run={run}", "--user=u3", "--score_items=i7")
    assert code == 0 and f"i7 │ {score:.4f} │ Title of i7" in out
    code, out, _ = _main(capsys, f"--run={run}", "--similar=i7,i9", "--k=2", "--deny=i1")
    assert code == 0 and "most like item 'i7'" in out and "most like item 'i9'" in out and " i1 " not in out
    code, out, _ = _main(capsys, f"--run={run}", "--user=new", "--k=2", "--unknown_users=popularity")
    assert code == 0 and "source: popularity in the training part" in out
    code, out, _ = _main(capsys, f"--run={run}", "--history=i1,new,i2", "--k=2", "--unknown_items=skip")
    assert code == 0 and "after 2 events" in out and "1 unknown items were skipped" in out
    for options, message in (
        (["--history=new", "--unknown_items=skip"], "the history has 1 items, all unknown; give at least 1 item id"),
        (["--user=u3", "--score_items=new"], "--score_items: unknown item 'new'"),
        (["--similar=new"], "--similar: unknown item 'new'"),
        (["--similar=new", "--unknown_items=skip"], "--similar names no item of the run"),
        (["--similar=i1", "--score_items=i2"], "--score_items belongs to --user or --history; got --similar"),
    ):
        code, out, err = _main(capsys, f"--run={run}", *options)
        assert (code, out) == (2, "") and message in err and err.count("\n") == 1


ROWS = [
    {"user": "u5"},
    {"user": "me", "history": ["i4", "new", "i9"], "times": [978_300_000, 978_350_000, 978_400_000]},
    {"user": "stranger"},
    {"user": "empty", "history": []},
]


@pytest.mark.parametrize("into", [".parquet", ".csv", ".tsv", ".jsonl"])
@pytest.mark.parametrize("out_of", [".parquet", ".csv", ".tsv", ".jsonl"])
def test_files_in_and_out_by_their_endings(run, recommender, tmp_path, capsys, out_of, into):
    source, output = tmp_path / f"in{out_of}", tmp_path / f"out{into}"
    frame = pl.DataFrame(ROWS)
    if out_of == ".jsonl":
        source.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    elif out_of == ".parquet":
        frame.write_parquet(source)
    else:
        texts = frame.with_columns(pl.col("history", "times").cast(pl.List(pl.String)).list.join(","))
        texts = texts.head(3) if out_of != ".parquet" else texts
        texts.write_csv(source, separator="\t" if out_of == ".tsv" else ",")
    options = ["--k=3", "--unknown_items=skip", "--unknown_users=popularity", "--deny=i2"]
    code, out, err = _main(capsys, f"--run={run}", f"--input={source}", f"--output={output}", *options)
    assert (code, err) == (0, "") and "1 unknown items in 1 histories were skipped" in out
    readers = {".parquet": pl.read_parquet, ".csv": pl.read_csv, ".jsonl": pl.read_ndjson}
    table = pl.read_csv(output, separator="\t") if into == ".tsv" else readers[into](output)
    assert table.columns == ["line", "user", "rank", "item_id", "score", "title", "source", "assumed_gap", "skipped"]
    allowed = np.arange(NUM_ITEMS + 1) != recommender.index_of_item["i2"]
    histories = [
        recommender.history_of_user("u5"),
        recommender.history_from_ids(["i4", "i9"], [978_300_000, 978_400_000]),
    ]
    lists, _ = recommender.top_k(histories, 3, allowed=allowed)
    popular = [recommender.popular(3, allowed=allowed)[0]] * (1 if out_of in (".csv", ".tsv") else 2)
    expected = [recommender.item_ids[i - 1] for row in [*lists, *popular] for i in row]
    assert table["item_id"].to_list() == expected
    assert table["source"].to_list() == ["model"] * 6 + ["popularity"] * (len(expected) - 6)
    assert table["skipped"].to_list() == [0] * 3 + [1] * 3 + [0] * (len(expected) - 6)
    assert table["user"].to_list()[:9] == ["u5"] * 3 + ["me"] * 3 + ["stranger"] * 3
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([source.name, output.name])


@pytest.mark.parametrize("into", [".parquet", ".csv", ".jsonl"])
def test_all_users_piece_by_piece(run, recommender, tmp_path, capsys, monkeypatch, into):
    for module in ("history_file", "row_files"):
        monkeypatch.setattr(f"tim4rec_jax.serving.{module}.ROWS_AT_ONCE", 7)
    users, output = recommender.users, tmp_path / f"out{into}"
    lists, scores = recommender.top_k([recommender.history_of_user(user) for user in users], 2)
    (tmp_path / "users.txt").write_text("\n".join(users))
    pl.DataFrame({"user": users}).write_csv(tmp_path / "users.csv")
    pl.DataFrame({"user": users}).write_parquet(tmp_path / "users.parquet")
    for source in ("all", *(tmp_path / f"users.{ending}" for ending in ("txt", "csv", "parquet"))):
        code, _, err = _main(capsys, f"--run={run}", f"--users={source}", f"--output={output}", "--k=2")
        assert (code, err) == (0, "")
        table = {".parquet": pl.read_parquet, ".csv": pl.read_csv, ".jsonl": pl.read_ndjson}[into](output)
        assert table["user"].to_list() == [user for user in users for _ in range(2)]
        assert table["item_id"].to_list() == [recommender.item_ids[i - 1] for i in lists.reshape(-1)]
        # Other batches round otherwise, which the norms over near-constant gaps of this untrained model magnify.
        np.testing.assert_allclose(table["score"].to_numpy(), scores.reshape(-1), rtol=1e-3)


def test_pairs(run, recommender, tmp_path, capsys):
    source, output = tmp_path / "pairs.csv", tmp_path / "scores.parquet"
    source.write_text("user,item\nu5,i3\nu6,i3\nu5,i9\nnew,i3\nu5,new\n")
    options = [f"--run={run}", f"--pairs={source}", f"--output={output}"]
    code, _, err = _main(capsys, *options)
    assert code == 2 and "line 5: unknown user 'new'" in err and "(and 1 more bad lines)" in err
    assert not output.exists()
    code, out, _ = _main(capsys, *options, "--unknown_users=popularity", "--unknown_items=skip")
    assert (
        code == 0 and "scores of 4 pairs" in out and "1 of unknown users" in out and "1 pairs of unknown items" in out
    )
    table = pl.read_parquet(output)
    assert table["user"].to_list() == ["u5", "u6", "u5", "new"] and table["line"].to_list() == [2, 3, 4, 5]
    histories = [recommender.history_of_user(user) for user in ("u5", "u6")]
    three, nine = (recommender.index_of_item[name] for name in ("i3", "i9"))
    (first, third), (second,) = recommender.item_scores(histories, [np.array([three, nine]), np.array([three])])
    counted = float(recommender.training_counts[three])
    np.testing.assert_allclose(table["score"].to_list(), [first, second, third, counted], rtol=1e-5)
    assert table["source"].to_list() == ["model"] * 3 + ["popularity"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("in.csv", "user,name\nu1,x\n", "in.csv: unknown column 'name'; the columns may be user, history, times"),
        ("in.csv", "user\nu1\nu2,u3\n", "in.csv: line 3: has 2 fields, the header 1; nothing was written"),
        ("in.csv", "user\n", "in.csv holds no lines"),
        ("in.csv", 'user\n"u1\n', "in.csv: line 2: unexpected end of data"),
        ("in.csv", "history,times\ni1,soon\n", "line 2: \"times\": 'soon' is not a whole number of seconds"),
        ("in.parquet", "user\nu1\n", "in.parquet cannot be read as Parquet: "),
    ],
)
def test_bad_tables_are_one_line(run, tmp_path, capsys, name, content, message):
    source, output = tmp_path / name, tmp_path / "top.csv"
    source.write_text(content)
    code, out, err = _main(capsys, f"--run={run}", f"--input={source}", f"--output={output}")
    assert (code, out) == (2, "") and message in err and err.count("\n") == 1 and not output.exists()
