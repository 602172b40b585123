//! What is wrong with a component, in sentences that name the cure.

use wasmqtt_protocol::text::{Escaped, escaped};
use wasmtime::component::types;
use wasmtime::component::{ComponentNamedList, Instance, Lift, Lower};
use wasmtime::{Engine, Store};

use crate::HostError;
use crate::bindings::types::{Client, Failure, Pair};
use crate::bindings::{acl, auth, cluster, events, handover, lifecycle, storage_hook};
use crate::guest::Guest;

/// The contract that this broker speaks, without its interfaces.
const PACKAGE: &str = "wasmqtt:plugin";
/// Compatible with what this broker was built with; the third number may be another.
const VERSION: &str = "0.1.";
/// Names that a message shows, bytes of each, and of what the runtime says.
const NAMES_MAX: usize = 10;
const NAME_BYTES_MAX: usize = 100;
const ERROR_BYTES_MAX: usize = 500;

const BUILD: &str = "build it with --target wasm32-wasip2";

/// Tells a component from what is often taken for one, by its first bytes.
///
/// # Errors
/// It is none.
pub(crate) fn check_header(bytes: &[u8]) -> Result<(), HostError> {
    const NATIVE: [&[u8]; 7] = [
        b"\x7fELF",
        b"MZ",
        b"!<arch>\n",
        &[0xFE, 0xED, 0xFA, 0xCE],
        &[0xCF, 0xFA, 0xED, 0xFE],
        &[0xCE, 0xFA, 0xED, 0xFE],
        &[0xCA, 0xFE, 0xBA, 0xBE],
    ];
    let why = match bytes {
        [] => "the file is empty".to_owned(),
        [0, b'a', b's', b'm', 0x0D, 0, 1, 0, ..] => return Ok(()),
        [0, b'a', b's', b'm', 1, 0, 0, 0, ..] => format!(
            "a core module, not a component: {BUILD}, or make a component of it with \
             `wasm-tools component new FILE --adapt wasi_snapshot_preview1=ADAPTER`"
        ),
        [0, b'a', b's', b'm', version, _, 1, 0, ..] => {
            format!("a component in version {version} of the binary format, and this broker reads version 13")
        }
        [0, b'a', b's', b'm', ..] => "it begins like WebAssembly and is cut off or damaged".to_owned(),
        bytes if NATIVE.iter().any(|magic| bytes.starts_with(magic)) => {
            format!("a native library or program, not WebAssembly: {BUILD}")
        }
        _ => format!("not WebAssembly: {BUILD}"),
    };
    Err(HostError::new(why))
}

fn shown(name: &str) -> Escaped<'_> {
    escaped(name, NAME_BYTES_MAX)
}

fn list(names: &[&str]) -> String {
    let mut shown: Vec<String> = names.iter().take(NAMES_MAX).map(|name| shown(name).to_string()).collect();
    if names.len() > NAMES_MAX {
        shown.push(format!("and {} more", names.len() - NAMES_MAX));
    }
    if shown.is_empty() { "nothing".into() } else { shown.join(", ") }
}

/// `name@version` of the package `package`, with the version.
fn version_in<'a>(name: &'a str, package: &str) -> Option<&'a str> {
    let (_, version) = name.strip_prefix(package)?.strip_prefix(['/', ':'])?.rsplit_once('@')?;
    Some(version)
}

fn is_other_contract(name: &str) -> bool {
    version_in(name, PACKAGE).is_some_and(|version| !version.starts_with(VERSION))
}

/// An import that cannot be linked. `error`: what the linker says.
pub(crate) fn import(ty: &types::Component, engine: &Engine, error: &str) -> HostError {
    let names: Vec<&str> = ty.imports(engine).map(|(name, _)| name).collect();
    import_of(&names, error)
}

fn import_of(names: &[&str], error: &str) -> HostError {
    let is_next_wasi = |name: &&&str| version_in(name, "wasi").is_some_and(|version| version.starts_with("0.3"));
    if let Some(name) = names.iter().find(is_next_wasi) {
        let name = shown(name);
        return HostError::new(format!(
            "it imports {name}, which is WASI 0.3, and this broker has WASI 0.2: {BUILD}, or for a world of WASI 0.2"
        ));
    }
    if let Some(name) = names.iter().find(|name| is_other_contract(name)) {
        let name = shown(name);
        return HostError::new(format!(
            "it imports {name}, and this broker offers {PACKAGE}@{VERSION}0: it was built against another version of wit/"
        ));
    }
    let is_ours = |name: &&&str| version_in(name, PACKAGE).is_some() && error.contains(**name);
    let said = escaped(error, ERROR_BYTES_MAX);
    match names.iter().find(is_ours) {
        Some(name) => HostError::new(format!(
            "it imports {} in another form: it was built against another wit/: {said}",
            shown(name)
        )),
        None => HostError::new(format!("it imports something that this broker does not offer: {said}")),
    }
}

