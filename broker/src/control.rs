//! How commands reach a running broker: a Unix socket in its data folder, which only its user can open.
//!
//! One request, one answer, each a line of JSON; the bytes of components follow the request.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use serde::{Deserialize, Serialize};
use tracing::{debug, info, warn};
use wasmqtt_host::{Cancel, Opinion, Outcome, PluginHost};
use wasmqtt_protocol::access::Action;
use wasmqtt_protocol::codec::Qos;
use wasmqtt_protocol::ports::{Access, Client};
use wasmqtt_server::Inspector;
use wasmqtt_store::RocksStore;

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
/// How long the broker may take for an answer that needs nothing to be compiled or copied.
const ANSWER_PATIENCE: Duration = Duration::from_secs(30);
/// Commands that are carried out at a time; who has one more is told so.
const COMMANDS_MAX: usize = 16;
/// Components of one command, and their bytes.
const COMPONENTS_MAX: usize = 64;
const COMPONENTS_BYTES_MAX: u64 = 256 << 20;
/// Between two tries to take a connection, when the system has none to give.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What a command wants.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Request {
    List,
    Deploy {
        /// Names, and how many bytes of each follow.
        files: Vec<(String, u64)>,
        /// The running builds are not asked for what they know.
        fresh: bool,
    },
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
pub(crate) fn start(data_dir: &Path, reach: Reach) -> Option<JoinHandle<()>> {
    try_start(data_dir, reach)
        .inspect_err(|error| {
            warn!(error = format!("{error:#}"), "commands such as `wasmqtt plugin list` do not reach this broker");
        })
        .ok()
}

fn try_start(data_dir: &Path, reach: Reach) -> anyhow::Result<JoinHandle<()>> {
    let path = data_dir.join(SOCKET);
    let failed = || format!("listen on {} for commands", path.display());
    wasmqtt_files::make_private_folder(data_dir).with_context(failed)?;
    if UnixStream::connect(&path).is_ok() {
        bail!("another broker has {} as its data folder, commands reach that one", data_dir.display());
    }
    let listener = bind(data_dir, &path).with_context(failed)?;
    let reach = Arc::new(reach);
    let serve = move || {
        for stream in listener.incoming() {
            let taken = stream.map_err(anyhow::Error::from).and_then(|stream| take(stream, &reach));
            if let Err(error) = taken {
                warn!(error = format!("{error:#}"), "command not answered");
                std::thread::sleep(ACCEPT_PAUSE);
            }
        }
    };
    std::thread::Builder::new().name("control".into()).spawn(serve).with_context(failed)
}

/// Nobody else can open the socket at any moment: it is made in a folder that is ours alone, and then gets its name.
fn bind(data_dir: &Path, path: &Path) -> io::Result<UnixListener> {
    let private = tempfile::Builder::new().prefix(".").rand_bytes(6).tempdir_in(data_dir)?;
    let unnamed = private.path().join("s");
    let listener = UnixListener::bind(&unnamed)?;
    std::fs::set_permissions(&unnamed, std::fs::Permissions::from_mode(0o600))?;
    std::fs::rename(&unnamed, path)?;
    Ok(listener)
}

/// Carries a command out on a thread of its own, as long as there are not too many.
fn take(stream: UnixStream, reach: &Arc<Reach>) -> anyhow::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let mine = Arc::clone(reach);
    // One for this thread.
    if Arc::strong_count(reach) > COMMANDS_MAX + 1 {
        return send(&stream, &Answer::Failed(format!("the broker carries out {COMMANDS_MAX} commands already")));
    }
    let carry_out = move || {
        if let Err(error) = handle(&stream, &mine) {
            debug!(error = format!("{error:#}"), "command not answered");
        }
    };
    std::thread::Builder::new().name("command".into()).spawn(carry_out)?;
    Ok(())
}

fn handle(stream: &UnixStream, reach: &Reach) -> anyhow::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut line = String::new();
    (&mut reader).take(REQUEST_BYTES_MAX).read_line(&mut line)?;
    let request: Request = serde_json::from_str(&line).context("read a request")?;
    let files = match &request {
        Request::Deploy { files, .. } => components(&mut reader, files),
        _ => Ok(Vec::new()),
    };
    let cancel = Cancel::default();
    std::thread::scope(|scope| {
        if matches!(request, Request::Deploy { .. } | Request::RollBack { .. } | Request::Ctl(CtlRequest::Reload)) {
            scope.spawn(|| await_end(stream, &cancel));
        }
        let answer = files.and_then(|files| answer(request, files, reach, &cancel));
        let sent = send(stream, &answer.unwrap_or_else(|error| Answer::Failed(format!("{error:#}"))));
        // Ends the thread that waits for that, too.
        let _ = stream.shutdown(Shutdown::Both);
        sent
    })
}

