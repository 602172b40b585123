//! A plugin that does what a plugin must not do: in `init` by its setting `init` or what the file
//! `init_file` says, in `authenticate` by the User Name.

use wasmqtt_sdk::host::{Level, log};
use wasmqtt_sdk::{Auth, Bucket, Challenge, HttpRequest, Outcome, Plugin, Request, Settings, Step};

/// Its settings.
pub struct Misbehave {
    answer: String,
    /// It counts when it is told to end.
    counts_end: bool,
    /// It takes nearly a second for its end.
    ends_slowly: bool,
}

impl Plugin for Misbehave {
    fn new(settings: &Settings) -> Result<Self, String> {
        let file = settings.get("init_file").and_then(|file| std::fs::read_to_string(file).ok());
        match settings.get("init").or(file.as_deref()) {
            Some("trap") => panic!("as told"),
            Some("loop") => spin(),
            Some("memory") => eat(),
            Some("fail") => return Err("as told".into()),
            _ => {}
        }
        let answer = settings.get("answer").unwrap_or("allow").to_owned();
        let end = settings.get("end");
        Ok(Self { answer, counts_end: end == Some("count"), ends_slowly: end == Some("slow") })
    }

    fn shutdown(&self) {
        if self.counts_end {
            let _ = count();
        }
        if self.ends_slowly {
            std::thread::sleep(std::time::Duration::from_millis(950));
        }
    }

    fn health(&self) -> Result<(), String> {
        if self.answer == "sick" { Err("not well".into()) } else { Ok(()) }
    }
}

impl Auth for Misbehave {
    fn authenticate(&self, request: &Request) -> Result<Outcome, String> {
        match request.username.as_deref().unwrap_or_default() {
            "trap" => panic!("as told"),
            "loop" => spin(),
            "work" => work(),
            "memory" => eat(),
            "recurse" => log(Level::Info, &recurse(1).to_string()),
            "big" => return Ok(Outcome::allow("x".repeat(4 << 20))),
            "chatter" => (0..100_000).for_each(|line| log(Level::Info, &format!("line {line}\nand \u{1b}[31mred"))),
            "clock" => (0..200_000).for_each(|_| {
                std::hint::black_box(std::time::Instant::now());
            }),
            "long" => log(Level::Info, &"y".repeat(100_000)),
            "print" => (0..100_000).for_each(|line| println!("line {line}")),
            "sleep" => std::thread::sleep(std::time::Duration::from_mins(1)),
            "connect" => return Ok(answer(std::net::TcpStream::connect("127.0.0.1:1").is_err_and(is_refused_by_host))),
            "environment" => return Ok(answer(std::env::vars().next().is_none() && std::env::args().len() == 0)),
            "success-as-denial" => return Ok(Outcome::Deny(0)),
            "challenge" => {
                let challenge = Challenge { data: b"?".to_vec(), state: vec![1; 70_000] };
                return Ok(Outcome::Challenge(challenge));
            }
            "fail" => return Err("as told".into()),
            "next" => return Ok(Outcome::Next),
            "rewrite" => return Ok(answer((1..=12).contains(&rewrite()?))),
            "fill" => return Ok(answer(fill().is_err())),
            "count" => return Ok(count().map_or(Outcome::Deny(0x87), |count| Outcome::allow(count.to_string()))),
            url if url.starts_with("http:") => {
                let asked = HttpRequest { method: "GET".into(), url: url.into(), ..HttpRequest::default() }.send();
                return Ok(answer(asked.is_ok()));
            }
            address if address.starts_with("dial:") => {
                return Ok(answer(std::net::TcpStream::connect(&address["dial:".len()..]).is_ok()));
            }
            "listen" => return Ok(answer(std::net::TcpListener::bind("127.0.0.1:0").is_err_and(is_refused_by_host))),
            what if what.starts_with("requests:") => {
                return Ok(Outcome::allow(requests(&what["requests:".len()..]).to_string()));
            }
            what if what.starts_with("streams:") => {
                return Ok(Outcome::allow(streams(&what["streams:".len()..]).to_string()));
            }
            most if most.starts_with("sockets:") => {
                return Ok(answer(most["sockets:".len()..] == sockets().to_string()));
            }
            what if what.starts_with("files:") => {
                let (most, path) = what["files:".len()..].split_once(':').unwrap_or_default();
                return Ok(answer(most == files(path).to_string()));
            }
            path if path.starts_with("read:") => return Ok(read(&path["read:".len()..])),
            path if path.starts_with("write:") => {
                return Ok(answer(std::fs::write(&path["write:".len()..], "x").is_ok()));
            }
            _ => {}
        }
        Ok(match self.answer.as_str() {
            "next" => Outcome::Next,
            "deny" => Outcome::Deny(0x87),
            name => Outcome::allow(name),
        })
    }

