//! Public keys in PEM: one or several, with what is wrong about each that cannot be used.

use jsonwebtoken::{Algorithm, DecodingKey};
use pem::Pem;

use super::{Known, RSA_BITS_MAX};

/// Object identifiers in DER of what a key may be for.
const RSA: &[u8] = &[0x06, 0x09, 0x2A, 0x86, 0x48, 0x86, 0xF7, 0x0D, 0x01, 0x01, 0x01];
const P256: &[u8] = &[0x06, 0x08, 0x2A, 0x86, 0x48, 0xCE, 0x3D, 0x03, 0x01, 0x07];
const OTHERS: [(&[u8], &str); 6] = [
    (&[0x06, 0x05, 0x2B, 0x81, 0x04, 0x00, 0x22], "a key for the curve P-384 (ES384)"),
    (&[0x06, 0x05, 0x2B, 0x81, 0x04, 0x00, 0x23], "a key for the curve P-521 (ES512)"),
    (&[0x06, 0x05, 0x2B, 0x81, 0x04, 0x00, 0x0A], "a key for the curve secp256k1 (ES256K)"),
    (&[0x06, 0x03, 0x2B, 0x65, 0x70], "an Ed25519 key (EdDSA)"),
    (&[0x06, 0x03, 0x2B, 0x65, 0x71], "an Ed448 key (EdDSA)"),
    (&[0x06, 0x09, 0x2A, 0x86, 0x48, 0x86, 0xF7, 0x0D, 0x01, 0x01, 0x0A], "an RSA key for PSS alone (PS256)"),
];
/// What stands around the modulus of an RSA key, at most; certificates apart.
const RSA_FRAME_BYTES: usize = 64;

/// The keys of a file in their order.
///
/// # Errors
/// There is nothing in PEM in it.
pub(super) fn keys(text: &[u8]) -> Result<Vec<Result<Known, String>>, String> {
    let blocks = pem::parse_many(text).map_err(|error| format!("not public keys in PEM: {error}"))?;
    // What openssl writes before a private key for a curve.
    let keys: Vec<_> = blocks.iter().filter(|block| block.tag() != "EC PARAMETERS").map(key).collect();
    if keys.is_empty() {
        Err("not public keys in PEM: there is no -----BEGIN PUBLIC KEY-----".into())
    } else {
        Ok(keys)
    }
}

fn has(der: &[u8], identifier: &[u8]) -> bool {
    der.windows(identifier.len()).any(|window| window == identifier)
}

fn key(block: &Pem) -> Result<Known, String> {
    let (tag, der) = (block.tag(), block.contents());
    if tag.ends_with("PRIVATE KEY") {
        let cure = "whoever reads it can sign tokens; put the public one here: openssl pkey -in FILE -pubout";
        return Err(format!("{tag:?} is a private key: {cure}"));
    }
    if !matches!(tag, "PUBLIC KEY" | "RSA PUBLIC KEY" | "CERTIFICATE") {
        return Err(format!("{tag:?} is not a public key"));
    }
    let text = pem::encode(block);
    let broken = |error: jsonwebtoken::errors::Error| format!("{tag:?} is damaged: {error}");
    if tag == "RSA PUBLIC KEY" || has(der, RSA) {
        if tag != "CERTIFICATE" && der.len() > RSA_BITS_MAX / 8 + RSA_FRAME_BYTES {
            return Err(format!("an RSA key of more than {RSA_BITS_MAX} bits"));
        }
        return Known::checked(None, Algorithm::RS256, DecodingKey::from_rsa_pem(text.as_bytes()).map_err(broken)?);
    }
    if has(der, P256) {
        return Known::checked(None, Algorithm::ES256, DecodingKey::from_ec_pem(text.as_bytes()).map_err(broken)?);
    }
    let other = OTHERS.iter().find(|(identifier, _)| has(der, identifier));
    let name = other.map_or_else(|| format!("{tag:?} of an unknown kind"), |(_, name)| (*name).to_owned());
    Err(format!("{name}: only RSA (RS256) and P-256 (ES256) can be used"))
}
