//! `wasmqtt passwd`: entries of a password file, `user:$argon2id$…`, one per line.
//!
//! [`mod@import`] takes over those of another broker.
//!
//! The file is the one that the bundled plugin `auth-file` reads. It is replaced as a whole, so that a reader sees the
//! old entries or the new ones and never half of them.

mod import;

use std::fs::{self, File};
use std::io::{self, BufRead, IsTerminal};
use std::os::unix::fs::{MetadataExt, fchown};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use argon2::password_hash::PasswordHasher;
use argon2::{Algorithm, Argon2, Params, Version};
use wasmqtt_host::read_file;

pub(crate) use self::import::import;

/// Bytes of a password file: `auth-file` would not be given a larger one.
const PASSWORDS_BYTES_MAX: u64 = 64 << 20;
/// What an MQTT packet can carry: User Name and Password have two bytes of length. MQTT 5.0 §1.5.4, §1.5.6.
const FIELD_BYTES_MAX: usize = 65_535;

/// What guessing a password costs, and checking it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Cost {
    pub(crate) memory_kib: u32,
    pub(crate) iterations: u32,
}

/// Adds an entry, or replaces the one that `user` has. The password comes from a prompt, or from the first line of
/// standard input when that is not a terminal.
pub(crate) fn set(file: &Path, user: &str, cost: Cost) -> anyhow::Result<()> {
    check_user(user)?;
    let password = ask(user)?;
    let entry = entry(user, &password, cost)?;
    let replaced = edit(file, user, Some(&entry))?;
    let verb = if replaced { "replaced" } else { "added" };
    eprintln!("{verb} {user} in {}", file.display());
    Ok(())
}

/// Removes the entry of `user`.
pub(crate) fn delete(file: &Path, user: &str) -> anyhow::Result<()> {
    check_user(user)?;
    ensure!(edit(file, user, None)?, "no user {user} in {}", file.display());
    eprintln!("deleted {user} from {}", file.display());
    Ok(())
}

fn check_user(user: &str) -> anyhow::Result<()> {
    let fits = (1..=FIELD_BYTES_MAX).contains(&user.len());
    let plain = !user.starts_with('#') && !user.contains(':') && !user.contains(char::is_control);
    ensure!(
        fits && plain && user.trim() == user,
        "user name {user:?} cannot be an entry: it must not be empty, begin with `#`, contain `:` or control \
         characters, or have spaces at its ends"
    );
    Ok(())
}

fn ask(user: &str) -> anyhow::Result<Vec<u8>> {
    let password = if io::stdin().is_terminal() {
        let first = rpassword::prompt_password(format!("password for {user}: ")).context("read the password")?;
        let second = rpassword::prompt_password("again: ").context("read the password")?;
        ensure!(first == second, "the two passwords differ");
        first.into_bytes()
    } else {
        first_line(io::stdin().lock())?
    };
    ensure!(!password.is_empty(), "the password is empty");
    ensure!(password.len() <= FIELD_BYTES_MAX, "the password is longer than {FIELD_BYTES_MAX} bytes");
    Ok(password)
}

fn first_line(input: impl BufRead) -> anyhow::Result<Vec<u8>> {
    let mut line = Vec::new();
    // With its line end, and one byte to notice what is too long.
    let most = FIELD_BYTES_MAX as u64 + 3;
    input.take(most).read_until(b'\n', &mut line).context("read the password from standard input")?;
    if line.last() == Some(&b'\n') {
        line.pop();
        if line.last() == Some(&b'\r') {
            line.pop();
        }
    }
    Ok(line)
}

fn entry(user: &str, password: &[u8], cost: Cost) -> anyhow::Result<String> {
    let params = Params::new(cost.memory_kib, cost.iterations, 1, None);
    let params = params.map_err(|error| anyhow::anyhow!("--memory-kib {}: {error}", cost.memory_kib))?;
    let argon2 = Argon2::new(Algorithm::Argon2id, Version::V0x13, params);
    match argon2.hash_password(password) {
        Ok(hash) => Ok(format!("{user}:{hash}")),
        Err(error) => bail!("cannot hash the password: {error}"),
    }
}

/// Puts `entry` in the place of the lines of `user`; tells whether there were any.
fn edit(file: &Path, user: &str, entry: Option<&str>) -> anyhow::Result<bool> {
    let mut found = false;
    rewrite(file, entry.is_some(), |old| {
        let mut new = String::with_capacity(old.len() + entry.map_or(0, str::len) + 1);
        let mut rest = entry;
        for line in old.lines() {
            let is_user = line.split_once(':').is_some_and(|(name, _)| name == user);
            found |= is_user;
            let keep = if is_user { rest.take() } else { Some(line) };
            new.extend(keep.into_iter().flat_map(|line| [line, "\n"]));
        }
        new.extend(rest.into_iter().flat_map(|line| [line, "\n"]));
        (entry.is_some() || found).then_some(new)
    })?;
    Ok(found)
}

