//! Whether a client is read, and why not.
//!
//! Everything that keeps a connection from being read closes its gate with a reason of its own, and opens it again when
//! that reason is gone; it is read while no reason is left. So nobody has to know the reasons of others, and the Keep
//! Alive knows when a silence is the client's own: while the gate is closed the client may well have sent something.

/// Why a client is not read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub(super) enum Reason {
    /// CONNECT or AUTH is being answered.
    Opening = 1,
    /// The connection moves to another shard, or waits for an older one of its Session to be read to its end.
    Leaving = 1 << 1,
    /// Plugins are asked whether a packet is allowed; what follows waits behind it.
    Asking = 1 << 2,
    /// Storage hooks see messages of this client.
    Hook = 1 << 3,
    /// The store has not committed what this client waits for.
    Commit = 1 << 4,
    /// The client does not take its answers.
    Outbox = 1 << 5,
    /// Another shard does not keep up with what this one sends.
    Congested = 1 << 6,
    /// The store does not keep up with what this client has stored.
    Store = 1 << 7,
    /// The broker's memory is nearly used up, and this client publishes.
    Memory = 1 << 8,
}

/// Reasons that leave even the packets alone that were read already: the first of them waits for an answer.
const STOPS: u16 = Reason::Opening as u16 | Reason::Leaving as u16 | Reason::Asking as u16;
/// Reasons that do not count for a connection that is read to its end, because another one takes its Session over.
const FOR_LATER: u16 = Reason::Commit as u16
    | Reason::Outbox as u16
    | Reason::Congested as u16
    | Reason::Store as u16
    | Reason::Memory as u16
    | Reason::Hook as u16;

/// The reasons not to read one connection, and since when the client is silent.
#[derive(Debug)]
pub(super) struct Gate {
    /// Set of [`Reason`].
    reasons: u16,
    /// When the last packet came, on the broker's clock; later by as long as the gate was closed since then, but for
    /// what the client itself is the reason of.
    heard_ms: u64,
    /// Since when it is closed like that; `u64::MAX`: it is not.
    paused_ms: u64,
    /// Bytes of the client that the kernel had when the Keep Alive last looked, while its answers piled up.
    unread: u32,
}

impl Gate {
    /// Open.
    pub(super) fn new(now_ms: u64) -> Self {
        Self { reasons: 0, heard_ms: now_ms, paused_ms: u64::MAX, unread: 0 }
    }

    pub(super) fn close(&mut self, reason: Reason, now_ms: u64) {
        if reason == Reason::Outbox && !self.is_closed_for(reason) {
            self.unread = 0;
        }
        self.reasons |= reason as u16;
        if reason != Reason::Outbox && self.paused_ms == u64::MAX {
            self.paused_ms = now_ms;
        }
    }

    /// One reason is gone; `true`: it was there and was the last one, so that the client is to be read again. The Keep
    /// Alive goes on from where it stood.
    pub(super) fn open(&mut self, reason: Reason, now_ms: u64) -> bool {
        let left = self.reasons & !(reason as u16);
        let before = std::mem::replace(&mut self.reasons, left);
        self.end_pause(now_ms);
        before != 0 && left == 0
    }

    /// The connection goes to another shard: what kept this one from reading it stays here.
    pub(super) fn leave_shard(&mut self, now_ms: u64) {
        self.reasons &= STOPS;
        self.end_pause(now_ms);
    }

    fn end_pause(&mut self, now_ms: u64) {
        if self.reasons & !(Reason::Outbox as u16) == 0 && self.paused_ms != u64::MAX {
            self.heard_ms += now_ms.saturating_sub(self.paused_ms);
            self.paused_ms = u64::MAX;
        }
    }

    /// The client is read.
    #[inline]
    pub(super) fn is_open(&self) -> bool {
        self.reasons == 0
    }

    pub(super) fn is_closed_for(&self, reason: Reason) -> bool {
        self.reasons & reason as u16 != 0
    }

    /// Packets that were read already are handled.
    #[inline]
    pub(super) fn passes_packets(&self) -> bool {
        self.reasons & STOPS == 0
    }

