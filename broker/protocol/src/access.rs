//! What a client may do, as far as that is known without asking a plugin: its rules and its leases.
//!
//! Uses `topic` and `codec`; pure data, time is an argument.

use std::fmt;
use std::sync::Arc;

use hashbrown::HashMap;

use crate::codec::ReasonCode;
use crate::topic::{Filter, filter_covers, filter_matches, filters_overlap};

/// Leases one client holds; the one that ends first makes room.
const LEASES_MAX: usize = 64;
/// Bytes of the filters that one client's leases hold for; a longer one holds for one packet only.
const LEASE_BYTES_MAX: usize = 16 * 1024;
/// Decisions about single topics kept for one client; when full they are forgotten together.
const MEMO_MAX: usize = 1024;

/// What a client wants to do with a topic.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Action {
    /// PUBLISH to a Topic Name.
    Publish,
    /// SUBSCRIBE to a Topic Filter; for a Shared Subscription the filter behind the `ShareName`.
    Subscribe,
}

/// A permission or a prohibition that an authenticator gave at CONNECT. The first rule that applies decides.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    /// `None`: both.
    pub action: Option<Action>,
    /// Topics it is about.
    pub filter: Filter,
    /// Permission or prohibition.
    pub allow: bool,
}

/// The answer to "may it?".
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It may.
    Allow,
    /// It may not, with the Reason Code for the client.
    Deny(ReasonCode),
}

/// `allow`, or `deny 0x87 Not authorized`.
impl fmt::Display for Verdict {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Allow => to.write_str("allow"),
            Self::Deny(reason) => write!(to, "deny 0x{:02X} {}", reason.0, reason.name()),
        }
    }
}

/// How long, and for what, a decision holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lease {
    /// Topics it holds for; `None`: only the one that was asked about.
    pub scope: Option<Filter>,
    /// Seconds; 0: this once.
    pub seconds: u32,
}

/// What the `acl` plugins said to one request.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Decision {
    /// `None`: no plugin had an opinion.
    pub verdict: Option<Verdict>,
    /// `None`: only this once.
    pub lease: Option<Lease>,
    /// A plugin could not answer; `verdict` is what its configuration says for this case.
    pub failed: bool,
}

#[derive(Debug)]
struct Held {
    action: Action,
    scope: Box<str>,
    verdict: Verdict,
    until_ms: u64,
}

/// A verdict that waits for the packet it was asked for to be handled.
#[derive(Debug)]
struct Once {
    action: Action,
    topic: Arc<str>,
    verdict: Verdict,
    /// The end of its lease; when it was asked, if it has none.
    until_ms: u64,
}

/// One client's permissions. A pointer as long as nothing is known: most clients that are away have nothing else.
#[derive(Debug, Default)]
pub struct Permits(Option<Box<Known>>);

impl Permits {
    /// What CONNECT brought. Without rules and not `complete`, everything is asked.
    pub fn new(rules: Vec<Rule>, complete: bool) -> Self {
        if rules.is_empty() && !complete {
            return Self::default();
        }
        Self(Some(Box::new(Known { rules, complete, ..Known::default() })))
    }

    /// Has something to say by itself.
    pub fn has_rules(&self) -> bool {
        self.0.as_ref().is_some_and(|known| known.has_rules())
    }

    /// May it publish to `topic`, and until when is that so, in milliseconds? `None`: nobody knows yet. `route` stands
    /// for the topic, and is never used for another.
    pub fn publish(&mut self, now_ms: u64, route: Option<u64>, topic: &str) -> Option<(Verdict, u64)> {
        self.0.as_mut()?.publish(now_ms, route, topic)
    }

    /// May it subscribe to `filter` (without `$share/…/`)? Also: until when, in milliseconds; `None`: nobody knows yet.
    pub fn subscribe(&mut self, now_ms: u64, filter: &str) -> Option<(Verdict, u64)> {
        self.0.as_mut()?.subscribe(now_ms, filter)
    }

    /// Keeps what the plugins said.
    pub fn learn(&mut self, now_ms: u64, action: Action, topic: Arc<str>, decision: Decision) {
        self.0.get_or_insert_default().learn(now_ms, action, topic, decision);
    }

    /// The packet was handled: what was said for it alone is forgotten.
    pub fn packet_done(&mut self) {
        if let Some(known) = &mut self.0 {
            known.once.clear();
        }
    }

    /// Forgets all leases. Rules stay.
    pub fn revoke(&mut self) {
        match &mut self.0 {
            Some(known) if known.has_rules() => known.revoke(),
            _ => self.0 = None,
        }
    }

