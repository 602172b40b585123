//! Topic Names and Topic Filters. MQTT 5.0 and 3.1.1 §4.7, Shared Subscriptions MQTT 5.0 §4.8.2.
//!
//! Text alone: what is valid and what matches what. Knows nothing of packets, Sessions or subscribers.

use std::fmt;

/// Longest Topic Name or Topic Filter, in bytes of UTF-8. [MQTT-4.7.3-3]
const TOPIC_BYTES_MAX: usize = 65_535;

/// A name that may be published to: at least one character, at most 65 535 bytes, no `+`, `#` or NUL.
///
/// MQTT 5.0 §4.7 [MQTT-4.7.1-1] [MQTT-4.7.3-1] [MQTT-4.7.3-2] [MQTT-4.7.3-3].
#[inline]
pub fn is_valid_topic_name(name: &str) -> bool {
    !name.is_empty() && name.len() <= TOPIC_BYTES_MAX && !has_wildcard_or_nul(name.as_bytes())
}

/// Looks at every byte without leaving early, so that the compiler compares many at once.
#[inline]
pub(crate) fn has_wildcard_or_nul(bytes: &[u8]) -> bool {
    let is_one = |byte| u8::from(byte == b'+') | u8::from(byte == b'#') | u8::from(byte == 0);
    bytes.iter().fold(0, |found, &byte| found | is_one(byte)) != 0
}

/// The parts between the slashes; `"/a"` has two, the first of them empty. MQTT 5.0 §4.7.1.1.
#[inline]
pub fn levels(text: &str) -> std::str::Split<'_, char> {
    text.split('/')
}

/// A Topic Filter as a client subscribes with it, valid by construction; perhaps a Shared Subscription.
///
/// Equal if the whole text is equal: `$share/a/x` and `x` are two subscriptions. MQTT 5.0 §4.7, §4.8.2.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Filter {
    text: Box<str>,
    /// Where the filter behind `$share/{ShareName}/` begins; 0 if the subscription is not shared.
    filter_at: u32,
}

/// Why a text is not a Topic Filter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FilterError {
    /// No character at all, or none behind the Share Name. [MQTT-4.7.3-1]
    #[error("topic filter is empty")]
    Empty,
    /// More than 65 535 bytes. [MQTT-4.7.3-3]
    #[error("topic filter has more than 65535 bytes")]
    TooLong,
    /// [MQTT-4.7.3-2]
    #[error("topic filter contains the null character")]
    Nul,
    /// `#` not alone in its level, or not in the last one. [MQTT-4.7.1-1]
    #[error("topic filter has a misplaced multi-level wildcard")]
    MultiLevel,
    /// `+` not alone in its level. [MQTT-4.7.1-2]
    #[error("topic filter has a misplaced single-level wildcard")]
    SingleLevel,
    /// Share Name empty, with a wildcard, or not followed by a filter. [MQTT-4.8.2-1] [MQTT-4.8.2-2]
    #[error("share name is not valid")]
    ShareName,
    /// `$share` and nothing else: well formed, but more likely something got lost.
    #[error("share name is missing")]
    Unnamed,
}

impl Filter {
    /// Checks `text` and keeps a copy.
    ///
    /// # Errors
    /// A [`FilterError`] that names the rule it breaks. MQTT 5.0 §4.7.1, §4.7.3, §4.8.2.
    pub fn parse(text: &str) -> Result<Self, FilterError> {
        let filter_at = checked(text)?;
        Ok(Self { text: text.into(), filter_at: filter_at as u32 })
    }

    /// The same without a copy.
    ///
    /// # Errors
    /// As [`Filter::parse`].
    pub fn check(text: &str) -> Result<(), FilterError> {
        checked(text).map(|_| ())
    }

    /// The Share Name, if this is a Shared Subscription.
    pub fn share(&self) -> Option<&str> {
        let end = (self.filter_at as usize).checked_sub(1)?;
        Some(&self.text[SHARE.len()..end])
    }

    /// What Topic Names are compared with: the text without `$share/{ShareName}/`.
    pub fn topic_filter(&self) -> &str {
        &self.text[self.filter_at as usize..]
    }

    /// The text as the client sent it.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// There is a `+` or `#` in it.
    pub fn has_wildcard(&self) -> bool {
        has_wildcard_or_nul(self.topic_filter().as_bytes())
    }

    /// Messages with this Topic Name match. MQTT 5.0 §4.7.
    pub fn matches(&self, topic: &str) -> bool {
        filter_matches(self.topic_filter(), topic)
    }
}

impl fmt::Debug for Filter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.text, f)
    }
}

impl fmt::Display for Filter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

const SHARE: &str = "$share/";

/// Where the filter behind the Share Name begins in a valid text.
fn checked(text: &str) -> Result<usize, FilterError> {
    if text.len() > TOPIC_BYTES_MAX {
        return Err(FilterError::TooLong);
    }
    let filter_at = filter_start(text)?;
    check_filter(&text[filter_at..])?;
    Ok(filter_at)
}

