import pytest

from labelers.caption import Caption
from manifests.errors import LabelError


@pytest.mark.parametrize(
    ("value", "caption"),
    [
        ("  a cat \n", "a cat"),
        ("", None),
        (" \t", None),
        (None, None),
        ([], None),
        (["", " a dog"], "a dog"),
        ([{"caption": None}, {"caption": "a cow "}, "a dog"], "a cow"),
        ({"caption": "a hen"}, "a hen"),
        ("猫 😺 مرحبا", "猫 😺 مرحبا"),
    ],
)
def test_captions(value, caption):
    assert Caption().label({"columns": [{"caption": value, "other": "x"}]}) == {"caption": [caption]}


def test_another_column_and_no_column():
    rows = [{"alt": "a"}, {"caption": "b"}]
    assert Caption(column="alt").label({"columns": rows}) == {"caption": ["a", None]}


@pytest.mark.parametrize("value", [7, b"a cat", [["a cat"]], {"caption": 7}])
def test_what_is_no_caption_is_refused(value):
    with pytest.raises(LabelError, match=r"column 'caption' holds a (int|bytes|list)"):
        Caption().label({"columns": [{"caption": value}]})
