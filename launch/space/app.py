"""The demo as a Space of Hugging Face: put this file and requirements.txt into it.

Set the Space's variable CHECKPOINT to what --checkpoint takes, such as OWNER/NAME on the hub.
"""

import os

from simseg_jax.demo import build, serve

if __name__ == "__main__":
    serve(build(os.environ["CHECKPOINT"].split()), host="0.0.0.0")
