"""Limits on untrusted weights files; every reader checks them before it allocates memory.

A file that exceeds a limit is refused. Whatever a small file holds, reading it therefore takes at
most a few hundred megabytes and a few seconds.
"""

# Bytes of the pickle in a .pth. A tensor needs about 200; one byte may take 100 in memory.
PICKLE = 1 << 20
HEADER = 8 << 20  # Bytes of the header of a .safetensors file.
JSON = 8 << 20  # Bytes of a JSON file beside the weights or in a model folder.
TENSORS = 20_000  # Tensors in a file; a ViT and a BERT of twelve blocks have 351.
NAME = 500  # Characters of a tensor's name.
DIMENSIONS = 8  # Dimensions of a tensor.


def inflated(size: int) -> int:
    """The number of bytes that the tensors of a file of `size` bytes may take.

    This is generous: weights hardly compress, and few tensors share a storage.
    """
    return 8 * size + (64 << 20)
