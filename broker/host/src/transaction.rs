//! Several files written in one step: all of them, durably, or none, also when the broker ends in the middle.
//!
//! Others may be able to write to the folders, so no name is opened that might be there already.

use std::ffi::OsStr;
use std::fs::{File, OpenOptions, rename};
use std::io::{Read as _, Write as _};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use tracing::{error, warn};

use crate::HostError;
use crate::source::{self, COMPONENT_BYTES_MAX, read_file};

/// Bytes of a journal: many times what the paths of all plugins take.
const JOURNAL_BYTES_MAX: u64 = 1 << 20;

/// Files that are ready under other names. Dropping it before [`Files::commit`] removes them.
pub(crate) struct Files {
    staged: Vec<Staged>,
    /// While they get their names, this file says which.
    journal: PathBuf,
}

struct Staged {
    path: PathBuf,
    /// The new content, until it has its name.
    new: PathBuf,
    /// The file that was there, while it may have to come back.
    old: Option<PathBuf>,
}

/// A name beside `path` that no plugin has: those do not begin with a dot.
fn beside(path: &Path, what: &str) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.{what}"))
}

/// Without links in the path of its folder, so that one file has one name.
fn real(path: &Path) -> std::io::Result<PathBuf> {
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    Ok(folder.canonicalize()?.join(path.file_name().unwrap_or_default()))
}

/// A file that nobody else has open: whatever has its name goes.
fn create(path: &Path) -> std::io::Result<File> {
    let _ = std::fs::remove_file(path);
    OpenOptions::new().write(true).create_new(true).open(path)
}

impl Files {
    pub(crate) fn new(journal: PathBuf) -> Self {
        Self { staged: Vec::new(), journal }
    }

    /// Writes the content, so that there is nothing left that takes room on the disk.
    pub(crate) fn stage(&mut self, path: &Path, bytes: &[u8]) -> Result<(), HostError> {
        let failed = |error: std::io::Error| HostError::new(format!("cannot write {}: {error}", path.display()));
        let path = real(path).map_err(failed)?;
        if self.staged.iter().any(|staged| staged.path == path) {
            return Err(HostError::new("another of these plugins has the same file; deploy one of them"));
        }
        let new = beside(&path, "new");
        self.staged.push(Staged { path, new: new.clone(), old: None });
        let written = create(&new).and_then(|mut file| {
            file.write_all(bytes)?;
            file.sync_all()
        });
        written.map_err(failed)
    }

    /// Gives all of them their names; when one cannot have it, those that had theirs get their old content back.
    pub(crate) fn commit(mut self) -> Result<(), HostError> {
        let named = self.take_names();
        if named.is_err() {
            self.staged.iter().for_each(|staged| put_back(&staged.path, staged.old.is_some()));
        }
        // Before the old files go, which it promises to put back.
        let forgotten = remove_if_there(&self.journal).and_then(|()| wasmqtt_files::sync_parent(&self.journal));
        if let Err(error) = &forgotten {
            error!(path = %self.journal.display(), %error, "the next start will put earlier builds of plugins back");
        }
        for old in self.staged.iter().filter_map(|staged| staged.old.as_ref()) {
            let _ = std::fs::remove_file(old);
        }
        named
    }

    fn take_names(&mut self) -> Result<(), HostError> {
        for staged in &mut self.staged {
            let failed = |error| HostError::new(format!("cannot write {}: {error}", staged.path.display()));
            staged.old = keep_old(&staged.path).map_err(failed)?;
        }
        let entry = |staged: &Staged| {
            let mark = if staged.old.is_some() { b'+' } else { b'-' };
            [&[mark], staged.path.as_os_str().as_bytes(), b"\0"].concat()
        };
        let journal = self.staged.iter().flat_map(entry).collect::<Vec<u8>>();
        let failed = |error| HostError::new(format!("cannot write {}: {error}", self.journal.display()));
        wasmqtt_files::write_whole(&self.journal, &journal, 0o600).map_err(failed)?;
        for Staged { path, new, .. } in &self.staged {
            rename(new, path).map_err(|error| HostError::new(format!("cannot write {}: {error}", path.display())))?;
        }
        // A name lasts only after its folder was synced.
        let synced = self.staged.iter().try_for_each(|staged| wasmqtt_files::sync_parent(&staged.path));
        synced.map_err(|error| HostError::new(format!("cannot sync the folder of the plugin: {error}")))
    }
}