    /// What decides without asking, in words, and what it says; `None`: nothing does.
    pub fn explain(&self, now_ms: u64, action: Action, topic: &str) -> Option<(String, Verdict)> {
        self.0.as_ref()?.explain(now_ms, action, topic)
    }
}

/// What is known about one client.
#[derive(Debug, Default)]
struct Known {
    rules: Vec<Rule>,
    /// What no rule is about is denied, not asked.
    complete: bool,
    held: Vec<Held>,
    once: Vec<Once>,
    /// Route → verdict about publishing, and until when.
    memo: HashMap<u64, (Verdict, u64), foldhash::fast::RandomState>,
}

impl Known {
    fn has_rules(&self) -> bool {
        self.complete || !self.rules.is_empty()
    }

    fn publish(&mut self, now_ms: u64, route: Option<u64>, topic: &str) -> Option<(Verdict, u64)> {
        let Some(route) = route else { return self.find(now_ms, Action::Publish, topic) };
        if let Some(known) = self.memo.get(&route).copied().filter(|(_, until_ms)| now_ms < *until_ms) {
            return Some(known);
        }
        let found = self.find(now_ms, Action::Publish, topic)?;
        if found.1 > now_ms {
            if self.memo.len() >= MEMO_MAX {
                self.memo.clear();
            }
            self.memo.insert(route, found);
        }
        Some(found)
    }

    fn subscribe(&mut self, now_ms: u64, filter: &str) -> Option<(Verdict, u64)> {
        self.find(now_ms, Action::Subscribe, filter)
    }

    fn learn(&mut self, now_ms: u64, action: Action, topic: Arc<str>, decision: Decision) {
        // Nothing granted means denied.
        let verdict = decision.verdict.unwrap_or(Verdict::Deny(ReasonCode::NOT_AUTHORIZED));
        let mut until_ms = now_ms;
        if let Some(lease) = decision.lease.filter(|lease| lease.seconds > 0) {
            let scope = lease.scope.map_or_else(|| Box::from(&*topic), |scope| scope.topic_filter().into());
            let ends_ms = now_ms + u64::from(lease.seconds) * 1000;
            if applies(action, &scope, verdict, &topic) && scope.len() <= LEASE_BYTES_MAX {
                until_ms = ends_ms;
            }
            self.hold(Held { action, scope, verdict, until_ms: ends_ms });
        }
        // A lease for something else than was asked, or one that makes room for others of the same packet, must not
        // leave the question open.
        self.once.push(Once { action, topic, verdict, until_ms });
    }

    fn hold(&mut self, new: Held) {
        if new.scope.len() > LEASE_BYTES_MAX {
            return;
        }
        self.held.retain(|held| held.action != new.action || held.scope != new.scope);
        let bytes = |held: &[Held]| held.iter().map(|held| held.scope.len()).sum::<usize>();
        while (self.held.len() >= LEASES_MAX || bytes(&self.held) + new.scope.len() > LEASE_BYTES_MAX)
            && let Some((first, _)) = self.held.iter().enumerate().min_by_key(|(_, held)| held.until_ms)
        {
            self.held.swap_remove(first);
        }
        self.held.push(new);
    }

    fn revoke(&mut self) {
        self.held.clear();
        self.once.clear();
        self.memo.clear();
    }

    fn explain(&self, now_ms: u64, action: Action, topic: &str) -> Option<(String, Verdict)> {
        let applies_to = |rule: &&Rule| {
            rule.action.is_none_or(|of| of == action)
                && applies(action, rule.filter.topic_filter(), verdict_of(rule), topic)
        };
        if let Some(rule) = self.rules.iter().find(applies_to) {
            return Some((format!("the rule for {} that authentication gave", rule.filter), verdict_of(rule)));
        }
        let (verdict, until_ms) = self.find(now_ms, action, topic)?;
        if self.complete {
            return Some(("no rule that authentication gave, and these are complete".into(), verdict));
        }
        let seconds = until_ms.saturating_sub(now_ms) / 1000;
        Some((format!("a lease that holds for {seconds} s more"), verdict))
    }

