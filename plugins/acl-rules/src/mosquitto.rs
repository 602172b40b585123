//! The form of mosquitto's `acl_file`: `topic`, `user` and `pattern` lines.

use wasmqtt_sdk::is_valid_filter;

use crate::{On, Rule, Who};

pub(crate) fn parse(text: &str) -> Result<Vec<Rule>, String> {
    let mut who = Who::Anonymous;
    let mut rules = Vec::new();
    for (at, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let (kind, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        let rest = rest.trim();
        let added = match kind {
            "user" if !rest.is_empty() => {
                who = Who::User(rest.to_owned());
                continue;
            }
            "user" => Err("the user name is missing".to_owned()),
            "topic" => rule(rest, who.clone(), true, at + 1),
            "pattern" => rule(rest, Who::Everybody, false, at + 1),
            other => Err(format!("{other:?}: allowed are topic, user and pattern")),
        };
        rules.push(added.map_err(|error| format!("line {}: {error}", at + 1))?);
    }
    Ok(rules)
}

/// `[read|write|readwrite|deny] FILTER`; a filter with spaces needs the word before it.
fn rule(text: &str, who: Who, is_literal: bool, line: usize) -> Result<Rule, String> {
    let (first, filter) = text.split_once(char::is_whitespace).unwrap_or(("readwrite", text));
    let (allow, on) = match first {
        "read" => (true, On::Subscribe),
        "write" => (true, On::Publish),
        "readwrite" => (true, On::All),
        "deny" => (false, On::All),
        other => return Err(format!("{other:?}: allowed are read, write, readwrite and deny")),
    };
    let filter = filter.trim();
    if !is_valid_filter(filter) {
        return Err(format!("{filter:?} is not a topic filter"));
    }
    Ok(Rule { allow, on, filter: filter.to_owned(), is_literal, who: vec![who], line })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrong_lines_are_named() {
        for (text, error) in [
            ("topic a\nacl b", "line 2: \"acl\": allowed are topic, user and pattern"),
            ("user", "line 1: the user name is missing"),
            ("topic dney a", "line 1: \"dney\": allowed are read, write, readwrite and deny"),
            ("topic read a/#/b", "line 1: \"a/#/b\" is not a topic filter"),
        ] {
            assert_eq!(parse(text).unwrap_err(), error);
        }
        assert_eq!(parse("topic read a\n\npattern b").unwrap()[1].line, 3);
        assert_eq!(parse("topic read with space/a").unwrap()[0].filter, "with space/a");
    }
}
