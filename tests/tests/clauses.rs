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

/// `file::function` or `path/in/the/repository.rs::function` is a test, and its documentation names the clause, alone or
/// within a row such as `[MQTT-3.3.2-7] to [MQTT-3.3.2-12]`.
fn proves(test: &str, id: &str, sources: &mut BTreeMap<PathBuf, String>) -> Result<(), String> {
    let (file, function) = test.split_once("::").ok_or_else(|| format!("{test}: no `::`"))?;
    let path =
        if file.contains('/') { here().join("..").join(file) } else { here().join("tests").join(format!("{file}.rs")) };
    if !sources.contains_key(&path) {
        let source = std::fs::read_to_string(&path).map_err(|error| format!("{test}: {}: {error}", path.display()))?;
        sources.insert(path.clone(), source);
    }
    let source = &sources[&path];
    let parts: Vec<&str> = source.split("#[test]").collect();
    let place = parts.iter().skip(1).position(|rest| {
        let head = rest.split_once('{').map_or(*rest, |(head, _)| head);
        head.contains(&format!("fn {function}("))
    });
    let before = parts[place.ok_or_else(|| format!("{test}: no such test"))?];
    if names(&documentation(before), id) { Ok(()) } else { Err(format!("{test}: its documentation does not name it")) }
}

/// The `///` lines at the end of what stands before `#[test]`, in one line.
fn documentation(before: &str) -> String {
    let lines = before.lines().rev().skip_while(|line| line.trim().is_empty());
    let mut lines: Vec<&str> = lines.map_while(|line| line.trim().strip_prefix("///")).collect();
    lines.reverse();
    lines.concat()
}

fn names(documentation: &str, id: &str) -> bool {
    let split = |id: &str| {
        let (section, number) = id.rsplit_once('-')?;
        Some((section.to_owned(), number.parse::<u32>().ok()?))
    };
    let ids: Vec<&str> = documentation.split('[').filter_map(|rest| rest.split_once(']')).map(|(id, _)| id).collect();
    let rows = documentation.split("] to [").collect::<Vec<_>>();
    let is_in_row = rows.windows(2).any(|row| {
        let first = row[0].rsplit_once('[').and_then(|(_, id)| split(id));
        let last = row[1].split_once(']').and_then(|(id, _)| split(id));
        let (Some((section, first)), Some((other, last)), Some((of, number))) = (first, last, split(id)) else {
            return false;
        };
        section == other && section == of && (first..=last).contains(&number)
    });
    ids.contains(&id) || is_in_row
}

#[test]
fn a_row_of_clauses_names_those_within() {
    let text = " Aliases. [MQTT-3.3.2-7] to [MQTT-3.3.2-12], [MQTT-1.1.1-1] (5.0)";
    for (id, wanted) in [
        ("MQTT-3.3.2-7", true),
        ("MQTT-3.3.2-9", true),
        ("MQTT-3.3.2-12", true),
        ("MQTT-3.3.2-1", false),
        ("MQTT-3.3.2-13", false),
        ("MQTT-3.3.3-9", false),
        ("MQTT-1.1.1-1", true),
        ("MQTT-1.1.1-11", false),
    ] {
        assert_eq!(names(text, id), wanted, "{id}");
    }
}

#[test]
fn every_clause_names_a_test_that_names_it_or_a_reason() {
    let mut problems = Vec::new();
    let mut sources = BTreeMap::new();
    for clause in clauses() {
        let Clause { id, says, test, reason, status, .. } = &clause;
        if says.trim().is_empty() {
            problems.push(format!("{id} says nothing"));
        }
        match (test, reason) {
            (Some(test), None) => {
                problems.extend(proves(test, id, &mut sources).err().map(|error| format!("{id}: {error}")));
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
