"""Reading collectives from HLO, in the notations of several versions of XLA."""

import pytest

from llama_jax.config import LlamaConfig
from llama_jax.plan.compiled.collectives import (
    Collective,
    by_kind,
    expected_collectives,
    find_collectives,
)
from llama_jax.ring.sizes import Bucket, RingSizes

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


def test_what_llama_70b_needs_by_hand():
    """On 4 x 2: 20 layers a stage, whose products are padded to 72 of 67 tokens."""
    sizes = RingSizes(64, 100, 64, 16, row_buckets=(3, 64), chunk_buckets=(0, 64), tile=64)
    token, segments = 2 * 8192, 3 + 1
    found = expected_collectives(
        LlamaConfig.llama3_70b(), (4, 2), sizes, Bucket(3, 64), width=2, multiple=8
    )
    assert found == [
        Collective("all-gather", 8, 1, 8 * segments * 8),
        Collective("all-reduce", 2, 40, 40 * 72 * token),
        Collective("all-reduce", 4, 1, segments * token),
        Collective("all-reduce", 8, 1, 67 * token),
        Collective("collective-permute", 4, 1, 67 * token),
    ]
    alone = expected_collectives(LlamaConfig.llama3_70b(), (1, 1), sizes, Bucket(3, 0), 2)
    assert alone == []
