//! Two texts, a filter and a name: no panic, and matching says what a slow, plain reading of §4.7 says.
#![no_main]

use libfuzzer_sys::fuzz_target;
use wasmqtt_protocol::topic::{Filter, is_valid_topic_name, levels};

fuzz_target!(|input: (&str, &str)| {
    let (text, name) = input;
    let Ok(filter) = Filter::parse(text) else {
        return;
    };
    assert_eq!(filter.as_str(), text);
    assert!(text.ends_with(filter.topic_filter()));
    if let Some(share) = filter.share() {
        assert_eq!(text, format!("$share/{share}/{}", filter.topic_filter()));
    }
    if is_valid_topic_name(name) {
        let (pattern, names): (Vec<_>, Vec<_>) = (
            levels(filter.topic_filter()).collect(),
            levels(name).collect(),
        );
        let is_hidden = name.starts_with('$') && matches!(pattern[0], "+" | "#");
        assert_eq!(
            filter.matches(name),
            !is_hidden && plainly(&pattern, &names)
        );
    }
});

fn plainly(pattern: &[&str], names: &[&str]) -> bool {
    match (pattern, names) {
        (["#"], _) | ([], []) => true,
        ([level, pattern @ ..], [name, names @ ..]) => {
            (*level == "+" || level == name) && plainly(pattern, names)
        }
        _ => false,
    }
}
