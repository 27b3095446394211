import numpy as np
import pytest
import skimage.data

from labelers.edges import Edges
from manifests.errors import ConfigError


def test_a_square_has_its_outline():
    crop = np.zeros((1, 40, 40, 3), np.uint8)
    crop[0, 10:30, 10:30] = 255
    (edges,) = Edges().label({"image": crop})["edges"]
    assert edges.dtype == np.uint8
    assert set(np.unique(edges)) == {0, 255}
    rows, columns = np.nonzero(edges)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) in [(9, 29, 9, 29), (10, 30, 10, 30), (9, 30, 9, 30)]
    assert not edges[13:27, 13:27].any()
    assert 60 <= (edges > 0).sum() <= 90


def test_a_step_below_the_threshold_is_no_edge():
    crop = np.full((1, 32, 32, 3), 100, np.uint8)
    crop[0, :, 16:] = 120  # Sobel's gradient of a step is four times its height
    assert not Edges(low=100, high=200).label({"image": crop})["edges"][0].any()
    assert Edges(low=20, high=40).label({"image": crop})["edges"][0].any()


def test_known_share_on_a_photograph():
    """7.8 % of the pixels of scikit-image's astronaut are edges at the default thresholds."""
    (edges,) = Edges().label({"image": skimage.data.astronaut()[None]})["edges"]
    assert (edges > 0).mean() == pytest.approx(0.078, abs=0.001)


@pytest.mark.parametrize("wrong", [{"low": -1}, {"low": 300}])
def test_thresholds_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ConfigError, match="0 <= low <= high"):
        Edges(**wrong)
