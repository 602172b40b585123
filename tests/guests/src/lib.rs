//! Where the components are that tests load: the bundled plugins, and a guest that misbehaves on demand.
//!
//! They are built by this crate's build script whenever their sources change.

use std::path::PathBuf;

/// The component of a plugin package: `auth-demo`, `auth-file` or `misbehave`.
pub fn component(package: &str) -> PathBuf {
    dir().join(format!("{}.wasm", package.replace('-', "_")))
}

/// The folder they lie in.
pub fn dir() -> PathBuf {
    PathBuf::from(env!("WASMQTT_PLUGINS_DIR"))
}
