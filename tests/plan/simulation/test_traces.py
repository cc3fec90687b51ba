"""Traces in three formats, and what is refused."""

import gzip
import json

import pytest
from pytest import approx

from llama_jax.plan.simulation.load import Request, Run
from llama_jax.plan.simulation.traces import TraceError, read_trace

MOONCAKE = [
    {"timestamp": 100, "input_length": 1100, "output_length": 5, "hash_ids": [0, 1, 2]},
    {"timestamp": 3100, "input_length": 512, "output_length": 0, "hash_ids": [0]},
    {"timestamp": 1100.5, "input_length": 600, "output_length": 7, "hash_ids": [0]},
]
AZURE = """\
TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:16:46,16,1
"""


def write(path, text: str):
    file = path / "trace"
    file.write_text(text)
    return file


def test_the_csv_of_this_project(tmp_path):
    file = write(tmp_path, "arrival_s,prompt_tokens,output_tokens\n2.5,10,3\n\n1.5, 20 ,4\n")
    assert read_trace(file) == [Request(0.0, 20, 4), Request(1.0, 10, 3)]


def test_mooncake_blocks_become_texts(tmp_path):
    first, third, second = read_trace(write(tmp_path, "\n".join(map(json.dumps, MOONCAKE))))
    assert first == Request(0.0, 1100, 5, (Run(0, 512), Run(1, 512), Run(2, 76)))
    # The rest of a prompt that has too few blocks is like no other.
    assert third == Request(approx(1.0005), 600, 7, (Run(0, 512),))
    assert second == Request(3.0, 512, 1, (Run(0, 512),))


def test_azure_times_are_differences(tmp_path):
    requests = read_trace(write(tmp_path, AZURE))
    assert [r.at for r in requests] == [0.0, approx(4.314579), approx(59.31941)]
    assert [(r.prompt_tokens, r.output_tokens) for r in requests] == [
        (374, 44),
        (396, 109),
        (16, 1),
    ]
    newer = AZURE.replace("6805900", "680590+00:00")
    assert read_trace(write(tmp_path, newer))[1].at == approx(4.314579)


def test_zones_of_azure_times_count(tmp_path):
    zones = AZURE.replace("18:15:50.9951690", "20:15:50.9951690+02:00")
    assert read_trace(write(tmp_path, zones)) == read_trace(write(tmp_path, AZURE))


@pytest.mark.parametrize(
    "text",
    [
        "\ufeffarrival_s,prompt_tokens,output_tokens\r\n0,10,3\r\n\r\n2,20,4\r\n",
        '"arrival_s","prompt_tokens","output_tokens"\n"0","10","3"\n"2","20","4"\n',
        "Prompt_Tokens, Arrival_S, Output_Tokens\n10, 5, 3\n20, 7, 4\n",
    ],
)
def test_what_other_tools_write_as_csv(tmp_path, text):
    file = tmp_path / "trace"
    file.write_bytes(text.encode())
    assert read_trace(file) == [Request(0.0, 10, 3), Request(2.0, 20, 4)]


CSV = "arrival_s,prompt_tokens,output_tokens\n"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (CSV + "0,10,3\n1,ten,3\n", 3),
        (CSV + "0,10\n", 2),
        (CSV + "-1,10,3\n", 2),
        (CSV + "nan,10,3\n", 2),
        (CSV + "0,0,3\n", 2),
        (CSV + "0,10,-1\n", 2),
        (CSV + "0,1000001,3\n", 2),
        (CSV + "1e13,10,3\n", 2),
        (CSV + "\n\n0,10,3.5\n", 4),
        (CSV + "0,10,3\n1," + "1" * 200_000 + ",3\n", 3),  # too long for `csv`
        ("[" + "1" * 200_000 + "]", 1),  # such as JSON in one line
        ("at,prompt,output\n0,10,3\n", 1),
        (AZURE + "yesterday,1,2\n", 5),
        (AZURE + "2023-13-16 18:15:46,1,2\n", 5),
        (json.dumps(MOONCAKE[0]) + "\n{broken\n", 2),
        (json.dumps(MOONCAKE[0]) + "\n[1]\n", 2),
        (json.dumps(MOONCAKE[0] | {"hash_ids": [1, 2, 3, 4]}), 1),
        (json.dumps(MOONCAKE[1] | {"hash_ids": [1, 2]}), 1),  # 512 tokens are one block
        (json.dumps(MOONCAKE[0] | {"hash_ids": [-1]}), 1),
        (json.dumps(MOONCAKE[0] | {"hash_ids": [2**31]}), 1),
        (json.dumps(MOONCAKE[0] | {"input_length": 1100.5}), 1),
        (json.dumps(MOONCAKE[0] | {"input_length": None}), 1),
        (json.dumps(MOONCAKE[0] | {"input_length": True}), 1),
        (json.dumps(MOONCAKE[0] | {"timestamp": "soon"}), 1),
        (json.dumps(MOONCAKE[0] | {"timestamp": 10**400}), 1),
        # A trace of Alibaba's, in seconds and blocks of 16 tokens.
        (json.dumps(MOONCAKE[0] | {"chat_id": 1, "hash_ids": [1]}), 1),
        ("arrival_s,prompt_tokens,prompt_tokens\n0,10,3\n", 1),
    ],
)
def test_a_broken_line_is_refused_with_its_number(tmp_path, text, line):
    with pytest.raises(TraceError, match=rf"line {line}\b"):
        read_trace(write(tmp_path, text))


@pytest.mark.parametrize("text", ["", "\n \n", CSV, "\x00"])
def test_a_file_without_requests_is_refused(tmp_path, text):
    with pytest.raises(TraceError):
        read_trace(write(tmp_path, text))


def test_a_compressed_file_is_refused(tmp_path):
    file = tmp_path / "trace.gz"
    file.write_bytes(gzip.compress(CSV.encode() + b"0,10,3\n"))
    with pytest.raises(TraceError):
        read_trace(file)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(TraceError):
        read_trace(tmp_path / "none")
