//! The plugin host, as the settings want it, and `plugin inspect`.

use std::fmt::Write as _;
use std::path::Path;
use std::sync::Arc;

use anyhow::Context;
use wasmqtt_host::{Cancel, Compiler, HostConfig, PluginHost};
use wasmqtt_protocol::ports::{Buckets, NoPlugins, Plugins};
use wasmqtt_protocol::text::escaped;
use wasmqtt_store::RocksStore;

use crate::settings::Settings;

/// Compiled components, below `data_dir`.
pub(crate) const CACHE_FOLDER: &str = "plugin-cache";
/// What tells them from what others put there. Beside the folder, so that nobody who is given that has the key as well.
const CACHE_KEY: &str = "plugin-cache.key";

/// Loads every plugin of the settings; `None` if there can be none, and then there is no Wasm runtime either.
/// `stop` gives the start up.
pub(crate) fn start(
    settings: &Settings,
    store: Option<&Arc<RocksStore>>,
    stop: Cancel,
) -> anyhow::Result<Option<Arc<PluginHost>>> {
    if settings.plugin_dir.is_none() && settings.plugins.is_empty() {
        return Ok(None);
    }
    let config = HostConfig {
        dir: settings.plugin_dir.clone(),
        plugins: settings.plugins.clone(),
        cache_dir: settings.data_dir.join(CACHE_FOLDER),
        shards: match settings.shards {
            0 => std::thread::available_parallelism().map_or(1, usize::from),
            shards => shards,
        },
        cache_key: Some(settings.data_dir.join(CACHE_KEY)),
        compile_limits: settings.compile.limits,
        compile_at_once: match settings.compile.at_once {
            0 => std::thread::available_parallelism().map_or(1, usize::from),
            at_once => at_once,
        },
        stop,
        buckets: store.map(|store| Arc::clone(store) as Arc<dyn Buckets>),
        ..HostConfig::default()
    };
    Ok(Some(PluginHost::start(config).context("load plugins")?))
}

/// What the server asks.
pub(crate) fn port(host: Option<&Arc<PluginHost>>) -> Arc<dyn Plugins> {
    match host {
        Some(host) => Arc::clone(host) as Arc<dyn Plugins>,
        None => Arc::new(NoPlugins),
    }
}

/// What `plugin inspect` prints.
pub(crate) fn inspect(file: &Path, json: bool) -> anyhow::Result<String> {
    let cache = tempfile::tempdir().context("make a folder for the compiled component")?;
    let inspection = wasmqtt_host::inspect(file, &Compiler::default(), cache.path());
    let inspection = inspection.with_context(|| format!("inspect {}", file.display()))?;
    if json {
        return crate::output::json(&inspection);
    }
    let mut text = format!("{}: {} bytes\n", file.display(), inspection.size);
    for (title, names) in
        [("plug-points", &inspection.plug_points), ("exports", &inspection.exports), ("imports", &inspection.imports)]
    {
        let _ = writeln!(text, "{title}:");
        for name in names {
            let _ = writeln!(text, "  {}", escaped(name, 1024));
        }
        if names.is_empty() {
            text.push_str("  none\n");
        }
    }
    Ok(text)
}
