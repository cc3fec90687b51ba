"""The garbage collector leaves what a server has loaded alone, and collects what requests leave."""

import gc
import weakref

from llama_jax.serve.frozen_heap import frozen_heap


class Cycle:
    def __init__(self) -> None:
        self.itself = self


def test_only_what_is_new_is_collected():
    before = weakref.ref(Cycle())
    assert before() is not None
    loaded = [Cycle()]
    with frozen_heap():
        assert before() is None, "garbage is not kept"
        assert not any(found is loaded for found in gc.get_objects())
        new = weakref.ref(Cycle())
        gc.collect()
        assert new() is None
    assert any(found is loaded for found in gc.get_objects()) and gc.get_freeze_count() == 0
