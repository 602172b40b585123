//! A small HTTP client for plugins, over `wasi:http`. The servers it reaches are those of `grants.http`.
//!
//! Waits for the answer: for `auth` and what runs in the background, not for `acl` or `before-store`. In native tests the
//! answers are those of [`crate::testing::respond`].

/// A request.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct HttpRequest {
    /// `GET`, `POST` …
    pub method: String,
    /// `http://host:port/path?query`, or https.
    pub url: String,
    /// Names and values. `content-length` is set by [`HttpRequest::send`], from the body.
    pub headers: Vec<(String, String)>,
    /// Empty: none.
    pub body: Vec<u8>,
    /// Milliseconds for connecting, and for each wait for an answer; 0: as the host has it, 30 s.
    pub timeout_ms: u64,
}

/// An answer.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct HttpResponse {
    /// 200, 404 …
    pub status: u16,
    /// At most 1 MiB.
    pub body: Vec<u8>,
}

impl HttpRequest {
    /// POST with this content.
    pub fn post(url: impl Into<String>, content_type: &str, body: impl Into<Vec<u8>>) -> Self {
        Self {
            method: "POST".into(),
            url: url.into(),
            headers: vec![("content-type".into(), content_type.into())],
            body: body.into(),
            timeout_ms: 0,
        }
    }

    /// Asks, and waits for the whole answer. A server may answer before it has read the whole body.
    ///
    /// # Errors
    /// There is none: not granted, not reachable, too late, too large.
    pub fn send(&self) -> Result<HttpResponse, String> {
        #[cfg(target_arch = "wasm32")]
        return wasi::send(self).map_err(|error| format!("{}: {error}", shown_url(&self.url)));
        #[cfg(not(target_arch = "wasm32"))]
        crate::testing::answer_http(self)
    }
}

/// A URL for the log: without its query and what stands before the host, since both may be secrets.
pub fn shown_url(url: &str) -> String {
    let place = url.split(['?', '#']).next().unwrap_or_default();
    let (scheme, rest) = place.find("://").map_or(("", place), |at| place.split_at(at + "://".len()));
    let authority = rest.find('/').map_or(rest, |at| &rest[..at]);
    let secret_bytes = authority.rfind('@').map_or(0, |at| at + 1);
    format!("{scheme}{}", &rest[secret_bytes..])
}

/// The headers with the length of the body: without it the body would be sent in chunks, and many a service reads as
/// many bytes as Content-Length says and no more. RFC 9110 section 8.6.
#[cfg_attr(not(target_arch = "wasm32"), allow(dead_code, reason = "the stand-in sends nothing"))]
fn headers_of(request: &HttpRequest) -> Vec<(String, Vec<u8>)> {
    let is_length = |name: &str| name.eq_ignore_ascii_case("content-length");
    let own = request.headers.iter().filter(|(name, _)| !is_length(name));
    let mut headers: Vec<_> = own.map(|(name, value)| (name.clone(), value.clone().into_bytes())).collect();
    if !request.body.is_empty() || !matches!(request.method.as_str(), "GET" | "HEAD") {
        headers.push(("content-length".into(), request.body.len().to_string().into_bytes()));
    }
    headers
}

/// Scheme, authority and path of a URL.
#[cfg_attr(not(target_arch = "wasm32"), allow(dead_code, reason = "the stand-in needs no parts"))]
fn parts(url: &str) -> Result<(bool, &str, &str), String> {
    let (scheme, rest) = url.split_once("://").ok_or("not a URL")?;
    let is_tls = match scheme {
        "https" => true,
        "http" => false,
        _ => return Err("neither http nor https".into()),
    };
    let (authority, path) = rest.find('/').map_or((rest, "/"), |at| rest.split_at(at));
    if authority.is_empty() { Err("no host".into()) } else { Ok((is_tls, authority, path)) }
}

#[cfg(target_arch = "wasm32")]
mod wasi {
    use wasip2::http::outgoing_handler::{FutureIncomingResponse, handle};
    use wasip2::http::types::{Fields, IncomingBody, Method, OutgoingBody, OutgoingRequest, RequestOptions, Scheme};
    use wasip2::io::poll::poll;
    use wasip2::io::streams::StreamError;

    use super::{HttpRequest, HttpResponse, headers_of, parts};

    const BODY_BYTES_MAX: usize = 1 << 20;

