//! `plugin new`: a project that builds and passes its own tests at once, with nothing but wit-bindgen from outside.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use clap::ValueEnum;

/// Languages there are templates for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Language {
    Rust,
}

/// What the plugin is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Kind {
    /// Who may connect.
    Auth,
    /// What clients may do.
    Acl,
    /// Messages on their way to the store.
    StorageHook,
    /// What happens.
    Events,
}

macro_rules! embedded {
    ($($to:literal = $from:literal),+ $(,)?) => { [$(($to, include_str!(concat!("../../../", $from)))),+] };
}

/// The contract and the SDK, as this broker was built with them.
const SHARED: [(&str, &str); 14] = embedded! {
    "wit/types.wit" = "wit/types.wit",
    "wit/host.wit" = "wit/host.wit",
    "wit/plugin.wit" = "wit/plugin.wit",
    "wit/worlds.wit" = "wit/worlds.wit",
    "wit/deps/keyvalue/keyvalue.wit" = "wit/deps/keyvalue/keyvalue.wit",
    "sdk/rust/src/lib.rs" = "sdk/rust/src/lib.rs",
    "sdk/rust/src/batch.rs" = "sdk/rust/src/batch.rs",
    "sdk/rust/src/bindings.rs" = "sdk/rust/src/bindings.rs",
    "sdk/rust/src/export.rs" = "sdk/rust/src/export.rs",
    "sdk/rust/src/host.rs" = "sdk/rust/src/host.rs",
    "sdk/rust/src/http.rs" = "sdk/rust/src/http.rs",
    "sdk/rust/src/keyvalue.rs" = "sdk/rust/src/keyvalue.rs",
    "sdk/rust/src/testing.rs" = "sdk/rust/src/testing.rs",
    "sdk/rust/src/topic.rs" = "sdk/rust/src/topic.rs",
};

const SDK_MANIFEST: &str = r#"[package]
name = "wasmqtt-sdk"
version = "0.1.0"
edition = "2024"
license = "Apache-2.0"
publish = false

[dependencies]
wit-bindgen = { version = "0.61.1", default-features = false, features = ["macros", "realloc"] }
wasip2 = { version = "2.0.1", optional = true }

[features]
http = ["dep:wasip2"]
keyvalue = []
"#;

const MANIFEST: &str = r#"[package]
name = "NAME"
version = "0.1.0"
edition = "2024"
publish = false

[lib]
crate-type = ["cdylib", "rlib"]

[dependencies]
wasmqtt-sdk = { path = "sdk/rust" }

# On its own, wherever it lies.
[workspace]

# Small, and a panic is a trap.
[profile.release]
opt-level = "s"
lto = true
strip = true
panic = "abort"
"#;

impl Kind {
    fn source(self) -> &'static str {
        match self {
            Self::Auth => include_str!("templates/auth.rs.txt"),
            Self::Acl => include_str!("templates/acl.rs.txt"),
            Self::StorageHook => include_str!("templates/storage_hook.rs.txt"),
            Self::Events => include_str!("templates/events.rs.txt"),
        }
    }

    fn cases(self) -> &'static str {
        match self {
            Self::Auth => include_str!("templates/cases_auth.toml"),
            Self::Acl => include_str!("templates/cases_acl.toml"),
            Self::StorageHook => include_str!("templates/cases_storage_hook.toml"),
            Self::Events => include_str!("templates/cases_events.toml"),
        }
    }
}

/// Makes the project in a new folder, and says what comes next.
pub(crate) fn new(name: &str, Language::Rust: Language, kind: Kind, path: Option<&Path>) -> anyhow::Result<String> {
    let is_letter = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    if !(1..=64).contains(&name.len()) || !name.bytes().all(is_letter) || !name.as_bytes()[0].is_ascii_lowercase() {
        bail!("{name:?} must be 1 to 64 small letters, digits or `-`, beginning with a letter");
    }
    let folder = path.map_or_else(|| PathBuf::from(name), Path::to_owned);
    if folder.exists() {
        bail!("{} is there already", folder.display());
    }
    let file = name.replace('-', "_");
    let readme = include_str!("templates/README.md.txt").replace("NAME", name).replace("FILE", &file);
    let own = [
        ("Cargo.toml", MANIFEST.replace("NAME", name)),
        ("README.md", readme),
        (".gitignore", "/target\n".to_owned()),
        ("cases.toml", kind.cases().to_owned()),
        ("src/lib.rs", kind.source().to_owned()),
        ("sdk/rust/Cargo.toml", SDK_MANIFEST.to_owned()),
    ];
    for (to, text) in own {
        write(&folder.join(to), &text)?;
    }
    for (to, text) in SHARED {
        write(&folder.join(to), text)?;
    }
    let component = folder.join(format!("target/wasm32-wasip2/release/{file}.wasm"));
    let component = std::path::absolute(&component).unwrap_or(component);
    let (folder, component) = (folder.display(), component.display());
    Ok(format!(
        "made {folder}\n\n  cd {folder}\n  cargo test                          the first build takes about a minute\n  \
         cargo build --release --target wasm32-wasip2\n  \
         wasmqtt plugin test target/wasm32-wasip2/release/{file}.wasm cases.toml\n\n\
         then, where the broker runs (or with its --config FILE):\n\n  \
         wasmqtt plugin deploy {component}\n"
    ))
}

fn write(file: &Path, text: &str) -> anyhow::Result<()> {
    let folder = file.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(folder)
        .and_then(|()| std::fs::write(file, text))
        .with_context(|| format!("write {}", file.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file that is left out is missed by whoever uses that part of the SDK, in a project of their own.
    #[test]
    fn everything_of_the_sdk_and_the_contract_comes_along() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let mut there = Vec::new();
        for folder in ["wit", "wit/deps/keyvalue", "sdk/rust/src"] {
            for entry in std::fs::read_dir(root.join(folder)).expect("a folder") {
                let entry = entry.expect("an entry");
                if entry.file_type().expect("a type").is_file() {
                    there.push(format!("{folder}/{}", entry.file_name().display()));
                }
            }
        }
        let mut embedded = SHARED.map(|(to, _)| to.to_owned());
        there.sort();
        embedded.sort();
        assert_eq!(there, embedded);
        let manifest = std::fs::read_to_string(root.join("sdk/rust/Cargo.toml")).expect("the SDK's manifest");
        let features = |manifest: &str| -> Vec<String> {
            let lines = manifest.lines().skip_while(|line| *line != "[features]").skip(1);
            lines.filter(|line| line.contains('=') && !line.starts_with('#')).map(str::to_owned).collect()
        };
        assert_eq!(features(&manifest), features(SDK_MANIFEST));
    }
}