/// A component without any export that this broker calls.
pub(crate) fn no_plug_point(ty: &types::Component, engine: &Engine) -> HostError {
    let names: Vec<&str> = ty.exports(engine).map(|(name, _)| name).collect();
    no_plug_point_in(&names)
}

fn no_plug_point_in(names: &[&str]) -> HostError {
    let wanted = "none of auth, acl, storage-hook, cluster and events of wasmqtt:plugin@0.1.0";
    let others: Vec<&str> = names.iter().copied().filter(|name| is_other_contract(name)).collect();
    if others.is_empty() {
        return HostError::new(format!("it exports no plug-point: {wanted}; it exports {}", list(names)));
    }
    HostError::new(format!(
        "it exports no plug-point that this broker knows: {wanted}; it exports {}: it was built against another version of \
         wit/",
        list(&others)
    ))
}

/// A plug-point that is there by its name and lacks a function. `None`: it is not there, or whole.
pub(crate) fn incomplete(ty: &types::Component, engine: &Engine, names: &[&str]) -> Option<HostError> {
    let interface = |name: &str| {
        let is_ours = version_in(name, PACKAGE).is_some_and(|version| version.starts_with(VERSION));
        let (interface, _) = name.strip_prefix(PACKAGE)?.strip_prefix('/')?.rsplit_once('@')?;
        (is_ours && INTERFACES.contains(&interface) && !names.contains(&interface)).then(|| name.to_owned())
    };
    let name = ty.exports(engine).find_map(|(name, _)| interface(name))?;
    Some(HostError::new(format!(
        "it exports {} without all of its functions: it was built against another wit/",
        shown(&name)
    )))
}

/// Memory that a component begins with and may not have. `None`: the error is about something else.
pub(crate) fn memory(error: &str, memory_mib: u32) -> Option<HostError> {
    if !error.contains("pooling allocator") || !error.contains("memory") {
        return None;
    }
    let sizes = error.split("0x").skip(1).filter_map(|text| {
        let digits = text.split(|char: char| !char.is_ascii_hexdigit()).next()?;
        u64::from_str_radix(digits, 16).ok()
    });
    // The larger one is what it wants.
    let wanted = sizes.max().map_or(u64::from(memory_mib) + 1, |bytes| bytes.div_ceil(1 << 20));
    Some(HostError::new(format!(
        "it begins with {wanted} MiB of memory, more than {}",
        raise_memory(memory_mib, (wanted + 1).next_power_of_two())
    )))
}

/// The limit, and how to raise it.
pub(crate) fn raise_memory(memory_mib: u32, to: u64) -> String {
    format!(
        "limits.memory_mib = {memory_mib}; raise it with limits = {{ memory_mib = {to} }} in its [[plugin]] entry, and with \
         --limit memory_mib={to} for plugin check, test and bench"
    )
}

macro_rules! functions {
    ($($interface:literal: $($function:literal $params:ty => $results:ty),+;)+) => {
        /// Every interface that this broker calls.
        const INTERFACES: &[&str] = &[$($interface),+];

        /// Functions of an interface that have other types than those of this broker.
        fn misfits(store: &mut Store<Guest>, instance: &Instance, interface: &str) -> Vec<&'static str> {
            $(if interface == $interface {
                let functions = [$((fits::<$params, $results>(store, instance, interface, $function), $function)),+];
                return functions.into_iter().filter(|(fits, _)| !fits).map(|(_, function)| function).collect();
            })+
            Vec::new()
        }
    };
}

type Answer<T> = (Result<T, Failure>,);
type Batch = storage_hook::exports::wasmqtt::plugin::storage_hook::Batch;
type Changes = Vec<(u32, storage_hook::exports::wasmqtt::plugin::storage_hook::Change)>;

functions! {
    "lifecycle":
        "init" (Vec<Pair>,) => Answer<lifecycle::exports::wasmqtt::plugin::lifecycle::Registration>,
        "health" () => Answer<()>,
        "shutdown" () => ();
    "handover":
        "snapshot" () => Answer<handover::exports::wasmqtt::plugin::handover::State>,
        "restore" (handover::exports::wasmqtt::plugin::handover::State,) => Answer<()>;
    "auth":
        "authenticate" (auth::exports::wasmqtt::plugin::auth::Request,)
            => Answer<auth::exports::wasmqtt::plugin::auth::Outcome>,
        "proceed" (auth::exports::wasmqtt::plugin::auth::Step,)
            => Answer<auth::exports::wasmqtt::plugin::auth::Outcome>;
    "acl":
        "authorize" (Client, Vec<acl::exports::wasmqtt::plugin::acl::Access>)
            => Answer<Vec<acl::exports::wasmqtt::plugin::acl::Decision>>;
    "storage-hook":
        "before-store" (Batch,) => Answer<Changes>,
        "after-load" (Batch,) => Answer<Changes>,
        "committed" (Batch,) => Answer<()>;
    "cluster":
        "interest-changed" (Vec<String>, Vec<String>) => Answer<Vec<u8>>,
        "peer-interest" (String, Vec<u8>) => Answer<()>,
        "peer-changed" (String, bool, Vec<Pair>) => (),
        "route-for" (Vec<String>,) => Answer<Vec<cluster::exports::wasmqtt::plugin::cluster::LeasedRoute>>,
        "on-frame" (String, Vec<u8>) => ();
    "events":
        "observed" (Vec<events::exports::wasmqtt::plugin::events::Event>,) => ();
}

