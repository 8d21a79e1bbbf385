"""Messages between the parents of a job."""

import json
import socket
import time

MAGIC = "of_cnn launch"
PROTOCOL = 1  # of the messages between parents; another one is another job's business
MAX_MESSAGE_BYTES = 1 << 20


# Messages between parents.


class Gone(Exception):
    """The other side of a channel closed it, or said something that is not a message."""


class Channel:
    """A connection to another parent: JSON objects, each after its length in 4 bytes."""

    def __init__(self, sock: socket.socket, address: str):
        sock.setblocking(False)  # a send must never wait for a peer that does not read
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock, self.address = sock, address
        self.node: int | None = None  # until it has said so
        self.told = False  # how the job ends; nothing more goes there
        self.opened = self.heard = self.sent = time.monotonic()
        self.inbox, self.outbox = bytearray(), bytearray()

    def send(self, kind: str, **fields) -> None:
        data = json.dumps({"kind": kind, **fields}).encode()
        assert len(data) <= MAX_MESSAGE_BYTES, f"a message of {len(data)} bytes"
        self.outbox += len(data).to_bytes(4, "big") + data
        self.sent = time.monotonic()
        self.flush()

    def flush(self) -> None:
        try:
            while self.outbox:
                del self.outbox[: self.sock.send(self.outbox)]
        except BlockingIOError:
            pass
        except OSError:  # reading will tell
            self.outbox.clear()

    def receive(self) -> list[dict]:
        """The messages that have arrived. Raises Gone."""
        try:
            data = self.sock.recv(1 << 16)
        except BlockingIOError:
            return []
        except OSError as error:
            raise Gone(error.strerror) from None
        if not data:
            raise Gone("closed")
        self.heard = time.monotonic()
        self.inbox += data
        messages = []
        while len(self.inbox) >= 4:
            size = int.from_bytes(self.inbox[:4], "big")
            if size > MAX_MESSAGE_BYTES:
                raise Gone("not a message")
            if len(self.inbox) < 4 + size:
                break
            try:
                message = json.loads(self.inbox[4 : 4 + size])
            except (ValueError, RecursionError):
                raise Gone("not a message") from None
            if not isinstance(message, dict):
                raise Gone("not a message")
            messages.append(message)
            del self.inbox[: 4 + size]
        return messages


def difference(ours: object, theirs: object, name: str = "") -> tuple[str, object, object] | None:
    """The first fact in which two nodes differ, with both values; nested names are joined."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in [*ours, *(key for key in theirs if key not in ours)]:
            path = f"{name} {key}".strip()
            found = difference(ours.get(key, "nothing"), theirs.get(key, "nothing"), path)
            if found is not None:
                return found
        return None
    # As text: in JSON, not a number equals itself.
    return None if json.dumps(ours) == json.dumps(theirs) else (name, ours, theirs)


def brief(value: object, limit: int = 200) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
