//! The contract with plugins is frozen once it is published: a component that was built against it must load for ever.
//!
//! `tests/contract/` has a file for each version of each package of `wit/` as it was when it was frozen, without comments.
//! A change to a type or a function needs a new version of the package;
//! `WASMQTT_BLESS=1 cargo test --workspace --test contract` then writes it down. A version that is there is never written again, only new functions of imported interfaces and
//! new interfaces may come to it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Those of one package, by name.
fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).expect("a folder").map(|entry| entry.expect("a file").path());
    let mut files: Vec<_> = entries.filter(|path| path.extension().is_some_and(|end| end == "wit")).collect();
    files.sort();
    files
}

/// Interfaces and worlds by name, each with its lines: without comments, blank lines and `@since`.
fn items(folder: &Path) -> BTreeMap<String, Vec<String>> {
    let mut items = BTreeMap::new();
    for file in files(folder) {
        let text = std::fs::read_to_string(&file).expect("UTF-8");
        let mut current: Option<(String, Vec<String>)> = None;
        for line in text.lines().map(str::trim) {
            if line.is_empty() || line.starts_with("//") || line.starts_with("@since") || line.starts_with("package ") {
                continue;
            }
            match &mut current {
                None => {
                    let name = line.strip_suffix(" {").unwrap_or_else(|| panic!("{}: {line}", file.display()));
                    current = Some((name.to_owned(), Vec::new()));
                }
                // Types and functions within are indented; the item's own end is not.
                Some((name, lines)) if line == "}" && depth(lines) == 0 => {
                    items.insert(std::mem::take(name), std::mem::take(lines));
                    current = None;
                }
                Some((_, lines)) => lines.push(line.to_owned()),
            }
        }
        assert!(current.is_none(), "{} ends within {current:?}", file.display());
    }
    items
}

fn depth(lines: &[String]) -> usize {
    let count = |end: char| lines.iter().filter(|line| line.ends_with(end)).count();
    count('{') - count('}')
}

/// `NAME@0.1.0` of `package NAME@0.1.0;`, which all files must have.
fn package(folder: &Path) -> String {
    let mut packages: Vec<String> = files(folder)
        .iter()
        .map(|file| std::fs::read_to_string(file).expect("UTF-8"))
        .map(|text| {
            let line = text.lines().next().unwrap_or_default();
            line.strip_prefix("package ").and_then(|line| line.strip_suffix(';')).expect("a package line").to_owned()
        })
        .collect();
    packages.dedup();
    let [package] = &packages[..] else { panic!("several packages: {packages:?}") };
    package.clone()
}

/// Functions may come to what plugins import; everything else stays as it is.
fn may_grow(name: &str) -> bool {
    matches!(name, "interface host" | "interface metrics" | "world imports" | "world everything")
}

fn is_kept(name: &str, frozen: &[String], now: &[String]) -> bool {
    if !may_grow(name) {
        return frozen == now;
    }
    // In their order, with new lines between them or behind.
    let mut lines = now.iter();
    frozen.iter().all(|line| lines.any(|other| other == line))
}

#[test]
fn a_published_interface_does_not_change_without_a_new_version() {
    for folder in ["wit", "wit/deps/keyvalue"] {
        check_frozen(&root().join(folder));
    }
}

fn check_frozen(wit: &Path) {
    let package = package(wit);
    let now = items(wit);
    let folder = root().join("tests/contract");
    let file = folder.join(format!("{}.txt", package.replace(':', "-")));
    let item = |(name, lines): (&String, &Vec<String>)| {
        [&[format!("{name} {{")], &indented(lines)[..], &["}".to_owned()]].concat()
    };
    let text = now.iter().flat_map(item).collect::<Vec<_>>().join("\n") + "\n";
    if !file.exists() && std::env::var_os("WASMQTT_BLESS").is_some() {
        std::fs::create_dir_all(&folder).expect("make a folder");
        std::fs::write(&file, &text).expect("write");
    }
    let frozen_text = std::fs::read_to_string(&file)
        .unwrap_or_else(|_| panic!("{package} is not frozen yet: WASMQTT_BLESS=1 writes {}", file.display()));
    let frozen = parse(&frozen_text);
    for (name, lines) in &frozen {
        let Some(present) = now.get(name) else { panic!("{name} is gone: {package} has it") };
        assert!(is_kept(name, lines, present), "{name} is another than in {package}:\n{lines:#?}\n{present:#?}");
    }
}

fn indented(lines: &[String]) -> Vec<String> {
    lines.iter().map(|line| format!("  {line}")).collect()
}

fn parse(text: &str) -> BTreeMap<String, Vec<String>> {
    let mut items: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let mut name = String::new();
    for line in text.lines() {
        match (line.strip_prefix("  "), line.strip_suffix(" {")) {
            (Some(inner), _) => items.entry(name.clone()).or_default().push(inner.to_owned()),
            (None, Some(item)) => {
                item.clone_into(&mut name);
                items.insert(name.clone(), Vec::new());
            }
            (None, None) => {}
        }
    }
    items
}

#[test]
fn a_change_is_seen() {
    let lines = |lines: &[&str]| lines.iter().map(|line| (*line).to_owned()).collect::<Vec<_>>();
    let frozen = lines(&["record a {", "b: u8,", "}"]);
    assert!(is_kept("interface auth", &frozen, &frozen));
    assert!(!is_kept("interface auth", &frozen, &lines(&["record a {", "b: u8,", "c: u8,", "}"])));
    assert!(!is_kept("interface host", &frozen, &lines(&["record a {", "}"])));
    assert!(is_kept("interface host", &lines(&["log: func();"]), &lines(&["log: func();", "more: func();"])));
}
