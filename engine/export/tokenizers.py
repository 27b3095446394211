"""Reads the files of a tokenizer that go along with its tokens."""

from dataclasses import dataclass

from manifests.errors import ShardError
from manifests.recipe import canonical_json, sha256_hex
from manifests.store.storage import Storage


@dataclass(frozen=True, kw_only=True)
class TokenizerFolder:
    """Names a tokenizer's folder in the workspace; `digest` is the hash of its files."""

    path: str
    digest: str

    def read(self, storage: Storage) -> dict[str, bytes]:
        """Returns its files by name. Raises ShardError if they are not those that were committed."""
        files = {name: storage.read(f"{self.path}/{name}") for name in storage.names(self.path)}
        if sha256_hex(canonical_json({name: sha256_hex(data) for name, data in files.items()})) != self.digest:
            raise ShardError(
                f"{storage.location(self.path)}: its files are not those that were committed, or are gone; restore it from "
                "a copy; see `modmill verify`"
            )
        return files
