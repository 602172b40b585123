#!/usr/bin/env python3
"""Measures what keeping costs: messages for Sessions that are away, their delivery later, and retained messages.

    tests/bench/store.py                     all scenarios, three rounds
    tests/bench/store.py offline --rounds 1
    tests/bench/store.py --json              for machines

Brokers take turns: this one with `fsync`, `os` and `memory`, and mosquitto with persistence on, which writes now and
then and does not sync. What counts is messages per second, medians over the rounds.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile

import bench

SCENARIOS = {
    # 64 publishers with 32 messages each under way, to 100 Sessions that are away; then these come back.
    "offline": "persistent --subs 100 --pubs 64 --queued 5000 --qos 1 --ack-window 32",
    "retained": "retained --topics 100000 --pubs 16 --qos 1",
}
BROKERS = ("fsync", "os", "memory", "mosquitto")
FIGURES = {"offline": ("enqueue_per_s", "drain_per_s"), "retained": ("store_per_s", "deliver_per_s")}


def start(broker, options, folder, port):
    if broker == "mosquitto":
        os.chmod(folder, 0o777)
        path = os.path.join(folder, "mosquitto.conf")
        lines = [f"listener {port} 127.0.0.1", "allow_anonymous true", "persistence true"]
        lines += [f"persistence_location {folder}/", "max_queued_messages 0"]
        command = ["mosquitto", "-c", path]
    else:
        path = os.path.join(folder, "wasmqtt.toml")
        lines = ["[[listener]]", f'bind = "127.0.0.1:{port}"', "[store]", f'durability = "{broker}"']
        command = [options.wasmqtt, "serve", "--config", path]
    with open(path, "w") as file:
        file.write("\n".join(lines) + "\n")
    return command


def measure(broker, options, scenario):
    port = bench.free_port()
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        command = start(broker, options, folder, port)
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=folder)
        try:
            bench.wait_for(port, process)
            load = [options.mqload, *SCENARIOS[scenario].split(), "--port", str(port), "--broker-pid", str(process.pid)]
            done = subprocess.run(load, capture_output=True, text=True, timeout=300, check=False)
        except (bench.BrokerFault, subprocess.TimeoutExpired) as fault:
            return {"error": str(fault)}
        finally:
            process.kill()
            process.wait()
    line = json.loads(done.stdout) if done.stdout.strip() else {"ok": False, "errors": [done.stderr.strip()]}
    if not line["ok"]:
        return {"error": line.get("errors") or line.get("integrity")}
    return {figure: line[figure] for figure in FIGURES[scenario]}


def main():
    target = os.environ.get("CARGO_TARGET_DIR", os.path.expanduser("~/.cache/wasmqtt/target"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenarios", nargs="*", help="which ones: " + ", ".join(SCENARIOS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--dir", default=os.path.expanduser("~"), help="on the disk that is to be measured")
    parser.add_argument("--mqload", default=os.environ.get("MQLOAD") or shutil.which("mqload"))
    parser.add_argument("--wasmqtt", default=os.path.join(target, "release", "wasmqtt"))
    options = parser.parse_args()
    unknown = [name for name in options.scenarios if name not in SCENARIOS]
    if unknown:
        parser.error(f"no scenario {unknown[0]!r}; there are: {', '.join(SCENARIOS)}")
    if not options.mqload:
        parser.error("the load generator mqload is not in PATH; name it with MQLOAD")
    table = {}
    for scenario in options.scenarios or SCENARIOS:
        results = {broker: [] for broker in BROKERS}
        for round_ in range(options.rounds):
            for broker in BROKERS:
                print(f"{scenario} {round_ + 1}/{options.rounds} {broker}", file=sys.stderr)
                result = measure(broker, options, scenario)
                if "error" in result:
                    print(f"  left out: {result['error']}", file=sys.stderr)
                results[broker].append(result)
        for figure in FIGURES[scenario]:
            values = {broker: [r[figure] for r in results[broker] if figure in r] for broker in BROKERS}
            table[f"{scenario} {figure}"] = {b: statistics.median(v) if v else None for b, v in values.items()}
    if options.json:
        print(json.dumps(table, indent=1))
        return
    print("| figure | " + " | ".join(BROKERS) + " | fsync ÷ memory | fsync ÷ mosquitto |")
    print("|---" * (len(BROKERS) + 3) + "|")
    for name, values in table.items():
        cells = [f"{values[b]:,.0f}" if values[b] else "–" for b in BROKERS]
        for other in ("memory", "mosquitto"):
            both = values["fsync"] and values[other]
            cells.append(f"{values['fsync'] / values[other]:.2f}" if both else "–")
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
