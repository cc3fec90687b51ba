"""Pictures of the ring and of the KV-cache pages, compared with the recording."""

import numpy as np
import pytest
from matplotlib.colors import to_hex

from llama_jax import pictures
from llama_jax.engine.recording import PacketRecord, Recording, TickRecord
from llama_jax.pictures.ring_timeline import packet_text
from llama_jax.pictures.style import PALETTE
from llama_jax.ring.sizes import Bucket
from tests.support.picture_parts import cells, labels, ticks, title, words


def expected_label(packet: PacketRecord) -> str:
    chunk = sum(tokens for _, tokens in packet.tiles)
    return " ".join([f"{len(packet.rows)}"] * bool(packet.rows) + [f"+{chunk}"] * bool(chunk))


def test_timeline_shows_the_recording(recording):
    picture = pictures.timeline(recording, slice(7, 27))
    axes = picture.axes[0]
    shown = {(round(t.get_position()[0]), t.get_position()[1]): t.get_text() for t in axes.texts}
    boxes = {(round(b.get_x() + 0.5), round(b.get_y() + 0.43)): b for b in cells(axes)}
    assert len(boxes) == len(cells(axes)) == 20 * 4
    busy = 0
    for tick in range(7, 27):
        for stage in range(4):
            packet = recording.ticks[tick - stage].packet
            assert shown.get((tick, stage), "").replace("\n", " ") == expected_label(packet)
            color = PALETTE[(tick - stage) % 4] if packet else "none"
            face = boxes[tick, stage].get_facecolor()
            assert face[3] == 0 if color == "none" else to_hex(face) == color
            busy += bool(packet)
    mean = 1e3 * np.mean([tick.seconds for tick in recording.ticks[7:27]])
    assert f"{100 * busy / 80:.0f}% of ticks 7 to 26" in title(picture)
    assert f", {mean:.1f} ms each" in title(picture).replace("\n", " ")
    assert labels(axes) == ("tick of the recording", "stage")
    assert {f"packet {m}" for m in range(4)} | {"empty"} <= {*words(picture)}
    above = axes.child_axes[0]
    assert above.get_xlabel() == "time since the start of the recording (ms)"
    first = float(ticks(above.xaxis)[0])
    assert first == pytest.approx(1e3 * recording.ticks[7].start, abs=0.51)


def test_timeline_by_request_has_a_strip_per_request(recording):
    picture = pictures.timeline(recording, slice(7, 27), by="request")
    packets = [recording.ticks[t - s].packet for t in range(7, 27) for s in range(4)]
    strips = sum(max(len({*p.rows, *(r for r, _ in p.tiles)}), 1) for p in packets)
    assert len(cells(picture.axes[0])) == strips > 80
    named = [word for word in words(picture) if word.startswith("request ")]
    here = {r for p in packets for r in (*p.rows, *(r for r, _ in p.tiles))}
    assert len(named) == min(len(here), 12)
    assert (f"and {len(here) - 12} more" in words(picture)) == (len(here) > 12)


def test_the_cell_of_an_idle_stage_is_empty():
    packet, bucket = PacketRecord((5,), ((7, 3), (7, 2))), Bucket(1, 64)
    one = TickRecord(0, 0.001, 0.002, bucket, packet, {5: 2, 7: 1}, 97, 100, 0)
    picture = pictures.timeline(Recording(2, [one], [PacketRecord()]))
    full, empty = cells(picture.axes[0])
    assert full.get_linestyle() == "solid" and full.get_facecolor()[3] == 1
    assert empty.get_linestyle() != "solid" and empty.get_facecolor()[3] == 0
    assert "1 +5" in words(picture) and packet_text(packet) == "1\n+5"
    assert "50% of 1 tick, 2.0 ms" in title(picture)


def test_timeline_of_an_imagined_recording_has_no_times():
    picture = pictures.timeline(Recording.imagined(2, [PacketRecord((7,)), PacketRecord()]))
    assert "50% of 2 ticks;" in title(picture)
    assert not picture.axes[0].child_axes
    assert not any("ms" in word for word in words(picture))


def test_pages_add_up_to_those_in_use(recording):
    picture = pictures.page_occupancy(recording)
    axes = picture.axes[0]
    areas = axes.collections
    assert len(areas) == 10  # nine requests have a color of their own
    used = [60 - tick.pages_free for tick in recording.ticks]
    top = areas[-1].get_paths()[0].vertices
    for tick in range(0, len(used), 7):
        assert top[np.isclose(top[:, 0], tick + 0.5)][:, 1].max() >= used[tick]
    highest = max(area.get_paths()[0].vertices[:, 1].max() for area in areas)
    assert highest == max(used) == max(sum(tick.pages.values()) for tick in recording.ticks)
    assert f"at most {max(used)} of 60 in use" in title(picture)
    (line,) = axes.lines
    assert [*line.get_ydata()] == [60, 60] and line.get_label() == "pool: 60 pages"
    assert axes.get_ylim()[1] > 60 and labels(axes)[1] == "pages"
    assert "16 other requests" in words(picture)


def test_the_pool_is_a_line_above_the_pages_in_use():
    one = TickRecord(0, 0.0, 0.1, Bucket(1, 0), PacketRecord(), {5: 20, 6: 11}, 69, 100, 0)
    picture = pictures.page_occupancy(Recording(1, [one]))
    (line,) = picture.axes[0].lines
    assert [*line.get_ydata()] == [100, 100] and picture.axes[0].get_ylim()[1] > 100
    assert "at most 31 of 100 in use" in title(picture)


def test_the_axis_ends_below_a_pool_that_is_off_the_scale():
    one = TickRecord(0, 0.0, 0.1, Bucket(1, 0), PacketRecord(), {5: 2}, 998, 1000, 0)
    picture = pictures.page_occupancy(Recording(1, [one]))
    assert picture.axes[0].get_ylim()[1] < 10
    assert any("1,000" in word for word in words(picture) if word.startswith("↑"))


def test_the_requests_with_the_most_pages_have_areas_of_their_own():
    pages = {request_id: 1 + request_id for request_id in range(len(PALETTE) + 2)}
    one = TickRecord(0, 0.0, 0.1, Bucket(1, 0), PacketRecord(), pages, 34, 100, 0)
    picture = pictures.page_occupancy(Recording(1, [one]))
    named = [word for word in words(picture) if "request" in word and "by" not in word]
    assert named == [*(f"request {i}" for i in range(2, len(PALETTE) + 2)), "2 other requests"]


def test_timeline_begins_with_the_first_40_ticks(recording):
    assert len(recording.ticks) > 40
    assert len(cells(pictures.timeline(recording).axes[0])) == 40 * 4
