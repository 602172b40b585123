//! The smallest auth plugin: names and passwords straight from its settings, and a word game for enhanced
//! authentication. For trying things out, not for production.

use wasmqtt_sdk::{Auth, BAD_USER_NAME_OR_PASSWORD, Challenge, Outcome, Plugin, Request, Settings, Step};

/// Names and passwords from the settings.
pub struct Demo {
    users: Vec<(String, String)>,
}

impl Plugin for Demo {
    fn new(settings: &Settings) -> Result<Self, String> {
        Ok(Self { users: settings.iter().map(|(name, value)| (name.to_owned(), value.to_owned())).collect() })
    }
}

impl Auth for Demo {
    fn authenticate(&self, request: &Request) -> Result<Outcome, String> {
        match request.method.as_deref() {
            Some("ping") => return Ok(Outcome::Challenge(Challenge { data: b"ping".to_vec(), state: b"1".to_vec() })),
            Some(_) => return Ok(Outcome::Deny(0x8C)),
            None => {}
        }
        let Some(username) = &request.username else { return Ok(Outcome::Next) };
        let password = request.password.as_deref().unwrap_or_default();
        let known = self.users.iter().any(|(name, word)| name == username && word.as_bytes() == password);
        Ok(if known { Outcome::allow(username) } else { Outcome::Deny(BAD_USER_NAME_OR_PASSWORD) })
    }

    /// The client answers `pong` to `ping`. A re-authentication begins with another `ping`.
    fn proceed(&self, step: &Step) -> Result<Outcome, String> {
        if step.state.is_empty() {
            return Ok(Outcome::Challenge(Challenge { data: b"ping".to_vec(), state: b"1".to_vec() }));
        }
        Ok(if step.data == b"pong" { Outcome::allow("player") } else { Outcome::Deny(0x87) })
    }
}

wasmqtt_sdk::export_plugin!(Demo: auth);

#[cfg(test)]
mod tests {
    use wasmqtt_sdk::testing;

    use super::*;

    fn ask(username: Option<&str>, password: &str) -> Outcome {
        let demo = Demo::new(&Settings::from_pairs(&[("alice", "secret")])).expect("settings are good");
        let request = match username {
            Some(username) => testing::login("c", username, password),
            None => testing::request("c"),
        };
        demo.authenticate(&request).expect("never fails")
    }

    #[test]
    fn users_from_the_settings_are_let_in() {
        assert!(matches!(ask(Some("alice"), "secret"), Outcome::Allow(grant) if grant.principal == "alice"));
        assert!(matches!(ask(Some("alice"), "wrong"), Outcome::Deny(0x86)));
        assert!(matches!(ask(Some("bob"), "secret"), Outcome::Deny(0x86)));
        assert!(matches!(ask(None, ""), Outcome::Next));
    }
}
