"""Writes a pipeline file for a folder from what is in it, for `modmill init FOLDER`."""

import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from engine.pipeline import config
from engine.pipeline.config import CorpusConfig
from engine.pipeline.file import yaml_value
from engine.sources import listing, parquet
from engine.sources import scan as sources
from engine.sources import tars as source_tars
from engine.sources.columns import TABLE_SUFFIXES
from engine.sources.listing import Notes
from manifests.commands import command
from manifests.errors import ConfigError
from manifests.store.uris import absolute, is_uri

# Fits take steps in proportion to what is to be learned, within what a laptop does in minutes.
_RGB_STEPS, _EDGES_STEPS, _FIT_ROWS = 400, 200, 2000


def write_pipeline(folder: str, out: Path) -> str:
    """Writes a commented pipeline file for a folder (or glob, file, URI) of images or documents.

    Images may lie in tars or Parquet files. Returns what was found and, as its last line, the next command. Raises
    ConfigError if the file exists already or the folder holds neither images nor documents.
    """
    if out.exists():
        raise ConfigError(f"{out} exists already; name another file with --out, or remove it")
    source = absolute(folder, Path.cwd())
    section, found, notes = _look(source)
    name = _corpus_name(source)
    text = _pipeline(name, section, found, out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out, "x", encoding="utf-8") as file:
        file.write(text)
    config.load(out)
    return "\n".join([f"wrote {out}: {', '.join(found)}", *notes, command("run", out)])


def write_schema(path: Path) -> None:
    """Writes the JSON schema of pipeline files, which editors complete and check them by."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(config.schema(), indent=2) + "\n", encoding="utf-8")


def _look(source: str) -> tuple[CorpusConfig, list[str], list[str]]:
    """Returns the corpus that the source is, what was found in words, and notes for the user."""
    notes = Notes()
    listed = listing.list_source(source, notes)
    images = [file for file in listed.chosen if listing.suffix(file.path) in listing.IMAGE_SUFFIXES]
    if not images:
        return _look_inside(source, [file.path for file in listed.chosen])
    found = [f"{len(images)} images ({_suffix_counts(images)})"]
    stems = {listing.stem(image.path) for image in images}
    for kind, what in ((".txt", "captions (.txt beside the image)"), (".json", "sidecars (.json beside the image)")):
        beside = [f for f in listed.files if listing.suffix(f.path) == kind and listing.stem(f.path) in stems]
        if beside:
            found.append(f"{len(beside)} {what}")
    section = CorpusConfig(source=source)
    notes = sources.scan(section).findings
    for table in listed.files:
        if "/" in table.path or listing.suffix(table.path) not in TABLE_SUFFIXES:
            continue
        with_table = CorpusConfig(source=source, table=listing.uri(listed.root, table.path))
        try:
            notes = sources.scan(with_table).findings
        except ConfigError:
            # It does not name the images: some other table.
            continue
        return with_table, [*found, f"a table, {_scalar(table.path)}"], notes.lines()
    return section, found, notes.lines()


def _look_inside(source: str, paths: Sequence[str]) -> tuple[CorpusConfig, list[str], list[str]]:
    """Looks, as `_look`, into a source without image files: for images in tars or Parquet files, else for documents."""
    tars = [path for path in paths if path.lower().endswith((*source_tars.SUFFIXES, *source_tars.COMPRESSED))]
    tables = [path for path in paths if path.lower().endswith(parquet.SUFFIXES)]
    count = len(tars or tables)
    files = f"{count} {'tar' if tars else 'Parquet file'}{'s' * (count != 1)}"
    no_images = f"for images, expected {', '.join(listing.IMAGE_SUFFIXES)}, or tars or Parquet files that hold them"
    if tars or tables:
        section = CorpusConfig(source=source)
        try:
            scan = sources.scan(section)
            return section, [f"{len(scan.samples)} images in {files}"], scan.notes
        except ConfigError as error:
            if tars:
                raise
            # Parquet files may hold documents; if they do not, what is said of both kinds helps.
            no_images = f"for images, {error}"
    section = CorpusConfig(source=source, kind="text")
    try:
        scan = sources.scan(section)
    except ConfigError as error:
        raise ConfigError(f"{error}; {no_images}") from error
    return section, [f"{len(scan.samples)} documents"], scan.notes


def _suffix_counts(images: Sequence[listing.File]) -> str:
    counts = Counter(listing.suffix(image.path) for image in images)
    return ", ".join(f"{count} {name}" for name, count in counts.most_common())


def _corpus_name(source: str) -> str:
    """Makes a name of the last folder of the source; a glob's is the folder before its wildcards."""
    fixed = re.split(r"[*?\[]", source, maxsplit=1)[0] if not os.path.exists(source) else source
    last = fixed.rstrip("/").rpartition("/")[2].partition(".")[0]
    name = re.sub(r"[^a-z0-9_]+", "_", last.lower()).strip("_")[:64]
    return name or "corpus"


def _pipeline(name: str, section: CorpusConfig, found: Sequence[str], out: Path) -> str:
    base = out.absolute().parent
    workspace = f"{name}-workspace"
    if not is_uri(section.source) and base.is_relative_to(section.source):
        # Not beside the pipeline file: there the workspace would be listed with the source.
        workspace = os.path.relpath(Path(section.source).parent / workspace, base)
    lines = [
        f"# {', '.join(found)}.",
        f"#   {command('run', out)}",
        "# Relative paths start at this file's folder.",
        f"workspace: {_scalar(workspace)}  # everything is written here",
        "corpora:",
        f"  {_scalar(name)}:",
        f"    source: {_scalar(_shortest(section.source, base))}",
    ]
    if not section.has_pixels:
        lines += [f"    kind: {section.kind}", f"    modalities: [{', '.join(section.modalities)}]"]
        return "\n".join([*lines, ""])
    if section.table is not None:
        lines += [f"    table: {_scalar(_shortest(section.table, base))}  # its columns, joined by the image's name"]
    lines += [
        "    crops: 1  # more crops of each image may be added later",
        "    modalities:",
        "      rgb: {keep: true}  # the crops themselves are kept beside their tokens",
        "      edges:",
        "      boxes:",
        "      metadata:",
        "      palette:",
        "      caption:  # photo.txt beside photo.jpg, or a column named caption",
        "tokenizers:  # fitted once, on the first fit_rows images by hash of their key",
        f"  rgb: {{steps: {_RGB_STEPS}}}",
        f"  edges: {{steps: {_EDGES_STEPS}}}",
        f"fit_rows: {_FIT_ROWS}",
        "",
    ]
    return "\n".join(lines)


def _shortest(path: str, base: Path) -> str:
    """Makes a path relative to the pipeline file if they lie side by side, so that both can be moved."""
    if is_uri(path):
        return path
    relative = os.path.relpath(path, base)
    if relative.startswith("../.."):
        return path
    # A folder may be called ~ or s3::x, which would be read as something else.
    return f"./{relative}" if relative.startswith("~") or is_uri(relative) else relative


def _scalar(text: str) -> str:
    """Returns the text as a YAML value, in quotes if it would be read as something else."""
    is_plain = re.fullmatch(r"[A-Za-z_./][\w./-]*", text) and yaml_value(text) == text
    return text if is_plain else json.dumps(text, ensure_ascii=False)
