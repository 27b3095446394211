"""What a worker asks of its machine."""

import subprocess
import sys
from pathlib import Path

from manifests.catalog.catalog import Catalog

ROOT = Path(__file__).resolve().parents[3]

WHILE_TORCH_IS_LOADED = """
import sys, threading
from engine.work.machine import is_tensor
from engine.work.machine import limit_torch, loaded_torch
assert loaded_torch() is None
def load():
    import torch
thread = threading.Thread(target=load)
thread.start()
while "torch" not in sys.modules:
    pass
found = is_tensor("a caption")
limit_torch(3)
print(found, loaded_torch().get_num_threads())
thread.join()
"""

FITS_AT_ONCE = """
import sys
from pathlib import Path
from engine.pipeline import config
from engine.run import job
job.run(config.load(Path(sys.argv[1])), quiet=True)
"""
PIPELINE = """
workspace: {folder}/work
corpora:
  photos:
    source: {folder}/photos
    modalities: [rgb, caption]
tokenizers: {{rgb: {{steps: 1, window: 32, batch: 2}}}}
engine: {{runner: local, workers: 2}}
fit_rows: 4
"""


def of_its_own(code: str, *arguments: str) -> str:
    """What code says at its end, in a process that has not loaded torch."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_torch_is_whole_though_another_thread_loads_it() -> None:
    assert of_its_own(WHILE_TORCH_IS_LOADED).split() == ["False", "3"]


def test_captions_are_fitted_on_while_another_fit_loads_torch(tmp_path: Path, photos: Path) -> None:
    for photo in photos.glob("*.jpg"):
        photo.with_suffix(".txt").write_text("a picture of many colours")
    (tmp_path / "pipeline.yaml").write_text(PIPELINE.format(folder=tmp_path))
    of_its_own(FITS_AT_ONCE, str(tmp_path / "pipeline.yaml"))
    with Catalog.open(tmp_path / "work") as catalog:
        text = catalog.tokenizer("text")
        assert text is not None
        assert text.rows > 0