    /// The verdict and until when it holds; `u64::MAX`: as long as the connection.
    fn find(&self, now_ms: u64, action: Action, topic: &str) -> Option<(Verdict, u64)> {
        let rule = self.rules.iter().find(|rule| {
            let verdict = verdict_of(rule);
            rule.action.is_none_or(|of| of == action) && applies(action, rule.filter.topic_filter(), verdict, topic)
        });
        if let Some(rule) = rule {
            return Some((verdict_of(rule), u64::MAX));
        }
        if self.complete {
            return Some((Verdict::Deny(ReasonCode::NOT_AUTHORIZED), u64::MAX));
        }
        if let Some(once) = self.once.iter().find(|once| once.action == action && *once.topic == *topic) {
            return Some((once.verdict, once.until_ms));
        }
        let alive = self.held.iter().filter(|held| held.action == action && now_ms < held.until_ms);
        // A prohibition is stronger than a permission that is about the same topic.
        let mut found = None;
        for held in alive.filter(|held| applies(action, &held.scope, held.verdict, topic)) {
            if held.verdict != Verdict::Allow {
                return Some((held.verdict, held.until_ms));
            }
            found = found.max(Some(held.until_ms));
        }
        found.map(|until_ms| (Verdict::Allow, until_ms))
    }
}

fn verdict_of(rule: &Rule) -> Verdict {
    if rule.allow { Verdict::Allow } else { Verdict::Deny(ReasonCode::NOT_AUTHORIZED) }
}

