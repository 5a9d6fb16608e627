"""Text-supervised semantic segmentation in JAX: train on captions, segment with words."""

import signal
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from simseg_jax.reports.segmentation import Segmentation
    from simseg_jax.segmenter import Segmenter

__all__ = ["Segmentation", "Segmenter", "__version__"]
__version__ = "0.1.0"

# sys.argv is ["-m"] while `python -m` looks for the module. Until the command's main function
# installs its own handler, Ctrl-C must end the process without a traceback from some import.
if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def __getattr__(name: str) -> Any:
    # Imported when they are needed: JAX takes seconds.
    if name == "Segmenter":
        from simseg_jax.segmenter import Segmenter

        return Segmenter
    if name == "Segmentation":
        from simseg_jax.reports.segmentation import Segmentation

        return Segmentation
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
