//! Whether `clauses.toml` says the truth about which tests there are.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde::Deserialize;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    clause: Vec<Clause>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Clause {
    id: String,
    version: String,
    says: String,
    test: Option<String>,
    reason: Option<String>,
    status: Option<String>,
}

fn here() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn clauses() -> Vec<Clause> {
    let text = std::fs::read_to_string(here().join("clauses.toml")).expect("clauses.toml");
    toml::from_str::<File>(&text).expect("clauses.toml parses").clause
}

/// `file::function` or `path/in/the/repository.rs::function`.
fn exists(test: &str, sources: &mut BTreeMap<PathBuf, String>) -> Result<(), String> {
    let (file, function) = test.split_once("::").ok_or_else(|| format!("{test}: no `::`"))?;
    let path =
        if file.contains('/') { here().join("..").join(file) } else { here().join("tests").join(format!("{file}.rs")) };
    if !sources.contains_key(&path) {
        let source = std::fs::read_to_string(&path).map_err(|error| format!("{test}: {}: {error}", path.display()))?;
        sources.insert(path.clone(), source);
    }
    let source = &sources[&path];
    let is_test = source.split("#[test]").skip(1).any(|rest| {
        let head = rest.split_once('{').map_or(rest, |(head, _)| head);
        head.contains(&format!("fn {function}("))
    });
    if is_test { Ok(()) } else { Err(format!("{test}: no such test")) }
}

#[test]
fn every_clause_names_a_test_that_exists_or_a_reason() {
    let mut problems = Vec::new();
    let mut sources = BTreeMap::new();
    for clause in clauses() {
        let Clause { id, says, test, reason, status, .. } = &clause;
        if says.trim().is_empty() {
            problems.push(format!("{id} says nothing"));
        }
        match (test, reason) {
            (Some(test), None) => {
                problems.extend(exists(test, &mut sources).err().map(|error| format!("{id}: {error}")));
            }
            (None, Some(reason)) if !reason.trim().is_empty() => {}
            (None, _) => problems.push(format!("{id} has neither test nor reason")),
            (Some(_), Some(_)) => problems.push(format!("{id} has a test and a reason")),
        }
        if status.as_ref().is_some_and(|status| status != "not yet" || reason.is_none()) {
            problems.push(format!("{id}: the only status is \"not yet\", with a reason"));
        }
    }
    assert!(problems.is_empty(), "{}", problems.join("\n"));
}

#[test]
fn identifiers_are_unique_in_their_version() {
    let mut seen = BTreeSet::new();
    for clause in clauses() {
        assert!(["5.0", "3.1.1"].contains(&clause.version.as_str()), "{clause:?}");
        assert!(clause.id.starts_with("MQTT-"), "{clause:?}");
        let key = (clause.version.clone(), clause.id.clone());
        assert!(seen.insert(key), "{} {} is there twice", clause.version, clause.id);
    }
}
