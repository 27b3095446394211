import pytest

from labelers.text import Text
from manifests.errors import LabelError


def test_documents_are_left_as_they_are():
    rows = [{"text": " One.\n\nTwo. "}, {"text": ""}, {"text": None}, {}]
    assert Text().label({"columns": rows}) == {"text": [" One.\n\nTwo. ", None, None, None]}
    assert Text(column="body").label({"columns": [{"body": "x"}]}) == {"text": ["x"]}


def test_what_is_no_text_is_refused():
    with pytest.raises(LabelError, match="column 'text' holds a list"):
        Text().label({"columns": [{"text": ["a"]}]})
