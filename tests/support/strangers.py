"""Peers that libzmq would not be: raw ZMTP 3.1 on a socket, greeting first, then whatever a test likes to send."""

import socket

COMMAND, MORE, LONG = 4, 1, 2


def connect(port: int, mechanism: bytes = b"NULL") -> socket.socket:
    """Greets as a client of this mechanism, and has been greeted."""
    connection = socket.create_connection(("127.0.0.1", port), timeout=10.0)
    connection.sendall(b"\xff" + bytes(8) + b"\x7f\x03\x00" + mechanism.ljust(20, b"\0") + bytes(32))
    left = 64
    while left:
        received = connection.recv(left)
        assert received, "the other side has ended the connection"
        left -= len(received)
    return connection


def ready(connection: socket.socket, identity: bytes) -> None:
    """Ends the handshake of NULL, as a DEALER."""
    properties = ((b"Socket-Type", b"DEALER"), (b"Identity", identity))
    body = b"\x05READY" + b"".join(bytes([len(k)]) + k + len(v).to_bytes(4, "big") + v for k, v in properties)
    connection.sendall(bytes([COMMAND, len(body)]) + body)


def frame(content: bytes, flags: int) -> bytes:
    return bytes([flags | LONG]) + len(content).to_bytes(8, "big") + content


def is_closed(connection: socket.socket, timeout_s: float = 5.0) -> bool:
    """Whether the other side ends the connection in time; what it still sends is read."""
    connection.settimeout(timeout_s)
    try:
        while connection.recv(1 << 16):
            pass
    except TimeoutError:
        return False
    except OSError:
        return True
    return True
