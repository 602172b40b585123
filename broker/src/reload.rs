//! The configuration is read again: what can change while the broker runs does, all of it or nothing.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::PathBuf;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use anyhow::Context;
use serde::{Deserialize, Serialize};
use tracing::{error, info};
use wasmqtt_host::{Cancel, PluginConfig, PluginHost, PluginLimits};
use wasmqtt_server::Reloader;

use crate::log::LogLevel;
use crate::serve::check_exposure;
use crate::settings::{self, Listen, Settings};

/// Where the settings come from: what the command line said.
#[derive(Debug, Clone)]
pub(crate) struct Origin {
    /// `None`: the defaults.
    pub(crate) file: Option<PathBuf>,
    /// Listeners that replace those of the file.
    pub(crate) listen: Vec<Listen>,
}

impl Origin {
    pub(crate) fn load(&self) -> anyhow::Result<Settings> {
        Ok(match &self.file {
            Some(file) => settings::load(file, &self.listen)?,
            None => settings::defaults(&self.listen)?,
        })
    }

    fn shown(&self) -> String {
        self.file.as_ref().map_or_else(|| "the defaults".to_owned(), |file| file.display().to_string())
    }
}

/// What a reload did.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Report {
    /// The file.
    pub(crate) from: String,
    /// In force now.
    pub(crate) changed: Vec<String>,
    /// In the file, and in force after a restart only.
    pub(crate) needs_restart: Vec<String>,
}

impl Report {
    /// For people.
    pub(crate) fn text(&self) -> String {
        let mut text = format!("read {}\n", self.from);
        for (title, lines) in [("changed", &self.changed), ("needs a restart", &self.needs_restart)] {
            if lines.is_empty() {
                continue;
            }
            let _ = writeln!(text, "{title}:");
            for line in lines {
                let _ = writeln!(text, "  {line}");
            }
        }
        if self.changed.is_empty() && self.needs_restart.is_empty() {
            text.push_str("nothing is different\n");
        }
        text
    }
}

/// The running broker, as far as its configuration goes.
pub(crate) struct Running {
    origin: Origin,
    /// In force.
    settings: Mutex<Settings>,
    server: Reloader,
    plugins: Option<Arc<PluginHost>>,
    log: LogLevel,
}

impl Running {
    pub(crate) fn new(
        origin: Origin,
        settings: Settings,
        server: Reloader,
        plugins: Option<Arc<PluginHost>>,
        log: LogLevel,
    ) -> Self {
        Self { origin, settings: Mutex::new(settings), server, plugins, log }
    }

    /// Reads the configuration again, and does what it says or nothing.
    ///
    /// # Errors
    /// The file is wrong, or something it names cannot be used; it was cancelled. Nothing has changed then.
    pub(crate) fn reload(&self, cancel: &Cancel) -> anyhow::Result<Report> {
        let mut settings = self.settings.lock().unwrap_or_else(PoisonError::into_inner);
        let reloaded = self.origin.load().and_then(|wanted| self.apply(&mut settings, wanted, cancel));
        match &reloaded {
            Ok(report) => {
                let (changed, needs_restart) = (report.changed.join("; "), report.needs_restart.join("; "));
                info!(from = report.from, changed, needs_restart, "configuration reloaded");
            }
            Err(why) => error!(error = format!("{why:#}"), "configuration not reloaded, nothing has changed"),
        }
        reloaded
    }

    fn apply(&self, settings: &mut Settings, wanted: Settings, cancel: &Cancel) -> anyhow::Result<Report> {
        let mut report = Report { from: self.origin.shown(), ..Report::default() };
        differences(settings, &wanted, &mut report)?;
        let wanted = Settings {
            data_dir: settings.data_dir.clone(),
            shards: settings.shards,
            store: settings.store.clone(),
            plugin_dir: settings.plugin_dir.clone(),
            compile: settings.compile,
            log: settings::Log { json: settings.log.json, ..wanted.log },
            ..wanted
        };
        let listeners = self.server.prepare(wanted.listeners.clone())?;
        let made = Settings { plugins: self.as_made(&settings.plugins, &wanted.plugins), ..wanted.clone() };
        let (now, later) = (plugin_differences(settings, &made)?, plugin_differences(&made, &wanted)?);
        let are_different = !now.is_empty() || !later.is_empty();
        let wanted = if self.plugins.is_some() || !are_different {
            made
        } else {
            let reason = "plugins: there were none at the start, so nothing is there to run them";
            report.needs_restart.push(reason.to_owned());
            Settings { plugins: settings.plugins.clone(), ..wanted }
        };
        self.reconfigure_plugins(settings, &wanted, are_different, cancel)?;
        // From here on nothing can fail: the level was checked with the file.
        let added = listeners.added();
        self.log.set(&wanted.log.level).context("set the log level")?;
        self.server.apply(listeners, wanted.limits.clone(), (wanted.anonymous, wanted.identity));
        report.changed.extend(added.into_iter().map(|name| format!("listener {name}: added")));
        if self.plugins.is_some() {
            report.changed.extend(now);
            report.needs_restart.extend(later);
        }
        *settings = wanted;
        Ok(report)
    }

