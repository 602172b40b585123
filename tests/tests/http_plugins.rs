//! Plugins that ask web services, with a small one in the test.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
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

/// Answers each connection with what `answer` makes of it, one after the other, and counts them.
fn serve(answer: impl Fn(&mut TcpStream) + Send + 'static) -> (SocketAddr, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = listener.local_addr().expect("an address");
    let count = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&count);
    // Ends with the test's process.
    thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            let _ = stream.set_read_timeout(Some(Duration::from_secs(10)));
            counted.fetch_add(1, Ordering::SeqCst);
            answer(&mut stream);
        }
    });
    (address, count)
}

/// Reads to the end of the header, byte by byte, and nothing after it.
fn read_head(stream: &mut TcpStream) -> String {
    let (mut head, mut byte) = (Vec::new(), [0]);
    while !head.ends_with(b"\r\n\r\n") && stream.read_exact(&mut byte).is_ok() {
        head.push(byte[0]);
    }
    String::from_utf8_lossy(&head).to_ascii_lowercase()
}

fn respond(stream: &mut TcpStream, status: u16) {
    let head = format!("HTTP/1.1 {status} X\r\nconnection: close\r\ncontent-length: 0\r\n\r\n");
    let _ = stream.write_all(head.as_bytes());
}

fn content_length(head: &str) -> Option<usize> {
    head.lines().find_map(|line| line.strip_prefix("content-length:")?.trim().parse().ok())
}

/// WSGI, CGI and many a small handler read as many bytes as Content-Length says, and nothing without it.
#[test]
fn a_service_that_reads_content_length_bytes_gets_the_whole_request() {
    let (address, _) = serve(|stream| {
        let head = read_head(stream);
        let mut body = vec![0; content_length(&head).unwrap_or(0)];
        let _ = stream.read_exact(&mut body);
        let is_right = !head.contains("chunked") && body.windows(5).any(|window| window == b"\"ann\"");
        respond(stream, if is_right { 204 } else { 400 });
    });
    let url = format!("http://{address}");
    let broker = Broker::start(&config("auth-http", &format!("url = \"{url}/auth\""), &format!("http = [\"{url}\"]")));
    broker.connect(&login("ann")).disconnect();
}

/// It has decided by the header, and does not read what comes after it.
#[test]
fn a_service_that_answers_and_closes_before_it_has_read_the_body_is_heard() {
    let (address, count) = serve(|stream| {
        read_head(stream);
        respond(stream, 204);
    });
    let url = format!("http://{address}");
    let broker = Broker::start(&config("auth-http", &format!("url = \"{url}/auth\""), &format!("http = [\"{url}\"]")));
    for _ in 0..20 {
        broker.connect(&login("ann")).disconnect();
    }
    assert_eq!(count.load(Ordering::SeqCst), 20);
}

/// An answer counts though the request was not written to its end, and would not be: nobody reads it.
#[test]
fn an_answer_in_the_middle_of_a_request_is_taken() {
    let (address, count) = serve(|stream| {
        read_head(stream);
        respond(stream, 200);
        // Not a byte of the body: what fits into no buffer is not written as long as this waits.
        thread::sleep(Duration::from_millis(500));
    });
    let url = format!("http://{address}");
    let settings = format!("url = \"{url}/in\", filters = \"a/#\", request_bytes_max = 67108864");
    let more = "limits = { memory_mib = 64 }";
    let broker = Broker::start(&(config("topic-tap", &settings, &format!("http = [\"{url}\"]")) + more));
    let mut client = broker.connect(&Options::new(V5, "c"));
    for _ in 0..3 {
        client.publish(&Message::new("a/x", vec![b'x'; 900_000]).qos(1));
    }
    let begun = Instant::now();
    while count.load(Ordering::SeqCst) < 3 {
        assert!(begun.elapsed() < Duration::from_secs(30), "{}", broker.log());
        thread::sleep(Duration::from_millis(20));
    }
    assert!(!broker.log().contains("did not take messages"), "{}", broker.log());
}

/// Zero bytes are UTF-8, and JSON would write six bytes for each: more than the plugin has. What comes after it is
/// collected, too.
#[test]
fn a_payload_of_control_characters_is_collected() {
    let service = Service::start(|_, _| (200, String::new()));
    let url = format!("http://{}", service.address);
    let settings = format!("url = \"{url}/in\", filters = \"dev/#\"");
    let broker = Broker::start(&config("topic-tap", &settings, &format!("http = [\"{url}\"]")));
    let mut client = broker.connect(&Options::new(V5, "c"));
    client.publish(&Message::new("dev/x", vec![0; 1_000_000]).qos(1));
    client.publish(&Message::new("dev/y", "after it").qos(1));
    await_text(&service, &broker, "after it");
    assert!(service.bodies().concat().contains("\"payload_base64\":\"AAAA"), "{}", broker.log());
    assert!(!broker.log().contains("did not take messages"), "{}", broker.log());
}

/// nginx takes 1 MiB unless it is told otherwise.
#[test]
fn a_service_that_takes_no_more_than_a_mebibyte_gets_all_messages() {
    let service = Service::start(|body, _| (if body.len() > 1 << 20 { 413 } else { 200 }, String::new()));
    let url = format!("http://{}", service.address);
    let settings = format!("url = \"{url}/in\", filters = \"cam/#\"");
    let broker = Broker::start(&config("topic-tap", &settings, &format!("http = [\"{url}\"]")));
    let mut client = broker.connect(&Options::new(V5, "c"));
    for n in 0..8 {
        client.publish(&Message::new(&format!("cam/{n}"), vec![0xFF; 300_000]).qos(1));
    }
    client.publish(&Message::new("cam/end", "the last").qos(1));
    await_text(&service, &broker, "the last");
    for n in 0..8 {
        let topic = format!("\"topic\":\"cam/{n}\"");
        assert!(service.bodies().iter().any(|body| body.contains(&topic)), "{topic}: {}", broker.log());
    }
}

fn await_text(service: &Service, broker: &Broker, text: &str) {
    let begun = Instant::now();
    while !service.bodies().iter().any(|body| body.contains(text)) {
        assert!(begun.elapsed() < Duration::from_secs(30), "{}", broker.log());
        thread::sleep(Duration::from_millis(20));
    }
}
