//! Permissions from a file of rules, in a form of its own or that of mosquitto's `acl_file`.
//!
//! ```text
//! # first rule that applies decides; %c is the Client Identifier, %u the principal
//! allow publish   sensors/%c/#
//! allow subscribe commands/%c/#
//! deny  all       internal/#
//! allow all       #            user=admin
//! ```
//!
//! Settings: `file` (granted to it), `format` = `rules` or `mosquitto`, `default` = `deny`, `allow` or `next` for what no
//! rule is about, `ttl` = seconds that a decision holds (300), `allow_slash` = `true` or `false` (`false`).
//!
//! A rule with `%c` or `%u` allows nothing to a client whose name has `+` or `#` in it, and a prohibition holds for it
//! whatever the name. A name with `/` is treated likewise, since `users/%u/#` would give the user `org` all that is below
//! `users/org/dev1`; with `allow_slash = true` it is put in as it is, which is right where the names of levels above are
//! nobody's. At the level `debug` the log says when a rule was left out for such a name.
//!
//! Unlike mosquitto, which grants every SUBSCRIBE and looks at each message when it is delivered, this plugin decides
//! when a client subscribes: to be granted, its filter must reach no further than what it may read. With
//! `topic read weather/+`, a client that subscribes to `weather/+` is granted, and one that subscribes to `#` is refused.

mod mosquitto;
mod rules;
mod warnings;

use std::borrow::Cow;

use wasmqtt_sdk::{Access, Acl, Action, Client, Decision, Plugin, Settings, debug, export_plugin, warn};
use wasmqtt_sdk::{filter_covers, filters_overlap, topic_matches};

/// Seconds that a decision holds unless the settings say otherwise.
const TTL_DEFAULT: u32 = 300;

/// What a rule is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum On {
    Publish,
    Subscribe,
    All,
}

/// Whom a rule is about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Who {
    Everybody,
    /// Clients without a principal.
    Anonymous,
    User(String),
    Client(String),
    Listener(String),
}

/// One line of the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Rule {
    pub(crate) allow: bool,
    pub(crate) on: On,
    pub(crate) filter: String,
    /// `%c` and `%u` stand for themselves.
    pub(crate) is_literal: bool,
    /// All must be so.
    pub(crate) who: Vec<Who>,
    /// Where it stands in the file, from 1.
    pub(crate) line: usize,
}

/// The Client Identifier or the principal, where a rule has a mark for it.
fn marked<'a>(mark: &str, client: &'a Client) -> Option<&'a str> {
    match mark.as_bytes().get(1) {
        Some(b'c') => Some(&client.client_id),
        Some(b'u') => Some(&client.principal),
        _ => None,
    }
}

impl Rule {
    fn is_about(&self, client: &Client, action: Action) -> bool {
        let is_on = match self.on {
            On::All => true,
            On::Publish => action == Action::Publish,
            On::Subscribe => action == Action::Subscribe,
        };
        is_on
            && self.who.iter().all(|who| match who {
                Who::Everybody => true,
                Who::Anonymous => client.principal.is_empty(),
                Who::User(name) => client.principal == *name,
                Who::Client(id) => client.client_id == *id,
                Who::Listener(name) => client.listener == *name,
            })
    }

