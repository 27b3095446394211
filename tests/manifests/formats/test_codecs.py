"""Tests that each label is kept as its modality says, and that a member is read by its bytes alone."""

import numpy as np
import pytest

from manifests.errors import DecodeError
from manifests.formats import codecs
from manifests.modality import MODALITIES, Modality, get

IN_TARS = [modality for modality in MODALITIES.values() if not modality.in_parquet]


@pytest.mark.parametrize("modality", IN_TARS, ids=lambda modality: modality.name)
def test_a_label_comes_back_from_its_bytes(modality: Modality) -> None:
    label = np.ones(modality.shape(), modality.dtype)
    codec = codecs.of_modality(modality)
    assert codec is not None
    member = codec.encode(label)
    assert codecs.of_bytes(member) is codec
    found = codecs.decode(member)
    assert found.dtype == label.dtype
    assert (found == label).all()


def test_records_text_and_vectors_are_no_members_of_tars() -> None:
    assert [codecs.of_modality(get(name)) for name in ("boxes", "caption", "metadata")] == [None] * 3


def test_extensions_are_those_of_the_format() -> None:
    kept = {name: codec.extension for name in ("rgb", "edges", "depth") if (codec := codecs.of_modality(get(name)))}
    assert kept == {"rgb": "png", "edges": "png", "depth": "npy"}


@pytest.mark.parametrize("data", [b"", b"GIF89a", b"\xff\xd8\xff"])
def test_other_bytes_are_an_error(data: bytes) -> None:
    with pytest.raises(DecodeError, match="expected png or npy"):
        codecs.decode(data)
