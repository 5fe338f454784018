"""Frames: any cut of the stream gives the same bodies; lengths and ends are checked."""

import os
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gearfall.core.errors import Internal
from services.worker.engine_link.frames import (
    MAX_DESCRIPTORS,
    MAX_FRAME_BYTES,
    FrameDecoder,
    encode_frame,
    receive_frame,
    send_header,
)


@pytest.fixture
def pair():
    one, two = socket.socketpair()
    with one, two:
        yield one, two


@given(st.lists(st.binary(max_size=40), max_size=8), st.lists(st.integers(1, 30), max_size=40))
def test_bodies_survive_any_cut(bodies, cuts):
    stream = b"".join(map(encode_frame, bodies))
    decoder = FrameDecoder()
    found: list[bytes] = []
    for cut in [*cuts, len(stream)]:
        found += decoder.feed(stream[:cut])
        stream = stream[cut:]
    assert found == bodies
    assert not decoder._buffer


def test_a_length_over_the_limit_is_refused_before_its_body():
    header = (MAX_FRAME_BYTES + 1).to_bytes(4, "little")
    with pytest.raises(Internal, match="over the limit"):
        list(FrameDecoder().feed(header))


def test_received_lengths_are_checked(pair):
    one, two = pair
    one.sendall(b"\xff\xff\xff\xff")
    with pytest.raises(Internal, match="over the limit"):
        receive_frame(two)


def test_descriptors_travel_beside_a_frame(pair):
    one, two = pair
    source = os.memfd_create("source")
    os.write(source, b"content")
    send_header(one, b"body", [source, source])
    one.sendall(b"body")
    os.close(source)
    received = receive_frame(two)
    assert received is not None
    body, descriptors = received
    assert body == b"body"
    assert [os.pread(descriptor, 20, 0) for descriptor in descriptors] == [b"content"] * 2
    assert not any(map(os.get_inheritable, descriptors))
    for descriptor in descriptors:
        os.close(descriptor)


def test_too_many_descriptors_are_refused(pair):
    one, _ = pair
    with pytest.raises(Internal, match="descriptors"):
        send_header(one, b"", [0] * (MAX_DESCRIPTORS + 1))


def test_the_end_between_frames_is_none_and_inside_an_error(pair):
    one, two = pair
    one.sendall(encode_frame(b"whole") + encode_frame(b"cut")[:-1])
    one.close()
    assert receive_frame(two) == (b"whole", [])
    with pytest.raises(Internal, match="inside a frame"):
        receive_frame(two)


def test_the_end_is_none(pair):
    one, two = pair
    one.close()
    assert receive_frame(two) is None
