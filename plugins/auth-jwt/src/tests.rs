use std::time::Instant;

use jsonwebtoken::jwk::Jwk;
use jsonwebtoken::{Algorithm, EncodingKey, Header, encode};
use serde_json::json;
use wasmqtt_sdk::{HttpResponse, Rule, testing};

use super::keys::Fetched;
use super::*;

const RSA: &[u8] = include_bytes!("../test-keys/rsa.pem");
const RSA_PUBLIC: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/test-keys/rsa.pub.pem");
const RSA2: &[u8] = include_bytes!("../test-keys/rsa2.pem");
const RSA2_PUBLIC: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/test-keys/rsa2.pub.pem");
const P384_PUBLIC: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/test-keys/p384.pub.pem");
const EC: &[u8] = include_bytes!("../test-keys/ec.pem");
const EC_PUBLIC: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/test-keys/ec.pub.pem");

fn plugin(settings: &[(&str, &str)]) -> AuthJwt {
    AuthJwt::new(&Settings::from_pairs(settings)).expect("settings are good")
}

fn hs256() -> AuthJwt {
    plugin(&[("secret", "s3cret")])
}

fn later() -> u64 {
    get_current_timestamp() + 100
}

fn token(algorithm: Algorithm, kid: Option<&str>, claims: &Value) -> String {
    signed(&Header { kid: kid.map(str::to_owned), ..Header::new(algorithm) }, claims)
}

fn signed(header: &Header, claims: &Value) -> String {
    let key = match header.alg {
        Algorithm::RS256 => EncodingKey::from_rsa_pem(RSA).expect("a key"),
        Algorithm::ES256 => EncodingKey::from_ec_pem(EC).expect("a key"),
        _ => EncodingKey::from_secret(b"s3cret"),
    };
    encode(header, claims, &key).expect("a token")
}

fn ask(plugin: &AuthJwt, token: &str) -> Outcome {
    plugin.authenticate(&testing::login("c", "ann", token)).expect("answers")
}

fn granted(outcome: Outcome) -> Grant {
    let Outcome::Allow(grant) = outcome else { panic!("{outcome:?}") };
    grant
}

const DENIED: Outcome = Outcome::Deny(BAD_USER_NAME_OR_PASSWORD);

#[test]
fn tokens_of_each_algorithm_are_checked_with_their_own_key() {
    let claims = json!({ "sub": "ann", "exp": later() });
    let plugins = [
        (Algorithm::HS256, hs256()),
        (Algorithm::RS256, plugin(&[("key_file", RSA_PUBLIC)])),
        (Algorithm::ES256, plugin(&[("key_file", EC_PUBLIC)])),
    ];
    for (algorithm, plugin) in &plugins {
        for other in [Algorithm::HS256, Algorithm::RS256, Algorithm::ES256] {
            let outcome = ask(plugin, &token(other, None, &claims));
            assert_eq!(outcome == DENIED, other != *algorithm, "{other:?} for {algorithm:?}: {outcome:?}");
        }
    }
    // A public key is no secret: whoever takes it for one is refused.
    let public = std::fs::read(RSA_PUBLIC).expect("readable");
    let forged = encode(&Header::new(Algorithm::HS256), &claims, &EncodingKey::from_secret(&public)).expect("a token");
    assert_eq!(ask(&plugins[1].1, &forged), DENIED);
}

#[test]
fn time_issuer_and_audience_must_be_right() {
    let more: [&[(&str, &str)]; 2] =
        [&[("audience", "mqtt other")], &[("audience.0", "mqtt"), ("audience.1", "other")]];
    for audience in more {
        let settings = [&[("secret", "s3cret"), ("issuer", "idp"), ("leeway", "5")], audience].concat();
        check_time_issuer_and_audience(&plugin(&settings));
    }
}

