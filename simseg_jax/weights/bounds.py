"""Limits on untrusted weights files; every reader checks them before it allocates.

A file that exceeds one is refused. Together they bound the cost of a small file, whatever it holds,
to a few hundred megabytes and a few seconds.
"""

PICKLE = 1 << 20  # Bytes of the pickle in a .pth: about 200 a tensor; one may take 100 in memory.
HEADER = 8 << 20  # Bytes of the header of a .safetensors file.
JSON = 8 << 20  # Bytes of a JSON file beside the weights or in a model folder.
TENSORS = 20_000  # In one file; a ViT and a BERT of twelve blocks have 351.
NAME = 500  # Characters of a tensor's name.
DIMENSIONS = 8  # Of a tensor.


def inflated(size: int) -> int:
    """The most bytes that the tensors of a file of `size` bytes may take.

    Generous: weights hardly compress, and few tensors share their storage.
    """
    return 8 * size + (64 << 20)