/// Has the name, so that it can come back; `None`: there is no file, and what is no file will be in the way.
fn keep_old(path: &Path) -> std::io::Result<Option<PathBuf>> {
    if !path.symlink_metadata().is_ok_and(|found| !found.is_dir()) {
        return Ok(None);
    }
    let old = beside(path, "old");
    remove_if_there(&old)?;
    // Not every file system has hard links.
    std::fs::hard_link(path, &old).or_else(|_| copy(path, &old))?;
    Ok(Some(old))
}

fn copy(from: &Path, to: &Path) -> std::io::Result<()> {
    let (from, _) = source::open(from, COMPONENT_BYTES_MAX)?;
    let mut to = create(to)?;
    std::io::copy(&mut from.take(COMPONENT_BYTES_MAX), &mut to)?;
    to.sync_all()
}

fn remove_if_there(path: &Path) -> std::io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// As it was before, whether it has its new content or not. May be done again.
fn put_back(path: &Path, had_old: bool) {
    let (new, old) = (beside(path, "new"), beside(path, "old"));
    let undone = if new.symlink_metadata().is_ok() {
        // It did not get that far.
        remove_if_there(&new).and_then(|()| if had_old { remove_if_there(&old) } else { Ok(()) })
    } else if had_old {
        // If there is none, it was put back already.
        if old.symlink_metadata().is_ok() { rename(&old, path) } else { Ok(()) }
    } else {
        remove_if_there(path)
    };
    if let Err(error) = undone.and_then(|()| wasmqtt_files::sync_parent(path)) {
        error!(path = %path.display(), %error, "cannot put the earlier build of a plugin back");
    }
}

