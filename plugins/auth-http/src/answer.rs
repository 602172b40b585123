//! What the service answers: each field has one type, and there are no others.

use serde::Deserialize;
use serde_json::{Map, Value};
use wasmqtt_sdk::{Grant, NOT_AUTHORIZED, Outcome, Rule, is_valid_filter};

/// As many as the contract allows.
const RULES_MAX: usize = 1000;
/// Characters of a wrong value that are shown.
const SHOWN_MAX: usize = 40;

/// The type of a field.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Text,
    Boolean,
    Seconds,
    List,
}

const ANSWER: [(&str, Kind); 5] = [
    ("result", Kind::Text),
    ("principal", Kind::Text),
    ("rules", Kind::List),
    ("complete", Kind::Boolean),
    ("expires", Kind::Seconds),
];
const RULE: [(&str, Kind); 3] = [("filter", Kind::Text), ("action", Kind::Text), ("allow", Kind::Boolean)];

impl Kind {
    fn fits(self, value: &Value) -> bool {
        match self {
            Self::Text => value.is_string(),
            Self::Boolean => value.is_boolean(),
            Self::Seconds => value.as_u64().is_some_and(|seconds| u32::try_from(seconds).is_ok()),
            Self::List => value.is_array(),
        }
    }

    fn allowed(self) -> &'static str {
        match self {
            Self::Text => "a text",
            Self::Boolean => "true or false",
            Self::Seconds => "a whole number of seconds from 0 to 4294967295",
            Self::List => "a list",
        }
    }
}

/// Type and value, for somebody who has to mend the service.
fn shown(value: &Value) -> String {
    let kind = match value {
        Value::Null => return "null".into(),
        Value::Bool(_) => "boolean",
        Value::Number(_) => "number",
        Value::String(_) => "text",
        Value::Array(_) => "list",
        Value::Object(_) => "object",
    };
    let text = value.to_string();
    match text.char_indices().nth(SHOWN_MAX) {
        Some((at, _)) => format!("the {kind} {}…", &text[..at]),
        None => format!("the {kind} {text}"),
    }
}

/// The object with these fields and no others. `place`: where it is in the answer, for errors.
fn object<'a>(value: &'a Value, place: &str, fields: &[(&str, Kind)]) -> Result<&'a Map<String, Value>, String> {
    let object = value.as_object().ok_or_else(|| format!("{place} is {}: must be an object", shown(value)))?;
    for (name, value) in object {
        let Some((_, kind)) = fields.iter().find(|(known, _)| known == name) else {
            let known: Vec<&str> = fields.iter().map(|(name, _)| *name).collect();
            return Err(format!("{place} has the field {name:?}: allowed are {}", known.join(", ")));
        };
        if !kind.fits(value) {
            return Err(format!("{name:?} of {place} is {}: must be {}", shown(value), kind.allowed()));
        }
    }
    Ok(object)
}

/// The same once more, for what a [`Value`] does not keep: a name that stands there twice.
#[derive(Deserialize)]
struct Answer {
    result: String,
    principal: Option<String>,
    #[serde(default)]
    rules: Vec<Permission>,
    #[serde(default)]
    complete: bool,
    #[serde(default)]
    expires: u32,
}

#[derive(Deserialize)]
struct Permission {
    filter: String,
    #[serde(default = "all")]
    action: String,
    #[serde(default = "yes")]
    allow: bool,
}

fn all() -> String {
    "all".into()
}

fn yes() -> bool {
    true
}

impl Permission {
    fn rule(self, place: usize) -> Result<Rule, String> {
        let (publish, subscribe) = match self.action.as_str() {
            "publish" => (true, false),
            "subscribe" => (false, true),
            "all" => (true, true),
            other => {
                return Err(format!("\"action\" of rule {place} is {other:?}: allowed are publish, subscribe and all"));
            }
        };
        if !is_valid_filter(&self.filter) {
            return Err(format!("\"filter\" of rule {place} is {:?}: must be a topic filter", self.filter));
        }
        Ok(Rule { filter: self.filter, publish, subscribe, allow: self.allow })
    }
}

