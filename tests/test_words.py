"""A docstring begins with a verb in the third person; odd turns stay out. `-k manifests` lists the offenders of a folder."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOP = [ROOT / name for name in ("engine", "labelers", "tokenize_jobs", "train", "manifests", "benchmarks", "examples")]
ROOMS = [ROOT, ROOT / "docs", *TOP, *(room for folder in TOP for room in sorted(folder.rglob("[a-z]*/")))]
NOUNS = re.compile(  # In -s; those that are verbs too count as verbs before an article or the like.
    "(actions|actors|alarms|always|arrays|as|batches|bits|boxes|bytes|captions|cells|centers|checkpoints|classes|columns|corpus|"
    "cosines|digits|documents|entries|errors|events|facts|figures|files|fractions|grids|images|instances|integers|items|its|keys|"
    "labelers|latents|logits|means|modalities|nats|numbers|options|outcomes|parts|paths|pixels|recipes|regions|rows|seconds|"
    "sequences|sidecars|sines|snapshots|tables|targets|texts|this|threads|tokenizers|values|vectors|weights|workers)[ ,]|"
    "(codes|counts|copies|crops|draws|fits|groups|labels|links|lists|maps|marks|masks|names|notes|places|points|pools|records|"
    "runs|samples|scores|sources|splits|starts|sums|tokens|units|updates|views) "
    "(?!(an?|the|its?|their|each|every|all|any|one|two|some|what|which|how|and \\w+s) |[`\"'(])",
    re.IGNORECASE,
)
ODD = "where there (is|are)|([Nn]one?|False|True|[Ee]mpty) where|[Rr]aises \\w+ where|lacks?|anew|none of ours|modmill collect"


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.relative_to(ROOT).as_posix())
def test_words(room: Path) -> None:
    found = []
    for path in sorted(path for kind in ("py", "md", "sql", "html") for path in room.glob(f"*.{kind}")):
        text, name = path.read_text(), path.relative_to(ROOT).as_posix()
        for node in ast.walk(ast.parse(text)) if path.suffix == ".py" else ():
            said = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node)
            if said and (not re.match("[A-Z][a-z]*s,? ", said) or NOUNS.match(said)):
                found.append(f"{name}:{getattr(node, 'lineno', 1)}: {said.splitlines()[0]}")
        for turn in re.finditer(rf"\b({ODD})\b".replace(" ", r"\s+(?:# )?"), text):
            found.append(f"{name}:{text.count(chr(10), 0, turn.start()) + 1}: odd: {' '.join(turn[0].split())}")
    assert not found, "\n".join(found)