/// If the broker ended while files got their names, they are put back as they were.
pub(crate) fn recover(journal: &Path) {
    if !journal.exists() {
        return;
    }
    let read = read_file(journal, JOURNAL_BYTES_MAX);
    let entries = read.inspect_err(|error| error!(%error, "a deploy was interrupted, and nobody knows of what"));
    for entry in entries.unwrap_or_default().split(|byte| *byte == 0) {
        let Some((mark, path)) = entry.split_first() else { continue };
        let path = Path::new(OsStr::from_bytes(path));
        warn!(path = %path.display(), "a deploy was interrupted, the plugin's file is put back as it was");
        put_back(path, *mark == b'+');
    }
    if let Err(error) = remove_if_there(journal) {
        error!(path = %journal.display(), %error, "cannot remove what says that a deploy was interrupted");
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        for staged in &self.staged {
            let _ = std::fs::remove_file(&staged.new);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;
    use std::time::{Duration, Instant};

    use super::*;

    fn files(folder: &Path) -> Files {
        Files::new(folder.join(".deploying"))
    }

    fn names(folder: &Path) -> Vec<String> {
        let entries = std::fs::read_dir(folder).expect("a folder").flatten();
        let mut names: Vec<String> = entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }

    #[test]
    fn all_are_written_or_none() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = |name: &str| folder.path().join(name);
        std::fs::write(path("a"), "old a").expect("can write");
        let content = |name: &str| std::fs::read_to_string(path(name)).expect("is there");
        // A folder has the name of the last.
        std::fs::create_dir(path("c")).expect("can make a folder");
        let mut three = files(folder.path());
        for name in ["a", "b", "c"] {
            three.stage(&path(name), b"new").expect("there is room");
        }
        assert_eq!(content("a"), "old a", "not yet");
        let error = three.commit().expect_err("a folder is no file").to_string();
        assert!(error.contains("/c"), "{error}");
        assert_eq!((content("a").as_str(), names(folder.path())), ("old a", vec!["a".into(), "c".into()]));
        let mut two = files(folder.path());
        two.stage(&path("a"), b"new a").expect("there is room");
        two.stage(&path("b"), b"new b").expect("there is room");
        two.commit().expect("both can be written");
        assert_eq!((content("a").as_str(), content("b").as_str()), ("new a", "new b"));
        assert_eq!(names(folder.path()), ["a", "b", "c"]);
    }

    #[test]
    fn what_is_not_committed_leaves_nothing() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let mut files = files(folder.path());
        files.stage(&folder.path().join("a"), b"new").expect("there is room");
        assert!(files.stage(&folder.path().join("nowhere/b"), b"new").is_err());
        drop(files);
        assert_eq!(names(folder.path()), Vec::<String>::new());
    }

    /// A FIFO would be waited for, and a link would lead to a file that is none of its business.
    #[test]
    fn names_that_others_have_prepared_are_not_opened() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let (path, precious) = (folder.path().join("a"), folder.path().join("precious"));
        std::fs::write(&path, "old").expect("can write");
        std::fs::write(&precious, "precious").expect("can write");
        symlink(&precious, folder.path().join(".a.new")).expect("can link");
        symlink(&precious, folder.path().join(".a.old")).expect("can link");
        let fifo = folder.path().join(".b.new");
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, 0o600.into(), 0).expect("can make one");
        let mut files = files(folder.path());
        let (done, is_done) = std::sync::mpsc::channel();
        let other = folder.path().join("b");
        std::thread::spawn(move || {
            files.stage(&path, b"new").expect("there is room");
            files.stage(&other, b"new").expect("there is room");
            files.commit().expect("can be written");
            let _ = done.send(());
        });
        is_done.recv_timeout(Duration::from_secs(20)).expect("nobody is waited for");
        let content = |name: &str| std::fs::read_to_string(folder.path().join(name)).expect("is there");
        assert_eq!((content("a"), content("b"), content("precious")), ("new".into(), "new".into(), "precious".into()));
        assert_eq!(names(folder.path()), ["a", "b", "precious"]);
    }

    /// The same file twice would have the content of the second, and a name less to take.
    #[test]
    fn one_file_is_staged_once() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let (path, link) = (folder.path().join("a"), folder.path().join("link"));
        std::fs::write(&path, "old").expect("can write");
        symlink(folder.path(), &link).expect("can link");
        let mut files = files(folder.path());
        files.stage(&path, b"one").expect("there is room");
        let refused = files.stage(&link.join("a"), b"two").expect_err("is the same").to_string();
        assert!(refused.contains("the same file"), "{refused}");
        drop(files);
        assert_eq!(std::fs::read(&path).expect("is there"), b"old");
        assert_eq!(names(folder.path()), ["a", "link"]);
    }

    /// As if the broker had been killed, at each step of getting the names.
    #[test]
    fn files_of_an_interrupted_deploy_are_put_back() {
        for named in 0..=3 {
            let folder = tempfile::tempdir().expect("a temporary folder");
            let path = |name: &str| folder.path().join(name);
            std::fs::write(path("a"), "old a").expect("can write");
            std::fs::write(path("b"), "old b").expect("can write");
            let mut files = files(folder.path());
            for name in ["a", "n", "b"] {
                files.stage(&path(name), b"new").expect("there is room");
            }
            let journal = files.journal.clone();
            files.take_names().expect("can be written");
            for staged in &files.staged[named..] {
                rename(&staged.path, &staged.new).expect("can rename");
                if let Some(old) = &staged.old {
                    std::fs::hard_link(old, &staged.path).expect("can link");
                }
            }
            std::mem::forget(files);
            recover(&journal);
            recover(&journal);
            let content = |name: &str| std::fs::read_to_string(path(name)).expect("is there");
            assert_eq!((content("a").as_str(), content("b").as_str()), ("old a", "old b"), "{named}");
            assert_eq!(names(folder.path()), ["a", "b"], "{named}");
        }
    }

    /// Where the file system has no hard links.
    #[test]
    fn only_a_regular_file_is_copied() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let (from, to) = (folder.path().join("from"), folder.path().join("to"));
        rustix::fs::mknodat(rustix::fs::CWD, &from, rustix::fs::FileType::Fifo, 0o600.into(), 0).expect("can make one");
        let begun = Instant::now();
        assert!(copy(&from, &to).expect_err("is refused").to_string().contains("a FIFO"));
        assert!(begun.elapsed() < Duration::from_secs(10));
        std::fs::remove_file(&from).expect("can remove");
        std::fs::write(&from, "content").expect("can write");
        copy(&from, &to).expect("can be copied");
        assert_eq!(std::fs::read(&to).expect("is there"), b"content");
    }
}
