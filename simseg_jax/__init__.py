"""Text-supervised semantic segmentation in JAX: train on captions, segment with words."""

import signal
import sys

__version__ = "0.1.0"

# So sys.argv reads while `python -m` looks for a command. Until its main function runs, which takes
# Ctrl-C into its own hands, Ctrl-C shall end the process and not some import with a traceback.
if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
