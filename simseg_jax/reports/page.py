"""A result on a web page: HTML, pictures, and the sentences that say why a word is not drawn."""

import base64
import html
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from simseg_jax.reports.segmentation import Segmentation
from simseg_jax.reports.visualize import heat_map, labels_in, palette
from simseg_jax.zeroshot.settings import SegmentationConfig

SHOWN, SMALL, MAP = 1024, 384, 320  # Sides in pixels of pictures on the page.
CSS = """
.gradio-container { max-width: 1280px !important; margin: 0 auto; }
.gradio-container .html-container small, .intro p { color: var(--body-text-color-subdued); }
.intro h1 { font-size: 1.7rem; margin: 0 0 .2rem; }
.intro p, .results p { margin: 0 0 .5rem; }
.results h2, .results h3 { font-size: 1.05rem; margin: 0; }
.results .told { border-left: 4px solid var(--color-accent); padding: .4rem .8rem; }
.given img, .annotated img, .maps img, .examples img { width: 100%; image-rendering: pixelated; }
.given img, .annotated img { object-fit: contain; }
.examples .grid-wrap { min-height: 0 !important; height: auto !important; }
.examples .grid-container { padding-top: 1.6rem; grid-template-rows: none !important;
  grid-auto-rows: auto !important; height: auto !important;
  grid-template-columns: repeat(4, minmax(0, 1fr)) !important; }
.examples .thumbnail-item { height: auto !important; aspect-ratio: 1; }
.scores ul { list-style: none; margin: 0; padding: 0; }
.scores li { margin: 0 0 .9rem; padding: 0; }
.scores .name { display: flex; align-items: center; gap: .5rem; font-weight: 600; }
.scores .name span { margin-left: auto; font-variant-numeric: tabular-nums; }
.scores i { width: .9rem; height: .9rem; border-radius: 3px; }
.scores .track { position: relative; height: .6rem; margin: .3rem 0; border-radius: 3px;
  background: var(--border-color-primary); }
.scores .bar { position: absolute; top: 0; bottom: 0; border-radius: 3px;
  background: var(--color-accent); }
.scores .off .bar { background: var(--neutral-400); }
.scores .line { position: absolute; top: -4px; bottom: -4px; width: 2px;
  background: var(--body-text-color); }
.scores details { margin-top: 1rem; }
.scores summary { cursor: pointer; margin-bottom: .6rem; }
.maps { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fill, minmax(130px, 1fr)); }
.maps figure { margin: 0; }
.maps img { border-radius: 6px; margin: 0; }
.maps figcaption { display: flex; flex-wrap: wrap; justify-content: space-between; }
footer .divider { display: none; }
"""


def reasons(answer: Segmentation, settings: SegmentationConfig) -> dict[str, str]:
    """Word -> the sentence that says how much of the image it covers, or why it is not drawn."""
    sentences = {}
    for label, word in enumerate(answer.labels[1:], 1):
        score, threshold = answer.scores[word], answer.threshold
        share = float(np.mean(answer.mask == label))
        if share:
            part = f"{share:.0%}" if share >= 0.01 else "less than 1%"
            text = f"Drawn: it covers {part} of the image."
        elif threshold is None:
            text = "Not drawn: another word or the background is more similar at every pixel."
        elif word in answer.drawn and score <= 0:
            text = "Not drawn: only words with a positive score are."
        elif word in answer.drawn:
            text = _without_pixels(answer, word, settings)
        elif score >= threshold:
            text = (
                "Not drawn: its score reaches the threshold, but only the best "
                f"{settings.candidates} classes are candidates, and it is not among them."
            )
        else:
            below = _told_apart(score, threshold)
            text = "Not drawn: its score {} is below the threshold {}.".format(*below)
        sentences[word] = text
    return sentences


def _without_pixels(answer: Segmentation, word: str, settings: SegmentationConfig) -> str:
    """Why a word above the threshold has no pixel. Contrast words claim pixels as well."""
    higher = [name for name, score in answer.scores.items() if score > answer.scores[word]]
    removed = "the refinement left no pixel"
    if higher:
        claimed = f"pixels were claimed by {_listed(higher)}, of higher score"
        removed = f"its {claimed}" + (f", or {removed}" if settings.refine != "none" else "")
    return f"Not drawn: its score reaches the threshold, but {removed}."


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _told_apart(*values: float) -> list[str]:
    """Numbers with two decimals, or as many as tell them apart."""
    for digits in range(2, 9):
        texts = [f"{value:.{digits}f}" for value in values]
        if len(set(texts)) == len(texts):
            break
    return texts