/// 0 if `text` is not shared; otherwise the place behind the slash that ends the Share Name.
fn filter_start(text: &str) -> Result<usize, FilterError> {
    // `$share` alone would be a plain filter, if an odd one; more likely something got lost.
    let Some(rest) = text.strip_prefix(SHARE) else {
        return if text == "$share" { Err(FilterError::Unnamed) } else { Ok(0) };
    };
    let (name, filter) = rest.split_once('/').ok_or(FilterError::ShareName)?;
    if name.is_empty() || has_wildcard_or_nul(name.as_bytes()) || filter.is_empty() {
        return Err(FilterError::ShareName);
    }
    Ok(SHARE.len() + name.len() + 1)
}

fn check_filter(filter: &str) -> Result<(), FilterError> {
    if filter.is_empty() {
        return Err(FilterError::Empty);
    }
    if !has_wildcard_or_nul(filter.as_bytes()) {
        return Ok(());
    }
    let mut rest = levels(filter).peekable();
    while let Some(level) = rest.next() {
        if level.contains('\0') {
            return Err(FilterError::Nul);
        }
        if level.contains('#') && (level != "#" || rest.peek().is_some()) {
            return Err(FilterError::MultiLevel);
        }
        if level.contains('+') && level != "+" {
            return Err(FilterError::SingleLevel);
        }
    }
    Ok(())
}

/// A message with this Topic Name matches this (valid, not shared) Topic Filter. MQTT 5.0 §4.7.
///
/// A leading wildcard does not match a Topic Name that begins with `$`. [MQTT-4.7.2-1]
pub fn filter_matches(filter: &str, topic: &str) -> bool {
    if topic.starts_with('$') && filter.starts_with(['+', '#']) {
        return false;
    }
    let mut names = levels(topic);
    for level in levels(filter) {
        if level == "#" {
            return true; // the parent level too: `sport/#` matches `sport`
        }
        match names.next() {
            Some(name) if level == "+" || level == name => {}
            _ => return false,
        }
    }
    names.next().is_none()
}

/// Every Topic Name that `narrow` matches is matched by `wide`, too. Both are valid and not shared.
pub fn filter_covers(wide: &str, narrow: &str) -> bool {
    // [MQTT-4.7.2-1]
    if narrow.starts_with('$') && wide.starts_with(['+', '#']) {
        return false;
    }
    let mut narrow = levels(narrow);
    for level in levels(wide) {
        if level == "#" {
            return true;
        }
        match narrow.next() {
            Some("#") | None => return false,
            Some(other) if level == "+" || level == other => {}
            Some(_) => return false,
        }
    }
    narrow.next().is_none()
}

