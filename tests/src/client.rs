use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::num::NonZeroU32;
use std::time::{Duration, Instant};

use wasmqtt_protocol::codec::{
    Ack, Disconnect, Limits, Packet, PacketId, ReasonCode, Subscribe, SubscribeOptions, Unsubscribe, UserProperties,
    Version, frame,
};

use crate::packet::encode;
use crate::{Connack, Got, Message, Options, at_most};

/// How long an answer may take.
const TIMEOUT: Duration = Duration::from_secs(10);
/// How long we listen before we say that nothing came.
const SILENCE: Duration = Duration::from_millis(150);

/// One Network Connection. Does nothing of its own: what is not asked for is neither read nor acknowledged.
#[derive(Debug)]
pub struct Client {
    stream: TcpStream,
    pub version: Version,
    /// The one that let us in.
    pub connack: Connack,
    /// Bytes of the packet that came last.
    pub last_len: usize,
    buffer: Vec<u8>,
    passed_over: VecDeque<Got>,
    last_id: u16,
}

impl Client {
    /// A connection on which nothing was said yet.
    pub fn open(address: SocketAddr, version: Version) -> Self {
        let stream = TcpStream::connect(address).expect("connect");
        stream.set_nodelay(true).expect("no delay");
        Self {
            stream,
            version,
            connack: Connack::default(),
            last_len: 0,
            buffer: Vec::new(),
            passed_over: VecDeque::new(),
            last_id: 0,
        }
    }

    pub fn send_connect(&mut self, options: &Options) {
        self.send_raw(&options.encode());
    }

    /// Sends bytes; that the broker has closed already is no failure, as `recv` will tell.
    pub fn send_raw(&mut self, bytes: &[u8]) {
        let _ = self.stream.write_all(bytes);
    }

    pub fn send(&mut self, packet: &Packet<'_>) {
        self.send_raw(&encode(self.version, packet));
    }

    /// The next packet; fails after five seconds.
    pub fn recv(&mut self) -> Got {
        self.recv_within(TIMEOUT).unwrap_or_else(|| panic!("nothing came in {TIMEOUT:?}"))
    }

    /// The next packet, if it comes in time.
    pub fn recv_within(&mut self, wait: Duration) -> Option<Got> {
        if let Some(got) = self.passed_over.pop_front() {
            return Some(got);
        }
        self.read_packet(wait)
    }

