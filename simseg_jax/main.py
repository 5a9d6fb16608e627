"""The training command: `python -m simseg_jax.main --config=... --workdir=...`."""

import os
import time

import jax

from simseg_jax.config import RunConfig, load_config
from simseg_jax.evaluators.build import headlines
from simseg_jax.runtime.command_line import accepted, add_config_option, cache_programs, make_parser
from simseg_jax.runtime.errors import report_user_errors
from simseg_jax.runtime.files import CACHE
from simseg_jax.runtime.processes import add_distributed_option, exit_stopped, join_processes
from simseg_jax.runtime.ranges import whole
from simseg_jax.runtime.settings import describe
from simseg_jax.train import train

EPILOG = """examples:
  python -m simseg_jax.main --config=shapes --workdir=runs/shapes
  python -m simseg_jax.main --config=shapes --workdir=runs/mean --config.model.pool=mean
  python -m simseg_jax.main --config=flickr8k --workdir=runs/f8k \\
      --config.data.train.flickr8k.path=flickr8k/captions.csv

The same command continues an interrupted run from its newest checkpoint. Exit status: 0 done, 2 an
error that you can correct, 75 stopped by a signal with everything saved. Configuration keys with
their defaults, of which a configuration changes some:
"""


@report_user_errors
def main() -> None:
    """Parses the command line, trains and prints where the results are."""
    parser = make_parser(
        "main",
        "Trains a segmenter from image-caption pairs and evaluates it.",
        EPILOG + describe(RunConfig),
    )
    add_config_option(parser)
    parser.add_argument("--workdir", required=True, help="folder for everything the run writes")
    parser.add_argument(
        "--profile",
        metavar="STEPS",
        type=accepted(whole(0)),
        nargs="?",
        const=3,
        default=0,
        help="trace this many steps (3 if not given) into WORKDIR/profile, for ui.perfetto.dev or "
        "XProf",
    )
    add_distributed_option(parser)
    args, overrides = parser.parse_known_args()
    if args.distributed:
        join_processes()
    config = load_config(args.config, overrides)
    if config.data.cache:
        # Compiled programs and copies of remote weights go to the same folder as data indexes.
        os.environ[CACHE] = config.data.cache
    cache_programs()
    began = time.monotonic()
    results = train(config, args.workdir, args.profile)
    if results is None:
        exit_stopped()
    if jax.process_index() == 0:
        scores = headlines(results)
        seconds = time.monotonic() - began
        print(
            f"Done in {seconds:.0f} s. {', '.join(scores) or 'No evaluation'}. "
            f"Everything is in {args.workdir}"
        )


if __name__ == "__main__":
    main()
