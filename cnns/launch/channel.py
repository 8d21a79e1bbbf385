"""Messages between the parents of a job: JSON objects, one a line."""

import asyncio
import json
import time
from typing import Any

MAGIC = "of_cnn launch"
PROTOCOL = 2  # of the messages between parents; nodes with another one cannot take part
MAX_BYTES = 1 << 20  # of a message
BEAT_SECONDS = 0.5
SILENCE_SECONDS = 10.0  # a node not heard from for so long is lost
HELLO_SECONDS = 5.0  # a connection that has not said by then who it is gets closed


class Channel:
    """A connection to another parent. Sending never waits for a peer that does not read."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, **hello: Any):
        self.reader, self.writer = reader, writer
        ends = (writer.get_extra_info(name) for name in ("peername", "sockname"))
        self.address, self.own_address = (end[0] if end else "" for end in ends)
        self.greeted = False  # its hello has arrived
        self.node: int | None = None  # once it takes part in the job
        self.is_silent = False
        self.last_received = time.monotonic()
        self.send("hello", magic=MAGIC, protocol=PROTOCOL, **hello)

    def send(self, kind: str, **fields: Any) -> None:
        self.writer.write(json.dumps({"kind": kind, **fields}).encode() + b"\n")

    async def run(self, owner: Any) -> str:
        """Give what arrives to `owner`, and return why the connection has ended."""
        watch = asyncio.create_task(self.watch())
        try:
            async for line in self.reader:
                self.last_received = time.monotonic()
                message = json.loads(line)
                if self.greeted:
                    owner.on_message(self, message.pop("kind"), message)
                elif message["magic"] == MAGIC:
                    self.greeted = True
                    owner.on_hello(self, message)
                else:
                    return "something else listens there"
            return f"not heard from for {SILENCE_SECONDS:g} s" if self.is_silent else "closed"
        except OSError as error:
            return error.strerror or str(error)
        except (AttributeError, LookupError, TypeError, ValueError, OverflowError, RecursionError):
            return "not a message"
        finally:
            watch.cancel()
            self.writer.close()

    async def watch(self) -> None:
        """Send heartbeats, and close the connection when none arrive."""
        while not self.is_silent:
            await asyncio.sleep(BEAT_SECONDS)
            self.send("heartbeat")
            limit = SILENCE_SECONDS if self.greeted else HELLO_SECONDS
            if time.monotonic() - self.last_received > limit:
                await asyncio.sleep(BEAT_SECONDS / 10)  # perhaps it was this process that stopped
                self.is_silent = time.monotonic() - self.last_received > limit
        self.writer.transport.abort()


def difference(ours: object, theirs: object, name: str = "") -> tuple[str, object, object] | None:
    """The first fact in which two nodes differ, with both values; nested names are joined."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in ours | theirs:
            path = f"{name} {key}".strip()
            found = difference(ours.get(key, "nothing"), theirs.get(key, "nothing"), path)
            if found is not None:
                return found
        return None
    # As text, for nan does not equal itself.
    return None if json.dumps(ours) == json.dumps(theirs) else (name, ours, theirs)


def brief(value: object, limit: int = 200) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