    fn read_packet(&mut self, wait: Duration) -> Option<Got> {
        let until = Instant::now() + wait;
        let mut chunk = [0; 16 * 1024];
        loop {
            if let Some(len) = self.complete() {
                let got = Got::decode(self.version, &self.buffer[..len]);
                self.buffer.drain(..len);
                self.last_len = len;
                return Some(got);
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            self.stream.set_read_timeout(Some(left.max(Duration::from_millis(1)))).expect("read timeout");
            match self.stream.read(&mut chunk) {
                Ok(0) => return Some(self.closed()),
                Ok(count) => self.buffer.extend_from_slice(&chunk[..count]),
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => return None,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => return Some(self.closed()),
            }
        }
    }

    fn closed(&self) -> Got {
        assert!(self.buffer.is_empty(), "the broker closed amid a packet: {:02x?}", self.buffer);
        Got::Closed
    }

    /// Length of the packet at the front, if all of it is there.
    fn complete(&self) -> Option<usize> {
        let limits = Limits { packet_bytes_max: u32::MAX };
        let frame = frame(&self.buffer, &limits).unwrap_or_else(|error| panic!("{error}: {:02x?}", self.buffer))?;
        (frame.total_len <= self.buffer.len()).then_some(frame.total_len)
    }

    /// The next packet `pick` takes; others stay for [`Self::recv`].
    pub fn recv_where<T>(&mut self, mut pick: impl FnMut(&Got) -> Option<T>) -> T {
        if let Some((place, found)) =
            self.passed_over.iter().enumerate().find_map(|(place, got)| pick(got).map(|found| (place, found)))
        {
            self.passed_over.remove(place);
            return found;
        }
        loop {
            let got = self.read_packet(TIMEOUT).unwrap_or_else(|| panic!("nothing came in {TIMEOUT:?}"));
            if let Some(found) = pick(&got) {
                return found;
            }
            assert_ne!(got, Got::Closed, "closed, after {:?}", self.passed_over);
            self.passed_over.push_back(got);
        }
    }

    /// A Packet Identifier that was not used here yet.
    pub fn new_id(&mut self) -> u16 {
        self.last_id += 1;
        self.last_id
    }

    /// Subscribes to one filter; gives its Reason Code.
    pub fn subscribe(&mut self, filter: &str, qos: u8) -> u8 {
        self.subscribe_with(None, &[(filter, at_most(qos))])[0]
    }

    pub fn subscribe_with(&mut self, id: Option<u32>, filters: &[(&str, SubscribeOptions)]) -> Vec<u8> {
        let packet_id = self.send_subscribe(id, filters);
        self.recv_where(|got| match got {
            Got::Suback(id, reasons) if *id == packet_id => Some(reasons.clone()),
            _ => None,
        })
    }

    /// Does not wait for the SUBACK.
    pub fn send_subscribe(&mut self, id: Option<u32>, filters: &[(&str, SubscribeOptions)]) -> u16 {
        let packet_id = self.new_id();
        let subscribe = Subscribe {
            packet_id: PacketId::new(packet_id).expect("identifier"),
            subscription_id: id.and_then(NonZeroU32::new),
            user_properties: UserProperties::default(),
            filters: filters.to_vec(),
        };
        self.send(&Packet::Subscribe(subscribe));
        packet_id
    }

    /// Gives the Reason Codes; none in 3.x.
    pub fn unsubscribe(&mut self, filters: &[&str]) -> Vec<u8> {
        let packet_id = self.new_id();
        let unsubscribe = Unsubscribe {
            packet_id: PacketId::new(packet_id).expect("identifier"),
            user_properties: UserProperties::default(),
            filters: filters.to_vec(),
        };
        self.send(&Packet::Unsubscribe(unsubscribe));
        self.recv_where(|got| match got {
            Got::Unsuback(id, reasons) if *id == packet_id => Some(reasons.clone()),
            _ => None,
        })
    }

    /// Sends PUBLISH and nothing else; gives its Packet Identifier.
    pub fn send_publish(&mut self, message: &Message) -> u16 {
        let mut message = message.clone();
        if message.qos > 0 && message.id == 0 {
            message.id = self.new_id();
        }
        self.send_raw(&message.encode(self.version));
        message.id
    }

    /// Publishes and goes through the whole handshake; gives the Reason Code.
    pub fn publish(&mut self, message: &Message) -> u8 {
        let id = self.send_publish(message);
        match message.qos {
            0 => 0,
            1 => self.recv_where(|got| match got {
                Got::Puback(of, reason) if *of == id => Some(*reason),
                _ => None,
            }),
            _ => {
                let reason = self.recv_where(|got| match got {
                    Got::Pubrec(of, reason) if *of == id => Some(*reason),
                    _ => None,
                });
                if reason < 0x80 {
                    self.ack(Packet::Pubrel, id, 0);
                    self.recv_where(|got| (*got == Got::Pubcomp(id, 0)).then_some(()));
                }
                reason
            }
        }
    }

    /// `kind` is `Packet::Puback` or one of the others.
    pub fn ack(&mut self, kind: fn(Ack<'static>) -> Packet<'static>, id: u16, reason: u8) {
        let packet_id = PacketId::new(id).expect("identifier");
        let ack = Ack {
            packet_id,
            reason: ReasonCode(reason),
            reason_string: None,
            user_properties: UserProperties::default(),
        };
        self.send(&kind(ack));
    }

    /// The next PUBLISH, which is not acknowledged.
    pub fn recv_publish(&mut self) -> Message {
        let got = self.recv();
        let Got::Publish(message) = got else { panic!("{got:?} instead of PUBLISH") };
        message
    }

    /// The next PUBLISH, acknowledged to its end.
    pub fn message(&mut self) -> Message {
        let message = self.recv_where(|got| if let Got::Publish(message) = got { Some(message.clone()) } else { None });
        match message.qos {
            0 => {}
            1 => self.ack(Packet::Puback, message.id, 0),
            _ => {
                self.ack(Packet::Pubrec, message.id, 0);
                self.recv_where(|got| (*got == Got::Pubrel(message.id, 0)).then_some(()));
                self.ack(Packet::Pubcomp, message.id, 0);
            }
        }
        message
    }

    /// The next messages' payloads.
    pub fn texts(&mut self, count: usize) -> Vec<String> {
        (0..count).map(|_| self.message().text().to_owned()).collect()
    }

    /// Alive, and nothing else is coming.
    pub fn check_silent(&mut self) {
        let got = self.recv_within(SILENCE);
        assert_eq!(got, None, "this should not have come");
        self.ping();
    }

    pub fn ping(&mut self) {
        self.send(&Packet::Pingreq);
        self.recv_where(|got| (*got == Got::Pingresp).then_some(()));
    }

    /// The broker ends the connection: 5.0 is told why.
    pub fn check_ended(&mut self, reason: u8) {
        if self.version == Version::V5 {
            let got = self.recv();
            assert!(matches!(got, Got::Disconnect(code, _) if code == reason), "{got:?} instead of 0x{reason:02x}");
        }
        assert_eq!(self.recv(), Got::Closed);
    }

    /// Says goodbye and waits for the broker to close.
    pub fn disconnect(self) {
        self.disconnect_with(0, None);
    }

    /// The same with a Reason Code and a Session Expiry Interval, both 5.0 only.
    pub fn disconnect_with(mut self, reason: u8, session_expiry: Option<u32>) {
        let packet = Disconnect { reason: ReasonCode(reason), session_expiry, ..Disconnect::default() };
        self.send(&Packet::Disconnect(packet));
        while self.recv() != Got::Closed {}
    }

    /// Goes without a word, and waits until the broker has noticed.
    pub fn vanish(mut self) {
        let _ = self.stream.shutdown(Shutdown::Write);
        self.passed_over.clear();
        while self.recv() != Got::Closed {}
    }

    pub fn stream(&self) -> &TcpStream {
        &self.stream
    }
}
