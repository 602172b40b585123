//! Compiled components on disk, so that a restart or a known build does not compile again.
//!
//! The folder belongs to the broker alone (mode 0700): what lies there is run as native code. Each file begins with
//! the SHA-256 of its name and the rest; one that does not fit, or was made by another engine, is compiled anew.

use std::fmt::Write as _;
use std::hash::{Hash, Hasher};
use std::io::Write as _;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use tracing::debug;
use wasmtime::Engine;
use wasmtime::component::Component;

use crate::HostError;
use crate::instance::one_line;

const DIGEST_BYTES: usize = 32;
/// Compiled components that are kept; the oldest go first.
const ENTRIES_MAX: usize = 64;

/// SHA-256 in hexadecimal.
pub(crate) fn digest(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().fold(String::with_capacity(2 * DIGEST_BYTES), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

pub(crate) struct Cache {
    dir: PathBuf,
}

impl Cache {
    /// Opens the folder, and makes it private if it is new.
    pub(crate) fn open(dir: &Path) -> Result<Self, HostError> {
        let failed = |error| HostError::new(format!("plugin cache {}: {error}", dir.display()));
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(failed)?;
        std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o700)).map_err(failed)?;
        Ok(Self { dir: dir.to_owned() })
    }

    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// The compiled component, and whether it came from the cache.
    pub(crate) fn component(
        &self,
        engine: &Engine,
        bytes: &[u8],
        digest: &str,
    ) -> Result<(Component, bool), HostError> {
        let name = format!("{digest}-{:016x}.cwasm", compatibility(engine));
        let path = self.dir.join(&name);
        if let Some(component) = load(engine, &path, &name) {
            return Ok((component, true));
        }
        let compiled = engine
            .precompile_component(bytes)
            .map_err(|error| HostError::new(format!("not a component that can be used: {}", one_line(&error))))?;
        if let Err(error) = store(&path, &name, &compiled) {
            debug!(path = %path.display(), %error, "compiled component not kept");
        }
        self.prune();
        let component = deserialize(engine, &compiled).map_err(|error| HostError::new(format!("{error:#}")))?;
        Ok((component, false))
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

fn compatibility(engine: &Engine) -> u64 {
    let mut hasher = std::hash::DefaultHasher::new();
    engine.precompile_compatibility_hash().hash(&mut hasher);
    // Two releases of ours may link wasmtime differently patched.
    env!("CARGO_PKG_VERSION").hash(&mut hasher);
    hasher.finish()
}

/// Covers the name too: one entry copied over another is as wrong as a damaged one.
fn seal(name: &str, compiled: &[u8]) -> [u8; DIGEST_BYTES] {
    Sha256::new().chain_update(name).chain_update(compiled).finalize().into()
}

fn load(engine: &Engine, path: &Path, name: &str) -> Option<Component> {
    let bytes = std::fs::read(path).ok()?;
    let (sum, compiled) = bytes.split_at_checked(DIGEST_BYTES)?;
    if seal(name, compiled) != sum {
        debug!(path = %path.display(), "damaged cache entry is ignored");
        return None;
    }
    deserialize(engine, compiled).ok()
}

#[allow(unsafe_code, reason = "loading compiled code cannot be checked by the compiler")]
fn deserialize(engine: &Engine, compiled: &[u8]) -> wasmtime::Result<Component> {
    // SAFETY: `compiled` was made by `Engine::precompile_component`: just now, or earlier by this broker, which alone
    // can write to the cache folder; its digest was checked, and wasmtime checks that its own version and settings fit.
    unsafe { Component::deserialize(engine, compiled) }
}

fn store(path: &Path, name: &str, compiled: &[u8]) -> std::io::Result<()> {
    let temporary = path.with_extension(format!("tmp{}", std::process::id()));
    let mut options = std::fs::OpenOptions::new();
    let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
    file.write_all(&seal(name, compiled))?;
    file.write_all(compiled)?;
    file.sync_all()?;
    std::fs::rename(&temporary, path)
}
