//! Files and folders that are still there after a power loss.
//!
//! A file lasts when its bytes are synced, and its *name* when the folder is in which it stands: a new file, a renamed
//! one and a new folder need both. Everything in the broker that must last is made here.
#![forbid(unsafe_code)]

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

/// Makes a folder that only its owner may enter, and those above it that are missing; each lasts. One that is there
/// already stays as it is.
///
/// # Errors
/// Those of the file system; also if something that is no folder has its name.
pub fn make_private_folder(folder: &Path) -> io::Result<()> {
    if folder.is_dir() {
        return Ok(());
    }
    let above = parent(folder);
    if above != folder {
        make_private_folder(&above)?;
    }
    match DirBuilder::new().mode(0o700).create(folder) {
        // Somebody else made it meanwhile.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && folder.is_dir() => {}
        made => made?,
    }
    sync_folder(folder)?;
    sync_folder(&above)
}

/// Writes a file: under its name it is there as a whole or not at all, and lasts. Another file of this name is replaced.
///
/// `mode`: permissions of the file, less what the umask takes.
///
/// # Errors
/// Those of the file system; the file is then as it was.
pub fn write_whole(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    write_whole_with(path, bytes, mode, |_| Ok(()))
}

/// The same; `prepare` sees the new file before anything is in it, and may give it another owner.
///
/// # Errors
/// Those of the file system and of `prepare`; the file is then as it was.
pub fn write_whole_with(
    path: &Path,
    bytes: &[u8],
    mode: u32,
    prepare: impl FnOnce(&File) -> io::Result<()>,
) -> io::Result<()> {
    let draft = draft_of(path)?;
    let written = OpenOptions::new().write(true).create_new(true).mode(mode).open(&draft).and_then(|mut file| {
        prepare(&file)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&draft, path)
    });
    if let Err(error) = written {
        // It may not even be there; what went wrong first is what counts.
        let _ = fs::remove_file(&draft);
        return Err(error);
    }
    sync_parent(path)
}

/// Beside the file, with a name that no other process or thread uses at the same time.
fn draft_of(path: &Path) -> io::Result<PathBuf> {
    use std::sync::atomic::{AtomicU32, Ordering};
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let name = path.file_name().ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "not the name of a file"))?;
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let mut draft = std::ffi::OsString::from(".");
    draft.push(name);
    draft.push(format!(".{}-{count}.new", std::process::id()));
    Ok(path.with_file_name(draft))
}

/// The names in a folder last.
///
/// # Errors
/// Those of the file system.
pub fn sync_folder(folder: &Path) -> io::Result<()> {
    match File::open(folder)?.sync_all() {
        // Some file systems cannot sync a folder, and need not.
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => Ok(()),
        synced => synced,
    }
}

/// The name of this file or folder lasts.
///
/// # Errors
/// Those of the file system.
pub fn sync_parent(path: &Path) -> io::Result<()> {
    sync_folder(&parent(path))
}

/// A folder, what is in it and its own name last.
///
/// # Errors
/// Those of the file system.
pub fn sync_tree(folder: &Path) -> io::Result<()> {
    sync_inside(folder)?;
    sync_parent(folder)
}

fn sync_inside(folder: &Path) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let kind = entry.file_type()?;
        if kind.is_dir() {
            sync_inside(&entry.path())?;
        } else if kind.is_file() {
            File::open(entry.path())?.sync_all()?;
        }
    }
    sync_folder(folder)
}

fn parent(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if parent.as_os_str().is_empty() => PathBuf::from("."),
        Some(parent) => parent.to_owned(),
        None => path.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o777
    }

    #[test]
    fn new_folders_are_private_and_others_stay_as_they_are() {
        let folder = tempfile::tempdir().unwrap();
        let above = folder.path().join("open");
        DirBuilder::new().mode(0o755).create(&above).unwrap();
        let deep = above.join("a/b");
        make_private_folder(&deep).unwrap();
        make_private_folder(&deep).unwrap();
        assert_eq!((mode(&above), mode(&above.join("a")), mode(&deep)), (0o755, 0o700, 0o700));
        fs::write(folder.path().join("file"), "").unwrap();
        assert!(make_private_folder(&folder.path().join("file/below")).is_err());
    }

    #[test]
    fn a_file_is_there_as_a_whole_or_as_it_was() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        write_whole(&path, b"one", 0o600).unwrap();
        write_whole(&path, b"two", 0o600).unwrap();
        assert_eq!((fs::read(&path).unwrap(), mode(&path)), (b"two".to_vec(), 0o600));
        // A folder has its name: nothing is left beside it.
        let taken = folder.path().join("taken");
        fs::create_dir(&taken).unwrap();
        assert!(write_whole(&taken, b"x", 0o600).is_err());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
        assert!(write_whole(Path::new("/"), b"x", 0o600).is_err());
        sync_tree(folder.path()).unwrap();
    }
}
