#!/usr/bin/env python3
"""Measures what many things that are kept cost: how long the broker takes to start, and its resident memory then.

    tests/bench/scale.py                       a million Sessions that are away, a million retained messages
    tests/bench/scale.py sessions --count 1000
    tests/bench/scale.py --json                for machines

A store of them is made with `wasmqtt store import`. Each Session has one subscription, each retained message 16 bytes.
"""

import argparse
import itertools
import json
import os
import socket
import struct
import subprocess
import sys
import tempfile
import time

import bench

# The name of a Session begins with the millisecond in which it began, above 20 bits that tell apart what came in one.
BEGUN_MS = 1_767_225_600_000


def blob(text):
    return struct.pack(">I", len(text)) + text.encode()


def sessions(count):
    closed = struct.pack(">IQB", 0xFFFFFFFF, int(time.time() * 1000), 0)
    for n in range(count):
        key = struct.pack(">Q", (BEGUN_MS << 20) + n)
        yield "session", key, blob(f"client-{n:07}") + blob("") + blob("mqtt://127.0.0.1:1883") + closed
        yield "subscription", key + f"devices/{n:07}/commands".encode(), struct.pack(">BI", 1, 0)


def retained(count):
    for n in range(count):
        yield "retained", f"devices/{n:07}/state".encode(), b"\x05" + blob("") + b"sixteen bytes..."


def has_session(port, n):
    """The CONNACK of a Session that is there has the Session Present flag."""
    variable = mqtt_string("MQTT") + bytes((4, 0, 0, 60)) + mqtt_string(f"client-{n:07}")
    return answer(port, bytes((0x10, len(variable))) + variable, 4) == b"\x20\x02\x01\x00"


def has_retained(port, n):
    """A new subscriber gets the message, with RETAIN."""
    variable = mqtt_string("MQTT") + bytes((4, 2, 0, 60)) + mqtt_string("looks")
    topic = f"devices/{n:07}/state"
    subscribe = bytes((0, 1)) + mqtt_string(topic) + b"\x00"
    packets = bytes((0x10, len(variable))) + variable + bytes((0x82, len(subscribe))) + subscribe
    publish = mqtt_string(topic) + b"sixteen bytes..."
    publish = bytes((0x31, len(publish))) + publish
    return answer(port, packets, 4 + 5 + len(publish)).endswith(publish)


def mqtt_string(text):
    return struct.pack(">H", len(text)) + text.encode()


def answer(port, packets, size):
    with socket.create_connection(("127.0.0.1", port), timeout=120) as client:
        client.sendall(packets)
        with client.makefile("rb") as stream:
            return stream.read(size)


SCENARIOS = {"sessions": (sessions, has_session), "retained": (retained, has_retained)}


def fill(options, rows, config, folder):
    path = os.path.join(folder, "rows.jsonl")
    with open(path, "w") as file:
        for family, key, value in itertools.chain([("meta", b"schema", struct.pack(">I", 1))], rows):
            file.write(f'{{"family":"{family}","key":"{key.hex()}","value":"{value.hex()}"}}\n')
    command = [options.wasmqtt, "store", "import", path, "--config", config]
    subprocess.run(command, check=True, cwd=folder, stdout=subprocess.DEVNULL)
    os.remove(path)


def status_kb(pid, key):
    with open(f"/proc/{pid}/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key + ":"))


def measure(scenario, options):
    rows, is_there = SCENARIOS[scenario]
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        port, config = bench.free_port(), os.path.join(folder, "wasmqtt.toml")
        with open(config, "w") as file:
            file.write(f'[[listener]]\nbind = "127.0.0.1:{port}"\n')
        print(f"{scenario}: making a store of {options.count}", file=sys.stderr)
        fill(options, rows(options.count), config, folder)
        begun = time.monotonic()
        command = [options.wasmqtt, "serve", "--config", config]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=folder)
        try:
            # Its socket is there at once; it answers when everything is read.
            bench.wait_for(port, process)
            is_there(port, 0)
            took = time.monotonic() - begun
            # What the start took beside what stays is given back within a moment.
            time.sleep(2)
            row = {"start_s": round(took, 2), "rss_mib": status_kb(process.pid, "VmRSS") // 1024}
            if not all(is_there(port, n) for n in (0, options.count // 2, options.count - 1)):
                raise bench.BrokerFault(f"{scenario}: not everything is there")
            return row
        finally:
            process.kill()
            process.wait()


def main():
    target = os.environ.get("CARGO_TARGET_DIR", os.path.expanduser("~/.cache/wasmqtt/target"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenarios", nargs="*", help="which ones: " + ", ".join(SCENARIOS))
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--dir", default=os.path.expanduser("~"), help="on the disk that is to be measured")
    parser.add_argument("--wasmqtt", default=os.path.join(target, "release", "wasmqtt"))
    options = parser.parse_args()
    unknown = [name for name in options.scenarios if name not in SCENARIOS]
    if unknown:
        parser.error(f"no scenario {unknown[0]!r}; there are: {', '.join(SCENARIOS)}")
    try:
        table = {scenario: measure(scenario, options) for scenario in options.scenarios or SCENARIOS}
    except bench.BrokerFault as fault:
        sys.exit(f"bench: {fault}")
    if options.json:
        print(json.dumps(table, indent=1))
        return
    print("| kept | start, s | resident memory, MiB |\n|---|---|---|")
    for scenario, row in table.items():
        print(f"| {options.count:,} {scenario} | {row['start_s']} | {row['rss_mib']:,} |")


if __name__ == "__main__":
    main()