fn check_time_issuer_and_audience(plugin: &AuthJwt) {
    let now = get_current_timestamp();
    let good = json!({ "sub": "ann", "exp": later(), "iss": "idp", "aud": ["mqtt"] });
    assert!(matches!(ask(plugin, &token(Algorithm::HS256, None, &good)), Outcome::Allow(_)));
    for (name, value) in [
        ("exp", json!(now - 10)),
        ("exp", Value::Null),
        ("nbf", json!(now + 60)),
        ("iss", json!("somebody")),
        ("iss", Value::Null),
        ("aud", json!("http")),
        ("aud", Value::Null),
    ] {
        let mut bad = good.clone();
        bad[name] = value.clone();
        if value.is_null() {
            bad.as_object_mut().expect("an object").remove(name);
        }
        assert_eq!(ask(plugin, &token(Algorithm::HS256, None, &bad)), DENIED, "{name} = {value}");
    }
}

#[test]
fn rubbish_and_unsigned_tokens_are_refused() {
    let none = "eyJhbGciOiJub25lIn0.eyJzdWIiOiJhbm4iLCJleHAiOjk5OTk5OTk5OTl9.";
    let good = token(Algorithm::HS256, None, &json!({ "sub": "ann", "exp": later() }));
    for text in ["", "x", "a.b.c", none, &good[..good.len() - 2]] {
        assert_eq!(ask(&hs256(), text), DENIED, "{text}");
    }
    let request = testing::request("c");
    assert_eq!(hs256().authenticate(&request), Ok(Outcome::Next), "no password at all");
}

#[test]
fn claims_become_identity_permissions_and_an_end() {
    let acl = json!({ "pub": ["up/#"], "sub": ["down/+"], "all": ["both"] });
    let grant =
        granted(ask(&hs256(), &token(Algorithm::HS256, None, &json!({ "sub": "dev-1", "exp": later(), "acl": acl }))));
    assert_eq!((grant.principal.as_str(), grant.complete), ("dev-1", true));
    assert!((120..=131).contains(&grant.expires), "{}", grant.expires);
    let rule = |filter: &str, publish, subscribe| Rule { filter: filter.into(), publish, subscribe, allow: true };
    assert_eq!(grant.rules.len(), 3);
    for expected in [rule("up/#", true, false), rule("down/+", false, true), rule("both", true, true)] {
        assert!(grant.rules.contains(&expected), "{expected:?}");
    }
    let plain = granted(ask(&hs256(), &token(Algorithm::HS256, None, &json!({ "sub": "dev-1", "exp": later() }))));
    assert!(!plain.complete, "others decide");
    for acl in [json!([]), json!({ "publish": [] }), json!({ "pub": ["a#"] }), json!({ "pub": "a" })] {
        let bad = token(Algorithm::HS256, None, &json!({ "sub": "dev-1", "exp": later(), "acl": acl }));
        assert_eq!(ask(&hs256(), &bad), Outcome::Deny(NOT_AUTHORIZED), "{acl}");
    }
}

/// Whoever has any token must not become somebody else by saying so.
#[test]
fn a_token_that_names_nobody_does_not_take_the_client_at_its_word() {
    for sub in [Value::Null, json!(""), json!(7)] {
        let bad = token(Algorithm::HS256, None, &json!({ "sub": sub, "exp": later() }));
        assert_eq!(ask(&hs256(), &bad), Outcome::Deny(NOT_AUTHORIZED), "{sub}");
    }
    let by_name = plugin(&[("secret", "s3cret"), ("username_claim", "user")]);
    let confirmed = token(Algorithm::HS256, None, &json!({ "user": "ann", "exp": later() }));
    assert_eq!(granted(ask(&by_name, &confirmed)).principal, "ann");
    let wrong = token(Algorithm::HS256, None, &json!({ "sub": 7, "user": "ann", "exp": later() }));
    assert_eq!(ask(&by_name, &wrong), Outcome::Deny(NOT_AUTHORIZED), "wrong is not the same as absent");
}

/// RFC 7519 §2: a `NumericDate` may have a fraction.
#[test]
fn every_time_of_expiry_ends_the_connection() {
    let exp = json!(std::time::Duration::from_secs(later()).as_secs_f64() + 0.5);
    let grant = granted(ask(&hs256(), &token(Algorithm::HS256, None, &json!({ "sub": "ann", "exp": exp }))));
    assert!((120..=131).contains(&grant.expires), "{}", grant.expires);
    let far = granted(ask(&hs256(), &token(Algorithm::HS256, None, &json!({ "sub": "ann", "exp": u64::MAX }))));
    assert_eq!(far.expires, u32::MAX);
}