/// A permission to subscribe must reach as far as the wanted filter; a prohibition counts as soon as they overlap.
fn applies(action: Action, scope: &str, verdict: Verdict, topic: &str) -> bool {
    match (action, verdict) {
        (Action::Publish, _) => filter_matches(scope, topic),
        (Action::Subscribe, Verdict::Allow) => filter_covers(scope, topic),
        (Action::Subscribe, Verdict::Deny(_)) => filters_overlap(scope, topic),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NO: Verdict = Verdict::Deny(ReasonCode::NOT_AUTHORIZED);

    fn rule(action: Option<Action>, filter: &str, allow: bool) -> Rule {
        Rule { action, filter: Filter::parse(filter).unwrap(), allow }
    }

    fn decision(verdict: Verdict, scope: Option<&str>, seconds: u32) -> Decision {
        let scope = scope.map(|scope| Filter::parse(scope).unwrap());
        Decision { verdict: Some(verdict), lease: Some(Lease { scope, seconds }), failed: false }
    }

    fn publish(permits: &mut Permits, now_ms: u64, route: u64, topic: &str) -> Option<Verdict> {
        permits.publish(now_ms, Some(route), topic).map(|(verdict, _)| verdict)
    }

    #[test]
    fn the_first_rule_that_applies_decides() {
        let rules =
            vec![rule(None, "secret/#", false), rule(Some(Action::Publish), "up/+", true), rule(None, "#", true)];
        let mut permits = Permits::new(rules, true);
        assert_eq!(publish(&mut permits, 0, 1, "secret/x"), Some(NO));
        assert_eq!(publish(&mut permits, 0, 2, "up/x"), Some(Verdict::Allow));
        assert_eq!(permits.subscribe(0, "up/x"), Some((Verdict::Allow, u64::MAX)));
        assert_eq!(permits.subscribe(0, "#").unwrap().0, NO, "would let secrets through");
        assert_eq!(permits.subscribe(0, "up/#").unwrap().0, Verdict::Allow);
    }

    #[test]
    fn a_wider_filter_than_allowed_is_refused() {
        let mut permits = Permits::new(vec![rule(None, "a/+", true)], true);
        assert_eq!(permits.subscribe(0, "a/b").unwrap().0, Verdict::Allow);
        assert_eq!(permits.subscribe(0, "a/#").unwrap().0, NO);
        let mut open = Permits::new(vec![rule(None, "a/+", true)], false);
        assert_eq!(open.subscribe(0, "a/#"), None, "not complete: is asked");
    }

    #[test]
    fn a_lease_holds_in_its_scope_until_it_ends_or_is_revoked() {
        let mut permits = Permits::default();
        assert_eq!(publish(&mut permits, 0, 1, "a/b"), None);
        permits.learn(0, Action::Publish, "a/b".into(), decision(Verdict::Allow, Some("a/#"), 2));
        assert_eq!(publish(&mut permits, 1, 1, "a/b"), Some(Verdict::Allow));
        assert_eq!(publish(&mut permits, 1, 2, "a/c"), Some(Verdict::Allow));
        assert_eq!(publish(&mut permits, 1, 3, "b"), None);
        assert_eq!(permits.subscribe(1, "a/b"), None, "publishing and subscribing are two things");
        assert_eq!(publish(&mut permits, 1999, 2, "a/c"), Some(Verdict::Allow));
        assert_eq!(publish(&mut permits, 2000, 2, "a/c"), None);
        permits.learn(2000, Action::Publish, "a/b".into(), decision(Verdict::Allow, Some("a/#"), 2));
        assert_eq!(publish(&mut permits, 2001, 1, "a/b"), Some(Verdict::Allow));
        permits.revoke();
        assert_eq!(publish(&mut permits, 2001, 1, "a/b"), None);
    }

    #[test]
    fn a_verdict_without_lease_holds_for_its_packet() {
        let mut permits = Permits::default();
        permits.learn(0, Action::Publish, "a".into(), decision(Verdict::Allow, None, 0));
        permits.learn(0, Action::Publish, "b".into(), Decision::default());
        // A plugin that answers about something else has still answered.
        permits.learn(0, Action::Publish, "c".into(), decision(NO, Some("d"), 60));
        assert_eq!(publish(&mut permits, 0, 1, "a"), Some(Verdict::Allow));
        assert_eq!(publish(&mut permits, 0, 2, "b"), Some(NO));
        assert_eq!(publish(&mut permits, 0, 3, "c"), Some(NO));
        permits.packet_done();
        assert_eq!(publish(&mut permits, 0, 1, "a"), None);
    }

    /// Leases of one packet may push each other out; its own answers stay until it is handled.
    #[test]
    fn as_many_answers_as_one_packet_wants_are_known() {
        let mut permits = Permits::default();
        let filter = |n: usize| format!("t/{n}");
        for n in 0..LEASES_MAX + 36 {
            let verdict = if n == 0 { NO } else { Verdict::Allow };
            permits.learn(0, Action::Subscribe, filter(n).into(), decision(verdict, None, 60));
        }
        for n in 0..LEASES_MAX + 36 {
            let verdict = if n == 0 { NO } else { Verdict::Allow };
            assert_eq!(permits.subscribe(0, &filter(n)), Some((verdict, 60_000)), "{n}");
        }
        permits.packet_done();
        let left = (0..LEASES_MAX + 36).filter(|n| permits.subscribe(0, &filter(*n)).is_some()).count();
        assert_eq!(left, LEASES_MAX);
    }

    #[test]
    fn a_prohibition_is_stronger_than_a_permission() {
        let mut permits = Permits::default();
        permits.learn(0, Action::Subscribe, "a/b".into(), decision(NO, Some("a/b"), 9));
        permits.learn(0, Action::Subscribe, "a/#".into(), decision(Verdict::Allow, Some("a/#"), 9));
        assert_eq!(permits.subscribe(1, "a/b").unwrap().0, NO);
        assert_eq!(permits.subscribe(1, "a/c").unwrap().0, Verdict::Allow);
    }

    #[test]
    fn leases_are_bounded() {
        let mut permits = Permits::default();
        for n in 0..10_000_u32 {
            let topic: Arc<str> = format!("t/{n}").into();
            permits.learn(0, Action::Publish, Arc::clone(&topic), decision(Verdict::Allow, None, 60));
            assert_eq!(publish(&mut permits, 0, u64::from(n), &topic), Some(Verdict::Allow));
        }
        let known = permits.0.as_ref().expect("something is known");
        assert_eq!(known.held.len(), LEASES_MAX);
        assert!(known.memo.len() <= MEMO_MAX);
    }

    /// Topics as long as the standard allows: few leases are held, and one that is too long holds for its packet.
    #[test]
    fn leases_are_bounded_in_bytes() {
        let mut permits = Permits::default();
        for n in 0..1000_u32 {
            let topic: Arc<str> = format!("{n}/{}", "x".repeat(5000)).into();
            permits.learn(0, Action::Publish, Arc::clone(&topic), decision(Verdict::Allow, None, 60));
            assert_eq!(publish(&mut permits, 0, u64::from(n), &topic), Some(Verdict::Allow));
        }
        let long: Arc<str> = "x".repeat(60_000).into();
        permits.learn(0, Action::Publish, Arc::clone(&long), decision(NO, None, 60));
        assert_eq!(publish(&mut permits, 0, 2000, &long), Some(NO));
        let known = permits.0.as_ref().expect("something is known");
        let bytes: usize = known.held.iter().map(|held| held.scope.len()).sum();
        assert!(bytes <= LEASE_BYTES_MAX && known.held.len() > 1, "{bytes} bytes in {} leases", known.held.len());
        permits.packet_done();
        assert_eq!(publish(&mut permits, 0, 2001, &long), None, "it is asked again");
    }
}