    /// The filter for this client; `None`: its name would change what the filter matches, and so allow too much. A
    /// prohibition reaches further then: no client gets around it by the name it takes.
    fn filter_for(&self, client: &Client, allow_slash: bool) -> Option<Cow<'_, str>> {
        if self.is_literal {
            return Some(Cow::Borrowed(&self.filter));
        }
        let mut filter = String::with_capacity(self.filter.len());
        let mut rest = self.filter.as_str();
        // From left to right and once: a mark within a name is a part of that name.
        while let Some(at) = rest.find('%') {
            let (before, mark) = rest.split_at(at);
            filter.push_str(before);
            let Some(name) = marked(mark, client) else {
                filter.push('%');
                rest = &mark[1..];
                continue;
            };
            let is_one_level = !name.contains('/') || allow_slash || !self.allow;
            if name.is_empty() || name.contains(['+', '#']) || !is_one_level {
                return (!self.allow).then(|| Cow::Owned(self.filter_for_any_name()));
            }
            filter.push_str(name);
            rest = &mark[2..];
        }
        filter.push_str(rest);
        // A client that calls itself `$SYS` does not get the broker's topics.
        (!self.allow || filter.starts_with('$') == self.filter.starts_with('$')).then_some(Cow::Owned(filter))
    }

    /// Levels with a mark may be anything.
    fn filter_for_any_name(&self) -> String {
        let has_mark = |level: &str| level.contains("%c") || level.contains("%u");
        let levels = self.filter.split('/').map(|level| if has_mark(level) { "+" } else { level });
        levels.collect::<Vec<_>>().join("/")
    }
}

/// A permission to subscribe must reach as far as the wanted filter, a prohibition counts as soon as they overlap.
fn applies(allow: bool, filter: &str, access: &Access) -> bool {
    match (access.action, allow) {
        (Action::Publish, _) => topic_matches(filter, &access.topic),
        (Action::Subscribe, true) => filter_covers(filter, &access.topic),
        (Action::Subscribe, false) => filters_overlap(filter, &access.topic),
    }
}

/// Answers for what no rule is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Otherwise {
    Deny,
    Allow,
    Next,
}

/// The rules of the file.
#[derive(Debug)]
pub struct AclRules {
    /// The first one decides. As mosquitto has it, a prohibition is stronger than any permission: then all of them come
    /// first.
    rules: Vec<Rule>,
    otherwise: Otherwise,
    ttl: u32,
    allow_slash: bool,
    /// What is odd about the file.
    warnings: Vec<String>,
}

impl AclRules {
    fn from_text(text: &str, settings: &Settings) -> Result<Self, String> {
        settings.only(&["file", "format", "default", "ttl", "allow_slash"])?;
        let (mut rules, deny_wins) = match settings.get("format").unwrap_or("rules") {
            "rules" => (rules::parse(text)?, false),
            "mosquitto" => (mosquitto::parse(text)?, true),
            other => return Err(format!("setting `format` = {other:?}: allowed are rules and mosquitto")),
        };
        let otherwise = match settings.get("default").unwrap_or("deny") {
            "deny" => Otherwise::Deny,
            "allow" => Otherwise::Allow,
            "next" => Otherwise::Next,
            other => return Err(format!("setting `default` = {other:?}: allowed are deny, allow and next")),
        };
        let allow_slash = settings.parse("allow_slash", false)?;
        let warnings = warnings::of(&rules, deny_wins);
        if deny_wins {
            // Stable: within each kind the order of the file stays.
            rules.sort_by_key(|rule| rule.allow);
        }
        Ok(Self { rules, otherwise, ttl: settings.parse("ttl", TTL_DEFAULT)?, allow_slash, warnings })
    }

    /// The rules about this client and action, with their filters.
    fn about(&self, client: &Client, action: Action) -> Vec<(bool, Cow<'_, str>)> {
        let about = self.rules.iter().filter(|rule| rule.is_about(client, action));
        about.filter_map(|rule| Some((rule.allow, rule.filter_for(client, self.allow_slash)?))).collect()
    }

    fn decide(&self, client: &Client, access: &Access) -> Decision {
        let rules = self.about(client, access.action);
        let found = rules.iter().position(|(allow, filter)| applies(*allow, filter, access));
        let Some(place) = found else {
            self.explain(client, access);
            return match self.otherwise {
                Otherwise::Deny => Decision::deny().lease(self.ttl),
                Otherwise::Allow => Decision::allow().lease(self.ttl),
                Otherwise::Next => Decision::next(),
            };
        };
        let (allow, filter) = &rules[place];
        let decision = if *allow { Decision::allow() } else { Decision::deny() }.lease(self.ttl);
        // Within all of its filter, unless a rule before says otherwise about a part of that. A prohibition may reach
        // less far than what was asked; such a scope would not be kept, and with it the lease.
        let is_whole = filter_covers(filter, &access.topic)
            && !rules[..place].iter().any(|(before, other)| before != allow && filters_overlap(other, filter));
        if is_whole { decision.scope(filter.as_ref()) } else { decision }
    }
}

