//! How commands reach a running broker: a Unix socket in its data folder, which only its user can open.
//!
//! One request, one answer, each a line of JSON; the bytes of components follow the request.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use serde::{Deserialize, Serialize};
use tracing::{info, warn};
use wasmqtt_host::{Opinion, Outcome, PluginHost};
use wasmqtt_protocol::access::Action;
use wasmqtt_protocol::codec::Qos;
use wasmqtt_protocol::ports::{Access, Client};
use wasmqtt_server::Inspector;
use wasmqtt_server::store::RocksStore;

use crate::ctl::{self, CtlRequest};
use crate::feed::FeedRequest;
use crate::reload::Running;

/// Below `data_dir`.
pub(crate) const SOCKET: &str = "control.sock";
/// Bytes of a request without components, and of one component.
const REQUEST_BYTES_MAX: u64 = 64 * 1024;
const COMPONENT_BYTES_MAX: u64 = 64 << 20;
/// How long a client may take to say something.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long deploying may take: compiling a large component takes a while.
const ANSWER_PATIENCE: Duration = Duration::from_mins(5);

/// What a command wants.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Request {
    List,
    /// Names, and how many bytes of each follow.
    Deploy(Vec<(String, u64)>),
    RollBack {
        name: String,
        digest: Option<String>,
    },
    Promote {
        name: String,
    },
    Backup {
        dir: PathBuf,
    },
    /// For the broker itself.
    Ctl(CtlRequest),
    Feed {
        name: String,
        request: FeedRequest,
    },
    Explain {
        client_id: String,
        principal: Option<String>,
        publish: bool,
        topic: String,
    },
}

/// What comes back.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Answer {
    Done,
    Plugins(serde_json::Value),
    Ctl(serde_json::Value),
    Feed(serde_json::Value),
    Explanation(serde_json::Value),
    Failed(String),
}

/// Why an access is allowed or denied.
#[derive(Debug, Serialize)]
struct Explanation {
    client_id: String,
    principal: String,
    connected: bool,
    /// What the broker itself knows: a rule or a lease.
    known: Option<String>,
    opinions: Vec<Opinion>,
    verdict: String,
}

/// What commands reach.
pub(crate) struct Reach {
    pub(crate) plugins: Option<Arc<PluginHost>>,
    pub(crate) store: Option<Arc<RocksStore>>,
    pub(crate) server: Inspector,
    pub(crate) running: Arc<Running>,
}

/// Serves commands on a thread of its own until the process ends. That it cannot is no reason not to serve clients.
pub(crate) fn start(data_dir: &Path, reach: Reach) {
    if let Err(error) = try_start(data_dir, reach) {
        warn!(error = format!("{error:#}"), "commands such as `wasmqtt plugin list` do not reach this broker");
    }
}

fn try_start(data_dir: &Path, reach: Reach) -> anyhow::Result<()> {
    let path = data_dir.join(SOCKET);
    let failed = || format!("listen on {} for commands", path.display());
    wasmqtt_files::make_private_folder(data_dir).with_context(failed)?;
    if UnixStream::connect(&path).is_ok() {
        bail!("another broker has {} as its data folder, commands reach that one", data_dir.display());
    }
    let _ = std::fs::remove_file(&path);
    let listener = UnixListener::bind(&path).with_context(failed)?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).with_context(failed)?;
    let serve = move || {
        for stream in listener.incoming() {
            let handled = stream.map_err(anyhow::Error::from).and_then(|stream| handle(&stream, &reach));
            if let Err(error) = handled {
                warn!(error = format!("{error:#}"), "command not answered");
            }
        }
    };
    std::thread::Builder::new().name("control".into()).spawn(serve).with_context(failed)?;
    Ok(())
}

fn handle(stream: &UnixStream, reach: &Reach) -> anyhow::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut line = String::new();
    (&mut reader).take(REQUEST_BYTES_MAX).read_line(&mut line)?;
    let request: Request = serde_json::from_str(&line).context("read a request")?;
    let answer = answer(request, &mut reader, reach);
    let answer = answer.unwrap_or_else(|error| Answer::Failed(format!("{error:#}")));
    send(stream, &answer)
}

fn send(mut stream: &UnixStream, message: &impl Serialize) -> anyhow::Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    stream.write_all(&line)?;
    Ok(())
}

