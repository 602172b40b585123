//! Files and folders that the operator grants to a plugin.
//!
//! A folder is opened as it is. A single file lies beside others that are nobody's business, so the plugin gets a
//! folder made for it with a copy in it; the loader renews that by loading the plugin again when the file changes.

use std::io::Read as _;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use wasmtime::Engine;
use wasmtime::component::types::{self, ComponentExtern, ComponentItem};
use wasmtime_wasi::{FsPerms, WasiCtxBuilder};

use crate::HostError;
use crate::config::{FileGrant, Grants, Mode};
use crate::source;

/// Bytes of a granted single file.
pub(crate) const FILE_BYTES_MAX: u64 = 64 << 20;

/// A folder of the host under a name of the guest.
struct Mount {
    host: PathBuf,
    guest: String,
    mode: Mode,
}

/// What one generation may reach.
#[derive(Default)]
pub(crate) struct Mounts {
    mounts: Vec<Mount>,
    /// Folders of copies; removed when the last instance is gone.
    made: Vec<PathBuf>,
}

impl Mounts {
    /// Opens grants for one generation; copies of single files go to new folders in `dir`.
    pub(crate) fn new(grants: &[FileGrant], dir: &Path) -> Result<Self, HostError> {
        let mut mounts = Self::default();
        for grant in grants {
            let added = if grant.host.is_dir() { mounts.add_folder(grant) } else { mounts.add_file(grant, dir) };
            added.map_err(|error| HostError::new(format!("grant {}: {error}", grant.host.display())))?;
        }
        Ok(mounts)
    }

    fn add_folder(&mut self, grant: &FileGrant) -> Result<(), String> {
        self.add(Mount { host: grant.host.clone(), guest: grant.guest.clone(), mode: grant.mode })
    }

    fn add(&mut self, mount: Mount) -> Result<(), String> {
        if self.mounts.iter().any(|other| other.guest == mount.guest) {
            return Err(format!("the plugin has {} already", mount.guest));
        }
        self.mounts.push(mount);
        Ok(())
    }

    fn add_file(&mut self, grant: &FileGrant, dir: &Path) -> Result<(), String> {
        if grant.mode == Mode::Write {
            return Err("a single file can only be read; grant its folder to let the plugin write".into());
        }
        let guest = Path::new(&grant.guest);
        let Some(name) = guest.file_name() else { return Err(format!("{:?} is no name for a file", grant.guest)) };
        let folder = match guest.parent().map(|folder| folder.to_string_lossy().into_owned()) {
            Some(folder) if !folder.is_empty() => folder,
            _ => "/".to_owned(),
        };
        let known = self.mounts.iter().find(|mount| mount.guest == folder && self.made.contains(&mount.host));
        let alone = if let Some(mount) = known {
            mount.host.clone()
        } else {
            let alone = new_folder(dir).map_err(|error| error.to_string())?;
            self.made.push(alone.clone());
            self.add(Mount { host: alone.clone(), guest: folder, mode: Mode::Read })?;
            alone
        };
        copy(&grant.host, &alone.join(name)).map_err(|error| error.to_string())
    }

    /// Opens them for an instance.
    pub(crate) fn open(&self, wasi: &mut WasiCtxBuilder) -> Result<(), String> {
        for Mount { host, guest, mode } in &self.mounts {
            let perms = if *mode == Mode::Read { FsPerms::ReadOnly } else { FsPerms::ReadWrite };
            wasi.preopened_dir(host, guest, perms).map_err(|error| format!("grant {}: {error:#}", host.display()))?;
        }
        Ok(())
    }
}

impl Drop for Mounts {
    fn drop(&mut self) {
        for folder in &self.made {
            let _ = std::fs::remove_dir_all(folder);
        }
    }
}

/// Functions of the broker that a component imports.
pub(crate) fn host_functions(ty: &types::Component, engine: &Engine) -> Vec<String> {
    let host = ty.imports(engine).find(|(name, _)| name.starts_with("wasmqtt:plugin/host@"));
    let Some((_, ComponentExtern { ty: ComponentItem::ComponentInstance(host), .. })) = host else { return Vec::new() };
    host.exports(engine).map(|(function, _)| function.to_owned()).collect()
}

/// Every function of the broker that a component imports must be granted, or it is not loaded.
pub(crate) fn check_imports(ty: &types::Component, engine: &Engine, grants: &Grants) -> Result<(), HostError> {
    check_functions(&host_functions(ty, engine), grants)
}

/// The same for functions by name.
pub(crate) fn check_functions(functions: &[String], grants: &Grants) -> Result<(), HostError> {
    for function in functions {
        let (is_granted, example) = match function.as_str() {
            "publish" => (!grants.publish.is_empty(), "publish = [\"some/topic/#\"]"),
            "disconnect" => (grants.disconnect, "disconnect = true"),
            "ban" => (grants.ban, "ban = true"),
            "revoke" => (grants.revoke, "revoke = true"),
            _ => (true, ""),
        };
        if !is_granted {
            return Err(HostError::new(format!(
                "it imports the function `{function}` of the broker, which is not granted; its [[plugin]] entry needs \
                 grants = {{ {example} }}"
            )));
        }
    }
    Ok(())
}

/// `{process}-{number}`, so that what a killed broker left can be told from what is in use.
fn new_folder(dir: &Path) -> std::io::Result<PathBuf> {
    static NUMBER: AtomicU64 = AtomicU64::new(1);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let folder = dir.join(format!("{}-{number}", std::process::id()));
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&folder)?;
    Ok(folder)
}

/// Removes copies of brokers that were killed.
pub(crate) fn clean(dir: &Path) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let process = name.to_str().and_then(|name| name.split_once('-')).map(|(process, _)| process);
        if process.is_some_and(|process| !Path::new("/proc").join(process).exists()) {
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
}

fn copy(from: &Path, to: &Path) -> std::io::Result<()> {
    let (from, _) = source::open(from, FILE_BYTES_MAX)?;
    let mut to = std::fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(to)?;
    // It may have grown since its size was looked at.
    std::io::copy(&mut from.take(FILE_BYTES_MAX), &mut to).map(drop)
}