    fn text(what: &str) -> impl FnOnce(()) -> String + '_ {
        move |()| format!("{what} is not valid")
    }

    fn method(name: &str) -> Method {
        match name {
            "GET" => Method::Get,
            "POST" => Method::Post,
            "PUT" => Method::Put,
            "DELETE" => Method::Delete,
            "PATCH" => Method::Patch,
            other => Method::Other(other.to_owned()),
        }
    }

    pub(super) fn send(from: &HttpRequest) -> Result<HttpResponse, String> {
        let (is_tls, authority, path) = parts(&from.url)?;
        let headers = Fields::from_list(&headers_of(from)).map_err(|error| format!("headers: {error}"))?;
        let request = OutgoingRequest::new(headers);
        request.set_method(&method(&from.method)).map_err(text("the method"))?;
        request.set_scheme(Some(&if is_tls { Scheme::Https } else { Scheme::Http })).map_err(text("the scheme"))?;
        request.set_authority(Some(authority)).map_err(text("the host"))?;
        request.set_path_with_query(Some(path)).map_err(text("the path"))?;
        let body = request.body().map_err(text("the body"))?;
        let options = RequestOptions::new();
        if from.timeout_ms > 0 {
            let nanoseconds = Some(from.timeout_ms.saturating_mul(1_000_000));
            let _ = options.set_connect_timeout(nanoseconds);
            let _ = options.set_first_byte_timeout(nanoseconds);
            let _ = options.set_between_bytes_timeout(nanoseconds);
        }
        let answer = handle(request, Some(options)).map_err(|error| error.to_string())?;
        // One that is not written to its end is kept until the answer is read: dropping it ends the connection.
        let _unfinished = if write(&body, &from.body, &answer)? {
            OutgoingBody::finish(body, None).map_err(|error| error.to_string())?;
            None
        } else {
            Some(body)
        };
        answer.subscribe().block();
        let response = match answer.get() {
            Some(Ok(Ok(response))) => response,
            Some(Ok(Err(error))) => return Err(error.to_string()),
            _ => return Err("no answer".into()),
        };
        let status = response.status();
        let body = response.consume().map_err(text("the answer"))?;
        Ok(HttpResponse { status, body: read(&body)? })
    }

    /// Writes until everything is written, or an answer is there, or nobody reads any more: then there may be an answer,
    /// too. Tells whether everything was written.
    fn write(body: &OutgoingBody, mut rest: &[u8], answer: &FutureIncomingResponse) -> Result<bool, String> {
        let stream = body.write().map_err(text("the body"))?;
        let (is_writable, is_answered) = (stream.subscribe(), answer.subscribe());
        while !rest.is_empty() {
            poll(&[&is_writable, &is_answered]);
            if is_answered.ready() {
                return Ok(false);
            }
            let Ok(room) = stream.check_write() else { return Ok(false) };
            let (piece, after) = rest.split_at(rest.len().min(usize::try_from(room).unwrap_or(usize::MAX)));
            if stream.write(piece).is_err() {
                return Ok(false);
            }
            rest = after;
        }
        Ok(true)
    }

    fn read(body: &IncomingBody) -> Result<Vec<u8>, String> {
        let stream = body.stream().map_err(text("the answer"))?;
        let mut bytes = Vec::new();
        loop {
            match stream.blocking_read(64 * 1024) {
                Ok(piece) => bytes.extend(piece),
                Err(StreamError::Closed) => return Ok(bytes),
                Err(StreamError::LastOperationFailed(error)) => return Err(error.to_debug_string()),
            }
            if bytes.len() > BODY_BYTES_MAX {
                return Err(format!("an answer of more than {BODY_BYTES_MAX} bytes"));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RFC 9110 §8.6: a request says how long its body is, also that it has none where one is expected.
    #[test]
    fn the_length_of_the_body_is_said() {
        let length = |request: &HttpRequest| {
            let lengths =
                headers_of(request).into_iter().filter(|(name, _)| name.eq_ignore_ascii_case("content-length"));
            lengths.map(|(_, value)| String::from_utf8(value).unwrap()).collect::<Vec<_>>()
        };
        let mut post = HttpRequest::post("http://a", "text/plain", "four");
        assert_eq!(length(&post), ["4"]);
        post.headers.push(("Content-Length".into(), "9".into()));
        assert_eq!(length(&post), ["4"], "that of the author is not sent beside it");
        post.body.clear();
        assert_eq!(length(&post), ["0"]);
        assert!(length(&HttpRequest { method: "GET".into(), ..HttpRequest::default() }).is_empty());
    }

    #[test]
    fn secrets_of_urls_are_not_shown() {
        for (url, shown) in [
            ("https://idp:8443/auth", "https://idp:8443/auth"),
            ("https://ann:s3cret@idp/auth?token=s3cret#s3cret", "https://idp/auth"),
            ("https://ann:s3@cret@idp?token=s3/cret@x", "https://idp"),
            ("https://idp/a@b", "https://idp/a@b"),
            ("ann:s3cret@idp/auth", "idp/auth"),
            ("", ""),
        ] {
            assert_eq!(shown_url(url), shown);
        }
    }

    #[test]
    fn urls_have_parts() {
        assert_eq!(parts("https://a:1/b?c=d"), Ok((true, "a:1", "/b?c=d")));
        assert_eq!(parts("http://a"), Ok((false, "a", "/")));
        for wrong in ["a", "ftp://a/", "http:///x"] {
            assert!(parts(wrong).is_err(), "{wrong}");
        }
    }
}
