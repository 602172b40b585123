//! Hashes of passwords: our own form, and those that other brokers and tools leave behind.
//!
//! | form | what |
//! |---|---|
//! | `$argon2id$…` | Argon2id, as `wasmqtt passwd` and mosquitto 2.1 write it |
//! | `$7$ITERATIONS$SALT$HASH` | PBKDF2 with HMAC-SHA-512, as `mosquitto_passwd` has written it since 2.0 |
//! | `$6$SALT$HASH` | SHA-512 of password and salt, as `mosquitto_passwd` wrote it before |
//! | `$2b$COST$…`, also `2a` and `2y` | bcrypt, as `htpasswd -B` and many a database have it |
//!
//! Whoever takes a hash into a password file and whoever checks passwords with it must agree on what one is: a single
//! line that is none makes `auth-file` refuse the whole file.
#![forbid(unsafe_code)]

use argon2::password_hash::phc::PasswordHash;
use argon2::{Argon2, Block, Params, PasswordVerifier};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use sha2::{Digest, Sha512};
use subtle::ConstantTimeEq;

/// Passes that can be made before `limits.cpu_ms` is over, if it is raised a little.
const ITERATIONS: std::ops::RangeInclusive<u32> = 1..=1_000_000;
/// Each step doubles the time: 2^14 takes about a second.
const COST: std::ops::RangeInclusive<u32> = 4..=14;
/// bcrypt looks no further; what it is given ends with a zero byte.
const BCRYPT_BYTES_MAX: usize = 72;

/// What a password is checked with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hash(Parts);

#[derive(Debug, Clone, PartialEq, Eq)]
enum Parts {
    Argon2id(String),
    Pbkdf2 { iterations: u32, salt: Vec<u8>, hash: [u8; 64] },
    Sha512 { salt: Vec<u8>, hash: [u8; 64] },
    Bcrypt { cost: u32, salt: [u8; 16], hash: [u8; 23] },
}

impl Hash {
    /// Takes a hash apart.
    ///
    /// # Errors
    /// It could never be verified, for one of the reasons that a sentence for an operator names; also if there is not
    /// the memory that verifying it needs.
    pub fn parse(text: &str) -> Result<Self, String> {
        Parts::parse(text).map(Self)
    }

    /// What kind of hash it is, for people.
    pub fn kind(&self) -> &'static str {
        match self.0 {
            Parts::Argon2id(_) => "Argon2id",
            Parts::Pbkdf2 { .. } => "PBKDF2",
            Parts::Sha512 { .. } => "SHA-512, which is quick to guess",
            Parts::Bcrypt { .. } => "bcrypt",
        }
    }

    /// Whether it was made from this password. Takes as long as its maker wanted.
    pub fn is_of(&self, password: &[u8]) -> bool {
        self.0.is_of(password)
    }
}

impl Parts {
    fn parse(text: &str) -> Result<Self, String> {
        let mut parts = text.strip_prefix('$').ok_or_else(not_hashed)?.split('$');
        let (kind, parts): (&str, Vec<&str>) = (parts.next().unwrap_or_default(), parts.collect());
        match (kind, &parts[..]) {
            ("7", [iterations, salt, hash]) => pbkdf2(iterations, salt, hash),
            ("6", [salt, hash]) => Ok(Self::Sha512 { salt: salt_of(salt)?, hash: hash_of(hash)? }),
            ("2a" | "2b" | "2y", [cost, rest]) => bcrypt(cost, rest),
            ("6" | "7" | "2a" | "2b" | "2y", _) => Err(format!("not a ${kind}$ hash: it has another number of parts")),
            ("argon2id", _) => argon2id(text),
            (other, _) => {
                Err(format!("{other:?} is not a hash that can be checked: allowed are argon2id, 7, 6, 2a, 2b and 2y"))
            }
        }
    }

