"""tf.train.Example without TensorFlow: its message types are described here, protobuf reads them.

Wire format: tensorflow/core/example/{example,feature}.proto.
"""

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

TYPES = """
name: "simseg_jax/example.proto" package: "simseg_jax" syntax: "proto3"
message_type {
  name: "BytesList" field { name: "value" number: 1 type: TYPE_BYTES label: LABEL_REPEATED }
}
message_type {
  name: "FloatList" field { name: "value" number: 1 type: TYPE_FLOAT label: LABEL_REPEATED }
}
message_type {
  name: "Int64List" field { name: "value" number: 1 type: TYPE_INT64 label: LABEL_REPEATED }
}
message_type {
  name: "Feature" oneof_decl { name: "kind" }
  field { name: "bytes_list" number: 1 type_name: "BytesList" oneof_index: 0 }
  field { name: "float_list" number: 2 type_name: "FloatList" oneof_index: 0 }
  field { name: "int64_list" number: 3 type_name: "Int64List" oneof_index: 0 }
}
message_type {
  name: "Features"
  nested_type {
    name: "FeatureEntry" options { map_entry: true }
    field { name: "key" number: 1 type: TYPE_STRING }
    field { name: "value" number: 2 type_name: "Feature" }
  }
  field { name: "feature" number: 1 type_name: "FeatureEntry" label: LABEL_REPEATED }
}
message_type { name: "Example" field { name: "features" number: 1 type_name: "Features" } }
"""


def _example_class():
    file = text_format.Parse(TYPES, descriptor_pb2.FileDescriptorProto())
    # A pool of its own: no conflict with TensorFlow's types in the same process.
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("simseg_jax.Example"))


Example: Any = _example_class()


def parse(record: bytes) -> dict[str, list]:
    """Key -> its bytes, floats or ints; a protobuf DecodeError if `record` is no such message.

    Keys are sorted: a protobuf map has no order of its own.
    """
    features = sorted(Example.FromString(record).features.feature.items())
    kinds = [(key, feature, feature.WhichOneof("kind")) for key, feature in features]
    return {key: list(getattr(f, kind).value) if kind else [] for key, f, kind in kinds}


def serialize(values: dict) -> bytes:
    """The record of key -> value or list of values: str (as UTF-8), bytes, int or float."""
    example = Example()
    for key, value in values.items():
        items = list(value) if isinstance(value, list | tuple) else [value]
        items = [item.encode() if isinstance(item, str) else item for item in items]
        first = items[0] if items else b""
        kind = {bytes: "bytes_list", float: "float_list"}.get(type(first), "int64_list")
        getattr(example.features.feature[key], kind).value.extend(items)
    return example.SerializeToString(deterministic=True)
