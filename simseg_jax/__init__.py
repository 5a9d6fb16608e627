"""Text-supervised semantic segmentation in JAX: train on captions, segment with words."""

import signal
import sys

__version__ = "0.1.0"

# sys.argv is ["-m"] while `python -m` looks for the module. Until the command's main function
# installs its own handler, Ctrl-C must end the process without a traceback from some import.
if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
