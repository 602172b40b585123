//! Asks a web service who may connect.
//!
//! POSTs `{"client_id", "username", "password", "address", "listener"}` to the setting `url`. 204, or 200 without a body,
//! lets in; 200 with a JSON object says more; 401 and 403 refuse. Any other status is no answer, and `on_error` decides.
//!
//! | field | type | if it is not there |
//! |---|---|---|
//! | `result` | `"allow"`, `"deny"` or `"next"` | it must be there |
//! | `principal` | text | the user name |
//! | `rules` | list of `{"filter": text, "action": "publish" \| "subscribe" \| "all", "allow": true \| false}`, at most 1,000 | none; `filter` must be there, `action` is `"all"`, `allow` is `true` |
//! | `complete` | `true` or `false` | `false` |
//! | `expires` | seconds, 0 to 4294967295; 0: never | 0 |
//!
//! A 200 whose body is anything else (another type, a field that is not in this table, a filter that is none) refuses
//! the client, whatever `on_error` says, with a line in the log that names what is wrong. A password that is not UTF-8
//! cannot be written in JSON, and is refused.
//!
//! Settings: `url`, `timeout_ms` (5000), `header.NAME` for each header. Needs `grants = { http = ["https://…"] }`.

mod answer;

use serde_json::json;
use wasmqtt_sdk::{
    Auth, BAD_USER_NAME_OR_PASSWORD, HttpRequest, HttpResponse, NOT_AUTHORIZED, Outcome, Plugin, Request, Settings,
    debug, export_plugin, shown_url, warn,
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
        settings.only(&["url", "timeout_ms", "header.*"])?;
        let header = |(name, value): (&str, &str)| Some((name.strip_prefix("header.")?.to_owned(), value.to_owned()));
        Ok(Self {
            url: settings.require("url")?.to_owned(),
            timeout_ms: settings.parse("timeout_ms", TIMEOUT_DEFAULT)?,
            headers: settings.iter().filter_map(header).collect(),
        })
    }
}

impl AuthHttp {
    fn question(&self, request: &Request, password: Option<&str>) -> HttpRequest {
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

    fn outcome(&self, response: &HttpResponse, request: &Request) -> Result<Outcome, String> {
        let username = || request.username.clone().unwrap_or_default();
        match response.status {
            204 => Ok(Outcome::allow(username())),
            200 if response.body.trim_ascii().is_empty() => Ok(Outcome::allow(username())),
            // What the service says and nobody understands must let nobody in, not even with on_error = "allow".
            200 => Ok(answer::read(&response.body, username).unwrap_or_else(|why| {
                warn(&format!("{}: {why}; {:?} is refused", shown_url(&self.url), request.client_id));
                Outcome::Deny(NOT_AUTHORIZED)
            })),
            401 => Ok(Outcome::Deny(BAD_USER_NAME_OR_PASSWORD)),
            403 => Ok(Outcome::Deny(NOT_AUTHORIZED)),
            other => Err(format!("{}: status {other}", shown_url(&self.url))),
        }
    }
}

impl Auth for AuthHttp {
    fn authenticate(&self, request: &Request) -> Result<Outcome, String> {
        if request.method.is_some() {
            return Ok(Outcome::Next);
        }
        let Ok(password) = request.password.as_deref().map(std::str::from_utf8).transpose() else {
            debug(&format!("{:?} is refused: its password is not UTF-8", request.client_id));
            return Ok(Outcome::Deny(BAD_USER_NAME_OR_PASSWORD));
        };
        let response = self.question(request, password).send()?;
        self.outcome(&response, request)
    }
}

export_plugin!(AuthHttp: auth);

#[cfg(test)]
mod tests {
    use serde_json::Value;
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
        for status in [100, 201, 302, 400, 404, 429, 500, 503] {
            let failure = ask(status, r#"{"result":"allow"}"#).expect_err("no answer");
            assert_eq!(failure, format!("https://idp/auth: status {status}"));
        }
        let plugin = AuthHttp::new(&Settings::from_pairs(&[("url", "http://x")])).expect("good");
        assert!(plugin.authenticate(&testing::request("c")).is_err(), "nobody there");
    }

    /// Not even with `on_error = "allow"`: a service said something, and it was not that this client may come in.
    #[test]
    fn an_answer_that_is_not_understood_lets_nobody_in_and_is_logged() {
        for body in ["<html>", "{}", r#"{"result":"allow","rules":[{"filter":"a","allow":"false"}]}"#] {
            assert_eq!(ask(200, body), Ok(Outcome::Deny(NOT_AUTHORIZED)), "{body}");
            let lines = testing::take().lines;
            assert!(lines.len() == 1 && lines[0].1.contains("https://idp/auth"), "{lines:?}");
        }
    }

    /// Errors are in the log, and those of other plugins in lists of messages too.
    #[test]
    fn no_secret_of_the_url_is_said() {
        let plugin = AuthHttp::new(&Settings::from_pairs(&[("url", "https://me:s3cret@idp/auth?key=s3cret")]));
        let plugin = plugin.expect("good");
        for (status, body) in [(500, ""), (200, "<html>")] {
            testing::respond(Ok(HttpResponse { status, body: body.into() }));
            let answer = plugin.authenticate(&testing::login("c", "ann", ""));
            let said = format!("{answer:?} {:?}", testing::take().lines);
            assert!(said.contains("https://idp/auth: ") && !said.contains("s3cret"), "{said}");
        }
    }

    /// Two passwords that differ only in what JSON cannot say would look alike to the service.
    #[test]
    fn a_password_that_is_not_text_is_refused() {
        let plugin = AuthHttp::new(&Settings::from_pairs(&[("url", "http://x")])).expect("good");
        let request = Request { password: Some(vec![0xFF]), ..testing::login("c", "ann", "") };
        testing::respond(Ok(HttpResponse { status: 204, body: Vec::new() }));
        assert_eq!(plugin.authenticate(&request), Ok(Outcome::Deny(BAD_USER_NAME_OR_PASSWORD)));
        assert!(testing::take_requests().is_empty());
    }

    #[test]
    fn settings_that_do_not_exist_are_named() {
        let wrong = AuthHttp::new(&Settings::from_pairs(&[("url", "http://x"), ("headers.a", "b")]));
        assert!(wrong.expect_err("is refused").contains("`headers.a`"));
    }
}
