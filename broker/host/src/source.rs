//! Reading the files that a plugin is made from: its component, and single files that were granted to it.
//!
//! Others may be able to write to the folder, so nothing here trusts a name: only regular files are read, opening one
//! does not wait (a FIFO would), and its size is looked at before its content.

use std::fs::{File, Metadata, OpenOptions};
use std::io::Read;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use rustix::fs::OFlags;

use crate::HostError;
use crate::cache;
use crate::config::PluginConfig;
use crate::grants::FILE_BYTES_MAX;

/// Bytes a component file may have.
pub(crate) const COMPONENT_BYTES_MAX: u64 = 64 << 20;
/// A file that was changed so short a time ago may still be written to.
const WRITING: Duration = Duration::from_millis(300);
/// A file that was changed so short a time ago may change again without another time: file systems count in steps of up
/// to two seconds.
const SETTLED: Duration = Duration::from_secs(2);

/// Reads a whole regular file, or refuses it when it is something else or too large. Links are followed.
///
/// # Errors
/// It cannot be read; it is a FIFO, a device, a socket or a folder; it has more than `bytes_max` bytes.
pub fn read_file(path: &Path, bytes_max: u64) -> Result<Vec<u8>, HostError> {
    let failed = |error: std::io::Error| HostError::new(format!("cannot read {}: {error}", path.display()));
    let (file, bytes) = open(path, bytes_max).map_err(failed)?;
    let mut content = Vec::with_capacity(bytes as usize);
    // It may have grown since its size was looked at.
    file.take(bytes_max + 1).read_to_end(&mut content).map_err(failed)?;
    if content.len() as u64 > bytes_max {
        return Err(failed(too_large(content.len() as u64, bytes_max)));
    }
    Ok(content)
}

/// Opens a regular file of at most `bytes_max` bytes, without waiting for anybody; gives its size too.
pub(crate) fn open(path: &Path, bytes_max: u64) -> std::io::Result<(File, u64)> {
    // Looked at twice: opening a device may already have an effect, and the name may be another file by then.
    check_regular(&std::fs::metadata(path)?)?;
    let file = OpenOptions::new().read(true).custom_flags(OFlags::NONBLOCK.bits().cast_signed()).open(path)?;
    let found = file.metadata()?;
    check_regular(&found)?;
    if found.len() > bytes_max {
        return Err(too_large(found.len(), bytes_max));
    }
    Ok((file, found.len()))
}

fn check_regular(found: &Metadata) -> std::io::Result<()> {
    let kind = found.file_type();
    let what = match () {
        () if kind.is_file() => return Ok(()),
        () if kind.is_dir() => "a folder",
        () if kind.is_fifo() => "a FIFO",
        () if kind.is_socket() => "a socket",
        () => "a device",
    };
    Err(std::io::Error::other(format!("it is {what}, not a regular file")))
}

fn too_large(bytes: u64, bytes_max: u64) -> std::io::Error {
    std::io::Error::other(format!("it has {bytes} bytes; at most {bytes_max} are allowed"))
}

/// What tells one state of a file from another without reading it; `None`: there is none.
///
/// Of the file that a name leads to: a link that points elsewhere, or a target that was replaced, is another one.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Stamp(Option<State>);

#[derive(Clone, Copy, PartialEq, Eq)]
struct State {
    device: u64,
    inode: u64,
    bytes: u64,
    /// Seconds and nanoseconds. The time of the last change of the inode cannot be set by anybody who writes.
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
    fn of(path: &Path) -> Self {
        let state = |found: Metadata| State {
            device: found.dev(),
            inode: found.ino(),
            bytes: found.len(),
            modified: (found.mtime(), found.mtime_nsec()),
            changed: (found.ctime(), found.ctime_nsec()),
        };
        Self(std::fs::metadata(path).ok().map(state))
    }

    /// Another content would have another stamp.
    fn is_settled(self, now: Duration) -> bool {
        self.0.is_none_or(|state| {
            // Whatever changes the content changes this time too, and nobody can set it, to next year for instance.
            u64::try_from(state.changed.0).is_ok_and(|last| Duration::from_secs(last + 1) + SETTLED <= now)
        })
    }
}

/// The state of all files of a plugin and its settings, and what is made from that.
pub(crate) struct Seen {
    stamps: Vec<Stamp>,
    settings: String,
    made_from: String,
}

