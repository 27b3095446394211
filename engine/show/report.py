"""Makes the report of a workspace: one HTML page with its pictures beside it, from what the manifest and shards say."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from engine.show import contact
from engine.show.codebooks import CodebookUse, codebook_use
from engine.show.contact_sheet import contact_sheet
from engine.show.page import Page, PageBlock, PageSection, many, use_chart
from manifests import units
from manifests.catalog.catalog import Catalog
from manifests.commands import command


@dataclass(frozen=True, kw_only=True)
class Question:
    """Holds a question in words, and the query over the views of `modmill sql` that answers it (without double quotes)."""

    words: str
    query: str


# Names of a tokenizer's figures: those that the charts show too, and the mark of the baseline's.
_OF_CODES, _FLAT = ("codebook_use", "entropy_bits", "perplexity"), "flat_"

# Questions that any workspace has an answer to, if an empty one.
QUESTIONS: tuple[Question, ...] = (
    Question(
        words="How many tokens does each modality of each corpus have?",
        query="SELECT corpus, modality, sum(tokens) AS tokens, count(*) AS shards FROM shards\n"
        "WHERE is_current AND form = 'token' GROUP BY ALL ORDER BY corpus, tokens DESC",
    ),
    Question(
        words="Which photographs are the most colorful?",
        query="SELECT s.source, round(m.colorfulness, 1) AS colorfulness, c.caption FROM metadata m\n"
        "JOIN samples s USING (corpus, key) LEFT JOIN captions c USING (corpus, key)\n"
        "ORDER BY m.colorfulness DESC LIMIT 8",
    ),
    Question(
        words="Which kinds of boxes are there, and how large are they?",
        query="SELECT corpus, class, count(*) AS boxes, round(100 * avg(area), 1) AS mean_area_percent FROM boxes\n"
        "GROUP BY ALL ORDER BY boxes DESC LIMIT 12",
    ),
)


def write_report(
    workspace: str | Path,
    out: Path,
    *,
    title: str = "",
    questions: Sequence[Question] = QUESTIONS,
    class_names: Sequence[str] = (),
    most_samples: int = 6,
    more: Sequence[Callable[[Page], PageSection]] = (),
) -> Path:
    """Writes `out/report.html` and `out/pictures/*.png`, and returns the path of the page.

    `class_names` are the names of segmentation's class numbers, for the legend; `more` makes sections that stand after
    the contact sheets. Raises WorkspaceError if there is no workspace, QueryError if a question cannot be asked.
    """
    with Catalog.open(workspace) as catalog:
        page = Page(out)
        notes: list[str] = []
        corpora = sorted(catalog.corpora(), key=lambda row: (row["kind"] != "image", row["corpus"]))
        sheets = []
        for corpus in corpora:
            shown = contact.samples(catalog, corpus["corpus"], most_samples, notes)
            sheets.append(contact_sheet(page, corpus, shown, class_names))
        return page.write(
            title=title or f"modmill: {workspace}",
            lead=_lead(catalog, corpora),
            corpora=sheets,
            sections=[
                *(make(page) for make in more),
                _tokenizers(codebook_use(catalog)),
                PageSection(
                    anchor="coverage",
                    heading="Coverage",
                    words="Corpus by modality: what is done, and what is missing.",
                    blocks=[PageBlock(table=catalog.status())],
                ),
                *_failures(catalog),
                _questions(catalog, workspace, questions),
            ],
            notes=notes,
        )


_FIGURES = """
SELECT count(*) AS shards, coalesce(sum(tokens), 0)::BIGINT AS tokens, coalesce(sum(size_bytes), 0)::BIGINT AS size_bytes,
  (SELECT coalesce(sum(rows), 0)::BIGINT FROM (
    SELECT max(rows) AS rows FROM coverage WHERE crops IS NOT NULL GROUP BY corpus
  )) AS crops,
  (SELECT count(DISTINCT (corpus, key)) FROM failures) AS failed,
  (SELECT coalesce(sum(time_s), 0)::DOUBLE FROM runs) AS time_s,
  (SELECT count(*) FROM runs WHERE time_s IS NOT NULL) AS runs