/// What the service decided.
///
/// # Errors
/// It cannot be understood as a whole: nobody may be let in for the part that can.
pub(crate) fn read(body: &[u8], username: impl FnOnce() -> String) -> Result<Outcome, String> {
    let value: Value = serde_json::from_slice(body).map_err(|error| format!("the answer is no JSON: {error}"))?;
    let answer = object(&value, "the answer", &ANSWER)?;
    for (at, rule) in answer.get("rules").and_then(Value::as_array).into_iter().flatten().enumerate() {
        object(rule, &format!("rule {}", at + 1), &RULE)?;
    }
    let answer: Answer = serde_json::from_slice(body).map_err(|error| format!("the answer: {error}"))?;
    if answer.rules.len() > RULES_MAX {
        return Err(format!("the answer has {} rules: allowed are {RULES_MAX}", answer.rules.len()));
    }
    let rules = answer.rules.into_iter().enumerate().map(|(at, rule)| rule.rule(at + 1));
    let rules = rules.collect::<Result<Vec<_>, _>>()?;
    match answer.result.as_str() {
        "allow" => Ok(Outcome::Allow(Grant {
            rules,
            complete: answer.complete,
            expires: answer.expires,
            ..Grant::new(answer.principal.unwrap_or_else(username))
        })),
        "deny" => Ok(Outcome::Deny(NOT_AUTHORIZED)),
        "next" => Ok(Outcome::Next),
        other => Err(format!("\"result\" of the answer is {other:?}: allowed are allow, deny and next")),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read(body: &str) -> Result<Outcome, String> {
        super::read(body.as_bytes(), || "ann".into())
    }

    /// PHP, forms and hand-written services give such types; absent and wrong are not the same.
    #[test]
    fn what_is_wrong_is_named_and_never_allows() {
        for (more, why) in [
            (
                r#""rules":[{"filter":"a","allow":"false"}]"#,
                r#""allow" of rule 1 is the text "false": must be true or false"#,
            ),
            (r#""rules":[{"filter":"a"},{"filter":"b","allow":0}]"#, r#""allow" of rule 2 is the number 0"#),
            (r#""rules":[{"filter":"a","allow":null}]"#, r#""allow" of rule 1 is null"#),
            (r#""rules":[{"filter":"a","action":["publish"]}]"#, r#""action" of rule 1 is the list ["publish"]"#),
            (r#""rules":[{"filter":"a","action":"read"}]"#, "allowed are publish, subscribe and all"),
            (r#""rules":[{"filter":"a#"}]"#, r#""filter" of rule 1 is "a#": must be a topic filter"#),
            (r#""rules":[{"filter":7}]"#, r#""filter" of rule 1 is the number 7"#),
            (r#""rules":[{"allow":true}]"#, "missing field `filter`"),
            (
                r#""rules":[{"filter":"a","topic":"b"}]"#,
                r#"rule 1 has the field "topic": allowed are filter, action, allow"#,
            ),
            (r#""rules":["a"]"#, r#"rule 1 is the text "a": must be an object"#),
            (r#""rules":{"filter":"a"}"#, "must be a list"),
            (r#""rules":null"#, r#""rules" of the answer is null"#),
            (r#""rules":[{"filter":"a","allow":false,"allow":true}]"#, "duplicate field `allow`"),
            (r#""complete":"true""#, r#""complete" of the answer is the text "true": must be true or false"#),
            (r#""complete":1"#, "must be true or false"),
            (r#""expires":"2""#, "must be a whole number of seconds from 0 to 4294967295"),
            (r#""expires":-1"#, "must be a whole number"),
            (r#""expires":2.5"#, "must be a whole number"),
            (r#""expires":4294967296"#, "must be a whole number"),
            (r#""principal":7"#, r#""principal" of the answer is the number 7: must be a text"#),
            (r#""principal":null"#, "must be a text"),
            (r#""is_superuser":false"#, r#"has the field "is_superuser""#),
            (r#""acl":[]"#, "allowed are result, principal, rules, complete, expires"),
            (r#""result":"deny""#, "duplicate field `result`"),
        ] {
            let error = read(&format!("{{\"result\":\"allow\",{more}}}")).expect_err(more);
            assert!(error.contains(why), "{error}");
        }
        for (body, why) in [
            ("", "no JSON"),
            ("<html>", "no JSON"),
            ("[]", "must be an object"),
            ("\"allow\"", "must be an object"),
            ("{}", "missing field `result`"),
            (r#"{"result":true}"#, "must be a text"),
            (r#"{"result":"Allow"}"#, "allowed are allow, deny and next"),
            (r#"{"result":"allow"}{}"#, "no JSON"),
        ] {
            let error = read(body).expect_err(body);
            assert!(error.contains(why), "{error}");
        }
        let many = vec![r#"{"filter":"a"}"#; RULES_MAX + 1].join(",");
        assert!(
            read(&format!(r#"{{"result":"allow","rules":[{many}]}}"#)).is_err_and(|why| why.contains("1001 rules"))
        );
        let long = format!(r#"{{"result":"allow","expires":"{}"}}"#, "ü".repeat(1000));
        assert!(read(&long).is_err_and(|why| why.len() < 250), "shown, but not all of it");
    }

    #[test]
    fn what_is_left_out_has_a_meaning() {
        let Ok(Outcome::Allow(grant)) = read(r#"{"result":"allow","rules":[{"filter":"a/#"}]}"#) else { panic!() };
        assert_eq!((grant.principal.as_str(), grant.complete, grant.expires), ("ann", false, 0));
        assert_eq!(grant.rules, [Rule { filter: "a/#".into(), publish: true, subscribe: true, allow: true }]);
    }

    /// Any JSON for a known field.
    fn json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<f64>().prop_map(Value::from),
            "(allow|deny|publish|a/#|#|.{0,8})".prop_map(Value::from),
        ];
        let name = "(result|principal|rules|complete|expires|filter|action|allow|acl)";
        leaf.prop_recursive(3, 24, 4, move |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::btree_map(name, inner, 0..5)
                    .prop_map(|fields| Value::Object(fields.into_iter().collect())),
            ]
        })
    }

    proptest! {
        /// Whoever is let in is let in by an answer in which every field has its type.
        #[test]
        fn only_an_answer_that_is_right_as_a_whole_lets_in(fields in prop::collection::btree_map(
            "(principal|rules|complete|expires|acl)", json(), 0..4,
        )) {
            let mut answer: Map<String, Value> = fields.into_iter().collect();
            answer.insert("result".into(), "allow".into());
            let outcome = read(&Value::Object(answer.clone()).to_string());
            let has_types = !answer.contains_key("acl")
                && ANSWER.iter().all(|(name, kind)| answer.get(*name).is_none_or(|value| kind.fits(value)));
            if let Ok(outcome) = outcome {
                prop_assert!(has_types);
                let Outcome::Allow(grant) = outcome else { return Err(TestCaseError::fail("not allowed")) };
                let rules = answer.get("rules").and_then(Value::as_array).map_or(0, Vec::len);
                prop_assert_eq!(grant.rules.len(), rules);
            }
        }

        #[test]
        fn any_bytes_are_read_without_a_panic(body in prop::collection::vec(any::<u8>(), 0..100)) {
            let _ = super::read(&body, String::new);
        }
    }
}
