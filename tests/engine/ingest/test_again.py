"""What an ingest could not read and `--failed` reads once more: rows of a part get their bytes, and nothing else changes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.cli.run import run
from engine.ingest import ingest
from engine.ingest.again import count_without_bytes
from engine.pipeline.config import CorpusConfig
from engine.sources import fetch_url
from engine.sources.read import SourceBytes
from manifests.catalog.catalog import Catalog
from manifests.errors import FetchError, FetchRefused, TooManyFailures
from manifests.formats.shards import read_samples
from manifests.log import entries as log
from manifests.store.storage import Storage, open_storage

URL = "http://web.example/{}.jpg"


class Web:
    """Stands for the servers: photographs by URL; every other URL is gone, and all while it is down."""

    def __init__(self, photos: Path) -> None:
        self.photos = {
            URL.format(number): path.read_bytes() for number, path in enumerate(sorted(photos.glob("*.jpg")))
        }
        self.is_down = False
        self.asked: list[str] = []

    def fetch(self, fetcher: fetch_url.Fetcher, url: str) -> bytes:
        self.asked.append(url)
        if self.is_down or url not in self.photos:
            raise FetchError("the server answered 503 Service Unavailable")
        if "refused" in url:
            raise FetchRefused("no")
        return self.photos[url]


@pytest.fixture
def web(tmp_path: Path, make_photos: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Web:
    found = Web(make_photos(tmp_path / "made", 6))
    monkeypatch.setattr(fetch_url.Fetcher, "fetch", lambda self, url: found.fetch(self, url))
    (tmp_path / "urls.txt").write_text("\n".join(URL.format(number) for number in range(7)))
    return found


def config(folder: Path, **options: Any) -> CorpusConfig:
    return CorpusConfig.model_validate({"source": str(folder / "urls.txt"), "url": "url", "part_rows": 3, **options})


def created(path: Path) -> Storage:
    storage = open_storage(path)
    log.create_workspace(storage)
    return storage


def test_sources_that_could_not_be_read_are_read_once_more(tmp_path: Path, web: Web) -> None:
    storage, asked = created(tmp_path / "work"), config(tmp_path)
    with Catalog(storage) as catalog:
        some = dict(web.photos)
        # Of the first part one photograph is there, of the second none.
        web.photos = {URL.format(1): some[URL.format(1)]}
        ingest.ingest(catalog, "web", asked, run="r")
        before = catalog.parts("web")
        assert count_without_bytes(catalog, "web") == 6
        web.photos = some
        web.asked.clear()
        assert ingest.ingest(catalog, "web", asked, run="r").new == 0
        assert ingest.ingest(catalog, "web", asked, run="r", retry={"DecodeError"}).notes == []
        assert web.asked == []
        found = ingest.ingest(catalog, "web", asked, run="r", retry=frozenset())
        assert found.notes == ["5 of 6 sources that could not be read are read now"]
        assert sorted(web.asked) == [URL.format(number) for number in (0, 2, 3, 4, 5, 6)]
        assert (found.new, found.vanished, found.changed) == (0, 0, 0)
        after = catalog.parts("web")
        assert [part.keys_sha256 for part in after] == [part.keys_sha256 for part in before]
        assert after[0].path != before[0].path
        # The last is gone for good: its part stays the file that it was.
        assert after[2] == before[2]
        rows = [row for part in after for row in read_samples(storage.read(part.path))]
        source = SourceBytes("", asked, rows, storage)
        assert [source.read(place) for place in range(6)] == [some[URL.format(number)] for number in range(6)]
        assert [part.source_bytes for part in after] == [
            sum(len(some.get(URL.format(number), b"")) for number in range(first, min(first + 3, 7)))
            for first in (0, 3, 6)
        ]
        with pytest.raises(FetchError, match="503"):
            source.read(6)
        assert count_without_bytes(catalog, "web") == 1
        # The same bytes that one good hour would have made.
        other = created(tmp_path / "other")
        with Catalog(other) as once:
            ingest.ingest(once, "web", asked, run="r")
            assert [part.sha256 for part in once.parts("web")] == [part.sha256 for part in after]


def test_a_bad_hour_is_named_with_exit_code_3_and_mended(
    tmp_path: Path, web: Web, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    web.is_down = True
    corpora = {
        "web": {"source": f"{tmp_path}/urls.txt", "url": "url", "modalities": ["metadata"]},
        "local": {"source": str(photos), "modalities": ["metadata"]},
    }
    engine = {"runner": "local", "max_failed_fraction": 1.0}
    (tmp_path / "p.yaml").write_text(json.dumps({"workspace": "work", "corpora": corpora, "engine": engine}))
    # The healthy corpus hides nothing, and neither does a second run that has nothing to do.
    for said in ("done: ", "nothing to do: what is left failed"):
        with pytest.raises(TooManyFailures, match="nothing could be made of web: every row failed"):
            run.main([str(tmp_path / "p.yaml")], standalone_mode=False)
        assert said in capsys.readouterr().out
        web.is_down = False
    run.main([str(tmp_path / "p.yaml"), "--failed"], standalone_mode=False)
    assert "done: " in capsys.readouterr().out
    with Catalog(open_storage(tmp_path / "work")) as catalog:
        made = "SELECT corpus, ok, failed FROM coverage WHERE form = 'label' ORDER BY corpus"
        assert catalog.sql(made).to_pylist() == [
            {"corpus": "local", "ok": 9, "failed": 0},
            {"corpus": "web", "ok": 6, "failed": 1},
        ]
