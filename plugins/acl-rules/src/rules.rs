//! The form of its own: `allow|deny publish|subscribe|all FILTER [user=NAME] [client=ID] [listener=NAME]`.

use wasmqtt_sdk::is_valid_filter;

use crate::{On, Rule, Who};

pub(crate) fn parse(text: &str) -> Result<Vec<Rule>, String> {
    let lines = text.lines().enumerate().map(|(at, line)| (at + 1, line.trim()));
    let rules = lines.filter(|(_, line)| !line.is_empty() && !line.starts_with('#'));
    rules.map(|(at, line)| rule(line, at).map_err(|error| format!("line {at}: {error}"))).collect()
}

fn rule(line: &str, at: usize) -> Result<Rule, String> {
    let mut words = line.split_whitespace();
    let allow = match words.next() {
        Some("allow") => true,
        Some("deny") => false,
        other => return Err(format!("{:?}: allowed are allow and deny", other.unwrap_or_default())),
    };
    let on = match words.next() {
        Some("publish") => On::Publish,
        Some("subscribe") => On::Subscribe,
        Some("all") => On::All,
        other => return Err(format!("{:?}: allowed are publish, subscribe and all", other.unwrap_or_default())),
    };
    let filter = words.next().ok_or("the topic filter is missing")?;
    if !is_valid_filter(filter) {
        return Err(format!("{filter:?} is not a topic filter"));
    }
    let who = words.map(|word| match word.split_once('=') {
        Some(("user", name)) => Ok(Who::User(name.to_owned())),
        Some(("client", id)) => Ok(Who::Client(id.to_owned())),
        Some(("listener", name)) => Ok(Who::Listener(name.to_owned())),
        _ => Err(format!("{word:?}: allowed are user=NAME, client=ID and listener=NAME")),
    });
    let who = who.collect::<Result<_, _>>()?;
    Ok(Rule { allow, on, filter: filter.to_owned(), is_literal: false, who, line: at })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrong_lines_are_named() {
        for (text, error) in [
            ("allow all a\npermit all b", "line 2: \"permit\": allowed are allow and deny"),
            ("allow read a", "line 1: \"read\": allowed are publish, subscribe and all"),
            ("allow all", "line 1: the topic filter is missing"),
            ("# one\n\nallow all a#", "line 3: \"a#\" is not a topic filter"),
            ("allow all a users=x", "line 1: \"users=x\": allowed are user=NAME, client=ID and listener=NAME"),
        ] {
            assert_eq!(parse(text).unwrap_err(), error);
        }
    }
}
