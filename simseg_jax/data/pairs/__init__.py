"""Training pairs at random positions, from every common format of image-caption data.

    source = open_source(settings, cache)   # settings: path, format, split, images, image_key, ...
    len(source)                             # examples: images with all their captions
    source[i]                               # {"image", "captions", "name"}, IndexError past the end
    source.problems                         # what was left out while indexing: `Problems`

- `image` is encoded bytes (JPEG, PNG, ...) or uint8 [H, W, 3]; `captions` a tuple of at least one
  stripped, non-empty str; `name` says where the pair comes from, for messages.
- `source[i]` raises `BadExample` when this one example cannot be used: its file has vanished, its
  record is damaged, its caption turns out to be empty, the network fails for good. Others work.
- Constructing a source raises `UserError` on mistakes in the settings, when no pair is usable and
  when the network fails for good. Every row, member and file is used, or left out and counted with
  its reason, or belongs to no pair by its name: other suffixes, other columns, hidden files
  (._x.jpg, .DS_Store, .ipynb_checkpoints, __MACOSX). A bad one costs only itself. The notes of
  `problems` count hidden members of tar files and say which of several possible columns, features,
  fields or texts was taken.
- No caption is mended: bytes that are not UTF-8 or NUL are a reason, not dropped. nan, None, NULL,
  N/A and <NA> as a whole caption stand for a missing one.
- Sources may be read from several threads, pickle in little space (files are opened anew in every
  process) and keep no Python object per pair: indexes are arrays, mapped from the cache folder.
- The order of a source is that of its files: shards sorted by name, examples as they come.
- Whether the image decodes is not checked here.
"""

from simseg_jax.data.pairs.example import BadExample, Problems
from simseg_jax.data.pairs.opening import DataSetConfig, PairsConfig, content, open_source

__all__ = ["BadExample", "DataSetConfig", "PairsConfig", "Problems", "content", "open_source"]
