#!/usr/bin/env python3
"""Measures what plugins cost: the same broker without any, with permissions, and with a storage hook.

    tests/bench/plugins.py                     all scenarios, five rounds
    tests/bench/plugins.py pair-q0 --rounds 3  some of them
    tests/bench/plugins.py --json              for machines

`idle hook` has auth-file, acl-rules and a storage hook that wants other topics: leases keep all three out of the message
path. `rewrite` has a storage hook that puts another payload, of the same
bytes, in the place of every one. Brokers take turns; what counts is CPU time of the broker
per message (published + delivered), medians over the rounds. Ratios are medians of what each round gave, so that
a machine that gets slower or faster on the way does not show; `again ÷ none` is the same broker without plugins
against itself: how far from 1 a ratio can be by chance.
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

SCENARIOS = {name: bench.SCENARIOS[name] for name in ("pair-q0", "pair-q1", "fanin-q0", "fanin-q1")}
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


def measure(variant, options, scenario):
    port = bench.free_port()
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "wasmqtt.toml")
        with open(path, "w") as file:
            file.write("\n".join(configuration(variant, options, folder, port)) + "\n")
        log = open(os.path.join(folder, "log"), "w+")
        process = subprocess.Popen(
            [options.wasmqtt, "serve", "--config", path], stdout=subprocess.DEVNULL, stderr=log, cwd=folder
        )
        try:
            bench.wait_for(port, process)
            command = [options.mqload, *SCENARIOS[scenario].split(), *LOGIN]
            command += ["--port", str(port), "--broker-pid", str(process.pid)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
        except (bench.BrokerFault, subprocess.TimeoutExpired) as fault:
            log.seek(0)
            return {"error": f"{fault}: {log.read()}"}
        finally:
            process.kill()
            process.wait()
            log.close()
    line = json.loads(done.stdout) if done.stdout.strip() else {"ok": False, "errors": [done.stderr.strip()]}
    if not line["ok"]:
        return {"error": line.get("errors") or line.get("integrity")}
    return {"value": line["run"]["cpu_us_per_msg"]}


VARIANTS = {"none": "no plugins", "idle": "auth, acl, idle hook", "rewrite": "rewriting hook", "again": "no plugins, again"}
COLUMNS = ("idle ÷ none", "again ÷ none", "rewriting − none")


def main():
    target = os.environ.get("CARGO_TARGET_DIR", os.path.expanduser("~/.cache/wasmqtt/target"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenarios", nargs="*", help="which ones: " + ", ".join(SCENARIOS))
    parser.add_argument("--rounds", type=int, default=5)
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
        results = {variant: [] for variant in VARIANTS}
        for round_ in range(options.rounds):
            # Nobody always comes first, or after the same one.
            for variant in list(VARIANTS)[:: 1 if round_ % 2 == 0 else -1]:
                print(f"{scenario} {round_ + 1}/{options.rounds} {variant}", file=sys.stderr)
                results[variant].append(measure(variant, options, scenario))
        errors += [run["error"] for runs in results.values() for run in runs if "error" in run]
        table[scenario] = row = summary(results)
        if not options.json:
            print(shown(scenario, row), flush=True)
    print(json.dumps(table, indent=1) if options.json else "\nCPU-µs of the broker per message (published + delivered).")
    if errors:
        sys.exit("bench: some runs failed: " + "; ".join(str(error) for error in errors[:3]))


def summary(results):
    row = {variant: bench.median(runs, "value") for variant, runs in results.items()}
    rounds = [dict(zip(results, runs)) for runs in zip(*results.values())]
    rounds = [{variant: run["value"] for variant, run in round_.items()} for round_ in rounds if whole(round_)]
    if rounds:
        # Twice without plugins: the mean of both is the better measure of it.
        without = [(round_["none"] + round_["again"]) / 2 for round_ in rounds]
        row["idle_ratio"] = statistics.median(round_["idle"] / none for round_, none in zip(rounds, without))
        row["again_ratio"] = statistics.median(round_["again"] / round_["none"] for round_ in rounds)
        # A message is counted twice, when it is published and when it is delivered; the hook sees it once.
        row["rewrite_us"] = 2 * statistics.median(round_["rewrite"] - none for round_, none in zip(rounds, without))
    return row


def whole(round_):
    return all("value" in run for run in round_.values())


def shown(scenario, row):
    cells = [scenario] + ["–" if row[variant] is None else f"{row[variant]:.3f}" for variant in VARIANTS]
    for key, unit in (("idle_ratio", ""), ("again_ratio", ""), ("rewrite_us", " µs")):
        cells.append(f"{row[key]:.{2 if unit else 3}f}{unit}" if key in row else "–")
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
