//! What matches what: Topic Names and Topic Filters. MQTT 5.0 §4.7.

/// A message with this Topic Name matches this Topic Filter.
///
/// `topic` is a name and not a filter: for what a client wants to subscribe to, there is [`filter_covers`]. Take care
/// with filters that are made of what a client says of itself, see [`is_one_level`].
///
/// ```
/// use wasmqtt_sdk::topic_matches;
///
/// assert!(topic_matches("plant/+/temperature", "plant/7/temperature"));
/// assert!(topic_matches("plant/#", "plant"));
/// assert!(!topic_matches("#", "$SYS/uptime"));
/// ```
pub fn topic_matches(filter: &str, topic: &str) -> bool {
    filter_covers(filter, topic)
}

/// Every Topic Name that `narrow` matches is matched by `wide`, too.
///
/// A client that may read `wide` may subscribe to `narrow`. To compare the texts is not enough: `plant/+` begins like
/// `plant/7`, and matches what is everybody's.
///
/// ```
/// use wasmqtt_sdk::filter_covers;
///
/// assert!(filter_covers("plant/#", "plant/+/temperature"));
/// assert!(!filter_covers("plant/7/#", "plant/+/temperature"));
/// ```
pub fn filter_covers(wide: &str, narrow: &str) -> bool {
    if narrow.starts_with('$') && wide.starts_with(['+', '#']) {
        return false;
    }
    let mut levels = narrow.split('/');
    for wanted in wide.split('/') {
        if wanted == "#" {
            return true;
        }
        match levels.next() {
            None | Some("#") => return false,
            Some(level) if wanted == "+" || wanted == level => {}
            Some(_) => return false,
        }
    }
    levels.next().is_none()
}

/// There is a Topic Name that both match.
pub fn filters_overlap(one: &str, other: &str) -> bool {
    let hides = |dollar: &str, open: &str| dollar.starts_with('$') && open.starts_with(['+', '#']);
    if hides(one, other) || hides(other, one) {
        return false;
    }
    let (mut ones, mut others) = (one.split('/'), other.split('/'));
    loop {
        match (ones.next(), others.next()) {
            (None, None) | (Some("#"), _) | (_, Some("#")) => return true,
            (Some(a), Some(b)) if a == b || a == "+" || b == "+" => {}
            _ => return false,
        }
    }
}

/// It can stand for one level of a topic and nothing else: it is not empty, and has none of `/`, `+`, `#` and zero; nor
/// does it begin with `$`.
///
/// Client Identifiers and user names are chosen by clients, and MQTT allows all of these characters in them. A plugin that
/// makes a filter of such a name, as `clients/{name}/#`, has to ask this before: the client `+` would otherwise get
/// `clients/+/#`, which is everybody's, and `a/b` would get a part of what is `a`'s.
///
/// ```
/// use wasmqtt_sdk::is_one_level;
///
/// assert!(is_one_level("sensor-7"));
/// for name in ["", "+", "#", "a/b", "a+", "$SYS"] {
///     assert!(!is_one_level(name));
/// }
/// ```
pub fn is_one_level(name: &str) -> bool {
    !name.is_empty() && !name.starts_with('$') && !name.contains(['/', '+', '#', '\0'])
}

/// It has no empty text, and its wildcards are where they may be.
pub fn is_valid_filter(filter: &str) -> bool {
    let levels: Vec<&str> = filter.split('/').collect();
    let is_right = |(place, level): (usize, &&str)| match *level {
        "+" => true,
        "#" => place + 1 == levels.len(),
        level => !level.contains(['+', '#', '\0']),
    };
    !filter.is_empty() && filter.len() <= 65_535 && levels.iter().enumerate().all(is_right)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_cover_and_overlap() {
        for (wide, narrow, covers, overlaps) in [
            ("#", "a/b", true, true),
            ("#", "$SYS/a", false, false),
            ("a/#", "a", true, true),
            ("a/+", "a/#", false, true),
            ("a/+/c", "a/b/+", false, true),
            ("a/b", "a/c", false, false),
            ("a", "a/#", false, true),
        ] {
            assert_eq!(filter_covers(wide, narrow), covers, "{wide} {narrow}");
            assert_eq!(filters_overlap(wide, narrow), overlaps, "{wide} {narrow}");
        }
    }

    #[test]
    fn wildcards_have_their_places() {
        for filter in ["a", "/", "+/a/#", "#", "a//b"] {
            assert!(is_valid_filter(filter), "{filter}");
        }
        for filter in ["", "a#", "#/a", "a+/b"] {
            assert!(!is_valid_filter(filter), "{filter}");
        }
    }
}
