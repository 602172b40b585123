//! Rules that are right by their form and odd by their meaning: said in the log when the file is loaded.

use wasmqtt_sdk::filter_covers;

use crate::{On, Rule, Who};

/// Lines that are said; a long file of the same mistake is said shortly.
const WARNINGS_MAX: usize = 20;

/// What an operator should look at. `deny_wins`: the order of the rules means nothing, as in mosquitto's form.
pub(crate) fn of(rules: &[Rule], deny_wins: bool) -> Vec<String> {
    let mut warnings: Vec<String> = rules
        .iter()
        .enumerate()
        .filter_map(|(at, rule)| {
            let before = if deny_wins { &[] } else { &rules[..at] };
            let why = pattern_for_all(rule).or_else(|| contradiction(rule)).or_else(|| no_listener(rule));
            let why = why.or_else(|| hidden(rule, before))?;
            Some(format!("line {}: {why}", rule.line))
        })
        .collect();
    if warnings.len() > WARNINGS_MAX {
        let more = warnings.len() - WARNINGS_MAX;
        warnings.truncate(WARNINGS_MAX);
        warnings.push(format!("and {more} more"));
    }
    let reads = |rule: &Rule| rule.allow && rule.on != On::Publish && rule.filter != "#";
    if deny_wins && rules.iter().any(reads) {
        warnings.push(
            "unlike in mosquitto, a client that subscribes to more than it may read, such as `#`, is refused, instead of \
             getting the part that it may read"
                .into(),
        );
    }
    warnings
}

fn has_mark(rule: &Rule) -> bool {
    !rule.is_literal && (rule.filter.contains("%c") || rule.filter.contains("%u"))
}

/// Only lines that begin with `pattern` are about everybody in mosquitto's form.
fn pattern_for_all(rule: &Rule) -> Option<String> {
    let is_pattern = !rule.is_literal && rule.who == [Who::Everybody];
    let (verb, filter) = (if rule.allow { "allowed" } else { "denied" }, &rule.filter);
    (is_pattern && !has_mark(rule))
        .then(|| format!("a pattern without %c or %u: {filter:?} is {verb} to every client, also to anonymous ones"))
}

fn contradiction(rule: &Rule) -> Option<String> {
    let text = |who: &Who| match who {
        Who::User(name) => Some(("user", name.clone())),
        Who::Client(id) => Some(("client", id.clone())),
        Who::Listener(name) => Some(("listener", name.clone())),
        Who::Everybody | Who::Anonymous => None,
    };
    let conditions: Vec<_> = rule.who.iter().filter_map(text).collect();
    let pairs =
        conditions.iter().enumerate().flat_map(|(at, one)| conditions[at + 1..].iter().map(move |two| (one, two)));
    let differ = |(one, two): &(&(&str, String), &(&str, String))| one.0 == two.0 && one.1 != two.1;
    let ((kind, one), (_, two)) = pairs.into_iter().find(differ)?;
    Some(format!("it never applies: nobody is both {kind}={one} and {kind}={two}; write two rules"))
}

/// Names of listeners are those that the broker prints when it is ready.
fn no_listener(rule: &Rule) -> Option<String> {
    let is_name =
        |name: &str| name.starts_with("unix:/") || name.split_once("://").is_some_and(|(_, at)| !at.is_empty());
    let wrong = rule.who.iter().find_map(|who| match who {
        Who::Listener(name) if !is_name(name) => Some(name),
        _ => None,
    })?;
    Some(format!(
        "it never applies: no listener is called {wrong:?}; names are those that the broker prints when it is ready, such as \
         mqtt://127.0.0.1:1883 or unix:/run/wasmqtt.sock"
    ))
}

/// A rule before it decides whatever this one is about.
fn hidden(rule: &Rule, before: &[Rule]) -> Option<String> {
    let hides = |first: &&Rule| {
        !has_mark(first)
            && (first.on == On::All || first.on == rule.on)
            && first.who.iter().all(|who| rule.who.contains(who))
            // A name may have several levels, and begin with `$`.
            && (!has_mark(rule) || first.filter == "#")
            && !(has_mark(rule) && rule.filter.starts_with('%'))
            && filter_covers(&first.filter, &rule.filter)
    };
    let first = before.iter().find(hides)?;
    Some(format!("it never applies: the rule of line {} decides first", first.line))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{mosquitto, rules};

    fn check(warnings: &[String], expected: &[&str]) {
        let is_so = warnings.len() == expected.len()
            && warnings.iter().zip(expected).all(|(warning, part)| warning.contains(part));
        assert!(is_so, "{warnings:#?} is not {expected:#?}");
    }

    #[test]
    fn rules_that_never_apply_are_named() {
        let of = |text: &str| of(&rules::parse(text).expect("is right"), false);
        check(&of("allow all a/# user=ann\ndeny all #\nallow publish %c/x"), &[]);
        check(&of("deny all #\n\nallow publish a/%c"), &["line 3: it never applies: the rule of line 1"]);
        check(&of("deny publish #\nallow all a"), &[]);
        check(&of("allow all a/+ user=ann\ndeny all a/b user=ann client=c\ndeny all a/b"), &["line 2"]);
        check(&of("allow all a user=ann user=bob"), &["nobody is both user=ann and user=bob"]);
        check(&of("allow all a listener=127.0.0.1:1883"), &["no listener is called \"127.0.0.1:1883\""]);
        check(&of("allow all a listener=mqtt://[::1]:1883\nallow all a listener=unix:/run/x.sock"), &[]);
        let many = "allow all #\n".repeat(30);
        assert_eq!(of(&many).len(), WARNINGS_MAX + 1);
    }

    #[test]
    fn a_pattern_for_everybody_is_named() {
        let of = |text: &str| of(&mosquitto::parse(text).expect("is right"), true);
        check(
            &of("pattern write plant/#"),
            &["line 1: a pattern without %c or %u: \"plant/#\" is allowed to every client"],
        );
        check(&of("pattern write plant/%u/#\ntopic write plant/%u"), &[]);
    }

    /// Every dashboard that subscribes to `#` is refused here, and was not before.
    #[test]
    fn the_difference_to_mosquitto_is_said() {
        let of = |text: &str| of(&mosquitto::parse(text).expect("is right"), true);
        check(&of("topic read weather/+"), &["unlike in mosquitto"]);
        check(&of("topic write weather/+\ntopic read #"), &[]);
    }
}
