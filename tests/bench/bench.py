#!/usr/bin/env python3
"""Measures wasmqtt beside mosquitto and the floor of the sockets, all in the same run.

    tests/bench/bench.py                              every scenario, five rounds
    tests/bench/bench.py pair-q0 fanin-q1 --rounds 3  some of them
    tests/bench/bench.py --json                       for machines

Needs the load generator mqload (name it with MQLOAD or --mqload) and mosquitto. Each round starts each broker afresh on
a free port, runs one scenario and ends the broker by its process id. What counts is the CPU time of the broker per
message (published + delivered), medians over the rounds, and its ratio to the others. A run that lost, doubled or
reordered a message is an error, not a figure.
"""

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time

SCENARIOS = {
    "pair-q0": "pair --pairs 100 --window 32 --batch 8",
    "pair-q1": "pair --pairs 100 --window 32 --qos 1 --ack-window 16 --batch 8",
    "pair-q2": "pair --pairs 100 --window 32 --qos 2 --ack-window 16 --batch 8",
    "fanin-q0": "fanin --pubs 100 --window 64 --batch 16",
    "fanin-q1": "fanin --pubs 100 --qos 1 --ack-window 16 --batch 8",
    "fanout-q0": "fanout --subs 100 --window 64 --batch 8",
    "fanout-q1": "fanout --subs 100 --qos 1 --window 16 --ack-window 16 --batch 4",
    "fanout-1000": "fanout --subs 1000 --window 16 --batch 1",
    "shared": "shared --pubs 100 --members 10 --window 32 --batch 8",
    "wildcard": "wildcard --branch 4 --window 32 --batch 4",
    "paced-q0": "pair --pairs 1000 --rate 20000",
    "paced-q1": "pair --pairs 1000 --rate 10000 --qos 1",
    "connect": "connect-churn --slots 32 --username user --password secret --src-count 64",
    "idle": "idle --conns 10000 --src-count 16 --hold 4 --linger0 --connect-timeout 90",
}
# What the floor can forward: QoS 0 to known subscribers.
FLOOR = {"pair-q0", "fanin-q0", "fanout-q0", "fanout-1000", "paced-q0"}


class BrokerFault(Exception):
    """A broker that could not be measured."""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(port, process):
    for _ in range(200):
        if process.poll() is not None:
            raise BrokerFault(f"{process.args[0]} ended before it listened (exit status {process.returncode})")
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise BrokerFault(f"{process.args[0]} does not listen on port {port}")


def start(broker, options, scenario, folder, port):
    """The command that serves `scenario` on `port`."""
    if broker == "floor":
        return [options.mqload, "floor", "--listen", f"127.0.0.1:{port}"]
    if broker == "mosquitto":
        # Without a bound it drops messages at this rate, and what is dropped is not measured.
        lines = [f"listener {port} 127.0.0.1", "max_queued_messages 0"]
        if scenario == "connect":
            users = os.path.join(folder, "users")
            open(users, "w").close()
            subprocess.run(["mosquitto_passwd", "-b", users, "user", "secret"], check=True)
            # Started by root, mosquitto becomes a user of its own, who must be able to read this.
            os.chmod(folder, 0o755)
            os.chmod(users, 0o644)
            lines += ["allow_anonymous false", f"password_file {users}"]
        else:
            lines.append("allow_anonymous true")
        path = os.path.join(folder, "mosquitto.conf")
    else:
        lines = ["[[listener]]", f'bind = "127.0.0.1:{port}"', "[plugins]"]
        if scenario == "connect":
            plugin = os.path.join(options.plugins, "auth-demo.wasm")
            lines += ["[auth]", "anonymous = false", "[[plugin]]", 'name = "auth-demo"']
            lines += [f'path = "{plugin}"', 'config = { user = "secret" }']
        path = os.path.join(folder, "wasmqtt.toml")
    with open(path, "w") as file:
        file.write("\n".join(lines) + "\n")
    if broker == "mosquitto":
        return ["mosquitto", "-c", path]
    return [options.wasmqtt, "serve", "--config", path]


def outcome(out, err):
    """What mqload says; a run that lost, doubled or reordered a message does not count."""
    line = json.loads(out) if out.strip() else {"ok": False, "errors": [err.strip()]}
    if not line["ok"]:
        raise BrokerFault(str(line.get("errors") or line.get("integrity")))
    return line