def colour(label: int) -> str:
    """The colour of a label in the mask, as #rrggbb."""
    return "#{:02x}{:02x}{:02x}".format(*palette(label + 1)[label])


def score_chart(answer: Segmentation, sentences: dict[str, str]) -> str:
    """HTML: a bar for the score of every word, with the threshold as a line, and its sentence."""
    threshold = answer.threshold
    values = [0.0, *answer.scores.values(), *([] if threshold is None else [threshold])]
    low, high = min(values), max(values)
    spread = high - low or 1.0

    def place(value: float) -> float:
        return 100 * (value - low) / spread

    def row(word: str, score: float) -> str:
        label = answer.labels.index(word) if word in sentences else 0
        begin, end = sorted((place(0), place(score)))
        bar = f'<div class="bar" style="left:{begin:.2f}%;width:{end - begin:.2f}%"></div>'
        if threshold is not None:
            bar += f'<div class="line" style="left:calc({place(threshold):.2f}% - 1px)"></div>'
        square = f'<i style="background:{colour(label)}"></i>' if label else ""
        off = "" if sentences.get(word, "").startswith("Drawn") else ' class="off"'
        return (
            f'<li{off}><div class="name">{square}{html.escape(word)}<span>{score:.2f}</span></div>'
            f'<div class="track" aria-hidden="true">{bar}</div>'
            f"<small>{html.escape(sentences.get(word, ''))}</small></li>"
        )

    ranked = sorted(answer.scores.items(), key=lambda item: -item[1])
    own = "".join(row(*item) for item in ranked if item[0] in sentences)
    contrast = [row(*item) for item in ranked if item[0] not in sentences]
    text = "Cosine of image and word."
    if threshold is not None:
        text = f"Cosine of image and word; the line is the threshold, {threshold:.2f}."
    more = f"<details><summary>Contrast words ({len(contrast)})</summary><ul>{{}}</ul></details>"
    return (
        f'<div class="scores"><p><small>{text}</small></p><ul>{own}</ul>'
        f"{more.format(''.join(contrast)) if contrast else ''}</div>"
    )


def layers(answer: Segmentation) -> tuple[Image.Image, list[tuple[np.ndarray, str]]]:
    """(image, (opacity float [h, w], word) of every word in the mask), at the page's size."""
    image = _page_sized(answer.image, SMALL, SHOWN)
    mask = Image.fromarray(answer.mask).resize(image.size, Image.Resampling.NEAREST)
    labels = np.asarray(mask)
    return image, [(0.6 * (labels == i), answer.labels[i]) for i in labels_in(labels) if i]


def heat_maps(answer: Segmentation) -> str:
    """HTML: the similarity of every patch, over the image in grey, of every word."""
    grey = _page_sized(answer.image.convert("L").convert("RGB"), 1, MAP)
    figures = []
    for word in answer.labels[1:]:
        values, name = answer.similarity[word], html.escape(word)
        heat = Image.fromarray(heat_map(values)).resize(grey.size, Image.Resampling.NEAREST)
        content = io.BytesIO()
        Image.blend(grey, heat, 0.7).save(content, "PNG")
        figures.append(
            f'<figure><img alt="Similarity of every patch to {name}" src="data:image/png;base64,'
            f'{base64.b64encode(content.getvalue()).decode()}"><figcaption>{name}'
            f"<small>{values.min():.2f} to {values.max():.2f}</small></figcaption></figure>"
        )
    return (
        "<h3>Similarity of every patch</h3><p><small>From dark blue, the lowest cosine with the "
        f'word, to yellow, the highest.</small></p><div class="maps">{"".join(figures)}</div>'
    )


def _page_sized(image: Image.Image, least: int, most: int) -> Image.Image:
    """Small images enlarged by a whole factor, large ones reduced."""
    side = max(image.size)
    if side <= most:
        factor = max(least // side, 1)
        size = (image.width * factor, image.height * factor)
        return image.resize(size, Image.Resampling.NEAREST)
    size = (max(image.width * most // side, 1), max(image.height * most // side, 1))
    return image.resize(size, Image.Resampling.BILINEAR)
