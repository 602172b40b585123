//! What a component imports of the broker, read from its sections without compiling anything.

use std::path::Path;

use wasmparser::{
    ComponentAlias, ComponentExternalKind, ComponentOuterAliasKind, ComponentType, ComponentTypeRef, Encoding,
    InstanceTypeDeclaration, Parser, Payload,
};

use crate::HostError;
use crate::config::Grants;
use crate::grants::check_functions;
use crate::source::{COMPONENT_BYTES_MAX, read_file};

/// The interface with the functions of the broker.
const HOST_INTERFACE: &str = "wasmqtt:plugin/host@";

/// Checks that the file is a component, and that each function of the broker that it imports is granted. Takes
/// milliseconds: nothing is compiled, so the broker may still find something else wrong with it.
///
/// # Errors
/// It is not a component, cannot be read, or needs a grant; the text names which.
pub fn check_grants(path: &Path, grants: &Grants) -> Result<(), HostError> {
    let bytes = read_file(path, COMPONENT_BYTES_MAX)?;
    check_functions(&host_functions(&bytes)?, grants)
}

/// Names of the functions of the broker that it imports.
fn host_functions(bytes: &[u8]) -> Result<Vec<String>, HostError> {
    let not_one = |what: &dyn std::fmt::Display| HostError::new(format!("not a component: {what}"));
    let mut found = Vec::new();
    // Exported functions of the instance types among the types; others have none.
    let mut types: Vec<Vec<&str>> = Vec::new();
    let mut parser = Parser::new(0);
    let mut rest = bytes;
    loop {
        let chunk = parser.parse(rest, true).map_err(|error| not_one(&error))?;
        let wasmparser::Chunk::Parsed { consumed, payload } = chunk else {
            return Err(not_one(&"it ends in the middle of something"));
        };
        rest = &rest[consumed..];
        match payload {
            Payload::Version { encoding: Encoding::Module, .. } => return Err(not_one(&"it is a core module")),
            // What is inside is nobody's import.
            Payload::ModuleSection { unchecked_range, .. } | Payload::ComponentSection { unchecked_range, .. } => {
                rest = rest.get(unchecked_range.len()..).ok_or_else(|| not_one(&"a part of it is missing"))?;
            }
            Payload::ComponentTypeSection(section) => {
                for ty in section {
                    types.push(functions(&ty.map_err(|error| not_one(&error))?));
                }
            }
            Payload::ComponentAliasSection(section) => {
                for alias in section {
                    if is_of_type(&alias.map_err(|error| not_one(&error))?) {
                        types.push(Vec::new());
                    }
                }
            }
            Payload::ComponentImportSection(section) => {
                for import in section {
                    let import = import.map_err(|error| not_one(&error))?;
                    match import.ty {
                        ComponentTypeRef::Type(_) => types.push(Vec::new()),
                        ComponentTypeRef::Instance(ty) if import.name.name.starts_with(HOST_INTERFACE) => {
                            let names = types.get(ty as usize).ok_or_else(|| not_one(&"a type of it is missing"))?;
                            found.extend(names.iter().map(|name| (*name).to_owned()));
                        }
                        _ => {}
                    }
                }
            }
            Payload::ComponentExportSection(section) => {
                for export in section {
                    if export.map_err(|error| not_one(&error))?.kind == ComponentExternalKind::Type {
                        types.push(Vec::new());
                    }
                }
            }
            Payload::End(_) => return Ok(found),
            _ => {}
        }
    }
}

fn functions<'a>(ty: &ComponentType<'a>) -> Vec<&'a str> {
    let ComponentType::Instance(declarations) = ty else { return Vec::new() };
    let function = |declaration: &InstanceTypeDeclaration<'a>| match declaration {
        InstanceTypeDeclaration::Export { name, ty: ComponentTypeRef::Func(_) } => Some(name.name),
        _ => None,
    };
    declarations.iter().filter_map(function).collect()
}

/// It adds to the types.
fn is_of_type(alias: &ComponentAlias<'_>) -> bool {
    matches!(
        alias,
        ComponentAlias::InstanceExport { kind: ComponentExternalKind::Type, .. }
            | ComponentAlias::Outer { kind: ComponentOuterAliasKind::Type, .. }
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(wat: &str) -> Vec<u8> {
        wat::parse_str(wat).expect("WAT")
    }

    #[test]
    fn functions_of_the_broker_are_found_among_other_imports_and_types() {
        let component = bytes(
            r#"(component
                (type $own (func))
                (import "wasi:cli/environment@0.2.6" (instance $env (export "e" (type (sub resource))) (export "get" (func))))
                (alias export $env "e" (type $e))
                (component (import "wasmqtt:plugin/host@0.1.0" (instance (export "ban" (func)))))
                (core module)
                (import "wasmqtt:plugin/host@0.1.0" (instance (export "log" (func)) (export "publish" (func))))
            )"#,
        );
        assert_eq!(host_functions(&component).expect("a component"), ["log", "publish"]);
        assert!(check_functions(&["publish".into()], &Grants::default()).is_err());
    }

    #[test]
    fn what_is_no_component_is_said() {
        let cut = bytes("(component (import \"a\" (func)))");
        for (wrong, words) in [
            (b"not wasm".to_vec(), "not a component"),
            (bytes("(module)"), "a core module"),
            (cut[..cut.len() - 3].to_vec(), "not a component"),
            (Vec::new(), "not a component"),
        ] {
            let error = host_functions(&wrong).expect_err("no component").to_string();
            assert!(error.contains(words), "{error}");
        }
    }
}
