//! Keys that tokens are checked with, and for which algorithm each is: a token must not choose that.

mod pem;

use std::cell::RefCell;
use std::rc::Rc;
use std::time::{Duration, Instant};

use jsonwebtoken::crypto::verify;
use jsonwebtoken::jwk::{AlgorithmParameters, EllipticCurve, Jwk, KeyAlgorithm, PublicKeyUse};
use jsonwebtoken::{Algorithm, DecodingKey};
use serde::Deserialize;
use serde_json::Value;
use wasmqtt_sdk::{HttpRequest, Settings, debug, shown_url, warn};

/// Keys that are tried for one token: its signature is checked with each, which takes about a millisecond for RSA.
pub(crate) const TRIED_MAX: usize = 8;
/// Bits that the modulus of an RSA key may have; beyond that, no signature could be checked with it.
const RSA_BITS_MAX: usize = 4096;

/// Between two attempts to fetch a key set.
const ATTEMPT_PAUSE: Duration = Duration::from_secs(10);

/// Where keys come from. Asked for each token, so that a source may get new ones meanwhile.
pub(crate) trait KeySource {
    /// The keys for a token, at most [`TRIED_MAX`]: those with its `kid`, then those without any; without `kid`, all for
    /// its algorithm.
    ///
    /// # Errors
    /// Nobody can tell now.
    fn find(&self, id: Option<&str>, algorithm: Algorithm) -> Result<Vec<Rc<DecodingKey>>, String>;

    /// What an operator should look at: keys that cannot be used.
    fn warnings(&self) -> &[String] {
        &[]
    }
}

/// One key.
pub(crate) struct Known {
    id: Option<String>,
    algorithm: Algorithm,
    key: Rc<DecodingKey>,
}

impl Known {
    /// A key that cannot be used is found here, and not with the first token.
    fn checked(id: Option<String>, algorithm: Algorithm, key: DecodingKey) -> Result<Self, String> {
        verify("", b"", &key, algorithm).map_err(|error| format!("not a key for {algorithm:?}: {error}"))?;
        Ok(Self { id, algorithm, key: Rc::new(key) })
    }
}

/// The one that the settings name.
pub(crate) fn from_settings(settings: &Settings) -> Result<Box<dyn KeySource>, String> {
    match settings.get("jwks_url") {
        Some(_) if NAMES.iter().any(|name| settings.get(name).is_some()) => {
            Err(format!("beside the setting jwks_url there must be none of {}", NAMES.join(", ")))
        }
        Some(url) => Ok(Box::new(Fetched::new(url, settings)?)),
        None => Ok(Box::new(Keys::from_settings(settings)?)),
    }
}

/// Settings for keys that stay the same.
const NAMES: [&str; 4] = ["secret", "secret_file", "key_file", "jwks_file"];

/// Keys that stay the same.
#[derive(Default)]
pub(crate) struct Keys {
    keys: Vec<Known>,
    /// About keys that are not among them.
    warnings: Vec<String>,
}

impl Keys {
    fn from_settings(settings: &Settings) -> Result<Self, String> {
        let set: Vec<&str> = NAMES.into_iter().filter(|name| settings.get(name).is_some()).collect();
        let [name] = set[..] else {
            return Err(format!("one of the settings jwks_url, {} must be there, and only one", NAMES.join(", ")));
        };
        let value = settings.require(name)?;
        if name == "secret" {
            return Self::secret(value.as_bytes());
        }
        let file = std::fs::read(value).map_err(|error| format!("cannot read {value}: {error}"))?;
        let keys = match name {
            "secret_file" => Self::secret(file.trim_ascii()),
            "key_file" => Self::pem(&file),
            _ => Self::jwks(&file),
        };
        keys.map_err(|error| format!("{value}: {error}"))
    }

    fn secret(secret: &[u8]) -> Result<Self, String> {
        if secret.is_empty() {
            return Err("the secret is empty".into());
        }
        let key = Known::checked(None, Algorithm::HS256, DecodingKey::from_secret(secret))?;
        Ok(Self { keys: vec![key], ..Self::default() })
    }

