"""The 8x8 handwritten digits that ship inside scikit-learn, as a TFDS data set: no network, no TensorFlow.

1,797 images of 10 classes (UCI "Optical Recognition of Handwritten Digits", test part). Pixel values 0..16 become
(255 v + 8) // 16 in 0..255, undone exactly by (16 u + 127) // 255. The split is stratified and never changes: within each
class, images are ordered by a fixed hash of their row number, and the 297 lowest quantiles over all classes are the test set.
"""

import contextlib
import hashlib
import io
import os
import pathlib
import tempfile

import numpy as np
import tensorflow_datasets as tfds

from flowjax.data import images

TEST_COUNT = 297


def to_uint8(values: np.ndarray) -> np.ndarray:
    """scikit-learn's 0..16 to uint8 0..255, rounded to nearest."""
    return ((255 * values.astype(np.int32) + 8) // 16).astype(np.uint8)


def held_out_rows(labels: np.ndarray) -> np.ndarray:
    """Sorted row numbers of the test set."""
    order = np.argsort([hashlib.sha256(b"digits %d" % i).hexdigest() for i in range(len(labels))])
    quantile = np.empty(len(labels))
    for label in np.unique(labels):
        rows = order[labels[order] == label]
        quantile[rows] = (np.arange(len(rows)) + 0.5) / len(rows)
    # Equal quantiles of two classes of one size are told apart by the row number (stable sort).
    return np.sort(np.argsort(quantile, kind="stable")[:TEST_COUNT])


class Digits(tfds.core.GeneratorBasedBuilder):
    """`row` is the row number in sklearn.datasets.load_digits()."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First release."}
    # TFDS looks beside this file for a list of download checksums, by way of a package that it does not install. There is none.
    code_path = None

    def __init__(self, **kwargs):
        super().__init__(**{"file_format": "array_record"} | kwargs)

    def _info(self):
        features = tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
                "label": tfds.features.ClassLabel(names=[str(d) for d in range(10)]),
                "row": np.int32,
            }
        )
        return tfds.core.DatasetInfo(builder=self, features=features, description=__doc__, supervised_keys=("image", "label"))

    def _split_generators(self, dl_manager):
        from sklearn.datasets import load_digits

        values, labels = load_digits(return_X_y=True)
        test = held_out_rows(labels)
        train = np.setdiff1d(np.arange(len(labels)), test)
        return {"train": self._generate_examples(values, labels, train), "test": self._generate_examples(values, labels, test)}

    def _generate_examples(self, values, labels, rows):
        for row in rows:
            image = to_uint8(values[row].reshape(8, 8, 1))
            # Without TensorFlow, TFDS takes images only as encoded bytes.
            yield int(row), {"image": images.encode_png(image), "label": int(labels[row]), "row": int(row)}


def prepare(data_dir: pathlib.Path) -> pathlib.Path:
    """Directory of the prepared data set data_dir/digits/1.0.0, which is made if it is not there.

    Several processes may do this at once: each writes its own copy and the first rename wins.
    """
    final = pathlib.Path(data_dir) / Digits.name / str(Digits.VERSION)
    if not final.exists():
        final.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".digits.", dir=data_dir) as scratch:
            builder = Digits(data_dir=scratch)
            # TFDS reports on the scratch directory, which is gone a moment later; errors are exceptions anyway.
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                builder.download_and_prepare()
            try:
                os.rename(builder.data_path, final)
            except OSError:
                if not final.exists():
                    raise
    return final
