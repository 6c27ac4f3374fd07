"""A hook plug-in that says what a real one of go-plugin was recorded to say.

Runs as a program. What it is asked has to be what was asked then, byte for byte; HOOK_FAKE says
which recording it answers from (`good`, `refused`), or how it misbehaves.
"""

import json
import os
import signal
import socket
import struct
import sys
from pathlib import Path

HEADER = struct.Struct(">BBHII")
DATA, WINDOW_UPDATE, PING, _ = range(4)
SYN, ACK = 1, 2
ANSWERS = Path(__file__).with_name("hook_answers.json")
BAD_FRAMES = {
    "version": HEADER.pack(7, DATA, 0, 1, 0),
    "kind": HEADER.pack(0, 9, 0, 1, 0),
    "too much": HEADER.pack(0, DATA, 0, 1, 1 << 30),
    "strange stream": HEADER.pack(0, DATA, 0, 99, 0),
    "widened": HEADER.pack(0, WINDOW_UPDATE, 0, 1, 0xFFFFFFFF),
    "away": HEADER.pack(0, 3, 0, 0, 2),
}
BAD_VALUES = {
    "endless message": b"\xf8" + b"\xff" * 8,
    "empty message": b"\0",
    "number of 100 bytes": bytes((0x100 - 100,)),
    "value of an unknown type": b"\x02\x7e\x00",
    "cut text": b"\x06\x0c\x00\x7fabc",
}
LINES = {
    "chatty": "hello",
    "other version": "1|2|unix|{path}|netrpc",
    "grpc": "1|1|unix|{path}|grpc",
    "tcp": "1|1|tcp|127.0.0.1:1|netrpc",
    "tls": "1|1|unix|{path}|netrpc|MIIB",
    "nowhere": "1|1|unix|{path}x|netrpc",
}


class Plugin:
    def __init__(self, connection, mode):
        self.connection = connection
        self.mode = mode
        recording = json.loads(ANSWERS.read_text())["refused" if mode == "refused" else "good"]
        self.answers = {
            int(number): [[bytes.fromhex(one) for one in pair] for pair in pairs]
            for number, pairs in recording.items()
        }
        self.received = {}

    def send(self, kind, flags, number, data=b""):
        self.connection.sendall(HEADER.pack(0, kind, flags, number, len(data)) + data)

    def serve(self):
        with self.connection.makefile("rb") as file:
            while header := file.read(HEADER.size):
                _, kind, flags, number, length = HEADER.unpack(header)
                if flags & SYN:
                    self.send(WINDOW_UPDATE, ACK, number)
                    self.received[number] = b""
                if kind == DATA:
                    self.received[number] += file.read(length)
                    self.answer(number)

    def answer(self, number):
        got = self.received[number]
        if b"Control.Quit" in got:
            if self.mode != "stubborn":
                sys.exit(0)
            return
        if self.mode in ("hang", "stubborn") and b"BeforePushManifest" in got:
            return
        question, answer = self.answers[number][0]
        if len(got) < len(question):
            return
        if got != question:
            sys.exit(9)
        self.received[number] = b""
        del self.answers[number][0]
        if b"BeforePushManifest" in question:
            if self.mode in BAD_FRAMES:
                self.connection.sendall(BAD_FRAMES[self.mode])
                return
            if self.mode == "crash":
                os._exit(3)
            answer = BAD_VALUES.get(self.mode, answer)
        # It keeps the connection alive, prints, and wants to open a stream that nobody offers.
        self.connection.sendall(HEADER.pack(0, PING, SYN, 0, 5))
        self.send(DATA, 0, 3, b"printed\n")
        self.send(WINDOW_UPDATE, SYN, 2)
        for place in range(len(answer)):
            self.send(DATA, 0, number, answer[place : place + 1])


def main():
    mode = os.environ["HOOK_FAKE"]
    assert os.environ["NYDUS_HOOK_PLUGIN"] == "nydus-hook-plugin"
    assert os.environ["PLUGIN_PROTOCOL_VERSIONS"] == "1"
    if mode == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    directory = os.environ["PLUGIN_UNIX_SOCKET_DIR"]
    with socket.socket(socket.AF_UNIX) as listener:
        path = f"{directory}/s"
        listener.bind(path)
        listener.listen()
        print(LINES.get(mode, "1|1|unix|{path}|netrpc").format(path=path), flush=True)
        print("after the line", flush=True)
        print("to be logged", file=sys.stderr, flush=True)
        connection, _ = listener.accept()
    Plugin(connection, mode).serve()


main()
