"""The tables of the READMEs hold what the committed records hold."""

import pytest

from experiments import tables


@pytest.mark.quick
@pytest.mark.parametrize("document", tables.DOCUMENTS, ids=lambda path: str(path.relative_to(tables.ROOT)))
def test_tables_are_those_of_the_records(document):
    text = document.read_text()
    assert tables.filled(text) == text, "run: python -m experiments.tables"


def test_every_table_stands_in_a_document_and_a_changed_number_is_seen():
    texts = "".join(document.read_text() for document in tables.DOCUMENTS)
    assert all(texts.count(f"<!-- table: {name} -->") == 1 for name in tables.TABLES)
    text = tables.DOCUMENTS[0].read_text()
    assert tables.filled(text.replace(".1428 ±", ".1528 ±")) == text


def test_the_module_of_measured_times_is_made_from_the_records():
    assert tables.MEASURED.read_text() == tables.measured(), "run: python -m experiments.tables"
