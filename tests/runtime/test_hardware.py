"""Data sheets by device, and names of devices to compile for."""

from types import SimpleNamespace

import pytest

from simseg_jax.runtime.errors import UserError
from simseg_jax.runtime.hardware import Target, chip_of


def test_a_data_sheet_is_found_by_the_name_of_the_device():
    kinds = ("NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe", "NVIDIA A100-SXM4-80GB", "TPU v5 lite")
    chips = [chip_of(SimpleNamespace(device_kind=kind)) for kind in (*kinds, "TPU v5p", "cpu")]
    assert [chip and chip.flops for chip in chips] == [989e12, 756e12, 312e12, 197e12, 459e12, None]


@pytest.mark.parametrize(
    ("text", "kind", "shape"),
    [
        ("v5e:4x8", "v5e", (4, 8)),
        ("v5p:4x4x4", "v5p", (4, 4, 4)),
        ("h100:8", "h100", (1, 8)),
        ("h100:4x8", "h100", (4, 8)),
        ("cpu:8", "cpu", (8,)),
    ],
)
def test_names_of_devices(text, kind, shape):
    target = Target.parse(text)
    assert (target.kind, target.shape) == (kind, shape)


@pytest.mark.parametrize("text", ["v9:2x2", "v5e", "v5e:", "v5e:0x2", "v5e:2x-2", "h100:a", "8"])
def test_other_names_are_refused(text):
    with pytest.raises(UserError, match="must be KIND:SHAPE with a KIND of v4, v5e"):
        Target.parse(text)


def test_shapes_and_slices_must_fit_the_kind():
    with pytest.raises(UserError, match="must have 3 axes, such as v5p:4x4x4"):
        Target.parse("v5p:4x4")
    with pytest.raises(UserError, match="--slices=2 is for TPUs: write --devices=h100:MACHINES"):
        Target.parse("h100:8", 2)


def test_an_environment_leaves_the_devices_of_this_machine_alone():
    environment = Target.parse("cpu:8").environment()
    assert environment["XLA_FLAGS"] == "--xla_force_host_platform_device_count=8"
    assert environment["CUDA_VISIBLE_DEVICES"] == "-1"
    assert environment["JAX_PLATFORMS"] == "cpu"
