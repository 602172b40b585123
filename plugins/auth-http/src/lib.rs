//! Asks a web service who may connect.
//!
//! POSTs `{"client_id", "username", "password", "address", "listener"}` to the setting `url`. 204, or 200 without a body,
//! lets in; 200 with `{"result": "allow" | "deny" | "next", "principal", "rules": [{"filter", "action", "allow"}],
//! "complete", "expires"}` says more; 401 and 403 refuse. Anything else is no answer, and `on_error` decides.
//!
//! Settings: `url`, `timeout_ms` (5000), `header.NAME` for each header. Needs `grants = { http = ["https://…"] }`.

use serde_json::{Value, json};
use wasmqtt_sdk::{
    Auth, BAD_USER_NAME_OR_PASSWORD, Grant, HttpRequest, HttpResponse, NOT_AUTHORIZED, Outcome, Plugin, Request, Rule,
    Settings, export_plugin, is_valid_filter,
};

/// Milliseconds.
const TIMEOUT_DEFAULT: u64 = 5000;

/// Where to ask.
#[derive(Debug)]
pub struct AuthHttp {
    url: String,
    timeout_ms: u64,
    headers: Vec<(String, String)>,
}

impl Plugin for AuthHttp {
    fn new(settings: &Settings) -> Result<Self, String> {
        let header = |(name, value): (&str, &str)| Some((name.strip_prefix("header.")?.to_owned(), value.to_owned()));
        Ok(Self {
            url: settings.require("url")?.to_owned(),
            timeout_ms: settings.parse("timeout_ms", TIMEOUT_DEFAULT)?,
            headers: settings.iter().filter_map(header).collect(),
        })
    }
}

impl AuthHttp {
    fn question(&self, request: &Request) -> HttpRequest {
        let password = request.password.as_deref().map(String::from_utf8_lossy);
        let body = json!({
            "client_id": request.client_id,
            "username": request.username,
            "password": password,
            "address": request.address,
            "listener": request.listener,
        });
        let mut question = HttpRequest::post(&self.url, "application/json", body.to_string());
        question.headers.extend(self.headers.iter().cloned());
        question.timeout_ms = self.timeout_ms;
        question
    }
}

fn outcome(response: &HttpResponse, request: &Request) -> Result<Outcome, String> {
    let username = request.username.clone().unwrap_or_default();
    match response.status {
        204 => Ok(Outcome::allow(username)),
        200 if response.body.trim_ascii().is_empty() => Ok(Outcome::allow(username)),
        200 => {
            let answer: Value = serde_json::from_slice(&response.body).map_err(|error| format!("no JSON: {error}"))?;
            match answer["result"].as_str() {
                Some("allow") => grant(&answer, username).map(Outcome::Allow),
                Some("deny") => Ok(Outcome::Deny(NOT_AUTHORIZED)),
                Some("next") => Ok(Outcome::Next),
                _ => Err(format!("result is {}: allowed are allow, deny and next", answer["result"])),
            }
        }
        401 => Ok(Outcome::Deny(BAD_USER_NAME_OR_PASSWORD)),
        403 => Ok(Outcome::Deny(NOT_AUTHORIZED)),
        other => Err(format!("status {other}")),
    }
}

fn grant(answer: &Value, username: String) -> Result<Grant, String> {
    let mut grant = Grant::new(answer["principal"].as_str().map_or(username, str::to_owned));
    grant.complete = answer["complete"].as_bool().unwrap_or(false);
    grant.expires = answer["expires"].as_u64().unwrap_or(0).try_into().unwrap_or(u32::MAX);
    for rule in answer["rules"].as_array().into_iter().flatten() {
        let filter = rule["filter"].as_str().filter(|filter| is_valid_filter(filter));
        let filter = filter.ok_or_else(|| format!("{} is no topic filter", rule["filter"]))?;
        let (publish, subscribe) = match rule["action"].as_str().unwrap_or("all") {
            "publish" => (true, false),
            "subscribe" => (false, true),
            "all" => (true, true),
            other => return Err(format!("action {other:?}: allowed are publish, subscribe and all")),
        };
        let allow = rule["allow"].as_bool().unwrap_or(true);
        grant.rules.push(Rule { filter: filter.to_owned(), publish, subscribe, allow });
    }
    Ok(grant)
}

impl Auth for AuthHttp {
    fn authenticate(&self, request: &Request) -> Result<Outcome, String> {
        if request.method.is_some() {
            return Ok(Outcome::Next);
        }
        let response = self.question(request).send()?;
        outcome(&response, request).map_err(|error| format!("{}: {error}", self.url))
    }
}

export_plugin!(AuthHttp: auth);

#[cfg(test)]
mod tests {
    use wasmqtt_sdk::testing;

    use super::*;

    fn ask(status: u16, body: &str) -> Result<Outcome, String> {
        let settings = [("url", "https://idp/auth"), ("header.authorization", "Bearer x")];
        let plugin = AuthHttp::new(&Settings::from_pairs(&settings)).expect("settings are good");
        testing::respond(Ok(HttpResponse { status, body: body.into() }));
        plugin.authenticate(&testing::login("c", "ann", "secret"))
    }

    #[test]
    fn the_service_is_told_who_asks() {
        assert_eq!(ask(204, ""), Ok(Outcome::allow("ann")));
        let [request] = &testing::take_requests()[..] else { panic!("one request") };
        assert_eq!((request.method.as_str(), request.url.as_str()), ("POST", "https://idp/auth"));
        assert!(request.headers.contains(&("authorization".into(), "Bearer x".into())));
        let body: Value = serde_json::from_slice(&request.body).expect("JSON");
        assert_eq!(
            (&body["client_id"], &body["username"], &body["password"]),
            (&json!("c"), &json!("ann"), &json!("secret"))
        );
    }

    #[test]
    fn its_answer_decides() {
        assert_eq!(ask(200, " "), Ok(Outcome::allow("ann")));
        assert_eq!(ask(200, r#"{"result":"deny"}"#), Ok(Outcome::Deny(NOT_AUTHORIZED)));
        assert_eq!(ask(200, r#"{"result":"next"}"#), Ok(Outcome::Next));
        assert_eq!(ask(401, ""), Ok(Outcome::Deny(BAD_USER_NAME_OR_PASSWORD)));
        assert_eq!(ask(403, ""), Ok(Outcome::Deny(NOT_AUTHORIZED)));
        let rules = r#"{"result":"allow","principal":"p","complete":true,"expires":60,
            "rules":[{"filter":"a/#","action":"publish"},{"filter":"b","allow":false}]}"#;
        let Ok(Outcome::Allow(grant)) = ask(200, rules) else { panic!("not allowed") };
        assert_eq!((grant.principal.as_str(), grant.complete, grant.expires, grant.rules.len()), ("p", true, 60, 2));
        assert!(grant.rules[0].publish && !grant.rules[0].subscribe && !grant.rules[1].allow);
    }

    #[test]
    fn no_answer_is_a_failure_and_not_a_denial() {
        for (status, body) in
            [(500, ""), (200, "<html>"), (200, "{}"), (200, r#"{"result":"allow","rules":[{"filter":"a#"}]}"#)]
        {
            let failure = ask(status, body).expect_err("no answer");
            assert!(failure.starts_with("https://idp/auth: "), "{failure}");
        }
        let plugin = AuthHttp::new(&Settings::from_pairs(&[("url", "http://x")])).expect("good");
        assert!(plugin.authenticate(&testing::request("c")).is_err(), "nobody there");
    }
}