impl AclRules {
    /// For somebody who wonders why a rule does not count.
    fn explain(&self, client: &Client, access: &Access) {
        let left_out = |rule: &&Rule| {
            rule.is_about(client, access.action)
                && rule.filter_for(client, self.allow_slash).is_none()
                && filters_overlap(&rule.filter_for_any_name(), &access.topic)
        };
        if let Some(rule) = self.rules.iter().find(left_out) {
            let Client { client_id, principal, .. } = client;
            debug(&format!(
                "{:?} of line {} allows nothing to client {client_id:?} with principal {principal:?}: a name in it is empty, \
                 begins with `$`, or has one of + # / (for /, see the setting allow_slash)",
                rule.filter, rule.line
            ));
        }
    }
}

impl Plugin for AclRules {
    fn new(settings: &Settings) -> Result<Self, String> {
        let file = settings.require("file")?;
        let text = std::fs::read_to_string(file).map_err(|error| format!("cannot read {file}: {error}"))?;
        let rules = Self::from_text(&text, settings).map_err(|error| format!("{file}: {error}"))?;
        Ok(Self { warnings: rules.warnings.iter().map(|warning| format!("{file}: {warning}")).collect(), ..rules })
    }

    /// Once for each build, and not in each instance.
    fn health(&self) -> Result<(), String> {
        self.warnings.iter().for_each(|warning| warn(warning));
        Ok(())
    }
}

impl Acl for AclRules {
    fn authorize(&self, client: &Client, access: &Access) -> Result<Decision, String> {
        Ok(self.decide(client, access))
    }
}