#[test]
fn a_token_is_for_its_own_client() {
    let settings = [("secret", "s3cret"), ("username_claim", "user"), ("client_id_claim", "client")];
    let plugin = plugin(&settings);
    let claims = |user: &str, client: &str| json!({ "sub": "ann", "exp": later(), "user": user, "client": client });
    assert!(matches!(ask(&plugin, &token(Algorithm::HS256, None, &claims("ann", "c"))), Outcome::Allow(_)));
    for (user, client) in [("bob", "c"), ("ann", "d")] {
        let outcome = ask(&plugin, &token(Algorithm::HS256, None, &claims(user, client)));
        assert_eq!(outcome, Outcome::Deny(NOT_AUTHORIZED));
    }
}

#[test]
fn the_user_name_can_be_the_token() {
    let plugin = plugin(&[("secret", "s3cret"), ("from", "username")]);
    let token = token(Algorithm::HS256, None, &json!({ "sub": "ann", "exp": later() }));
    let outcome = plugin.authenticate(&testing::login("c", &token, "")).expect("answers");
    assert_eq!(granted(outcome).principal, "ann");
}

#[test]
fn a_key_set_is_searched_by_kid() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("jwks.json");
    // {"kty":"oct"} keys: `s3cret` and another.
    let set = json!({ "keys": [
        { "kty": "oct", "kid": "old", "alg": "HS256", "k": "b3RoZXI" },
        { "kty": "oct", "kid": "new", "alg": "HS256", "k": "czNjcmV0" },
    ] });
    std::fs::write(&file, set.to_string()).expect("write");
    let plugin = plugin(&[("jwks_file", file.to_str().expect("UTF-8"))]);
    let claims = json!({ "sub": "ann", "exp": later() });
    assert!(matches!(ask(&plugin, &token(Algorithm::HS256, Some("new"), &claims)), Outcome::Allow(_)));
    assert_eq!(ask(&plugin, &token(Algorithm::HS256, Some("old"), &claims)), DENIED, "signed with another key");
    assert_eq!(ask(&plugin, &token(Algorithm::HS256, Some("gone"), &claims)), DENIED);
    assert!(matches!(ask(&plugin, &token(Algorithm::HS256, None, &claims)), Outcome::Allow(_)), "each is tried");
    let other =
        encode(&Header::new(Algorithm::HS256), &claims, &EncodingKey::from_secret(b"nobody's")).expect("a token");
    assert_eq!(ask(&plugin, &other), DENIED);
}

/// What the issuer marks as critical must be understood, and nothing is: whatever the algorithm, wherever the key is
/// from, and though the signature is right. RFC 7515 §4.1.11.
#[test]
fn critical_header_parameters_refuse_a_token() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("jwks.json");
    std::fs::write(&file, key_set(&["a"]).body).expect("write");
    let claims = json!({ "sub": "ann", "exp": later() });
    let fetched = || {
        testing::respond(Ok(key_set(&["a"])));
        plugin(&[("jwks_url", "https://idp/keys")])
    };
    for (algorithm, plugin) in [
        (Algorithm::HS256, hs256()),
        (Algorithm::HS256, plugin(&[("jwks_file", file.to_str().expect("UTF-8"))])),
        (Algorithm::HS256, fetched()),
        (Algorithm::RS256, plugin(&[("key_file", RSA_PUBLIC)])),
        (Algorithm::ES256, plugin(&[("key_file", EC_PUBLIC)])),
    ] {
        assert!(matches!(ask(&plugin, &token(algorithm, None, &claims)), Outcome::Allow(_)), "{algorithm:?}");
        for critical in [vec![], vec!["exp"], vec!["b64", "cnf"]] {
            let crit = Some(critical.iter().map(|&name| name.to_owned()).collect());
            let header = Header { crit, ..Header::new(algorithm) };
            assert_eq!(ask(&plugin, &signed(&header, &claims)), DENIED, "{algorithm:?} {critical:?}");
        }
    }
    let lines = testing::take().lines;
    assert!(lines.iter().any(|(_, line)| line.contains("\"cnf\"") && line.contains("not understood")), "{lines:?}");
}

