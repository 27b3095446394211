import numpy as np

from labelers.rgb import Rgb


def test_the_label_is_the_crop():
    crops = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    labels = Rgb().label({"image": crops})["rgb"]
    assert len(labels) == 2
    np.testing.assert_array_equal(np.stack(labels), crops)