FROM shards WHERE is_current
"""


def _lead(catalog: Catalog, corpora: Sequence[Mapping[str, Any]]) -> str:
    """Returns one paragraph of what was done."""
    (figures,) = catalog.sql(_FIGURES).to_pylist()
    named = ", ".join(f"{row['samples']:,} {row['corpus']}" for row in corpora)
    crops = f", {figures['crops']:,} crops of images" if figures["crops"] else ""
    failed = "no row failed" if not figures["failed"] else f"{many(figures['failed'], 'sample')} failed in part"
    return (
        f"{many(len(corpora), 'corpus', 'corpora')} ({named or 'nothing in them'}){crops}: {figures['tokens']:,} tokens "
        f"and the labels that are kept, in {many(figures['shards'], 'shard')} of {units.size(figures['size_bytes'])}; "
        f"{failed}. {many(figures['runs'], 'run')} took {units.span(figures['time_s'])} in all."
    )


def _tokenizers(uses: Sequence[CodebookUse]) -> PageSection:
    """Returns what was measured on judged labels, and how the vocabularies are used."""
    return PageSection(
        anchor="tokenizers",
        heading="Tokenizers and their codebooks",
        words="Judged by: how many labels of judged samples; if there is none, a figure is of what was fitted on. Beside it "
        "stands what the best picture of one color (value, class) for each label would reach. The charts show how often "
        "each code occurs, commonest first, on a logarithmic scale; the dashed line is even use.",
        blocks=[
            PageBlock(table=pa.Table.from_pylist([row for use in uses for row in _measures(use)])),
            PageBlock(charts=[use_chart(use.tokenizer.name, [_use_words(use)], use.counts) for use in uses]),
        ],
    )


def _measures(use: CodebookUse) -> list[dict[str, Any]]:
    """Returns a row for each figure of a tokenizer, beside that of the best picture of one color (or value, or class) a row."""
    metrics = dict(use.tokenizer.metrics)
    held_out = metrics.pop("held_out_rows", None)
    # The charts show these of all tokens.
    shown = [name for name in metrics if name not in _OF_CODES and not name.startswith(_FLAT)]
    return [
        {
            "tokenizer": use.tokenizer.name,
            "fitted on": use.tokenizer.rows,
            "judged by": None if held_out is None else int(held_out),
            "figure": name,
            "value": float(metrics[name]),
            "one color only": metrics.get(_FLAT + name),
        }
        for name in shown
    ]


def _use_words(use: CodebookUse) -> str:
    total = len(use.counts)
    served = "" if use.modalities == (use.tokenizer.name,) else f" Serves {', '.join(use.modalities)}."
    part = "" if use.shards_read == use.shards else f" Counted in {use.shards_read} of {use.shards:,} shards."
    return (
        f"{use.used:,} of {total:,} codes used ({100 * use.used / total:.0f} %), perplexity {use.perplexity:,.0f}, "
        f"{int(use.counts.sum()):,} tokens.{served}{part}"
    )


def _failures(catalog: Catalog) -> list[PageSection]:
    """Returns a section of what failed, or none."""
    failed = catalog.sql(
        "SELECT corpus, modality, stage, class, count(DISTINCT key) AS samples, any_value(message) AS example "
        "FROM failures GROUP BY corpus, modality, stage, class ORDER BY samples DESC, corpus, modality LIMIT 40"
    )
    if not failed.num_rows:
        return []
    words = "Rows that could not be made; each is null in its shard."
    return [PageSection(anchor="failures", heading="Failures", words=words, blocks=[PageBlock(table=failed)])]


def _questions(catalog: Catalog, workspace: str | Path, questions: Sequence[Question]) -> PageSection:
    return PageSection(
        anchor="questions",
        heading="Questions in SQL",
        words="Any view of the manifest can be asked from the command line.",
        blocks=[
            PageBlock(
                heading=question.words,
                command=command("sql", workspace, question.query),
                table=catalog.sql(question.query),
            )
            for question in questions
        ],
    )