/// During a change of keys a set has two, and not every provider writes a `kid` into its tokens.
#[test]
fn without_a_kid_each_key_that_fits_is_tried() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("jwks.json");
    let rsa = |pem: &[u8], kid: &str| {
        let key = EncodingKey::from_rsa_pem(pem).expect("a key");
        let mut public = Jwk::from_encoding_key(&key, Algorithm::RS256).expect("has a public key");
        public.common.key_id = Some(kid.into());
        public
    };
    let set = json!({ "keys": [rsa(RSA2, "new"), rsa(RSA, "old")] });
    std::fs::write(&file, set.to_string()).expect("write");
    let plugin = plugin(&[("jwks_file", file.to_str().expect("UTF-8"))]);
    let claims = json!({ "sub": "ann", "exp": later() });
    for pem in [RSA, RSA2] {
        let token = encode(&Header::new(Algorithm::RS256), &claims, &EncodingKey::from_rsa_pem(pem).expect("a key"));
        assert!(matches!(ask(&plugin, &token.expect("a token")), Outcome::Allow(_)));
    }
    let expired = token(Algorithm::RS256, None, &json!({ "sub": "ann", "exp": 1 }));
    assert_eq!(ask(&plugin, &expired), DENIED);
    let line = testing::take().lines.pop().expect("a line").1;
    assert!(line.contains("ExpiredSignature"), "the key that fits says why: {line}");
}

/// Checking signatures costs time, and anybody may send tokens.
#[test]
fn only_so_many_keys_are_tried() {
    let kids: Vec<String> = (0..20).map(|kid| kid.to_string()).collect();
    let kids: Vec<&str> = kids.iter().map(String::as_str).collect();
    testing::respond(Ok(key_set(&kids)));
    let source = Fetched::new("https://idp/keys", &Settings::default()).expect("settings are good");
    let found = |kid| source.find_at(Instant::now(), kid, Algorithm::HS256).expect("is there").len();
    assert_eq!((found(None), found(Some("19"))), (super::keys::TRIED_MAX, 1));
    let lines = testing::take().lines;
    assert!(lines.iter().any(|(_, line)| line.contains("20 keys for HS256")), "{lines:?}");
    // The last one that is tried, and the first one that is not unless the token names it.
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("jwks.json");
    for (place, is_tried) in [(super::keys::TRIED_MAX - 1, true), (super::keys::TRIED_MAX, false)] {
        let key = |at: usize| json!({ "kty": "oct", "kid": at.to_string(), "alg": "HS256", "k": if at == place { "czNjcmV0" } else { "b3RoZXI" } });
        let set = json!({ "keys": (0..20).map(key).collect::<Vec<_>>() });
        std::fs::write(&file, set.to_string()).expect("write");
        let plugin = plugin(&[("jwks_file", file.to_str().expect("UTF-8"))]);
        let claims = json!({ "sub": "ann", "exp": later() });
        let is_let_in = |kid| matches!(ask(&plugin, &token(Algorithm::HS256, kid, &claims)), Outcome::Allow(_));
        assert_eq!((is_let_in(None), is_let_in(Some(&*place.to_string()))), (is_tried, true), "key {place}");
    }
}

#[test]
fn a_key_file_may_have_several_keys() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("keys.pem");
    let text =
        [P384_PUBLIC, RSA2_PUBLIC, EC_PUBLIC, RSA_PUBLIC].map(|file| std::fs::read_to_string(file).expect("text"));
    std::fs::write(&file, text.concat()).expect("write");
    let plugin = plugin(&[("key_file", file.to_str().expect("UTF-8"))]);
    assert_eq!(plugin.health(), Ok(()));
    let lines = testing::take().lines;
    assert_eq!(lines.len(), 1);
    assert!(lines[0].1.contains("key 1: a key for the curve P-384"), "the one that cannot be used is named: {lines:?}");
    let claims = json!({ "sub": "ann", "exp": later() });
    for algorithm in [Algorithm::RS256, Algorithm::ES256] {
        assert!(matches!(ask(&plugin, &token(algorithm, None, &claims)), Outcome::Allow(_)), "{algorithm:?}");
    }
}

