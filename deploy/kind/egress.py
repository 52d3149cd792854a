"""A forward proxy from the private engine's network to the network of this machine, for image builds.

    python -m deploy.kind.egress NETWORK     # an inherited descriptor of the machine's network namespace

It is started in the engine's network, opens a port there, and then returns to the machine's network, from which it
connects. It prints the port, and ends with its standard input: with the process that started it, however that ends. It
only knows CONNECT, so that it sees none of the traffic.
"""

import asyncio
import ctypes
import os
import re
import socket
import sys

from deploy.kind.relay import join

CLONE_NEWNET = 0x40000000


async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    request = await reader.readuntil(b"\r\n\r\n")
    target = re.match(rb"CONNECT ([^\s:]+):(\d+) HTTP/1", request)
    if target is None:
        writer.write(b"HTTP/1.1 405 Method Not Allowed\r\nAllow: CONNECT\r\n\r\n")
        writer.close()
        return
    try:
        there = await asyncio.open_connection(target[1].decode(), int(target[2]))
    except OSError:
        writer.write(b"HTTP/1.1 502 Bad Gateway\r\n\r\n")
        writer.close()
        return
    writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
    await join((reader, writer), there)


async def serve(listener: socket.socket) -> None:
    async with await asyncio.start_server(connect, sock=listener):
        print(listener.getsockname()[1], flush=True)
        await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    opened = socket.create_server(("127.0.0.1", 0))
    if ctypes.CDLL(None, use_errno=True).setns(int(sys.argv[1]), CLONE_NEWNET) != 0:
        sys.exit(f"cannot enter the machine's network: {os.strerror(ctypes.get_errno())}")
    asyncio.run(serve(opened))
