//! Listeners of the real broker: families of addresses, names, sockets' files, dead peers.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::time::{Duration, Instant};

use wasmqtt_tests::{Broker, Client, Got, Message, Options, Version};

const V5: Version = Version::V5;
const OPEN: &str = "[auth]\nanonymous = true\n";

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").and_then(|socket| socket.local_addr()).expect("a free port").port()
}

/// A machine without IPv6 has only half of what is to be shown.
fn has_ipv6() -> bool {
    TcpListener::bind("[::1]:0").is_ok()
}

fn check_served(address: IpAddr, port: u16) {
    let mut client = Client::open(SocketAddr::from((address, port)), V5);
    client.send_connect(&Options::new(V5, "c"));
    assert!(matches!(client.recv(), Got::Connack(connack) if connack.reason == 0), "{address}");
    client.ping();
}

const V4: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const V6: IpAddr = IpAddr::V6(Ipv6Addr::LOCALHOST);

#[test]
fn both_wildcard_addresses_can_be_listened_on_together() {
    if !has_ipv6() {
        return;
    }
    for order in [["0.0.0.0", "[::]"], ["[::]", "0.0.0.0"]] {
        let port = free_port();
        let listener = |address: &str| format!("[[listener]]\nbind = \"{address}:{port}\"\n");
        let _broker = Broker::start(&format!("{OPEN}{}{}", listener(order[0]), listener(order[1])));
        check_served(V4, port);
        check_served(V6, port);
    }
}

#[test]
fn the_ipv6_wildcard_alone_has_both_families() {
    if !has_ipv6() {
        return;
    }
    let port = free_port();
    let _broker = Broker::start(&format!("{OPEN}[[listener]]\nbind = \"[::]:{port}\"\n"));
    check_served(V4, port);
    check_served(V6, port);
}

#[test]
fn localhost_is_all_of_its_addresses() {
    let port = free_port();
    let _broker = Broker::start(&format!("[[listener]]\nbind = \"localhost:{port}\"\n"));
    check_served(V4, port);
    let names_v6 = std::net::ToSocketAddrs::to_socket_addrs(&("localhost", port)).expect("addresses");
    if has_ipv6() && names_v6.into_iter().any(|address| address.is_ipv6()) {
        check_served(V6, port);
    }
}

/// The operator wrote a name, the plugin is asked about clients that came to an address.
#[test]
fn a_plugin_serves_the_listener_that_is_written_as_a_name() {
    let port = free_port();
    let folder = tempfile::tempdir().expect("a temporary folder");
    std::fs::write(folder.path().join("acl"), "deny publish secret/#\nallow all #\n").expect("write");
    let broker = Broker::start_in(
        folder,
        &format!(
            "[[listener]]\nbind = \"localhost:{port}\"\n[[plugin]]\nname = \"acl-rules\"\npath = \"{}\"\n\
             listeners = [\"mqtt://localhost:{port}\"]\nconfig = {{ file = \"/acl\" }}\n\
             grants = {{ files = [{{ host = \"acl\", guest = \"/acl\" }}] }}\n",
            wasmqtt_guests::component("acl-rules").display()
        ),
    );
    let mut client = Client::open(SocketAddr::from((V4, port)), V5);
    client.send_connect(&Options::new(V5, "c"));
    assert!(matches!(client.recv(), Got::Connack(_)));
    assert_eq!(client.publish(&Message::new("secret/a", "x").qos(1)), 0x87);
    assert_eq!(client.publish(&Message::new("open/a", "x").qos(1)), 0x10);
    drop(broker);
}

/// It used to depend on the port, and the system picks that.
#[test]
fn a_listener_on_any_port_keeps_its_own_policy() {
    let config =
        "[limits]\nqueue_messages_max = 3\n[[listener]]\nbind = \"127.0.0.1:0\"\nqueue_full = \"reject-publish\"\n";
    let broker = Broker::start(config);
    let mut keeper = broker.connect(&Options::new(V5, "keeper").session_expiry(3600));
    keeper.subscribe("a", 1);
    keeper.disconnect();
    let mut publisher = broker.connect(&Options::new(V5, "publisher"));
    let reasons: Vec<u8> = (0..4).map(|_| publisher.publish(&Message::new("a", "x").qos(1))).collect();
    assert_eq!(reasons, [0, 0, 0, 0x97]);
}

#[test]
fn a_unix_socket_gets_the_mode_and_group_it_is_to_have() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let group = std::fs::metadata(folder.path()).expect("a folder").gid();
    let broker = Broker::start_in(
        folder,
        &format!(
            "[[listener]]\nbind = \"a.sock\"\nprotocol = \"unix\"\nmode = \"0620\"\ngroup = \"{group}\"\n\
             [[listener]]\nbind = \"b.sock\"\nprotocol = \"unix\"\ngroup = \"{group}\"\n"
        ),
    );
    let file = |name: &str| std::fs::metadata(broker.folder().join(name)).expect("a socket");
    assert_eq!((file("a.sock").permissions().mode() & 0o777, file("a.sock").gid()), (0o620, group));
    assert_eq!(file("b.sock").permissions().mode() & 0o777, 0o660, "a group that may not connect would be no use");
}

/// State of the socket's timer in `/proc/net/tcp` for the broker's side of a connection: 2 is keepalive.
fn timer(server: SocketAddr, client: SocketAddr) -> Option<String> {
    let table = std::fs::read_to_string("/proc/net/tcp").expect("Linux");
    let port = |address: SocketAddr| format!(":{:04X}", address.port());
    let row = table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>()).find(|row| {
        row.len() > 5 && row[1].ends_with(&port(server)) && row[2].ends_with(&port(client)) && row[3] == "01"
    })?;
    Some(row[5].split(':').next()?.to_owned())
}

/// A client of 3.1.1 without Keep Alive whose machine is gone would be there for ever.
#[test]
fn the_system_looks_after_silent_peers_unless_it_is_told_not_to() {
    for (setting, expected) in [("", "02"), ("tcp_keepalive_secs = 0\n", "00")] {
        let broker = Broker::start(&format!("[[listener]]\nbind = \"127.0.0.1:0\"\n{setting}"));
        let mut client = broker.connect(&Options::new(Version::V311, "c").keep_alive(0));
        client.ping();
        let local = client.stream().local_addr().expect("an address");
        let begun = Instant::now();
        // 1: what was written is not acknowledged yet.
        while timer(broker.address(), local).is_none_or(|timer| timer == "01") {
            assert!(begun.elapsed() < Duration::from_secs(30), "not acknowledged");
            std::thread::sleep(Duration::from_millis(20));
        }
        assert_eq!(timer(broker.address(), local).as_deref(), Some(expected), "{setting}");
    }
}
