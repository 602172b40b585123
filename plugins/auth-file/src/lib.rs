//! Users from a password file: `user:$argon2id$…`, one a line, as `wasmqtt passwd` writes it.
//!
//! Settings: `file`, the path as the plugin sees it; the operator grants it with `grants.files`.

use std::cell::RefCell;
use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};

use argon2::password_hash::phc::PasswordHash;
use argon2::{Argon2, Block, Params, PasswordVerifier};
use sha2::{Digest, Sha256};
use wasmqtt_sdk::{Auth, BAD_USER_NAME_OR_PASSWORD, Outcome, Plugin, Request, Settings};

/// Verified passwords an instance remembers; Argon2 is slow on purpose, and clients come back.
const REMEMBERED_MAX: usize = 10_000;

/// The users of one password file.
pub struct AuthFile {
    users: HashMap<String, String>,
    /// Somebody's hash: an unknown user must take as long as a wrong password.
    decoy: Option<String>,
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
            check(hash).map_err(at)?;
            if users.insert(name.to_owned(), hash.to_owned()).is_some() {
                return Err(at(format!("{name} was named before")));
            }
        }
        let decoy = users.values().next().cloned();
        Ok(Self { users, decoy, remembered: RefCell::default(), key: random_key() })
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
        let Some(hash) = known.or(self.decoy.as_ref()) else { return false };
        let Ok(hash) = PasswordHash::new(hash) else { return false };
        let right = Argon2::default().verify_password(password, &hash).is_ok() && known.is_some();
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

/// Refuses what could never be verified, before anybody waits for it.
fn check(hash: &str) -> Result<(), String> {
    let bad = |error: &dyn std::fmt::Display| format!("not an Argon2id hash: {error}");
    let hash = PasswordHash::new(hash).map_err(|error| bad(&error))?;
    if hash.algorithm.as_str() != "argon2id" {
        return Err(bad(&hash.algorithm));
    }
    let params = Params::try_from(&hash).map_err(|error| bad(&error))?;
    // The plugin has little memory, and running out of it later would end the instance instead of naming the line.
    let mut blocks: Vec<Block> = Vec::new();
    let kib = params.block_count();
    blocks.try_reserve_exact(kib).map_err(|_| format!("needs {kib} KiB of memory; raise limits.memory_mib"))
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
    use argon2::PasswordHasher;
    use argon2::{Algorithm, Params, Version};

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
        assert!(error("alice:plain").starts_with("line 1: not an Argon2id hash"));
        let alice = entry("alice", "secret");
        assert_eq!(error(&format!("{alice}\n{alice}")), "line 2: alice was named before");
        let scrypt = "a:$scrypt$ln=16,r=8,p=1$aM15713r3Xsvxbi31lqr1Q$nFNh2CVHVjNldFVKDHDlm4CbdRSCdEBsjjJxD+iCs5E";
        assert_eq!(error(scrypt), "line 1: not an Argon2id hash: scrypt");
    }
}
