//! Who would decide what: each `acl` plugin is asked, and nothing is remembered.

use std::sync::Arc;

use wasmqtt_protocol::access::{Decision, Verdict};
use wasmqtt_protocol::ports::{Access, Client};

use crate::acl::Authorization;
use crate::call::{Question, Said, put};
use crate::config::PluginConfig;
use crate::generation::Generation;

/// What one plugin would say.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Opinion {
    /// Its name.
    pub plugin: String,
    /// Its build: on trial as a canary, if it serves this client.
    pub generation: u64,
    /// `allow`, `deny 0x87 Not authorized`, `next`, `failed`, or `not asked`.
    pub verdict: String,
    /// Where and how long that would hold, or why there is no answer and what that counts as.
    pub note: String,
    /// What it means for the access.
    #[serde(skip)]
    pub outcome: Outcome,
}

/// What an [`Opinion`] means for the access.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The configuration says that it is not asked about this.
    NotAsked,
    /// The next plugin is asked.
    PassedOn,
    /// Nobody else is asked.
    Decided(Verdict),
}

pub(crate) async fn opinion(generation: &Arc<Generation>, client: &Arc<Client>, access: &Access) -> Opinion {
    let (outcome, verdict, note) = match out_of_scope(&generation.config, client, access) {
        Some(why) => (Outcome::NotAsked, "not asked".to_owned(), why.to_owned()),
        None => asked(generation, client, access).await,
    };
    Opinion { plugin: generation.name.to_string(), generation: generation.number, verdict, note, outcome }
}

fn out_of_scope(config: &PluginConfig, client: &Client, access: &Access) -> Option<&'static str> {
    if !config.is_for_access(access) {
        Some("its `topics` leave this out")
    } else if config.is_for_listener(&client.listener) {
        None
    } else if client.listener.is_empty() {
        Some("it has `listeners`, and the client is not connected to any")
    } else {
        Some("its `listeners` leave this client out")
    }
}

async fn asked(generation: &Arc<Generation>, client: &Arc<Client>, access: &Access) -> (Outcome, String, String) {
    let question = Authorization { client: Arc::clone(client), accesses: vec![access.clone()] };
    let mut heard = Vec::new();
    let asked = tokio::time::timeout(generation.deadline(), ask(generation, &question, &mut heard)).await;
    let error = match asked {
        Ok(Ok(decision)) => {
            // What it logs is why.
            let note = std::iter::once(lease(&decision)).chain(heard).collect::<Vec<_>>().join("; ");
            return (decision.verdict.into(), in_words(decision.verdict), note);
        }
        Ok(Err(error)) => error,
        Err(_) => format!("no answer within deadline_ms = {}", generation.deadline().as_millis()),
    };
    let counts_as = generation.config.on_error.verdict();
    (counts_as.into(), "failed".to_owned(), format!("{error}; by `on_error`, that counts as {}", in_words(counts_as)))
}

impl From<Option<Verdict>> for Outcome {
    fn from(verdict: Option<Verdict>) -> Self {
        verdict.map_or(Self::PassedOn, Self::Decided)
    }
}

async fn ask(
    generation: &Arc<Generation>,
    question: &Authorization,
    heard: &mut Vec<String>,
) -> Result<Decision, String> {
    let mut pooled = generation.instantiate(&generation.plugin.loading, None).await?;
    let Some(running) = pooled.begin() else { return Err("no instance".into()) };
    running.store.data_mut().heard = Some(Vec::new());
    let cpu_ms = Authorization::cpu_ms(&generation.config.limits);
    let budget = generation.budget_of(&generation.plugin.loading, cpu_ms);
    let said =
        put(running, question, budget, generation).await.map_err(|error| generation.explained(running, error))?;
    *heard = running.store.data_mut().heard.take().unwrap_or_default();
    pooled.finished();
    match said {
        Said::Answer(mut decisions) => decisions.pop().ok_or_else(|| "no decision".to_owned()),
        Said::Failure(text) | Said::Nonsense(text) => Err(text),
    }
}

fn in_words(verdict: Option<Verdict>) -> String {
    verdict.map_or_else(|| "next".to_owned(), |verdict| verdict.to_string())
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
