//! Every plug-point but `auth` in one component, each doing what the settings, the topic or the payload says.

use std::cell::{Cell, RefCell};

use wasmqtt_sdk::host::{self, Outgoing};
use wasmqtt_sdk::{
    Access, Acl, Batch, Changes, Client, Cluster, Decision, Event, Events, Failure, Handover, LeasedRoute, Pair,
    Plugin, Registration, Route, Settings, State, StorageHook,
};

/// Its settings and what it remembers.
pub struct Probe {
    settings: Settings,
    /// Handed over.
    seen: Cell<u32>,
    /// How often this instance was shown messages before they are stored.
    shown: Cell<u32>,
    kept: RefCell<Vec<Vec<u8>>>,
}

impl Probe {
    fn is(&self, name: &str, value: &str) -> bool {
        self.settings.get(name) == Some(value)
    }

    /// One of so many calls, if the setting says how many.
    fn is_turn(&self, name: &str) -> Result<bool, String> {
        let every: u32 = self.settings.parse(name, 0)?;
        Ok(every > 0 && self.shown.get().is_multiple_of(every))
    }

    /// Where nobody waits for an answer.
    fn wait(&self) {
        if self.is("slow", "true") {
            std::thread::sleep(std::time::Duration::from_mins(10));
        }
    }

    fn list(&self, name: &str) -> Vec<String> {
        self.settings.get(name).unwrap_or_default().split_whitespace().map(str::to_owned).collect()
    }
}

impl Plugin for Probe {
    fn new(settings: &Settings) -> Result<Self, String> {
        assert!(settings.get("init") != Some("trap"), "as told");
        let mut settings = settings.clone();
        // Another build may find another mode in the file.
        if let Some(mode) = settings.get("mode").and_then(|file| std::fs::read_to_string(file).ok()) {
            settings =
                Settings::from_pairs(&settings.iter().chain(std::iter::once(("acl", mode.trim()))).collect::<Vec<_>>());
        }
        Ok(Self { settings, seen: Cell::new(0), shown: Cell::new(0), kept: RefCell::default() })
    }

    fn registration(&self) -> Registration {
        Registration {
            filters: self.list("filters"),
            before_store: self.is("before", "true"),
            at_rest: self.is("at_rest", "true"),
            committed: self.is("committed", "true"),
            payload: !self.is("payload", "false"),
            events: self.list("events"),
        }
    }

    fn health(&self) -> Result<(), String> {
        if self.is("health", "sick") { Err("not well".into()) } else { Ok(()) }
    }
}

/// What any call can be told to do by a word in the topic.
fn misbehave(topic: &str) {
    match topic.rsplit('/').next().unwrap_or_default() {
        "trap" => panic!("as told"),
        "loop" => loop {
            std::hint::black_box(());
        },
        "memory" => {
            let mut eaten = Vec::new();
            loop {
                eaten.push(std::hint::black_box(vec![1_u8; 1 << 20]));
            }
        }
        "recurse" => host::info(&recurse(1).to_string()),
        "calls" => (0..1_000_000).for_each(|_| host::debug("again")),
        "metrics" => (0..100_000).for_each(|n: u32| host::count("flood", &[("n", &n.to_string())], 1.0)),
        "storm" => (0..100_000).for_each(|n: u32| {
            let _ = host::publish(&Outgoing::new(format!("storm/{n}"), "x"));
        }),
        // About 40 ms, by the clock.
        "compute" => {
            let begun = std::time::Instant::now();
            while begun.elapsed().as_millis() < 40 {
                (0..100_000_u64).for_each(|count| {
                    std::hint::black_box(count);
                });
            }
        }
        "work" => (0..10_000_000_u64).for_each(|count| {
            std::hint::black_box(count);
        }),
        _ => {}
    }
}

#[allow(unconditional_recursion, reason = "that is the point")]
fn recurse(depth: u64) -> u64 {
    let room = std::hint::black_box([depth; 64]);
    recurse(depth + 1) + room[(depth % 64) as usize]
}

impl Acl for Probe {
    fn authorize(&self, client: &Client, access: &Access) -> Result<Decision, String> {
        self.seen.set(self.seen.get() + 1);
        let topic = access.topic.as_str();
        if !topic.starts_with("hook/") {
            misbehave(topic);
        }
        if self.is("acl", "next") {
            return Ok(Decision::next());
        }
        if self.is("acl", "fail") || topic.ends_with("/fail") {
            return Err("as told".into());
        }
        if topic.ends_with("/forge") {
            return Err(format!("x\n2026-01-01T00:00:00Z ERROR forged \u{1b}[31m{}", "y".repeat(100_000)));
        }
        let seconds = self.settings.parse("ttl", 60)?;
        let denied = topic.contains("secret") || self.is("acl", "deny") || client.client_id == "nobody";
        let decision = if denied { Decision::deny() } else { Decision::allow() };
        let scope = match topic.split_once('/') {
            Some((first, _)) if !denied && !first.contains(['+', '#']) => format!("{first}/#"),
            _ => String::new(),
        };
        Ok(decision.lease(seconds).scope(scope))
    }
}

