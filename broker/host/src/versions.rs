//! Earlier versions of components, for going back to them.

use std::fs::OpenOptions;
use std::path::PathBuf;
use std::time::SystemTime;

use tracing::debug;

use crate::HostError;
use crate::cache::digest;
use crate::source::{COMPONENT_BYTES_MAX, read_file};

/// Versions that are kept of each plugin; the oldest go first.
const VERSIONS_MAX: usize = 5;

/// What the time of a version says that was on trial or on probation and did not get further. It is given to who names
/// it, and goes first.
const UNPROVEN: SystemTime = SystemTime::UNIX_EPOCH;

/// `NAME/DIGEST.wasm`, the time of the file being when it last began to serve everybody, or [`UNPROVEN`].
#[derive(Clone)]
pub(crate) struct Versions {
    dir: PathBuf,
}

impl Versions {
    pub(crate) fn new(dir: PathBuf) -> Self {
        Self { dir }
    }

    /// A build of it is there. That it cannot be kept is no reason not to serve it.
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

    /// It serves everybody from now on.
    pub(crate) fn serves(&self, name: &str, digest: &str) {
        self.set_time(name, digest, SystemTime::now());
    }

    /// It serves not everybody, or no longer, since it failed: nobody goes back to it by chance.
    pub(crate) fn is_unproven(&self, name: &str, digest: &str) {
        self.set_time(name, digest, UNPROVEN);
    }

    fn set_time(&self, name: &str, digest: &str, at: SystemTime) {
        let path = self.dir.join(name).join(format!("{digest}.wasm"));
        let set = OpenOptions::new().write(true).open(path).and_then(|file| file.set_modified(at));
        if let Err(error) = set {
            debug!(plugin = name, %error, "order of versions not kept");
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
        let fits = |digest: &str, at: SystemTime| match wanted {
            Some(wanted) => digest.starts_with(wanted),
            None => digest != serving && at != UNPROVEN,
        };
        let list = self.list(name);
        let Some((path, known, _)) = list.iter().find(|(_, digest, at)| fits(digest, *at)) else {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_goes_back_to_a_version_that_failed_unless_it_is_named() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let versions = Versions::new(folder.path().to_owned());
        let keep = |bytes: &[u8]| {
            // Times of files do not count finer than this.
            std::thread::sleep(std::time::Duration::from_millis(20));
            let digest = digest(bytes);
            versions.keep("p", &digest, bytes);
            digest
        };
        let found = |serving: &str, wanted: Option<&str>| versions.find("p", serving, wanted).ok();
        let (one, two, three) = (keep(b"1"), keep(b"2"), keep(b"3"));
        assert_eq!(found(&three, None).as_deref(), Some(&b"2"[..]));
        versions.is_unproven("p", &three);
        assert_eq!(found(&two, None).as_deref(), Some(&b"1"[..]));
        versions.is_unproven("p", &two);
        assert_eq!((found(&one, None), found(&one, Some(&three[..9]))), (None, Some(b"3".to_vec())));
        versions.serves("p", &two);
        assert_eq!(found(&one, None).as_deref(), Some(&b"2"[..]));
        // Failures do not push out what served.
        (4..20).for_each(|n: u8| versions.is_unproven("p", &keep(&[n])));
        assert_eq!(found(&two, None).as_deref(), Some(&b"1"[..]));
    }
}