/// Not with the first login, which would only be refused.
#[test]
fn key_files_that_cannot_be_used_are_refused_when_loaded() {
    let file = |name: &str| format!("{}/test-keys/{name}", env!("CARGO_MANIFEST_DIR"));
    for (name, why) in [
        ("p384.pub.pem", "a key for the curve P-384 (ES384): only RSA (RS256) and P-256 (ES256) can be used"),
        ("ed25519.pub.pem", "an Ed25519 key (EdDSA)"),
        ("rsa8192.pub.pem", "an RSA key of more than 4096 bits"),
        ("rsa.pem", "is a private key: whoever reads it can sign tokens"),
        ("ec.pem", "is a private key"),
    ] {
        let file = file(name);
        let error = AuthJwt::new(&Settings::from_pairs(&[("key_file", &file)])).err().expect("is refused");
        assert!(error.starts_with(&file) && error.contains(why), "{error}");
    }
}

#[test]
fn a_key_set_may_have_keys_of_all_kinds() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("jwks.json");
    let keys = [
        (Algorithm::RS256, EncodingKey::from_rsa_pem(RSA).expect("a key")),
        (Algorithm::ES256, EncodingKey::from_ec_pem(EC).expect("a key")),
    ];
    let public = keys.map(|(algorithm, key)| Jwk::from_encoding_key(&key, algorithm).expect("has a public key"));
    std::fs::write(&file, json!({ "keys": public }).to_string()).expect("write");
    let plugin = plugin(&[("jwks_file", file.to_str().expect("UTF-8"))]);
    let claims = json!({ "sub": "ann", "exp": later() });
    for (algorithm, good) in [(Algorithm::RS256, true), (Algorithm::ES256, true), (Algorithm::HS256, false)] {
        let outcome = ask(&plugin, &token(algorithm, None, &claims));
        assert_eq!(matches!(outcome, Outcome::Allow(_)), good, "{algorithm:?}: {outcome:?}");
    }
}

fn key_set(kids: &[&str]) -> HttpResponse {
    let key = |kid: &&str| json!({ "kty": "oct", "kid": kid, "alg": "HS256", "k": "czNjcmV0" });
    let set = json!({ "keys": kids.iter().map(key).collect::<Vec<_>>() });
    HttpResponse { status: 200, body: set.to_string().into_bytes() }
}

#[test]
fn a_key_set_is_fetched_once_and_again_when_it_is_old_or_lacks_a_key() {
    let source = Fetched::new("https://idp/keys", &Settings::default()).expect("settings are good");
    let (start, find) = (Instant::now(), |at, kid| source.find_at(at, Some(kid), Algorithm::HS256));
    let after = |secs| start + Duration::from_secs(secs);
    testing::respond(Err("away".into()));
    assert!(find(start, "a").is_err_and(|why| why.contains("away")));
    assert!(find(after(9), "a").is_err());
    assert_eq!(testing::take_requests().len(), 1, "not again at once");
    testing::respond(Ok(key_set(&["a"])));
    assert!(!find(after(10), "a").expect("is there now").is_empty());
    assert!(find(after(11), "b").expect("nobody has it").is_empty());
    assert_eq!(testing::take_requests().len(), 1, "whoever invents a kid does not cause a request");
    testing::respond(Ok(key_set(&["a", "b"])));
    assert!(!find(after(20), "b").expect("is new").is_empty());
    testing::respond(Err("away".into()));
    assert!(!find(after(400), "a").expect("the old set goes on").is_empty());
    assert_eq!(testing::take_requests().len(), 2);
}

#[test]
fn no_secret_of_the_url_is_said() {
    let source = Fetched::new("https://me:s3cret@idp/keys?key=s3cret", &Settings::default()).expect("good");
    testing::respond(Ok(HttpResponse { status: 500, body: Vec::new() }));
    let why = source.find_at(Instant::now(), None, Algorithm::HS256).map(drop).expect_err("nobody can tell");
    let said = format!("{why} {:?}", testing::take().lines);
    assert!(said.contains("https://idp/keys: status 500") && !said.contains("s3cret"), "{said}");
}