export_plugin!(AclRules: acl);

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use wasmqtt_sdk::testing::client;
    use wasmqtt_sdk::{Verdict, testing};

    use super::*;

    fn plugin(text: &str, settings: &[(&str, &str)]) -> AclRules {
        AclRules::from_text(text, &Settings::from_pairs(settings)).expect("is right")
    }

    fn decide(rules: &AclRules, who: (&str, &str), action: Action, topic: &str) -> Decision {
        let access = Access { action, topic: topic.into(), qos: 0, retain: false };
        rules.decide(&client(who.0, who.1), &access)
    }

    fn may(rules: &AclRules, who: (&str, &str), action: Action, topic: &str) -> bool {
        decide(rules, who, action, topic).verdict == Verdict::Allow
    }

    const RULES: &str = "\
# sensors
deny all sensors/secret/#
allow publish sensors/%c/#
allow subscribe commands/%c/+
allow all # user=admin
allow publish open/# listener=mqtt://127.0.0.1:1883 client=c
";

    #[test]
    fn the_first_rule_decides() {
        let rules = plugin(RULES, &[]);
        let c = ("c", "");
        assert!(may(&rules, c, Action::Publish, "sensors/c/temperature"));
        assert!(!may(&rules, c, Action::Publish, "sensors/d/temperature"));
        assert!(!may(&rules, c, Action::Subscribe, "sensors/c/temperature"));
        assert!(may(&rules, c, Action::Subscribe, "commands/c/x"));
        assert!(!may(&rules, c, Action::Subscribe, "commands/c/#"), "reaches further");
        assert!(may(&rules, ("x", "admin"), Action::Subscribe, "commands/#"));
        assert!(!may(&rules, ("x", "admin"), Action::Publish, "sensors/secret/x"));
        assert!(!may(&rules, ("x", "admin"), Action::Subscribe, "#"), "would let secrets through");
        assert!(may(&rules, c, Action::Publish, "open/x"));
        assert!(!may(&rules, ("d", ""), Action::Publish, "open/x"), "another client");
    }

    /// A name must not widen a rule.
    #[test]
    fn names_with_wildcards_match_nothing() {
        let rules = plugin("allow all sensors/%c/#\nallow all users/%u/#\n", &[]);
        for id in ["+", "#", "a/b", ""] {
            assert!(!may(&rules, (id, ""), Action::Publish, "sensors/x/y"), "{id}");
            assert!(!may(&rules, ("c", id), Action::Publish, "users/x/y"), "{id}");
        }
    }

    /// Nor may a name be taken for a mark or for the beginning of the broker's own topics.
    #[test]
    fn names_are_put_in_once_and_as_they_are() {
        let rules = plugin("allow all sensors/%c/#\nallow all %c/#\n", &[]);
        assert!(!may(&rules, ("%u", "ann"), Action::Publish, "sensors/ann/x"), "the topics of client ann");
        assert!(may(&rules, ("%u", "ann"), Action::Publish, "sensors/%u/x"), "its own");
        assert!(!may(&rules, ("$SYS", ""), Action::Subscribe, "$SYS/#"));
        assert!(may(&rules, ("c", ""), Action::Subscribe, "c/#"));
    }

    #[test]
    fn no_name_gets_around_a_prohibition() {
        let rules =
            plugin("deny publish state/%c/#\ndeny publish of-%u\ndeny publish exactly/%c/on\nallow publish #\n", &[]);
        for (id, topic) in [
            ("x", "state/x/on"),
            ("a/b", "state/a/b/on"),
            ("a/b", "exactly/a/b/on"),
            ("+", "state/x/on"),
            ("#", "state/x/on"),
        ] {
            assert!(!may(&rules, (id, "u"), Action::Publish, topic), "{id}");
        }
        assert!(may(&rules, ("x", "u"), Action::Publish, "state/y/on"), "somebody else's");
        assert!(!may(&rules, ("x", "u"), Action::Publish, "of-u"));
        assert!(!may(&rules, ("$SYS", "u"), Action::Publish, "state/$SYS/on"));
    }

    /// `users/%u/#` for `org/dev1`: only where the operator says so.
    #[test]
    fn a_name_with_a_slash_counts_if_the_operator_wants_it() {
        let text = "pattern readwrite users/%u/#\npattern readwrite clients/%c/#\n";
        let strict = plugin(text, &[("format", "mosquitto")]);
        let open = plugin(text, &[("format", "mosquitto"), ("allow_slash", "true")]);
        let who = ("c", "org/dev1");
        testing::take();
        assert!(!may(&strict, who, Action::Publish, "users/org/dev1/x"));
        let lines = testing::take().lines;
        assert!(lines.len() == 1 && lines[0].1.contains("line 1") && lines[0].1.contains("allow_slash"), "{lines:?}");
        assert!(may(&open, who, Action::Publish, "users/org/dev1/x"));
        assert!(!may(&open, who, Action::Publish, "users/org/dev2/x"));
        assert!(!may(&open, ("+", "org/+"), Action::Publish, "users/org/dev2/x"), "wildcards never");
        assert!(!may(&strict, ("c", "ann"), Action::Publish, "elsewhere"));
        assert!(testing::take().lines.iter().all(|(_, line)| !line.contains("\"ann\"")), "no rule was left out");
    }

    #[test]
    fn decisions_are_leased_as_far_as_their_rule_reaches() {
        let rules = plugin(RULES, &[("ttl", "60")]);
        let allowed = decide(&rules, ("c", ""), Action::Subscribe, "commands/c/x");
        assert_eq!((allowed.ttl, allowed.scope.as_str()), (60, "commands/c/+"));
        let partly = decide(&rules, ("x", "admin"), Action::Publish, "plant");
        assert_eq!((partly.ttl, partly.scope.as_str()), (60, ""), "a part of # is denied");
        let denied = decide(&rules, ("c", ""), Action::Publish, "sensors/secret/x");
        assert_eq!((denied.verdict, denied.scope.as_str()), (Verdict::Deny(0x87), "sensors/secret/#"));
        let wider = decide(&rules, ("x", "admin"), Action::Subscribe, "sensors/#");
        assert_eq!(
            (wider.verdict, wider.scope.as_str()),
            (Verdict::Deny(0x87), ""),
            "a scope that covers no more than a part"
        );
    }

    #[test]
    fn what_no_rule_is_about_is_up_to_the_default() {
        for (default, expected) in [("deny", Verdict::Deny(0x87)), ("allow", Verdict::Allow), ("next", Verdict::Next)] {
            let rules = plugin("", &[("default", default)]);
            assert_eq!(decide(&rules, ("c", ""), Action::Publish, "a").verdict, expected);
        }
        let wrong = AclRules::from_text("", &Settings::from_pairs(&[("default", "maybe")]));
        assert!(wrong.unwrap_err().contains("allowed are deny, allow and next"));
        let mistyped = AclRules::from_text("", &Settings::from_pairs(&[("defualt", "deny")]));
        assert!(mistyped.unwrap_err().contains("`defualt` does not exist"));
    }

    #[test]
    fn a_file_of_mosquitto_is_read_as_mosquitto_reads_it() {
        let text = "\
topic read $SYS/#
topic open/#
user ann
topic readwrite plant/#
topic deny plant/secret/#
topic write log/ann
pattern read inbox/%u/#
pattern write outbox/%c/#
topic as-it-is/%c
";
        let rules = plugin(text, &[("format", "mosquitto")]);
        let ann = ("c", "ann");
        assert!(may(&rules, ("c", ""), Action::Publish, "open/x"), "anonymous");
        assert!(!may(&rules, ann, Action::Publish, "open/x"), "rules before the first user are for anonymous clients");
        assert!(may(&rules, ann, Action::Publish, "plant/x") && may(&rules, ann, Action::Subscribe, "plant/x/+"));
        assert!(!may(&rules, ann, Action::Publish, "plant/secret/x"), "deny wins wherever it stands");
        assert!(may(&rules, ann, Action::Publish, "log/ann") && !may(&rules, ann, Action::Subscribe, "log/ann"));
        assert!(may(&rules, ("c", "bob"), Action::Subscribe, "inbox/bob/x"), "patterns are for all");
        assert!(may(&rules, ("c", ""), Action::Publish, "outbox/c/x"));
        assert!(!may(&rules, ann, Action::Publish, "as-it-is/c"), "only patterns have marks");
    }

    proptest! {
        /// Whatever a client calls itself, its rule is about its own level and nothing else, in both forms.
        #[test]
        fn no_name_opens_what_is_another_clients(
            name in "[a-b+#/$%c]{0,6}",
            filter in "own(/[a-b+#]{1,2}){1,3}",
        ) {
            let own = plugin("allow all own/%c/#\n", &[]);
            let pattern = plugin("pattern readwrite own/%c/#\n", &[("format", "mosquitto"), ("allow_slash", "true")]);
            for (rules, levels) in [(&own, 1), (&pattern, name.split('/').count())] {
                let level = filter.split('/').skip(1).take(levels).collect::<Vec<_>>().join("/");
                if wasmqtt_sdk::is_valid_filter(&filter) && may(rules, (&name, ""), Action::Subscribe, &filter) {
                    prop_assert_eq!(&level, &name);
                    prop_assert!(!name.contains(['+', '#']));
                }
            }
        }

        #[test]
        fn any_file_is_read_without_a_panic(text in "((allow|deny|user|topic|pattern|all|read|%c|[ -~\n]){0,6}\n?){0,6}") {
            for format in ["rules", "mosquitto"] {
                let _ = AclRules::from_text(&text, &Settings::from_pairs(&[("format", format)]));
            }
        }
    }
}