impl StorageHook for Probe {
    fn before_store(&self, messages: &Batch) -> Result<Changes, String> {
        self.shown.set(self.shown.get() + 1);
        if self.is_turn("slow_every")? {
            std::thread::sleep(std::time::Duration::from_millis(self.settings.parse("slow_ms", 0)?));
        }
        if self.is_turn("fail_every")? {
            return Err("as told".into());
        }
        let mut changes = Changes::none();
        for message in messages.iter() {
            misbehave(message.topic);
            match message.topic.rsplit('/').next().unwrap_or_default() {
                "discard" => changes.discard(&message, 0x97),
                "upper" => changes.replace_payload(&message, message.payload.to_ascii_uppercase()),
                "big" => changes.replace_payload(&message, vec![0; 64 << 20]),
                "fail" => return Err("as told".into()),
                // For measuring: another payload of the same bytes.
                _ if self.is("rewrite", "same") => changes.replace_payload(&message, message.payload.to_vec()),
                // A number stays the same number.
                _ if self.is("rewrite", "zero") => {
                    changes.replace_payload(&message, [b"0".as_slice(), message.payload].concat());
                }
                _ if self.is("rewrite", "true") => {
                    changes.replace_payload(&message, message.payload.iter().rev().copied().collect());
                }
                _ => {}
            }
        }
        Ok(changes)
    }

    fn after_load(&self, messages: &Batch) -> Result<Changes, String> {
        self.before_store(messages)
    }

    fn committed(&self, messages: &Batch) -> Result<(), Failure> {
        if self.is("committed_fails", "true") {
            return Err("as told".to_owned().into());
        }
        for message in messages.iter() {
            if message.topic.ends_with("/not-yet") && self.seen.get() == 0 {
                self.seen.set(1);
                return Err("as told".to_owned().into());
            }
            match message.topic.rsplit('/').next() {
                Some("committed-fail") => return Err("as told".to_owned().into()),
                Some("committed-refuse") => return Err(Failure::Internal("as told".into())),
                Some("committed-trap") => panic!("as told"),
                _ => {}
            }
            self.kept.borrow_mut().push(message.payload.to_vec());
            let _ = host::publish(&Outgoing::new(format!("committed/{}", message.topic), message.payload));
        }
        Ok(())
    }
}

impl Events for Probe {
    fn observed(&self, events: &[Event]) {
        self.wait();
        for event in events {
            let _ = host::publish(&Outgoing::new(format!("event/{}", event.kind), event.who.client_id.as_str()));
            match event.field("filter") {
                Some("kick/me") => drop(host::disconnect(&event.who.client_id, 0x98)),
                Some("ban/me") => drop(host::ban(&format!("client:{}", event.who.client_id), 60, "as told")),
                Some("revoke/me") => drop(host::revoke(&event.who.client_id)),
                _ => {}
            }
        }
    }
}

impl Cluster for Probe {
    fn interest_changed(&self, added: &[String], removed: &[String]) -> Result<Vec<u8>, String> {
        self.wait();
        Ok(format!("{} {}", added.join(","), removed.join(",")).into_bytes())
    }

    fn peer_interest(&self, node: &str, advert: &[u8]) -> Result<(), String> {
        host::info(&format!("{node}: {}", String::from_utf8_lossy(advert)));
        Ok(())
    }

    fn peer_changed(&self, _node: &str, _up: bool, _labels: &[Pair]) {}

    fn route_for(&self, topics: &[String]) -> Result<Vec<LeasedRoute>, String> {
        Ok(topics.iter().map(|_| LeasedRoute { to: Route::Everywhere, scope: String::new(), ttl: 60 }).collect())
    }
}

impl Handover for Probe {
    fn snapshot(&self) -> Result<State, String> {
        if self.is("snapshot", "fail") {
            return Err("as told".into());
        }
        Ok(State { schema: 1, bytes: self.seen.get().to_le_bytes().to_vec() })
    }

    fn restore(&self, old: State) -> Result<(), String> {
        if self.is("restore", "fail") {
            return Err("as told".into());
        }
        let bytes = old.bytes.try_into().map_err(|_| "not four bytes".to_owned())?;
        self.seen.set(u32::from_le_bytes(bytes));
        host::info(&format!("restored {}", self.seen.get()));
        Ok(())
    }
}

wasmqtt_sdk::export_plugin!(Probe: acl, storage_hook, events, cluster, handover);
