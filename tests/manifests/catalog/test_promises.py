"""Compares docs/manifest.md with the views and macros that a workspace has, column by column."""

import re
from pathlib import Path

import pytest

from manifests.catalog import content
from manifests.catalog.catalog import Catalog
from manifests.store.storage import Storage

PAGE = (Path(__file__).parents[3] / "docs/manifest.md").read_text()
# By name or call, the columns and their types, in their order.
DESCRIBED = {
    name: re.findall(r"^\| (\w+) \| ([A-Z]+(?:\[\])?) \|", section, re.MULTILINE)
    for heading, section in re.findall(r"^### (.*)\n((?:(?!^##).*\n)*)", PAGE, re.MULTILINE)
    for name in re.findall(r"`(.*?)`", heading)
}
# What outside scripts rely on. All else says that it is experimental.
PROMISED = {
    *(
        "corpora",
        "parts",
        "samples",
        "shards",
        "recipes",
        "lineage",
        "coverage",
        "complete_parts",
        "failures",
        "quality",
    ),
    *("runs", "timeline", "boxes", "instances", "persons", "captions", "palettes", "metadata"),
}
ARGUMENTS = {
    "diff(version_a, version_b)": "diff(0, 1)",
    "shard_lineage(path)": "shard_lineage('p')",
    "sample_uses(corpus, key)": "sample_uses('c', 'k')",
}
VALUES = {"split_share(key)", "version_at(moment)", "has_row(bits, row)"}


@pytest.mark.parametrize("name", [name for name, columns in DESCRIBED.items() if columns])
def test_columns_are_what_the_page_says(name: str, workspace: Storage) -> None:
    with Catalog(workspace) as catalog:
        described = catalog.sql(f"DESCRIBE FROM {ARGUMENTS.get(name, name)}").to_pylist()
    found = [(row["column_name"], re.sub(r"\[\d+\]", "[]", row["column_type"])) for row in described]
    assert DESCRIBED[name] == found


def test_all_that_is_there_is_on_the_page(workspace: Storage) -> None:
    with Catalog(workspace) as catalog:
        views = catalog.sql("SELECT view_name FROM duckdb_views() WHERE NOT internal AND schema_name = 'main'")
    assert {name for name in DESCRIBED if "(" not in name} == {*views["view_name"].to_pylist(), *content.CONTENT_VIEWS}
    assert {name for name in DESCRIBED if "(" in name} == {*ARGUMENTS, *VALUES}


def test_the_page_says_what_is_promised_and_what_is_experimental() -> None:
    sections = re.findall(r"^### (.*)\n((?:(?!^##).*\n)*)", PAGE, re.MULTILINE)
    experimental = {heading for heading, section in sections if section.startswith("\n*Experimental: may change.*\n")}
    assert {
        name for heading, _ in sections if heading not in experimental for name in re.findall(r"`(.*?)`", heading)
    } == PROMISED
    listed = PAGE.partition("are promised")[2].partition("All others")[0]
    assert set(re.findall(r"`(\w+)`", listed)) == PROMISED


def test_values_are_what_the_page_says(workspace: Storage) -> None:
    with Catalog(workspace) as catalog:
        found = catalog.sql("SELECT split_share('k') AS share, version_at(now()) AS version").to_pylist()[0]
        assert 0 <= found["share"] < 1
        assert found["version"] == 0
        bits = catalog.sql("SELECT has_row('\\x05\\x80'::BLOB, row) AS has FROM range(16) r(row)")["has"].to_pylist()
    assert [row for row, has in enumerate(bits) if has] == [0, 2, 15]
