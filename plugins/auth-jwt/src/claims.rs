//! Permissions that a token carries.

use serde_json::Value;
use wasmqtt_sdk::{Rule, is_valid_filter};

/// `{"pub": [FILTER…], "sub": [FILTER…], "all": [FILTER…]}` as permissions.
pub(crate) fn rules(acl: &Value) -> Result<Vec<Rule>, String> {
    let Some(acl) = acl.as_object() else { return Err("the ACL claim is no object".into()) };
    let mut rules = Vec::new();
    for (name, filters) in acl {
        let (publish, subscribe) = match name.as_str() {
            "pub" => (true, false),
            "sub" => (false, true),
            "all" => (true, true),
            other => return Err(format!("{other:?} in the ACL claim: allowed are pub, sub and all")),
        };
        let Some(filters) = filters.as_array() else { return Err(format!("{name:?} in the ACL claim is no list")) };
        for filter in filters {
            match filter.as_str() {
                Some(filter) if is_valid_filter(filter) => {
                    rules.push(Rule { filter: filter.to_owned(), publish, subscribe, allow: true });
                }
                _ => return Err(format!("{filter} in the ACL claim is no topic filter")),
            }
        }
    }
    Ok(rules)
}
