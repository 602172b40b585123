//! Keys that tokens are checked with, and for which algorithm each is: a token must not choose that.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::{Duration, Instant};

use jsonwebtoken::jwk::{AlgorithmParameters, EllipticCurve, Jwk, KeyAlgorithm, PublicKeyUse};
use jsonwebtoken::{Algorithm, DecodingKey};
use serde::Deserialize;
use serde_json::Value;
use wasmqtt_sdk::{HttpRequest, Settings, debug, warn};

/// Between two attempts to fetch a key set.
const ATTEMPT_PAUSE: Duration = Duration::from_secs(10);

/// Where keys come from. Asked for each token, so that a source may get new ones meanwhile.
pub(crate) trait KeySource {
    /// The key for a token; without `kid`, the only one for its algorithm. `None`: there is none, or more than one.
    ///
    /// # Errors
    /// Nobody can tell now.
    fn find(&self, id: Option<&str>, algorithm: Algorithm) -> Result<Option<Rc<DecodingKey>>, String>;
}

/// One key.
pub(crate) struct Known {
    id: Option<String>,
    algorithm: Algorithm,
    key: Rc<DecodingKey>,
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
pub(crate) struct Keys(Vec<Known>);

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
        let key = Rc::new(DecodingKey::from_secret(secret));
        Ok(Self(vec![Known { id: None, algorithm: Algorithm::HS256, key }]))
    }

    fn pem(pem: &[u8]) -> Result<Self, String> {
        let rsa = DecodingKey::from_rsa_pem(pem).map(|key| (Algorithm::RS256, key));
        let found = rsa.or_else(|_| DecodingKey::from_ec_pem(pem).map(|key| (Algorithm::ES256, key)));
        let (algorithm, key) = found.map_err(|_| "not a public key for RSA or P-256 in PEM".to_owned())?;
        Ok(Self(vec![Known { id: None, algorithm, key: Rc::new(key) }]))
    }

    /// Keys for other purposes are left out, as RFC 7517 section 5 wants it.
    fn jwks(json: &[u8]) -> Result<Self, String> {
        #[derive(Deserialize)]
        struct Set {
            keys: Vec<Value>,
        }
        let set: Set = serde_json::from_slice(json).map_err(|error| format!("not a JSON Web Key Set: {error}"))?;
        let mut keys = Vec::new();
        for key in &set.keys {
            match known(key) {
                Ok(known) => keys.push(known),
                Err(why) => debug(&format!("key {} left out: {why}", key["kid"])),
            }
        }
        if keys.is_empty() { Err("no key for HS256, RS256 or ES256".into()) } else { Ok(Self(keys)) }
    }
}

impl KeySource for Keys {
    fn find(&self, id: Option<&str>, algorithm: Algorithm) -> Result<Option<Rc<DecodingKey>>, String> {
        let mut fits = self.0.iter().filter(|known| {
            known.algorithm == algorithm && (id.is_none() || known.id.is_none() || known.id.as_deref() == id)
        });
        Ok(match (fits.next(), fits.next()) {
            (Some(known), None) => Some(Rc::clone(&known.key)),
            _ => None,
        })
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
                *state = State { keys: Some(keys), fetched: Some(now), tried: Some((now, String::new())) };
            }
            Err(error) => {
                warn(&format!("key set {}: {error}", self.url));
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
    ) -> Result<Option<Rc<DecodingKey>>, String> {
        if self.state.borrow().fetched.is_none_or(|at| now.duration_since(at) >= self.refresh) {
            self.fetch(now);
        }
        let found = self.known(id, algorithm)?;
        if found.is_some() {
            return Ok(found);
        }
        // It may be a new one.
        self.fetch(now);
        self.known(id, algorithm)
    }

    fn known(&self, id: Option<&str>, algorithm: Algorithm) -> Result<Option<Rc<DecodingKey>>, String> {
        let state = self.state.borrow();
        match (&state.keys, &state.tried) {
            (Some(keys), _) => keys.find(id, algorithm),
            (None, Some((_, error))) => Err(format!("no keys yet from {}: {error}", self.url)),
            (None, None) => Err(format!("no keys yet from {}", self.url)),
        }
    }
}

impl KeySource for Fetched {
    fn find(&self, id: Option<&str>, algorithm: Algorithm) -> Result<Option<Rc<DecodingKey>>, String> {
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
        AlgorithmParameters::RSA(_) => (Algorithm::RS256, KeyAlgorithm::RS256),
        AlgorithmParameters::EllipticCurve(key) if key.curve == EllipticCurve::P256 => {
            (Algorithm::ES256, KeyAlgorithm::ES256)
        }
        _ => return Err("not a key for HS256, RS256 or ES256".into()),
    };
    if jwk.common.key_algorithm.is_some_and(|other| other != name) {
        return Err("for another algorithm".into());
    }
    let key = DecodingKey::from_jwk(&jwk).map_err(|error| error.to_string())?;
    Ok(Known { id: jwk.common.key_id, algorithm, key: Rc::new(key) })
}