/// Nobody is refused for what the plugin cannot know: `on_error` decides.
#[test]
fn without_keys_nobody_can_tell() {
    let plugin = plugin(&[("jwks_url", "https://idp/keys")]);
    let token = token(Algorithm::HS256, Some("a"), &json!({ "sub": "ann", "exp": later() }));
    let request = testing::login("c", "ann", &token);
    assert!(plugin.authenticate(&request).is_err());
    assert_eq!(ask(&plugin, "rubbish"), DENIED);
}

/// Providers publish keys for other purposes in the same set. RFC 7517 §5: they are to be ignored.
#[test]
fn keys_for_other_purposes_are_left_out() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("jwks.json");
    let secret = |kid: &str| json!({ "kty": "oct", "kid": kid, "k": "czNjcmV0" });
    let with = |kid: &str, name: &str, value: &str| {
        let mut key = secret(kid);
        key[name] = value.into();
        key
    };
    let set = json!({ "keys": [
        { "kty": "quantum", "kid": "q" },
        { "kty": "EC", "crv": "secp256k1", "kid": "k1", "x": "AQ", "y": "AQ" },
        with("enc", "use", "enc"),
        with("hs512", "alg", "HS512"),
        { "kty": "oct", "kid": "empty", "k": "" },
        secret("good"),
    ] });
    std::fs::write(&file, set.to_string()).expect("write");
    let plugin = plugin(&[("jwks_file", file.to_str().expect("UTF-8"))]);
    let claims = json!({ "sub": "ann", "exp": later() });
    for kid in [Some("good"), None] {
        assert!(matches!(ask(&plugin, &token(Algorithm::HS256, kid, &claims)), Outcome::Allow(_)), "{kid:?}");
    }
    for kid in ["enc", "hs512"] {
        assert_eq!(ask(&plugin, &token(Algorithm::HS256, Some(kid), &claims)), DENIED, "{kid}");
    }
}

#[test]
fn wrong_settings_are_named() {
    let wrong = |settings: &[(&str, &str)]| AuthJwt::new(&Settings::from_pairs(settings)).err().expect("is refused");
    assert!(wrong(&[]).contains("secret, secret_file, key_file, jwks_file"));
    assert!(wrong(&[("secret", "x"), ("key_file", RSA_PUBLIC)]).contains("and only one"));
    assert!(wrong(&[("secret", "")]).contains("`secret` is empty"), "everybody could sign with that");
    let contradiction = [("secret", "x"), ("from", "username"), ("username_claim", "user")];
    assert!(wrong(&contradiction).contains("`username_claim`"), "the user name is the token");
    assert!(wrong(&[("jwks_url", "https://idp"), ("secret", "x")]).contains("none of secret"));
    assert!(wrong(&[("jwks_url", "https://idp"), ("jwks_refresh_secs", "1")]).contains("10 to 86400"));
    assert!(wrong(&[("secret", "x"), ("from", "cookie")]).contains("allowed are password and username"));
    assert!(wrong(&[("key_file", "/nowhere")]).contains("cannot read /nowhere"));
    let here = concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml");
    assert!(wrong(&[("key_file", here)]).contains("not public keys in PEM"));
    let mistyped = wrong(&[("secret", "x"), ("audiance", "mqtt")]);
    assert!(mistyped.contains("`audiance` does not exist"), "tokens for others would be taken: {mistyped}");
    assert!(wrong(&[("secret", "x"), ("audience", " ")]).contains("`audience` is empty"));
    assert!(wrong(&[("jwks_file", here)]).contains("not a JSON Web Key Set"));
}

/// An empty list in the configuration is an empty text here, and a table has names with dots.
#[test]
fn no_empty_setting_switches_a_check_off() {
    let wrong = |name: &str, value: &str| {
        AuthJwt::new(&Settings::from_pairs(&[("secret", "x"), (name, value)])).err().expect(name)
    };
    for name in ["issuer", "audience", "audience.0", "username_claim", "client_id_claim", "acl_claim"] {
        assert!(wrong(name, "").contains(&format!("`{name}` is empty")), "{name}");
    }
    assert!(wrong("issuer.url", "https://idp").contains("`issuer` is not a list of texts"));
}
