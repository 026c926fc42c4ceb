"""Does an independent classifier see the class that was asked for?

The judge is a support vector machine on pixels: another family than every network trained here, so it can be neither the
generator's guidance classifier nor the feature network under another name. Its own held-out accuracy bounds what agreement can
mean and is reported beside it.
"""

from dataclasses import dataclass

import numpy as np

from flowjax.config import ConfigError, build
from flowjax.evals import processes
from flowjax.evals.features import fingerprint
from flowjax.evals.image import dequantise


@dataclass(frozen=True)
class Judge:
    """A fitted classifier of uint8 images (N, H, W, C), with the hash of its data and recipe."""

    name: str
    hash: str
    model: object

    def __call__(self, images: np.ndarray) -> np.ndarray:
        return self.model.predict(dequantise(images).reshape(len(images), -1))


def svm(images: np.ndarray, labels: np.ndarray, C: float = 5.0, dim: int = 64, limit: int = 20000, seed: int = 0) -> Judge:
    """RBF support vector machine, gamma = 1 / (d var x); on the leading `dim` principal components where the pixels are more.

    At most `limit` train images are used, drawn by `seed`: fitting costs the square of their number.
    """
    from sklearn.decomposition import PCA
    from sklearn.pipeline import make_pipeline
    from sklearn.svm import SVC

    index = np.sort(np.random.default_rng(seed).permutation(len(images))[:limit])
    flat = dequantise(images[index]).reshape(len(index), -1)
    steps = [PCA(dim, svd_solver="covariance_eigh")] if flat.shape[1] > dim else []
    model = make_pipeline(*steps, SVC(C=C, gamma="scale")).fit(flat, labels[index])
    return Judge("svm", fingerprint("svm", flat, np.asarray(labels[index], np.int64), C, dim), model)


JUDGES = {"svm": svm}


def judge(section, images: np.ndarray, labels: np.ndarray) -> Judge:
    """Fit the JUDGES entry that `section` names on the train split's uint8 images and labels."""
    return build(JUDGES, section, "evals.judge", images=images, labels=labels)


def agreement(images: np.ndarray, labels: np.ndarray, judge: Judge) -> dict:
    """Share of uint8 images that the judge assigns to the asked class, over all and per class with its most frequent mistake.

    images and labels: of several processes, each one's share (flowjax.evals.processes).
    """
    labels = np.asarray(labels)
    if labels.shape != (len(images),) or labels.dtype.kind not in "iu":
        raise ConfigError(f"labels must be {len(images)} integers, got shape {labels.shape} of {labels.dtype}")
    seen, labels = processes.gather(judge(images)), processes.gather(labels)
    table = {}
    for label in np.unique(labels):
        mine = seen[labels == label]
        wrong, counts = np.unique(mine[mine != label], return_counts=True)
        table[str(label)] = {
            "samples": len(mine),
            "agreement": float(np.mean(mine == label)),
            "mistaken_for": int(wrong[counts.argmax()]) if len(wrong) else None,
        }
    return {"agreement": float(np.mean(seen == labels)), "per_class": table}
