//! `[[listener]]`, `--listen`, and which listeners a plugin means by a name.

use std::net::{Ipv4Addr, SocketAddr, ToSocketAddrs};
use std::path::Path;
use std::sync::Arc;

use wasmqtt_server::{Bind, Listener};

use super::QUEUE_FULL;
use super::read::{Section, Text, closest};

/// What a TCP address looks like.
const ADDRESS: &str = "must be an address and a port such as \"127.0.0.1:1883\", \"0.0.0.0:1883\" or \"[::1]:1883\"";
/// Groups of this machine, by name and number.
const GROUP_FILE: &str = "/etc/group";

/// One `--listen`: the addresses of one host name, or one socket file.
#[derive(Debug, Clone)]
pub(crate) struct Listen(pub(crate) Vec<Listener>);

/// Where the broker listens when nobody says otherwise.
pub(super) fn default_listener() -> Listener {
    Listener::tcp(SocketAddr::from((Ipv4Addr::LOCALHOST, 1883)))
}

/// Reads `host:port`, `[v6]:port` or `unix:/path`, as `--listen` takes them.
pub(crate) fn parse_listen(text: &str) -> Result<Listen, String> {
    match text.strip_prefix("unix:") {
        Some("") => Err("a path must follow `unix:`".to_owned()),
        Some(path) => {
            let path = std::path::absolute(path).map_err(|error| error.to_string())?;
            Ok(Listen(vec![Listener::unix(path)]))
        }
        None => tcp_listeners(text.strip_prefix("mqtt://").unwrap_or(text)).map(Listen),
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Protocol {
    Mqtt,
    Unix,
    NotYet,
    Unknown,
}

/// `others` are those before it in the file. None, if there is something wrong with it; all of that is reported.
pub(super) fn meant_listener(mut listener: Section<'_>, base: &Path, others: &[Listener]) -> Vec<Listener> {
    let bind = listener.required("bind", "an address such as \"127.0.0.1:1883\"");
    let protocol = meant_protocol(&mut listener);
    let queue_policy = listener.choice("queue_full", &QUEUE_FULL).unwrap_or_default();
    let proxied = listener.flag("proxied").unwrap_or(false);
    let keepalive = listener.has("tcp_keepalive_secs");
    let silence = listener.seconds("tcp_keepalive_secs", Listener::KEEPALIVE_DEFAULT, 0..=7_200);
    let (mode, group) = (listener.text("mode"), listener.text("group"));
    let socket_mode = mode.as_ref().and_then(|mode| meant_mode(&listener, mode));
    let socket_group = group.as_ref().and_then(|group| meant_group(&listener, group));
    if protocol == Protocol::Unix && keepalive {
        listener.complain("tcp_keepalive_secs", "is for TCP, and this listener is a Unix socket");
    }
    for text in [&mode, &group].into_iter().flatten() {
        if protocol == Protocol::Mqtt {
            listener.problem(text, "is for a Unix socket: protocol = \"unix\"");
        }
    }
    listener.finish();
    let Some(bind) = bind else { return Vec::new() };
    let found = match protocol {
        Protocol::Unix if bind.value.is_empty() => Err("must be the path of a socket file".to_owned()),
        Protocol::Unix => Ok(vec![Listener { written: bind.value.into(), ..Listener::unix(base.join(bind.value)) }]),
        Protocol::Mqtt | Protocol::NotYet => tcp_listeners(bind.value),
        // What its address would have to look like is not known.
        Protocol::Unknown => Ok(Vec::new()),
    };
    let found = found.unwrap_or_else(|why| {
        listener.problem(&bind, &why);
        Vec::new()
    });
    if matches!(protocol, Protocol::NotYet | Protocol::Unknown) {
        return Vec::new();
    }
    let mut meant = Vec::new();
    for new in found {
        let Some(name) = own_name(&new, others) else {
            listener.problem(&bind, "another [[listener]] has this address already");
            return Vec::new();
        };
        let keepalive = (protocol == Protocol::Mqtt && !silence.is_zero()).then_some(silence);
        meant.push(Listener { name, queue_policy, proxied, keepalive, socket_mode, socket_group, ..new });
    }
    meant
}

fn meant_protocol(listener: &mut Section<'_>) -> Protocol {
    let Some(protocol) = listener.text("protocol") else { return Protocol::Mqtt };
    match protocol.value {
        "mqtt" => Protocol::Mqtt,
        "unix" => Protocol::Unix,
        "mqtts" | "ws" | "wss" => {
            listener.problem(&protocol, "not available yet: allowed are \"mqtt\" and \"unix\"");
            Protocol::NotYet
        }
        _ => {
            listener.problem(&protocol, "allowed are \"mqtt\" and \"unix\"");
            Protocol::Unknown
        }
    }
}

/// `None`: another listener has the address. Any number of them may take a free port each, and have a number.
fn own_name(new: &Listener, others: &[Listener]) -> Option<Arc<str>> {
    let is_taken = |name: &str| others.iter().any(|other| *other.name == *name);
    if !is_taken(&new.name) {
        return Some(Arc::clone(&new.name));
    }
    let takes_any = matches!(new.bind, Bind::Tcp(address) if address.port() == 0);
    let numbered =
        || (2..=others.len() + 2).map(|number| format!("{}#{number}", new.name)).find(|name| !is_taken(name));
    takes_any.then(numbered).flatten().map(Into::into)
}

/// All addresses of a host name, each a listener.
fn tcp_listeners(text: &str) -> Result<Vec<Listener>, String> {
    if let Ok(address) = text.parse() {
        return Ok(vec![Listener { written: text.into(), ..Listener::tcp(address) }]);
    }
    // Anything else may still be a host name; a missing port or an empty host is not worth a question.
    if text.rsplit_once(':').is_none_or(|(host, port)| host.is_empty() || port.parse::<u16>().is_err()) {
        return Err(ADDRESS.to_owned());
    }
    let mut found: Vec<SocketAddr> = Vec::new();
    for address in text.to_socket_addrs().map_err(|error| format!("{ADDRESS} ({error})"))? {
        if !found.contains(&address) {
            found.push(address);
        }
    }
    if found.is_empty() {
        return Err(ADDRESS.to_owned());
    }
    let optional = found.len() > 1;
    let listener = |address| Listener { written: text.into(), optional, ..Listener::tcp(address) };
    Ok(found.into_iter().map(listener).collect())
}

fn meant_mode(listener: &Section<'_>, mode: &Text<'_>) -> Option<u32> {
    let digits = mode.value.strip_prefix("0o").unwrap_or(mode.value);
    let meant = u32::from_str_radix(digits, 8).ok().filter(|bits| (3..=4).contains(&digits.len()) && *bits <= 0o777);
    if meant.is_none() {
        listener.problem(mode, "must be permissions in octal digits from \"0000\" to \"0777\", such as \"0660\"");
    }
    meant
}

fn meant_group(listener: &Section<'_>, group: &Text<'_>) -> Option<u32> {
    let meant = group.value.parse().ok().or_else(|| {
        let groups = std::fs::read_to_string(GROUP_FILE).ok()?;
        // `name:password:number:members`
        groups.lines().find_map(|line| {
            let mut fields = line.split(':');
            let (name, _password, number) = (fields.next()?, fields.next()?, fields.next()?);
            (name == group.value).then(|| number.parse().ok()).flatten()
        })
    });
    if meant.is_none() {
        let what = format!("no such group in {GROUP_FILE}; a group from elsewhere is given by its number");
        listener.problem(group, &what);
    }
    meant
}

/// Names of the listeners that a plugin's `listeners` mean. Each may be called what the operator wrote in `bind`, or by
/// its address, with or without `mqtt://` or `unix:` in front.
pub(super) fn meant_names(plugin: &mut Section<'_>, listeners: &[Listener], base: &Path) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    for text in plugin.texts("listeners") {
        let meant: Vec<&Listener> = listeners.iter().filter(|listener| is_called(listener, text.value, base)).collect();
        if meant.is_empty() {
            plugin.problem(&text, &unknown(text.value, listeners));
        }
        for listener in meant {
            if !names.iter().any(|name| **name == *listener.name) {
                names.push(listener.name.to_string());
            }
        }
    }
    names
}

fn is_called(listener: &Listener, text: &str, base: &Path) -> bool {
    if *listener.name == *text || *listener.written == *text {
        return true;
    }
    match &listener.bind {
        Bind::Tcp(address) => {
            let bare = bare(text);
            bare == self::bare(&listener.written) || bare.parse::<SocketAddr>().is_ok_and(|other| other == *address)
        }
        Bind::Unix(path) => base.join(text.strip_prefix("unix:").map_or_else(|| Path::new(text), Path::new)) == *path,
    }
}

fn bare(text: &str) -> &str {
    text.strip_prefix("mqtt://").unwrap_or(text)
}

fn unknown(text: &str, listeners: &[Listener]) -> String {
    let mut names: Vec<&str> = listeners.iter().map(|listener| &*listener.written).collect();
    names.dedup();
    let bares: Vec<&str> = names.iter().map(|name| bare(name)).collect();
    let guess = closest(bare(text), &bares).map(|guess| format!("did you mean \"{guess}\"? ")).unwrap_or_default();
    let names: Vec<String> = names.iter().map(|name| format!("\"{name}\"")).collect();
    format!("no listener has this address: {guess}(listeners are {})", names.join(", "))
}