    fn is_of(&self, password: &[u8]) -> bool {
        // The other tools are written in C and end a password there; HMAC takes `x` and `x\0` for the same key.
        if password.contains(&0) && !matches!(self, Self::Argon2id(_)) {
            return false;
        }
        match self {
            Self::Argon2id(text) => {
                PasswordHash::new(text).is_ok_and(|hash| Argon2::default().verify_password(password, &hash).is_ok())
            }
            Self::Pbkdf2 { iterations, salt, hash } => {
                let mut own = [0; 64];
                pbkdf2::pbkdf2_hmac::<Sha512>(password, salt, *iterations, &mut own);
                own.ct_eq(hash).into()
            }
            Self::Sha512 { salt, hash } => {
                let own: [u8; 64] = Sha512::new().chain_update(password).chain_update(salt).finalize().into();
                own.ct_eq(hash).into()
            }
            Self::Bcrypt { cost, salt, hash } => {
                let mut terminated = password[..password.len().min(BCRYPT_BYTES_MAX)].to_vec();
                if terminated.len() < BCRYPT_BYTES_MAX {
                    terminated.push(0);
                }
                bcrypt::bcrypt(*cost, *salt, &terminated)[..23].ct_eq(hash).into()
            }
        }
    }
}

fn not_hashed() -> String {
    "the password is not hashed: use wasmqtt passwd, or mosquitto_passwd -U for a whole file".into()
}

fn argon2id(text: &str) -> Result<Parts, String> {
    let bad = |error: &dyn std::fmt::Display| format!("not an Argon2id hash: {error}");
    let hash = PasswordHash::new(text).map_err(|error| bad(&error))?;
    if hash.hash.is_none() {
        return Err(bad(&"the hash is missing"));
    }
    let params = Params::try_from(&hash).map_err(|error| bad(&error))?;
    // The plugin has little memory, and running out of it later would end the instance instead of naming the line.
    let mut blocks: Vec<Block> = Vec::new();
    let kib = params.block_count();
    blocks.try_reserve_exact(kib).map_err(|_| format!("needs {kib} KiB of memory; raise limits.memory_mib"))?;
    Ok(Parts::Argon2id(text.to_owned()))
}

fn pbkdf2(iterations: &str, salt: &str, hash: &str) -> Result<Parts, String> {
    let count = iterations.parse().ok().filter(|count| ITERATIONS.contains(count));
    let iterations = count.ok_or_else(|| {
        let (least, most) = (ITERATIONS.start(), ITERATIONS.end());
        format!("not a $7$ hash: {iterations:?} iterations; allowed are {least} to {most}")
    })?;
    Ok(Parts::Pbkdf2 { iterations, salt: salt_of(salt)?, hash: hash_of(hash)? })
}

fn salt_of(text: &str) -> Result<Vec<u8>, String> {
    let salt = STANDARD.decode(text).map_err(|error| format!("its salt is not base64: {error}"))?;
    if salt.is_empty() { Err("its salt is empty".into()) } else { Ok(salt) }
}

fn hash_of(text: &str) -> Result<[u8; 64], String> {
    let hash = STANDARD.decode(text).map_err(|error| format!("its hash is not base64: {error}"))?;
    let length = hash.len();
    hash.try_into().map_err(|_| format!("its hash has {length} bytes instead of 64"))
}

