"""`python -m simseg_jax.data.inspect` draws a training batch and measures the input pipeline."""

import textwrap
import time
from pathlib import Path

import jax
import numpy as np
from PIL import Image, ImageDraw

from simseg_jax.config import load_config
from simseg_jax.data.autoaugment_jax import augment_batch, draw_keys
from simseg_jax.data.pipeline import Examples, TrainBatches
from simseg_jax.data.text import TextEncoder, load_tokenizer
from simseg_jax.reports.visualize import CELL, TEXT_HEIGHT, font
from simseg_jax.runtime.command_line import accepted, add_config_option, make_parser
from simseg_jax.runtime.errors import report_user_errors
from simseg_jax.runtime.ranges import number, whole

EPILOG = """examples:
  python -m simseg_jax.data.inspect --config=shapes --output=batch.png
  python -m simseg_jax.data.inspect --config=vits16 --batch=1000 --count=48 \\
      --config.data.train.cc3m.path=DATA/cc3m --config.data.workers=8 --output=batch.png

For the first examples of a batch, the picture shows the crop from the host, the image after
AutoAugment as in the training step of that batch, the caption, and its tokens as the model reads
them. Any configuration key can be set as in training. The speed is measured for the whole pipeline
on this machine, without a model: a faster training would have to wait for its data.
"""
COLUMNS = 4


@report_user_errors
def main() -> None:
    """Parses the command line, draws a batch and measures the pipeline."""
    parser = make_parser(
        "data.inspect", "Shows a training batch as a picture and measures the input.", EPILOG
    )
    add_config_option(parser)
    parser.add_argument("--output", default="batch.png", help="picture to write (%(default)s)")
    parser.add_argument(
        "--batch", type=accepted(whole(0)), default=0, help="number of the batch, as in training"
    )
    parser.add_argument(
        "--count", type=accepted(whole(1, 1000)), default=16, help="examples to draw (%(default)s)"
    )
    parser.add_argument(
        "--seconds",
        type=accepted(number(0, 1e6), float),
        default=5,
        help="how long to measure; 0: not (%(default)s)",
    )
    args, overrides = parser.parse_known_args()
    config = load_config(args.config, overrides)
    count = min(args.count, config.batch_size)
    tokenizer = load_tokenizer(config.data.vocab)
    examples = Examples(
        config.data,
        image_size=config.model.image.image_size,
        batch_size=config.batch_size,
        encoder=TextEncoder(tokenizer, config.data.max_length, config.data.edit_rate),
        seed=config.seed,
    )
    print("\n".join(examples.describe()))
    position = args.batch * config.batch_size
    rows = [examples[position + i] for i in range(count)]
    pictures = np.stack([row["image"] for row in rows])
    changed = pictures
    if config.data.autoaugment_on_device:
        keys = draw_keys(config.seed, args.batch, config.batch_size)[:count]
        changed = np.asarray(jax.jit(augment_batch)(pictures, keys))
    for row in rows:
        for problem in row["bad"]:
            print(f"Replaced by another example: {problem}")
    path = Path(args.output).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    tokens = [tokenizer.convert_ids_to_tokens(row["ids"][row["mask"]].tolist()) for row in rows]
    _sheet(rows, pictures, changed, tokens).save(path)
    speed = _speed(examples, config.batch_size, position, args.seconds) if args.seconds > 0 else ""
    print(f"{len(examples):,} examples an epoch{speed}. Picture: {path}")


def _speed(examples: Examples, batch_size: int, position: int, seconds: float) -> str:
    batches = TrainBatches(examples, batch_size=batch_size)
    batches.position = position
    next(batches)  # Starts threads and workers.
    began, count = time.monotonic(), 0
    while time.monotonic() - began < seconds:
        next(batches)
        count += batch_size
    return f", {count / (time.monotonic() - began):,.0f} examples/s ({batches.bad} replaced)"


def _sheet(rows, pictures, changed, tokens) -> Image.Image:
    """One cell per example: the crop and the augmented image; below them caption and tokens."""
    width = 2 * CELL + 12
    texts = [
        textwrap.wrap(row["caption"], 44)[:3] + textwrap.wrap(" ".join(pieces), 44)[:4]
        for row, pieces in zip(rows, tokens, strict=True)
    ]
    height = CELL + 8 + TEXT_HEIGHT * max(map(len, texts))
    lines = -(-len(rows) // COLUMNS)
    sheet = Image.new("RGB", (min(COLUMNS, len(rows)) * width, lines * (height + 8)), "white")
    draw = ImageDraw.Draw(sheet)
    for place, (row, before, after) in enumerate(zip(rows, pictures, changed, strict=True)):
        x, y = place % COLUMNS * width, place // COLUMNS * (height + 8)
        for offset, picture in ((0, before), (CELL + 4, after)):
            cell = Image.fromarray(picture).resize((CELL, CELL), Image.Resampling.BICUBIC)
            sheet.paste(cell, (x + offset, y))
        caption_lines = len(textwrap.wrap(row["caption"], 44)[:3])
        for line, text in enumerate(texts[place]):
            colour = "black" if line < caption_lines else "#1f5fa8"
            draw.text((x + 1, y + CELL + 3 + line * TEXT_HEIGHT), text, fill=colour, font=font(11))
    return sheet


if __name__ == "__main__":
    main()
