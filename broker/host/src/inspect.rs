//! What a component file is, without running it.

use std::path::Path;

use serde::Serialize;
use wasmtime::Engine;
use wasmtime::component::{Component, types};

use crate::HostError;
use crate::diagnosis;
use crate::grants;
use crate::instance::one_line;
use crate::loader::{COMPONENT_BYTES_MAX, read};

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

/// Reads and compiles a component, and lists what it exports and imports.
///
/// # Errors
/// The file cannot be read, is too large, or is no valid component.
pub fn inspect(path: &Path) -> Result<Inspection, HostError> {
    let bytes = read(path, COMPONENT_BYTES_MAX)?;
    diagnosis::check_header(&bytes)?;
    let engine = crate::engine::engine(None)?;
    let component = Component::new(&engine, &bytes)
        .map_err(|error| HostError::new(format!("not a component: {}", one_line(&error))))?;
    Ok(Inspection::of(&component.component_type(), &engine, bytes.len() as u64))
}