    /// All keys of a file of PEM that can be used; the others are named.
    fn pem(pem: &[u8]) -> Result<Self, String> {
        let found = pem::keys(pem)?;
        let keys =
            Self::usable(found.into_iter().enumerate().map(|(at, key)| (format!("key {}", at + 1), key)).collect())?;
        let warnings = [keys.too_many(), keys.warnings].concat();
        Ok(Self { keys: keys.keys, warnings })
    }

    /// Keys for other purposes are left out, as RFC 7517 section 5 wants it.
    fn jwks(json: &[u8]) -> Result<Self, String> {
        #[derive(Deserialize)]
        struct Set {
            keys: Vec<Value>,
        }
        let set: Set = serde_json::from_slice(json).map_err(|error| format!("not a JSON Web Key Set: {error}"))?;
        let name = |(at, key): (usize, &Value)| match key["kid"].as_str() {
            Some(id) => format!("key {} ({id:?})", at + 1),
            None => format!("key {}", at + 1),
        };
        let found = set.keys.iter().enumerate().map(|(at, key)| (name((at, key)), known(key))).collect();
        let found = Self::usable(found)?;
        // Providers publish keys for other purposes in the same set: nobody need look at those.
        found.warnings.iter().for_each(|why| debug(why));
        Ok(Self { warnings: found.too_many(), ..found })
    }

    fn usable(found: Vec<(String, Result<Known, String>)>) -> Result<Self, String> {
        let (mut keys, mut wrong) = (Vec::new(), Vec::new());
        for (name, key) in found {
            match key {
                Ok(known) => keys.push(known),
                Err(why) => wrong.push(format!("{name}: {why}")),
            }
        }
        if keys.is_empty() {
            return Err(format!("no key for HS256, RS256 or ES256; {}", wrong.join("; ")));
        }
        let warnings = wrong.iter().map(|why| format!("left out: {why}")).collect();
        Ok(Self { keys, warnings })
    }

    fn too_many(&self) -> Vec<String> {
        let count = |algorithm| self.keys.iter().filter(|known| known.algorithm == algorithm).count();
        let counts =
            [Algorithm::HS256, Algorithm::RS256, Algorithm::ES256].map(|algorithm| (algorithm, count(algorithm)));
        let warning = |(algorithm, count)| {
            format!("{count} keys for {algorithm:?}: a token without a kid is checked with {TRIED_MAX} of them")
        };
        counts.into_iter().filter(|(_, count)| *count > TRIED_MAX).map(warning).collect()
    }
}

impl KeySource for Keys {
    fn find(&self, id: Option<&str>, algorithm: Algorithm) -> Result<Vec<Rc<DecodingKey>>, String> {
        let of = |with_id: bool| {
            let fits = move |known: &&Known| match (id, known.id.as_deref()) {
                _ if known.algorithm != algorithm => false,
                (None, _) => with_id,
                (Some(_), None) => !with_id,
                (wanted, known) => with_id && wanted == known,
            };
            self.keys.iter().filter(fits)
        };
        Ok(of(true).chain(of(false)).take(TRIED_MAX).map(|known| Rc::clone(&known.key)).collect())
    }

    fn warnings(&self) -> &[String] {
        &self.warnings
    }
}

/// A key set that is fetched with the first token, and again from time to time; the old one goes on while that fails.
pub(crate) struct Fetched {
    url: String,
    refresh: Duration,
    state: RefCell<State>,
}

#[derive(Default)]
struct State {
    keys: Option<Keys>,
    fetched: Option<Instant>,
    /// The last attempt, and what went wrong.
    tried: Option<(Instant, String)>,
}

impl Fetched {
    pub(crate) fn new(url: &str, settings: &Settings) -> Result<Self, String> {
        let secs: u64 = settings.parse("jwks_refresh_secs", 300)?;
        if !(10..=86_400).contains(&secs) {
            return Err(format!("setting `jwks_refresh_secs` = {secs}: allowed are 10 to 86400"));
        }
        Ok(Self { url: url.to_owned(), refresh: Duration::from_secs(secs), state: RefCell::default() })
    }

