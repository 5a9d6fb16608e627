"""Training pairs at random positions, from every common format of image-caption data.

    source = open_source(settings, cache)   # settings: path, format, split, images, image_key, ...
    len(source)                             # examples: images with all their captions
    source[i]                               # {"image", "captions", "name"}, IndexError past the end
    source.problems                         # what was left out while indexing: `Problems`

- `image` is encoded bytes (JPEG, PNG, ...) or uint8 [H, W, 3]. `captions` is a tuple of at least
  one stripped, non-empty str. `name` says where the pair comes from, for messages.
- `source[i]` raises `BadExample` when this one example cannot be used: its file has vanished, its
  record is damaged, its caption is empty, or the network keeps failing. Other examples still work.
- Constructing a source raises `UserError` on mistakes in the settings, when no pair is usable and
  when the network keeps failing.
- Every row, member and file is used, or left out and counted with its reason. Only files and
  columns whose names belong to no pair are not counted: other suffixes, other columns, hidden files
  (._x.jpg, .DS_Store, .ipynb_checkpoints, __MACOSX). A bad entry costs no other entry. The notes of
  `problems` count hidden members of tar files and say which of several possible columns, features,
  fields or texts was taken.
- Captions are not repaired: one with bytes that are not UTF-8 or with NUL characters is left out.
  nan, None, NULL, N/A and <NA> as a whole caption mean that it is missing.
- Several threads may read a source. It pickles in little space (every process opens the files
  itself) and keeps no Python object per pair: indexes are arrays, mapped from the cache folder.
- Examples come in the order of the files: shards sorted by name, examples as stored in them.
- Images are not decoded here, so damaged ones are found later.
"""

from simseg_jax.data.pairs.example import BadExample, Problems
from simseg_jax.data.pairs.opening import DataSetConfig, PairsConfig, content, open_source

__all__ = ["BadExample", "DataSetConfig", "PairsConfig", "Problems", "content", "open_source"]
