"""Limits on the weights files of others; every reader checks them before it allocates.

A file that exceeds one is refused in one sentence. Together they keep the reading of a small file,
whatever its content, below a few hundred megabytes and a few seconds.
"""

PICKLE = 1 << 20  # Bytes of the pickle in a .pth: some 200 for each tensor, up to 100 in memory.
HEADER = 8 << 20  # Bytes of the header of a .safetensors file.
JSON = 8 << 20  # Bytes of a JSON file beside the weights or in a model folder.
TENSORS = 20_000  # In one file; a ViT and a BERT of twelve blocks have 351.
NAME = 500  # Characters of a tensor's name.
DIMENSIONS = 8  # Of a tensor.


def inflated(size: int) -> int:
    """Bytes that the tensors of a file of `size` bytes may take.

    Weights hardly compress, and tensors that share their storage are few.
    """
    return 8 * size + (64 << 20)
