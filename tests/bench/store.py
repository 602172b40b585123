#!/usr/bin/env python3
"""Measures what keeping costs: messages for Sessions that are away, their delivery later, and retained messages.

    tests/bench/store.py                     all scenarios, seven rounds
    tests/bench/store.py offline --rounds 1
    tests/bench/store.py --json              for machines

Brokers take turns: this one with `fsync`, `os` and `memory`, and mosquitto with persistence on, which writes now and
then and does not sync. What counts is messages per second, medians over the rounds; ratios are medians of what each
round gave.
"""

import argparse
import json
import os
import shutil
import statistics
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
    try:
        with tempfile.TemporaryDirectory(dir=options.dir) as folder:
            command = start(broker, options, folder, port)
            line = bench.under_load(command, folder, port, [options.mqload, *SCENARIOS[scenario].split()])
    except bench.BrokerFault as fault:
        return {"error": str(fault)}
    return {figure: line[figure] for figure in FIGURES[scenario]}


def main():
    target = os.environ.get("CARGO_TARGET_DIR", os.path.expanduser("~/.cache/wasmqtt/target"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenarios", nargs="*", help="which ones: " + ", ".join(SCENARIOS))
    parser.add_argument("--rounds", type=int, default=7)
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
    table, errors = {}, []
    for scenario in options.scenarios or SCENARIOS:
        rounds = []
        for round_ in range(options.rounds):
            print(f"{scenario} {round_ + 1}/{options.rounds}", file=sys.stderr)
            rounds.append({broker: measure(broker, options, scenario) for broker in BROKERS})
        errors += [run["error"] for round_ in rounds for run in round_.values() if "error" in run]
        for figure in FIGURES[scenario]:
            table[f"{scenario} {figure}"] = summary(rounds, figure)
    if options.json:
        print(json.dumps(table, indent=1))
    else:
        print("| figure | " + " | ".join(BROKERS) + " | fsync ÷ memory | fsync ÷ mosquitto |")
        print("|---" * (len(BROKERS) + 3) + "|")
        for name, row in table.items():
            print(f"| {name} | " + " | ".join(shown(value) for value in row.values()) + " |")
    if errors:
        sys.exit("bench: some runs failed: " + "; ".join(str(error) for error in errors[:3]))


def summary(rounds, figure):
    def median(values):
        return statistics.median(values) if values else None

    row = {broker: median([round_[broker][figure] for round_ in rounds if figure in round_[broker]]) for broker in BROKERS}
    for other in ("memory", "mosquitto"):
        both = [(round_["fsync"], round_[other]) for round_ in rounds]
        ratios = [mine[figure] / theirs[figure] for mine, theirs in both if figure in mine and figure in theirs]
        row[f"fsync_to_{other}"] = median(ratios)
    return row


def shown(value):
    if value is None:
        return "–"
    return f"{value:,.0f}" if value > 100 else f"{value:.2f}"


if __name__ == "__main__":
    main()