fn answer(request: Request, reader: &mut impl Read, reach: &Reach) -> anyhow::Result<Answer> {
    if let Request::Ctl(request) = &request {
        return ctl::answer(request, &reach.running, &reach.server);
    }
    if let Request::Backup { dir } = &request {
        let Some(store) = &reach.store else { bail!("[store] durability = \"memory\": there is no store") };
        info!(dir = %dir.display(), "backing up");
        store.backup(dir)?;
        return Ok(Answer::Done);
    }
    let Some(plugins) = &reach.plugins else {
        bail!("this broker has no plugins: its configuration names none, and there is no folder `plugins` beside it")
    };
    Ok(match request {
        Request::Backup { .. } | Request::Ctl(_) => Answer::Done,
        Request::List => Answer::Plugins(list(plugins)?),
        Request::Feed { name, request } => Answer::Feed(crate::feed::answer(plugins, &name, &request)?),
        Request::Deploy(files) => {
            let names: Vec<&str> = files.iter().map(|(name, _)| name.as_str()).collect();
            info!(plugins = names.join(", "), "deploying");
            let files = files.iter().map(|(name, bytes)| Ok((name.clone(), component(reader, *bytes)?)));
            plugins.deploy(files.collect::<anyhow::Result<_>>()?)?;
            Answer::Done
        }
        Request::RollBack { name, digest } => {
            info!(plugin = name, "rolling back");
            plugins.roll_back(&name, digest.as_deref())?;
            Answer::Done
        }
        Request::Promote { name } => {
            plugins.promote(&name)?;
            Answer::Done
        }
        Request::Explain { client_id, principal, publish, topic } => {
            let action = if publish { Action::Publish } else { Action::Subscribe };
            let access = Access { action, topic: topic.into(), qos: Qos::AtMostOnce, retain: false };
            let explanation = explain(&client_id, principal.as_deref(), &access, plugins, &reach.server);
            Answer::Explanation(serde_json::to_value(explanation)?)
        }
    })
}

fn component(reader: &mut impl Read, bytes: u64) -> anyhow::Result<Vec<u8>> {
    if bytes > COMPONENT_BYTES_MAX {
        bail!("a component of {bytes} bytes; at most {COMPONENT_BYTES_MAX} are allowed");
    }
    let mut component = Vec::new();
    reader.take(bytes).read_to_end(&mut component)?;
    if component.len() as u64 != bytes {
        bail!("the component ends after {} of {bytes} bytes", component.len());
    }
    Ok(component)
}

fn list(plugins: &PluginHost) -> anyhow::Result<serde_json::Value> {
    let mut list = Vec::new();
    for status in plugins.status() {
        let versions = plugins.versions(&status.name);
        let mut shown = serde_json::to_value(status)?;
        shown["versions"] = serde_json::to_value(versions)?;
        list.push(shown);
    }
    Ok(serde_json::Value::Array(list))
}

fn explain(
    client_id: &str,
    principal: Option<&str>,
    access: &Access,
    plugins: &PluginHost,
    server: &Inspector,
) -> Explanation {
    let found = server.explain(client_id, access.clone());
    let connected = found.is_some();
    let (client, known) = found.map_or_else(
        || {
            let principal = principal.unwrap_or_default().into();
            (Arc::new(Client { client_id: client_id.into(), principal, listener: "".into() }), None)
        },
        |found| (found.client, found.known),
    );
    let opinions = plugins.explain(&client, access);
    let verdict = match &known {
        Some((why, verdict)) => format!("{verdict}, by {why}"),
        None => decided(&opinions),
    };
    let known = known.map(|(why, verdict)| format!("{why}: {verdict}"));
    Explanation {
        client_id: client.client_id.to_string(),
        principal: client.principal.to_string(),
        connected,
        known,
        opinions,
        verdict,
    }
}

/// The first opinion that decides; what all pass on is denied, and what nobody is asked about is allowed.
fn decided(opinions: &[Opinion]) -> String {
    for opinion in opinions {
        if let Outcome::Decided(verdict) = opinion.outcome {
            return format!("{verdict}, by {}", opinion.plugin);
        }
    }
    if opinions.iter().all(|opinion| opinion.outcome == Outcome::NotAsked) {
        return "allow: no plugin decides about it".into();
    }
    "deny: no plugin granted it".into()
}

/// Asks the broker whose data folder this is; `components` follow the request.
pub(crate) fn ask(data_dir: &Path, request: &Request, components: &[Vec<u8>]) -> anyhow::Result<Answer> {
    let path = data_dir.join(SOCKET);
    let mut stream = UnixStream::connect(&path).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
            anyhow!("no broker runs with {} ({}); name its configuration with --config", data_dir.display(), error)
        }
        _ => anyhow!("cannot reach the broker at {}: {error}", path.display()),
    })?;
    stream.set_read_timeout(Some(ANSWER_PATIENCE))?;
    send(&stream, request)?;
    for component in components {
        stream.write_all(component)?;
    }
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).context("read the broker's answer")?;
    match serde_json::from_str(&line).context("read the broker's answer")? {
        Answer::Failed(error) => Err(anyhow!(error)),
        answer => Ok(answer),
    }
}
