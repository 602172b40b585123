//! Payloads are encrypted (AES-256-GCM) before they are stored, and decrypted when they come back. Subscribers never
//! notice.
//!
//! Settings: `key_file` (granted to it): a key in 64 hexadecimal digits, or lines `ID:KEY` with an ID from 0 to 255, of
//! which the first seals and all open, so that keys can be changed; `filters`: a list of Topic Filters,
//! or a text with spaces between them (`#`).
//!
//! Sealed form: four bytes that mark it, a version, the ID of the key, 12 random bytes, the ciphertext with its tag. The
//! Topic Name is authenticated, too: a sealed payload is worth nothing under another topic.

use aes_gcm::aead::{Aead, KeyInit, Payload};
use aes_gcm::{Aes256Gcm, Key, Nonce};
use wasmqtt_sdk::{
    Batch, Changes, IMPLEMENTATION_SPECIFIC_ERROR, Message, Plugin, Registration, Settings, StorageHook, error,
    export_plugin, is_valid_filter,
};

const MARK: &[u8; 5] = b"wqs\x00\x01";
const NONCE_BYTES: usize = 12;
/// Mark, ID, nonce.
const HEAD_BYTES: usize = MARK.len() + 1 + NONCE_BYTES;

/// Keys, the one that seals first.
pub struct PayloadSeal {
    keys: Vec<(u8, Aes256Gcm)>,
    filters: Vec<String>,
}

impl PayloadSeal {
    fn from_text(text: &str, settings: &Settings) -> Result<Self, String> {
        let mut keys: Vec<(u8, Aes256Gcm)> = Vec::new();
        for (at, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let (id, digits) = line.split_once(':').unwrap_or(("0", line));
            let id = id.trim().parse().map_err(|_| format!("line {}: {id:?} is no number from 0 to 255", at + 1))?;
            let key = key(digits.trim()).ok_or_else(|| format!("line {}: a key has 64 hexadecimal digits", at + 1))?;
            if keys.iter().any(|(other, _)| *other == id) {
                return Err(format!("line {}: there is another key with the ID {id}", at + 1));
            }
            keys.push((id, Aes256Gcm::new(&Key::<Aes256Gcm>::from(key))));
        }
        if keys.is_empty() {
            return Err("there is no key in it".into());
        }
        let filters = settings.list("filters")?.unwrap_or_else(|| vec!["#"]);
        if let Some(wrong) = filters.iter().find(|filter| !is_valid_filter(filter)) {
            return Err(format!("setting `filters`: {wrong:?} is not a topic filter"));
        }
        Ok(Self { keys, filters: filters.into_iter().map(str::to_owned).collect() })
    }

    fn seal(&self, message: &Message<'_>) -> Result<Vec<u8>, String> {
        let (id, cipher) = &self.keys[0];
        let mut nonce = [0; NONCE_BYTES];
        getrandom::fill(&mut nonce).map_err(|error| format!("no random numbers: {error}"))?;
        let payload = Payload { msg: message.payload, aad: message.topic.as_bytes() };
        let sealed = cipher.encrypt(&Nonce::from(nonce), payload).map_err(|_| "cannot encrypt".to_owned())?;
        Ok([MARK.as_slice(), &[*id], &nonce, &sealed].concat())
    }

    /// `None`: it is not sealed.
    fn open(&self, message: &Message<'_>) -> Option<Result<Vec<u8>, String>> {
        let rest = message.payload.strip_prefix(MARK.as_slice())?;
        if message.payload.len() < HEAD_BYTES {
            return Some(Err("cut off".into()));
        }
        let (id, rest) = rest.split_first()?;
        let (nonce, sealed) = rest.split_first_chunk::<NONCE_BYTES>()?;
        let Some((_, cipher)) = self.keys.iter().find(|(known, _)| known == id) else {
            return Some(Err(format!("sealed with key {id}, which is not in the key file")));
        };
        let payload = Payload { msg: sealed, aad: message.topic.as_bytes() };
        Some(cipher.decrypt(&Nonce::from(*nonce), payload).map_err(|_| "damaged, or from another topic".to_owned()))
    }
}

fn key(digits: &str) -> Option<[u8; 32]> {
    let mut key = [0; 32];
    if digits.len() != 64 || !digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
        return None;
    }
    for (byte, at) in key.iter_mut().zip((0..64).step_by(2)) {
        *byte = u8::from_str_radix(&digits[at..at + 2], 16).ok()?;
    }
    Some(key)
}

impl Plugin for PayloadSeal {
    fn new(settings: &Settings) -> Result<Self, String> {
        settings.only(&["key_file", "filters", "filters.*"])?;
        let file = settings.require("key_file")?;
        let text = std::fs::read_to_string(file).map_err(|error| format!("cannot read {file}: {error}"))?;
        Self::from_text(&text, settings).map_err(|error| format!("{file}: {error}"))
    }

    fn registration(&self) -> Registration {
        Registration {
            filters: self.filters.clone(),
            before_store: true,
            at_rest: true,
            payload: true,
            ..Registration::default()
        }
    }
}

