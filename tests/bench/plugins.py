#!/usr/bin/env python3
"""Measures what plugins cost: the same broker without any, with permissions, and with a storage hook.

    tests/bench/plugins.py                      all scenarios, twenty rounds: about twenty minutes
    tests/bench/plugins.py pair-q0 --rounds 5   some of them
    tests/bench/plugins.py --json               for machines

`idle hook` has auth-file, acl-rules and a storage hook that wants other topics: leases keep all three out of the
message path. `rewrite` has a storage hook that puts another payload, of the same bytes, in the place of every one.
`again` is the broker without plugins once more: how far from 1 its ratio is, is what chance alone gives.

What counts is CPU time of the broker per message (published + delivered). On a machine with other work beside this one
it changes by a third from one minute to the next, so all brokers of a round are there at the same time, each with its
own load, and take turns of 50 ms: the others are stopped (SIGSTOP) meanwhile. Ratios are medians over the rounds.
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time

import bench

SCENARIOS = {name: bench.SCENARIOS[name] for name in ("pair-q0", "pair-q1", "fanin-q0", "fanin-q1")}
SECONDS = 12
# What mqload takes to begin with.
WARMUP_SECONDS = 1
TURN_SECONDS = 0.05
LOGIN = ["--username", "user", "--password", "secret"]


def plugin(name, path, lines):
    return ["[[plugin]]", f'name = "{name}"', f'path = "{path}"', *lines]


def configuration(variant, options, folder, port):
    lines = ["[[listener]]", f'bind = "127.0.0.1:{port}"', "[plugins]"]
    if variant in ("none", "again"):
        return lines
    if variant == "rewrite":
        config = 'config = { filters = "#", before = "true", rewrite = "same", acl = "allow", ttl = "3600" }'
        grants = 'grants = { publish = ["#"], disconnect = true, ban = true, revoke = true }'
        return lines + plugin("probe", options.probe, [config, grants, 'limits = { instances = 1 }'])
    users, rules, key = (os.path.join(folder, name) for name in ("users", "rules", "key"))
    command = [options.wasmqtt, "passwd", "--memory-kib", "8", "--iterations", "1", users, "user"]
    subprocess.run(command, input="secret\n", text=True, check=True, capture_output=True)
    with open(rules, "w") as file:
        file.write("allow all #\n")
    with open(key, "w") as file:
        file.write("ab" * 32 + "\n")

    def granted(host, guest):
        return f'grants = {{ files = [{{ host = "{host}", guest = "{guest}" }}] }}'

    dir_ = options.plugins
    lines += plugin("auth-file", f"{dir_}/auth-file.wasm", ['config = { file = "/f/users" }', granted(users, "/f/users")])
    lines += plugin("acl-rules", f"{dir_}/acl-rules.wasm", ['config = { file = "/f/rules" }', granted(rules, "/f/rules")])
    config = 'config = { key_file = "/f/key", filters = "elsewhere/#" }'
    return lines + plugin("payload-seal", f"{dir_}/payload-seal.wasm", [config, granted(key, "/f/key")])


class Contender:
    """A broker and its load."""

    def __init__(self, variant, options):
        self.folder = tempfile.TemporaryDirectory()
        self.load = None
        self.port = bench.free_port()
        path = os.path.join(self.folder.name, "wasmqtt.toml")
        with open(path, "w") as file:
            file.write("\n".join(configuration(variant, options, self.folder.name, self.port)) + "\n")
        self.log = open(os.path.join(self.folder.name, "log"), "w+")
        self.broker = subprocess.Popen(
            [options.wasmqtt, "serve", "--config", path],
            stdout=subprocess.DEVNULL,
            stderr=self.log,
            cwd=self.folder.name,
        )

    def begin(self, options, scenario):
        bench.wait_for(self.port, self.broker)
        command = [options.mqload, *SCENARIOS[scenario].split(), *LOGIN, "--duration", str(SECONDS)]
        command += ["--port", str(self.port), "--broker-pid", str(self.broker.pid)]
        self.load = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def signal(self, which):
        for process in (self.broker, self.load):
            process.send_signal(which)

    def result(self):
        """CPU-µs per message."""
        try:
            return bench.outcome(*self.load.communicate(timeout=60))["run"]["cpu_us_per_msg"]
        except bench.BrokerFault as fault:
            self.log.seek(0)
            raise bench.BrokerFault(f"{fault}: {self.log.read()}") from fault

    def end(self):
        for process in (self.load, self.broker):
            if process:
                process.kill()
                process.wait()
        self.log.close()
        self.folder.cleanup()


def measure(variants, options, scenario):
    """What each of them took; all in the same seconds."""
    contenders = []
    try:
        for variant in variants:
            contenders.append(Contender(variant, options))
        for contender in contenders:
            contender.begin(options, scenario)
        take_turns(contenders, WARMUP_SECONDS + SECONDS)
        return {"value": {variant: contender.result() for variant, contender in zip(variants, contenders)}}
    except (bench.BrokerFault, subprocess.TimeoutExpired) as fault:
        return {"error": str(fault)}
    finally:
        for contender in contenders:
            contender.end()


def take_turns(contenders, seconds):
    # All of them connect first.
    time.sleep(WARMUP_SECONDS / 2)
    for contender in contenders[1:]:
        contender.signal(signal.SIGSTOP)
    turn, end = 0, time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(TURN_SECONDS)
        contenders[turn % len(contenders)].signal(signal.SIGSTOP)
        turn += 1
        contenders[turn % len(contenders)].signal(signal.SIGCONT)
    for contender in contenders:
        contender.signal(signal.SIGCONT)


VARIANTS = {"none": "no plugins", "idle": "auth, acl, idle hook", "rewrite": "rewriting hook", "again": "no plugins, again"}
COLUMNS = ("idle ÷ none", "again ÷ none", "rewriting − none")


def main():
    target = os.environ.get("CARGO_TARGET_DIR", os.path.expanduser("~/.cache/wasmqtt/target"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenarios", nargs="*", help="which ones: " + ", ".join(SCENARIOS))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--mqload", default=os.environ.get("MQLOAD") or shutil.which("mqload"))
    parser.add_argument("--wasmqtt", default=os.path.join(target, "release", "wasmqtt"))
    parser.add_argument("--plugins", default=os.path.join(target, "plugins"))
    parser.add_argument("--probe", default=os.path.join(target, "wasm32-wasip2", "plugin", "probe.wasm"))
    options = parser.parse_args()
    for path, what in ((options.mqload, "mqload (set MQLOAD)"), (options.wasmqtt, "wasmqtt (build it with --release)")):
        if not path or not os.path.exists(path):
            sys.exit(f"bench: cannot find {what}")
    table, errors = {}, []
    if not options.json:
        print("| scenario | " + " | ".join((*VARIANTS.values(), *COLUMNS)) + " |")
        print("|---" * (1 + len(VARIANTS) + len(COLUMNS)) + "|", flush=True)
    for scenario in options.scenarios or SCENARIOS:
        rounds = []
        for round_ in range(options.rounds):
            print(f"{scenario} {round_ + 1}/{options.rounds}", file=sys.stderr)
            # Nobody always comes first.
            rounds.append(measure(list(VARIANTS)[:: 1 if round_ % 2 == 0 else -1], options, scenario))
        errors += [round_["error"] for round_ in rounds if "error" in round_]
        rounds = [round_["value"] for round_ in rounds if "value" in round_]
        if not rounds:
            continue
        table[scenario] = row = summary(rounds)
        if not options.json:
            print(shown(scenario, row), flush=True)
    print(json.dumps(table, indent=1) if options.json else "\nCPU-µs of the broker per message (published + delivered).")
    if errors:
        sys.exit("bench: some runs failed: " + "; ".join(str(error) for error in errors[:3]))


def summary(rounds):
    row = {variant: statistics.median(round_[variant] for round_ in rounds) for variant in VARIANTS}
    # Twice without plugins: the mean of both is the better measure of it.
    pairs = [(round_, (round_["none"] + round_["again"]) / 2) for round_ in rounds]
    row["idle_ratio"] = statistics.median(round_["idle"] / none for round_, none in pairs)
    row["again_ratio"] = statistics.median(round_["again"] / round_["none"] for round_, _ in pairs)
    # A message is counted twice, when it is published and when it is delivered; the hook sees it once.
    row["rewrite_us"] = 2 * statistics.median(round_["rewrite"] - none for round_, none in pairs)
    return row


def shown(scenario, row):
    cells = [scenario, *(f"{row[variant]:.3f}" for variant in VARIANTS)]
    cells += [f"{row['idle_ratio']:.3f}", f"{row['again_ratio']:.3f}", f"{row['rewrite_us']:.2f} µs"]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
