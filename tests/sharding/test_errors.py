"""Lists in messages."""

from sharding.errors import list_text


def test_lists_are_short():
    assert list_text([]) == ""
    assert list_text(["a", "b", "c", "d"]) == "a, b, c, d"
    assert list_text(["a"] * 1005, "; ") == "a; a; a; a; and 1,001 more"
    assert list_text(["x" * 1000, "b"]).endswith("…" + "x" * 80 + ", b")
    assert list_text(["y" * 160] * 4).count("y") == 320
    assert list_text(["a\nb", "\ud800"]) == r"a\nb, \ud800"
    assert all(160 < len(list_text([c * 10**6] * 10**4)) < 500 for c in "x\0\U000f0000")