/// There is a Topic Name that both match. Both are valid and not shared.
pub fn filters_overlap(one: &str, other: &str) -> bool {
    // [MQTT-4.7.2-1]
    let is_open = |filter: &str| filter.starts_with(['+', '#']);
    if one.starts_with('$') && is_open(other) || other.starts_with('$') && is_open(one) {
        return false;
    }
    let (mut ones, mut others) = (levels(one), levels(other));
    loop {
        match (ones.next(), others.next()) {
            (None, None) | (Some("#"), _) | (_, Some("#")) => return true,
            (Some(a), Some(b)) if a == b || a == "+" || b == "+" => {}
            _ => return false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// By the matching rules of MQTT 5.0 §4.7.1 and §4.7.2.
    #[test]
    fn a_filter_covers_narrower_ones() {
        for (wide, narrow, covers, overlaps) in [
            ("#", "a/b", true, true),
            ("#", "#", true, true),
            ("#", "$SYS/#", false, false),
            ("+/#", "$SYS/a", false, false),
            ("a/#", "a", true, true),
            ("a/#", "a/+/c", true, true),
            ("a/+", "a/#", false, true),
            ("a/+", "a/b", true, true),
            ("a/+", "a/+", true, true),
            ("a/b", "a/+", false, true),
            ("a", "a/#", false, true),
            ("a/+/c", "a/b/+", false, true),
            ("a/b", "a/c", false, false),
            ("a/b", "a/b/c", false, false),
            ("+", "/", false, false),
            ("$SYS/#", "$SYS/+/x", true, true),
        ] {
            assert_eq!(filter_covers(wide, narrow), covers, "{wide} covers {narrow}");
            assert_eq!(filters_overlap(wide, narrow), overlaps, "{wide} overlaps {narrow}");
            assert_eq!(filters_overlap(narrow, wide), overlaps, "{narrow} overlaps {wide}");
        }
    }

    fn check_matches(filters: &[&str], topic: &str, expected: &[&str]) {
        let matching: Vec<&str> =
            filters.iter().copied().filter(|text| Filter::parse(text).unwrap().matches(topic)).collect();
        assert_eq!(matching, expected, "{topic}");
    }

    fn check_refused(filters: &[&str], error: FilterError) {
        for text in filters {
            assert_eq!(Filter::parse(text), Err(error), "{text:?}");
        }
    }

    /// MQTT 5.0 and 3.1.1 §4.7.1.2 [MQTT-4.7.1-1] ([MQTT-4.7.1-2] in 3.1.1).
    #[test]
    fn multi_level_wildcard_matches_the_parent_and_everything_below() {
        let filters = ["sport/tennis/player1/#", "sport/#", "#", "sport/tennis", "sport/tennis/#/"];
        check_matches(&filters[..4], "sport/tennis/player1", &filters[..3]);
        check_matches(&filters[..3], "sport/tennis/player1/score/wimbledon", &filters[..3]);
        check_matches(&filters[..3], "sport", &["sport/#", "#"]);
        check_matches(&["sport/#"], "sports", &[]);
    }

    /// MQTT 5.0 and 3.1.1 §4.7.1.2 [MQTT-4.7.1-1].
    #[test]
    fn multi_level_wildcard_stands_alone_and_last() {
        check_refused(&["sport/tennis#", "sport/tennis/#/ranking", "#/", "##", "+#", "a/#b"], FilterError::MultiLevel);
    }

    /// MQTT 5.0 and 3.1.1 §4.7.1.3.
    #[test]
    fn single_level_wildcard_matches_exactly_one_level() {
        check_matches(&["sport/tennis/+"], "sport/tennis/player1", &["sport/tennis/+"]);
        check_matches(&["sport/tennis/+"], "sport/tennis/player1/ranking", &[]);
        check_matches(&["sport/+"], "sport", &[]);
        check_matches(&["sport/+"], "sport/", &["sport/+"]);
        check_matches(&["+/+", "/+", "+"], "/finance", &["+/+", "/+"]);
    }

    /// MQTT 5.0 §4.7.1.3 [MQTT-4.7.1-2] ([MQTT-4.7.1-3] in 3.1.1).
    #[test]
    fn single_level_wildcard_occupies_its_level() {
        check_refused(&["sport+", "a/+b", "++", "a/b+/c"], FilterError::SingleLevel);
        for text in ["+", "+/tennis/#", "sport/+/player1", "/+/"] {
            assert!(Filter::parse(text).is_ok(), "{text}");
        }
    }

    /// A leading wildcard does not match `$` topics. MQTT 5.0 and 3.1.1 §4.7.2 [MQTT-4.7.2-1].
    #[test]
    fn leading_wildcard_does_not_match_dollar_topics() {
        check_matches(&["#", "+/uptime", "$SYS/+", "$SYS/#"], "$SYS/uptime", &["$SYS/+", "$SYS/#"]);
        check_matches(&["a/+", "a/#"], "a/$b", &["a/+", "a/#"]);
    }

    /// MQTT 5.0 and 3.1.1 §4.7.3 [MQTT-4.7.3-1] [MQTT-4.7.3-2] [MQTT-4.7.3-3] [MQTT-4.7.3-4].
    #[test]
    fn names_and_filters_are_one_to_65535_bytes_without_null_compared_as_they_are() {
        let longest = "a".repeat(65_535);
        assert!(is_valid_topic_name(&longest));
        assert!(Filter::parse(&longest).is_ok());
        let longer = "a".repeat(65_536);
        assert!(!is_valid_topic_name(&longer));
        check_refused(&[&longer], FilterError::TooLong);
        check_refused(&[""], FilterError::Empty);
        check_refused(&["\0", "a/\0/b"], FilterError::Nul);
        for name in ["", "a/+", "#", "a\0"] {
            assert!(!is_valid_topic_name(name), "{name:?}");
        }
        for name in ["/", " ", "$SYS", "ACCOUNTS/Ünïcode"] {
            assert!(is_valid_topic_name(name), "{name:?}");
        }
        check_matches(&["ACCOUNTS", "Accounts", "/ACCOUNTS", "ACCOUNTS/"], "ACCOUNTS", &["ACCOUNTS"]);
    }

    /// MQTT 5.0 §4.8.2.
    #[test]
    fn shared_filter_has_a_share_name_and_the_filter_behind_it() {
        for (text, share, inner) in [
            ("$share/consumer1/sport/tennis/+", Some("consumer1"), "sport/tennis/+"),
            ("$share/consumer1//finance", Some("consumer1"), "/finance"),
            ("$share/a/#", Some("a"), "#"),
            ("$shared/a/b", None, "$shared/a/b"),
            ("share/a/b", None, "share/a/b"),
        ] {
            let filter = Filter::parse(text).unwrap();
            assert_eq!((filter.share(), filter.topic_filter(), filter.as_str()), (share, inner, text));
        }
    }

    /// MQTT 5.0 §4.8.2 [MQTT-4.8.2-1] [MQTT-4.8.2-2].
    #[test]
    fn share_name_has_a_character_and_no_wildcard_and_a_filter_follows() {
        check_refused(&["$share"], FilterError::Unnamed);
        let wrong = ["$share/", "$share/a", "$share/a/", "$share//a", "$share/+/a", "$share/a#/b"];
        check_refused(&wrong, FilterError::ShareName);
        check_refused(&["$share/a/b#"], FilterError::MultiLevel);
    }

    /// MQTT 5.0 and 3.1.1 §4.7.1.1.
    #[test]
    fn adjacent_separators_make_empty_levels() {
        assert_eq!(levels("/a//b/").collect::<Vec<_>>(), ["", "a", "", "b", ""]);
    }
}
