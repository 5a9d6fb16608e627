"""Collectives read from the text of compiled programs, as XLA writes it for each platform."""

import jax
import pytest
from jax.sharding import AxisType

from simseg_jax.training.collectives import Collective, collectives, communication_bytes

HLO = """HloModule step

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%body (p: (s32[], f32[64])) -> (s32[], f32[64]) {
  %p = (s32[], f32[64]{0}) parameter(0)
  %part = f32[64]{0} get-tuple-element(%p), index=1
  %r = f32[64]{0} all-reduce(%part), replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %out = (s32[], f32[64]{0}) tuple(%i, %r)
}

ENTRY %main (x: bf16[8,16]) -> f32[64] {
  %x = bf16[8,16]{1,0} parameter(0)
  %g = bf16[32,16]{1,0} all-gather(%x), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  %s = (f32[16]{0}, f32[128]{0}) all-gather-start(%y), replica_groups=mesh['a'=2,'b'=8] {'b'}
  %d = f32[128]{0} all-gather-done(%s)
  %c = f32[8] reduce-scatter(%z), replica_groups=mesh['a'=2,'b'=8], device_ids=([4]) {'a','b':(2)4}
  %p = u8[100]{0} collective-permute(%w), source_target_pairs={{0,1},{1,0}}
  %w = (s32[], f32[64]{0}) while(%init), body=%body, backend_config={"known_trip_count":{"n":"3"}}
}
"""


def test_communication_of_a_program_text():
    assert communication_bytes(HLO) == {
        "all-reduce": 3 * 2 * 3 / 4 * 64 * 4,
        "all-gather": 32 * 16 * 2 * 3 / 4 + 128 * 4 * 7 / 8,
        "reduce-scatter": 7 * 8 * 4,
        "collective-permute": 100,
    }


# As XLA for TPUs writes them: one gather in three pieces, a loop without a noted length that counts
# by two, a sum of which every device takes its part, and what goes to the like devices of two
# slices.
TPU = """HloModule step

%begin (x: f32[8,16]) -> f32[32,16] {
  %all-gather.3 = f32[32,16]{1,0:T(8,128)} all-gather(%x), channel_id=1, replica_groups={{0,1,2,3}}
  ROOT %c = (f32[32,16]{1,0}, u32[]) custom-call(%g), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.7 (x: f32[8,16]) -> f32[32,16] {
  %all-gather.5 = f32[32,16]{1,0:T(8,128)} all-gather(%x), channel_id=1, replica_groups={{0,1,2,3}}
}

%end (x: f32[8,16]) -> f32[32,16] {
  %all-gather.9 = f32[32,16]{1,0:T(8,128)} all-gather(%x), channel_id=1, replica_groups={{0,1,2,3}}
  ROOT %c = f32[32,16]{1,0} custom-call(%x, %g), custom_call_target="AsyncCollectiveDone"
}

%all-reduce-scatter (x: f32[64]) -> f32[16] {
  %r = f32[64]{0} all-reduce(%x), channel_id=9, replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %s = f32[16]{0} dynamic-slice(%r, %i), dynamic_slice_sizes={16}
}

%condition (p: (s32[], f32[64])) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(12)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %constant.1), direction=LT
}

%body (p: (s32[], f32[64])) -> (s32[], f32[64]) {
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %constant.2 = s32[]{:T(128)} constant(2)
  %next = s32[]{:T(128)} add(%i, %constant.2), metadata={op_name="add"}
  %r = (bf16[64]{0:T(512)}, bf16[2,64]{1,0}) all-reduce(%y, %z), replica_groups={{0,1}}
  ROOT %out = (s32[], f32[64]{0}) tuple(%next, /*index=1*/%q)
}

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%x, %y)
}

ENTRY %main (x: f32[8,16]) -> f32[64] {
  %a = (f32[32,16]{1,0}, u32[]) fusion(%x), kind=kCustom, calls=%begin
  %b = (f32[32,16]{1,0}, u32[]) fusion(%a), kind=kCustom, calls=%async_collective_fusion.7
  %c = f32[32,16]{1,0} fusion(%b), kind=kCustom, calls=%end
  %s = f32[16]{0} fusion(%d), kind=kCustom, calls=%all-reduce-scatter
  %w = (s32[], f32[64]{0}) while(%init), condition=%condition, body=%body
  %send = (f32[1,100]{1,0}, u32[], token[]) send(%e, %t), channel_id=5, is_host_transfer=true, \
frontend_attributes={_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
}
""".replace("\\\n", "")


