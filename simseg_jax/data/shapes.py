"""The embedded data set: procedural scenes with captions and ground-truth masks, no download.

A scene has a textured ground (grass, sand, sky, water, carpet or snow) and one to three objects of
ten categories; few objects are larger than many. Categories differ in outline, colour and pattern
but share each of these with others: apple, heart and brick are reddish, star and moon yellowish,
leaf is green on green grass. Captions name the objects, some with an adjective, most with the
ground. Scene `i` of a split is always the same.
"""

import functools
from pathlib import Path

import numpy as np

from simseg_jax.runtime.errors import UserError
from simseg_jax.runtime.files import digest

CATEGORIES = ("apple", "leaf", "brick", "star", "heart", "ring", "cross", "moon", "kite", "wheel")
GROUNDS = {
    "grass": (86, 132, 62),
    "sand": (196, 172, 122),
    "sky": (142, 178, 214),
    "water": (58, 98, 142),
    "carpet": (138, 84, 92),
    "snow": (224, 228, 234),
}
# Mean colour of each category; every object deviates from it.
COLOURS = {
    "apple": (188, 42, 40),
    "leaf": (58, 150, 58),
    "brick": (182, 88, 58),
    "star": (238, 200, 60),
    "heart": (222, 66, 104),
    "ring": (66, 104, 200),
    "cross": (244, 244, 240),
    "moon": (236, 224, 160),
    "kite": (150, 70, 178),
    "wheel": (96, 96, 100),
}
OPENINGS = ("", "there is", "a picture of", "we see", "this scene shows")
JOINTS = ("and", "next to", "near", "with", "beside")
ADJECTIVES = ("small", "big", "old", "nice", "single", "bright")
WORDS = ("a", "an", "on", "the", "in", "photo", "of", "background")
SIZE = 64
# Splits draw from separate random streams.
SPLITS = {"train": 0, "val": 1, "test": 2}


def vocabulary() -> dict[str, int]:
    """Token -> id: special tokens, all words of captions, and letters to spell other words."""
    phrases = " ".join((*OPENINGS, *JOINTS, *ADJECTIVES, *WORDS, *CATEGORIES, *GROUNDS))
    words = sorted(set(phrases.split()))
    letters = [chr(ord("a") + i) for i in range(26)]
    pieces = [letter for letter in letters if letter not in words] + [f"##{x}" for x in letters]
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words, *pieces]
    return {token: index for index, token in enumerate(tokens)}


def version() -> str:
    """A digest of the code that draws the scenes: it tells versions of this data set apart."""
    return digest(Path(__file__).read_bytes())


def check_split(split: str) -> str:
    """`split`; a `UserError` if there are no scenes of it."""
    if split not in SPLITS:
        raise UserError(f"The generated scenes have the splits {', '.join(SPLITS)}, not {split!r}.")
    return split


@functools.lru_cache(maxsize=16384)
def scene(index: int, split: str) -> tuple[np.ndarray, np.ndarray, str]:
    """Scene `index` of a split: image uint8 [64, 64, 3], mask uint8 [64, 64], caption.

    The mask is 0 on the ground and 1 + the index of the category on objects. Scenes are cached:
    later epochs do not draw them again.
    """
    rng = np.random.default_rng((SPLITS[split], index))
    ground = rng.choice(list(GROUNDS))
    image = _ground(rng, ground)
    mask = np.zeros((SIZE, SIZE), np.uint8)
    names = list(rng.choice(CATEGORIES, size=rng.integers(1, 4), replace=False))
    for name, (x, y, radius) in zip(names, _places(rng, len(names)), strict=True):
        alpha, colour = _object(rng, name, x, y, radius)
        image += alpha[:, :, None] * (colour - image)
        mask[alpha > 0.5] = 1 + CATEGORIES.index(name)
    image += rng.normal(0, 4, image.shape).astype(np.float32)
    return np.clip(image, 0, 255).astype(np.uint8), mask, _caption(rng, names, ground)


def _caption(rng: np.random.Generator, names: list[str], ground: str) -> str:
    parts = [rng.choice(OPENINGS)]
    for position, name in enumerate(rng.permutation(names)):
        if position:
            parts.append(rng.choice(JOINTS))
        words = [rng.choice(ADJECTIVES), name] if rng.random() < 0.3 else [name]
        parts += ["an" if words[0][0] in "aeiou" else "a", *words]
    if rng.random() < 0.7:
        parts += ["on the", ground]
    return " ".join(str(part) for part in parts if part)


def _grid() -> tuple[np.ndarray, np.ndarray]:
    y, x = np.mgrid[:SIZE, :SIZE].astype(np.float32)
    return x + 0.5, y + 0.5


GRID_X, GRID_Y = _grid()


def _ground(rng: np.random.Generator, name: str) -> np.ndarray:
    """float32 [64, 64, 3]: base colour, slow shading and the texture of the ground."""
    base = np.array(GROUNDS[name], np.float32) + rng.normal(0, 12, 3).astype(np.float32)
    angle, phase = rng.uniform(0, 2 * np.pi, 2).astype(np.float32)
    along = np.cos(angle) * GRID_X + np.sin(angle) * GRID_Y
    across = np.cos(angle) * GRID_Y - np.sin(angle) * GRID_X
    shade = 12 * np.sin(along / 30 + phase)
    if name in ("grass", "sand", "snow"):
        amplitude = {"grass": 18, "sand": 9, "snow": 5}[name]
        shade += rng.normal(0, amplitude, (SIZE, SIZE)).astype(np.float32)
    elif name == "water":
        shade += 14 * np.sin(along / 1.6 + 2 * np.sin(across / 7))
    elif name == "carpet":
        shade += 16 * np.sign(np.sin(along / 2.2) * np.sin(across / 2.2))
    return base + shade[:, :, None]


