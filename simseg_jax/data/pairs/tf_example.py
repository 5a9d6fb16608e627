"""tf.train.Example without TensorFlow: the message type is described here, protobuf does the rest.

Wire format: tensorflow/core/example/{example,feature}.proto.
"""

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

FIELD = descriptor_pb2.FieldDescriptorProto
LISTS = {
    "bytes_list": FIELD.TYPE_BYTES,
    "float_list": FIELD.TYPE_FLOAT,
    "int64_list": FIELD.TYPE_INT64,
}


def _example_class():
    file = descriptor_pb2.FileDescriptorProto(
        name="simseg_jax/example.proto", package="simseg_jax", syntax="proto3"
    )

    def message(scope, name: str):
        return (scope.nested_type if scope is not file else scope.message_type).add(name=name)

    def field(owner, name: str, number: int, kind, type_name: str = "", repeated: bool = False):
        label = FIELD.LABEL_REPEATED if repeated else FIELD.LABEL_OPTIONAL
        return owner.field.add(
            name=name,
            number=number,
            type=kind,
            label=label,
            type_name=f".simseg_jax.{type_name}" if type_name else None,
        )

    feature = message(file, "Feature")
    feature.oneof_decl.add(name="kind")
    for number, (name, kind) in enumerate(LISTS.items(), start=1):
        field(message(file, name), "value", 1, kind, repeated=True)
        field(feature, name, number, FIELD.TYPE_MESSAGE, name).oneof_index = 0
    features = message(file, "Features")
    entry = message(features, "FeatureEntry")
    entry.options.map_entry = True
    field(entry, "key", 1, FIELD.TYPE_STRING)
    field(entry, "value", 2, FIELD.TYPE_MESSAGE, "Feature")
    field(features, "feature", 1, FIELD.TYPE_MESSAGE, "Features.FeatureEntry", repeated=True)
    field(message(file, "Example"), "features", 1, FIELD.TYPE_MESSAGE, "Features")
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
