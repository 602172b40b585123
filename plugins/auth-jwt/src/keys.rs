//! Keys that tokens are checked with, and for which algorithm each is: a token must not choose that.

use std::rc::Rc;

use jsonwebtoken::jwk::{AlgorithmParameters, EllipticCurve, Jwk, KeyAlgorithm, PublicKeyUse};
use jsonwebtoken::{Algorithm, DecodingKey};
use serde::Deserialize;
use serde_json::Value;
use wasmqtt_sdk::{Settings, debug};

/// Where keys come from. Asked for each token, so that a source may get new ones meanwhile.
pub(crate) trait KeySource {
    /// The key for a token. Without `kid`, the only one for its algorithm.
    fn find(&self, id: Option<&str>, algorithm: Algorithm) -> Result<Rc<DecodingKey>, String>;
}

/// One key.
pub(crate) struct Known {
    id: Option<String>,
    algorithm: Algorithm,
    key: Rc<DecodingKey>,
}

/// Keys that stay the same.
pub(crate) struct Keys(Vec<Known>);

impl Keys {
    pub(crate) fn from_settings(settings: &Settings) -> Result<Self, String> {
        let names = ["secret", "secret_file", "key_file", "jwks_file"];
        let set: Vec<&str> = names.into_iter().filter(|name| settings.get(name).is_some()).collect();
        let [name] = set[..] else {
            return Err(format!("one of the settings {} must be there, and only one", names.join(", ")));
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
    fn find(&self, id: Option<&str>, algorithm: Algorithm) -> Result<Rc<DecodingKey>, String> {
        let mut fits = self.0.iter().filter(|known| {
            known.algorithm == algorithm && (id.is_none() || known.id.is_none() || known.id.as_deref() == id)
        });
        match (fits.next(), fits.next()) {
            (Some(known), None) => Ok(Rc::clone(&known.key)),
            (None, _) => Err(format!("no key for {algorithm:?} with kid {id:?}")),
            (Some(_), Some(_)) => Err(format!("several keys for {algorithm:?} with kid {id:?}")),
        }
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
