//! Earlier versions of components, for going back to them.

use std::path::PathBuf;
use std::time::SystemTime;

use tracing::debug;

use crate::HostError;
use crate::cache::digest;
use crate::source::{COMPONENT_BYTES_MAX, read_file};

/// Versions that are kept of each plugin; the oldest go first.
const VERSIONS_MAX: usize = 5;

/// `NAME/DIGEST.wasm`, the time of the file being when it last began to serve.
#[derive(Clone)]
pub(crate) struct Versions {
    dir: PathBuf,
}

impl Versions {
    pub(crate) fn new(dir: PathBuf) -> Self {
        Self { dir }
    }

    /// A build of it begins to serve. That it cannot be kept is no reason not to serve it.
    pub(crate) fn keep(&self, name: &str, digest: &str, bytes: &[u8]) {
        let folder = self.dir.join(name);
        let kept = wasmqtt_files::make_private_folder(&folder)
            .and_then(|()| wasmqtt_files::write_whole(&folder.join(format!("{digest}.wasm")), bytes, 0o600));
        if let Err(error) = kept {
            debug!(plugin = name, %error, "version not kept");
        }
        for (path, ..) in self.list(name).into_iter().skip(VERSIONS_MAX) {
            let _ = std::fs::remove_file(path);
        }
    }

    /// Digests of what is kept, the last to serve first.
    pub(crate) fn digests(&self, name: &str) -> Vec<String> {
        self.list(name).into_iter().map(|(_, digest, _)| digest).collect()
    }

    fn list(&self, name: &str) -> Vec<(PathBuf, String, SystemTime)> {
        let entries = std::fs::read_dir(self.dir.join(name));
        let version = |entry: std::fs::DirEntry| {
            let path = entry.path();
            let digest = path.file_name()?.to_str()?.strip_suffix(".wasm")?.to_owned();
            let at = entry.metadata().and_then(|file| file.modified()).ok()?;
            Some((path, digest, at))
        };
        let mut found: Vec<_> = entries.into_iter().flatten().flatten().filter_map(version).collect();
        found.sort_by_key(|(_, _, at)| std::cmp::Reverse(*at));
        found
    }

    /// The last version before `serving`, or the one whose digest begins with `wanted`.
    pub(crate) fn find(&self, name: &str, serving: &str, wanted: Option<&str>) -> Result<Vec<u8>, HostError> {
        let fits = |digest: &str| wanted.map_or(digest != serving, |wanted| digest.starts_with(wanted));
        let list = self.list(name);
        let Some((path, known, _)) = list.iter().find(|(_, digest, _)| fits(digest)) else {
            let kept: Vec<&str> = list.iter().map(|(_, digest, _)| &digest[..digest.len().min(12)]).collect();
            return Err(HostError::new(format!(
                "no such earlier version of {name:?} is kept; there are: {}",
                kept.join(", ")
            )));
        };
        let bytes = read_file(path, COMPONENT_BYTES_MAX)?;
        if digest(&bytes) != *known {
            return Err(HostError::new(format!("{} is damaged", path.display())));
        }
        Ok(bytes)
    }
}
