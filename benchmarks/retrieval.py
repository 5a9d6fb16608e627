"""Ranking 25,000 images against 125,000 texts: chunked top-10 against a plain NumPy argsort.

Both sides are processes of their own, so that the peak of each is its own; their recalls must be
equal. The peer sorts rows of the similarity matrix completely, 500 at a time, as the whole matrix
and its order would take 37 GB.

python benchmarks/retrieval.py
python benchmarks/retrieval.py --images 5000 --texts 25000 --rounds 3
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from simseg_jax.runtime.errors import UserError, one_line, report_user_errors

KS = (1, 5, 10)
ROWS = 500


def embeddings(images: int, texts: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Unit-length images and texts, each text near its image, and the image of every text."""
    rng = np.random.default_rng(0)
    owners = np.arange(texts) * images // texts
    pictures = rng.standard_normal((images, width), np.float32)
    words = rng.standard_normal((texts, width), np.float32)
    words *= 5
    words += pictures[owners]
    for x in (pictures, words):
        x /= np.linalg.norm(x, axis=1, keepdims=True)
    return pictures, words, owners


def ours(pictures: np.ndarray, words: np.ndarray, owners: np.ndarray) -> list[float]:
    """R@1, R@5, R@10 of both directions."""
    from simseg_jax.evaluators.metrics import recall_at
    from simseg_jax.evaluators.ranking import nearest

    pairs = nearest(pictures, words, max(KS))
    return [recall for k in KS for recall in recall_at(pairs, owners, k)]


def peer(pictures: np.ndarray, words: np.ndarray, owners: np.ndarray) -> list[float]:
    """The same by sorting."""

    def first(queries: np.ndarray, items: np.ndarray, right) -> np.ndarray:
        places = []
        for start in range(0, len(queries), ROWS):
            order = np.argsort(-(queries[start : start + ROWS] @ items.T), axis=1, kind="stable")
            places.append(right(order, start).argmax(axis=1))
        return np.concatenate(places)

    def of_image(order, start):
        return owners[order] == np.arange(start, start + len(order))[:, None]

    def of_text(order, start):
        return order == owners[start : start + len(order), None]

    images, texts = first(pictures, words, of_image), first(words, pictures, of_text)
    return [float((places < k).mean()) for k in KS for places in (images, texts)]


@report_user_errors
def main() -> None:
    """Prints seconds, peaks and the ratio."""
    parser = argparse.ArgumentParser(description="Retrieval: chunked top-k against argsort.")
    parser.add_argument("--images", type=int, default=25_000)
    parser.add_argument("--texts", type=int, default=125_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--side", choices=("ours", "peer"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not max(KS) <= args.images <= args.texts:
        parser.error(f"--images must be from {max(KS)} to the number of --texts")
    if min(args.width, args.rounds) < 1:
        parser.error("--width and --rounds must be at least 1")
    if args.side:
        data = embeddings(args.images, args.texts, args.width)
        began = time.perf_counter()
        recalls = {"ours": ours, "peer": peer}[args.side](*data)
        seconds = time.perf_counter() - began
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(json.dumps([seconds, peak, recalls]))
        return
    sizes = [f"--{name}={getattr(args, name)}" for name in ("images", "texts", "width")]
    rows: dict[str, list] = {"ours": [], "peer": []}
    for _ in range(args.rounds):
        for side, results in rows.items():
            command = [sys.executable, str(Path(__file__)), *sizes, f"--side={side}"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise UserError(f"The side {side} failed: {one_line(done.stderr[-300:], 300)}")
            results.append(json.loads(done.stdout))
    # Sums in another order may exchange nearly equal neighbours: one query in all.
    tolerance = 1.01 / args.images
    np.testing.assert_allclose(rows["ours"][0][2], rows["peer"][0][2], rtol=0, atol=tolerance)
    medians = {side: statistics.median(row[0] for row in results) for side, results in rows.items()}
    for side, results in rows.items():
        peak = max(row[1] for row in results)
        print(f"{side}: {medians[side]:.1f} s, peak {peak:.2f} GiB, embeddings included")
    recalls = ", ".join(f"{recall:.4f}" for recall in rows["ours"][0][2])
    print(f"R@1, R@5, R@10 of images, texts in turn: {recalls}")
    print(f"peer / ours: {medians['peer'] / medians['ours']:.2f}")


if __name__ == "__main__":
    main()
