//! Clients show a JSON Web Token instead of a password. HS256, RS256 and ES256.
//!
//! Settings, one of: `secret` or `secret_file` (HS256), `key_file` (public keys in PEM, one or several: RS256 or ES256),
//! `jwks_file` (a JSON Web Key Set; the token's `kid` chooses, and a token without one is checked with each key for its
//! algorithm, eight at most), `jwks_url` (one that is fetched with the first token, every `jwks_refresh_secs` (300), and
//! when a token has a `kid` that is not in it; its server needs a grant). A key that cannot be used is named when the
//! plugin is loaded. Then `from` = `password` or `username`; `issuer`, `audience` (a list, or a text with spaces between
//! several); `leeway` in seconds (30); `require_exp` = `true` or `false`; `principal_claim` (`sub`);
//! `username_claim` and `client_id_claim`, which must equal what the client says; `acl_claim` (`acl`).
//!
//! A token without the principal's claim is refused, unless `username_claim` confirms the user name, which it then is.
//!
//! A token with the ACL claim `{"pub": [FILTER…], "sub": [FILTER…], "all": [FILTER…]}` carries its permissions: nothing
//! else is allowed, and no other plugin is asked. A client must have shown a new token when the old one expires.
//!
//! A token with critical header parameters (`crit`) is refused: it is not for those who do not know them, and this
//! plugin knows none. RFC 7515 section 4.1.11.

mod claims;
mod keys;

use std::time::Duration;

use jsonwebtoken::errors::ErrorKind;
use jsonwebtoken::{Algorithm, DecodingKey, Validation, decode, decode_header, get_current_timestamp};
use serde_json::{Map, Value};
use wasmqtt_sdk::{
    Auth, BAD_USER_NAME_OR_PASSWORD, Grant, NOT_AUTHORIZED, Outcome, Plugin, Request, Settings, debug, export_plugin,
    warn,
};

use crate::keys::KeySource;

/// Seconds by which clocks may differ.
const LEEWAY_DEFAULT: u64 = 30;

/// Where the token is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum From {
    Password,
    Username,
}

/// Its settings and keys.
pub struct AuthJwt {
    keys: Box<dyn KeySource>,
    from: From,
    issuer: Vec<String>,
    audience: Vec<String>,
    leeway: u64,
    require_exp: bool,
    principal_claim: String,
    username_claim: Option<String>,
    client_id_claim: Option<String>,
    acl_claim: String,
}

/// All there are: a name with a typing mistake, such as `audiance`, would leave a check out.
const NAMES: [&str; 17] = [
    "secret",
    "secret_file",
    "key_file",
    "jwks_file",
    "jwks_url",
    "jwks_refresh_secs",
    "from",
    "issuer",
    "issuer.*",
    "audience",
    "audience.*",
    "leeway",
    "require_exp",
    "principal_claim",
    "username_claim",
    "client_id_claim",
    "acl_claim",
];

fn words(settings: &Settings, name: &str) -> Result<Vec<String>, String> {
    Ok(settings.list(name)?.unwrap_or_default().into_iter().map(str::to_owned).collect())
}

impl Plugin for AuthJwt {
    fn new(settings: &Settings) -> Result<Self, String> {
        settings.only(&NAMES)?;
        // Such as the name of a claim that no token has: what it stands for would not be checked.
        if let Some((name, _)) = settings.iter().find(|(_, value)| value.trim().is_empty()) {
            return Err(format!("setting `{name}` is empty"));
        }
        let from = match settings.get("from").unwrap_or("password") {
            "password" => From::Password,
            "username" => From::Username,
            other => return Err(format!("setting `from` = {other:?}: allowed are password and username")),
        };
        if from == From::Username && settings.get("username_claim").is_some() {
            return Err("setting `username_claim`: with `from` = \"username\" the user name is the token".into());
        }
        Ok(Self {
            keys: keys::from_settings(settings)?,
            from,
            issuer: words(settings, "issuer")?,
            audience: words(settings, "audience")?,
            leeway: settings.parse("leeway", LEEWAY_DEFAULT)?,
            require_exp: settings.parse("require_exp", true)?,
            principal_claim: settings.get("principal_claim").unwrap_or("sub").to_owned(),
            username_claim: settings.get("username_claim").map(str::to_owned),
            client_id_claim: settings.get("client_id_claim").map(str::to_owned),
            acl_claim: settings.get("acl_claim").unwrap_or("acl").to_owned(),
        })
    }

    /// Once for each build, and not in each instance.
    fn health(&self) -> Result<(), String> {
        self.keys.warnings().iter().for_each(|warning| warn(warning));
        Ok(())
    }
}