    /// At most one attempt in [`ATTEMPT_PAUSE`]: tokens with invented identifiers must not become a flood of requests.
    fn fetch(&self, now: Instant) {
        let mut state = self.state.borrow_mut();
        if state.tried.as_ref().is_some_and(|(at, _)| now.duration_since(*at) < ATTEMPT_PAUSE) {
            return;
        }
        let request = HttpRequest { method: "GET".into(), url: self.url.clone(), ..HttpRequest::default() };
        let keys = request.send().and_then(|answer| match answer.status {
            200 => Keys::jwks(&answer.body),
            status => Err(format!("status {status}")),
        });
        match keys {
            Ok(keys) => {
                keys.warnings.iter().for_each(|warning| warn(&format!("key set {}: {warning}", shown_url(&self.url))));
                *state = State { keys: Some(keys), fetched: Some(now), tried: Some((now, String::new())) };
            }
            Err(error) => {
                warn(&format!("key set {}: {error}", shown_url(&self.url)));
                state.tried = Some((now, error));
            }
        }
    }
}

impl Fetched {
    pub(crate) fn find_at(
        &self,
        now: Instant,
        id: Option<&str>,
        algorithm: Algorithm,
    ) -> Result<Vec<Rc<DecodingKey>>, String> {
        if self.state.borrow().fetched.is_none_or(|at| now.duration_since(at) >= self.refresh) {
            self.fetch(now);
        }
        let found = self.known(id, algorithm)?;
        if !found.is_empty() {
            return Ok(found);
        }
        // It may be a new one.
        self.fetch(now);
        self.known(id, algorithm)
    }

    fn known(&self, id: Option<&str>, algorithm: Algorithm) -> Result<Vec<Rc<DecodingKey>>, String> {
        let state = self.state.borrow();
        match (&state.keys, &state.tried) {
            (Some(keys), _) => keys.find(id, algorithm),
            (None, Some((_, error))) => Err(format!("no keys yet from {}: {error}", shown_url(&self.url))),
            (None, None) => Err(format!("no keys yet from {}", shown_url(&self.url))),
        }
    }
}

impl KeySource for Fetched {
    fn find(&self, id: Option<&str>, algorithm: Algorithm) -> Result<Vec<Rc<DecodingKey>>, String> {
        self.find_at(Instant::now(), id, algorithm)
    }
}

/// One key of a set, if it is for signatures that can be checked here.
fn known(key: &Value) -> Result<Known, String> {
    let jwk = Jwk::deserialize(key).map_err(|error| error.to_string())?;
    if !matches!(jwk.common.public_key_use, None | Some(PublicKeyUse::Signature)) {
        return Err("not for signatures".into());
    }
    let (algorithm, name) = match &jwk.algorithm {
        AlgorithmParameters::OctetKey(key) if !key.value.is_empty() => (Algorithm::HS256, KeyAlgorithm::HS256),
        // Six bits for each character.
        AlgorithmParameters::RSA(key) if key.n.len() * 6 > RSA_BITS_MAX + 16 => {
            return Err(format!("an RSA key of more than {RSA_BITS_MAX} bits"));
        }
        AlgorithmParameters::RSA(_) => (Algorithm::RS256, KeyAlgorithm::RS256),
        AlgorithmParameters::EllipticCurve(key) if key.curve == EllipticCurve::P256 => {
            (Algorithm::ES256, KeyAlgorithm::ES256)
        }
        AlgorithmParameters::EllipticCurve(key) => {
            return Err(format!("a key for the curve {:?}: only P-256 (ES256) can be used", key.curve));
        }
        _ => return Err("not a key for HS256, RS256 or ES256".into()),
    };
    if jwk.common.key_algorithm.is_some_and(|other| other != name) {
        return Err("for another algorithm".into());
    }
    let key = DecodingKey::from_jwk(&jwk).map_err(|error| error.to_string())?;
    Known::checked(jwk.common.key_id, algorithm, key)
}