    fn proceed(&self, _step: &Step) -> Result<Outcome, String> {
        Ok(Outcome::Next)
    }
}

fn answer(yes: bool) -> Outcome {
    if yes { Outcome::allow("yes") } else { Outcome::Deny(0x87) }
}

fn is_refused_by_host(error: std::io::Error) -> bool {
    error.kind() == std::io::ErrorKind::PermissionDenied
}

/// The content as the principal.
fn read(path: &str) -> Outcome {
    std::fs::read_to_string(path).map_or(Outcome::Deny(0x87), Outcome::allow)
}

/// How many sockets it can have at a time. It keeps them.
fn sockets() -> usize {
    use wasip2::sockets::{network::IpAddressFamily, tcp_create_socket, udp_create_socket};
    let mut count = 0;
    for n in 0..1024 {
        if n % 2 == 0 {
            let Ok(socket) = tcp_create_socket::create_tcp_socket(IpAddressFamily::Ipv4) else { continue };
            std::mem::forget(socket);
        } else {
            let Ok(socket) = udp_create_socket::create_udp_socket(IpAddressFamily::Ipv4) else { continue };
            std::mem::forget(socket);
        }
        count += 1;
    }
    count
}

/// How often it can have a file open at a time. It closes all again.
fn files(path: &str) -> usize {
    let opened: Vec<_> = (0..1000).filter_map(|_| std::fs::File::open(path).ok()).collect();
    opened.len()
}

/// How many streams of one file of the first granted folder it can have, the file itself closed.
fn streams(name: &str) -> usize {
    use wasip2::filesystem::types::{DescriptorFlags, OpenFlags, PathFlags};
    let folders = wasip2::filesystem::preopens::get_directories();
    let open = || {
        let (folder, _) = folders.first()?;
        let file = folder.open_at(PathFlags::empty(), name, OpenFlags::empty(), DescriptorFlags::READ).ok()?;
        file.read_via_stream(0).ok()
    };
    (0..100).filter_map(|_| open()).collect::<Vec<_>>().len()
}

/// How many of a dozen requests are refused because of the others, which nobody answers.
fn requests(url: &str) -> usize {
    use wasip2::http::outgoing_handler::handle;
    use wasip2::http::types::{ErrorCode, Fields, FutureIncomingResponse, OutgoingRequest, Scheme};
    let authority = url.trim_start_matches("http://");
    let begin = || {
        let request = OutgoingRequest::new(Fields::new());
        request.set_scheme(Some(&Scheme::Http)).ok()?;
        request.set_authority(Some(authority)).ok()?;
        request.set_path_with_query(Some("/")).ok()?;
        handle(request, None).ok()
    };
    let begun: Vec<_> = (0..12).filter_map(|_| begin()).collect();
    std::thread::sleep(std::time::Duration::from_millis(300));
    let ends: Vec<_> = begun.iter().map(FutureIncomingResponse::subscribe).collect();
    wasip2::io::poll::poll(&ends.iter().collect::<Vec<_>>());
    let is_refused = |ended| matches!(ended, Some(Ok(Err(ErrorCode::ConnectionLimitReached))));
    begun.iter().filter(|answer| is_refused(answer.get())).count()
}

/// How many large values it can keep in a fifth of a second.
fn rewrite() -> Result<usize, String> {
    let bucket = Bucket::open("rewrite")?;
    let (value, begun) = (vec![1; 900_000], std::time::Instant::now());
    let tries = std::iter::repeat_n((), 10_000).take_while(|()| begun.elapsed().as_millis() < 200);
    Ok(tries.filter(|()| bucket.set("value", &value).is_ok()).count())
}

/// Until there is no room.
fn fill() -> Result<(), String> {
    let bucket = Bucket::open("fill")?;
    (0..10_000_u32).try_for_each(|n| bucket.set(&n.to_string(), &vec![0; 1 << 16]))
}

/// How often it was asked, by all instances of all builds.
fn count() -> Result<u64, String> {
    Bucket::open("count")?.increment("asked", 1)
}

fn spin() -> ! {
    let mut count = 0_u64;
    loop {
        count = std::hint::black_box(count.wrapping_add(1));
    }
}

/// A tenth of a second or so.
fn work() {
    (0..100_000_000_u64).for_each(|count| {
        std::hint::black_box(count);
    });
}

fn eat() -> ! {
    let mut eaten = Vec::new();
    loop {
        eaten.push(std::hint::black_box(vec![1_u8; 1 << 20]));
    }
}

#[allow(unconditional_recursion, reason = "that is the point")]
fn recurse(depth: u64) -> u64 {
    let room = std::hint::black_box([depth; 64]);
    recurse(depth + 1) + room[(depth % 64) as usize]
}

wasmqtt_sdk::export_plugin!(Misbehave: auth);
