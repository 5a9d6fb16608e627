"""`python -m simseg_jax.data.prepare`: image-caption pairs of any format -> a TFDS data set."""

import argparse
import dataclasses
import importlib.util
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from simseg_jax.data.pairs import PairsConfig, content
from simseg_jax.data.prepare.assemble import VERSION, check_same, make_data_set, read_back
from simseg_jax.data.prepare.shards import Job, open_once
from simseg_jax.data.prepare.vocabulary import train_vocabulary
from simseg_jax.runtime.command_line import accepted, add_setting, make_parser
from simseg_jax.runtime.errors import UserError, report_user_errors
from simseg_jax.runtime.files import appearing
from simseg_jax.runtime.processes import keeping
from simseg_jax.runtime.ranges import SHARE, whole
from simseg_jax.runtime.settings import field_of, typed

SHARD_LENGTH = 10_000  # Most images of a shard, by default.
NUMBERS = (  # Option, largest value, meaning; all default to 0.
    ("--shards", 100_000, "number of files; 0: 10,000 images each, fewer in small data sets"),
    (
        "--train_vocab",
        2**24,
        "train DIR/vocab.txt from the captions, an uncased WordPiece vocabulary of at most so many "
        "tokens; 0: no vocabulary",
    ),
    ("--processes", 1024, "processes to run; 0: one per core"),
)
JOB_OPTIONS = ("split_name", "short_side", "quality", "max_pixels", "duplicates", "seed")
EPILOG = """examples:
  images in a folder, captions in a table with the header image,caption
    python -m simseg_jax.data.prepare DATA/captions.csv --images=Images --output=OUT/mine
  shards of img2dataset, here or on a hub, without duplicates; with a vocabulary for the captions
    python -m simseg_jax.data.prepare "cc3m/{00000..00331}.tar" --output=OUT/cc3m \\
        --duplicates=drop --train_vocab=30522
  the generated scenes, to try it without data
    python -m simseg_jax.data.prepare --format=shapes --size=500 --output=OUT/shapes
  on Apache Beam; OUT must be a folder that all workers can access
    python -m simseg_jax.data.prepare DATA/pairs --output=OUT/pairs \\
        --beam="--runner=FlinkRunner --flink_master=HOST:8081 --parallelism=64"

Training reads OUT/mine (--config.data.train.NAME.path=OUT/mine), and any program reads
OUT/mine/1.0.0 through tfds.builder_from_directory. OUT/mine/card.json and card.png show what the
data set contains and what was left out. Every image is decoded to its end; damaged ones are
counted, named and left out.

After an interruption the same command continues: finished shards in OUT/mine/1.0.0.incomplete are
kept. It refuses to continue if the size or time of a source file has changed. The result depends
neither on the number of processes nor on Beam. The command needs the extra prepare
(pip install -e ".[prepare]"), --beam also the extra beam.
"""


@report_user_errors
def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the command line and writes the missing parts of the data set."""
    args = _parser().parse_args(arguments)
    _check(args)
    output = Path(args.output).expanduser()
    settings = {key: getattr(args, key) for key in _source_keys()} | {"path": args.path}
    described = typed(PairsConfig, settings)
    open_once.cache_clear()
    source = open_once(**settings)
    job = _job(args, settings, content(described, source), len(source))
    final = output / VERSION
    if final.exists():
        check_same(final, job)
        print(f"{final} is already done.")
    else:
        processes = args.processes or os.cpu_count() or 1
        with keeping(lambda: f"Finished shards in {output} are kept for the same command."):
            make_data_set(job, source.problems, output, processes, args.beam, args.max_bad)
    if args.train_vocab:
        path, written = output / "vocab.txt", read_back(final, job)
        captions = (text for i in range(len(written)) for text in written[i]["captions"])
        tokens = train_vocabulary(captions, args.train_vocab)
        with appearing(path) as partial:
            partial.write_text("\n".join(tokens) + "\n", encoding="utf-8")
        print(f"Vocabulary of {len(tokens):,} tokens: {path}, for --config.data.vocab.")


def _source_keys() -> list[str]:
    return [field.name for field in dataclasses.fields(PairsConfig) if field.name != "path"]


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(
        "data.prepare",
        "Turns image-caption pairs of any format into a TFDS data set of ArrayRecord shards.",
        EPILOG,
    )
    meaning = field_of(PairsConfig, "path").metadata["meaning"]
    parser.add_argument("path", nargs="?", default="", help=meaning)
    parser.add_argument("--output", required=True, help="folder to write, called DIR below")
    for key in _source_keys():
        add_setting(parser, PairsConfig, key, default=getattr(PairsConfig, key))
    for key in JOB_OPTIONS:
        text = f"{field_of(Job, key).metadata['meaning']} (%(default)s)"
        add_setting(parser, Job, key, text, getattr(Job, key))
    parser.add_argument(
        "--shuffle",
        action=argparse.BooleanOptionalAction,
        default=Job.shuffle,
        help=field_of(Job, "shuffle").metadata["meaning"],
    )
    parser.add_argument("--name", default="", help="name of the data set; default: the name of DIR")
    parser.add_argument(
        "--max_bad",
        type=accepted(SHARE, float),
        default=0.1,
        help="stop when more than this share of the pairs cannot be used (%(default)s)",
    )
    for option, largest, text in NUMBERS:
        parser.add_argument(option, type=accepted(whole(0, largest)), default=0, help=text)
    parser.add_argument(
        "--beam",
        default="",
        metavar="OPTIONS",
        help='run on Apache Beam with these pipeline options, for example "--runner=DirectRunner"',
    )
    return parser


def _check(args) -> None:
    if "://" in args.output:
        raise UserError(f"--output={args.output} must be a folder here: copy it there afterwards.")
    extras = {"tensorflow_datasets": "prepare", "importlib_resources": "prepare"}
    if args.beam:
        extras["apache_beam"] = "beam"
    for module, extra in extras.items():
        if importlib.util.find_spec(module) is None:
            raise UserError(f'{module} is missing: pip install -e ".[{extra}]".')


def _job(args, settings: dict[str, Any], files: str, examples: int) -> Job:
    # TFDS allows word characters only.
    name = args.name or re.sub(r"\W+", "_", Path(args.output).expanduser().resolve().name)
    for option, value in (("name", name), ("split_name", args.split_name)):
        if not re.fullmatch(r"[a-zA-Z]\w*", value, re.ASCII):
            raise UserError(
                f"--{option}={value!r} must be letters, digits and _, beginning with a letter."
            )
    shards = args.shards or max(-(-examples // SHARD_LENGTH), min(16, -(-examples // 1000)))
    if shards > examples:
        raise UserError(f"--shards={shards} are more than the {examples} images of {args.path}.")
    options = {key: getattr(args, key) for key in (*JOB_OPTIONS, "shuffle")}
    return Job(settings, files, examples, name, shards, **options)


if __name__ == "__main__":
    main()
