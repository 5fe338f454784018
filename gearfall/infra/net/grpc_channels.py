"""gRPC channels and options: limits, and keepalive that notices a frozen peer in seconds."""

import grpc

MAX_MESSAGE_BYTES = 64 * 1024 * 1024

_LIMITS = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
)
_KEEPALIVE = (
    ("grpc.keepalive_time_ms", 2000),
    ("grpc.keepalive_timeout_ms", 1000),
    ("grpc.http2.ping_timeout_ms", 1000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
)

CHANNEL_OPTIONS = (*_LIMITS, *_KEEPALIVE, ("grpc.use_local_subchannel_pool", 1))
SERVER_OPTIONS = (
    *_LIMITS,
    *_KEEPALIVE,
    ("grpc.so_reuseport", 0),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 500),
    ("grpc.http2.max_ping_strikes", 0),
)


def open_channel(address: str) -> grpc.aio.Channel:
    """Return a channel to host:port. Connects lazily; close it with `await channel.close()`."""
    return grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