fn fits<P, R>(store: &mut Store<Guest>, instance: &Instance, interface: &str, function: &str) -> bool
where
    P: ComponentNamedList + Lower + Send + Sync + 'static,
    R: ComponentNamedList + Lift + Send + Sync + 'static,
{
    let name = format!("{PACKAGE}/{interface}@{VERSION}0");
    let found = instance.get_export_index(&mut *store, None, &name);
    let found = found.and_then(|interface| instance.get_export_index(&mut *store, Some(&interface), function));
    let function = found.and_then(|function| instance.get_func(&mut *store, function));
    function.is_some_and(|function| function.typed::<P, R>(&*store).is_ok())
}

/// An interface whose functions have other types. `error`: what the runtime says about the first.
pub(crate) fn misfit(store: &mut Store<Guest>, instance: &Instance, interface: &str, error: &str) -> String {
    let functions = misfits(store, instance, interface);
    let functions = if functions.is_empty() { "its functions".into() } else { format!("`{}`", functions.join("`, `")) };
    format!(
        "{functions} of {PACKAGE}/{interface}@{VERSION}0 takes or returns something else than in this broker's contract: it \
         was built against another wit/: {}",
        escaped(error, ERROR_BYTES_MAX)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_component_is_told_apart() {
        let why = |bytes: &[u8]| check_header(bytes).expect_err("is refused").to_string();
        assert_eq!(why(b""), "the file is empty");
        for native in [&b"\x7fELF\x02\x01"[..], b"MZ\x90\0", &[0xCF, 0xFA, 0xED, 0xFE, 7], b"!<arch>\nlib"] {
            assert!(why(native).contains("a native library") && why(native).contains("--target wasm32-wasip2"));
        }
        let core = why(b"\0asm\x01\0\0\0");
        assert!(core.contains("a core module, not a component") && core.contains("wasm-tools component new"), "{core}");
        assert!(why(b"\0asm\x0A\0\x01\0").contains("in version 10 of the binary format"));
        assert!(why(b"\0as").contains("not WebAssembly") && why(b"\0asm\x01").contains("cut off"));
        assert!(why(b"(component)").starts_with("not WebAssembly"));
        assert!(check_header(b"\0asm\x0D\0\x01\0rest").is_ok());
    }

    #[test]
    fn imports_of_another_world_are_named() {
        let why = |names: &[&str], error| import_of(names, error).to_string();
        let wasi = why(&["wasi:io/streams@0.2.6", "wasi:cli/environment@0.3.0"], "implementation is missing");
        assert!(wasi.contains("wasi:cli/environment@0.3.0, which is WASI 0.3, and this broker has WASI 0.2"), "{wasi}");
        let contract = why(&["wasmqtt:plugin/host@0.2.0"], "implementation is missing");
        assert!(contract.contains("another version of wit/"), "{contract}");
        let form = why(&["wasmqtt:plugin/host@0.1.0"], "instance wasmqtt:plugin/host@0.1.0 has the wrong type");
        assert!(form.contains("wasmqtt:plugin/host@0.1.0 in another form"), "{form}");
        let other = why(&["a:b/c"], "a:b/c\n\x1B[31m");
        assert!(other.starts_with("it imports something that this broker does not offer: a:b/c"), "{other}");
        assert!(!other.contains(char::is_control), "{other}");
    }

    #[test]
    fn what_it_exports_instead_is_said() {
        let other = no_plug_point_in(&["wasmqtt:plugin/acl@0.2.0", "x"]).to_string();
        assert!(other.contains("it exports wasmqtt:plugin/acl@0.2.0: it was built against another version"), "{other}");
        assert!(no_plug_point_in(&[]).to_string().ends_with("it exports nothing"));
        let many = vec!["\x1B[31mlong\n"; 20];
        let many = no_plug_point_in(&many).to_string();
        assert!(many.contains("and 10 more") && !many.contains(char::is_control), "{many}");
        assert!(no_plug_point_in(&["x".repeat(1000).as_str()]).to_string().len() < 300);
    }

    #[test]
    fn memory_that_is_too_large_is_named_with_its_limit() {
        let error = "module memory does not fit in pooling allocator requirements: memory index 0 is unsupported in the \
                     pooling allocator configuration: memory size 0x1010000 exceeds the limit of 0x1000000 bytes";
        let why = memory(error, 16).expect("is about memory").to_string();
        assert!(
            why.contains("17 MiB") && why.contains("limits.memory_mib = 16") && why.contains("memory_mib=32"),
            "{why}"
        );
        assert!(memory("unreachable", 16).is_none());
    }
}
