"""What the commands have in common: the shape of their help and the options of a checkpoint."""

import argparse


def make_parser(module: str, description: str, epilog: str) -> argparse.ArgumentParser:
    """The parser of `python -m simseg_jax.MODULE`; the epilog is printed as it stands."""
    return argparse.ArgumentParser(
        prog=f"python -m simseg_jax.{module}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=epilog,
        allow_abbrev=False,
    )


def add_checkpoint_options(parser: argparse.ArgumentParser) -> None:
    """Which trained model."""
    parser.add_argument("--checkpoint", required=True, help="the --workdir of a training run")
    parser.add_argument("--step", type=int, help="which checkpoint; default: the newest")


def add_evals_options(parser: argparse.ArgumentParser) -> None:
    """Which benchmarks."""
    parser.add_argument("--config", help="take evals from this file instead of the checkpoint")
    parser.add_argument("--benchmark", help="names in evals.seg, with commas; default: all of them")