impl AuthJwt {
    /// The claims of a token that is good now; outside: whether that can be told.
    fn checked(&self, token: &str) -> Result<Result<Map<String, Value>, String>, String> {
        let header = match decode_header(token) {
            Ok(header) => header,
            Err(error) => return Ok(Err(format!("not a token: {error}"))),
        };
        // The issuer says: whoever does not understand these must refuse the token. RFC 7515 section 4.1.11.
        if let Some(critical) = &header.crit {
            return Ok(Err(format!("its critical header parameters {critical:?} are not understood")));
        }
        let (id, algorithm) = (header.kid.as_deref(), header.alg);
        let mut why = format!("no key for {algorithm:?} with kid {id:?}");
        for key in self.keys.find(id, algorithm)? {
            match self.verified(token, algorithm, &key) {
                Ok(claims) => return Ok(Ok(claims)),
                // Another key may have signed it.
                Err(error) if *error.kind() == ErrorKind::InvalidSignature => why = error.to_string(),
                Err(error) => return Ok(Err(error.to_string())),
            }
        }
        Ok(Err(why))
    }

    fn verified(
        &self,
        token: &str,
        algorithm: Algorithm,
        key: &DecodingKey,
    ) -> jsonwebtoken::errors::Result<Map<String, Value>> {
        let mut validation = Validation::new(algorithm);
        validation.leeway = self.leeway;
        validation.validate_nbf = true;
        let mut required = Vec::new();
        if self.require_exp {
            required.push("exp");
        }
        if !self.issuer.is_empty() {
            validation.set_issuer(&self.issuer);
            required.push("iss");
        }
        if self.audience.is_empty() {
            validation.validate_aud = false;
        } else {
            validation.set_audience(&self.audience);
            required.push("aud");
        }
        validation.set_required_spec_claims(&required);
        decode(token, key, &validation).map(|token| token.claims)
    }

    /// A claim that must say what the client says.
    fn check_claim(claims: &Map<String, Value>, name: Option<&String>, said: Option<&str>) -> Result<(), String> {
        let Some(name) = name else { return Ok(()) };
        match claims.get(name).and_then(Value::as_str) {
            Some(value) if Some(value) == said => Ok(()),
            _ => Err(format!("the claim {name} is not what the client says")),
        }
    }

    /// Whom the token is about. What the client says of itself counts only if a claim has confirmed it.
    fn principal<'a>(&self, claims: &'a Map<String, Value>, username: Option<&'a str>) -> Result<&'a str, String> {
        let claimed = match claims.get(&self.principal_claim) {
            None => None,
            Some(Value::String(name)) => Some(name.as_str()),
            Some(other) => return Err(format!("the claim {} is {other}, which is no text", self.principal_claim)),
        };
        let confirmed = username.filter(|_| self.username_claim.is_some());
        let mut names = claimed.into_iter().chain(confirmed).filter(|name| !name.is_empty());
        names.next().ok_or_else(|| format!("the claim {} does not say who it is", self.principal_claim))
    }

    /// Until the token is over. RFC 7519 section 2: the time may have a fraction.
    fn seconds_left(&self, expires: &Value) -> Result<u32, String> {
        let rounded = || Some(Duration::try_from_secs_f64(expires.as_f64()?).ok()?.as_secs());
        let at = expires.as_u64().or_else(rounded).ok_or_else(|| format!("exp = {expires} is not a time"))?;
        // Within the leeway it may be over already; 0 would mean never.
        let left = at.saturating_add(self.leeway).saturating_sub(get_current_timestamp()).max(1);
        Ok(u32::try_from(left).unwrap_or(u32::MAX))
    }

    fn grant(&self, claims: &Map<String, Value>, request: &Request) -> Result<Grant, String> {
        // The user name is the token itself, then.
        let username = request.username.as_deref().filter(|_| self.from == From::Password);
        Self::check_claim(claims, self.username_claim.as_ref(), username)?;
        Self::check_claim(claims, self.client_id_claim.as_ref(), Some(&request.client_id))?;
        let mut grant = Grant::new(self.principal(claims, username)?);
        if let Some(acl) = claims.get(&self.acl_claim) {
            grant.rules = claims::rules(acl)?;
            grant.complete = true;
        }
        if let Some(expires) = claims.get("exp") {
            grant.expires = self.seconds_left(expires)?;
        }
        Ok(grant)
    }
}

impl Auth for AuthJwt {
    fn authenticate(&self, request: &Request) -> Result<Outcome, String> {
        if request.method.is_some() {
            return Ok(Outcome::Next);
        }
        let token = match self.from {
            From::Password => request.password.as_deref().and_then(|password| std::str::from_utf8(password).ok()),
            From::Username => request.username.as_deref(),
        };
        let Some(token) = token else { return Ok(Outcome::Next) };
        let claims = match self.checked(token)? {
            Ok(claims) => claims,
            Err(why) => {
                debug(&format!("token of {} refused: {why}", request.client_id));
                return Ok(Outcome::Deny(BAD_USER_NAME_OR_PASSWORD));
            }
        };
        Ok(match self.grant(&claims, request) {
            Ok(grant) => Outcome::Allow(grant),
            Err(why) => {
                debug(&format!("token of {} is not for it: {why}", request.client_id));
                Outcome::Deny(NOT_AUTHORIZED)
            }
        })
    }
}

export_plugin!(AuthJwt: auth);

#[cfg(test)]
mod tests;
