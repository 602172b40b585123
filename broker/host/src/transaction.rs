//! Several files written in one step: all of them, durably, or none.

use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::path::{Path, PathBuf};

use crate::HostError;

/// Files that are ready under other names. Dropping it before [`Files::commit`] removes them.
#[derive(Default)]
pub(crate) struct Files(Vec<Staged>);

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

fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

impl Files {
    /// Writes the content, so that there is nothing left that takes room on the disk.
    pub(crate) fn stage(&mut self, path: &Path, bytes: &[u8]) -> Result<(), HostError> {
        let new = beside(path, "new");
        self.0.push(Staged { path: path.to_owned(), new: new.clone(), old: None });
        let mut options = OpenOptions::new();
        let written = options.write(true).create(true).truncate(true).open(&new).and_then(|mut file| {
            file.write_all(bytes)?;
            file.sync_all()
        });
        written.map_err(|error| HostError::new(format!("cannot write {}: {error}", path.display())))
    }

    /// Gives all of them their names; when one cannot have it, those that had theirs get their old content back.
    pub(crate) fn commit(mut self) -> Result<(), HostError> {
        for at in 0..self.0.len() {
            let staged = &mut self.0[at];
            if let Err(error) = staged.take_name() {
                let failed = HostError::new(format!("cannot write {}: {error}", staged.path.display()));
                self.undo(at);
                return Err(failed);
            }
        }
        if let Err(error) = self.sync_folders() {
            let count = self.0.len();
            self.undo(count);
            return Err(HostError::new(format!("cannot sync the folder of the plugin: {error}")));
        }
        for old in self.0.iter().filter_map(|staged| staged.old.as_ref()) {
            let _ = std::fs::remove_file(old);
        }
        self.0.clear();
        Ok(())
    }

    fn undo(&mut self, count: usize) {
        for staged in self.0.drain(..count) {
            let undone = match &staged.old {
                Some(old) => std::fs::rename(old, &staged.path),
                None => std::fs::remove_file(&staged.path),
            };
            if let Err(error) = undone {
                tracing::error!(path = %staged.path.display(), %error, "cannot put the earlier build of a plugin back");
            }
            let _ = File::open(parent(&staged.path)).and_then(|folder| folder.sync_all());
        }
    }

    /// A name lasts only after its folder was synced.
    fn sync_folders(&self) -> std::io::Result<()> {
        self.0.iter().try_for_each(|staged| File::open(parent(&staged.path))?.sync_all())
    }
}

impl Staged {
    fn take_name(&mut self) -> std::io::Result<()> {
        if self.path.symlink_metadata().is_ok_and(|found| !found.is_dir()) {
            let old = beside(&self.path, "old");
            let _ = std::fs::remove_file(&old);
            // Not every file system has hard links.
            std::fs::hard_link(&self.path, &old).or_else(|_| std::fs::copy(&self.path, &old).map(drop))?;
            self.old = Some(old);
        }
        let taken = std::fs::rename(&self.new, &self.path);
        if taken.is_err()
            && let Some(old) = self.old.take()
        {
            let _ = std::fs::remove_file(old);
        }
        taken
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        for staged in &self.0 {
            let _ = std::fs::remove_file(&staged.new);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
        let mut files = Files::default();
        for name in ["a", "b", "c"] {
            files.stage(&path(name), b"new").expect("there is room");
        }
        assert_eq!(content("a"), "old a", "not yet");
        let error = files.commit().expect_err("a folder is no file").to_string();
        assert!(error.contains("/c"), "{error}");
        assert_eq!((content("a").as_str(), names(folder.path())), ("old a", vec!["a".into(), "c".into()]));
        let mut files = Files::default();
        files.stage(&path("a"), b"new a").expect("there is room");
        files.stage(&path("b"), b"new b").expect("there is room");
        files.commit().expect("both can be written");
        assert_eq!((content("a").as_str(), content("b").as_str()), ("new a", "new b"));
        assert_eq!(names(folder.path()), ["a", "b", "c"]);
    }

    #[test]
    fn what_is_not_committed_leaves_nothing() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let mut files = Files::default();
        files.stage(&folder.path().join("a"), b"new").expect("there is room");
        assert!(files.stage(&folder.path().join("nowhere/b"), b"new").is_err());
        drop(files);
        assert_eq!(names(folder.path()), Vec::<String>::new());
    }
}
