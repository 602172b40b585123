//! A plugin that takes as much of the broker as it gets: in `init` by its setting `init`, in `authenticate` by the User
//! Name. What it got is the principal.

use wasip2::filesystem::types::{DescriptorFlags, OpenFlags, PathFlags};
use wasip2::http::outgoing_handler;
use wasip2::http::types::{Fields, Method, OutgoingRequest, Scheme};
use wasip2::sockets::{instance_network, ip_name_lookup};
use wasmqtt_sdk::host::{self, Level, Outgoing, Refusal};
use wasmqtt_sdk::{Auth, Bucket, Outcome, Plugin, Request, Settings, Step};

const MIB: usize = 1 << 20;

/// It has nothing of its own.
pub struct Hoard;

impl Plugin for Hoard {
    fn new(settings: &Settings) -> Result<Self, String> {
        if settings.get("init") == Some("long") {
            host::log(Level::Debug, &"x".repeat(6 * MIB));
        }
        Ok(Self)
    }
}

impl Auth for Hoard {
    fn authenticate(&self, request: &Request) -> Result<Outcome, String> {
        let (what, number) = request.username.as_deref().and_then(|name| name.split_once(':')).unwrap_or_default();
        let count: usize = number.parse().unwrap_or_default();
        let got = match what {
            "request" => unsent_request(),
            "resources" => resources(count),
            "listings" => listings(count),
            "publish" => (0..count).filter(|_| is_asked()).count(),
            "http" => return Ok(Outcome::allow(unanswered(number).to_string())),
            "resolve" => addresses(number),
            "names" => names(count),
            "shout" => shout(count),
            _ => 0,
        };
        Ok(Outcome::allow(got.to_string()))
    }

    fn proceed(&self, _step: &Step) -> Result<Outcome, String> {
        Ok(Outcome::Next)
    }
}

/// Bytes that one request holds in the broker though it is never sent, but for its header fields.
fn unsent_request() -> usize {
    let request = OutgoingRequest::new(Fields::new());
    let Ok(body) = request.body() else { return 0 };
    let Ok(stream) = body.write() else { return 0 };
    let mut held = 0;
    while let Ok(room @ 1..) = stream.check_write() {
        let piece = vec![0; usize::try_from(room).unwrap_or_default().min(MIB)];
        held += stream.write(&piece).map_or(0, |()| piece.len());
    }
    let text = "x".repeat(MIB);
    held += request.set_method(&Method::Other(text.clone())).map_or(0, |()| MIB);
    held += request.set_authority(Some(&text)).map_or(0, |()| MIB);
    held + request.set_path_with_query(Some(&format!("/{text}"))).map_or(0, |()| MIB)
}

fn resources(count: usize) -> usize {
    let held: Vec<Fields> = (0..count).map(|_| Fields::new()).collect();
    held.len()
}

/// Listings of the first granted folder that it has at a time.
fn listings(count: usize) -> usize {
    let folders = wasip2::filesystem::preopens::get_directories();
    let Some((folder, _)) = folders.first() else { return 0 };
    let held: Vec<_> = (0..count).filter_map(|_| folder.read_directory().ok()).collect();
    held.len()
}

/// How many requests it has under way for two seconds, which nobody answers.
fn unanswered(authority: &str) -> usize {
    let begin = || {
        let request = OutgoingRequest::new(Fields::new());
        request.set_scheme(Some(&Scheme::Http)).ok()?;
        request.set_authority(Some(authority)).ok()?;
        request.set_path_with_query(Some("/")).ok()?;
        outgoing_handler::handle(request, None).ok()
    };
    let begun: Vec<_> = (0..10).filter_map(|_| begin()).collect();
    std::thread::sleep(std::time::Duration::from_secs(2));
    begun.iter().filter(|answer| !answer.subscribe().ready()).count()
}

/// Of that name.
fn addresses(name: &str) -> usize {
    let network = instance_network::instance_network();
    let Ok(stream) = ip_name_lookup::resolve_addresses(&network, name) else { return 0 };
    stream.subscribe().block();
    std::iter::from_fn(|| stream.resolve_next_address().ok().flatten()).count()
}

/// The broker looks at a message, which it must not publish; it may be too busy for that.
fn is_asked() -> bool {
    host::publish(&Outgoing::new("not/granted", "x")) == Err(Refusal::Denied)
}

/// Long names of what it may not have; whether a bucket's was taken for too long.
fn names(length: usize) -> usize {
    let name = "\u{1}".repeat(length);
    let _ = host::publish(&Outgoing::new(name.as_str(), "x"));
    if let Some((folder, _)) = wasip2::filesystem::preopens::get_directories().first() {
        let path = format!("/{}", &name[..length.min(2000)]);
        let _ = folder.open_at(PathFlags::empty(), &path, OpenFlags::empty(), DescriptorFlags::READ);
    }
    usize::from(Bucket::open(&name).is_err_and(|error| error.contains("more than 1024 bytes")))
}

/// Lines, and then a trap.
fn shout(count: usize) -> ! {
    (0..count).for_each(|line| host::info(&format!("shout {line}")));
    panic!("as told")
}

wasmqtt_sdk::export_plugin!(Hoard: auth);