/// Replaces the file by what `change` makes of its text, while no other `wasmqtt passwd` does; `None`: it stays.
fn rewrite(file: &Path, may_be_new: bool, change: impl FnOnce(&str) -> Option<String>) -> anyhow::Result<()> {
    // A link stays a link: what it points at is replaced.
    let file = fs::canonicalize(file).unwrap_or_else(|_| file.to_owned());
    let folder = match file.parent() {
        Some(folder) if folder != Path::new("") => folder.to_owned(),
        _ => PathBuf::from("."),
    };
    let lock = File::open(&folder).with_context(|| format!("open folder {}", folder.display()))?;
    lock.lock().with_context(|| format!("lock folder {}", folder.display()))?;
    let old = if file.exists() || !may_be_new {
        let bytes = read_file(&file, PASSWORDS_BYTES_MAX)?;
        String::from_utf8(bytes).with_context(|| format!("read {}", file.display()))?
    } else {
        String::new()
    };
    match change(&old) {
        Some(new) => replace(&file, new.as_bytes()).with_context(|| format!("write {}", file.display())),
        None => Ok(()),
    }
}

/// Writes beside the file and renames, with mode 0600 and the owner the file had.
fn replace(file: &Path, bytes: &[u8]) -> io::Result<()> {
    wasmqtt_files::write_whole_with(file, bytes, 0o600, |out| {
        if let Ok(old) = fs::metadata(file) {
            // An administrator may edit what belongs to the broker's own user.
            let new = out.metadata()?;
            if (old.uid(), old.gid()) != (new.uid(), new.gid()) {
                fchown(out, Some(old.uid()), Some(old.gid()))?;
            }
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use argon2::PasswordVerifier;
    use tempfile::TempDir;

    use super::*;

    const CHEAP: Cost = Cost { memory_kib: 64, iterations: 1 };

    fn put(file: &Path, user: &str, password: &str) -> bool {
        let entry = entry(user, password.as_bytes(), CHEAP).expect("entry");
        edit(file, user, Some(&entry)).expect("edit")
    }

    fn check_password(file: &Path, user: &str, password: &str, fits: bool) {
        let text = fs::read_to_string(file).expect("file");
        let hash = text.lines().find_map(|line| line.strip_prefix(&format!("{user}:"))).expect("an entry");
        assert_eq!(Argon2::default().verify_password(password.as_bytes(), hash).is_ok(), fits, "{user}");
    }

    #[test]
    fn entries_are_added_replaced_and_deleted() {
        let folder = TempDir::new().expect("temporary folder");
        let file = folder.path().join("passwords");
        assert!(!put(&file, "ann", "one"));
        assert!(!put(&file, "anna", "two"));
        assert!(put(&file, "ann", "three"));
        check_password(&file, "ann", "one", false);
        check_password(&file, "ann", "three", true);
        check_password(&file, "anna", "two", true);
        assert!(edit(&file, "ann", None).expect("edit"));
        assert!(!edit(&file, "ann", None).expect("edit"));
        assert_eq!(fs::read_to_string(&file).expect("file").lines().count(), 1);
        check_password(&file, "anna", "two", true);
    }

    #[test]
    fn entries_are_argon2id_with_the_asked_cost() {
        let entry = entry("ann", b"secret", Cost { memory_kib: 128, iterations: 3 }).expect("entry");
        assert!(entry.starts_with("ann:$argon2id$v=19$m=128,t=3,p=1$"), "{entry}");
    }

    #[test]
    fn comments_and_order_stay_and_doubles_go() {
        let folder = TempDir::new().expect("temporary folder");
        let file = folder.path().join("passwords");
        fs::write(&file, "# ours\nann:x\n\nbob:y\nann:z").expect("file");
        assert!(put(&file, "ann", "new"));
        let text = fs::read_to_string(&file).expect("file");
        let lines: Vec<_> = text.lines().collect();
        assert_eq!((lines.len(), lines[0], lines[2], lines[3]), (4, "# ours", "", "bob:y"));
        assert!(lines[1].starts_with("ann:$argon2id$"));
    }

    #[test]
    fn the_file_is_for_its_owner_only_and_nothing_else_is_left() {
        let folder = TempDir::new().expect("temporary folder");
        let file = folder.path().join("passwords");
        fs::write(&file, "").expect("file");
        fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).expect("mode");
        put(&file, "ann", "secret");
        assert_eq!(fs::metadata(&file).expect("file").permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(folder.path()).expect("folder").count(), 1);
    }

    #[test]
    fn a_link_stays_a_link() {
        let folder = TempDir::new().expect("temporary folder");
        let (file, link) = (folder.path().join("real"), folder.path().join("passwords"));
        fs::write(&file, "").expect("file");
        std::os::unix::fs::symlink(&file, &link).expect("link");
        put(&link, "ann", "secret");
        assert!(fs::symlink_metadata(&link).expect("link").is_symlink());
        check_password(&file, "ann", "secret", true);
    }

    #[test]
    fn names_that_would_break_the_file_are_refused() {
        for user in ["", "a:b", "a\nb", "#a", " a", "a "] {
            assert!(check_user(user).is_err(), "{user:?}");
        }
        check_user("ann@example.org").expect("a good name");
    }

    #[test]
    fn only_the_first_line_is_the_password() {
        assert_eq!(first_line(&b"secret\nmore\n"[..]).expect("line"), b"secret");
        assert_eq!(first_line(&b"secret\r\n"[..]).expect("line"), b"secret");
        assert_eq!(first_line(&b" spaces stay "[..]).expect("line"), b" spaces stay ");
    }
}
