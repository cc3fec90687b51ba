"""Reading collectives from HLO, in the notations of several versions of XLA."""

import pytest

from llama_jax.plan.compiled.collectives import Collective, by_kind, find_collectives

PROGRAM = """
ENTRY %main (x: bf16[8,16]) -> bf16[8,16] {{
  %x = bf16[8,16]{{1,0}} parameter(0)
  {start}
  ROOT %done = bf16[8,16]{{1,0}} copy(%x)
}}
"""
REDUCE = "%r = bf16[8,16]{1,0} all-reduce-start(%x), channel_id=1, replica_groups=%s, to_apply=%add"


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("{{0,1},{2,3},{4,5},{6,7}}", 2),
        ("{{0,1,2,3,4,5,6,7}}", 8),
        ("[4,2]<=[8]", 2),
        ("[2,4]<=[4,2]T(1,0)", 4),
        ("mesh['stage'=4,'model'=2] {'model'}", 2),
        ("mesh['stage'=4,'model'=2] {'stage'}", 4),
        ("mesh['stage'=4,'model'=2] {'stage','model'}", 8),
    ],
)
def test_the_groups_of_a_collective(groups, size):
    text = PROGRAM.format(start=REDUCE.replace("%s", groups))
    assert find_collectives(text) == [Collective("all-reduce", size, 1, 8 * 16 * 2)]


@pytest.mark.parametrize(
    ("shape", "payload"),
    [
        ("(bf16[8,16]{1,0}, bf16[4,16]{1,0})", 384),  # two arrays, combined
        ("((bf16[8,16]{1,0}), bf16[8,16]{1,0})", 256),  # from jax 0.11 on: operands and results
        ("((bf16[8,16]{1,0}, f32[2]{0}), (bf16[8,16]{1,0}, f32[2]{0}))", 264),
    ],
)
def test_the_payload_of_an_all_reduce(shape, payload):
    start = f"%r = {shape} all-reduce-start(%x), channel_id=1, replica_groups={{{{0,1}}}}"
    found = find_collectives(PROGRAM.format(start=start))
    assert found == [Collective("all-reduce", 2, 1, payload)]


def test_a_hop_around_the_ring_is_a_group_of_its_stages():
    start = (
        "%p = (bf16[8,16]{1,0}, bf16[8,16]{1,0}) collective-permute-start(%x), "
        "source_target_pairs={{0,2},{2,4},{4,6},{6,0},{1,3},{3,5},{5,7},{7,1}}"
    )
    found = find_collectives(PROGRAM.format(start=start))
    assert found == [Collective("collective-permute", 4, 1, 256)]


def test_a_gather_counts_its_result():
    start = (
        "%g = (s32[1,2,64]{2,1,0}, s32[8,2,64]{2,1,0}) all-gather-start(%x), "
        "replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}"
    )
    assert find_collectives(PROGRAM.format(start=start)) == [Collective("all-gather", 8, 1, 4096)]


def test_several_of_a_kind_are_added():
    two = REDUCE.replace("%s", "{{0,1}}") + "\n  " + REDUCE.replace("%s", "{{0,1,2,3}}")
    found = find_collectives(PROGRAM.format(start=two.replace("%r", "%q", 1)))
    assert by_kind(found) == {"all-reduce": 2} and len(found) == 2
