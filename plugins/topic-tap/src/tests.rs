use proptest::prelude::*;
use serde_json::{Value, json};
use wasmqtt_sdk::{HttpResponse, testing};

use super::*;

fn plugin_with(more: &[(&str, &str)]) -> Result<TopicTap, String> {
    let settings = [&[("url", "http://tap/in"), ("filters", "a/# b")], more].concat();
    TopicTap::new(&Settings::from_pairs(&settings))
}

fn plugin() -> TopicTap {
    plugin_with(&[]).expect("settings are good")
}

fn answer(status: u16) {
    testing::respond(Ok(HttpResponse { status, body: Vec::new() }));
}

/// Topics of the lines of each request.
fn topics_sent() -> Vec<Vec<String>> {
    let topic = |line: &str| {
        let line: Value = serde_json::from_str(line).expect("JSON");
        line["topic"].as_str().expect("a topic").to_owned()
    };
    let requests = testing::take_requests().into_iter();
    requests.map(|request| String::from_utf8(request.body).expect("text").lines().map(topic).collect()).collect()
}

#[test]
fn messages_are_lines_in_their_order() {
    answer(202);
    let batch = testing::batch(&[("a/1", "c", b"one"), ("b", "", b"\xff\x00")]);
    assert_eq!(plugin().committed(&batch), Ok(()));
    let [request] = &testing::take_requests()[..] else { panic!("one request") };
    assert_eq!(
        String::from_utf8(request.body.clone()).expect("text"),
        "{\"client\":\"c\",\"payload\":\"one\",\"qos\":1,\"retain\":false,\"topic\":\"a/1\"}\n\
         {\"client\":\"\",\"payload_base64\":\"/wA=\",\"qos\":1,\"retain\":false,\"topic\":\"b\"}\n"
    );
}

#[test]
fn what_is_not_taken_comes_again() {
    let batch = testing::batch(&[("a", "c", b"x")]);
    answer(503);
    assert_eq!(plugin().committed(&batch), Err(Failure::Unavailable("http://tap/in: status 503".into())));
    assert!(matches!(plugin().committed(&batch), Err(Failure::Unavailable(_))), "nobody there");
}

/// Errors are in the log and in lists of messages.
#[test]
fn no_secret_of_the_url_is_said() {
    let tap = plugin_with(&[]).map(|tap| TopicTap { url: "https://me:s3cret@tap/in?key=s3cret".into(), ..tap });
    let tap = tap.expect("settings are good");
    for status in [503, 422] {
        answer(status);
        let said = format!("{:?}", tap.committed(&testing::batch(&[("a", "c", b"x")])));
        assert!(said.contains("https://tap/in: status") && !said.contains("s3cret"), "{said}");
    }
}

/// A service that is away and a message that it will never take are told apart.
#[test]
fn a_message_that_is_refused_is_at_fault_itself() {
    for status in [400, 413, 415, 422] {
        answer(status);
        let Err(Failure::Internal(why)) = plugin().committed(&testing::batch(&[("a/x", "c", b"x")])) else {
            panic!("status {status} blames the service")
        };
        assert!(why.contains(&status.to_string()) && why.contains("one message, of topic \"a/x\""), "{why}");
    }
    answer(413);
    let two = testing::batch(&[("a", "c", b"x"), ("b", "c", b"x")]);
    assert!(matches!(plugin().committed(&two), Err(Failure::Internal(why)) if why.contains("2 messages")));
}

#[test]
fn it_registers_for_its_filters() {
    let wanted = plugin().registration();
    assert_eq!(wanted.filters, ["a/#", "b"]);
    assert!(wanted.committed && wanted.payload && !wanted.before_store);
}