def under_load(command, folder, port, load):
    """Starts a broker in `folder`, and gives what mqload says."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=folder)
    try:
        wait_for(port, process)
        load = [*load, "--port", str(port), "--broker-pid", str(process.pid)]
        done = subprocess.run(load, capture_output=True, text=True, timeout=300, check=False)
    except subprocess.TimeoutExpired as fault:
        raise BrokerFault(str(fault)) from fault
    finally:
        process.kill()
        process.wait()
    return outcome(done.stdout, done.stderr)


def measure(broker, options, scenario):
    port = free_port()
    try:
        with tempfile.TemporaryDirectory() as folder:
            command = start(broker, options, scenario, folder, port)
            line = under_load(command, folder, port, [options.mqload, *SCENARIOS[scenario].split()])
    except BrokerFault as fault:
        return {"error": str(fault)}
    if scenario == "idle":
        return {"value": line["rss_bytes_per_conn"], "per_s": line["connect"]["per_s"]}
    run = line["run"]
    if scenario == "connect":
        return {"value": run["cpu_us_per_op"], "per_s": line["ops_per_s"]}
    return {"value": run["cpu_us_per_msg"], "per_s": run["pub_per_s"] + run["deliv_per_s"], "p99": (run["latency"] or {}).get("p99_us")}


def median(results, key):
    values = [result[key] for result in results if result.get(key) is not None]
    return statistics.median(values) if values else None


def main():
    target = os.environ.get("CARGO_TARGET_DIR", os.path.expanduser("~/.cache/wasmqtt/target"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenarios", nargs="*", help="which ones: " + ", ".join(SCENARIOS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--mqload", default=os.environ.get("MQLOAD") or shutil.which("mqload"))
    parser.add_argument("--wasmqtt", default=os.path.join(target, "release", "wasmqtt"))
    parser.add_argument("--plugins", default=os.environ.get("WASMQTT_PLUGINS_DIR", os.path.join(target, "plugins")))
    options = parser.parse_args()
    unknown = [name for name in options.scenarios if name not in SCENARIOS]
    if unknown:
        parser.error(f"no scenario {unknown[0]!r}; there are: {', '.join(SCENARIOS)}")
    for path, what in ((options.mqload, "mqload (set MQLOAD)"), (options.wasmqtt, "wasmqtt (build it with --release)")):
        if not path or not os.path.exists(path):
            sys.exit(f"bench: cannot find {what}")
    table = {}
    if not options.json:
        print(HEADER, flush=True)
    for scenario in options.scenarios or SCENARIOS:
        table[scenario] = measure_rounds(options, scenario)
        if not options.json:
            print(row(scenario, table[scenario]), flush=True)
    print(json.dumps(table, indent=1) if options.json else FOOTER)
    errors = [error for brokers in table.values() for result in brokers.values() for error in result["errors"]]
    if errors:
        sys.exit("bench: some runs failed: " + "; ".join(str(error) for error in errors[:5]))


def measure_rounds(options, scenario):
    """Medians for each broker; the brokers take turns."""
    brokers = ["wasmqtt", "mosquitto"] + (["floor"] if scenario in FLOOR else [])
    results = {broker: [] for broker in brokers}
    for round_ in range(options.rounds):
        for broker in brokers:
            print(f"{scenario} {round_ + 1}/{options.rounds} {broker}", file=sys.stderr)
            results[broker].append(measure(broker, options, scenario))
    return {
        broker: {
            "value": median(runs, "value"),
            "per_s": median(runs, "per_s"),
            "p99_us": median(runs, "p99"),
            "errors": [run["error"] for run in runs if "error" in run],
        }
        for broker, runs in results.items()
    }


HEADER = """| scenario | wasmqtt | mosquitto | ratio | floor | ratio | wasmqtt /s | mosquitto /s |
|---|---|---|---|---|---|---|---|"""
FOOTER = """
CPU-µs of the broker per message (published + delivered); connect: per connection; idle: bytes of RSS per connection."""


def row(scenario, brokers):
    own, peer, floor = (brokers.get(name, {}) for name in ("wasmqtt", "mosquitto", "floor"))

    def show(value, form="{:.2f}"):
        return "–" if value is None else form.format(value)

    def ratio(other):
        both = own.get("value") is not None and other.get("value")
        return show(own["value"] / other["value"] if both else None)

    cells = [scenario, show(own.get("value")), show(peer.get("value")), ratio(peer)]
    cells += [show(floor.get("value")), ratio(floor)]
    cells += [show(own.get("per_s"), "{:,.0f}"), show(peer.get("per_s"), "{:,.0f}")]
    failed = sum(len(result["errors"]) for result in brokers.values())
    return "| " + " | ".join(cells) + " |" + (f" {failed} failed" if failed else "")


if __name__ == "__main__":
    main()