/// Nobody wants what takes so long, when the command that asked for it has ended.
fn await_end(mut stream: &UnixStream, cancel: &Cancel) {
    let _ = stream.set_read_timeout(None);
    let _ = stream.read(&mut [0]);
    cancel.cancel();
}

fn send(mut stream: &UnixStream, message: &impl Serialize) -> anyhow::Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    stream.write_all(&line)?;
    Ok(())
}

fn answer(request: Request, files: Vec<(String, Vec<u8>)>, reach: &Reach, cancel: &Cancel) -> anyhow::Result<Answer> {
    if let Request::Ctl(request) = &request {
        return ctl::answer(request, &reach.running, &reach.server, cancel);
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
        Request::Deploy { fresh, .. } => {
            let names: Vec<&str> = files.iter().map(|(name, _)| name.as_str()).collect();
            info!(plugins = names.join(", "), fresh, "deploying");
            plugins.deploy_with(files, fresh, cancel)?;
            Answer::Done
        }
        Request::RollBack { name, digest } => {
            info!(plugin = name, "rolling back");
            plugins.roll_back_with(&name, digest.as_deref(), cancel)?;
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

fn components(reader: &mut impl Read, files: &[(String, u64)]) -> anyhow::Result<Vec<(String, Vec<u8>)>> {
    let bytes = files.iter().fold(0_u64, |sum, (_, bytes)| sum.saturating_add(*bytes));
    if files.len() > COMPONENTS_MAX || bytes > COMPONENTS_BYTES_MAX {
        let count = files.len();
        bail!(
            "{count} components of {bytes} bytes; at most {COMPONENTS_MAX} of {COMPONENTS_BYTES_MAX} bytes together are \
             allowed"
        );
    }
    files.iter().map(|(name, bytes)| Ok((name.clone(), component(reader, *bytes)?))).collect()
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
    let mut compiling = plugins.compiling();
    for status in plugins.status() {
        let versions = plugins.versions(&status.name);
        let job = compiling.iter().position(|job| job.plugin == status.name).map(|at| compiling.remove(at));
        let mut shown = serde_json::to_value(status)?;
        shown["versions"] = serde_json::to_value(versions)?;
        shown["compiling"] = serde_json::to_value(job)?;
        list.push(shown);
    }
    // Those of which no build serves yet.
    compiling.retain(|job| list.iter().all(|shown| shown["name"] != job.plugin.as_str()));
    for job in compiling {
        list.push(serde_json::json!({ "name": job.plugin, "generation": 0, "versions": [], "compiling": job }));
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
    let connected = found.as_ref().is_some_and(|found| found.connected);
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
    if !matches!(request, Request::Deploy { .. } | Request::RollBack { .. } | Request::Backup { .. } | Request::Ctl(_))
    {
        stream.set_read_timeout(Some(ANSWER_PATIENCE))?;
    }
    let sent = send(&stream, request)
        .and_then(|()| Ok(components.iter().try_for_each(|component| stream.write_all(component))?));
    // Compiling takes its time, and a broker that ends closes the connection. One that has said no already reads no more.
    let mut line = String::new();
    let read = BufReader::new(stream).read_line(&mut line);
    match (sent, read) {
        (Err(error), Ok(0) | Err(_)) => return Err(error.context("send the command to the broker")),
        (Ok(()), Ok(0)) => bail!("the broker ended before it answered"),
        (Ok(()), Err(error)) => return Err(error).context("read the broker's answer"),
        (_, Ok(_)) => {}
    }
    match serde_json::from_str(&line).context("read the broker's answer")? {
        Answer::Failed(error) => Err(anyhow!(error)),
        answer => Ok(answer),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Components of one command: each, all together, and how many they are. What is refused is not read.
    #[test]
    fn components_of_a_command_are_bounded() {
        let of = |count: usize, bytes: u64| (0..count).map(|n| (n.to_string(), bytes)).collect::<Vec<_>>();
        let error = |files: &[(String, u64)]| components(&mut io::empty(), files).expect_err("fails").to_string();
        let taken = components(&mut io::repeat(7), &of(COMPONENTS_MAX, 3)).expect("as many as there may be");
        assert!(taken.len() == COMPONENTS_MAX && taken.iter().all(|(_, bytes)| bytes == &[7; 3]));
        let many = error(&of(COMPONENTS_MAX + 1, 0));
        assert!(many.contains("65 components of 0 bytes; at most 64 of 268435456 bytes"), "{many}");
        let large = error(&of(1, COMPONENT_BYTES_MAX + 1));
        assert!(large.contains("a component of 67108865 bytes; at most 67108864 are allowed"), "{large}");
        let mut together = of(4, COMPONENT_BYTES_MAX);
        assert!(error(&together).contains("ends after 0 of 67108864 bytes"), "they were about to be read");
        together.push(("one byte".into(), 1));
        assert!(error(&together).contains("5 components of 268435457 bytes"), "{}", error(&together));
        assert!(error(&of(2, u64::MAX)).contains("components of 18446744073709551615 bytes"));
    }
}
