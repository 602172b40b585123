//! Keys that tokens are checked with, and for which algorithm each is: a token must not choose that.

use jsonwebtoken::jwk::JwkSet;
use jsonwebtoken::{Algorithm, AlgorithmFamily, DecodingKey};
use wasmqtt_sdk::Settings;

/// One key.
pub(crate) struct Known {
    id: Option<String>,
    algorithm: Algorithm,
    key: DecodingKey,
}

/// All keys.
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
            return Ok(Self::secret(value.as_bytes()));
        }
        let file = std::fs::read(value).map_err(|error| format!("cannot read {value}: {error}"))?;
        let keys = match name {
            "secret_file" => Ok(Self::secret(file.trim_ascii())),
            "key_file" => Self::pem(&file),
            _ => Self::jwks(&file),
        };
        keys.map_err(|error| format!("{value}: {error}"))
    }

    fn secret(secret: &[u8]) -> Self {
        Self(vec![Known { id: None, algorithm: Algorithm::HS256, key: DecodingKey::from_secret(secret) }])
    }

    fn pem(pem: &[u8]) -> Result<Self, String> {
        let rsa = DecodingKey::from_rsa_pem(pem).map(|key| (Algorithm::RS256, key));
        let found = rsa.or_else(|_| DecodingKey::from_ec_pem(pem).map(|key| (Algorithm::ES256, key)));
        let (algorithm, key) = found.map_err(|_| "not a public key for RSA or P-256 in PEM".to_owned())?;
        Ok(Self(vec![Known { id: None, algorithm, key }]))
    }

    /// Keys for other algorithms are left out.
    fn jwks(json: &[u8]) -> Result<Self, String> {
        let set: JwkSet = serde_json::from_slice(json).map_err(|error| format!("not a JSON Web Key Set: {error}"))?;
        let mut keys = Vec::new();
        for jwk in &set.keys {
            let key = DecodingKey::from_jwk(jwk).map_err(|error| format!("key {:?}: {error}", jwk.common.key_id))?;
            let algorithm = match key.family() {
                AlgorithmFamily::Hmac => Algorithm::HS256,
                AlgorithmFamily::Rsa => Algorithm::RS256,
                AlgorithmFamily::Ec => Algorithm::ES256,
                AlgorithmFamily::Ed => continue,
            };
            keys.push(Known { id: jwk.common.key_id.clone(), algorithm, key });
        }
        if keys.is_empty() { Err("no key for HS256, RS256 or ES256".into()) } else { Ok(Self(keys)) }
    }

    /// The key for a token. Without `kid`, the only one for its algorithm.
    pub(crate) fn find(&self, id: Option<&str>, algorithm: Algorithm) -> Result<&DecodingKey, String> {
        let mut fits = self.0.iter().filter(|known| {
            known.algorithm == algorithm && (id.is_none() || known.id.is_none() || known.id.as_deref() == id)
        });
        match (fits.next(), fits.next()) {
            (Some(known), None) => Ok(&known.key),
            (None, _) => Err(format!("no key for {algorithm:?} with kid {id:?}")),
            (Some(_), Some(_)) => Err(format!("several keys for {algorithm:?}, and no kid")),
        }
    }
}
