"""A worker of an async verifier: awaits all the answers that it is given at once, until its channel closes.

Lines in are `<id> <json>`, lines out `<id> <judgement>`, in any order. It ends an answer after its time limit itself,
unless its event loop stands still because an answer computes or sleeps without awaiting (see async_template.py).
"""

import asyncio
import json
import socket
import traceback

from actors.verifier.judgement import Judgement, encode, judgement_of, raised
from actors.verifier.plugin import Verifier
from common.types import Verdict

_LONGEST_LINE = 1 << 30


async def serve(verifier: Verifier, channel: socket.socket, timeout_s: float) -> None:
    """Answers requests, all at once, until the template closes the channel."""
    reader, writer = await asyncio.open_connection(sock=channel, limit=_LONGEST_LINE)
    tasks: set[asyncio.Task[None]] = set()
    while line := await reader.readline():
        task = asyncio.create_task(_answer(verifier, line, writer, timeout_s))
        tasks.add(task)
        task.add_done_callback(tasks.discard)


async def _answer(verifier: Verifier, line: bytes, writer: asyncio.StreamWriter, timeout_s: float) -> None:
    request_id, body = line.split(b" ", 1)
    writer.write(b"%s %s\n" % (request_id, encode(await _judge(verifier, body, timeout_s))))


async def _judge(verifier: Verifier, body: bytes, timeout_s: float) -> Judgement:
    request = json.loads(body)
    limit = asyncio.timeout(timeout_s)
    try:
        async with limit:
            returned = await verifier.verify(request["response"], request["reference"], request["row"])
        return judgement_of(returned, verifier.correct_from)
    except MemoryError:
        return Judgement(Verdict.TIMED_OUT)
    except (Exception, SystemExit, asyncio.CancelledError) as error:  # cancelled by something of its own
        if limit.expired():
            return Judgement(Verdict.TIMED_OUT)
        traceback.print_exc()
        return raised(error)
