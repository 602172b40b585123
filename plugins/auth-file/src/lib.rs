//! Users from a password file: `user:$argon2id$…`, one a line, as `wasmqtt passwd` writes it. The hashes of mosquitto's
//! password files (`$7$`, `$6$`) and bcrypt (`$2b$`, `$2a$`, `$2y$`) are checked, too.
//!
//! Settings: `file`, the path as the plugin sees it; the operator grants it with `grants.files`.

use std::cell::RefCell;
use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};

use sha2::{Digest, Sha256};
use wasmqtt_passwords::Hash;
use wasmqtt_sdk::{Auth, BAD_USER_NAME_OR_PASSWORD, Outcome, Plugin, Request, Settings};

/// Verified passwords an instance remembers; hashes are slow on purpose, and clients come back.
const REMEMBERED_MAX: usize = 10_000;

/// The users of one password file.
pub struct AuthFile {
    users: HashMap<String, Hash>,
    /// An unknown user must take as long as a wrong password: each gets somebody's hash, and always the same one, so that
    /// different kinds of hashes do not tell who is known.
    decoys: Vec<String>,
    /// Chooses among them: a secret, and the same in all instances.
    choice: [u8; 32],
    /// User → keyed digest of the password that was right.
    remembered: RefCell<HashMap<String, [u8; 32]>>,
    /// Random, so that what is remembered is worth nothing outside this instance.
    key: [u8; 32],
}

impl AuthFile {
    fn parse(text: &str) -> Result<Self, String> {
        let mut users = HashMap::new();
        for (number, line) in text.lines().enumerate() {
            if line.trim().is_empty() || line.starts_with('#') {
                continue;
            }
            let at = |error: String| format!("line {}: {error}", number + 1);
            let (name, hash) = line.trim_end().split_once(':').ok_or_else(|| at("no colon".into()))?;
            if name.is_empty() {
                return Err(at("the user name is missing".into()));
            }
            let hash = Hash::parse(hash).map_err(at)?;
            if users.insert(name.to_owned(), hash).is_some() {
                return Err(at(format!("{name} was named before")));
            }
        }
        let mut decoys: Vec<String> = users.keys().cloned().collect();
        decoys.sort();
        let choice = Sha256::digest(text).into();
        Ok(Self { users, decoys, choice, remembered: RefCell::default(), key: random_key() })
    }

    fn decoy(&self, username: &str) -> Option<&Hash> {
        let digest: [u8; 32] = Sha256::new().chain_update(self.choice).chain_update(username).finalize().into();
        let number = digest.first_chunk::<4>().map_or(0, |bytes| u32::from_le_bytes(*bytes) as usize);
        self.users.get(self.decoys.get(number % self.decoys.len().max(1))?)
    }

    fn digest(&self, password: &[u8]) -> [u8; 32] {
        Sha256::new().chain_update(self.key).chain_update(password).finalize().into()
    }

    fn is_right(&self, username: &str, password: &[u8]) -> bool {
        let digest = self.digest(password);
        if self.remembered.borrow().get(username) == Some(&digest) {
            return true;
        }
        let known = self.users.get(username);
        let Some(hash) = known.or_else(|| self.decoy(username)) else { return false };
        let right = hash.is_of(password) && known.is_some();
        if right {
            let mut remembered = self.remembered.borrow_mut();
            if remembered.len() >= REMEMBERED_MAX {
                remembered.clear();
            }
            remembered.insert(username.to_owned(), digest);
        }
        right
    }
}

fn random_key() -> [u8; 32] {
    let mut key = [0; 32];
    for chunk in key.chunks_mut(8) {
        chunk.copy_from_slice(&RandomState::new().hash_one(0).to_le_bytes());
    }
    key
}

impl Plugin for AuthFile {
    fn new(settings: &Settings) -> Result<Self, String> {
        settings.only(&["file"])?;
        let path = settings.require("file")?;
        let text = std::fs::read_to_string(path).map_err(|error| format!("cannot read {path}: {error}"))?;
        Self::parse(&text).map_err(|error| format!("{path}: {error}"))
    }
}

impl Auth for AuthFile {
    fn authenticate(&self, request: &Request) -> Result<Outcome, String> {
        if request.method.is_some() {
            return Ok(Outcome::Next);
        }
        let Some(username) = &request.username else { return Ok(Outcome::Next) };
        let password = request.password.as_deref().unwrap_or_default();
        Ok(if self.is_right(username, password) {
            Outcome::allow(username)
        } else {
            Outcome::Deny(BAD_USER_NAME_OR_PASSWORD)
        })
    }
}

wasmqtt_sdk::export_plugin!(AuthFile: auth);

#[cfg(test)]
mod tests {
    use argon2::{Algorithm, Argon2, Params, PasswordHasher, Version};

    use super::*;

    fn entry(user: &str, password: &str) -> String {
        let params = Params::new(8, 1, 1, None).expect("small but valid");
        let argon2 = Argon2::new(Algorithm::Argon2id, Version::V0x13, params);
        let hash = argon2.hash_password_with_salt(password.as_bytes(), b"sixteen byte salt").expect("hashes");
        format!("{user}:{hash}")
    }

    #[test]
    fn only_the_right_password_is_right_the_first_time_and_later() {
        let plugin = AuthFile::parse(&format!("# users\n\n{}\n", entry("alice", "secret"))).expect("parses");
        for _ in 0..2 {
            assert!(plugin.is_right("alice", b"secret"));
            assert!(!plugin.is_right("alice", b"Secret"));
            assert!(!plugin.is_right("bob", b"secret"));
        }
    }

    #[test]
    fn bad_lines_are_named() {
        let error = |text: &str| AuthFile::parse(text).err().expect("must be refused");
        assert_eq!(error("# ok\nalice"), "line 2: no colon");
        assert!(error("alice:plain").starts_with("line 1: the password is not hashed"));
        assert!(error("alice:$argon2id$x").starts_with("line 1: not an Argon2id hash"));
        assert!(
            error("alice:$argon2i$v=19$m=64,t=1,p=1$c2FsdHNhbHQ$aGFzaGhhc2g").contains("\"argon2i\" is not a hash")
        );
        let alice = entry("alice", "secret");
        assert_eq!(error(&format!("{alice}\n{alice}")), "line 2: alice was named before");
        assert_eq!(error(":$6$AAAA$AAAA"), "line 1: the user name is missing");
    }

    /// A file that was mosquitto's, with a new user of ours in it.
    #[test]
    fn hashes_of_several_kinds_stand_in_one_file() {
        let text = format!(
            "ann:$7$101$AAECAwQFBgcICQoL$Xr99N9ym9ys8TWxis5ajETJq6EVYzmc6nb8t3pUYnPBbCAbICS4xejTltonXWCtJNBvA+By+TXUqU6qCblO00w==\n\
             bob:$2b$05$abcdefghijklmnopqrstuuOQiyCxlgf/oeuTqixKmWdcYUh4Hjl0a\n{}\n",
            entry("carl", "secret")
        );
        let plugin = AuthFile::parse(&text).expect("parses");
        for user in ["ann", "bob", "carl"] {
            assert!(plugin.is_right(user, b"secret") && !plugin.is_right(user, b"other"), "{user}");
        }
        assert!(!plugin.is_right("dora", b"secret"));
        let chosen = |name: &str| plugin.decoy(name).cloned();
        assert!((0..50).any(|n| chosen(&n.to_string()) != chosen("dora")), "unknown users differ as known ones do");
        assert_eq!(AuthFile::parse(&text).expect("parses").decoy("dora").cloned(), chosen("dora"));
    }
}
