//! Functions of WASI that the broker watches: its own take the place of those that wasmtime links.

use wasmtime::StoreContextMut;
use wasmtime::component::Linker;

use crate::HostError;
use crate::guest::Guest;

/// Versions 0.2.0 up to this one are looked for.
const PATCHES: u32 = 256;

/// The name under which wasmtime links an interface, with its version: `wasi:filesystem/types` is `…/types@0.2.12`
/// today. `function` is one of its functions.
///
/// # Errors
/// No such function is linked; what was to be watched would go unwatched.
pub(crate) fn linked_name(linker: &Linker<Guest>, interface: &str, function: &str) -> Result<String, HostError> {
    // Defining a function a second time is an error, which tells where it is.
    let mut scratch = linker.clone();
    scratch.allow_shadowing(false);
    let mut is_there = |name: &String| {
        let defined = |mut interface: wasmtime::component::LinkerInstance<'_, Guest>| {
            interface.func_wrap(function, |_: StoreContextMut<'_, Guest>, (): ()| Ok(()))
        };
        scratch.instance(name).and_then(defined).is_err()
    };
    let name = (0..PATCHES).map(|patch| format!("{interface}@0.2.{patch}")).find(|name| is_there(name));
    name.ok_or_else(|| HostError::new(format!("this wasmtime links no function {function:?} of {interface}@0.2")))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// With another version of WASI in wasmtime this finds the new names, or says so.
    #[test]
    fn what_is_watched_is_linked() {
        let engine = crate::engine::engine(None).expect("an engine");
        let linker = crate::guest::linker(&engine).expect("everything that is watched is there");
        assert!(linked_name(&linker, "wasi:filesystem/types", "[method]descriptor.open-at").is_ok());
        assert!(linked_name(&linker, "wasi:filesystem/types", "[method]descriptor.open").is_err());
        assert!(linked_name(&linker, "wasi:nothing/here", "create").is_err());
    }
}
