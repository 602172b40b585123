//! Plugins that ask web services, with a small one in the test.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use wasmqtt_tests::{Broker, Connack, Got, Message, Options, Version};

const V5: Version = Version::V5;
/// Of ann until 2100; signed with `s3cret`, key `a`.
const TOKEN: &str = "eyJhbGciOiJIUzI1NiIsImtpZCI6ImEifQ.eyJzdWIiOiJhbm4iLCJleHAiOjQxMDI0NDQ4MDAsImFjbCI6eyJwdWIiOlsidXAvIyJdLCJzdWIiOlsiZG93bi8jIl19fQ.w8DXLmJFhzl5KN56pvv8IcR7i4dRBT1fRGrWvYqjY2Q";

/// Answers each request with the status that `decide` gives for its body, and notes the bodies.
struct Service {
    address: SocketAddr,
    bodies: Arc<Mutex<Vec<String>>>,
}

impl Service {
    fn start(decide: impl Fn(&str, usize) -> (u16, String) + Send + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("an address");
        let bodies = Arc::new(Mutex::new(Vec::new()));
        let noted = Arc::clone(&bodies);
        // Ends with the test's process.
        thread::spawn(move || {
            for stream in listener.incoming() {
                let Ok(mut stream) = stream else { return };
                let Some(body) = read_body(&stream) else { continue };
                let count = noted.lock().expect("not poisoned").len();
                let (status, answer) = decide(&body, count);
                noted.lock().expect("not poisoned").push(body);
                let head =
                    format!("HTTP/1.1 {status} X\r\nconnection: close\r\ncontent-length: {}\r\n\r\n", answer.len());
                let _ = stream.write_all((head + &answer).as_bytes());
            }
        });
        Self { address, bodies }
    }

    fn bodies(&self) -> Vec<String> {
        self.bodies.lock().expect("not poisoned").clone()
    }
}

fn read_body(stream: &std::net::TcpStream) -> Option<String> {
    stream.set_read_timeout(Some(Duration::from_secs(10))).ok()?;
    let mut reader = BufReader::new(stream);
    let mut length = None;
    let mut is_chunked = false;
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        let line = line.trim().to_ascii_lowercase();
        if line.is_empty() {
            break;
        }
        if let Some(value) = line.strip_prefix("content-length:") {
            length = value.trim().parse().ok();
        }
        is_chunked |= line.contains("chunked");
    }
    let mut body = Vec::new();
    if let Some(length) = length {
        body.resize(length, 0);
        reader.read_exact(&mut body).ok()?;
    }
    let mut is_open = is_chunked;
    while is_open {
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        let size = usize::from_str_radix(line.trim(), 16).ok()?;
        let mut chunk = vec![0; size + 2];
        reader.read_exact(&mut chunk).ok()?;
        body.extend_from_slice(&chunk[..size]);
        is_open = size > 0;
    }
    String::from_utf8(body).ok()
}

fn config(plugin: &str, settings: &str, grant: &str) -> String {
    let file = wasmqtt_guests::component(plugin);
    format!(
        "[[plugin]]\nname = \"{plugin}\"\npath = \"{}\"\nconfig = {{ {settings} }}\ngrants = {{ {grant} }}\n",
        file.display()
    )
}

fn login(username: &str) -> Options {
    Options { username: Some(username.into()), password: Some(b"secret".into()), ..Options::new(V5, "c") }
}