/// Zero bytes are UTF-8, and JSON writes six bytes for each.
#[test]
fn control_characters_do_not_make_a_request_six_times_as_long() {
    let zeros = vec![0; 1_000_000];
    answer(200);
    assert_eq!(plugin().committed(&testing::batch(&[("a", "c", &zeros)])), Ok(()));
    let [request] = &testing::take_requests()[..] else { panic!("one request") };
    assert!(request.body.len() < 1_350_000, "{}", request.body.len());
    let line: Value = serde_json::from_slice(&request.body).expect("JSON");
    assert_eq!(STANDARD.decode(line["payload_base64"].as_str().expect("base64")), Ok(zeros));
}

/// Four images of 300 kB in a second: nginx would answer 413 to all of them in one request, for ever.
#[test]
fn a_batch_takes_several_requests_when_it_is_large() {
    let image = vec![0xFF; 300_000];
    let batch = testing::batch(&[("a/1", "c", &image), ("a/2", "c", &image), ("a/3", "c", b"x"), ("b", "c", &image)]);
    (0..3).for_each(|_| answer(200));
    assert_eq!(plugin().committed(&batch), Ok(()));
    assert_eq!(topics_sent(), [vec!["a/1"], vec!["a/2", "a/3"], vec!["b"]]);
}

/// The message before and the message after it are not held up by one that is longer than a request may be.
#[test]
fn a_message_that_is_too_long_goes_alone() {
    let plugin = plugin_with(&[("request_bytes_max", "1024")]).expect("settings are good");
    let long = [b'x'; 2000];
    (0..3).for_each(|_| answer(200));
    assert_eq!(plugin.committed(&testing::batch(&[("a/1", "", b""), ("a/2", "", &long), ("b", "", b"")])), Ok(()));
    assert_eq!(topics_sent(), [["a/1"], ["a/2"], ["b"]]);
}

#[test]
fn after_a_failure_no_later_request_is_made() {
    let plugin = plugin_with(&[("request_bytes_max", "1024")]).expect("settings are good");
    let long = [b'x'; 800];
    answer(200);
    answer(503);
    let batch = testing::batch(&[("a/1", "", &long), ("a/2", "", &long), ("b", "", &long)]);
    assert!(plugin.committed(&batch).is_err());
    assert_eq!(topics_sent(), [["a/1"], ["a/2"]]);
}

#[test]
fn wrong_settings_are_named() {
    for (name, value, why) in [
        ("request_bytes_max", "1023", "allowed are 1024 to 67108864"),
        ("request_bytes_max", "many", "`request_bytes_max` = \"many\""),
        ("request_bytes", "5", "`request_bytes` does not exist"),
        ("timeout_ms", "soon", "`timeout_ms` = \"soon\""),
    ] {
        let error = plugin_with(&[(name, value)]).expect_err("is refused");
        assert!(error.contains(why), "{error}");
    }
    let filters = Settings::from_pairs(&[("url", "http://tap"), ("filters", "a#")]);
    assert!(TopicTap::new(&filters).expect_err("is refused").contains("\"a#\" is not a topic filter"));
}

proptest! {
    /// A line is JSON, says what the message says, and is as long as was expected of it.
    #[test]
    fn lines_are_as_long_as_expected(
        payload in prop_oneof![prop::collection::vec(any::<u8>(), 0..200), ".{0,60}".prop_map(String::into_bytes)],
        topic in ".{1,40}",
        client in ".{0,40}",
    ) {
        let batch = testing::batch(&[(&topic, &client, &payload)]);
        let line = Line::new(batch.iter().next().expect("one"));
        let mut body = Vec::new();
        line.write(&mut body).expect("memory takes everything");
        prop_assert!((body.len()..=body.len() + 16).contains(&line.bytes), "{} of {}", body.len(), line.bytes);
        let written: Value = serde_json::from_slice(&body).expect("JSON");
        prop_assert_eq!(&written["topic"], &json!(topic));
        prop_assert_eq!(&written["client"], &json!(client));
        let back = match written["payload"].as_str() {
            Some(text) => text.as_bytes().to_vec(),
            None => STANDARD.decode(written["payload_base64"].as_str().expect("base64")).expect("base64"),
        };
        prop_assert_eq!(back, payload);
    }
}
