"""`--compile` on the command line, as far as it goes without a compiler for GPUs."""

import argparse
from dataclasses import replace

import pytest

from llama_jax.costs.deployment import Layout
from llama_jax.plan.__main__ import main
from llama_jax.plan.command_line import make_parser, read_question
from llama_jax.plan.compiled import command, described_mesh
from llama_jax.plan.compiled.described_mesh import CompilerMissing, prepare_jax
from llama_jax.plan.plan import make_plan
from llama_jax.plan.serving import serving

WRONG = 2


def parse(*arguments: str) -> list[Layout]:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(["--compile", *arguments]).compile


def test_layouts_are_parsed():
    assert parse() == []
    assert parse("4x2", "8X1") == [Layout(4, 2), Layout(8, 1)]


@pytest.mark.parametrize("text", ["4", "0x8", "4x", "x2", "-1x2", "4x2x1"])
def test_what_is_no_layout_is_refused(text):
    with pytest.raises(SystemExit):
        parse(text)


@pytest.mark.parametrize("rate", ["0.5", "14"])
def test_the_programs_are_those_of_the_server_that_is_printed(rate):
    question = read_question(make_parser().parse_args(["--layout", "1x8", "--rate", rate]))
    options = command.server_options(question, Layout(1, 8))
    flags = dict(flag.split("=") for flag in serving(make_plan(question)).arguments)
    assert options.max_num_seqs == int(flags["--max-num-seqs"])
    assert options.max_chunk == int(flags["--max-chunk"])


def test_the_programs_of_a_replica_are_those_of_its_share_of_the_rate():
    question = read_question(make_parser().parse_args(["--gpus", "16", "--rate", "24"]))
    only = replace(question, layout=Layout(4, 2, 2))
    flags = dict(flag.split("=") for flag in serving(make_plan(only)).arguments)
    for layout in (Layout(4, 2), Layout(4, 2, 2)):
        options = command.server_options(question, layout)
        assert options.max_num_seqs == int(flags["--max-num-seqs"])
        assert options.max_chunk == int(flags["--max-chunk"])


def test_a_missing_compiler_is_an_error_of_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(described_mesh, "find_spec", lambda name: None)
    with pytest.raises(CompilerMissing):
        prepare_jax()
    assert main(["--layout", "4x2", "--compile"]) == WRONG
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments", [["--compile", "1x3"], ["--compile", "16x8"], ["--gpu", "tpu-v5e", "--compile"]]
)
def test_what_cannot_be_compiled_is_refused_first(arguments, monkeypatch, capsys):
    """Before JAX is asked for anything."""
    monkeypatch.setattr(described_mesh, "find_spec", lambda name: pytest.fail("too late"))
    assert main(arguments) == WRONG
    assert capsys.readouterr().err
