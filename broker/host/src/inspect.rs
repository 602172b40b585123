//! What a component file is, without running it.

use std::path::Path;

use serde::Serialize;
use wasmtime::Engine;
use wasmtime::component::types;

use crate::HostError;
use crate::cache::{self, Cache};
use crate::cancel::Cancel;
use crate::compile::{CompileLimits, Compiler};
use crate::compiling::Compilers;
use crate::grants;
use crate::source::{COMPONENT_BYTES_MAX, read_file};

/// The outside of a component.
#[derive(Debug, Clone, Serialize)]
pub struct Inspection {
    /// Bytes of the file.
    pub size: u64,
    /// Those of its exports that this broker calls.
    pub plug_points: Vec<String>,
    /// Names of its exports.
    pub exports: Vec<String>,
    /// Names of its imports.
    pub imports: Vec<String>,
    /// Functions of the broker that it imports.
    pub host_functions: Vec<String>,
}

impl Inspection {
    pub(crate) fn of(ty: &types::Component, engine: &Engine, size: u64) -> Self {
        let exports: Vec<String> = ty.exports(engine).map(|(name, _)| name.to_owned()).collect();
        let point = |name: &String| name.strip_prefix("wasmqtt:plugin/").map(str::to_owned);
        Self {
            size,
            plug_points: exports.iter().filter_map(point).filter(|name| !name.starts_with("lifecycle@")).collect(),
            host_functions: grants::host_functions(ty, engine),
            imports: ty.imports(engine).map(|(name, _)| name.to_owned()).collect(),
            exports,
        }
    }
}

/// Reads and compiles a component, and lists what it exports and imports. What was compiled lies in `cache_dir`, for a
/// host of this process that wants to load it.
///
/// # Errors
/// The file cannot be read, is too large, or is no valid component.
pub fn inspect(path: &Path, compiler: &Compiler, cache_dir: &Path) -> Result<Inspection, HostError> {
    let bytes = read_file(path, COMPONENT_BYTES_MAX)?;
    let engine = crate::engine::engine(None)?;
    let cache = Cache::open(cache_dir, None)?;
    let limits = CompileLimits::default();
    let compilers = Compilers::new(cache, engine.clone(), compiler.clone(), limits, 1, Cancel::default());
    let compiled = compilers.component("plugin", &bytes, &cache::digest(&bytes), &Cancel::default())?;
    Ok(Inspection::of(&compiled.component.component_type(), &engine, bytes.len() as u64))
}