/// `made_from` is what a build is made from, or what is wrong with that.
pub(crate) struct Source {
    /// `None`: not read, since nothing has changed.
    pub(crate) bytes: Option<Result<Bytes, HostError>>,
    /// SHA-256 of the bytes, if there are any.
    pub(crate) digest: String,
    pub(crate) made_from: String,
}

impl Source {
    /// Looks at the files, and reads them only if they are others than those that were `seen`.
    pub(crate) fn look(config: &PluginConfig, seen: &mut Option<Seen>) -> Self {
        let stamps = stamps(config);
        let settings = config.fingerprint();
        if let Some(seen) = seen.as_ref().filter(|seen| seen.stamps == stamps && seen.settings == settings) {
            return Self { bytes: None, digest: String::new(), made_from: seen.made_from.clone() };
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let source = Self::read(config);
        let is_settled = stamps.iter().all(|stamp| stamp.is_settled(now));
        *seen = is_settled.then(|| Seen { stamps, settings, made_from: source.made_from.clone() });
        source
    }

    pub(crate) fn read(config: &PluginConfig) -> Self {
        match read_file(&config.path, COMPONENT_BYTES_MAX) {
            Ok(bytes) => {
                let digest = cache::digest(&bytes);
                Self::of(config, bytes.into(), digest)
            }
            Err(error) => Self { made_from: error.to_string(), digest: String::new(), bytes: Some(Err(error)) },
        }
    }

    /// `digest`: of these bytes.
    pub(crate) fn of(config: &PluginConfig, bytes: Bytes, digest: String) -> Self {
        let bytes = check_pin(config, &digest).map(|()| bytes);
        let made_from = match &bytes {
            Ok(_) => config.files.iter().fold(build_of(config, &digest), |made_from, grant| {
                let file = if grant.host.is_dir() { Ok(Vec::new()) } else { read_file(&grant.host, FILE_BYTES_MAX) };
                let file = file.map_or_else(|error| error.to_string(), |file| cache::digest(&file));
                format!("{made_from}-{file}")
            }),
            Err(error) => error.to_string(),
        };
        Self { bytes: Some(bytes), digest, made_from }
    }
}

fn stamps(config: &PluginConfig) -> Vec<Stamp> {
    let granted = config.files.iter().filter(|grant| !grant.host.is_dir()).map(|grant| &grant.host);
    std::iter::once(&config.path).chain(granted).map(|path| Stamp::of(path)).collect()
}

/// Another component, or other settings, is another build.
fn build_of(config: &PluginConfig, digest: &str) -> String {
    format!("{digest}-{}", config.fingerprint())
}

fn check_pin(config: &PluginConfig, digest: &str) -> Result<(), HostError> {
    match &config.sha256 {
        Some(pin) if !pin.eq_ignore_ascii_case(digest) => {
            Err(HostError::new(format!("its SHA-256 is {digest}, but the configuration says sha256 = {pin:?}")))
        }
        _ => Ok(()),
    }
}

/// It was changed just now, and may still be written to.
pub(crate) fn is_young(path: &Path) -> bool {
    let changed = std::fs::metadata(path).and_then(|file| file.modified());
    changed.is_ok_and(|at| at.elapsed().is_ok_and(|age| age < WRITING))
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::config::{FileGrant, Mode};
    use crate::grants::Mounts;

    fn plugin(folder: &Path) -> PluginConfig {
        let files = vec![FileGrant { host: folder.join("users"), guest: "/users".into(), mode: Mode::Read }];
        PluginConfig { name: "p".into(), path: folder.join("p.wasm"), files, ..PluginConfig::default() }
    }

    /// As long ago as `touch -d` says.
    fn age(path: &Path) {
        let file = OpenOptions::new().write(true).open(path).expect("is there");
        file.set_modified(UNIX_EPOCH + Duration::from_secs(1_000_000)).expect("can set the time");
    }

    #[test]
    fn only_regular_files_of_bounded_size_are_read_and_none_is_waited_for() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("x.wasm");
        let refused = |why: &str| {
            let begun = Instant::now();
            let error = read_file(&path, 1 << 20).expect_err("is refused").to_string();
            assert!(error.contains(why) && error.contains("x.wasm"), "{error}");
            assert!(begun.elapsed() < Duration::from_secs(5), "{why}");
        };
        rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, 0o600.into(), 0).expect("can make one");
        refused("a FIFO");
        std::fs::remove_file(&path).expect("can remove");
        let socket = std::os::unix::net::UnixListener::bind(&path).expect("can bind");
        refused("a socket");
        drop(socket);
        std::fs::remove_file(&path).expect("can remove");
        std::os::unix::fs::symlink("/dev/zero", &path).expect("can link");
        refused("a device");
        std::fs::remove_file(&path).expect("can remove");
        File::create(&path).and_then(|file| file.set_len(10 << 30)).expect("a sparse file");
        refused("10737418240 bytes; at most 1048576 are allowed");
        std::fs::write(&path, "x").expect("can write");
        assert_eq!(read_file(&path, 1).expect("is read"), b"x");
    }

    /// Both bounds of a plugin's files: a byte more is refused, and what is refused is not read.
    #[test]
    fn components_and_granted_files_are_bounded_in_bytes() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let config = plugin(folder.path());
        let copies = folder.path().join("copies");
        let make = |path: &Path, bytes: u64| {
            // A hole, without the bytes.
            File::create(path).and_then(|file| file.set_len(bytes)).expect("a sparse file");
        };
        let component = || Source::read(&config).bytes.expect("it was looked at");
        make(&config.path, COMPONENT_BYTES_MAX + 1);
        let error = component().expect_err("is refused").to_string();
        assert!(error.contains("67108865 bytes; at most 67108864 are allowed") && error.contains("p.wasm"), "{error}");
        make(&config.path, COMPONENT_BYTES_MAX);
        assert_eq!(component().map(|bytes| bytes.len() as u64).ok(), Some(COMPONENT_BYTES_MAX));
        let granted = &config.files[0].host;
        make(granted, FILE_BYTES_MAX + 1);
        let error = Mounts::new(&config.files, &copies).err().expect("is refused").to_string();
        assert!(error.contains("67108865 bytes; at most 67108864 are allowed") && error.contains("users"), "{error}");
        make(granted, FILE_BYTES_MAX);
        assert!(Mounts::new(&config.files, &copies).is_ok());
    }

    #[test]
    fn files_that_did_not_change_are_not_read_again() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let config = plugin(folder.path());
        std::fs::write(&config.path, "component").expect("can write");
        std::fs::write(folder.path().join("users"), "ann").expect("can write");
        let mut seen = None;
        assert!(Source::look(&config, &mut seen).bytes.is_some());
        assert!(Source::look(&config, &mut seen).bytes.is_some(), "it was written just now: it may change unnoticed");
        let begun = Instant::now();
        while Source::look(&config, &mut seen).bytes.is_some() {
            assert!(begun.elapsed() < Duration::from_mins(1), "it is read for ever");
            std::thread::sleep(Duration::from_millis(50));
        }
        std::fs::write(folder.path().join("users"), "bob").expect("can write");
        assert!(Source::look(&config, &mut seen).bytes.is_some());
    }

    /// As `touch -d 2099` says: it would be read every two seconds until then.
    #[test]
    fn a_file_with_a_time_in_the_future_settles() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("x.wasm");
        let file = File::create(&path).expect("can write");
        file.set_modified(UNIX_EPOCH + Duration::from_secs(4_000_000_000)).expect("can set the time");
        let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("is later");
        assert!(!Stamp::of(&path).is_settled(now));
        assert!(Stamp::of(&path).is_settled(now + Duration::from_secs(5)));
    }

    #[test]
    fn a_replaced_target_of_a_link_is_another_file_though_size_and_time_are_the_same() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("link");
        let (one, two) = (folder.path().join("one"), folder.path().join("two"));
        std::fs::write(&one, "ann").expect("can write");
        std::fs::write(&two, "bob").expect("can write");
        age(&one);
        age(&two);
        std::os::unix::fs::symlink(&one, &path).expect("can link");
        let before = Stamp::of(&path);
        assert!(before == Stamp::of(&path));
        std::fs::rename(&two, &one).expect("can rename");
        assert!(before != Stamp::of(&path));
        std::fs::remove_file(&one).expect("can remove");
        assert!(Stamp::of(&path) == Stamp(None), "a link that leads nowhere");
    }
}