/// What the service says becomes the answer, its rules too; while it is away clients are told to come later.
#[test]
fn a_web_service_decides_who_may_connect() {
    let service = Service::start(|body, _| match body {
        body if body.contains("\"ann\"") => {
            (200, r#"{"result":"allow","complete":true,"rules":[{"filter":"a/#"}]}"#.into())
        }
        body if body.contains("\"broken\"") => (500, String::new()),
        _ => (401, String::new()),
    });
    let url = format!("http://{}", service.address);
    let broker = Broker::start(&config("auth-http", &format!("url = \"{url}/auth\""), &format!("http = [\"{url}\"]")));
    let mut ann = broker.connect(&login("ann"));
    assert_eq!((ann.subscribe("a/b", 0), ann.subscribe("b", 0)), (0, 0x87));
    broker.check_refused(&login("bob"), 0x86);
    broker.check_refused(&login("broken"), 0x88);
    broker.await_log("status 500", 1);
    assert!(service.bodies()[0].contains("\"password\":\"secret\""), "{:?}", service.bodies());
}

/// Keys come from their provider when the first token needs them; until then nobody can tell.
#[test]
fn keys_of_tokens_are_fetched() {
    let provider = Service::start(|_, count| match count {
        0 => (503, String::new()),
        _ => (200, r#"{"keys":[{"kty":"oct","kid":"a","alg":"HS256","k":"czNjcmV0"}]}"#.into()),
    });
    let url = format!("http://{}", provider.address);
    let broker =
        Broker::start(&config("auth-jwt", &format!("jwks_url = \"{url}/keys\""), &format!("http = [\"{url}\"]")));
    let ann = Options { password: Some(TOKEN.into()), ..login("ann") };
    broker.check_refused(&ann, 0x88);
    broker.await_log("status 503", 1);
    // Another instance has not tried yet, this one will again after a while.
    let begun = Instant::now();
    while !matches!(broker.try_connect(&ann).1, Got::Connack(Connack { reason: 0, .. })) {
        assert!(begun.elapsed() < Duration::from_secs(30), "{}", broker.log());
        thread::sleep(Duration::from_millis(500));
    }
    broker.check_refused(&login("ann"), 0x86);
}

/// Without the grant, or with one for another server, nothing is asked.
#[test]
fn what_is_not_granted_is_not_reached() {
    let service = Service::start(|_, _| (204, String::new()));
    let url = format!("http://{}", service.address);
    let elsewhere = "http = [\"http://127.0.0.1:9\"]";
    // The name leads to this machine, which its grant does not allow.
    let by_name = format!("http://localhost:{}", service.address.port());
    for (asked, grant) in [(&url, ""), (&url, elsewhere), (&by_name, &*format!("http = [\"{by_name}\"]"))] {
        let broker = Broker::start(&config("auth-http", &format!("url = \"{asked}/auth\""), grant));
        broker.check_refused(&login("ann"), 0x88);
        broker.await_log("plugin call failed", 1);
    }
    assert!(service.bodies().is_empty(), "{:?}", service.bodies());
    let private = format!("http = [\"{by_name}@private\"]");
    let broker = Broker::start(&config("auth-http", &format!("url = \"{by_name}/auth\""), &private));
    broker.connect(&login("ann")).disconnect();
}

/// At least once, in order, also when the service refuses for a while.
#[test]
fn messages_are_collected() {
    let service = Service::start(|_, count| (if count < 2 { 503 } else { 200 }, String::new()));
    let url = format!("http://{}", service.address);
    let settings = format!("url = \"{url}/in\", filters = \"a/#\"");
    let broker = Broker::start(&config("topic-tap", &settings, &format!("http = [\"{url}\"]")));
    let mut client = broker.connect(&Options::new(V5, "c"));
    for n in 0..20 {
        client.publish(&Message::new(&format!("a/{n}"), n.to_string()).qos(1));
        client.publish(&Message::new("b", "not wanted"));
    }
    let begun = Instant::now();
    let taken = || service.bodies().into_iter().skip(2).collect::<String>();
    while taken().lines().count() < 20 {
        assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", service.bodies());
        thread::sleep(Duration::from_millis(20));
    }
    let topics: Vec<String> = (0..20).map(|n| format!("\"topic\":\"a/{n}\"")).collect();
    for (line, topic) in taken().lines().zip(&topics) {
        assert!(line.contains(topic) && line.contains("\"client\":\"c\""), "{topic} is not in {line}");
    }
    broker.await_log("plugin did not take messages, will try again", 1);
}
