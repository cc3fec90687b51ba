"""What is asked of the reference deployment: Llama-3-70B on 8 x H100 as 4 x 2. Imports no JAX."""

from typing import Any

from llama_jax.costs.deployment import Layout
from llama_jax.costs.gpus import find_gpu
from llama_jax.plan.model import find_model, with_weights
from llama_jax.plan.plan import Question
from llama_jax.plan.report.outlook import Outlook
from llama_jax.plan.targets import Targets, Workload

MODEL = "llama3-70b"
LAYOUT = Layout(4, 2)
REQUIRED = Targets(0.5, 0.05, 0.85)
CLAIMED = Targets(0.25, 0.025, 0.85)
REQUIRED_RATE, CLAIMED_RATE = 8.0, 10.0
LENGTHS = ((128, 128), (1024, 256), (2048, 128), (1000, 1000))
TYPICAL = (1024, 256)


def question(
    lengths: tuple[int, int] = TYPICAL,
    rate: float = REQUIRED_RATE,
    targets: Targets = REQUIRED,
    variant: tuple[str, str, Layout] = ("h100-sxm", "bf16", LAYOUT),
) -> Question:
    """Llama-3-70B on 8 GPUs under a load."""
    gpu, weights, layout = variant
    config = with_weights(find_model(MODEL), weights)
    return Question(
        MODEL, config, find_gpu(gpu), layout.gpus, Workload(*lengths, rate), targets, layout=layout
    )


def outlook(*arguments: Any) -> Outlook:
    """What it does; `arguments` are those of `question`."""
    asked = question(*arguments)
    assert asked.layout is not None
    return Outlook(asked.candidate(asked.layout))
