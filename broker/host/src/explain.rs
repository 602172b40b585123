//! Who would decide what: each `acl` plugin is asked, and nothing is remembered.

use std::sync::Arc;
use std::time::Duration;

use wasmqtt_protocol::access::{Decision, Verdict};
use wasmqtt_protocol::ports::{Access, Client};

use crate::acl::Authorization;
use crate::call::{Question, Said, put};
use crate::generation::Generation;

/// What one plugin would say.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Opinion {
    /// Its name.
    pub plugin: String,
    /// Its build.
    pub generation: u64,
    /// `allow`, `deny 0x87`, `next`, or `failed`.
    pub verdict: String,
    /// Where and how long that would hold, or why there is no answer.
    pub note: String,
}

pub(crate) async fn opinion(generation: &Arc<Generation>, client: &Arc<Client>, access: &Access) -> Opinion {
    let question = Authorization { client: Arc::clone(client), accesses: vec![access.clone()] };
    let asked = tokio::time::timeout(generation.deadline(), ask(generation, &question)).await;
    let (verdict, note) = match asked {
        Ok(Ok(decision)) => (verdict(&decision), lease(&decision)),
        Ok(Err(error)) => ("failed".to_owned(), error),
        Err(_) => {
            ("failed".to_owned(), format!("no answer within deadline_ms = {}", generation.deadline().as_millis()))
        }
    };
    Opinion { plugin: generation.name.to_string(), generation: generation.number, verdict, note }
}

async fn ask(generation: &Arc<Generation>, question: &Authorization) -> Result<Decision, String> {
    let mut pooled = generation.instantiate().await?;
    let Some(running) = pooled.begin() else { return Err("no instance".into()) };
    let cpu = Duration::from_millis(Authorization::cpu_ms(&generation.config.limits));
    let said = put(running, question, cpu, generation).await.map_err(|error| generation.explained(running, error))?;
    pooled.finished();
    match said {
        Said::Answer(mut decisions) => decisions.pop().ok_or_else(|| "no decision".to_owned()),
        Said::Failure(text) | Said::Nonsense(text) => Err(text),
    }
}

fn verdict(decision: &Decision) -> String {
    match decision.verdict {
        None => "next".into(),
        Some(Verdict::Allow) => "allow".into(),
        Some(Verdict::Deny(reason)) => format!("deny 0x{:02X} {}", reason.0, reason.name()),
    }
}

fn lease(decision: &Decision) -> String {
    match &decision.lease {
        None => "asked each time".into(),
        Some(lease) => match &lease.scope {
            Some(scope) => format!("for {} s, within {scope}", lease.seconds),
            None => format!("for {} s, for this topic", lease.seconds),
        },
    }
}