impl StorageHook for PayloadSeal {
    fn before_store(&self, messages: &Batch) -> Result<Changes, String> {
        let mut changes = Changes::none();
        for message in messages.iter() {
            changes.replace_payload(&message, self.seal(&message)?);
        }
        Ok(changes)
    }

    fn after_load(&self, messages: &Batch) -> Result<Changes, String> {
        let mut changes = Changes::none();
        for message in messages.iter() {
            match self.open(&message) {
                None => {}
                Some(Ok(payload)) => changes.replace_payload(&message, payload),
                Some(Err(why)) => {
                    error(&format!("a stored message of {} cannot be opened: {why}", message.topic));
                    changes.discard(&message, IMPLEMENTATION_SPECIFIC_ERROR);
                }
            }
        }
        Ok(changes)
    }
}

export_plugin!(PayloadSeal: storage_hook);

#[cfg(test)]
mod tests {
    use wasmqtt_sdk::testing;

    use super::*;

    fn plugin(text: &str) -> PayloadSeal {
        PayloadSeal::from_text(text, &Settings::default()).expect("keys are good")
    }

    fn line(id: u8, byte: u8) -> String {
        format!("{id}:{}\n", format!("{byte:02x}").repeat(32))
    }

    fn seal(plugin: &PayloadSeal, topic: &str, payload: &[u8]) -> Vec<u8> {
        let changes = plugin.before_store(&testing::batch(&[(topic, "c", payload)])).expect("seals");
        changes.payload_of(0).expect("is replaced").to_vec()
    }

    /// The payload, or the reason why it is discarded.
    fn open(plugin: &PayloadSeal, topic: &str, sealed: &[u8]) -> Result<Vec<u8>, u8> {
        let changes = plugin.after_load(&testing::batch(&[(topic, "c", sealed)])).expect("answers");
        match changes.discarded(0) {
            Some(reason) => Err(reason),
            None => Ok(changes.payload_of(0).unwrap_or(sealed).to_vec()),
        }
    }

    #[test]
    fn what_is_sealed_comes_back_and_never_looks_the_same() {
        let plugin = plugin(&"ab".repeat(32));
        let (one, two) = (seal(&plugin, "a", b"secret"), seal(&plugin, "a", b"secret"));
        assert_ne!(one, two);
        assert!(!one.windows(6).any(|window| window == b"secret"));
        assert_eq!(open(&plugin, "a", &one), Ok(b"secret".to_vec()));
        assert_eq!(open(&plugin, "a", &seal(&plugin, "a", b"")), Ok(Vec::new()));
    }

    #[test]
    fn keys_can_be_changed() {
        let old = seal(&plugin(&line(1, 0xAA)), "a", b"x");
        let both = plugin(&format!("# newest first\n{}{}", line(2, 0xBB), line(1, 0xAA)));
        assert_eq!(open(&both, "a", &old), Ok(b"x".to_vec()));
        assert_eq!(open(&plugin(&line(1, 0xAA)), "a", &seal(&both, "a", b"x")), Err(0x83), "the new key seals");
        assert!(testing::take().lines[0].1.contains("sealed with key 2"));
    }

    #[test]
    fn what_was_changed_or_moved_is_not_delivered() {
        let plugin = plugin(&line(0, 1));
        let sealed = seal(&plugin, "a", b"secret");
        assert_eq!(open(&plugin, "b", &sealed), Err(0x83), "another topic");
        for at in HEAD_BYTES - 1..sealed.len() {
            let mut changed = sealed.clone();
            changed[at] ^= 1;
            assert_eq!(open(&plugin, "a", &changed), Err(0x83), "byte {at}");
        }
        assert_eq!(open(&plugin, "a", &sealed[..HEAD_BYTES - 1]), Err(0x83));
        assert_eq!(open(&plugin, "a", b"plain"), Ok(b"plain".to_vec()), "from before the plugin was there");
    }

    #[test]
    fn wrong_key_files_are_named() {
        let wrong = |text: &str| PayloadSeal::from_text(text, &Settings::default()).err().expect("is refused");
        let filters = |value: &str| {
            let settings = Settings::from_pairs(&[("filters", value)]);
            PayloadSeal::from_text(&line(0, 1), &settings).err().expect("is refused")
        };
        assert_eq!(filters(" "), "setting `filters` is empty", "nothing would be sealed");
        assert_eq!(filters("a/# b#"), "setting `filters`: \"b#\" is not a topic filter");
        assert_eq!(wrong("# nothing\n"), "there is no key in it");
        for text in ["abc".to_owned(), "+a".repeat(32), "gg".repeat(32)] {
            assert_eq!(wrong(&text), "line 1: a key has 64 hexadecimal digits", "{text}");
        }
        assert_eq!(wrong(&format!("300:{}", "ab".repeat(32))), "line 1: \"300\" is no number from 0 to 255");
        assert_eq!(wrong(&format!("{}{}", line(1, 1), line(1, 2))), "line 2: there is another key with the ID 1");
    }
}