def test_communication_of_a_program_for_tpus():
    assert communication_bytes(TPU) == {
        "all-gather": 32 * 16 * 4 * 3 / 4,
        "reduce-scatter": 64 * 4 * 3 / 4,
        "all-reduce": 6 * 2 * 1 / 2 * 3 * 64 * 2,
        "network all-reduce": 2 * 1 / 2 * 400,
    }


def test_communication_that_is_not_understood_is_unknown():
    with pytest.raises(ValueError, match="a loop of unknown length"):
        communication_bytes(TPU.replace("direction=LT", "direction=GT"))
    with pytest.raises(ValueError, match="a piece of an all-gather without its beginning"):
        communication_bytes(
            TPU.replace('"AsyncCollectiveStart"', '"Other"').replace(
                "%begin", "%async_collective_fusion.1"
            )
        )
    branch = "  %k = f32[8] conditional(%p, %x), branch_computations={%begin, %add}\n}\n"
    with pytest.raises(ValueError, match="a conditional that communicates"):
        communication_bytes(TPU.rstrip().removesuffix("}") + branch)
    with pytest.raises(ValueError, match="a transfer of unknown kind"):
        communication_bytes(TPU.replace("ALL_REDUCE", "ALL_TO_ALL"))


# As XLA for GPUs writes them: operands and results in the type, groups of a transposed mesh.
GPU = """HloModule step

ENTRY %main (x: bf16[8,16]) -> f32[64] {
  %r = ((bf16[16,25]{1,0}), bf16[8,25]{1,0}) reduce-scatter-start(%x), channel_id=2, \
replica_groups=mesh['axis_0'=4,'axis_1'=1,'axis_2'=2] {'axis_2'}, dimensions={0}, to_apply=%add
  %g = ((f32[4]{0}, f32[2]{0}), (f32[16]{0}, f32[8]{0})) all-gather-start(%y, %z), channel_id=3, \
replica_groups=mesh['axis_0'=2,'axis_1'=4], device_ids=([4,2]T(1,0)) {'axis_1'}, dimensions={0}
  %t = ((f32[4,50]{1,0}), f32[4,50]{1,0}) all-to-all-start(%v), channel_id=5, \
replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  %p = (f32[9]{0}, f32[3]{0}, f32[9]{0}, f32[3]{0}, u32[], u32[]) collective-permute-start(%t, \
%w), channel_id=6, source_target_pairs={{0,1},{1,0}}
  %a = f32[3072]{0} all-reduce-start(%w), channel_id=4, replica_groups=[1,8]<=[8], to_apply=%add
}

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%x, %y)
}
""".replace("\\\n", "")


def test_communication_of_a_program_for_gpus():
    assert communication_bytes(GPU) == {
        "reduce-scatter": 16 * 25 * 2 / 2,
        "all-gather": (16 + 8) * 4 * 3 / 4,
        "all-to-all": 200 * 4 * 3 / 4,
        "collective-permute": 12 * 4,
        "all-reduce": 2 * 3072 * 4 * 7 / 8,
    }
    groups = [collective.group for collective in collectives(GPU)]
    assert groups == [(0, 1), (0, 2, 4, 6), (0, 1, 2, 3), (0, 1), tuple(range(8))]


def test_the_axes_of_a_collective_are_those_along_which_its_group_varies():
    auto = (AxisType.Auto, AxisType.Auto)
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=auto)

    def axes(members: int, group: tuple[int, ...] | None, network: bool = False) -> str:
        return Collective("all-reduce", 8, members, group, 1, network).axes(mesh)

    assert axes(4, (4, 5, 6, 7)) == "fsdp"
    assert axes(2, (1, 5)) == "data"
    assert axes(4, (0, 1, 4, 5)) == "data and fsdp"
    assert axes(8, None) == "data and fsdp"
    assert axes(4, None) == "unknown"
    assert axes(2, None, network=True) == "network"
    permute = collectives(HLO)[-2]
    assert (permute.kind, permute.group) == ("collective-permute", (0, 1))
