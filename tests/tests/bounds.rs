//! Whether the table of bounds in `broker/ARCHITECTURE.md` names a test for each, and the tests exist.

use std::path::Path;

/// The cells of the rows below the heading `## Bounds`.
fn rows() -> Vec<Vec<String>> {
    let text = std::fs::read_to_string(root().join("broker/ARCHITECTURE.md")).expect("ARCHITECTURE.md");
    let table = text.split("\n## ").find(|part| part.starts_with("Bounds\n")).expect("a chapter `Bounds`").to_owned();
    let rows = table.lines().filter(|line| line.starts_with('|')).skip(2);
    rows.map(|row| row.trim_matches('|').split('|').map(|cell| cell.trim().to_owned()).collect()).collect()
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace")
}

/// `file::function`, or `path/in/the/repository.rs::function`.
fn has_test(name: &str) -> bool {
    let Some((file, function)) = name.split_once("::") else { return false };
    let path = if file.contains('/') { file.to_owned() } else { format!("tests/tests/{file}.rs") };
    let source = std::fs::read_to_string(root().join(path)).unwrap_or_default();
    let before = source.split_once(&format!("fn {function}(")).map_or("", |(before, _)| before);
    // `#[test]` or `#[tokio::test]`.
    before.trim_end().trim_end_matches("async").trim_end().ends_with("test]")
}

#[test]
fn every_bound_has_a_test_that_fills_it() {
    let rows = rows();
    assert!(rows.len() >= 12, "{} rows", rows.len());
    let mut problems = Vec::new();
    for row in rows {
        let [name, unit, per, default, effect, test] = &row[..] else {
            problems.push(format!("{} cells instead of six: {row:?}", row.len()));
            continue;
        };
        if [name, unit, per, default, effect].into_iter().any(String::is_empty) {
            problems.push(format!("{name}: an empty cell"));
        }
        let tests: Vec<&str> = test.split('`').skip(1).step_by(2).collect();
        if tests.is_empty() {
            problems.push(format!("{name}: no test"));
        }
        problems.extend(tests.iter().filter(|test| !has_test(test)).map(|test| format!("{name}: no test {test}")));
    }
    assert!(problems.is_empty(), "{}", problems.join("\n"));
}
