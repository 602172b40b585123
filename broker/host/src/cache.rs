//! Compiled components on disk, so that a restart or a known build does not compile again.
//!
//! What lies there is run as native code. The folder belongs to the broker alone (mode 0700), and each file begins with
//! a code that only this broker can make: HMAC-SHA-256 over its name and the rest, with a key that lies elsewhere. A
//! file whose code does not fit, or that was made by another engine, is compiled anew.

use std::fmt::Write as _;
use std::fs::{DirBuilder, OpenOptions, Permissions};
use std::hash::{Hash, Hasher};
use std::io::Write as _;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use hmac::{Hmac, KeyInit, Mac};
use sha2::{Digest, Sha256};
use tracing::{debug, warn};
use wasmtime::Engine;
use wasmtime::component::Component;

use crate::HostError;
use crate::instance::one_line;
use crate::source::read_file;

const DIGEST_BYTES: usize = 32;
/// A block of SHA-256: a longer key would be hashed, and a shorter one filled up.
const KEY_BYTES: usize = 64;
/// Compiled components that are kept; the oldest go first.
const ENTRIES_MAX: usize = 128;
/// Bytes of an entry that is looked at: the largest that the settings allow to be compiled.
const ENTRY_BYTES_MAX: u64 = 16 << 30;

/// SHA-256 in hexadecimal.
pub(crate) fn digest(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().fold(String::with_capacity(2 * DIGEST_BYTES), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// With what entries are authenticated.
type Key = [u8; KEY_BYTES];

pub(crate) struct Cache {
    dir: PathBuf,
    key: Key,
}

impl Cache {
    /// Opens the folder, and makes it private if it is new. `key`: a file, which is made when it is not there; without
    /// one, entries are of use to this process only.
    pub(crate) fn open(dir: &Path, key: Option<&Path>) -> Result<Self, HostError> {
        let failed = |error| HostError::new(format!("plugin cache {}: {error}", dir.display()));
        DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(failed)?;
        std::fs::set_permissions(dir, Permissions::from_mode(0o700)).map_err(failed)?;
        let key = key.map_or_else(process_key, read_key)?;
        Ok(Self { dir: dir.to_owned(), key })
    }

    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// What was compiled from the component with this digest.
    pub(crate) fn load(&self, engine: &Engine, digest: &str) -> Option<Component> {
        let name = entry_name(engine, digest);
        let path = self.dir.join(&name);
        if !path.exists() {
            return None;
        }
        let bytes = read_file(&path, ENTRY_BYTES_MAX).ok()?;
        let (code, compiled) = bytes.split_at_checked(DIGEST_BYTES)?;
        if self.mac(&name, compiled).verify_slice(code).is_err() {
            warn!(path = %path.display(), "a compiled component that this broker did not make is compiled anew");
            return None;
        }
        deserialize(engine, compiled).ok()
    }

    /// Loads what was compiled just now, and keeps it.
    pub(crate) fn keep(&self, engine: &Engine, digest: &str, compiled: &[u8]) -> Result<Component, HostError> {
        let component = deserialize(engine, compiled)
            .map_err(|error| HostError::new(format!("it cannot be loaded: {}", one_line(&error))))?;
        let name = entry_name(engine, digest);
        let path = self.dir.join(&name);
        if let Err(error) = self.store(&path, &name, compiled) {
            debug!(path = %path.display(), %error, "compiled component not kept");
        }
        self.prune();
        Ok(component)
    }

    /// Covers the name too: one entry copied over another is as wrong as a damaged one.
    fn mac(&self, name: &str, compiled: &[u8]) -> Hmac<Sha256> {
        Hmac::<Sha256>::new(&self.key.into()).chain_update(name).chain_update([0]).chain_update(compiled)
    }

    fn store(&self, path: &Path, name: &str, compiled: &[u8]) -> std::io::Result<()> {
        static NUMBER: AtomicU64 = AtomicU64::new(1);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let temporary = path.with_extension(format!("tmp{}-{number}", std::process::id()));
        let mut options = OpenOptions::new();
        let stored =
            options.write(true).create(true).truncate(true).mode(0o600).open(&temporary).and_then(|mut file| {
                file.write_all(&self.mac(name, compiled).finalize().into_bytes())?;
                file.write_all(compiled)?;
                file.sync_all()?;
                std::fs::rename(&temporary, path)
            });
        if stored.is_err() {
            let _ = std::fs::remove_file(&temporary);
        }
        stored
    }

    fn prune(&self) {
        let entries = std::fs::read_dir(&self.dir).into_iter().flatten().flatten();
        let is_ours = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "cwasm");
        let with_age = |path: PathBuf| Some((std::fs::metadata(&path).ok()?.modified().ok()?, path));
        let mut entries: Vec<_> = entries.map(|entry| entry.path()).filter(is_ours).filter_map(with_age).collect();
        entries.sort();
        for (_, path) in entries.iter().take(entries.len().saturating_sub(ENTRIES_MAX)) {
            let _ = std::fs::remove_file(path);
        }
    }
}

fn entry_name(engine: &Engine, digest: &str) -> String {
    format!("{digest}-{:016x}.cwasm", compatibility(engine))
}

/// The same for all hosts of this process.
fn process_key() -> Result<Key, HostError> {
    static KEY: OnceLock<Option<Key>> = OnceLock::new();
    KEY.get_or_init(|| new_key().ok()).ok_or_else(|| HostError::new("the system has no random numbers for a key"))
}

fn new_key() -> Result<Key, HostError> {
    let mut key = [0; KEY_BYTES];
    getrandom::fill(&mut key).map_err(|error| HostError::new(format!("no random numbers for a key: {error}")))?;
    Ok(key)
}

/// Reads the key, or makes one: then nothing in the cache fits any more, which costs time and nothing else.
fn read_key(path: &Path) -> Result<Key, HostError> {
    let failed = |error: std::io::Error| HostError::new(format!("key of the plugin cache {}: {error}", path.display()));
    if path.exists() {
        let found = read_file(path, 1024)?;
        std::fs::set_permissions(path, Permissions::from_mode(0o600)).map_err(failed)?;
        if let Ok(key) = Key::try_from(found) {
            return Ok(key);
        }
        warn!(path = %path.display(), "the key of the plugin cache is damaged, another one is made");
    }
    let key = new_key()?;
    let new = path.with_extension("new");
    let mut options = OpenOptions::new();
    options
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&new)
        .and_then(|mut file| {
            file.write_all(&key)?;
            file.sync_all()
        })
        .and_then(|()| std::fs::rename(&new, path))
        .map_err(failed)?;
    Ok(key)
}

pub(crate) fn compatibility(engine: &Engine) -> u64 {
    let mut hasher = std::hash::DefaultHasher::new();
    engine.precompile_compatibility_hash().hash(&mut hasher);
    // Two releases of ours may link wasmtime differently patched.
    env!("CARGO_PKG_VERSION").hash(&mut hasher);
    hasher.finish()
}

#[allow(unsafe_code, reason = "loading compiled code cannot be checked by the compiler")]
fn deserialize(engine: &Engine, compiled: &[u8]) -> wasmtime::Result<Component> {
    // SAFETY: `compiled` was made by `Engine::precompile_component` of this program: just now, or earlier, and then it
    // carries a code that nobody can make who cannot read the key. wasmtime checks that its own version and settings fit.
    unsafe { Component::deserialize(engine, compiled) }
}