    /// The client would be read, if another connection took its Session over: only its own answer to a packet before
    /// keeps it waiting then.
    pub(super) fn is_open_for_the_last_time(&self) -> bool {
        self.reasons & !FOR_LATER == 0
    }

    /// A packet came.
    #[inline]
    pub(super) fn heard(&mut self, now_ms: u64) {
        self.heard_ms = now_ms;
        if self.paused_ms != u64::MAX {
            self.paused_ms = now_ms;
        }
    }

    /// When the client became silent, as far as that is its own doing; `None`: it may have sent something that was not
    /// read. `unread` says how many bytes the kernel has of it, and is asked only if its answers pile up: as long as
    /// these become more, or are many, somebody is there.
    pub(super) fn silent_since_ms(&mut self, unread: impl FnOnce() -> u32) -> Option<u64> {
        if self.reasons == 0 {
            return Some(self.heard_ms);
        }
        if self.reasons != Reason::Outbox as u16 {
            return None;
        }
        let unread = unread();
        let before = std::mem::replace(&mut self.unread, unread);
        (unread <= before && unread < UNREAD_ENOUGH).then_some(self.heard_ms)
    }
}

/// So many bytes in the kernel may be all that it takes: that they do not become more says nothing.
const UNREAD_ENOUGH: u32 = 32 * 1024;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_gate_opens_with_its_last_reason() {
        let mut gate = Gate::new(0);
        assert!(gate.is_open());
        gate.close(Reason::Hook, 0);
        gate.close(Reason::Commit, 0);
        gate.close(Reason::Hook, 0);
        assert!(!gate.open(Reason::Hook, 10), "the store has not committed");
        assert!(!gate.is_open() && gate.passes_packets());
        assert!(gate.open(Reason::Commit, 20));
        assert!(!gate.open(Reason::Commit, 30), "it was open");
        assert!(gate.is_open());
    }

    #[test]
    fn packets_wait_for_the_answer_to_the_one_before() {
        for reason in [Reason::Opening, Reason::Leaving, Reason::Asking] {
            let mut gate = Gate::new(0);
            gate.close(reason, 0);
            assert!(!gate.passes_packets() && !gate.is_open_for_the_last_time(), "{reason:?}");
        }
        for reason in [Reason::Hook, Reason::Commit, Reason::Outbox, Reason::Congested, Reason::Store] {
            let mut gate = Gate::new(0);
            gate.close(reason, 0);
            assert!(gate.passes_packets() && gate.is_open_for_the_last_time(), "{reason:?}");
        }
    }

    /// [MQTT-3.1.2-22]
    #[test]
    fn a_silence_of_our_own_making_does_not_count() {
        let mut gate = Gate::new(0);
        gate.heard(1000);
        assert_eq!(gate.silent_since_ms(|| 0), Some(1000));
        gate.close(Reason::Hook, 3000);
        gate.close(Reason::Commit, 4000);
        assert_eq!(gate.silent_since_ms(|| 0), None);
        gate.open(Reason::Hook, 5000);
        gate.open(Reason::Commit, 6000);
        assert_eq!(gate.silent_since_ms(|| 0), Some(4000), "two of five seconds were its own");
        gate.close(Reason::Hook, 7000);
        gate.heard(8000);
        gate.open(Reason::Hook, 9000);
        assert_eq!(gate.silent_since_ms(|| 0), Some(9000));
    }

    /// A client that takes nothing and sends nothing is gone; one that takes nothing and sends is not.
    #[test]
    fn a_client_that_takes_no_answers_is_known_by_what_it_sends() {
        let mut gate = Gate::new(0);
        gate.close(Reason::Outbox, 0);
        assert_eq!(gate.silent_since_ms(|| 2), None);
        assert_eq!(gate.silent_since_ms(|| 4), None);
        assert_eq!(gate.silent_since_ms(|| 4), Some(0), "nothing came since");
        assert_eq!(gate.silent_since_ms(|| UNREAD_ENOUGH), None, "nothing more may fit");
        assert_eq!(gate.silent_since_ms(|| UNREAD_ENOUGH), None);
        gate.open(Reason::Outbox, 5000);
        assert_eq!(gate.silent_since_ms(|| 0), Some(0), "what it sent meanwhile is read first");
    }
}