fn bcrypt(cost: &str, rest: &str) -> Result<Parts, String> {
    let number = cost.parse().ok().filter(|number| COST.contains(number) && cost.len() == 2);
    let cost = number.ok_or_else(|| {
        format!("not a bcrypt hash: cost {cost:?}; allowed are {:02} to {}", COST.start(), COST.end())
    })?;
    let cut = || "not a bcrypt hash: it is cut off, or has other characters".to_owned();
    let (salt, hash) = rest.split_at_checked(22).ok_or_else(cut)?;
    let decode = |text| bcrypt::BASE_64.decode(text).map_err(|_| cut());
    let salt = decode(salt)?.try_into().map_err(|_| cut())?;
    let hash = decode(hash)?.try_into().map_err(|_| cut())?;
    Ok(Parts::Bcrypt { cost, salt, hash })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// `secret`: the first two by `mosquitto_passwd`, the last three by crypt(3).
    const SECRETS: [&str; 8] = [
        "$7$101$05dZjo3mzDhz6tOY$w+1EGs+bjOxkMISPxerliH93uDyq4M6V+QruAUZGaONje8unXks179Eoos5H+yNylwPCg37y/yO1Q/fj6YAIAg==",
        "$6$ZW6YXY9QBS1b/9bR$dNb7x6RGxO+O08MiNqHat9NIKpGY2tJE630zRGf0svOlQfF1IKTzJIWVQMnUNAbVcfumr/h7Rol+W2kFWwZ2XA==",
        "$7$101$AAECAwQFBgcICQoL$Xr99N9ym9ys8TWxis5ajETJq6EVYzmc6nb8t3pUYnPBbCAbICS4xejTltonXWCtJNBvA+By+TXUqU6qCblO00w==",
        "$7$1000$AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8gISIjJCUmJygpKissLS4vMDEyMzQ1Njc4OTo7PD0+Pw==\
         $j5aX3DstWRgO5cjjfvKvsf7Z/KK812T4wGDMih+DCHQg8P7++fmj4sZcMp1smkEafZL0QZ29tE5ezahL/nyffw==",
        "$6$AAECAwQFBgcICQoL$JqsxEv/ucyxjA5DKsQ+Y8CDWaQDNQI9FpAkmfwAqWfwZLk/JEGgM0EpylrJHAZKKyFQjJeZ3nFaHjPzOzPPmPw==",
        "$2b$05$abcdefghijklmnopqrstuuOQiyCxlgf/oeuTqixKmWdcYUh4Hjl0a",
        "$2y$05$abcdefghijklmnopqrstuuOQiyCxlgf/oeuTqixKmWdcYUh4Hjl0a",
        "$2a$05$abcdefghijklmnopqrstuuOQiyCxlgf/oeuTqixKmWdcYUh4Hjl0a",
    ];

    #[test]
    fn passwords_of_other_tools_are_checked() {
        for text in SECRETS {
            let hash = Hash::parse(text).expect(text);
            assert!(hash.is_of(b"secret"), "{text}");
            for wrong in ["", "Secret", "secret ", "secret\0"] {
                assert!(!hash.is_of(wrong.as_bytes()), "{wrong:?} for {text}");
            }
        }
    }

    #[test]
    fn bcrypt_takes_passwords_of_any_length() {
        let hash = Hash::parse(SECRETS[5]).expect("a hash");
        for length in [0, 71, 72, 73, 65_535] {
            assert!(!hash.is_of(&vec![b'x'; length]));
        }
    }

    #[test]
    fn what_could_never_be_checked_is_refused() {
        let (salt, hash) = ("AAECAwQFBgcICQoL", "AAAA");
        for (text, why) in [
            ("plain".into(), "the password is not hashed"),
            (String::new(), "the password is not hashed"),
            ("$5$salt$hash".into(), "\"5\" is not a hash that can be checked"),
            ("$scrypt$ln=16$a$b".into(), "\"scrypt\" is not a hash"),
            (format!("$6${salt}"), "another number of parts"),
            (format!("$6${salt}${hash}"), "3 bytes instead of 64"),
            (format!("$6$?${hash}"), "its salt is not base64"),
            (format!("$6$${hash}"), "its salt is empty"),
            (format!("$7$0${salt}${hash}"), "allowed are 1 to 1000000"),
            (format!("$7$99999999${salt}${hash}"), "allowed are 1 to 1000000"),
            ("$2b$31$abcdefghijklmnopqrstuuOQiyCxlgf/oeuTqixKmWdcYUh4Hjl0a".into(), "allowed are 04 to 14"),
            ("$2b$05$abcdefghijklmnopqrstuuOQ".into(), "cut off"),
            ("$2b$05$abcdefghijklmnopqrstuvOQiyCxlgf/oeuTqixKmWdcYUh4Hjl0a".into(), "other characters"),
            ("$2b$05$abcdefghijklmnopqrstuuOQiyCxlgf/oeuTqixKmWdcYUh4Hjl0b".into(), "other characters"),
            ("$argon2id$v=19$m=64,t=1,p=1$c2FsdHNhbHQ".into(), "the hash is missing"),
        ] {
            let error = Hash::parse(&text).expect_err(&text);
            assert!(error.contains(why), "{error}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_read_without_a_panic(text in "(\\$(7|6|2b|2y|argon2id)\\$)?[!-~ü]{0,80}") {
            let _ = Hash::parse(&text);
        }
    }
}