def _places(rng: np.random.Generator, count: int) -> list[tuple[float, float, float]]:
    """Centres and radii of `count` objects, sized so that they overlap at most slightly."""
    places: list[tuple[float, float, float]] = []
    largest = {1: 22, 2: 17, 3: 14}[count]
    while len(places) < count:
        radius = rng.uniform(0.6, 1) * largest
        for _ in range(30):
            x, y = rng.uniform(radius, SIZE - radius, 2)
            if all(np.hypot(x - u, y - v) > 0.85 * (radius + r) for u, v, r in places):
                break
        places.append((x, y, radius))
    return places


def _object(rng: np.random.Generator, name: str, x: float, y: float, radius: float):
    """Coverage [64, 64] in [0, 1] and colour [64, 64, 3] of one object."""
    angle = rng.uniform(-0.5, 0.5) if name != "kite" else rng.uniform(0, 2 * np.pi)
    c, s = np.float32(np.cos(angle) / radius), np.float32(np.sin(angle) / radius)
    dx, dy = GRID_X - np.float32(x), GRID_Y - np.float32(y)
    u, v = c * dx + s * dy, c * dy - s * dx
    distance, pattern = OUTLINES[name](u, v)
    alpha = np.clip(0.5 - distance * np.float32(radius), 0, 1)
    colour = np.array(COLOURS[name], np.float32) + rng.normal(0, 16, 3).astype(np.float32)
    shade = pattern * 40 - 10 * v
    return alpha, colour + shade[:, :, None]


# Outlines on unit coordinates: (signed distance, negative inside; shading in [-1, 1]).
def _apple(u, v):
    r = np.hypot(u, v)
    body = r - 0.92 + 0.25 * np.exp(-12 * u**2) * (v < 0)
    return body, 1.2 * np.exp(-12 * ((u + 0.35) ** 2 + (v + 0.3) ** 2))


def _leaf(u, v):
    side = np.abs(v) - 0.5 * (1 - u**2)
    return np.maximum(side, np.abs(u) - 1) * 0.8, np.where(np.abs(v) < 0.08, -1.0, 0.2)


def _brick(u, v):
    row = np.floor((v + 0.6) / 0.4)
    mortar = (np.mod(v + 0.6, 0.4) < 0.09) | (np.mod(u + 0.35 * row, 0.7) < 0.09)
    return np.maximum(np.abs(u) - 1, np.abs(v) - 0.6), np.where(mortar, 1.5, -0.2)


def _star(u, v):
    # Five-fold symmetry folds every point onto one edge from a tip (1) to an inner corner (0.45).
    angle = np.abs(np.mod(np.arctan2(u, -v) + np.pi / 5, 2 * np.pi / 5) - np.pi / 5)
    r = np.hypot(u, v)
    inner_x, inner_y = 0.45 * np.cos(np.pi / 5), 0.45 * np.sin(np.pi / 5)
    normal_x, normal_y = inner_y, 1 - inner_x
    edge = normal_x * (r * np.cos(angle) - 1) + normal_y * r * np.sin(angle)
    return edge / np.hypot(normal_x, normal_y), 0.3 * np.cos(5 * np.arctan2(u, -v))


def _heart(u, v):
    w = -v * 1.1 + 0.15
    inside = (u**2 + w**2 - 0.55) ** 3 - u**2 * w**3
    return np.sign(inside) * np.minimum(np.abs(inside) ** (1 / 3) * 0.5, 1), 0.3 * u


def _ring(u, v):
    r = np.hypot(u, v)
    return np.abs(r - 0.75) - 0.22, 0.5 * np.cos(2 * np.arctan2(v, u))


def _cross(u, v):
    a, b = np.abs(u), np.abs(v)
    return np.minimum(np.maximum(a - 0.3, b - 1), np.maximum(b - 0.3, a - 1)), np.zeros_like(u)


def _moon(u, v):
    crescent = np.maximum(np.hypot(u, v) - 1, 0.75 - np.hypot(u - 0.55, v))
    return crescent, -0.5 * np.exp(-20 * ((u + 0.6) ** 2 + (v - 0.2) ** 2))


def _kite(u, v):
    w = np.where(v > 0, v / 1.0, v / 0.6)
    return (np.abs(u) / 0.7 + np.abs(w) - 1) * 0.55, np.sign(u * v) * 1.0


def _wheel(u, v):
    r, spokes = np.hypot(u, v), np.cos(6 * np.arctan2(v, u))
    return r - 0.95, np.where(r > 0.72, -1.0, np.where((spokes > 0.6) | (r < 0.2), -0.6, 1.6))


OUTLINES = {
    "apple": _apple,
    "leaf": _leaf,
    "brick": _brick,
    "star": _star,
    "heart": _heart,
    "ring": _ring,
    "cross": _cross,
    "moon": _moon,
    "kite": _kite,
    "wheel": _wheel,
}