    /// All of them serve as wanted and it is known who may connect, or everything is as before.
    fn reconfigure_plugins(
        &self,
        settings: &Settings,
        wanted: &Settings,
        are_different: bool,
        cancel: &Cancel,
    ) -> anyhow::Result<()> {
        let Some(plugins) = &self.plugins else { return check_exposure(wanted, false) };
        if are_different {
            plugins.reconfigure_with(wanted.plugins.clone(), cancel)?;
        }
        let checked = check_exposure(wanted, plugins.has_auth());
        if checked.is_err() && are_different {
            plugins.reconfigure(settings.plugins.clone())?;
        }
        checked
    }

    /// `wanted`, with the values in force of what is made once: the queue of a plugin outlives its builds, and is as large
    /// as it was made; and so are the rooms for instances.
    fn as_made(&self, now: &[PluginConfig], wanted: &[PluginConfig]) -> Vec<PluginConfig> {
        let mut made = wanted.to_vec();
        for plugin in &mut made {
            if let Some(made) = now.iter().find(|other| other.name == plugin.name) {
                let PluginLimits { feed_messages_max, feed_mib, feed_aside_mib, feed_tries, .. } = made.limits;
                plugin.limits =
                    PluginLimits { feed_messages_max, feed_mib, feed_aside_mib, feed_tries, ..plugin.limits };
            }
        }
        if let Some(plugins) = &self.plugins {
            plugins.fit(now, &mut made);
        }
        made
    }
}

/// Keys that a running broker takes over; the others need a restart.
fn is_tunable(key: &str) -> bool {
    key.starts_with("limits.") || key.starts_with("auth.") || key == "log.level"
}

/// Single values, and listeners but new ones, which have their real port when they are bound.
fn differences(old: &Settings, new: &Settings, report: &mut Report) -> anyhow::Result<()> {
    let (was, is) = (flat(old)?, flat(new)?);
    for key in was.keys().chain(is.keys().filter(|key| !was.contains_key(*key))) {
        let (was, is) = (was.get(key), is.get(key));
        if was == is {
            continue;
        }
        let shown = |value: Option<&String>| value.map_or_else(|| "not set".to_owned(), Clone::clone);
        let line = format!("{key}: {} -> {}", shown(was), shown(is));
        if is_tunable(key) { &mut report.changed } else { &mut report.needs_restart }.push(line);
    }
    for listener in &old.listeners {
        match new.listeners.iter().find(|other| other.name == listener.name) {
            None => report.changed.push(format!("listener {}: closed, its clients stay connected", listener.name)),
            Some(other) if other != listener => report.changed.push(format!("listener {}: changed", listener.name)),
            Some(_) => {}
        }
    }
    Ok(())
}

/// Keys and values but for those of listeners and plugins.
fn flat(settings: &Settings) -> anyhow::Result<BTreeMap<String, String>> {
    let mut table = toml::Table::try_from(settings.shown()).context("compare settings")?;
    table.remove("listener");
    table.remove("plugin");
    let mut values = BTreeMap::new();
    flatten("", toml::Value::Table(table), &mut values);
    Ok(values)
}

fn flatten(key: &str, value: toml::Value, values: &mut BTreeMap<String, String>) {
    match value {
        toml::Value::Table(table) => {
            for (name, value) in table {
                let key = if key.is_empty() { name } else { format!("{key}.{name}") };
                flatten(&key, value, values);
            }
        }
        value => _ = values.insert(key.to_owned(), value.to_string()),
    }
}

/// Plugins by name, with the keys that are different; no values, since there are secrets among them.
fn plugin_differences(old: &Settings, new: &Settings) -> anyhow::Result<Vec<String>> {
    let (was, is) = (by_name(old)?, by_name(new)?);
    let mut lines = Vec::new();
    for (name, plugin) in &was {
        let Some(other) = is.get(name) else {
            lines.push(format!("plugin {name}: removed"));
            continue;
        };
        let keys = plugin.keys().chain(other.keys().filter(|key| !plugin.contains_key(*key)));
        let changed: Vec<&str> = keys.filter(|key| plugin.get(*key) != other.get(*key)).map(String::as_str).collect();
        if !changed.is_empty() {
            lines.push(format!("plugin {name}: {}", changed.join(", ")));
        }
    }
    lines.extend(is.keys().filter(|name| !was.contains_key(*name)).map(|name| format!("plugin {name}: added")));
    Ok(lines)
}

fn by_name(settings: &Settings) -> anyhow::Result<BTreeMap<String, BTreeMap<String, String>>> {
    let mut table = toml::Table::try_from(settings.shown()).context("compare settings")?;
    let Some(toml::Value::Array(plugins)) = table.remove("plugin") else { return Ok(BTreeMap::new()) };
    let by_name = plugins.into_iter().zip(&settings.plugins).map(|(shown, plugin)| {
        let mut values = BTreeMap::new();
        flatten("", shown, &mut values);
        (plugin.name.clone(), values)
    });
    Ok(by_name.collect())
}

/// Reloads on a thread of its own, so that signals that come meanwhile are heard. A wish while another one waits is the
/// same wish.
pub(crate) fn on_wish(running: Arc<Running>) -> anyhow::Result<(SyncSender<()>, JoinHandle<()>)> {
    let (wish, wishes) = sync_channel(1);
    let serve = move || {
        for () in wishes {
            // It is in the log, and who wished it is not here to be told.
            let _ = running.reload(&Cancel::default());
        }
    };
    let thread = std::thread::Builder::new().name("reload".into()).spawn(serve);
    Ok((wish, thread.context("start a thread for reloads")?))
}
