"""The histogram of what is measured per token exports what that of the library exports."""

import math
import random

from prometheus_client import CollectorRegistry, Histogram, generate_latest

from llama_jax.serve.monitoring.token_histogram import TokenHistogram

BOUNDS = (0.01, 0.025, 1, 2.5, 80)
LABELS = {"model_name": "a model", "engine": "0"}


def test_it_equals_the_librarys():
    values = [*BOUNDS, 0.0, 100.0, *(random.Random(0).expovariate(0.5) for _ in range(500))]
    values += [math.nextafter(bound, 100) for bound in BOUNDS]
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    histogram = TokenHistogram("x:seconds", "Time.", LABELS, BOUNDS)
    ours.register(histogram)
    library = Histogram("x:seconds", "Time.", list(LABELS), buckets=BOUNDS, registry=theirs)
    for value in values:
        histogram.observe(value)
        library.labels(**LABELS).observe(value)
    created = [
        line for line in generate_latest(theirs).splitlines() if b"seconds_created" not in line
    ]
    assert generate_latest(ours).splitlines() == created
