//! Files and folders that no plugin may be granted: with them it could change what the broker trusts.

use std::path::{Path, PathBuf};

use wasmqtt_host::{Mode, PluginConfig};

use super::read::{Section, Text};

/// A grant as it is written, and what it means.
pub(super) struct Granted<'a> {
    pub(super) section: Section<'a>,
    pub(super) host: Text<'a>,
    pub(super) path: PathBuf,
    pub(super) mode: Mode,
}

/// What the broker trusts, with links resolved.
#[derive(Debug, Default)]
pub(super) struct Protected {
    /// No plugin writes in these, above or below them.
    from_writing: Vec<(PathBuf, &'static str)>,
    /// No plugin reads in these, above or below them.
    from_reading: Vec<(PathBuf, &'static str)>,
    /// Files in it, such as keys, are the broker's own; folders in it may be somebody else's.
    data_dir: PathBuf,
}

impl Protected {
    /// `file`: the configuration, if there is one.
    pub(super) fn new(file: Option<&Path>, data_dir: &Path, plugin_dir: Option<&Path>, store: Option<&Path>) -> Self {
        let mut protected = Self { data_dir: resolved(data_dir), ..Self::default() };
        protected.protect(data_dir, "data_dir, where the broker keeps its own");
        if let Some(store) = store {
            protected.protect(store, "the store");
            protected.forbid_reading(store, "the store, which has the messages of all clients");
        }
        protected.forbid_reading(&data_dir.join(crate::plugins::CACHE_FOLDER), "the cache of compiled plugins");
        protected.forbid_reading(&data_dir.join(crate::control::SOCKET), "the socket of `wasmqtt ctl`");
        if let Some(dir) = plugin_dir {
            protected.protect(dir, "the plugin folder");
        }
        if let Some(file) = file {
            protected.protect(file, "the configuration file");
        }
        protected
    }

    /// Components of plugins, and single files that plugins read: passwords, rules, keys.
    pub(super) fn protect_plugins(&mut self, plugins: &[PluginConfig], granted: &[Granted<'_>]) {
        for plugin in plugins {
            self.protect(&plugin.path, "the component of a plugin");
        }
        for Granted { path, .. } in
            granted.iter().filter(|granted| granted.mode == Mode::Read && granted.path.is_file())
        {
            self.protect(path, "a file that a plugin trusts");
        }
    }

    fn protect(&mut self, path: &Path, what: &'static str) {
        self.from_writing.push((resolved(path), what));
    }

    fn forbid_reading(&mut self, path: &Path, what: &'static str) {
        self.from_reading.push((resolved(path), what));
    }

    /// Reports a grant that reaches what is protected.
    pub(super) fn check(&self, granted: &Granted<'_>) {
        let Granted { section, host, path, mode } = granted;
        let granted = resolved(path);
        let reaches = |list: &'_ [(PathBuf, &'static str)]| {
            let overlaps = |own: &Path| own.starts_with(&granted) || granted.starts_with(own);
            list.iter().find(|(own, _)| overlaps(own)).map(|(own, what)| format!("{what} ({})", own.display()))
        };
        let found = match mode {
            Mode::Read if path.is_file() && granted.parent() == Some(self.data_dir.as_path()) => {
                Some("no plugin may read files of data_dir, which are the broker's own".to_owned())
            }
            Mode::Read => reaches(&self.from_reading).map(|what| format!("no plugin may read {what}")),
            Mode::Write => reaches(&self.from_writing).map(|what| format!("no plugin may write to {what}")),
        };
        if let Some(what) = found {
            section.problem(host, &format!("{what}: grant a folder of the plugin's own"));
        }
    }
}

/// Without links and `..`, also if the last parts of it do not exist yet.
fn resolved(path: &Path) -> PathBuf {
    let mut missing = Vec::new();
    let mut there = path;
    loop {
        if let Ok(real) = there.canonicalize() {
            return missing.iter().rev().fold(real, |path, part| path.join(part));
        }
        match (there.parent(), there.file_name()) {
            (Some(parent), Some(name)) => {
                missing.push(name.to_owned());
                there = parent;
            }
            _ => return path.to_owned(),
        }
    }
}
